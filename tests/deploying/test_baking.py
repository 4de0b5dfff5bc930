"""Baked parameters: every kind, rank, class and precision, computed weights, and what trains afterwards."""

import copy
from collections import Counter

import pytest
import torch
from blocks import ConvLast, NormFirst
from deployed import LAYERS, assert_same, deployed_with, norms_in, storages
from hooks import HOOKS
from models import ALL_NET_PAIRS, KINDS, Net, Pair, data, net, pair, prepared, reasons, through_pickle
from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    FrozenBatchNormAct2d,
    ScaledStdConv2d,
    StdConv2d,
    StdConv2dSame,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize
from torchvision.ops import FrozenBatchNorm2d

import convbn_fx
from convbn_fx import deploy, register_conv, report, symbolic_trace, transform, tune
from convbn_fx.operands import Convolution

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
]


# --- Every kind ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [*((name, torch.float64) for name in LAYERS), *((name, torch.float32) for name in KINDS)],
)
def test_a_layer(layer, dtype):
    layer = LAYERS[layer]
    model = layer.model(dtype)
    deployed = deployed_with(model, 1)
    assert_same(model, deployed, layer.input(dtype))
    assert type(deployed) is Pair
    assert type(deployed.conv) is type(model.conv)
    assert not norms_in(deployed)
    assert not reasons(deployed)
    assert {name for name, _ in deployed.named_parameters()} == {"conv.weight", "conv.bias"}
    assert deployed.state_dict().keys() == {"conv.weight", "conv.bias"}
    assert storages(deployed).isdisjoint(storages(model))
    assert {p.dtype for p in deployed.parameters()} == {dtype}
    assert all(type(p) is nn.Parameter and p.is_leaf and p.requires_grad for p in deployed.parameters())
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "output_padding"):
        assert getattr(deployed.conv, name, None) == getattr(model.conv, name, None)


@pytest.mark.parametrize("layer", ["conv2d", "grouped_transpose2d", "linear", "depthwise1d"])
@pytest.mark.parametrize(
    "change",
    {
        "not affine": lambda n: [setattr(n, name, None) for name in ("weight", "bias")],
        "no weight": lambda n: setattr(n, "weight", None),
        "no bias": lambda n: setattr(n, "bias", None),
        "gamma 0": lambda n: nn.init.zeros_(n.weight),
        "a gamma of 0": lambda n: nn.init.zeros_(n.weight[:1]),
        "gamma negative": lambda n: nn.init.constant_(n.weight, -2.0),
        "eps 0": lambda n: setattr(n, "eps", 0.0),
        "variance 0": lambda n: n.running_var.zero_(),
        "variance tiny, eps 0": lambda n: (n.running_var.fill_(1e-20), setattr(n, "eps", 0.0)),
        "momentum None": lambda n: setattr(n, "momentum", None),
    }.items(),
    ids=lambda change: change[0],
)
def test_a_batch_norm_of_every_sort(layer, change):
    layer = LAYERS[layer]
    model = layer.model()
    change[1](model.norm)
    assert_same(model, deployed_with(model, 1), layer.input())


@pytest.mark.parametrize("layer", ["conv2d", "linear", "conv_transpose1d"])
def test_a_batch_norm_built_without_affine_parameters(layer):
    layer = LAYERS[layer]
    model = prepared(Pair(layer.conv(), type(layer.norm())(3, affine=False)))
    assert_same(model, deployed_with(model, 1), layer.input())


def test_without_running_statistics():
    model = prepared(Pair(norm=nn.BatchNorm2d(4, track_running_stats=False)))
    deployed = deployed_with(model, 0)
    assert reasons(deployed) == {"norm": "NO_RUNNING_STATISTICS"}
    assert_same(model, deployed, X)


def test_infinite_scale():
    model = pair()
    model.norm.running_var[0], model.norm.eps = 0.0, 0.0
    deployed = deployed_with(model, 0)
    assert reasons(deployed) == {"norm": "OUT_OF_RANGE"}


