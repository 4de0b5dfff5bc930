"""deploy: plain modules with baked parameters, whose outputs are those of Eval mode; what cannot be baked stays."""

import copy
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from blocks import CROSSING, WAYS, ByReference, ConvLast, NormFirst
from deployed import NORMS, assert_same, deployed_with, norms_in, storages, two_convs
from hooks import HOOKS
from models import (
    ALL_NET_PAIRS,
    KINDS,
    LAYOUTS,
    ConvNormAct,
    Functional,
    Layer,
    Net,
    Pair,
    Residual,
    conv_norm,
    data,
    in_train_mode,
    net,
    prepared,
    reasons,
    snapshot,
    through_pickle,
    through_torch_save,
    with_slow,
)
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
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import convbn_fx
from convbn_fx import deploy, register_conv, report, symbolic_trace, transform, tune
from convbn_fx.api import tuned_and_deployed
from convbn_fx.operands import Convolution

X = data(2, 3, 6, 6)
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN += (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
#: Deprecated, and still used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
]


def pair(forward=None):
    torch.manual_seed(0)
    return prepared(Pair(nn.Conv2d(3, 4, 3, padding=1), forward=forward))


# --- Every kind ---------------------------------------------------------------------------------------------------

PADDINGS = {
    f"{mode} {padding} {dimensions}d": Layer(
        lambda mode=mode, padding=padding, dimensions=dimensions: getattr(nn, f"Conv{dimensions}d")(
            2, 3, 3, padding=padding, padding_mode=mode, dilation=2 if padding == "same" else 1
        ),
        lambda dimensions=dimensions: getattr(nn, f"BatchNorm{dimensions}d")(3),
        (2, 2, 5, 6, 5)[: dimensions + 2],
    )
    for mode in ("zeros", "reflect", "replicate", "circular")
    for padding in (1, "same", "valid")
    for dimensions in (1, 2, 3)
    if padding == "same" or dimensions == 2
}
LAYERS = {
    **KINDS,
    **LAYOUTS,
    **PADDINGS,
    "sync, linear": Layer(lambda: nn.Linear(2, 3), lambda: nn.SyncBatchNorm(3), (5, 2)),
    "double bias": Layer(
        lambda: nn.Conv2d(2, 3, 1, bias=True), lambda: nn.BatchNorm2d(3, eps=0.1), (2, 2, 3, 3)
    ),
}


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


# --- Sharing ------------------------------------------------------------------------------------------------------


def test_a_convolution_with_two_batch_norms():
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm2(self.conv(x.sin())))
    deployed = deployed_with(model, 2)
    assert not norms_in(deployed)
    assert type(deployed.conv) is nn.Identity
    assert (type(deployed.norm), type(deployed.norm2)) == (nn.Conv2d, nn.Conv2d)
    assert_same(model, deployed, X)


def test_a_convolution_with_two_batch_norms_that_have_activations():
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm2(self.conv(x.sin())))
    model.norm, model.norm2 = BatchNormAct2d(3), BatchNormAct2d(3, act_layer=nn.SiLU)
    prepared(model)
    assert_same(model, deployed_with(model, 2), X)


@pytest.mark.parametrize("conv", [nn.Conv1d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1), nn.Linear(2, 2)], ids=repr)
def test_a_convolution_with_two_batch_norms_looks_at_ranks(conv):
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm2(self.conv(x.sin())))
    model.conv, model.norm, model.norm2 = conv, nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    prepared(model)
    shape = (4, 2) if isinstance(conv, nn.Linear) else (4, 2, 2)
    deployed = deploy(model)
    assert_same(model, deployed, data(*shape))
    if report(deployed).fused:
        with pytest.raises(ValueError, match="dimensions"):
            deployed(data(4, 2, 2) if isinstance(conv, nn.Linear) else data(2, 2))


def test_one_output_into_two_batch_norms():
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) * self.norm2(y)

    model = two_convs(forward)
    assert_same(model, deploy(model), X)


