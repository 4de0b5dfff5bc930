"""Subclasses, patched instances and classes: whose forward is known, and where it finds its parameters."""

import pytest
import timm.layers
import torch
import torchvision.ops
from models import Pair, data, fused, prepared, reasons
from own_classes import OtherConvForward, PlainConv, ReluNorm, TwiceConv, make
from torch import nn
from torch.nn import functional as F

import convbn_fx
from convbn_fx import kinds, symbolic_trace, transform
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)


class StandardizedConv(nn.Conv2d):
    def forward(self, input):
        weight = self.weight - self.weight.mean(dim=[1, 2, 3], keepdim=True)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BranchingConv(nn.Conv2d):
    """Cannot be traced through."""

    def forward(self, input):
        return super().forward(input if input.sum() > 0 else -input)


class PlainNorm(nn.BatchNorm2d):
    """Changes nothing."""


class BranchingNorm(nn.BatchNorm2d):
    """Cannot be traced through."""

    def forward(self, input):
        return super().forward(input).relu() if input.sum() > 0 else super().forward(input)


@pytest.mark.parametrize(
    ("conv", "pairs"),
    [(PlainConv, 1), (TwiceConv, 0), (StandardizedConv, 1), (OtherConvForward, 1)],
)
def test_a_subclass_of_a_convolution_is_traced_through(conv, pairs):
    model = make(conv)
    graph_module = fused(model, pairs)
    assert_equivalent(model, graph_module, X)
    assert_equivalent(model, graph_module, -X)


@pytest.mark.parametrize(
    ("norm", "pairs", "left"),
    [
        (PlainNorm, 1, {}),
        (ReluNorm, 0, {"norm": "UNKNOWN_BATCH_NORM"}),
        (BranchingNorm, 0, {"norm": "UNKNOWN_BATCH_NORM"}),
        (timm.layers.BatchNormAct2d, 1, {}),
        (torchvision.ops.FrozenBatchNorm2d, 1, {}),
    ],
)
def test_a_subclass_of_a_batch_norm_keeps_what_it_does_besides(norm, pairs, left):
    model = make(norm=norm)
    graph_module = fused(model, pairs)
    assert reasons(graph_module) == left
    assert_equivalent(model, graph_module, X)
    assert_equivalent(model, graph_module, -X)


@pytest.mark.parametrize("norm", [PlainNorm, ReluNorm, timm.layers.BatchNormAct2d])
def test_a_subclass_of_a_batch_norm_in_an_exported_graph(norm):
    model = make(norm=norm)
    graph_module = fused(model, trace=lambda model: torch.export.export(model, (X,)).module())
    assert_equivalent(model, graph_module, X)
    assert_equivalent(model, graph_module, -X)


def test_a_subclass_of_a_batch_norm_in_a_graph_of_torch_fx():
    """torch.fx walks through it where ours keeps its buffers too."""
    captured = torch.fx.symbolic_trace(make(norm=timm.layers.BatchNormAct2d))
    assert_equivalent(captured, fused(captured, trace=lambda captured: captured), X)


def test_a_subclass_that_cannot_be_traced_through_is_left_alone():
    model = make(BranchingConv)
    graph_module = fused(model, 0)
    assert reasons(graph_module) == {"norm": "UNKNOWN_CONVOLUTION"}
    assert_equivalent(model, graph_module, X)
    assert_equivalent(model, graph_module, -X)


def test_a_norm_with_an_activation_checks_its_input_first():
    model = make(norm=timm.layers.BatchNormAct2d)
    graph_module = fused(model)
    with pytest.raises(AssertionError, match="expected 4D input"):
        model(data(3, 7, 6))
    with pytest.raises(AssertionError, match="expected 4D input"):
        graph_module(data(3, 7, 6))