def test_output_size_of_a_transposed_convolution():
    torch.manual_seed(0)
    conv = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)
    model = prepared(Pair(conv, forward=lambda self, x: self.norm(self.conv(x, output_size=(12, 12)))))
    assert_same(model, deployed_with(model, 1), X)


def test_keyword_calls():
    model = pair(lambda self, x: self.norm(input=self.conv(input=x)))
    assert_same(model, deployed_with(model, 1), X)


def test_channels_last():
    model = pair().to(memory_format=torch.channels_last)
    x = X.to(memory_format=torch.channels_last)
    deployed = deployed_with(model, 1)
    assert_same(model, deployed, x)
    assert deployed.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch():
    model = pair()
    assert deployed_with(model, 1)(X[:0]).shape == model(X[:0]).shape


# --- Ranks: right or an error, never wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [
        (lambda: nn.Linear(2, 3), lambda: nn.BatchNorm1d(3), (4, 3, 2)),
        (lambda: nn.Linear(2, 3), lambda: nn.SyncBatchNorm(3), (4, 3, 2)),
        (lambda: nn.Linear(2, 3), lambda: nn.SyncBatchNorm(3), (4, 3, 5, 2)),
        (lambda: nn.Linear(2, 3), lambda: nn.BatchNorm2d(3), (4, 3, 5, 2)),
        (lambda: nn.Conv1d(2, 3, 1), lambda: nn.BatchNorm1d(3), (2, 3)),
        (lambda: nn.ConvTranspose1d(2, 3, 1), lambda: nn.BatchNorm1d(3), (2, 3)),
        (lambda: nn.Conv2d(2, 3, 1), lambda: nn.SyncBatchNorm(3), (2, 3, 5)),
        (lambda: nn.Conv3d(2, 3, 1), lambda: nn.SyncBatchNorm(3), (2, 3, 5, 4)),
        (lambda: nn.Conv3d(2, 3, 1), lambda: nn.BatchNorm2d(3), (2, 3, 5, 4)),
        (lambda: nn.Conv2d(2, 3, 1), lambda: nn.BatchNorm1d(3), (2, 3, 5)),
        (lambda: nn.Conv2d(2, 3, 1), lambda: FrozenBatchNorm2d(3), (2, 4, 5)),
    ],
    ids=lambda value: type(value()).__name__ if callable(value) else "x".join(map(str, value)),
)
@pytest.mark.parametrize("source", ["model", "graph"])
def test_an_input_of_which_another_dimension_is_normalised(conv, norm, shape, source):
    """Eval mode accepts it, and normalises another dimension than that of the convolution's output channels."""
    model = prepared(Pair(conv(), norm()))
    x = data(*shape)
    expected = model(x)
    deployed = deploy(model if source == "model" else transform(convbn_fx.symbolic_trace(model)))
    try:
        actual = deployed(x)
    except (ValueError, RuntimeError):
        return
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_linear_and_a_batch_norm_of_another_rank_is_left():
    """It never can be one: what is folded would raise for every input that Eval mode accepts."""
    model = prepared(Pair(nn.Linear(2, 3), nn.BatchNorm2d(3)))
    assert_same(model, deployed_with(model, 0), data(4, 3, 5, 2))


def test_linear_flattened_before_its_batch_norm():
    model = prepared(
        Pair(nn.Linear(2, 3), nn.BatchNorm1d(3), lambda self, x: self.norm(self.conv(x).flatten(0, 1)))
    )
    assert_same(model, deploy(model), data(4, 5, 2))


def test_the_message_for_a_wrong_rank():
    deployed = deploy(prepared(Pair(nn.Linear(2, 3), nn.BatchNorm1d(3))))
    with pytest.raises(ValueError, match="2 dimensions, and this one has 3"):
        deployed(data(4, 3, 2))


# --- Weights that are computed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrised_convolution(change):
    model = pair()
    getattr(parametrizations, change)(model.conv)
    model.double().eval()
    deployed = deployed_with(model, 1)
    assert type(deployed.conv) is nn.Conv2d
    assert not parametrize.is_parametrized(deployed.conv)
    assert parametrize.is_parametrized(model.conv)
    assert_same(model, deployed, X)