def test_a_batch_norm_after_two_convolutions():
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm(self.conv2(x.sin())))
    deployed = deployed_with(model, 2)
    assert reasons(deployed) == {"norm2": "NOT_CALLED"}
    assert type(deployed.norm) is nn.Identity
    assert_same(model, deployed, X)


def test_a_pair_used_twice():
    model = two_convs(lambda self, x: self.norm(self.conv(self.norm(self.conv(x)))))
    assert_same(model, deployed_with(model, 1), X)


def test_mixed_sharing():
    model = two_convs(
        lambda self, x: self.norm(self.conv(x)) + self.norm2(self.conv(x)) + self.norm(self.conv2(x))
    )
    deployed = deployed_with(model, 0)
    assert set(reasons(deployed).values()) == {"SHARED"}
    assert_same(model, deployed, X)


def test_a_transposed_convolution_with_two_batch_norms():
    def forward(self, x):
        return self.norm(self.conv(x, [13, 13])) + self.norm2(self.conv(x.sin(), [13, 13]))

    model = two_convs(forward)
    model.conv = nn.ConvTranspose2d(3, 3, 3, stride=2).double()
    assert_same(model, deploy(model), X)


def test_a_convolution_shared_by_blocks():
    first, second = ConvNormAct(3, 3), ConvNormAct(3, 3)
    second.conv = first.conv
    model = prepared(nn.Sequential(first, second))
    assert_same(model, deployed_with(model, 2), X)


@pytest.mark.parametrize("shared", ["conv", "norm"])
def test_only_one_of_two_blocks_that_share_a_module_is_selected(shared):
    """What is folded for the one must not be folded for the other."""
    first, second = ConvNormAct(3, 3), ConvNormAct(3, 3)
    setattr(second, shared, getattr(first, shared))
    model = prepared(nn.Sequential(first, second))
    assert_same(model, deploy(model, modules=["0"]), X)
    assert_same(model, deploy(model, modules=["1"]), X)


def test_a_shared_block():
    block = ConvNormAct(3, 3)
    model = prepared(nn.Sequential(block, nn.Conv2d(3, 3, 1), block))
    deployed = deployed_with(model, 1)
    assert deployed[0] is deployed[2]
    assert_same(model, deployed, X)


def test_tied_weights():
    model = two_convs(lambda self, x: self.norm2(self.conv2(self.norm(self.conv(x)))))
    model.conv2.weight = model.conv.weight
    assert_same(model, deployed_with(model, 2), X)


# --- Other uses of a convolution's output -------------------------------------------------------------------------


class Optional(Pair):
    """Uses the output of its convolution elsewhere if it is asked to."""

    def forward(self, x, extra=None, flag=False):
        y = self.conv(x)
        z = self.norm(y)
        if extra is not None:
            z = z + y * extra
        return z + y if flag else z


def test_an_optional_path():
    torch.manual_seed(0)
    model = prepared(Optional())
    deployed = deployed_with(model, 0)
    assert reasons(deployed) == {"norm": "CONVOLUTION_OUTPUT_USED_ELSEWHERE"}
    assert_same(model, deployed, X)
    assert_same(model, deployed, X, data(2, 4, 4, 4))
    assert_same(model, deployed, X, flag=True)


class OneOfTwoOptions(Pair):
    def forward(self, x, first=None, second=None):
        y = self.conv(x)
        if first is not None and second is None:
            return y * first
        return self.norm(y)


def test_an_optional_path_for_one_of_two_arguments():
    torch.manual_seed(0)
    model = prepared(OneOfTwoOptions())
    deployed = deploy(model)
    factor = data(2, 4, 4, 4)
    assert_same(model, deployed, X)
    assert_same(model, deployed, X, factor, factor)
    assert_same(model, deployed, X, factor)


