"""The way back: a plain model with the same tensors, for tools that look for exact classes."""

import copy
import pickle
import warnings

import pytest
import torch
import torchvision
from blocks import GRAPHS, traced_by_torch
from models import (
    ALL_NET_PAIRS,
    Functional,
    Pair,
    Residual,
    conv_norm,
    data,
    modes,
    net,
    prepared,
    through_pickle,
    tuned_with,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import convbn_fx
from convbn_fx import symbolic_trace, transform, tune, untune
from convbn_fx.fx.copying import _references, _walk
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)


def pair():
    return prepared(nn.Sequential(*conv_norm(), nn.ReLU()))


def traces_of_us(model):
    """What a model leads to, in its attributes and classes, that is this library's."""
    reached, _ = _walk([model], _references)
    values = [*reached.values(), *(cls for module in model.modules() for cls in type(module).__mro__)]
    names = [name for module in model.modules() for name in (*vars(module), *vars(type(module)))]
    return [name for name in names if "convbn_fx" in name] + [
        value
        for value in values
        if any(str(getattr(v, "__module__", "")).startswith("convbn_fx") for v in (value, type(value)))
    ]


def assert_is_plain(model, original):
    assert not traces_of_us(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in original.named_modules()
    ]
    for mine, theirs in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*original.named_parameters(), *original.named_buffers()],
        strict=True,
    ):
        assert mine[0] == theirs[0]
        assert mine[1] is theirs[1]
    assert list(model.state_dict()) == list(original.state_dict())
    with pytest.raises(ValueError, match="nothing in this"):
        convbn_fx.report(model)


# --- There and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"norm_eval": True}, {"modules": ["stem"]}], ids=str)
def test_there_and_back(options):
    original = net()
    tuned = tune(original, **options)
    handle = tuned.stem.conv.register_forward_hook(lambda *_: None)
    tuned.dropout.train()
    plain = untune(tuned)
    assert_is_plain(plain, original)
    assert modes(plain) == modes(tuned)
    assert len(plain.stem.conv._forward_hooks) == 1
    handle.remove()
    assert len(plain.stem.conv._forward_hooks) == 1
    tuned.dropout.eval()
    plain.dropout.eval()
    assert_equivalent(original, plain, X)
    assert len(convbn_fx.report(tuned_with(plain, ALL_NET_PAIRS)).fused) == ALL_NET_PAIRS
    assert_equivalent(original, tuned, X)


def test_norm_eval_ends():
    tuned = tune(pair(), norm_eval=True).train()
    assert not tuned[1].training
    assert not untune(tuned)[1].training
    assert untune(tuned).train()[1].training
    assert not tuned.train()[1].training


def test_a_tuned_part_of_a_plain_model():
    original = net()
    larger = nn.ModuleDict({"body": tune(original), "head": nn.Linear(5, 2).double()})
    plain = untune(larger)
    assert_is_plain(plain["body"], original)
    assert plain["head"].weight is larger["head"].weight


def test_a_model_that_was_not_tuned():
    original = net()
    plain = untune(original)
    assert plain is not original
    assert_is_plain(plain, original)


@pytest.mark.parametrize("when", ["before", "after"])
def test_computed_weights(when):
    original = pair()
    if when == "before":
        parametrizations.weight_norm(original[0])
    tuned = tune(original, norm_eval=True)
    if when == "after":
        parametrizations.weight_norm(tuned[0])
        parametrizations.weight_norm(tuned[1])
    plain = untune(tuned)
    assert not traces_of_us(plain)
    assert_equivalent(tuned, plain, X)
    for part in plain:
        if parametrize.is_parametrized(part):
            parametrize.remove_parametrizations(part, "weight")
    assert [type(part) for part in plain] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert parametrize.is_parametrized(tuned[0])
    torch.testing.assert_close(plain(X), tuned(X))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_there_and_back(copied):
    original = net()
    plain = untune(copied(tune(original)))
    assert not traces_of_us(plain)
    assert_equivalent(original, copied(plain), X)


@pytest.mark.parametrize("argument", [None, torch.ones(1), [pair()]])
def test_no_module(argument):
    with pytest.raises(TypeError, match=r"untune: expected a torch\.nn\.Module, got"):
        untune(argument)


def test_a_pickle_needs_this_library_no_more():
    assert b"convbn_fx" in pickle.dumps(tune(pair()))
    assert b"convbn_fx" not in pickle.dumps(untune(tune(pair())))
    assert b"convbn_fx" not in pickle.dumps(untune(tune(nn.Sequential(traced_by_torch(), nn.ReLU()))))


# --- Graphs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
def test_a_model_with_a_graph_inside(graph):
    torch.manual_seed(0)
    original = prepared(nn.Sequential(*conv_norm(3, 4), nn.ReLU(), nn.Sequential()))
    original[3].append(graph())
    tuned = tuned_with(original, 1 + GRAPHS[graph])
    plain = untune(tuned)
    assert not traces_of_us(plain)
    assert isinstance(plain[3][0], torch.fx.GraphModule)
    assert "conv_batch_norm" not in plain[3][0].code
    assert_equivalent(original, plain, X)
    assert_equivalent(original, tuned, X)
    assert len(convbn_fx.report(tune(plain)).fused) == 1 + GRAPHS[graph]


