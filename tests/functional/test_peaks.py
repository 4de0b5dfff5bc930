"""What is in memory at most, counted by what is allocated and freed: never more activations than in Eval mode."""

import pytest
import torch
from models import prepared
from torch import nn

from bench.harness.steps import peak
from convbn_fx import symbolic_trace, transform, tune

NETWORKS = {
    "wide to narrow": ((16, 4, 1), (4, 16, 1)),
    "depthwise": ((16, 16, 3), (16, 16, 3)),
    "plain": ((16, 24, 3), (24, 24, 3)),
}


def network(name):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs, size in NETWORKS[name]:
        groups = inputs if name == "depthwise" else 1
        conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
        layers.append(nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)))
    return prepared(nn.Sequential(*layers), torch.float32)


def step(model, x, grad):
    def run():
        with torch.set_grad_enabled(grad):
            y = model(x)
            if grad:
                y.sum().backward()
        model.zero_grad()

    return run


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "how", [tune, lambda model: transform(symbolic_trace(model))], ids=["tune", "transform"]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_peak_is_at_most_that_of_eval_mode(name, how, grad):
    model, x = network(name), torch.randn(4, 16, 40, 40)
    in_eval, in_tune = (peak(step(each, x, grad), "cpu") for each in (model, how(model)))
    # Without gradients nothing is saved in either; the fused parameters of one pair are there for a moment.
    fused = (
        0
        if grad
        else 4 * max(layer.numel() + 8 * len(layer) for layer in model.parameters() if layer.ndim == 4)
    )
    assert in_tune <= in_eval + fused
    if grad:
        assert in_tune < 0.95 * in_eval
