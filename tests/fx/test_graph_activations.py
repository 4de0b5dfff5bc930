"""Activations, batch norms that stay and products of rewritten graphs."""

import operator

import pytest
import torch
from models import Pair, data, fused, prepared, through_pickle
from torch import nn
from torch.nn import functional as F

from convbn_fx import report, symbolic_trace, transform
from convbn_fx.functional import native
from convbn_fx.functional.activations import activation, product
from convbn_fx.functional.norms import batch_norm_that_stays
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

pytestmark = pytest.mark.skipif(
    native.operator is None, reason="without the operator all runs as it is written"
)

X = data(2, 3, 6, 6)


class Twice(Pair):
    """What the function of this name makes of a pair's output, read by another pair."""

    def __init__(self, name):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1))
        self.second = Pair(nn.Conv2d(4, 4, 1))
        self.stays = nn.BatchNorm2d(4)
        self.name = name

    def forward(self, x):
        return self.second((FUNCTIONS | OTHERS)[self.name](self, self.norm(self.conv(x))))


FUNCTIONS = {
    "relu6": lambda self, x: F.relu6(x),
    "relu6, in place": lambda self, x: F.relu6(x, inplace=True),
    "hardtanh": lambda self, x: F.hardtanh(x, min_val=-0.5, max_val=0.7),
    "hardtanh_": lambda self, x: F.hardtanh_(x, -0.5, 0.7),
    "leaky_relu": lambda self, x: F.leaky_relu(x, 0.2),
    "leaky_relu_": lambda self, x: F.leaky_relu_(x, negative_slope=0.2),
    "elu": lambda self, x: F.elu(x, alpha=0.5),
    "elu_": lambda self, x: F.elu_(x),
    "hardsigmoid": lambda self, x: F.hardsigmoid(x),
    "silu": lambda self, x: F.silu(x),
    "silu, in place": lambda self, x: F.silu(x, inplace=True),
    "hardswish": lambda self, x: F.hardswish(input=x),
    "gelu": lambda self, x: F.gelu(x),
    "gelu, tanh": lambda self, x: F.gelu(x, approximate="tanh"),
    "mish": lambda self, x: F.mish(x),
}
OTHERS = {
    "negative slope": lambda self, x: F.leaky_relu(x, -0.2),
    "negative alpha": lambda self, x: F.elu(x, -0.5),
    "bound that is computed": lambda self, x: F.hardtanh(x, -1.0, x.shape[1]),
    "product with a number": lambda self, x: x * 2,
    "product with itself": lambda self, x: x * x,
    "product with a vector": lambda self, x: x * x.mean((0, 2, 3), keepdim=True),
    "gate": lambda self, x: F.silu(x) * torch.sigmoid(x),
    "product in place": lambda self, x: F.silu(x).mul_(2),
    "batch norm and activation": lambda self, x: F.silu(self.stays(x.cos())),
    "batch norm as a function": lambda self, x: F.silu(
        F.batch_norm(
            x.cos(), self.stays.running_mean, self.stays.running_var, self.stays.weight, self.stays.bias
        )
    ),
    "sum": lambda self, x: F.silu(x) + x,
    "both are read": lambda self, x: F.silu(x) + F.relu6(x),
}


def prepared_twice(name):
    torch.manual_seed(0)
    return prepared(Twice(name))


@pytest.mark.parametrize("name", [*FUNCTIONS, *OTHERS])
def test_functions(name):
    model = prepared_twice(name)
    graph_module = fused(model, 2)
    assert_equivalent(model, graph_module, X)
    assert_equivalent(model, through_pickle(graph_module), X)
    assert_equivalent(model, transform(graph_module), X)
    without = fused(model, 2, activations=False)
    assert not report(without).activations
    if name != "both are read":  # one needs its input, and the other keeps its output
        assert saved_bytes(graph_module, X) <= saved_bytes(without, X) <= saved_bytes(model, X)
    if name in FUNCTIONS and not name.endswith("u_"):  # which keep their outputs anyway
        assert saved_bytes(graph_module, X) < saved_bytes(without, X)


def targets(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def test_what_a_rewritten_graph_calls():
    graph_module = fused(prepared_twice("batch norm and activation"), 2)
    assert activation in targets(graph_module)
    assert batch_norm_that_stays in targets(graph_module)
    found = targets(fused(prepared_twice("gate"), 2))
    assert product in found
    assert operator.mul not in found


def test_nothing_is_rewritten_twice_nor_without_a_pair():
    graph_module = fused(prepared_twice("silu"), 2)
    again = transform(graph_module)
    assert report(again).activations == report(graph_module).activations
    assert targets(again) == targets(graph_module)
    alone = transform(symbolic_trace(prepared(nn.Sequential(nn.SiLU(), nn.BatchNorm2d(3)))))
    assert not report(alone).activations
    undone = transform(graph_module, activations=False)
    assert activation not in targets(undone)
    assert_equivalent(graph_module, undone, X)