def functional(m, x):
    return m.normalize(nn.functional.conv2d(x, m.weight, m.bias, stride=2, padding=1))


@pytest.mark.parametrize("copied", [lambda graph: graph, copy.deepcopy, through_pickle])
@pytest.mark.parametrize(
    "model", [net(), prepared(Residual(3)), Functional(functional, (4, 3, 3, 3), 4).double()], ids=type
)
def test_a_rewritten_graph(model, copied):
    traced = symbolic_trace(model)
    rewritten = copied(transform(traced))
    plain = untune(rewritten)
    assert not traces_of_us(plain)
    assert [(node.op, node.target) for node in plain.graph.nodes if node.op == "call_module"] == [
        (node.op, node.target) for node in traced.graph.nodes if node.op == "call_module"
    ]
    assert set(plain.state_dict()) == set(model.state_dict())
    assert_equivalent(model, plain, X)
    assert_equivalent(model, rewritten, X)
    assert len(convbn_fx.report(transform(plain)).fused) == len(convbn_fx.report(rewritten).fused)


def test_an_exported_graph():
    original = net()
    exported = torch.export.export(original, (X,)).module()
    plain = untune(transform(exported))
    assert not any("convbn_fx" in str(node.target) for node in plain.graph.nodes)
    assert_equivalent(exported, plain, X)


# --- The tools that ask for it ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_scripting():
    original = pair()
    for model in (tune(original), nn.Sequential(tune(original)), tune(nn.Sequential(original))):
        before = [type(module) for module in model.modules()]
        with pytest.raises(TypeError, match=r"Script convbn_fx\.untune\(model\)"):
            torch.jit.script(model)
        assert [type(module) for module in model.modules()] == before
        scripted = torch.jit.script(untune(model))
        torch.testing.assert_close(scripted(X), original(X))


def test_fuse_modules():
    original = pair()
    tuned = tune(original)
    fused = torch.ao.quantization.fuse_modules(untune(tuned), [["0", "1"]])
    assert [type(part) for part in fused] == [nn.Conv2d, nn.Identity, nn.ReLU]
    torch.testing.assert_close(fused(X), original(X))
    assert_equivalent(original, tuned, X)


def test_fx_fuse():
    from torch.fx.experimental.optimization import fuse

    original = pair().float()
    fused = fuse(untune(tune(original)))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    torch.testing.assert_close(fused(X.float()), original(X.float()), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
@pytest.mark.parametrize("training", [False, True], ids=["prepare", "prepare for training"])
def test_quantisation_of_graphs(training):
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

    original = pair().float()
    plain = untune(tune(original))
    if training:
        result = prepare_qat_fx(plain.train(), get_default_qat_qconfig_mapping(), (X.float(),))
        expected = prepare_qat_fx(
            copy.deepcopy(original).train(), get_default_qat_qconfig_mapping(), (X.float(),)
        )
    else:
        result = prepare_fx(plain, get_default_qconfig_mapping(), (X.float(),))
        expected = prepare_fx(original, get_default_qconfig_mapping(), (X.float(),))
    names = {type(module).__name__ for module in result.modules()}
    assert names == {type(module).__name__ for module in expected.modules()}
    assert any("ConvReLU2d" in name or "ConvBnReLU2d" in name for name in names)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_quantisable_model():
    torch.manual_seed(0)
    original = prepared(torchvision.models.quantization.mobilenet_v2(weights=None, num_classes=4))
    images = data(1, 3, 32, 32)
    expected = original(images)
    plain = untune(tune(original))
    plain.fuse_model()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())
    torch.testing.assert_close(plain(images), expected)
    torch.testing.assert_close(original(images), expected)


@pytest.mark.parametrize("around", [lambda model: model, nn.Sequential], ids=["itself", "part"])
def test_statistics_that_are_updated(around):
    """`update_bn` resets statistics, and waits for Train mode to fill them again."""
    original = prepared(Pair())
    tuned = around(tune(original, norm_eval=True))
    batches = [data(2, 3, 6, 6, seed=seed) for seed in range(3)]
    before = copy.deepcopy(original.state_dict())
    with pytest.raises(RuntimeError, match=r"convbn_fx\.untune\(model\)"):
        torch.optim.swa_utils.update_bn(batches, tuned)
    torch.testing.assert_close(original.state_dict(), before)
    expected = copy.deepcopy(original)
    for model in (expected, untune(tuned)):
        torch.optim.swa_utils.update_bn(batches, model)
    assert not torch.equal(expected.norm.running_mean, before["norm.running_mean"])
    assert_equivalent(around(expected).eval(), tuned.eval(), X)
    assert_equivalent(expected, original, X)


def test_statistics_of_a_model_whose_batch_norms_may_train():
    original = pair()
    tuned = tune(original, include_training=True)
    torch.optim.swa_utils.update_bn([X, 2 * X], tuned.train())
    assert tuned[1].num_batches_tracked == 2
    assert_equivalent(original.eval(), tuned.eval(), X)


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        original = pair()
        parallel = nn.parallel.DistributedDataParallel(tune(original))
        plain = untune(parallel)
        assert not traces_of_us(plain.module)
        assert_equivalent(original, plain.module, X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_equivalent(original, untune(parallel.module), X)
    finally:
        dist.destroy_process_group()
