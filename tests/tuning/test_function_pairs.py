"""Functions of pairs: told from one another by the module whose forward calls them, and by the number of the call."""

import copy

import pytest
import torch
from models import FUSED_NODE, Functional, data, prepared, through_pickle, tuned_with
from torch import nn
from torch.nn import functional as F
from tree_parts import Swish

from convbn_fx import report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent
from convbn_fx.tuning import deferred as deferral

X = data(2, 4, 6, 6)


class SamePadded(nn.Conv2d):
    """As efficientnet_pytorch's `Conv2dStaticSamePadding`: pads, and calls the function."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        pad = (self.kernel_size[0] - 1) // 2
        self.static_padding = nn.ZeroPad2d((pad, pad, pad, pad)) if pad else nn.Identity()

    def forward(self, x):
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class MemoryEfficientSwish(nn.Module):
    def forward(self, x):
        return Swish.apply(x)


class MBConv(nn.Module):
    """As efficientnet_pytorch's block: two convolutions of the three kinds are normalised by nobody."""

    def __init__(self, channels=4, expanded=8):
        super().__init__()
        self.expand, self.norm0 = SamePadded(channels, expanded, 1, bias=False), nn.BatchNorm2d(expanded)
        self.depthwise = SamePadded(expanded, expanded, 3, groups=expanded, bias=False)
        self.norm1 = nn.BatchNorm2d(expanded)
        self.se_reduce, self.se_expand = SamePadded(expanded, 2, 1), SamePadded(2, expanded, 1)
        self.project, self.norm2 = SamePadded(expanded, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.swish = MemoryEfficientSwish()

    def forward(self, inputs):
        x = self.swish(self.norm0(self.expand(inputs)))
        x = self.swish(self.norm1(self.depthwise(x)))
        squeezed = F.adaptive_avg_pool2d(x, 1)
        squeezed = self.se_expand(self.swish(self.se_reduce(squeezed)))
        x = torch.sigmoid(squeezed) * x
        return self.norm2(self.project(x)) + inputs


class MBNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = SamePadded(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([MBConv(), MBConv()])
        self.swish = MemoryEfficientSwish()

    def extract_features(self, inputs):
        x = self.swish(self.norm(self.stem(inputs)))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, inputs):
        return self.extract_features(inputs).mean([2, 3])


def efficient():
    torch.manual_seed(0)
    return prepared(MBNet())


@pytest.mark.parametrize(
    "copied",
    [lambda m: m, copy.deepcopy, through_pickle, tune],
    ids=["as it is", "deepcopy", "pickle", "tune"],
)
def test_convolutions_of_a_class_that_calls_the_function(copied):
    model = efficient()
    tuned = copied(tuned_with(model, 7))
    assert_equivalent(model, tuned, X)
    assert saved_bytes(tuned, X) < 0.75 * saved_bytes(model, X)


def test_every_pair_of_them_is_one_convolution(monkeypatch):
    tuned = tuned_with(efficient(), 7)
    computed = []
    original = deferral.convolution
    monkeypatch.setattr(deferral, "convolution", lambda *args: computed.append(args) or original(*args))
    tuned(X)
    assert computed == []
    names = {(pair.convolution, pair.batch_norm) for pair in report(tuned).fused}
    assert ("blocks.0.expand.conv2d", "blocks.0.norm0") in names


def test_a_hook_on_a_module_that_calls_the_function():
    tuned = tuned_with(efficient(), 7)
    seen = []
    tuned.blocks[0].expand.register_forward_hook(lambda m, args, output: seen.append(output))
    tuned(X)
    assert type(seen[0]) is torch.Tensor


class Counted(Functional):
    """Calls convolutions and batch norms as functions, in some order, with modules between them."""

    def __init__(self, function):
        super().__init__(function, (4, 4, 1, 1), 4)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.own = SamePadded(4, 4, 3)
        self.flag = False

    def convolve(self, x):
        return F.conv2d(x, self.weight, self.bias)

    def tail(self, x):
        return self.normalize(self.convolve(x))


def after_others(m, x):
    x = m.convolve(m.own(m.conv(m.inner(x)))).relu()
    return m.normalize(m.convolve(m.block(x)))


def twice(m, x):
    return m.normalize(m.convolve(m.normalize(m.convolve(x)).relu()))


def to_a_module(m, x):
    return m.norm(m.convolve(m.convolve(x).relu()))


def in_a_method(m, x):
    return m.tail(m.convolve(x).relu())


def one_more_on_some_way(m, x):
    if x.sum() > 0:
        x = m.convolve(x).relu()
    return m.normalize(m.convolve(x))


#: With the number of batch norms that each fuses.
FORWARDS = {after_others: 1, twice: 2, to_a_module: 1, in_a_method: 1, one_more_on_some_way: 1}


@pytest.mark.parametrize("function", FORWARDS, ids=lambda function: function.__name__)
def test_numbers_of_calls(function):
    torch.manual_seed(0)
    model = prepared(Counted(function))
    tuned = tune(model)
    assert len({pair.batch_norm for pair in report(tuned).fused} - {"block.1"}) == FORWARDS[function]
    for x in (X.abs(), -X.abs()):
        assert_equivalent(model, tuned, x)
        assert saved_bytes(tuned, x) < saved_bytes(model, x)


def test_a_method_with_functions_called_by_itself():
    model = prepared(Counted(in_a_method))
    tuned = tune(model)
    assert_equivalent(model.tail, tuned.tail, X)
    assert tuned.tail(X).grad_fn.name() == FUSED_NODE


@pytest.mark.parametrize("function", FORWARDS, ids=lambda function: function.__name__)
def test_a_call_more_that_was_not_foreseen(function):
    def forward(m, x):
        if m.flag:
            x = m.convolve(x).sin() + Swish.apply(m.convolve(x))
        return function(m, x)

    model = prepared(Counted(forward))
    tuned = tune(model)
    model.flag = tuned.flag = True
    assert_equivalent(model, tuned, X)


def test_an_owner_inside_of_an_owner():
    """The inner one hands on what waits for the outer one's batch norm."""
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model = prepared(nn.Sequential(block, nn.BatchNorm2d(4)))
    tuned = tuned_with(model, 2)
    assert_equivalent(model, tuned, X)
    input, after_relu = X.nbytes, 2 * 4 * 4 * 4 * 8
    assert saved_bytes(tuned, X) == input + after_relu
