"""Overflow, rounding, cancellation; low precision next to float32; autocast."""

import collections
import copy

import pytest
import torch
from models import KINDS, LAYOUTS, Pair, data, fused, prepared
from torch import nn

from convbn_fx import tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


def gradients(model, x, cotangent=None):
    """The output and all gradients, by name."""
    x = x.detach().clone().requires_grad_()
    output = model(x)
    cotangent = torch.ones_like(output) if cotangent is None else cotangent.to(output.dtype)
    sources = {"input": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output, list(sources.values()), cotangent)
    return {"output": output.detach(), **dict(zip(sources, found, strict=True))}


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


# --- Errors against float64 ---------------------------------------------------------------------------------------

PRECISION = {
    "conv2d": (lambda: Pair(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)), (8, 16, 10, 10)),
    "pointwise": (lambda: Pair(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)), (8, 16, 10, 10)),
    "depthwise": (lambda: Pair(nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16)), (8, 16, 10, 10)),
    "linear": (lambda: Pair(nn.Linear(32, 32), nn.BatchNorm1d(32)), (64, 32)),
    "transposed": (lambda: Pair(nn.ConvTranspose2d(16, 16, 3), nn.BatchNorm2d(16)), (4, 16, 8, 8)),
    "conv1d": (lambda: Pair(nn.Conv1d(16, 16, 5), nn.BatchNorm1d(16)), (8, 16, 40)),
}


def trained(layer, dtype, seed, scale=1.0):
    """A layer whose statistics are those of its data, as they are after training; inputs as after a ReLU."""
    torch.manual_seed(seed)
    make, shape = PRECISION[layer]
    x = data(*shape, seed=seed).abs()
    model = prepared(make())
    with torch.no_grad():
        model.conv.weight.mul_(scale)
        y = model.conv(x)
        every_but_channels = [0, *range(2, y.ndim)]
        model.norm.running_mean.copy_(y.mean(every_but_channels))
        model.norm.running_var.copy_(y.var(every_but_channels))
    return model.to(dtype), x.to(dtype), data(*y.shape, seed=seed + 100).to(dtype)


def exact(model, x, cotangent):
    return gradients(copy.deepcopy(model).double(), x.double(), cotangent.double())


def errors(model, x, cotangent):
    """Relative errors of Eval and Tune mode against float64, by name."""
    expected = exact(model, x, cotangent)
    in_eval, in_tune = (gradients(net, x, cotangent) for net in (model, fused(model)))
    return {
        name: (error(in_eval[name], value), error(in_tune[name], value)) for name, value in expected.items()
    }