def test_spectral_norm_in_train_mode_is_not_advanced():
    """Reading a weight that changes a buffer whenever it is read must not show in the caller's model."""
    model = pair()
    parametrizations.spectral_norm(model.conv)
    model.double().conv.train()
    deployed_with(model, 1)


def test_a_parametrised_batch_norm():
    model = pair()
    parametrize.register_parametrization(model.norm, "weight", nn.Softplus())
    deployed = deployed_with(model, 1)
    assert_same(model, deployed, X)


@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda c: c.__name__)
def test_old_style_norms_are_hooks(change):
    model = pair()
    change(model.conv)
    model.double().eval()
    deployed = deployed_with(model, 0)
    assert reasons(deployed) == {"norm": "HAS_HOOKS"}
    assert_same(model, deployed, X)


def test_old_style_weight_norm_removed():
    model = pair()
    nn.utils.weight_norm(model.conv)
    nn.utils.remove_weight_norm(model.conv)
    assert_same(model, deployed_with(model, 1), X)


# --- Hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["conv", "norm"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_a_member(kind, place):
    model = pair()
    HOOKS[kind](model.get_submodule(place))
    deployed = deploy(model)
    assert reasons(deployed) == {"norm": "HAS_HOOKS"}
    assert_same(model, deployed, X)


