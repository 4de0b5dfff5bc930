"""Every subset of what may require grad. What is saved is what is needed, never more than in Eval."""

import itertools

import pytest
import torch
from models import KINDS, LAYOUTS, Layer, Pair, data, fused, prepared
from torch import nn

from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

OPERANDS = ("input", "conv.weight", "conv.bias", "norm.weight", "norm.bias")
SUBSETS = [
    frozenset(itertools.compress(OPERANDS, mask)) for mask in itertools.product([False, True], repeat=5)
]


def name_of(subset):
    return "+".join(name for name in OPERANDS if name in subset) or "nothing"


def train_only(model, x, subset):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in subset)
    return x.detach().requires_grad_("input" in subset)


#: Inputs larger than their outputs, and the other way round; weights larger than either.
SHAPES = {
    "wider input": Layer(
        lambda: nn.Conv2d(16, 4, 3, stride=2, padding=1), lambda: nn.BatchNorm2d(4), (4, 16, 8, 8)
    ),
    "wider output": Layer(lambda: nn.Conv2d(4, 16, 3), lambda: nn.BatchNorm2d(16), (4, 4, 8, 8)),
    "linear, wider input": Layer(lambda: nn.Linear(32, 8), lambda: nn.BatchNorm1d(8), (64, 32)),
    "transposed": Layer(
        lambda: nn.ConvTranspose2d(8, 4, 2, stride=2), lambda: nn.BatchNorm2d(4), (4, 8, 8, 8)
    ),
    "depthwise": Layer(lambda: nn.Conv2d(8, 8, 3, groups=8), lambda: nn.BatchNorm2d(8), (4, 8, 9, 9)),
    "heavy": Layer(lambda: nn.Conv2d(16, 4, 5), lambda: nn.BatchNorm2d(4), (4, 16, 8, 8)),
    "heavy linear": Layer(lambda: nn.Linear(64, 32), lambda: nn.BatchNorm1d(32), (8, 64)),
    "large weight": Layer(lambda: nn.Conv2d(64, 64, 3), lambda: nn.BatchNorm2d(64), (1, 64, 3, 3)),
}


@pytest.mark.parametrize("subset", SUBSETS, ids=name_of)
@pytest.mark.parametrize("layer", ["conv2d", "linear", "grouped_transpose2d", "depthwise1d"])
def test_gradients_of_every_subset(layer, subset):
    layer = (KINDS | LAYOUTS)[layer]
    model = layer.model()
    graph_module = fused(model)
    x = train_only(model, layer.input(), subset)
    assert_equivalent(model, graph_module, x, input_gradients="input" in subset)
    assert graph_module(x).requires_grad == bool(subset)


@pytest.mark.parametrize("subset", SUBSETS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_every_subset_in_half_precision(dtype, subset):
    model = LAYOUTS["strided"].model(dtype)
    graph_module = fused(model)
    x = train_only(model, LAYOUTS["strided"].input(dtype), subset)
    assert_equivalent(model, graph_module, x, input_gradients="input" in subset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("subset", SUBSETS, ids=name_of)
@pytest.mark.parametrize("layer", SHAPES)
def test_never_more_is_saved_than_in_eval_mode(layer, subset, dtype):
    model = SHAPES[layer].model(dtype)
    graph_module = fused(model)
    x = train_only(model, SHAPES[layer].input(dtype), subset)
    assert saved_bytes(graph_module, x) <= saved_bytes(model, x)


@pytest.mark.parametrize("subset", SUBSETS, ids=name_of)
@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("autocast", [False, True], ids=["low-precision conv", "autocast"])
def test_never_more_is_saved_in_mixed_precision(layer, subset, autocast):
    conv_dtype = torch.float32 if autocast else torch.bfloat16
    model = SHAPES[layer].model(torch.float32)
    model.conv.to(conv_dtype)
    graph_module = fused(model)
    x = train_only(model, SHAPES[layer].input(conv_dtype), subset)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert saved_bytes(graph_module, x) <= saved_bytes(model, x)


@pytest.mark.parametrize("subset", SUBSETS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_is_saved_only_where_weight_or_gamma_want_a_gradient(dtype, subset):
    model = SHAPES["wider output"].model(dtype)
    graph_module = fused(model)
    x = train_only(model, SHAPES["wider output"].input(dtype), subset)
    wanted = subset & {"conv.weight", "norm.weight"}
    assert saved_bytes(graph_module, x) == (x.nbytes if wanted else 0)


def test_requires_grad_is_read_at_every_call():
    model = prepared(Pair())
    graph_module = fused(model)
    for subset in (SUBSETS[0], SUBSETS[-1], *SUBSETS[1:-1:5], SUBSETS[0]):
        x = train_only(model, data(2, 3, 6, 6), subset)
        assert_equivalent(model, graph_module, x, input_gradients="input" in subset)


def test_a_model_frozen_when_it_is_rewritten_and_thawed_later():
    model = prepared(Pair()).requires_grad_(False)
    graph_module = fused(model)
    assert not graph_module(data(2, 3, 6, 6)).requires_grad
    model.requires_grad_()
    assert_equivalent(model, graph_module, data(2, 3, 6, 6))
    assert sum(parameter.requires_grad for parameter in graph_module.parameters()) == 4


def test_without_gradients_nothing_is_saved():
    model = prepared(Pair())
    graph_module = fused(model)
    x = data(2, 3, 6, 6).requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert saved_bytes(graph_module, x) == 0
            assert_equivalent(model, graph_module, x)
    model.requires_grad_(False)
    assert saved_bytes(graph_module, x.detach()) == 0


def test_a_parameter_that_a_backward_pass_did_not_ask_for():
    """`autograd.grad` of a subset: the others are not computed, and their hooks stay silent."""
    model = prepared(Pair())
    graph_module = fused(model)
    x = data(2, 3, 6, 6).requires_grad_()
    sources = [x, *model.parameters()]
    for wanted in itertools.combinations(range(5), 2):
        chosen = [sources[index] for index in wanted]
        expected = torch.autograd.grad(model(x).sin().sum(), chosen)
        actual = torch.autograd.grad(graph_module(x).sin().sum(), chosen)
        torch.testing.assert_close(actual, expected)
