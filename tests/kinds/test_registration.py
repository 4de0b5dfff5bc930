"""Classes of one's own join the table; frozen batch norms of one's own; the table itself."""

import gc
import weakref

import pytest
import torch
from models import Pair, data, fused, prepared, reasons
from own_classes import OtherConvForward, PlainConv, ReluNorm, TwiceConv, make
from torch import nn
from torch.nn import functional as F

import convbn_fx
from convbn_fx import kinds, symbolic_trace, transform
from convbn_fx.memory import saved_bytes
from convbn_fx.operands import BatchNorm, Convolution
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)


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


# --- Frozen batch norms of one's own ------------------------------------------------------------------------------


class Frozen(nn.Module):
    """What many a detector's code holds; its eps stands in its forward."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-3).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def frozen_operands(module):
    return BatchNorm(module.running_mean, module.running_var, module.weight, module.bias, 1e-3)


@pytest.mark.parametrize("how", [convbn_fx.tune, convbn_fx.deploy, lambda m: transform(symbolic_trace(m))])
def test_a_frozen_batch_norm_of_ones_own_is_listed(how):
    model = make(norm=Frozen)
    treated = how(model)
    assert reasons(treated) == {"norm": "UNKNOWN_BATCH_NORM"}
    torch.testing.assert_close(treated(X), model(X))


@pytest.mark.parametrize("training", [False, True])
def test_a_registered_class_that_is_always_frozen(training):
    convbn_fx.register_batch_norm(Frozen, operands=frozen_operands, always_frozen=True)
    model = make(norm=Frozen).train(training)
    assert_equivalent(model, fused(model), X)
    tuned = convbn_fx.tune(model)
    assert len(convbn_fx.report(tuned).fused) == 1
    assert_equivalent(model, tuned, X)
    model.conv.bfloat16()  # then its output is of the type of its buffers
    x = X.bfloat16()
    assert tuned(x).dtype == model(x).dtype == torch.float64


def test_a_class_without_an_attribute_is_refused_when_it_is_registered():
    ops = pytest.importorskip("torchvision.ops")
    with pytest.raises(TypeError, match=r"register_batch_norm: Frozen has no eps, .*Pass operands=\.\.\."):
        convbn_fx.register_batch_norm(Frozen, like=ops.FrozenBatchNorm2d)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(4, 3, 1, 1)), None

    with pytest.raises(
        TypeError, match=r"register_conv: .*Flat has no stride, padding, dilation, groups, .*operands="
    ):
        convbn_fx.register_conv(Flat, like=nn.Conv2d)


def test_a_class_of_a_library_that_no_model_was_seen_with():
    ops = pytest.importorskip("torchvision.ops")

    class Mine(ops.FrozenBatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    convbn_fx.register_batch_norm(Mine, like=ops.FrozenBatchNorm2d)
    model = make(norm=Mine).train()
    assert_equivalent(model, fused(model), X)


# --- The table itself ---------------------------------------------------------------------------------------------


def test_classes_that_were_looked_up_are_not_kept():
    def looked_up():
        class Mine(nn.Conv2d):
            pass

        class Other(nn.Module):
            def forward(self, x):
                return super().forward(x)

        assert kinds.convolution_kind(Mine(3, 4, 3)) is not None
        assert kinds.batch_norm_kind(Other()) is None
        return weakref.ref(Mine), weakref.ref(Other)

    references = looked_up()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_class_is_looked_up_while_another_is_registered():
    """Of what was found out before, nothing may hide what was registered meanwhile."""
    table = kinds.classes.Classes({}, lambda cls: None)
    row = kinds.ConvolutionKind("", lambda module: None)

    class Base(nn.Module):
        def forward(self, x):
            return x

    class Other(Base):
        pass

    def registers_meanwhile(cls):
        if cls is Other:
            table.named = lambda cls: None
            table.enter(Base, row)

    table.named = registers_meanwhile
    table.row(Other)
    assert table.row(Other) is not None


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
    before = dict(kinds.classes.CONVOLUTION_CLASSES.rows), dict(kinds.classes.BATCH_NORM_CLASSES.rows)
    with pytest.raises(TypeError, match=f"{register.__name__}: {message}"):
        register(cls, **options)
    assert (kinds.classes.CONVOLUTION_CLASSES.rows, kinds.classes.BATCH_NORM_CLASSES.rows) == before


@pytest.mark.parametrize("trace", [symbolic_trace, torch.fx.symbolic_trace], ids=["convbn_fx", "torch.fx"])
def test_a_dtype_is_read_off_the_convolution_where_the_batch_norm_has_another(trace):
    ops = pytest.importorskip("torchvision.ops")

    def forward(model, x):
        y = model.conv(x)
        return model.norm(y).to(y.dtype)

    model = prepared(Pair(norm=ops.FrozenBatchNorm2d(4), forward=forward))
    model.conv.half()
    transformed, x = transform(trace(model)), data(2, 3, 6, 6, dtype=torch.float16)
    assert transformed(x).dtype == model(x).dtype == torch.float16


def test_a_dtype_is_read_off_either_where_they_are_the_same():
    model = prepared(Pair(forward=lambda m, x: m.norm(y := m.conv(x)).to(y.dtype)))
    assert_equivalent(model, fused(model), X)