@pytest.mark.parametrize("place", ["conv", "norm"])
@pytest.mark.parametrize("kind", ["forward", "forward pre"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_on_a_member_of_a_graph(kind, place, when):
    model = pair()
    graph_module = convbn_fx.symbolic_trace(model)
    if when == "after":
        graph_module = transform(graph_module)
    HOOKS[kind](model.get_submodule(place))
    deployed = deploy(graph_module)
    assert_same(model, deployed, X)
    assert reasons(deployed) == {"norm": "HAS_HOOKS"}


@pytest.mark.parametrize("kind", ["forward", "forward pre"])
@pytest.mark.parametrize("block", [0, 1])
def test_a_hook_on_a_block_that_a_pair_crosses(kind, block):
    torch.manual_seed(0)
    model = prepared(nn.Sequential(ConvLast(), NormFirst()))
    HOOKS[kind](model[block])
    assert_same(model, deploy(model), X)


def test_a_hook_on_the_block_around_a_pair():
    model = net()
    HOOKS["forward"](model.stem)
    assert_same(model, deployed_with(model, ALL_NET_PAIRS), X)


# --- Classes ------------------------------------------------------------------------------------------------------


class Tagged(nn.Conv2d):
    """A subclass whose forward is its base's."""

    def __init__(self, *args, tag="a tag", **kwargs):
        super().__init__(*args, **kwargs)
        self.tag = tag

    def extra_repr(self):
        return f"{super().extra_repr()}, tag={self.tag}"


class TaggedNorm(nn.BatchNorm2d):
    pass


class Slotted(nn.Conv2d):
    __slots__ = ("slot",)


class Doubling(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "cls",
    [Tagged, pytest.param(Slotted, marks=pytest.mark.xfail(strict=True, reason="a class with __slots__"))],
)
def test_a_subclass_with_the_forward_of_its_base(cls):
    model = prepared(Pair(cls(3, 4, 3), TaggedNorm(4)))
    deployed = deployed_with(model, 1)
    assert type(deployed.conv) is nn.Conv2d
    assert_same(model, deployed, X)


@pytest.mark.parametrize(("conv", "norm"), [(Doubling, nn.BatchNorm2d), (nn.Conv2d, DoublingNorm)])
def test_a_subclass_with_a_forward_of_its_own(conv, norm):
    model = prepared(Pair(conv(3, 4, 3), norm(4)))
    deployed = deployed_with(model, 0)
    assert "norm" in reasons(deployed)
    assert_same(model, deployed, X)


def test_a_patched_convolution():
    model = pair()
    original = model.conv.forward
    model.conv.forward = lambda x: original(x) * 2
    deployed = deploy(model)
    assert reasons(deployed) == {"norm": "UNKNOWN_CONVOLUTION"}
    assert_same(model, deployed, X)


def test_a_registered_class_like_another():
    class Same(nn.Conv2d):
        def forward(self, input):
            return F.conv2d(
                input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )

    register_conv(Same, like=nn.Conv2d)
    model = prepared(Pair(Same(3, 4, 3, stride=2, padding=1)))
    deployed = deployed_with(model, 1)
    assert type(deployed.conv) is nn.Conv2d
    assert_same(model, deployed, X)


class PaddedConv(nn.Conv2d):
    """Pads on the right, then convolves: no plain convolution does."""

    def forward(self, input):
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def padded(module, input):
    return F.pad(input, (0, 1, 0, 1)), Convolution("conv2d", module.weight, module.bias, module.stride)


register_conv(PaddedConv, operands=padded)


def test_a_registered_class_without_a_plain_form():
    model = prepared(Pair(PaddedConv(3, 4, 3)))
    assert len(report(tune(model)).fused) == 1
    deployed = deployed_with(model, 0)
    assert reasons(deployed) == {"norm": "UNKNOWN_CONVOLUTION"}
    assert_same(model, deployed, X)


def test_a_registered_class_without_a_plain_form_in_a_graph():
    model = prepared(Pair(PaddedConv(3, 4, 3)))
    deployed = deploy(transform(convbn_fx.symbolic_trace(model)))
    assert reasons(deployed) == {"norm": "UNKNOWN_CONVOLUTION"}
    assert not report(deployed).fused
    assert_same(model, deployed, X)


# --- Classes of other libraries -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "becomes"),
    [
        (lambda: Conv2dSame(3, 4, 3, stride=2), Conv2dSame),
        (lambda: Conv2dSame(4, 4, 3, stride=2, groups=2, dilation=2, bias=False), Conv2dSame),
        (lambda: StdConv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d),
        (lambda: StdConv2dSame(3, 4, 3, stride=2, padding="same"), Conv2dSame),
        (lambda: StdConv2dSame(3, 4, 3, padding=1), nn.Conv2d),
        (lambda: ScaledStdConv2d(3, 4, 3, padding=1), nn.Conv2d),
    ],
    ids=[
        "Conv2dSame",
        "grouped Conv2dSame",
        "StdConv2d",
        "StdConv2dSame",
        "StdConv2dSame 1",
        "ScaledStdConv2d",
    ],
)
@pytest.mark.parametrize("size", [6, 7])
def test_convolutions_of_timm(conv, becomes, size):
    torch.manual_seed(0)
    model = prepared(Pair(conv()))
    deployed = deployed_with(model, 1)
    assert type(deployed.conv) is becomes
    assert_same(model, deployed, data(2, model.conv.in_channels, size, size))
    assert_same(model, through_pickle(deployed), data(2, model.conv.in_channels, size, size))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, None])
@pytest.mark.parametrize("norm", [BatchNormAct2d, FrozenBatchNormAct2d])
def test_the_activation_of_a_batch_norm_stays(norm, activation):
    torch.manual_seed(0)
    model = prepared(
        Pair(nn.Conv2d(3, 4, 3), norm(4, act_layer=activation, apply_act=activation is not None))
    )
    deployed = deployed_with(model, 1)
    assert not norms_in(deployed)
    assert type(deployed.norm.act) is type(model.norm.act)
    assert_same(model, deployed, X)


def test_the_dropout_of_a_batch_norm_stays():
    torch.manual_seed(0)
    model = prepared(Pair(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, drop_layer=nn.Dropout)))
    deployed = deployed_with(model, 1)
    assert [type(part) for part in deployed.norm.children()][1:] == [nn.Dropout, nn.ReLU]
    assert_same(model, deployed, X)