def test_graphs_of_other_tracers_may_hold_unknown_classes_as_leaves():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return True

    for conv, norm, reason in (
        (TwiceConv, nn.BatchNorm2d, "UNKNOWN_CONVOLUTION"),
        (nn.Conv2d, ReluNorm, "UNKNOWN_BATCH_NORM"),
        (nn.Conv2d, BranchingNorm, "UNKNOWN_BATCH_NORM"),
    ):
        model = make(conv, norm)
        captured = torch.fx.GraphModule(model, Tracer().trace(model))
        graph_module = fused(captured, 0, trace=lambda captured: captured)
        assert graph_module.code == captured.code
        assert reasons(graph_module) == {"norm": reason}
        assert_equivalent(model, graph_module, X)


def patch_forward(model):
    model.conv.forward = lambda input: nn.Conv2d.forward(model.conv, input).sin()


def patch_conv_forward(model):
    model.conv._conv_forward = lambda input, weight, bias: F.conv2d(input, 2 * weight, bias)


def patch_norm_forward(model):
    model.norm.forward = lambda input: nn.BatchNorm2d.forward(model.norm, input).sin()


def patch_norm_check(model):
    model.norm._check_input_dim = lambda input: model.norm.running_mean.mul_(2)


PATCHES = [patch_forward, patch_conv_forward, patch_norm_forward, patch_norm_check]


@pytest.mark.parametrize("patch", PATCHES)
def test_an_instance_patched_before_the_rewrite(patch):
    model = make()
    patch(model)
    assert_equivalent(model, transform(symbolic_trace(model)), X)


@pytest.mark.parametrize("patch", PATCHES)
def test_an_instance_patched_after_the_rewrite(patch):
    model = make()
    graph_module = fused(model)
    plain = graph_module(X)
    patch(model)
    assert_equivalent(model, graph_module, X)
    assert not torch.allclose(graph_module(X), plain)
    for module in (model.conv, model.norm):
        for name in ("forward", "_conv_forward", "_check_input_dim"):
            vars(module).pop(name, None)
    assert_equivalent(model, graph_module, X)
    assert saved_bytes(graph_module, X) < saved_bytes(model, X)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (nn.Conv2d, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.modules.batchnorm._BatchNorm, "forward"),
    ],
)
def test_a_patched_class(monkeypatch, cls, name, when):
    model = make()
    graph_module = fused(model) if when == "after" else None
    plain = model(X)
    original = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, *args: original(self, *args).sin())
    if when == "before":
        graph_module = transform(symbolic_trace(model))
    assert_equivalent(model, graph_module, X)
    assert not torch.allclose(graph_module(X), plain)


def test_a_class_changed_after_the_rewrite():
    model = make()
    graph_module = fused(model)
    model.conv.__class__ = TwiceConv
    assert_equivalent(model, graph_module, X)
    model.norm.__class__ = ReluNorm
    assert_equivalent(model, graph_module, X)


class Marked(torch.Tensor):
    """A tensor subclass whose operations may mean something else."""


def test_a_tensor_subclass_as_parameter_is_left_to_eval_mode():
    model = make()
    graph_module = fused(model)
    model.conv.weight = nn.Parameter(model.conv.weight.detach().as_subclass(Marked))
    assert isinstance(model.conv.weight, Marked)
    expected, actual = model(X), graph_module(X)
    assert type(actual) is type(expected)
    assert torch.equal(actual, expected)


# --- Lazy modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "norm", "x"),
    [
        (nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), X),
        (nn.LazyConvTranspose2d(4, 3), nn.BatchNorm2d(4), X),
        (nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), data(2, 3, 6)),
        (nn.LazyLinear(4), nn.LazyBatchNorm1d(), data(5, 3)),
    ],
)
def test_lazy_modules_once_initialized(conv, norm, x):
    model = Pair(conv, norm).double()
    model(x)
    prepared(model)
    assert_equivalent(model, fused(model), x)


@pytest.mark.parametrize(
    ("conv", "norm"), [(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)), (nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d())]
)
def test_lazy_modules_before_they_are_initialized(conv, norm):
    model = Pair(conv, norm).eval()
    graph_module = fused(model, 0)
    assert reasons(graph_module) == {"norm": "UNINITIALIZED"}
    assert_equivalent_after_first_call = graph_module(X.float())
    torch.testing.assert_close(assert_equivalent_after_first_call, model(X.float()))
    fused(model)