class ByName(Pair):
    """Chooses by a string."""

    def forward(self, x, kind="normalised"):
        y = self.conv(x)
        return {"normalised": lambda: self.norm(y), "raw": lambda: y}[kind]()


class ByMatch(Pair):
    def forward(self, x, kind="normalised"):
        y = self.conv(x)
        match kind:
            case "raw":
                return y
            case _:
                return self.norm(y)


@pytest.mark.parametrize(
    ("cls", "argument"),
    [(ByName, "raw"), (ByMatch, "raw")],
    ids=["a key", "a match"],
)
def test_an_option_that_is_no_tensor(cls, argument):
    torch.manual_seed(0)
    model = prepared(cls())
    deployed = deploy(model)
    assert_same(model, deployed, X)
    torch.testing.assert_close(deployed(X, argument), model(X, argument))


class ManyBranches(Pair):
    """More decisions than are looked at one by one; the last of them reads the convolution's output."""

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        for index in range(40):
            if x.flatten()[index] > 100:
                z = z + index
        return z if x.mean() > 100 else z * 2 + y


def test_a_decision_after_many():
    torch.manual_seed(0)
    model = prepared(ManyBranches())
    deployed = deploy(model)
    assert_same(model, deployed, X)


#: What an exploration cannot do with something that stands for a tensor.
OBSTACLES = {
    "numpy": lambda x: x.detach().numpy().sum(),
    "a dictionary": lambda x: {6: 1.0}[x.shape[-1]],
    "a Python number": lambda x: round(x.mean().item(), 3),
    "an assertion": lambda x: [x.shape == (2, 3, 6, 6)].index(True),
    "a list": lambda x: min(x.flatten().tolist()),
    "an exact type": lambda x: {torch.Tensor: 1.0}[type(x)],
}


@pytest.mark.parametrize("which", ["conv", "norm"])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_use_behind_what_cannot_be_explored(obstacle, which):
    """What was not seen may be anything: a forward that could not be followed to its end proves nothing."""

    def forward(self, x):
        z = self.norm(self.conv(x))
        z = z + OBSTACLES[obstacle](x)
        return z * self.conv(x.cos()) if which == "conv" else self.norm(z)

    model = pair(forward)
    assert_same(model, deploy(model), X)


def test_a_use_in_train_mode_only():
    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return (z, y) if self.training else z

    class Auxiliary(Pair):
        pass

    Auxiliary.forward = forward
    model = prepared(Auxiliary())
    deployed = deploy(model)
    assert_same(model, deployed, X)
    for m in (model, deployed):
        m.training = True
    assert_same(model, deployed, X)


#: Forwards in which one of the two is used apart from the pair as well.
USES = {
    "conv returned": lambda self, x: (self.norm(self.conv(x)), self.conv(x)),
    "conv returned first": lambda self, x: (self.conv(x), self.norm(self.conv(x.sin()))),
    "conv in a dict": lambda self, x: {"z": self.norm(self.conv(x)), "y": self.conv(x.sin())},
    "output returned": lambda self, x: (y := self.conv(x), self.norm(y)),
    "conv added": lambda self, x: self.norm(self.conv(x)) + self.conv(x).sin(),
    "norm of the input": lambda self, x: self.norm(self.conv(x)) + self.norm(x),
    "norm of the input returned": lambda self, x: (self.norm(x), self.norm(self.conv(x))),
    "norm of a sine": lambda self, x: self.norm(self.conv(x)) + self.norm(x.sin()),
    "conv and another norm": lambda self, x: self.norm(self.conv(x)) + F.instance_norm(self.conv(x)),
    "functional norm of the same conv": lambda self, x: (
        self.norm(self.conv(x)) + F.batch_norm(self.conv(x), self.norm2.running_mean, self.norm2.running_var)
    ),
    "functional conv before the same norm": lambda self, x: (
        self.norm(self.conv(x)) + self.norm(F.conv2d(x, self.conv2.weight, padding=1))
    ),
    "forward called": lambda self, x: self.norm(self.conv(x)) + self.conv.forward(x),
    "forward of the norm called": lambda self, x: self.norm(self.conv(x)) + self.norm.forward(x),
    "in a list": lambda self, x: torch.stack([self.norm(self.conv(x)), *map(self.conv, [x])]),
    "shape": lambda self, x: self.norm(y := self.conv(x)) * y.shape[0],
    "in place": lambda self, x: self.norm(self.conv(x).add_(1)),
    "recursively": lambda self, x: self.norm(self.conv(self.conv(x))),
    "norm twice": lambda self, x: self.norm(self.norm(self.conv(x))),
}


