"""The faults of inductor's own pass, none of which are here."""

import pytest
import torch
from compiled import INNER, compiled, pairs
from models import Functional, Pair, data, net, prepared
from torch import nn
from torch.nn import functional as F

from convbn_fx import report
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

pytestmark = [
    pytest.mark.usefixtures("_fresh_compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
    # Dynamo looks at .grad of every input
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def functional(function, weight_shape=(4, 3, 3, 3), channels=4):
    return lambda: Functional(function, weight_shape, channels).double()


def in_place(change):
    def forward(m, x):
        y = m.conv(x)
        with torch.no_grad():
            change(m, x, y)
        return m.norm(y)

    return lambda: prepared(Pair(forward=forward))


def layered(conv, norm):
    return lambda: prepared(Pair(conv(), norm()))


#: Model, input, and how many pairs are fused (None where either is right).
FAULTS = {
    "bias by keyword": (functional(lambda m, x: m.normalize(F.conv2d(x, m.weight, bias=m.bias))), X, 1),
    "stride by keyword": (functional(lambda m, x: m.normalize(F.conv2d(x, m.weight, stride=2))), X, 1),
    "padding by keyword": (
        functional(lambda m, x: m.normalize(F.conv2d(x, m.weight, m.bias, padding=(2, 1)))),
        X,
        1,
    ),
    "all by keyword": (
        functional(
            lambda m, x: m.normalize(
                y=F.conv2d(
                    input=x, weight=m.weight, bias=m.bias, stride=2, padding=2, dilation=(1, 2), groups=1
                )
            )
        ),
        X,
        1,
    ),
    "padding as a string": (
        functional(lambda m, x: m.normalize(F.conv2d(x, m.weight, m.bias, padding="same"))),
        X,
        1,
    ),
    "transposed by keyword": (
        functional(
            lambda m, x: m.normalize(
                F.conv_transpose2d(x, m.weight, bias=m.bias, stride=2, output_padding=1, groups=3)
            ),
            (3, 2, 3, 3),
            6,
        ),
        X,
        1,
    ),
    "linear by keyword": (
        functional(lambda m, x: m.normalize(F.linear(x, weight=m.weight, bias=m.bias)), (4, 5), 4),
        data(3, 5),
        1,
    ),
    "linear, 3-D, L == C": (layered(lambda: nn.Linear(5, 4), lambda: nn.BatchNorm1d(4)), data(2, 4, 5), None),
    "unbatched conv1d, L == C": (
        layered(lambda: nn.Conv1d(3, 4, 3), lambda: nn.BatchNorm1d(4)),
        data(3, 6),
        None,
    ),
    "grouped transposed": (
        layered(lambda: nn.ConvTranspose2d(4, 4, 3, groups=2), lambda: nn.BatchNorm2d(4)),
        data(2, 4, 3, 3),
        1,
    ),
    "depthwise transposed": (
        layered(lambda: nn.ConvTranspose1d(4, 8, 3, groups=4), lambda: nn.BatchNorm1d(8)),
        data(2, 4, 5),
        1,
    ),
    "running mean changed in between": (in_place(lambda m, x, y: m.norm.running_mean.add_(1)), X, None),
    "running variance changed in between": (in_place(lambda m, x, y: m.norm.running_var.mul_(2)), X, None),
    "output changed in between": (in_place(lambda m, x, y: y.detach().mul_(2)), X, None),
    "beta changed in between": (in_place(lambda m, x, y: m.norm.bias.add_(1)), X, None),
}


@pytest.mark.parametrize("inner", [None, "aot_eager"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_inductors_pass(fault, inner):
    build, x, count = FAULTS[fault]
    model = build()
    candidate = compiled(model, inner, fullgraph=True)
    if "in between" in fault:
        # Only outputs and what is left behind: Eval mode's own backward refuses some of these changes.
        with torch.no_grad():
            assert_equivalent(model, candidate, x)
    else:
        assert_equivalent(model, candidate, x)
    if count is not None:
        assert len(report(candidate).fused) == count


@pytest.mark.parametrize("inner", INNER)
def test_input_or_weight_changed_in_between(inner):
    def forward(m, x):
        x = x * 1
        y = m.conv(x)
        x.add_(1)
        m.conv.weight.mul_(2)
        return m.norm(y) + x.mean()

    model = prepared(Pair(forward=forward))
    candidate = compiled(model, inner)
    with torch.no_grad():
        assert_equivalent(model, candidate, X)


def convolution_without_gradients(m, x):
    with torch.no_grad():
        y = m.conv(x)
    return m.norm(y)


def norm_without_gradients(m, x):
    y = m.conv(x)
    with torch.no_grad():
        z = m.norm(y)
    return x.sum() + z


def all_without_gradients(m, x):
    with torch.no_grad():
        z = m.norm(m.conv(x))
    return x.sum() + z


def autocast_around_the_convolution(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.conv(x)
    return m.norm(y)


def autocast_around_the_norm(m, x):
    y = m.conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        return m.norm(y)


def autocast_around_both(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.norm(m.conv(x))


def no_autocast_around_the_norm(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.conv(x)
        with torch.autocast("cpu", enabled=False):
            return m.norm(y.float())


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "forward", [convolution_without_gradients, norm_without_gradients, all_without_gradients]
)
def test_gradients_switched_off_in_between(forward, inner):
    model = prepared(Pair(forward=forward))
    assert_equivalent(model, compiled(model, inner), X)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "forward",
    [
        autocast_around_the_convolution,
        autocast_around_the_norm,
        autocast_around_both,
        no_autocast_around_the_norm,
    ],
)
def test_autocast_switched_in_between(forward, inner):
    model = prepared(Pair(forward=forward), torch.float32)
    assert_equivalent(model, compiled(model, inner), X.float(), rtol=3e-2, atol=1e-2)


@pytest.mark.parametrize("inner", [None, "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolution_in_half_precision_and_norm_in_single(dtype, inner):
    model = prepared(Pair(), torch.float32)
    model.conv.to(dtype)
    candidate = compiled(model, inner, fullgraph=True)
    assert_equivalent(model, candidate, X.to(dtype), rtol=3e-2)
    assert pairs(candidate) == {("conv", "norm")}


@pytest.mark.parametrize("inner", INNER)
def test_everything_under_autocast(inner):
    model = net(torch.float32)
    candidate = compiled(model, inner, fullgraph=True)
    assert_equivalent(model, candidate, X.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert_equivalent(model, candidate, X.float(), rtol=5e-2, atol=5e-2)
    assert_equivalent(model, candidate, X.float())


@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_a_folded_weight_that_float16_cannot_hold(inner):
    model = prepared(Pair(nn.Conv2d(3, 4, 3, bias=False)), torch.float32)
    with torch.no_grad():
        model.conv.weight.fill_(1e3)
        model.norm.running_var.fill_(1e-4)
        model.norm.running_mean.fill_(0)
        model.norm.weight.fill_(1)
        model.norm.bias.fill_(0)
        model.norm.eps = 0.0
    model.conv.half()
    x = (X * 1e-4).half()
    candidate = compiled(model, inner, fullgraph=True)
    assert model(x).isfinite().all()
    assert_equivalent(model, candidate, x, rtol=3e-2)
    assert candidate(x).isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, -1.0, 1e-30])
def test_gamma_zero_negative_and_tiny(gamma):
    model = prepared(Pair())
    with torch.no_grad():
        model.norm.weight.fill_(gamma)
    for inner in (None, "aot_eager"):
        assert_equivalent(model, compiled(model, inner), X)
