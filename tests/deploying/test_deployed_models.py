"""Whole models deployed, and PyTorch's tools and ONNX on what came out."""

from functools import partial

import pytest
import timm
import torch
from deployed import SOURCES, SharedNorm, SharedWithoutNorm, assert_same, called_norms, norms_in
from models import Functional, Pair, data, net, prepared, reasons, with_slow
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

import convbn_fx
from convbn_fx import deploy, report, tune
from convbn_fx.api import tuned_and_deployed

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning")


# --- Tools --------------------------------------------------------------------------------------------------------


SMALL = {
    "net": (net, X),
    "linear": (lambda: prepared(Pair(nn.Linear(6, 4), nn.BatchNorm1d(4))), data(5, 6)),
    "activation": (lambda: prepared(Pair(nn.Conv2d(3, 4, 3), BatchNormAct2d(4))), X),
}


@pytest.mark.parametrize(
    ("small", "source"),
    [("net", "tuned"), ("linear", "model"), ("activation", "transformed")],
)
def test_torch_compile(small, source):
    torch._dynamo.reset()
    build, x = SMALL[small]
    model = build()
    deployed = deploy(SOURCES.get(source, lambda m: m)(model))
    assert_same(model, torch.compile(deployed, backend="aot_eager", fullgraph=True), x)
    torch._dynamo.reset()


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("source", ["model", "tuned", "transformed"])
def test_torch_export(small, source):
    build, x = SMALL[small]
    model = build()
    deployed = deploy(SOURCES.get(source, lambda m: m)(model))
    exported = torch.export.export(deployed, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-9, atol=1e-9)
    assert not called_norms(exported)


def test_torch_export_of_any_batch_size():
    model = prepared(Pair(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(deploy(model), (data(5, 6),), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(data(9, 6)), model(data(9, 6)))


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("source", ["model", "tuned", "transformed"])
def test_torch_jit_trace(small, source):
    build, x = SMALL[small]
    model = build()
    deployed = deploy(SOURCES.get(source, lambda m: m)(model))
    traced = torch.jit.trace(deployed, x)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-9, atol=1e-9)
    assert "aten::batch_norm" not in str(traced.inlined_graph)


def test_torch_fx():
    model = net()
    traced = torch.fx.symbolic_trace(deploy(model))
    assert not called_norms(traced)
    assert_same(model, traced, X)


def of_torchvision(name, **options):
    return getattr(models, name)(weights=None, num_classes=4, **options)


ONNX = {
    "net": (net, (2, 3, 8, 8)),
    "tuned net": (lambda: tune(net()), (2, 3, 8, 8)),
    "linear": (lambda: prepared(Pair(nn.Linear(6, 4), nn.BatchNorm1d(4))), (5, 6)),
    "activation": (lambda: prepared(Pair(nn.Conv2d(3, 4, 3), BatchNormAct2d(4))), (2, 3, 8, 8)),
    "mobilenet_v3_small": (lambda: prepared(of_torchvision("mobilenet_v3_small")), (1, 3, 64, 64)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.onnx.*")
@pytest.mark.parametrize(
    "name",
    with_slow(ONNX, ONNX.keys() - {"net", "tuned net"}),
)
def test_onnx(name, tmp_path):
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401 - which torch.onnx needs

    torch.manual_seed(0)
    build, shape = ONNX[name]
    model = build().float()
    x = data(*shape, dtype=torch.float32)
    expected = model(x).detach()
    path = tmp_path / "model.onnx"
    torch.onnx.export(deploy(model), (x,), path, dynamo=True, verbose=False, external_data=False)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(path).graph.node}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-3)


# --- Whole models -------------------------------------------------------------------------------------------------


def of_timm(name, **options):
    return timm.create_model(name, pretrained=False, **{"num_classes": 4} | options)


#: How each is built, how many pairs are folded, and how many of its batch norms stay.
WHOLE = {
    "resnet18": (partial(of_torchvision, "resnet18"), 20, 0),
    "densenet121": (partial(of_torchvision, "densenet121"), 59, 62),
    "a small densenet": (partial(models.DenseNet, 8, (2, 2, 2), 16, num_classes=4), 7, 9),
    "tf_efficientnet_b0": (partial(of_timm, "tf_efficientnet_b0"), 49, 0),
    "resnetv2_50d": (partial(of_timm, "resnetv2_50d", layers=(1, 1, 1, 1)), 10, 5),
    "mobilenetv3_small_050": (partial(of_timm, "mobilenetv3_small_050"), 34, 0),
    "resnet18, FrozenBatchNorm2d": (partial(of_torchvision, "resnet18", norm_layer=FrozenBatchNorm2d), 20, 0),
}


#: What is not left for `make test-all`.
QUICK = {
    "a small densenet": torch.float64,
    "tf_efficientnet_b0": torch.float32,
    "resnetv2_50d": torch.float64,
}

QUICK["resnet18"] = torch.float32


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if QUICK.get(name) is dtype else [pytest.mark.slow])
        for name in WHOLE
        for dtype in (torch.float64, torch.float32)
    ],
    ids=str,
)
def test_a_whole_model(name, dtype):
    torch.manual_seed(0)
    build, pairs, left = WHOLE[name]
    model = prepared(build(), dtype)
    x = data(2, 3, 32, 32, dtype=dtype)
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    tuned = tune(model)
    deployed = deploy(model)
    assert len(report(deployed).fused) == len(report(tuned).fused) == pairs
    assert len(norms_in(deployed)) == len(report(deployed).skipped) == left
    assert set(reasons(deployed).values()) <= {"NOT_AFTER_CONVOLUTION"}
    with torch.no_grad():
        expected = model(x)
        scale = expected.abs().max().item()
        for candidate in (deployed, deploy(tuned)):
            tolerance = 1e-9 if dtype == torch.float64 else 1e-3
            torch.testing.assert_close(candidate(x), expected, rtol=0, atol=tolerance * scale)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(id(after[name]) == i and torch.equal(after[name], t) for name, (i, t) in before.items())


def modules_of(model):
    return {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize(
    "make",
    [
        net,
        SharedNorm,
        SharedWithoutNorm,
        partial(Functional, lambda self, x: self.normalize(F.conv2d(x, self.weight)), (4, 3, 3, 3), 4),
        lambda: nn.Sequential(convbn_fx.symbolic_trace(net().eval())),
        models.resnet18,
    ],
    ids=["net", "shared", "apart", "functions", "graph", "resnet18"],
)
def test_both_at_once_are_the_two_one_by_one(make):
    model = make().eval()
    tuned, deployed = tuned_and_deployed(model)
    for together, alone in ((tuned, tune(model)), (deployed, deploy(model))):
        assert modules_of(together) == modules_of(alone)
        assert report(together) == report(alone)


def test_what_is_left_of_a_batch_norm_keeps_its_modes():
    torch.manual_seed(0)
    norm = timm.layers.BatchNormAct2d(4, drop_layer=nn.Dropout)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).train()
    norm.training = False
    deployed = deploy(model)
    assert deployed[1].drop.training
    assert not deployed[1].training