@pytest.mark.parametrize("source", ["model", "tuned", "graph"])
@pytest.mark.parametrize("use", USES)
def test_used_apart_from_its_pair_as_well(use, source):
    model = two_convs(USES[use])
    if "graph" in source and use == "forward of the norm called":
        pytest.skip("no trace goes through it")
    made = {
        "model": lambda m: m,
        "tuned": tune,
        "graph": torch.fx.symbolic_trace,
    }[source](model)
    assert_same(model, deploy(made), X)


class SharedWithoutNorm(nn.Module):
    """A convolution that is followed by a batch norm here, and by nothing in another block."""

    def __init__(self):
        super().__init__()
        self.pair = Pair(nn.Conv2d(3, 4, 3, padding=1))
        self.alone = nn.Sequential(self.pair.conv)

    def forward(self, x):
        return self.pair(x) + self.alone(x)


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.alone = nn.Sequential(self.pair.norm)

    def forward(self, x):
        return self.pair(x) + self.alone(x)


class SharedBlock(nn.Module):
    """A block that ends in a convolution, used before a batch norm by one part and by itself in another."""

    def __init__(self):
        super().__init__()
        self.block = ConvLast()
        self.first = nn.Sequential(self.block, NormFirst())
        self.second = nn.Sequential(self.block, nn.ReLU())

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("cls", [SharedWithoutNorm, SharedNorm, SharedBlock])
def test_a_module_that_another_block_uses_apart(cls):
    torch.manual_seed(0)
    model = prepared(cls())
    assert_same(model, deploy(model), X)


# --- Parameters that a forward reads ------------------------------------------------------------------------------

READERS = {
    "weight": lambda self, x: self.norm(self.conv(x)) + self.conv.weight.sum(),
    "weight first": lambda self, x: self.norm(self.conv(x + self.conv.weight.mean())),
    "tied decoder": lambda self, x: F.conv_transpose2d(self.norm(self.conv(x)), self.conv.weight),
    "bias": lambda self, x: self.norm(self.conv(x)) - self.conv.bias.view(1, -1, 1, 1),
    "whether there is a bias": lambda self, x: (
        self.norm(self.conv(x)) * (1 if self.conv2.bias is None else 2)
    ),
    "gamma": lambda self, x: self.norm(self.conv(x)) * self.norm.weight.sum(),
    "statistics": lambda self, x: self.norm(self.conv(x)) + self.norm.running_mean.view(1, -1, 1, 1),
    "eps": lambda self, x: self.norm(self.conv(x)) + self.norm.eps,
    "channels": lambda self, x: self.norm(self.conv(x)) * self.norm.num_features,
    "dtype": lambda self, x: self.norm(self.conv(x.to(self.norm.weight.dtype))),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_forward_that_reads_what_is_folded(reader):
    model = two_convs(READERS[reader])
    assert_same(model, deploy(model), X)


def test_a_parent_that_reads_the_weight_of_a_child():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = ConvNormAct(3, 3)

        def forward(self, x):
            return self.child(x) + self.child.conv.weight.square().sum()

    torch.manual_seed(0)
    model = prepared(Parent())
    assert_same(model, deploy(model), X)


# --- Borders and references ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CROSSING)
def test_a_pair_across_borders(name):
    torch.manual_seed(0)
    model = prepared(CROSSING[name]())
    deployed = deployed_with(model, 1)
    assert not norms_in(deployed)
    assert_same(model, deployed, X)


@pytest.mark.parametrize("way", WAYS)
def test_references_to_modules(way):
    torch.manual_seed(0)
    model = prepared(ByReference(way))
    deployed = deploy(model)
    assert_same(model, deployed, X)
    assert not storages(deployed) & storages(model) or norms_in(deployed)


def test_batch_norms_as_functions():
    def forward(self, x):
        return self.normalize(F.conv2d(x, self.weight, self.bias))

    torch.manual_seed(0)
    model = Functional(forward, (4, 3, 3, 3), 4).double().eval()
    deployed = deployed_with(model, 0)
    assert set(reasons(deployed).values()) == {"FUNCTION_CALL"}
    assert_same(model, deployed, X)
    assert_same(model, deploy(transform(convbn_fx.symbolic_trace(model))), X)


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


# --- modules=, modes, errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["block", "unused"], {"stem.norm"}),
        ([], {"stem.norm", "block.first.norm", "block.second.norm", "unused.1"}),
        (["", "stem"], set()),
        (("block.first",), {"stem.norm", "block.second.norm", "unused.1"}),
    ],
)
def test_only_some_modules(names, left):
    model = net()
    deployed = deployed_with(model, ALL_NET_PAIRS - len(left), modules=names)
    assert {name for name, reason in reasons(deployed).items() if reason == "NOT_SELECTED"} == left
    assert set(norms_in(deployed)) == left
    assert_same(model, deployed, X)