def test_frozen_batch_norm():
    model = prepared(Pair(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))).train()
    deployed = deployed_with(model, 1)
    assert not norms_in(deployed)
    assert_same(model, deployed, X)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_a_batch_norm_whose_result_is_of_a_wider_type(norm):
    torch.manual_seed(0)
    model = prepared(Pair(nn.Conv2d(3, 4, 3), norm(4)), torch.float32)
    model.conv.half()
    x = X.half()
    assert model(x).dtype == torch.float32
    assert deploy(model)(x).dtype == torch.float32


# --- Numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_dtype", [torch.float32, None], ids=str)
def test_half_precision(dtype, norm_dtype):
    model = pair().to(dtype)
    model.norm.to(norm_dtype or dtype)
    deployed = deployed_with(model, 1)
    assert {p.dtype for p in deployed.parameters()} == {dtype}
    assert_same(model, deployed, X.to(dtype))


def test_a_half_precision_model_is_folded_in_higher_precision():
    torch.manual_seed(0)
    exact = prepared(Pair())
    exact.norm.running_mean.fill_(1e3)
    exact.conv.bias.data.fill_(1e3)
    model = copy.deepcopy(exact).bfloat16()
    bias = deploy(model).conv.bias
    torch.testing.assert_close(bias, deploy(copy.deepcopy(model).double()).conv.bias.bfloat16())


@pytest.mark.parametrize("source", ["model", "graph"])
def test_out_of_range(source):
    """Tiny variances: the folded weight overflows where Eval mode, which normalises afterwards, is finite."""
    model = pair().half()
    with torch.no_grad():
        model.conv.weight.fill_(100.0)
        model.conv.bias.zero_()
        model.norm.float()
        model.norm.running_mean.zero_()
        model.norm.running_var.fill_(1e-7)
        model.norm.eps = 0.0
        model.norm.weight.fill_(1.0)
    x = (X * 1e-4).half()
    assert model(x).isfinite().all()
    deployed = deploy(model if source == "model" else transform(convbn_fx.symbolic_trace(model)))
    assert reasons(deployed) == {"norm": "OUT_OF_RANGE"}
    assert not report(deployed).fused
    assert_same(model, deployed, x)
    assert_same(copy.deepcopy(model).float(), deploy(copy.deepcopy(model).float()), x.float())


def test_autocast():
    model = pair().float()
    deployed = deployed_with(model, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert deployed(X.float()).dtype == model(X.float()).dtype
        torch.testing.assert_close(deployed(X.float()), model(X.float()), rtol=5e-2, atol=5e-2)


def test_without_data():
    deployed = deploy(prepared(Net().to("meta")))
    assert {p.device.type for p in deployed.parameters()} == {"meta"}
    assert deployed(X.to("meta")).shape == (2, 5)
    assert len(report(deployed).fused) == ALL_NET_PAIRS


# --- requires_grad ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["model", "graph"])
def test_what_did_not_train_does_not_train(source):
    model = net()
    model.stem.requires_grad_(False)
    made = model if source == "model" else transform(convbn_fx.symbolic_trace(model))
    deployed = deploy(made)
    trained = {p.untyped_storage().data_ptr(): p.requires_grad for p in deployed.parameters()}
    assert Counter(trained.values())[False] == 2
    x = X.clone()
    deployed(x).sum().backward()
    assert Counter(p.grad is not None for p in deployed.parameters() if not p.requires_grad) == {False: 2}


@pytest.mark.parametrize(
    ("trains", "then_train"),
    [
        ("conv.weight", {"conv.weight"}),
        ("conv.bias", {"conv.bias"}),
        ("norm.weight", set()),
        ("norm.bias", {"conv.bias"}),
    ],
)
def test_what_trained_in_part_trains(trains, then_train):
    """The weight if the convolution's did, the bias if one of the two that it is made of did."""
    model = pair().requires_grad_(False)
    model.get_parameter(trains).requires_grad_()
    deployed = deployed_with(model, 1)
    assert {name for name, p in deployed.named_parameters() if p.requires_grad} == then_train


def test_the_weight_of_a_frozen_convolution_stays_frozen():
    """As with PyTorch's own fusion."""
    model = pair()
    model.conv.requires_grad_(False)
    deployed = deployed_with(model, 1)
    theirs = fuse_conv_bn_eval(model.conv, model.norm)
    assert deployed.conv.weight.requires_grad == theirs.weight.requires_grad == False  # noqa: E712
    assert deployed.conv.bias.requires_grad  # the batch norm's trains


@pytest.mark.parametrize("trains", [True, False])
def test_a_weight_that_is_computed_trains_if_what_it_is_computed_from_does(trains):
    model = pair()
    parametrizations.weight_norm(model.conv)
    model.conv.parametrizations.requires_grad_(trains)
    assert deployed_with(model, 1).conv.weight.requires_grad == trains


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_deployed_in_a_context_without_gradients(context):
    model = net()
    with context():
        deployed = deploy(model)
        torch.testing.assert_close(deployed(X), model(X))
    assert all(p.requires_grad for p in deployed.parameters())
    if context is not torch.inference_mode:
        assert_same(model, deployed, X)


# --- Convolutions that are not what they were built as ------------------------------------------------------------


def test_a_pruned_depthwise_convolution():
    model = prepared(nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(4)))
    conv = model[0]
    conv.weight, conv.bias, conv.groups = nn.Parameter(conv.weight[:4]), nn.Parameter(conv.bias[:4]), 4
    x = data(2, 4, 8, 8)
    deployed = deploy(model)
    torch.testing.assert_close(deployed(x), model(x))
    assert (deployed[0].in_channels, deployed[0].out_channels) == (4, 4)


