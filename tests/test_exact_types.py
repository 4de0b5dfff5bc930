"""Failure class e: subclasses, patched instances and classes; registration of one's own."""

import pytest
import timm.layers
import torch
import torchvision.ops
from models import Pair, data, fused, prepared, reasons
from torch import nn
from torch.nn import functional as F

import convbn_fx
from convbn_fx import kinds, symbolic_trace, transform
from convbn_fx.kinds import BatchNorm, Convolution
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)


class PlainConv(nn.Conv2d):
    """Changes nothing."""


class TwiceConv(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class StandardizedConv(nn.Conv2d):
    def forward(self, input):
        weight = self.weight - self.weight.mean(dim=[1, 2, 3], keepdim=True)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class OtherConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * weight, bias)


class BranchingConv(nn.Conv2d):
    """Cannot be traced through."""

    def forward(self, input):
        return super().forward(input if input.sum() > 0 else -input)


class PlainNorm(nn.BatchNorm2d):
    """Changes nothing."""


class ReluNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class BranchingNorm(nn.BatchNorm2d):
    """Cannot be traced through."""

    def forward(self, input):
        return super().forward(input).relu() if input.sum() > 0 else super().forward(input)


@pytest.fixture(autouse=True)
def _tables(monkeypatch):
    """What a test registers is gone afterwards."""
    for table in ("_CONVOLUTION_CLASSES", "_BATCH_NORM_CLASSES"):
        monkeypatch.setattr(kinds, table, kinds._Table(getattr(kinds, table)))


def make(conv=nn.Conv2d, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return prepared(Pair(conv(3, 4, 3), norm(4)))


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


# --- Registration -------------------------------------------------------------------------------------------------


class PaddedConv(nn.Conv2d):
    """Pads on the right; cannot be traced through."""

    def forward(self, input):
        if input.sum() > 1e9:
            raise ValueError
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Rows(nn.Module):
    """A layer that shares nothing with torch.nn's."""

    def __init__(self, channels_in, channels_out, size):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels_out, channels_in, 1, size))

    def forward(self, input):
        return F.conv2d(input, self.kernel.double() if input.sum() > 1e9 else self.kernel)