@pytest.mark.parametrize("made", [torch.fx.symbolic_trace, lambda m: transform(convbn_fx.symbolic_trace(m))])
def test_only_some_modules_around_a_graph(made):
    model = prepared(nn.ModuleDict({"a": nn.Sequential(*conv_norm()), "b": made(prepared(Residual(4)))}))
    model.forward = None
    deployed = deploy(model, modules=["a"])
    assert type(deployed["a"][1]) is nn.Identity
    assert len(report(deployed["a"]).fused) == 1
    assert len(norms_in(deployed["b"])) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((net(), ["stem", "bakbone"]), ValueError, "bakbone"),
        ((net(), "stem"), TypeError, "list"),
        ((torch.relu,), TypeError, "Module"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        deploy(*arguments)


@in_train_mode
def test_a_model_in_train_mode():
    model = net().train()
    deployed = deployed_with(model, 0)
    assert Counter(reasons(deployed).values()) == {"TRAINING_MODE": ALL_NET_PAIRS}
    assert "eval()" in str(report(deployed))
    assert len(norms_in(deployed)) == ALL_NET_PAIRS
    assert_same(model, deployed, X)


@in_train_mode
def test_a_graph_in_train_mode():
    model = pair().train()
    graph_module = transform(convbn_fx.symbolic_trace(model), include_training=True)
    deployed = deploy(graph_module)
    assert reasons(deployed) == {"norm": "TRAINING_MODE"}
    assert not report(deployed).fused
    assert_same(model, deployed, X)


def test_one_batch_norm_in_train_mode():
    model = net()
    model.block.first.norm.train()
    deployed = deployed_with(model, ALL_NET_PAIRS - 1)
    assert reasons(deployed) == {"block.first.norm": "TRAINING_MODE"}
    assert_same(model, deployed, X)


@in_train_mode
def test_a_shared_convolution_before_a_batch_norm_in_train_mode():
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm2(self.conv(x.sin())))
    model.norm2.train()
    assert_same(model, deploy(model), X)


def test_batch_norms_frozen_by_hand():
    model = net().train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    deployed = deployed_with(model, ALL_NET_PAIRS)
    assert deployed.training
    assert deployed.dropout.training
    assert_same(model, deployed, X)


