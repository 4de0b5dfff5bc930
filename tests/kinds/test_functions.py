"""Every spelling of a convolution and of a batch norm as a function, with every mix of arguments."""

import pytest
import torch
from models import KINDS, Functional, Pair, data, fused, prepared
from torch import nn
from torch.nn import functional as F

from convbn_fx.testing import assert_equivalent

aten = torch.ops.aten

CONV = (6, 2, 3, 3)  # a weight of 6 output channels from 4 input channels in 2 groups
CONV_X = (2, 4, 7, 7)
PLAIN = (6, 4, 3, 3)
TRANSPOSE = (4, 3, 3, 3)  # 6 output channels from 4 in 2 groups, transposed
SQUARE = (4, 6, 3, 3)  # 6 output channels from 4, transposed
LINEAR = (6, 4)

CONVOLUTIONS = {
    "conv2d plain": (PLAIN, CONV_X, lambda m, x: F.conv2d(x, m.weight)),
    "conv2d bias": (PLAIN, CONV_X, lambda m, x: F.conv2d(x, m.weight, m.bias)),
    "conv2d bias as keyword": (PLAIN, CONV_X, lambda m, x: F.conv2d(x, m.weight, bias=m.bias)),
    "conv2d stride and padding as keywords": (
        PLAIN,
        CONV_X,
        lambda m, x: F.conv2d(x, m.weight, stride=2, padding=1, bias=m.bias),
    ),
    "conv2d all keywords": (
        CONV,
        CONV_X,
        lambda m, x: F.conv2d(
            input=x, weight=m.weight, bias=m.bias, stride=(2, 1), padding=(1, 0), dilation=2, groups=2
        ),
    ),
    "conv2d all positional": (CONV, CONV_X, lambda m, x: F.conv2d(x, m.weight, m.bias, [2], [1], [1, 2], 2)),
    "conv2d keywords in another order": (
        CONV,
        CONV_X,
        lambda m, x: F.conv2d(groups=2, padding=1, weight=m.weight, input=x),
    ),
    "conv2d same": (PLAIN, CONV_X, lambda m, x: F.conv2d(x, m.weight, m.bias, padding="same")),
    "conv2d same, dilated": (
        PLAIN,
        CONV_X,
        lambda m, x: F.conv2d(x, m.weight, m.bias, 1, "same", dilation=(1, 2)),
    ),
    "conv2d valid": (PLAIN, CONV_X, lambda m, x: F.conv2d(x, m.weight, m.bias, 2, "valid")),
    "torch.conv2d": (PLAIN, CONV_X, lambda m, x: torch.conv2d(x, m.weight, stride=2, bias=m.bias)),
    "conv1d": (
        (6, 4, 3),
        (2, 4, 7),
        lambda m, x: F.conv1d(x, m.weight, bias=m.bias, stride=2, padding=1),
    ),
    "torch.conv1d": ((6, 2, 3), (2, 4, 7), lambda m, x: torch.conv1d(x, weight=m.weight, groups=2)),
    "conv3d": ((6, 4, 2, 2, 2), (2, 4, 3, 3, 3), lambda m, x: F.conv3d(x, m.weight, padding=1, bias=m.bias)),
    "torch.conv3d": ((6, 4, 2, 2, 2), (2, 4, 3, 3, 3), lambda m, x: torch.conv3d(x, m.weight, m.bias, 2)),
    "conv_transpose2d": (SQUARE, CONV_X, lambda m, x: F.conv_transpose2d(x, m.weight, m.bias)),
    "conv_transpose2d all keywords": (
        TRANSPOSE,
        CONV_X,
        lambda m, x: F.conv_transpose2d(
            x, weight=m.weight, dilation=2, output_padding=1, groups=2, stride=2, padding=1, bias=m.bias
        ),
    ),
    "conv_transpose2d all positional": (
        TRANSPOSE,
        CONV_X,
        lambda m, x: F.conv_transpose2d(x, m.weight, m.bias, (2, 1), 1, (1, 0), 2, (1, 2)),
    ),
    "torch.conv_transpose2d": (
        TRANSPOSE,
        CONV_X,
        lambda m, x: torch.conv_transpose2d(x, m.weight, groups=2, bias=m.bias),
    ),
    "conv_transpose1d": (
        (4, 3, 3),
        (2, 4, 5),
        lambda m, x: F.conv_transpose1d(x, m.weight, stride=2, output_padding=1, groups=2),
    ),
    "torch.conv_transpose1d": (
        (4, 6, 3),
        (2, 4, 5),
        lambda m, x: torch.conv_transpose1d(x, m.weight, m.bias),
    ),
    "conv_transpose3d": (
        (4, 3, 2, 2, 2),
        (2, 4, 3, 3, 3),
        lambda m, x: F.conv_transpose3d(x, m.weight, m.bias, groups=2, padding=1),
    ),
    "torch.conv_transpose3d": (
        (4, 6, 2, 2, 2),
        (2, 4, 3, 3, 3),
        lambda m, x: torch.conv_transpose3d(input=x, weight=m.weight, stride=2),
    ),
    "torch.convolution": (
        CONV,
        CONV_X,
        lambda m, x: torch.convolution(x, m.weight, m.bias, [2, 1], [1, 0], [1, 2], False, [0, 0], 2),
    ),
    "torch.convolution transposed": (
        TRANSPOSE,
        CONV_X,
        lambda m, x: torch.convolution(
            x,
            m.weight,
            bias=None,
            stride=(2, 2),
            padding=(1, 1),
            dilation=(1, 1),
            transposed=True,
            output_padding=(1, 0),
            groups=2,
        ),
    ),
    "linear": (LINEAR, (5, 4), lambda m, x: F.linear(x, m.weight, m.bias)),
    "linear bias as keyword": (LINEAR, (5, 4), lambda m, x: F.linear(x, bias=m.bias, weight=m.weight)),
    "linear no bias": (LINEAR, (5, 4), lambda m, x: F.linear(input=x, weight=m.weight)),
    "aten.conv1d": ((6, 4, 3), (2, 4, 7), lambda m, x: aten.conv1d.default(x, m.weight, m.bias, [2])),
    "aten.conv1d.padding": (
        (6, 4, 3),
        (2, 4, 7),
        lambda m, x: aten.conv1d.padding(x, m.weight, None, [1], "same"),
    ),
    "aten.conv2d": (
        CONV,
        CONV_X,
        lambda m, x: aten.conv2d.default(x, m.weight, m.bias, [2, 2], groups=2, padding=[1, 1]),
    ),
    "aten.conv2d.padding": (
        PLAIN,
        CONV_X,
        lambda m, x: aten.conv2d.padding(x, m.weight, m.bias, padding="valid"),
    ),
    "aten.conv3d": (
        (6, 4, 2, 2, 2),
        (2, 4, 3, 3, 3),
        lambda m, x: aten.conv3d.default(x, m.weight, padding=[1, 0, 1]),
    ),
    "aten.conv3d.padding": (
        (6, 4, 3, 3, 3),
        (2, 4, 3, 3, 3),
        lambda m, x: aten.conv3d.padding(x, m.weight, m.bias, [1, 1, 1], "same"),
    ),
    "aten.conv_transpose1d": (
        (4, 3, 3),
        (2, 4, 5),
        lambda m, x: aten.conv_transpose1d.default(x, m.weight, m.bias, [2], [1], [1], 2, [1]),
    ),
    "aten.conv_transpose2d": (
        TRANSPOSE,
        CONV_X,
        lambda m, x: aten.conv_transpose2d.input(x, m.weight, m.bias, [2, 1], groups=2, dilation=[1, 2]),
    ),
    "aten.conv_transpose3d": (
        (4, 6, 2, 2, 2),
        (2, 4, 3, 3, 3),
        lambda m, x: aten.conv_transpose3d.input(x, m.weight, stride=[2, 1, 1]),
    ),
    "aten.convolution": (
        CONV,
        CONV_X,
        lambda m, x: aten.convolution.default(x, m.weight, m.bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 2),
    ),
    "aten.convolution transposed": (
        TRANSPOSE,
        CONV_X,
        lambda m, x: aten.convolution.default(x, m.weight, None, [2, 2], [0, 0], [1, 1], True, [1, 1], 2),
    ),
    "aten.linear": (LINEAR, (5, 4), lambda m, x: aten.linear.default(x, m.weight, bias=m.bias)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_functions(case):
    weight_shape, input_shape, convolve = CONVOLUTIONS[case]
    torch.manual_seed(0)
    model = Functional(lambda m, x: m.normalize(convolve(m, x)), weight_shape, 6).double()
    assert_equivalent(model, fused(model), data(*input_shape))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # the point
@pytest.mark.parametrize(
    ("weight_shape", "input_shape", "convolve"),
    [
        ((6, 4, 2), (2, 4, 7), lambda m, x: F.conv1d(x, m.weight, padding="same")),
        ((6, 4, 4, 3), CONV_X, lambda m, x: F.conv2d(x, m.weight, m.bias, 1, "same")),
        ((6, 4, 3, 2), CONV_X, lambda m, x: aten.conv2d.padding(x, m.weight, m.bias, [1, 1], "same", [1, 3])),
        ((6, 4, 2, 3, 4), (2, 4, 4, 4, 4), lambda m, x: F.conv3d(x, m.weight, m.bias, padding="same")),
    ],
    ids=["conv1d", "conv2d", "aten.conv2d.padding", "conv3d"],
)
def test_padding_same_that_is_not_symmetric(weight_shape, input_shape, convolve):
    torch.manual_seed(0)
    model = Functional(lambda m, x: m.normalize(convolve(m, x)), weight_shape, 6).double()
    assert_equivalent(model, fused(model), data(*input_shape))


BATCH_NORMS = {
    "three arguments": lambda m, y: F.batch_norm(y, m.mean, m.var),
    "gamma and beta positional": lambda m, y: F.batch_norm(y, m.mean, m.var, m.gamma, m.beta),
    "all positional": lambda m, y: F.batch_norm(y, m.mean, m.var, m.gamma, m.beta, False, 0.1, 1e-2),
    "all keywords": lambda m, y: F.batch_norm(
        input=y,
        running_mean=m.mean,
        running_var=m.var,
        weight=m.gamma,
        bias=m.beta,
        training=False,
        momentum=0.3,
        eps=1e-2,
    ),
    "keywords in another order": lambda m, y: F.batch_norm(
        y, eps=1e-1, bias=m.beta, running_var=m.var, running_mean=m.mean
    ),
    "gamma alone": lambda m, y: F.batch_norm(y, m.mean, m.var, m.gamma),
    "beta alone": lambda m, y: F.batch_norm(y, m.mean, m.var, bias=m.beta, training=False),
    "momentum None": lambda m, y: F.batch_norm(y, m.mean, m.var, m.gamma, m.beta, momentum=0.0),
    "torch.batch_norm": lambda m, y: torch.batch_norm(
        y, m.gamma, m.beta, m.mean, m.var, False, 0.1, 1e-2, False
    ),
    "torch.batch_norm keywords": lambda m, y: torch.batch_norm(
        y,
        bias=m.beta,
        weight=m.gamma,
        running_mean=m.mean,
        running_var=m.var,
        training=False,
        momentum=0.1,
        eps=1e-2,
        cudnn_enabled=True,
    ),
    "torch.batch_norm without affine": lambda m, y: torch.batch_norm(
        y, None, None, m.mean, m.var, False, 0.1, 1e-2, False
    ),
    "torch.native_batch_norm": lambda m, y: torch.native_batch_norm(
        y, m.gamma, m.beta, m.mean, m.var, False, 0.1, 1e-2
    )[0],
    "aten.batch_norm": lambda m, y: aten.batch_norm.default(
        y, m.gamma, m.beta, m.mean, m.var, False, 0.1, 1e-2, cudnn_enabled=False
    ),
    "aten.native_batch_norm": lambda m, y: aten.native_batch_norm.default(
        y, m.gamma, m.beta, m.mean, m.var, False, 0.1, 1e-2
    )[0],
    "aten._native_batch_norm_legit": lambda m, y: aten._native_batch_norm_legit.default(
        y, m.gamma, None, m.mean, m.var, False, 0.1, eps=1e-2
    )[0],
    "aten._native_batch_norm_legit_no_training": lambda m, y: (
        aten._native_batch_norm_legit_no_training.default(y, m.gamma, m.beta, m.mean, m.var, 0.1, 1e-2)[0]
    ),
    "aten._batch_norm_no_update": lambda m, y: aten._batch_norm_no_update.default(
        y, m.gamma, m.beta, m.mean, m.var, momentum=0.1, eps=1e-2
    )[0],
}


@pytest.mark.parametrize("case", BATCH_NORMS)
def test_batch_norm_functions(case):
    torch.manual_seed(0)
    model = Functional(lambda m, x: BATCH_NORMS[case](m, F.conv2d(x, m.weight, m.bias)), PLAIN, 6).double()
    assert_equivalent(model, fused(model), data(*CONV_X))


@pytest.mark.parametrize("batch_norm", ["all keywords", "torch.native_batch_norm", "aten.batch_norm"])
@pytest.mark.parametrize(
    "convolution",
    [case for case in CONVOLUTIONS if case.startswith(("conv_tr", "aten.", "torch.convolution", "linear"))],
)
def test_any_convolution_before_any_batch_norm(convolution, batch_norm):
    weight_shape, input_shape, convolve = CONVOLUTIONS[convolution]
    torch.manual_seed(0)
    model = Functional(lambda m, x: BATCH_NORMS[batch_norm](m, convolve(m, x)), weight_shape, 6).double()
    assert_equivalent(model, fused(model), data(*input_shape))


MIXED = {
    "a module, then a function": lambda m, x: F.batch_norm(
        m.conv(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias
    ),
    "a function, then a module": lambda m, x: m.norm(F.conv2d(x, m.conv.weight, m.conv.bias, padding=2)),
}


@pytest.mark.parametrize("case", MIXED)
def test_a_module_and_a_function(case):
    model = prepared(Pair(forward=MIXED[case]))
    graph_module = fused(model)
    assert_equivalent(model, graph_module, data(2, 3, 5, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.norm(input=m.conv(input=x)),
        lambda m, x: m.norm(m.conv(input=x)),
        lambda m, x: m.norm(input=m.conv(x)),
    ],
    ids=["both", "conv", "norm"],
)
def test_modules_called_with_keywords(kind, call):
    model = KINDS[kind].model()
    model.function = call
    assert_equivalent(model, fused(model), KINDS[kind].input())


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, (1,), "same", "valid"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_padding_modes(dimensions, padding, mode):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    if isinstance(padding, tuple):
        padding = padding * (dimensions - 1) + (0,)
    model = prepared(Pair(conv(2, 3, 3, padding=padding, padding_mode=mode), norm(3)))
    assert_equivalent(model, fused(model), data(2, 2, *[4] * dimensions))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.norm(m.conv(x, [10, 9])),
        lambda m, x: m.norm(m.conv(x, output_size=[9, 10])),
        lambda m, x: m.norm(input=m.conv(input=x, output_size=[10, 10])),
        lambda m, x: m.norm(m.conv(x, output_size=(2, 4, 10, 10))),
        lambda m, x: m.norm(m.conv(x, None)),
        lambda m, x: m.norm(m.conv(x, output_size=[2 * x.size(2) + 2, 2 * x.shape[3] + 1])),
    ],
    ids=["positional", "keyword", "both keywords", "with batch and channels", "None", "computed"],
)
def test_output_size_of_a_transposed_convolution(call):
    model = prepared(Pair(nn.ConvTranspose2d(3, 4, 3, stride=2), forward=call))
    assert_equivalent(model, fused(model), data(2, 3, 4, 4))


def test_an_impossible_output_size_raises_as_before():
    model = prepared(
        Pair(nn.ConvTranspose2d(3, 4, 3, stride=2), forward=lambda m, x: m.norm(m.conv(x, [40, 40])))
    )
    graph_module = fused(model)
    with pytest.raises(ValueError, match="requested an output size"):
        assert_equivalent(model, graph_module, data(2, 3, 4, 4))