class Affine(nn.Module):
    """A batch norm with attributes of its own."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels) + 0.5)
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("variance", torch.rand(channels) + 0.5)

    def forward(self, input):
        assert not self.training
        return F.batch_norm(input, self.mean, self.variance, self.gain, eps=1e-3)


def test_register_conv_by_its_base_class():
    class Mine(nn.Conv2d):
        """Adds nothing that a forward would notice."""

    convbn_fx.register_conv(Mine)
    model = make(Mine)
    graph_module = fused(model)
    assert convbn_fx.report(graph_module).fused[0].convolution_kind == "Mine"
    assert_equivalent(model, graph_module, X)
    assert saved_bytes(graph_module, X) < saved_bytes(model, X)


def test_register_conv_like_another_class():
    class Mine(nn.Module):
        def __init__(self, *args):
            super().__init__()
            vars(self).update(vars(nn.Conv2d(*args)))

        def forward(self, input):
            return F.conv2d(input, self.weight, self.bias)

    convbn_fx.register_conv(Mine, like=nn.Conv2d)
    model = make(Mine)
    assert_equivalent(model, fused(model), X)


@pytest.mark.parametrize(
    ("conv", "operands"),
    [
        (
            PaddedConv,
            lambda module, input: (
                F.pad(input, (0, 1, 0, 1)),
                Convolution("conv2d", module.weight, module.bias, module.stride),
            ),
        ),
        (Rows, lambda module, input: (input, Convolution("conv2d", module.kernel))),
    ],
)
def test_register_conv_by_its_operands(conv, operands):
    model = make(conv)
    assert reasons(fused(model, 0)) in ({"norm": "UNKNOWN_CONVOLUTION"}, {"norm": "NOT_AFTER_CONVOLUTION"})
    convbn_fx.register_conv(conv, operands=operands)
    graph_module = fused(model)
    assert_equivalent(model, graph_module, X)
    assert saved_bytes(graph_module, X) < saved_bytes(model, X)


def test_register_batch_norm_like_its_base_class():
    class Mine(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) if input.sum() < 1e9 else None

    convbn_fx.register_batch_norm(Mine, like=nn.BatchNorm2d)
    model = make(norm=Mine)
    graph_module = fused(model)
    assert convbn_fx.report(graph_module).fused[0].batch_norm_kind == "Mine"
    assert_equivalent(model, graph_module, X)
    model.norm.train()
    assert_equivalent(model, graph_module, X)


def test_register_batch_norm_by_its_operands():
    convbn_fx.register_batch_norm(
        Affine, operands=lambda module: BatchNorm(module.mean, module.variance, module.gain, eps=1e-3)
    )
    model = make(norm=Affine)
    graph_module = fused(model)
    assert_equivalent(model, graph_module, X)
    assert saved_bytes(graph_module, X) < saved_bytes(model, X)


def test_a_subclass_of_a_registered_class_is_not_meant():
    class Mine(nn.Conv2d):
        def forward(self, input):
            return super().forward(input)

    class Other(Mine):
        def forward(self, input):
            return super().forward(input).sin() if input.sum() < 1e9 else None

    convbn_fx.register_conv(Mine, like=nn.Conv2d)
    model = make(Other)
    graph_module = fused(model, 0)
    assert reasons(graph_module) == {"norm": "UNKNOWN_CONVOLUTION"}
    assert_equivalent(model, graph_module, X)


def test_a_registered_class_that_is_patched_later():
    convbn_fx.register_conv(PlainConv)
    model = make(PlainConv)
    graph_module = fused(model)
    model.conv.forward = lambda input: nn.Conv2d.forward(model.conv, input).sin()
    assert_equivalent(model, graph_module, X)


@pytest.mark.parametrize(
    ("register", "cls", "name"),
    [
        (convbn_fx.register_conv, TwiceConv, "forward"),
        (convbn_fx.register_conv, OtherConvForward, "_conv_forward"),
        (convbn_fx.register_batch_norm, ReluNorm, "forward"),
    ],
)
def test_a_class_with_a_forward_of_its_own_is_not_taken_for_its_base_class(register, cls, name):
    with pytest.raises(TypeError, match=rf"{cls.__name__} has its own {name}. .*operands=.*like="):
        register(cls)


@pytest.mark.parametrize("register", [convbn_fx.register_conv, convbn_fx.register_batch_norm])
@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        ("Conv2d", {}, "expected a subclass of torch.nn.Module, got 'Conv2d'"),
        (torch.Tensor, {}, "expected a subclass of torch.nn.Module"),
        (torch.Tensor, {"operands": lambda module: None}, "expected a subclass of torch.nn.Module"),
        (nn.ReLU, {}, r"cannot tell what ReLU computes. Pass operands=..., or like= one of: .*"),
        (nn.ReLU, {"like": nn.Tanh}, "cannot tell what ReLU computes"),
    ],
)
def test_registration_errors(register, cls, options, message):
    before = dict(kinds._CONVOLUTION_CLASSES), dict(kinds._BATCH_NORM_CLASSES)
    with pytest.raises(TypeError, match=f"{register.__name__}: {message}"):
        register(cls, **options)
    assert (kinds._CONVOLUTION_CLASSES, kinds._BATCH_NORM_CLASSES) == before


@pytest.mark.parametrize("trace", [symbolic_trace, torch.fx.symbolic_trace], ids=["convbn_fx", "torch.fx"])
def test_a_dtype_is_read_off_the_convolution_where_the_batch_norm_has_another(trace):
    def forward(model, x):
        y = model.conv(x)
        return model.norm(y).to(y.dtype)

    model = prepared(Pair(norm=torchvision.ops.FrozenBatchNorm2d(4), forward=forward))
    model.conv.half()
    transformed, x = transform(trace(model)), data(2, 3, 6, 6, dtype=torch.float16)
    assert transformed(x).dtype == model(x).dtype == torch.float16


def test_a_dtype_is_read_off_either_where_they_are_the_same():
    model = prepared(Pair(forward=lambda m, x: m.norm(y := m.conv(x)).to(y.dtype)))
    assert_equivalent(model, fused(model), X)
