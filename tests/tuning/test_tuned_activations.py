"""Activations, batch norms that stay and gates of tuned and of rewritten models."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
from hooks import HOOKS
from models import data, exported, prepared, through_pickle
from timm.layers import activations as timm_activations
from timm.layers import activations_me, create_act, squeeze_excite
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops.misc import SqueezeExcitation

from convbn_fx import deploy, kinds, report, symbolic_trace, transform, tune, untune
from convbn_fx.functional import native
from convbn_fx.memory import saved_bytes
from convbn_fx.operands import Activation
from convbn_fx.testing import assert_equivalent

pytestmark = pytest.mark.skipif(
    native.operator is None, reason="without the operator all runs as it is written"
)

X = data(2, 4, 6, 6)

ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "Hardtanh": partial(nn.Hardtanh, -0.5, 0.7),
    "LeakyReLU": partial(nn.LeakyReLU, 0.2),
    "LeakyReLU, negative": partial(nn.LeakyReLU, -0.2),
    "ELU": partial(nn.ELU, 0.5),
    "Hardsigmoid": nn.Hardsigmoid,
    "SiLU": nn.SiLU,
    "Hardswish": nn.Hardswish,
    "Mish": nn.Mish,
    "timm Swish": timm_activations.Swish,
    "timm Mish": timm_activations.Mish,
    "timm HardSwish": timm_activations.HardSwish,
    "timm HardMish": timm_activations.HardMish,
    "timm SwishMe": activations_me.SwishMe,
    "timm HardSwishMe": activations_me.HardSwishMe,
}
NEVER_IN_PLACE = {
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "GELU": nn.GELU,
    "GELU, tanh": partial(nn.GELU, "tanh"),
    "timm GELU": timm_activations.GELU,
    "timm GELUTanh": timm_activations.GELUTanh,
}
MAKERS = {
    **{name: partial(make, inplace=False) for name, make in ACTIVATIONS.items()},
    **{
        f"{name}, in place": partial(make, inplace=True)
        for name, make in ACTIVATIONS.items()
        if "negative" not in name  # of which PyTorch knows no gradient
    },
    **NEVER_IN_PLACE,
}


class Net(nn.Module):
    """Pairs, a pre-activation block and a sum; one activation is called in three places."""

    def __init__(self, activation):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
        self.first = nn.BatchNorm2d(4)
        self.act = activation

    def forward(self, x):
        x = self.conv1(self.act(self.first(x)))
        y = self.act(self.norm1(x))
        y = self.act(self.norm2(self.conv2(y)))
        return self.norm3(self.conv3(y + x.cos())).sin()


def network(make):
    torch.manual_seed(0)
    return prepared(Net(make()))


def silu_net():
    return network(nn.SiLU)


def gradients(model, x=X):
    """The output and every gradient, those of parameters in the order of their names."""
    x = x.clone().requires_grad_()
    output = model(x)
    trained = [(name, each) for name, each in sorted(model.named_parameters()) if each.requires_grad]
    return [output, *torch.autograd.grad(output.sum(), [x, *(each for _, each in trained)])]


FREEZERS = {
    "all train": lambda model: model,
    "nothing trains": lambda model: model.requires_grad_(False),
    "betas train": lambda model: only(model, lambda name: "norm" in name and "bias" in name),
    "weights train": lambda model: only(model, lambda name: "conv" in name),
    "gammas train": lambda model: only(model, lambda name: "norm" in name and "weight" in name),
}


def only(model, trains):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    return model


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("freezer", FREEZERS)
def test_tuned_and_rewritten(name, freezer):
    model = FREEZERS[freezer](network(MAKERS[name]))
    without = gradients(tune(model, activations=False))
    rounds = {"rtol": 1e-9, "atol": 1e-12} if "ELU" in name or "Hard" in name or "timm" in name else {}
    for changed in (tune(model), transform(symbolic_trace(model))):
        assert_equivalent(model, changed, X)
        for found, expected in zip(gradients(changed), without, strict=True):
            torch.testing.assert_close(found, expected, **(rounds or {"rtol": 1e-13, "atol": 1e-13}))


@pytest.mark.parametrize(
    "name", ["ReLU6", "SiLU", "SiLU, in place", "Mish", "GELU", "timm Swish", "timm SwishMe"]
)
def test_the_model_saves_less(name):
    model = network(MAKERS[name])
    for change in (tune, lambda model, **options: transform(symbolic_trace(model), **options)):
        with_them, without = (saved_bytes(change(model, activations=each), X) for each in (True, False))
        assert with_them < without


def test_the_report_tells():
    model = silu_net()
    for changed in (tune(model), transform(symbolic_trace(model))):
        found = {(each.kind, each.saves) for each in report(changed).activations}
        assert ("SiLU", "saves its input, of which its output is recomputed") in found
        assert "SiLU: saves its input, of which its output is recomputed" in str(report(changed))
        names = {each.name for each in report(changed).activations}
        assert {"act", "first"} <= names
    for changed in (tune(model, activations=False), transform(symbolic_trace(model), activations=False)):
        assert not report(changed).activations
        assert "SiLU" not in str(report(changed))


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", ["act", "first"])
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
def test_hooks_fire(kind, place):
    model = silu_net()
    tuned = tune(model)
    bytes_without = saved_bytes(tuned, X)
    handle = HOOKS[kind](getattr(model, place))
    other = HOOKS[kind](getattr(tuned, place))
    assert_equivalent(model, tuned, X)
    assert_equivalent(model, tune(model), X)
    handle.remove()
    other.remove()
    assert_equivalent(model, tuned, X)
    assert saved_bytes(tuned, X) == bytes_without


def test_train_mode_comes_and_goes():
    model = silu_net()
    tuned = tune(model)
    for mode in (True, False):
        assert_equivalent(model.train(mode), tuned.train(mode), X)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies(copied):
    model = silu_net()
    for changed in (tune(model), transform(symbolic_trace(model))):
        twin = copied(changed)
        assert_equivalent(model, twin, X)
        assert saved_bytes(twin, X) == saved_bytes(changed, X)
        assert report(twin).activations == report(changed).activations


def test_the_way_back():
    model = silu_net()
    back = untune(tune(model))
    assert type(back.act) is nn.SiLU
    assert type(back.first) is nn.BatchNorm2d
    assert_equivalent(model, back, X)
    with torch.no_grad():
        torch.testing.assert_close(deploy(tune(model))(X), model(X))


def test_compiled_and_exported():
    model = silu_net()
    tuned = tune(model)
    compiled = torch.compile(tuned, backend="aot_eager")
    for found, expected in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(exported(tuned, X)(X), model(X))
    torch._dynamo.reset()


def test_functional_transforms():
    model = silu_net()
    tuned = tune(model)
    x = X.clone()
    for transformed in (torch.func.grad, torch.func.jacrev):
        found, expected = (transformed(lambda x, each=each: each(x).sum())(x) for each in (tuned, model))
        torch.testing.assert_close(found, expected)


def test_gradients_twice_over_one_graph():
    tuned, model = tune(silu_net()), silu_net()
    for each in (tuned, model):
        loss = each(X).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for one, other in zip(tuned.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_recomputed(name, reentrant):
    model = network(MAKERS[name])
    tuned = tune(model)
    x = X.clone().requires_grad_()
    found = []
    for run in (tuned, partial(checkpoint, tuned, use_reentrant=reentrant)):
        tuned.zero_grad()
        x.grad = None
        run(x).sum().backward()
        found.append([x.grad, *(each.grad for each in tuned.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_threads():
    tuned, expected = tune(silu_net()), gradients(silu_net())
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: gradients(tuned), range(16)):
            assert all(map(torch.allclose, found, expected))


def test_autocast():
    model = prepared(Net(nn.SiLU()), torch.float32)
    x = X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = gradients(tune(model), x), gradients(model, x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=0.1, atol=0.1 * other.abs().max().item())


class Scaled(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x)


def test_a_registered_class(monkeypatch):
    assert not [each for each in report(tune(network(Scaled))).activations if each.name == "act"]
    known = kinds.classes.ACTIVATION_CLASSES
    monkeypatch.setattr(
        kinds.classes, "ACTIVATION_CLASSES", kinds.classes.Classes(dict(known.rows), known.named)
    )
    kinds.register_activation(Scaled, operands=lambda module: Activation("silu"))
    tuned = tune(network(Scaled))
    assert [each.kind for each in report(tuned).activations if each.name == "act"] == ["Scaled"]
    assert_equivalent(network(Scaled), tuned, X)
    assert saved_bytes(tuned, X) == saved_bytes(tune(silu_net()), X)


def test_efficientnet_pytorchs_classes():
    utils = pytest.importorskip("efficientnet_pytorch.utils")
    for make in (utils.Swish, utils.MemoryEfficientSwish):
        model = network(make)
        assert [each.name for each in report(tune(model)).activations if each.name == "act"] == ["act"]
        assert_equivalent(model, tune(model), X)


class Gated(nn.Module):
    """A gate between pairs, on an activation's output."""

    def __init__(self, gate):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.gate = nn.SiLU(), gate
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm2(self.conv2(self.gate(self.act(self.norm1(self.conv1(x))))))


