"""Subclasses, patched instances and classes; registration of one's own."""

import gc
import weakref

import pytest
import timm.layers
import torch
import torchvision.ops
from models import Pair, data, fused, prepared, reasons
from torch import nn
from torch.nn import functional as F

import convbn_fx
from convbn_fx import kinds, symbolic_trace, transform
from convbn_fx.memory import saved_bytes
from convbn_fx.operands import BatchNorm, Convolution
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
    for table in ("CONVOLUTION_CLASSES", "BATCH_NORM_CLASSES"):
        known = getattr(kinds.classes, table)
        monkeypatch.setattr(kinds.classes, table, kinds.classes.Classes(dict(known.rows), known.named))


def make(conv=nn.Conv2d, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = Pair(conv(3, 4, 3), norm(4))
    for module in (model.conv, model.norm):  # what a class initialises may be a copy, made when it is read
        for parameter in module._parameters.values():
            nn.init.uniform_(parameter, 0.5, 1.5)
    return prepared(model)


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
    with pytest.raises(TypeError, match=r"register_batch_norm: Frozen has no eps, .*Pass operands=\.\.\."):
        convbn_fx.register_batch_norm(Frozen, like=torchvision.ops.FrozenBatchNorm2d)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(4, 3, 1, 1)), None

    with pytest.raises(
        TypeError, match=r"register_conv: .*Flat has no stride, padding, dilation, groups, .*operands="
    ):
        convbn_fx.register_conv(Flat, like=nn.Conv2d)


def test_a_class_of_a_library_that_no_model_was_seen_with():
    class Mine(torchvision.ops.FrozenBatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    convbn_fx.register_batch_norm(Mine, like=torchvision.ops.FrozenBatchNorm2d)
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