@pytest.mark.parametrize("layer", PRECISION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_errors_are_at_most_those_of_eval_mode(layer, dtype, scale):
    for seed in range(4):
        found = errors(*trained(layer, dtype, seed, scale))
        # gamma's gradient has a test of its own; the others are sums that the backend orders as it likes
        for name in found.keys() - {"norm.weight"}:
            in_eval, in_tune = found[name]
            allowed = max(1.5 * in_eval, torch.finfo(dtype).eps) if name == "output" else 2.0 * in_eval
            assert in_tune <= allowed, f"{name}, seed {seed}: Eval {in_eval:.2g}, Tune {in_tune:.2g}"


@pytest.mark.parametrize("layer", PRECISION)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_the_gradient_of_gamma(layer, dtype):
    """It is a difference of two sums, <dW', W> and db' mu, where Eval mode has one sum of differences."""
    worst = max(ratio for seed in range(4) for ratio in [gamma_ratio(layer, dtype, seed)])
    assert worst <= 12


@pytest.mark.xfail(
    strict=True,
    reason="1.5 times Eval mode's own error is aimed at; gamma's gradient has 2 to 6 times, "
    "all of it from the weight's gradient, which backends sum in float32",
)
def test_error_of_the_gradient_of_gamma_is_at_most_that_of_eval_mode():
    assert max(gamma_ratio(layer, dtype, 0) for layer in PRECISION for dtype in DTYPES) <= 1.5


@pytest.mark.parametrize("layer", PRECISION)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("norm_dtype", ["same", "float32"])
def test_error_of_every_gradient_in_half_precision_over_many_draws(layer, dtype, norm_dtype):
    """Single draws scatter by more than the bound; what is compared is the root of the mean of the squares."""
    squares = collections.defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for seed in range(8):
        model, x, cotangent = trained(layer, dtype, seed)
        if norm_dtype == "float32":
            model.norm.float()
        rounding = {name: error(value.to(dtype), value) for name, value in exact(model, x, cotangent).items()}
        for name, found in errors(model, x, cotangent).items():
            squares[name] += torch.tensor([*found, rounding[name]], dtype=torch.float64) ** 2
    in_eval, in_tune, rounded = torch.stack([*squares.values()]).sqrt().unbind(1)
    ratios = dict(zip(squares, (in_tune / in_eval).tolist(), strict=True))
    # gamma's gradient is summed from the weight's, which some processors' kernels round more than once in float16
    weight = [*squares].index("conv.weight")
    allowed = dict.fromkeys(ratios, 1.5) | {
        "norm.weight": 1.5 * max(1.0, (in_eval[weight] / rounded[weight]).item())
    }
    assert all(ratio <= allowed[name] for name, ratio in ratios.items()), (ratios, allowed)


def gamma_ratio(layer, dtype, seed):
    in_eval, in_tune = errors(*trained(layer, dtype, seed))["norm.weight"]
    return in_tune / in_eval


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_through_several_layers(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Sequential(Pair(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)), nn.Tanh()) for _ in range(5)]
    )
    prepared(model, dtype)
    graph_module = fused(model, 5)
    x = data(4, 8, 10, 10, dtype=dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        assert error(graph_module(x), expected) <= 1.5 * error(model(x), expected)


@pytest.mark.parametrize("layer", ["conv2d", "depthwise", "linear", "transposed"])
def test_cancellation_of_mean_and_bias(layer):
    """With mean = bias = 1e4 the output of the convolution loses what the batch norm would need."""
    model, x, cotangent = trained(layer, torch.float32, 0)
    with torch.no_grad():
        model.conv.bias.fill_(1e4)
        model.norm.running_mean.fill_(1e4)
    in_eval, in_tune = errors(model, x, cotangent)["output"]
    assert in_eval > 1e-5
    assert in_tune < in_eval / 100


# --- Finite wherever Eval mode is ---------------------------------------------------------------------------------


def large_mean(model):
    model.conv.bias.data.fill_(6e4)
    model.norm.running_mean.fill_(6e4)


def tiny_variance(model):
    model.norm.running_var.fill_(1e-7)
    model.norm.eps = 1e-7


def tiny_variance_and_input(model):
    tiny_variance(model)
    model.conv.weight.data.mul_(60)


def huge_weight(model):
    model.conv.weight.data.fill_(6e4)
    model.norm.running_var.fill_(1e-4)


def huge_gamma(model):
    model.norm.weight.data.fill_(6e4)
    model.conv.weight.data.mul_(1e-4)


def huge_gamma_and_weight(model):
    model.norm.weight.data.fill_(6e3)
    model.conv.weight.data.fill_(6e3)


def huge_variance(model):
    model.norm.running_var.fill_(6e4)


def gamma_zero(model):
    model.norm.weight.data.zero_()


def gamma_zero_and_tiny_variance(model):
    gamma_zero(model)
    tiny_variance(model)


def gamma_tiny(model):
    model.norm.weight.data.fill_(6e-8)


def gamma_negative_and_huge(model):
    model.norm.weight.data.fill_(-6e4)


EXTREMES = [
    large_mean,
    tiny_variance,
    tiny_variance_and_input,
    huge_weight,
    huge_gamma,
    huge_gamma_and_weight,
    huge_variance,
    gamma_zero,
    gamma_zero_and_tiny_variance,
    gamma_tiny,
    gamma_negative_and_huge,
]


def finite_in_eval_alone(model, x):
    """Names of what is finite in Eval mode and not in Tune mode, and whether anything is finite at all."""
    graph_module = fused(model)
    in_eval, in_tune = gradients(model, x), gradients(graph_module, x)
    finite = [name for name, value in in_eval.items() if value.isfinite().all()]
    return [name for name in finite if not in_tune[name].isfinite().all()], finite


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("norm_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("input_scale", [1e-7, 1e-3, 1.0, 100.0])
def test_float16_is_finite_wherever_eval_mode_is(extreme, norm_dtype, input_scale):
    torch.manual_seed(0)
    model = prepared(Pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), torch.float16)
    model.norm.to(norm_dtype)
    extreme(model)
    x = data(2, 4, 4, 4).mul(input_scale).half()
    lost, finite = finite_in_eval_alone(model, x)
    assert not lost
    if "output" in finite:
        expected = copy.deepcopy(model).double()(x.double())
        actual, in_eval = fused(model)(x), model(x)
        assert error(actual, expected) <= max(1.5 * error(in_eval, expected), 2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_float16_is_finite_for_values_of_any_size(seed):
    """Every tensor drawn with exponents from the whole range of float16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, positive=False):
        exponents = torch.rand(tensor.shape, generator=generator) * 10 - 5
        signs = 1.0 if positive else torch.randn(tensor.shape, generator=generator).sign()
        tensor.data.copy_(signs * 10**exponents)

    compared = 0
    for _ in range(100):
        model = prepared(Pair(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), torch.float16)
        for parameter in model.parameters():
            draw(parameter)
        draw(model.norm.running_mean)
        draw(model.norm.running_var, positive=True)
        x = torch.empty(2, 2, 4, 4, dtype=torch.float16)
        draw(x)
        lost, finite = finite_in_eval_alone(model, x)
        assert not lost
        compared += len(finite)
    assert compared > 50


@pytest.mark.parametrize("extreme", [huge_gamma, gamma_negative_and_huge])
@pytest.mark.parametrize("norm_dtype", [torch.float16, torch.float32])
def test_float16_gradient_of_gamma_where_gamma_is_huge(extreme, norm_dtype):
    torch.manual_seed(0)
    model = prepared(Pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), torch.float16)
    model.norm.to(norm_dtype)
    extreme(model)
    lost, finite = finite_in_eval_alone(model, data(2, 4, 4, 4, dtype=torch.float16))
    assert "norm.weight" in finite
    assert not lost


@pytest.mark.parametrize("norm_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("weight_trains", [True, False])
def test_float16_gradient_of_gamma_where_that_of_the_weight_overflows(norm_dtype, weight_trains):
    torch.manual_seed(0)
    model = prepared(Pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), torch.float16)
    model.norm.to(norm_dtype)
    model.conv.requires_grad_(weight_trains)
    x = (data(8, 4, 64, 64).abs() + 1).half()
    with torch.no_grad():
        y = model.conv(x).float()
        model.norm.running_mean.copy_(y.mean([0, 2, 3]))
        model.norm.running_var.copy_(y.var([0, 2, 3]))
    lost, finite = finite_in_eval_alone(model, x)
    assert "norm.weight" in finite
    assert not lost


@pytest.mark.xfail(
    strict=True, reason="the fused weight overflows, or vanishes, in float32: values beyond 1e19"
)
@pytest.mark.parametrize(("weight", "gamma", "value"), [(1e25, 1e20, 1e-30), (1e-30, 1e-20, 1e30)])
def test_float32_products_beyond_its_range(weight, gamma, value):
    model = Pair(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1)).eval()
    model.conv.weight.data.fill_(weight)
    model.norm.weight.data.fill_(gamma)
    x = torch.full((1, 1, 2, 2), value)
    torch.testing.assert_close(fused(model)(x), model(x), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_saves_its_input_alone(dtype):
    model, x, _ = trained("conv2d", dtype, 0)
    assert saved_bytes(fused(model), x) == x.nbytes
    assert saved_bytes(model, x) > 1.5 * x.nbytes


# --- Low precision next to float32 --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", KINDS | LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("norm_dtype", ["same", "float32"])
def test_low_precision_of_every_layer(layer, dtype, norm_dtype):
    layer = (KINDS | LAYOUTS)[layer]
    model = layer.model(dtype)
    if norm_dtype == "float32":
        model.norm.float()
    graph_module = fused(model)
    # the gradients of float32 parameters are no more precise than what they are computed from
    assert_equivalent(model, graph_module, layer.input(dtype), rtol=3e-2)
    assert saved_bytes(graph_module, layer.input(dtype)) < saved_bytes(model, layer.input(dtype))
    with torch.no_grad():
        assert graph_module(layer.input(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("conv_dtype", "norm_dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float64),
    ],
)
def test_other_mixtures_do_as_eval_mode_does(conv_dtype, norm_dtype):
    model = prepared(Pair(), conv_dtype)
    model.norm.to(norm_dtype)
    graph_module = fused(model)
    with pytest.raises(RuntimeError):
        assert_equivalent(model, graph_module, data(2, 3, 5, 5, dtype=conv_dtype))


# --- Autocast -----------------------------------------------------------------------------------------------------


def under_autocast(model, dtype, x, backward_inside, cotangent):
    x = x.clone().requires_grad_()
    sources = [x, *model.parameters()]
    with torch.autocast("cpu", dtype):
        output = model(x)
        if backward_inside:
            found = torch.autograd.grad(output, sources, cotangent.to(output.dtype))
    if not backward_inside:
        found = torch.autograd.grad(output, sources, cotangent.to(output.dtype))
    return [output, *found]


@pytest.mark.parametrize("layer", KINDS | LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backward_inside", [False, True], ids=["outside", "inside"])
def test_autocast(layer, dtype, backward_inside):
    layer = (KINDS | LAYOUTS)[layer]
    model = layer.model(torch.float32)
    graph_module = fused(model)
    x = layer.input(torch.float32)
    cotangent = torch.ones_like(model(x))
    expected = under_autocast(model, dtype, x, backward_inside, cotangent)
    actual = under_autocast(graph_module, dtype, x, backward_inside, cotangent)
    reference = gradients(copy.deepcopy(model).double(), x.double())
    assert expected[0].dtype == actual[0].dtype == dtype
    for name, value, wanted, found in zip(
        ["output", "input", *dict(model.named_parameters())],
        [reference["output"], reference["input"], *list(reference.values())[2:]],
        expected,
        actual,
        strict=True,
    ):
        assert found.dtype == wanted.dtype, name
        assert error(found, value) <= 3 * error(wanted, value) + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_saves_the_cast_input_alone(dtype):
    model, x, _ = trained("conv2d", torch.float32, 0)
    graph_module = fused(model)
    with torch.autocast("cpu", dtype):
        assert saved_bytes(graph_module, x) == x.to(dtype).nbytes
        assert saved_bytes(model, x) > x.to(dtype).nbytes


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_with_a_low_precision_conv(dtype):
    model = prepared(Pair(), torch.float32)
    model.conv.to(dtype)
    graph_module = fused(model)
    for x in (data(2, 3, 6, 6, dtype=dtype), data(2, 3, 6, 6, dtype=torch.float32)):
        with torch.autocast("cpu", dtype):
            assert_equivalent(model, graph_module, x, rtol=3e-2)


def test_autocast_of_float64_raises_or_runs_as_before():
    model = prepared(Pair())
    graph_module = fused(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equivalent(model, graph_module, data(2, 3, 6, 6))


def test_autocast_switched_off_inside():
    model = prepared(Pair(), torch.float32)
    graph_module = fused(model)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert_equivalent(model, graph_module, data(2, 3, 6, 6, dtype=torch.float32))
        assert graph_module(data(2, 3, 6, 6, dtype=torch.float32)).dtype == torch.float32


def test_autocast_leaves_torch_convolution_alone():
    def forward(m, x):
        y = torch.convolution(x, m.conv.weight, m.conv.bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        return m.norm(y)

    model = prepared(Pair(forward=forward), torch.float32)
    graph_module = fused(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equivalent(model, graph_module, data(2, 3, 6, 6, dtype=torch.float32))


@pytest.mark.parametrize("fuse", [fused, tune])
def test_weight_gradients_of_float16_are_finite_where_gamma_is_zero(fuse):
    """They are computed at another scale, at which they overflow here."""
    model = prepared(Pair(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)), torch.float32)
    model.conv.half()
    with torch.no_grad():
        model.norm.weight[:4] = 0.0
        model.norm.weight[4:] = 1e-3
    x, cotangent = data(4, 8, 32, 32, dtype=torch.float16).abs(), torch.full((4, 8, 30, 30), 6e3)
    expected, actual = gradients(model, x, cotangent), gradients(fuse(model), x, cotangent)
    assert all(gradient.isfinite().all() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=2e-2, atol=2e-3 * gradient.abs().max().item())