def test_modes_are_kept_and_switched():
    model = net()
    model.dropout.train()
    deployed = deployed_with(model, ALL_NET_PAIRS)
    assert_same(model, deployed, X)
    expected = model.eval()(X)
    torch.testing.assert_close(deployed.train().eval()(X), expected)


def test_deployed_twice():
    model = net()
    once = deploy(model)
    twice = deployed_with(once, 0)
    assert str(twice) == str(once)
    assert not reasons(twice)
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), rtol=0, atol=0)
    assert torch.equal(twice(X), once(X))


def test_deployed_twice_with_a_module_in_the_place_of_a_batch_norm():
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm2(self.conv(x.sin())))
    once = deploy(model)
    assert torch.equal(deploy(once)(X), once(X))


def test_part_by_part():
    model = net()
    deployed = model
    for name in ("stem", "block.first", "block", "unused"):
        deployed = deployed_with(deployed, 1, modules=[name])
        assert_same(model, deployed, X)
    assert not norms_in(deployed)


@pytest.mark.parametrize("kind", [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity(), nn.Sequential()])
def test_nothing_to_fold(kind):
    model = prepared(kind)
    deployed = deployed_with(model, 0)
    assert_same(model, deployed, X)
    assert str(report(deployed))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).double().eval()
    deployed = deploy(model)
    assert reasons(deployed) == {"1": "UNINITIALIZED"}


# --- From whatever was made of a model ----------------------------------------------------------------------------

SOURCES = {
    "tuned": tune,
    "tuned for training": lambda m: tune(m, include_training=True, norm_eval=True),
    "tuned twice": lambda m: tune(tune(m)),
    "tuned and copied": lambda m: copy.deepcopy(tune(m)),
    "transformed": lambda m: transform(convbn_fx.symbolic_trace(m)),
    "transformed from torch.fx": lambda m: transform(torch.fx.symbolic_trace(m)),
    "traced": convbn_fx.symbolic_trace,
    "traced by torch.fx": torch.fx.symbolic_trace,
    "exported": lambda m: torch.export.export(m, (data(2, 3, 6, 6),)).module(),
    "exported and transformed": lambda m: transform(torch.export.export(m, (data(2, 3, 6, 6),)).module()),
    "transformed and copied": lambda m: copy.deepcopy(transform(convbn_fx.symbolic_trace(m))),
    "transformed and pickled": lambda m: through_pickle(transform(convbn_fx.symbolic_trace(m))),
}