def test_a_padding_that_was_changed_where_the_forward_does_not_look():
    model = prepared(Pair(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")))
    model.conv.padding = (2, 2)
    torch.testing.assert_close(deploy(model)(X), model(X))


def test_tensors_that_hold_no_values():
    with FakeTensorMode():
        model, x = Pair().eval(), torch.empty(2, 3, 6, 6)
        changed = (tune(model), transform(symbolic_trace(model)), deploy(model))
        assert [each(x).shape for each in changed] == 3 * [(2, 4, 4, 4)]
        assert not isinstance(changed[2].norm, _BatchNorm)


def test_a_tensor_that_a_trace_makes_is_not_a_bias_that_is_not_there():
    class Strided(nn.Module):
        """Detectors keep what they know of their grid so: as a plain tensor, exchanged when the shape is another."""

        def __init__(self):
            super().__init__()
            self.net = Pair(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
            self.stride = torch.tensor([2.0])

        def forward(self, x):
            return self.net(x) * torch.cat([self.stride, self.stride]).sum()

    model = prepared(Strided())
    assert_same(model, deployed_with(model, 1), X)


class Asking(nn.Module):
    """Encoders of transformers ask at every block whether the states in between are to be kept."""

    def __init__(self, forward):
        super().__init__()
        self.blocks = nn.ModuleList(Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(8))
        self._forward = forward

    def forward(self, x, asked=None):
        return self._forward(self, x, asked)


def kept_at_every_block(m, x, asked):
    kept = []
    for block in m.blocks:
        x = block(x)
        if asked:
            kept.append(x)
    return x, kept


def taken_off_at_every_block(m, x, asked):
    for block in m.blocks:
        x = block(x)
        if asked and asked.pop():
            x = block.conv(x)
    return x


def test_a_flag_that_is_asked_at_every_block_is_one_branch():
    model = prepared(Asking(kept_at_every_block))
    deployed = deployed_with(model, 8)
    assert_same(model, deployed, X)
    assert_same(model, deployed, X, True)


def test_an_argument_that_changes_while_it_is_asked_is_asked_again():
    model = prepared(Asking(taken_off_at_every_block))
    deployed = deploy(model)
    for asked in (None, [False] * 8, [True] * 8, [True, False, True]):
        torch.testing.assert_close(deployed(X, copy.copy(asked)), model(X, copy.copy(asked)))
