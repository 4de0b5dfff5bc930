"""The same on a GPU: outputs, gradients, precisions, layouts, streams and graphs."""

import copy

import pytest
import torch
from models import prepared, tuned_with
from torch import nn

from convbn_fx import deploy, symbolic_trace, transform, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

PAIRS = {
    "1d": (lambda: (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)), (3, 4, 17)),
    "2d": (lambda: (nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)), (3, 4, 17, 17)),
    "depthwise": (lambda: (nn.Conv2d(6, 6, 3, padding="same", groups=6), nn.BatchNorm2d(6)), (3, 6, 9, 9)),
    "3d": (lambda: (nn.Conv3d(4, 6, 3, dilation=2), nn.BatchNorm3d(6)), (2, 4, 9, 9, 9)),
    "transposed": (lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), (3, 4, 7, 7)),
    "grouped transposed": (lambda: (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (3, 4, 7, 7)),
    "linear": (lambda: (nn.Linear(4, 6), nn.BatchNorm1d(6)), (30, 4)),
}


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    layers, shape = PAIRS[name]
    model = prepared(nn.Sequential(*layers(), nn.ReLU()), dtype).cuda()
    return model, torch.randn(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    "how", [tune, lambda model: transform(symbolic_trace(model))], ids=["tune", "transform"]
)
@pytest.mark.parametrize("name", PAIRS)
def test_outputs_and_gradients(name, how):
    model, x = made(name)
    assert_equivalent(model, how(model), x)
    torch.testing.assert_close(deploy(model)(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_autocast_is_as_exact_as_eval_mode(name, dtype):
    model, x = made(name, torch.float32)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cuda", dtype):
        in_eval, in_tune = model(x), tune(model)(x)
    assert in_tune.dtype == in_eval.dtype
    assert (in_tune - exact).norm() <= 1.5 * (in_eval - exact).norm()


def test_channels_last_and_memory():
    model, x = made("2d", torch.float32)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    tuned = tuned_with(model, 1)
    assert_equivalent(model, tuned, x)
    assert tuned(x).is_contiguous(memory_format=torch.channels_last)
    assert saved_bytes(tuned, x) < saved_bytes(model, x)


def test_the_peak_is_at_most_that_of_eval_mode():
    model, x = made("2d", torch.float32)
    tuned = tune(model)
    x = x.repeat(64, 1, 4, 4)

    def peak(model, grad):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.set_grad_enabled(grad):
            y = model(x)
            if grad:
                y.sum().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    for grad in (False, True):
        for either in (model, tuned):  # what is done once
            peak(either, grad)
        assert peak(tuned, grad) <= peak(model, grad)


def test_a_step_captured_as_a_graph():
    model, x = made("2d", torch.float32)
    tuned = tune(model)
    parameters = list(tuned.parameters())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tuned(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    for parameter in parameters:
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tuned(x)
        y.sum().backward()
    with torch.no_grad():
        tuned[1].weight.mul_(2)  # read at every replay
        x.neg_()
    graph.replay()
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


def test_compiled():
    model, x = made("2d", torch.float32)
    torch.testing.assert_close(
        torch.compile(tune(model), backend="convbn")(x), model(x), rtol=1e-4, atol=1e-5
    )


def test_on_a_stream_of_its_own():
    model, x = made("2d")
    tuned, stream = tune(model), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = tuned(x)
        y.sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(y, model(x), rtol=1e-9, atol=1e-9)