# --- Where a forward finds its parameters -------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    """Its forward reads a property, which hides the parameter of that name."""

    weight = property(lambda self: self._doubled())

    def _doubled(self):
        try:
            return 2 * self._parameters["weight"]
        except KeyError:  # torch.nn asks before it makes one
            raise AttributeError("weight") from None


class HiddenByGetattribute(nn.Conv2d):
    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        return 2 * found if name == "bias" and found is not None else found


class HiddenByGetattr(nn.Conv2d):
    def __getattr__(self, name):
        found = super().__getattr__(name)
        return 2 * found if name == "weight" and isinstance(found, nn.Parameter) else found


class CalledTwice(nn.Conv2d):
    def __call__(self, input):
        return super().__call__(input) + 1


class DoubledNorm(nn.BatchNorm2d):
    """Its statistics and parameters are computed when they are read."""

    def __getattr__(self, name):
        found = super().__getattr__(name)
        return (
            2 * found
            if name in ("weight", "bias", "running_mean", "running_var") and found is not None
            else found
        )


class NormOfConstants(nn.BatchNorm2d):
    """Class attributes stand behind parameters and buffers, and before `__getattr__`."""

    bias = property(lambda self: self._parameters["weight"].sin())
    running_mean = property(lambda self: self._buffers["running_var"].cos())

    def __init__(self, channels):
        super(nn.modules.batchnorm._NormBase, self).__init__()
        self.num_features, self.eps, self.momentum, self.affine = channels, 1e-5, 0.1, True
        self.track_running_stats = True
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.register_buffer("running_var", torch.rand(channels) + 0.5)
        self.register_buffer("num_batches_tracked", torch.tensor(0))


class NormFrozenByProperty(nn.BatchNorm2d):
    training = property(lambda self: False, lambda self, value: None)


OWN_WAYS = {
    "property": (Doubled, nn.BatchNorm2d, 1, 1),
    "__getattr__": (HiddenByGetattr, nn.BatchNorm2d, 1, 1),
    "__getattribute__": (HiddenByGetattribute, nn.BatchNorm2d, 1, 1),
    "__call__": (CalledTwice, nn.BatchNorm2d, 0, 0),
    "norm's __getattr__": (nn.Conv2d, DoubledNorm, 1, 1),
    "norm's class attributes": (nn.Conv2d, NormOfConstants, 1, 1),
    "norm's mode": (nn.Conv2d, NormFrozenByProperty, 1, 1),
}


@pytest.mark.parametrize("way", OWN_WAYS)
@pytest.mark.parametrize("how", ["transform", "tune", "deploy"])
def test_operands_are_what_the_forward_reads(way, how):
    conv, norm, pairs, baked = OWN_WAYS[way]
    if (way, how) == ("__call__", "transform"):
        pytest.skip("torch.fx calls a leaf by its forward")
    model = make(conv, norm)
    if how == "deploy":
        deployed = convbn_fx.deploy(model)
        assert len(convbn_fx.report(deployed).fused) == baked
        torch.testing.assert_close(deployed(X), model(X), rtol=1e-9, atol=1e-9)
        return
    candidate = convbn_fx.tune(model) if how == "tune" else transform(symbolic_trace(model))
    assert len(convbn_fx.report(candidate).fused) == pairs
    assert_equivalent(model, candidate, X)


def test_an_attribute_of_the_instance_hides_its_parameter():
    model = make()
    vars(model.conv)["weight"] = 2 * model.conv.weight.detach()
    tuned = convbn_fx.tune(model)
    assert_equivalent(model, tuned, X)
    assert kinds.convolution_kind(model.conv) is None


def test_a_registered_class_with_a_property():
    class Mine(DoubledNorm):
        def forward(self, input):
            return super().forward(input) if input.sum() < 1e9 else None

    convbn_fx.register_batch_norm(Mine, like=nn.BatchNorm2d)
    model = make(norm=Mine)
    assert_equivalent(model, fused(model), X)