def called_norms(model):
    """Batch norms that are called in the graph, as a module or as a function."""
    nodes = model.graph.nodes if isinstance(model, torch.fx.GraphModule) else []
    return [
        node
        for node in nodes
        if (node.op == "call_function" and "batch_norm" in str(node.target))
        or (node.op == "call_module" and isinstance(model.get_submodule(node.target), NORMS))
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_deployed_from(source):
    model = net()
    made = SOURCES[source](model)
    used = 3 if isinstance(made, torch.fx.GraphModule) else 4
    before = snapshot(made), snapshot(model), getattr(made, "code", None)
    deployed = deploy(made)
    assert (snapshot(made), snapshot(model), getattr(made, "code", None)) == before
    assert len(report(deployed).fused) == used
    assert_same(model, deployed, X)
    assert not called_norms(deployed)
    convs = [module for module in deployed.modules() if isinstance(module, _ConvNd)]
    assert {type(conv) for conv in convs} == {nn.Conv2d}
    assert_same(model, copy.deepcopy(deployed), X)
    if "exported" not in source:
        assert_same(model, through_pickle(deployed), X)
    assert_same(model, deploy(deployed), X)
    assert_same(model, made, X)


@pytest.mark.parametrize("source", [name for name in SOURCES if "tuned" not in name])
def test_nothing_that_was_folded_is_left_in_a_graph(source):
    """Neither dead parameters, which training in parallel would wait for, nor the statistics."""
    deployed = deploy(SOURCES[source](net()))
    assert not [name for name in deployed.state_dict() if "running" in name and "unused" not in name]
    convs = {name.rpartition(".")[0] for name, p in deployed.named_parameters() if p.ndim == 4}
    assert len(convs) == 3


def test_a_name_that_begins_that_of_what_takes_its_place():
    """`conv` is not used any more only because the graph calls a `conv_batch_norm_folded_0`."""
    deployed = deploy(transform(convbn_fx.symbolic_trace(pair())))
    assert len(list(deployed.parameters())) == 2


@pytest.mark.parametrize("source", SOURCES)
def test_deployed_as_a_part_of_a_model(source):
    torch.manual_seed(0)
    part = prepared(Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model = prepared(nn.Sequential(*conv_norm(3, 3), nn.ReLU(), part))
    made = copy.copy(model)
    made._modules = dict(model._modules)
    made[3] = SOURCES[source](part)
    deployed = deploy(made)
    assert len(report(deployed).fused) == 2
    assert_same(model, deployed, X)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        *((name, "transformed") for name in LAYERS),
        *(
            (name, "exported")
            for name in (*KINDS, "strided", "strided_transpose", "zeros same 2d", "no_bias")
        ),
    ],
)
def test_a_layer_in_a_graph(layer, source):
    layer = LAYERS[layer]
    model = layer.model()
    if source == "exported":
        graph_module = torch.export.export(model, (layer.input(),)).module()
    else:
        graph_module = SOURCES[source](model)
    deployed = deploy(graph_module)
    assert len(report(deployed).fused) == 1
    assert not called_norms(deployed)
    assert_same(model, deployed, layer.input())


@pytest.mark.xfail(
    strict=True, reason="of torchvision's two graphs only the one that is in place is explored"
)
def test_a_feature_extractor():
    """torchvision's puts one of two graphs in place with the mode."""
    model = net()
    extractor = create_feature_extractor(
        model, train_return_nodes={"stem.conv": "y", "block": "z"}, eval_return_nodes={"block": "z"}
    )
    deployed = deploy(extractor)
    assert_same(extractor, deployed, X)
    for m in (extractor, deployed):
        m.train()
        convbn_fx.batchnorm_mode(m, train=False)
    assert_same(extractor, deployed, X)


def test_two_deployed_models_are_apart():
    model = net()
    first, second = deploy(model), deploy(model)
    with torch.no_grad():
        first.stem.conv.weight.zero_()
    assert_same(model, second, X)


# --- The result ---------------------------------------------------------------------------------------------------


def test_the_names_in_the_report():
    fused = report(deploy(net())).fused
    assert {(p.convolution, p.batch_norm) for p in fused} == {
        ("stem.conv", "stem.norm"),
        ("block.first.conv", "block.first.norm"),
        ("block.second.conv", "block.second.norm"),
        ("unused.0", "unused.1"),
    }


