"""While one thread tunes, traces, deploys or compiles, the models of other threads are what they were."""

import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import Pair, data, prepared
from torch import nn

import convbn_fx

X = data(2, 3, 6, 6)


def net():
    layers = [Pair(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(4)]
    return prepared(nn.Sequential(*layers, nn.Dropout(0.5)))


def transformed(model):
    return convbn_fx.transform(convbn_fx.symbolic_trace(model))


def compiled(model):
    result = torch.compile(model, backend="convbn")
    result(X)
    return result


class Patched:
    """What PyTorch's own tracing exchanges for the whole process."""

    def __init__(self):
        self.found = self.now()

    @staticmethod
    def now():
        return nn.Module.__call__, nn.Module.__getattr__, list(warnings.filters), gc.isenabled()


@pytest.mark.parametrize(
    "rewrites", [[convbn_fx.tune, convbn_fx.deploy], [transformed, compiled]], ids=["models", "graphs"]
)
def test_models_are_served_while_others_are_rewritten(rewrites):
    torch._dynamo.reset()
    patched = Patched()
    served = net()
    tuned = convbn_fx.tune(served)
    expected = served(X)
    done = threading.Event()

    def serve(model):
        calls = 0
        while not done.is_set() or not calls:
            output = model(X)
            assert type(output) is torch.Tensor
            torch.testing.assert_close(output, expected)
            calls += 1
        return calls

    def rewrite(function):
        for _ in range(6):
            model = net()
            torch.testing.assert_close(function(model)(X), model(X))

    with ThreadPoolExecutor(4) as pool:
        serving = [pool.submit(serve, model) for model in (served, tuned)]
        rewriting = [pool.submit(rewrite, function) for function in rewrites]
        try:
            for future in rewriting:
                future.result()
        finally:
            done.set()
        assert all(future.result() for future in serving)
    assert patched.now() == patched.found


def test_one_model_is_served_while_it_is_rewritten_itself():
    served = net()
    expected = served(X)
    patched = Patched()
    with ThreadPoolExecutor(4) as pool:
        rewriting = [
            pool.submit(rewrite, served) for rewrite in [convbn_fx.tune, convbn_fx.deploy, transformed] * 4
        ]
        while not all(future.done() for future in rewriting):
            torch.testing.assert_close(served(X), expected)
        for future in rewriting:
            torch.testing.assert_close(future.result()(X), expected)
    assert patched.now() == patched.found


def test_random_numbers_of_other_threads():
    def forward(m, x):
        drawn = torch.rand(()), torch.randn(2), torch.randperm(3), torch.empty(3).normal_()
        return m.norm(m.conv(x)) * sum(numbers.sum() for numbers in drawn)

    models = [prepared(Pair(forward=forward)) for _ in range(4)]
    torch.manual_seed(0)
    expected = torch.rand(2000)
    torch.manual_seed(0)
    with ThreadPoolExecutor(1) as pool:
        rewriting = [pool.submit(convbn_fx.tune, model) for model in models]
        drawn = [torch.rand(1) for _ in range(2000)]
        for future in rewriting:
            future.result()
    assert torch.equal(torch.cat(drawn), expected)