class OwnGate(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


GATES = {
    "timm SEModule": partial(squeeze_excite.SEModule, 4, rd_channels=2),
    "timm EffectiveSEModule": partial(squeeze_excite.EffectiveSEModule, 4),
    "timm SqueezeExcite": lambda: timm.models._efficientnet_blocks.SqueezeExcite(4),
    "timm SEModule, hard sigmoid": partial(
        squeeze_excite.SEModule, 4, rd_channels=2, gate_layer="hard_sigmoid"
    ),
    "torchvision": partial(SqueezeExcitation, 4, 2),
    "torchvision, hard sigmoid": partial(SqueezeExcitation, 4, 2, scale_activation=nn.Hardsigmoid),
    "one's own": OwnGate,
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name):
    torch.manual_seed(0)
    model = prepared(Gated(GATES[name]()))
    for changed in (tune(model), transform(symbolic_trace(model))):
        assert_equivalent(model, changed, X)
    for handles in (HOOKS["forward"], HOOKS["full backward"]):
        tuned = tune(model)
        kept = [handles(each.gate) for each in (model, tuned)]
        assert_equivalent(model, tuned, X)
        for handle in kept:
            handle.remove()
    if name != "one's own":
        assert saved_bytes(tune(model), X) < saved_bytes(tune(model, activations=False), X)


def test_activations_by_timms_names():
    for name in (
        "swish",
        "mish",
        "relu6",
        "leaky_relu",
        "elu",
        "gelu",
        "hard_swish",
        "hard_sigmoid",
        "quick_gelu",
    ):
        model = network(partial(create_act.create_act_layer, name))
        assert_equivalent(model, tune(model), X)


#: At most so much of Eval mode's bytes.
SHARES = {
    "mobilenetv2_100": 0.36,
    "efficientnet_lite0": 0.36,
    "lcnet_100": 0.37,
    "rexnet_100": 0.40,
    "repvit_m1": 0.40,
    "mobilenetv3_large_100": 0.51,
    "efficientnet_b0": 0.40,
    "tf_efficientnetv2_b0": 0.54,
    "tinynet_a": 0.54,
    "regnetz_b16": 0.54,
    "mobilevit_xxs": 0.52,
    "cs3darknet_s": 0.48,
    "densenet121": 0.60,
    "dpn68": 0.53,
    "resnetv2_50": 0.66,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARES)
def test_shares_of_whole_networks(name):
    model = timm.create_model(name).eval()
    images = torch.empty(()).expand(8, 3, 224, 224)
    share = saved_bytes(tune(model), images, fake=True) / saved_bytes(model, images, fake=True)
    assert share <= SHARES[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenetv2_100", "efficientnet_b0", "mobilenetv3_large_100", "resnetv2_50"]
)
def test_whole_networks(name):
    torch.manual_seed(0)
    model = prepared(timm.create_model(name, num_classes=10))
    assert_equivalent(model, tune(model), data(2, 3, 64, 64))


@pytest.mark.slow
def test_a_frozen_network_saves_masks():
    model = timm.create_model("resnet50").eval().requires_grad_(False)
    images = torch.zeros(2, 3, 96, 96, requires_grad=True)
    assert saved_bytes(tune(model), images) / saved_bytes(model, images) <= 0.20