def test_the_original_sees_nothing_of_training_the_result():
    model = net()
    before = copy.deepcopy(model.state_dict())
    expected = model(X)
    deployed = deploy(model)
    folded = [p for name, p in deployed.named_parameters() if "head" not in name]
    optimizer = torch.optim.SGD(folded, lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(deployed.train()(X).square().sum())
        losses[-1].backward()
        optimizer.step()
    assert all(
        p.grad is not None for name, p in deployed.named_parameters() if name.startswith(("stem", "block"))
    )
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(model(X), expected)
    assert not torch.equal(deployed.eval()(X), expected)


def test_the_result_sees_nothing_of_training_the_original():
    model = net()
    deployed = deploy(model)
    expected = deployed(X)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "head" not in name:
                p.add_(1)
    assert torch.equal(deployed(X), expected)


@pytest.mark.parametrize("change", ["to", "half", "load", "hook", "train"])
def test_what_is_done_to_the_result_is_not_done_to_the_original(change):
    model = pair()
    before = snapshot(model)
    deployed = deploy(model)
    match change:
        case "to":
            deployed.to("meta")
        case "half":
            deployed.half()
        case "load":
            deployed.load_state_dict({name: torch.zeros_like(t) for name, t in deployed.state_dict().items()})
        case "hook":
            deployed.conv.register_forward_hook(lambda *_: None)
        case "train":
            deployed.train()
    assert snapshot(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("build", [net, lambda: prepared(Pair(nn.Linear(6, 4), nn.BatchNorm1d(4)))])
def test_copies(build, copied):
    model = build()
    deployed = deploy(model)
    again = copied(deployed)
    x = X if isinstance(model, Net) else data(5, 6)
    assert_same(model, again, x)
    assert str(again) == str(deployed)
    assert report(again) == report(deployed)
    assert storages(again).isdisjoint(storages(deployed))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
path = sys.argv[1]
saved = torch.load(path, weights_only=False)
model = saved["model"]
assert torch.equal(model(saved["x"]), saved["y"])
if "shared" in saved:
    assert torch.equal(saved["shared"](saved["x"]), saved["shared_y"])
assert not any("BatchNorm" in type(module).__name__ for module in model.modules())
model(saved["x"]).sum().backward()
"""


def test_a_fresh_process(tmp_path):
    deployed = deploy(net())
    graph = deploy(transform(convbn_fx.symbolic_trace(net())))
    graph.delete_submodule("unused")
    path = tmp_path / "model.pt"
    saved = {"model": deployed, "x": X, "y": deployed(X), "shared": graph, "shared_y": graph(X)}
    torch.save(saved, path)
    tests = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(path)],
        check=True,
        cwd=tests,
        timeout=120,
    )


def test_state_dicts():
    torch.manual_seed(1)
    first, second = deploy(net()), deploy(prepared(Net()))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert not torch.equal(first(X), second(X))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(X), second(X))


def test_repr_and_signature():
    model = net()
    deployed = deploy(model)
    assert type(deployed) is Net
    assert "BatchNorm" not in repr(deployed)
    assert [name for name, _ in deployed.named_modules()] == [name for name, _ in model.named_modules()]


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


# --- Loops whose length is not known ------------------------------------------------------------------------------


class SharedHead(nn.Module):
    """One convolution for all levels of a pyramid, and a batch norm for each."""

    def __init__(self, levels, order):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(levels))
        self.order = order

    def forward(self, features):
        return [norm(self.conv(level)) for norm, level in self.order(self.norms, features)]


ORDERS = {
    "zip": zip,
    "zip, features first": lambda norms, features: (
        (norm, level) for level, norm in zip(features, norms, strict=True)
    ),
    "enumerate": lambda norms, features: ((norms[i], level) for i, level in enumerate(features)),
    "range": lambda norms, features: ((norms[i], features[i]) for i in range(len(features))),
}


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_a_shared_convolution_whose_batch_norms_a_loop_calls(order, levels):
    model = prepared(SharedHead(levels, ORDERS[order]))
    features = [data(2, 4, 8 - level, 8) for level in range(levels)]
    for changed in (deploy(model), tune(model)):
        torch.testing.assert_close(changed(features), model(features))


def test_the_time_of_a_sequence_chooses_the_batch_norm():
    class Recurrent(SharedHead):
        def forward(self, x):
            return torch.stack([self.norms[t](self.conv(x[:, t])) for t in range(x.shape[1])])

    model, x = prepared(Recurrent(3, None)), data(2, 3, 4, 6, 6)
    torch.testing.assert_close(deploy(model)(x), model(x))


# --- What a graph's batch norms are called ------------------------------------------------------------------------


def test_a_pair_that_deploy_left_is_reported_once():
    model = prepared(Pair())
    parametrizations.weight_norm(model.conv)
    deployed = deploy(transform(torch.export.export(model, (X,)).module()))
    found = report(deployed)
    assert len(found.fused) + len(found.skipped) == 1
    torch.testing.assert_close(deployed(X), model(X))


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
