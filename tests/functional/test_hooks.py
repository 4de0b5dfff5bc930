"""Hooks of every kind, before and after the rewrite; weight and spectral norm of every age."""

import pytest
import torch
from hooks import GLOBAL_HOOKS, HOOKS
from models import Pair, data, fused, prepared
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from convbn_fx import report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)


# a deprecated hook is a hook
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return prepared(Pair(nn.Conv2d(3, 4, 3, padding=1)))


def runs_as_one(model, graph_module):
    """Whether the output of the convolution is not saved."""
    return saved_bytes(graph_module, X) < saved_bytes(model, X)


@pytest.mark.parametrize("place", ["conv", "norm"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_registered_after_the_rewrite(model, kind, place):
    graph_module = fused(model)
    assert runs_as_one(model, graph_module)
    handle = HOOKS[kind](model.get_submodule(place))
    assert_equivalent(model, graph_module, X)
    handle.remove()
    assert_equivalent(model, graph_module, X)
    assert runs_as_one(model, graph_module)


@pytest.mark.parametrize("place", ["conv", "norm"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_registered_before_the_rewrite(model, kind, place):
    handle = HOOKS[kind](model.get_submodule(place))
    graph_module = fused(model)
    assert "hooks" in report(graph_module).fused[0].note
    assert_equivalent(model, graph_module, X)
    assert not runs_as_one(model, graph_module)
    handle.remove()
    assert_equivalent(model, graph_module, X)
    assert runs_as_one(model, graph_module)


@pytest.mark.parametrize("place", ["conv", "norm"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_the_graph_modules_own_view_of_a_module(model, kind, place):
    graph_module = fused(model)
    handle = HOOKS[kind](graph_module.get_submodule(place))
    assert_equivalent(model, graph_module, X)
    assert not runs_as_one(model, graph_module)
    handle.remove()


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_global_hook(model, kind, when):
    graph_module = fused(model) if when == "after" else None
    plain = model(X)
    handle = GLOBAL_HOOKS[kind]()
    try:
        graph_module = graph_module or fused(model)
        if "backward" not in kind:
            assert not torch.allclose(graph_module(X), plain)
        assert_equivalent(model, graph_module, X)
    finally:
        handle.remove()
    torch.testing.assert_close(graph_module(X), plain)
    assert runs_as_one(model, graph_module)


def test_hooks_are_called_once_and_in_order(model):
    graph_module = fused(model)
    events = []
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda m, args, name=name: events.append(f"before {name}"))
        module.register_forward_hook(lambda m, args, output, name=name: events.append(f"after {name}"))
    graph_module(X)
    assert events == ["before conv", "after conv", "before norm", "after norm"]


def test_an_always_called_hook_sees_the_error_that_another_raises(model):
    graph_module = fused(model)
    events = []
    model.conv.register_forward_hook(lambda m, args, output: events.append("called"), always_call=True)
    with pytest.raises(RuntimeError, match="channels"):
        graph_module(data(2, 5, 6, 6))
    assert events == ["called"]


def test_a_hook_on_one_pair_leaves_the_others_fused(model):
    model = prepared(nn.Sequential(Pair(), Pair(nn.Conv2d(4, 4, 3))))
    graph_module = fused(model, 2)
    everything_fused = saved_bytes(graph_module, X)
    HOOKS["forward"](model[0].conv)
    assert_equivalent(model, graph_module, X)
    assert everything_fused < saved_bytes(graph_module, X) < saved_bytes(model, X)


def test_a_container_with_a_hook_is_called_as_a_module():
    model = prepared(nn.Sequential(Pair(), Pair(nn.Conv2d(4, 4, 3))))
    model[0].register_forward_hook(lambda m, args, output: output.sin())
    graph_module = fused(model, 1)
    assert [skip.reason.name for skip in report(graph_module).skipped] == ["INSIDE_LEAF_MODULE"]
    assert_equivalent(model, graph_module, X)


def test_hooks_on_the_root_stay_on_the_root(model):
    model.register_forward_hook(lambda m, args, output: output.sin())
    model.register_forward_pre_hook(lambda m, args: (args[0].cos(),))
    graph_module = fused(model)
    assert runs_as_one(model, graph_module)
    assert_equivalent(model, graph_module, X)


# --- Weights that are computed ----------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.flip(0)


def symmetric_weight(module):
    parametrize.register_parametrization(module, "weight", Symmetric())


def symmetric_bias(module):
    parametrize.register_parametrization(module, "bias", Symmetric())


OLD_STYLE = [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm]
NEW_STYLE = [
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    symmetric_weight,
    symmetric_bias,
]


def optimizer_step(model):
    with torch.no_grad():
        for position, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * data(*parameter.shape, seed=position))


# a deprecated function is what this test is about
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize("change", OLD_STYLE)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_old_style_weight_hooks(model, change, training, when):
    if when == "after":
        graph_module = fused(model)
        change(model.conv)
    else:
        change(model.conv)
        graph_module = fused(model)
    model.conv.train(training)
    assert_equivalent(model, graph_module, X)
    optimizer_step(model)  # the weight in use is computed from the new parameters, by the hook
    assert_equivalent(model, graph_module, X)


@pytest.mark.parametrize("change", NEW_STYLE)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
def test_parametrizations(change, training, when, conv):
    torch.manual_seed(0)
    model = prepared(Pair(conv(3, 4, 3)))
    if when == "after":
        graph_module = fused(model)
        change(model.conv)
    else:
        change(model.conv)
        graph_module = fused(model)
    model.double()
    model.conv.train(training)  # spectral_norm makes a step of the power method for each look at the weight
    assert_equivalent(model, graph_module, X)
    optimizer_step(model)
    assert_equivalent(model, graph_module, X)
    assert runs_as_one(model, graph_module)
    parametrize.remove_parametrizations(model.conv, next(iter(model.conv.parametrizations)))
    assert_equivalent(model, graph_module, X)
    assert runs_as_one(model, graph_module)


def test_a_parametrization_of_the_batch_norm(model):
    graph_module = fused(model)
    symmetric_weight(model.norm)
    assert_equivalent(model, graph_module, X)
    assert runs_as_one(model, graph_module)
    assert_equivalent(model, fused(model), X)


def test_a_parametrization_is_computed_once_a_call(model):
    calls = []

    class Counting(nn.Module):
        def forward(self, weight):
            calls.append(weight)
            return weight

    parametrize.register_parametrization(model.conv, "weight", Counting())
    graph_module = fused(model)
    for input in (X, X[:1], data(2, 3, 4, 4)):
        calls.clear()
        graph_module(input)
        assert len(calls) == 1


def test_pruned_weights(model):
    graph_module = fused(model)
    prune.random_unstructured(model.conv, "weight", 0.5)
    assert_equivalent(model, graph_module, X)
    optimizer_step(model)
    assert_equivalent(model, graph_module, X)
    prune.remove(model.conv, "weight")
    assert_equivalent(model, graph_module, X)
    assert runs_as_one(model, graph_module)


def test_tensor_hooks_on_parameters(model):
    graph_module = fused(model)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 3 * gradient)
    assert_equivalent(model, graph_module, X)
    assert runs_as_one(model, graph_module)


@pytest.mark.usefixtures("real_costs")
@pytest.mark.parametrize("fuse", [fused, tune])
def test_a_weight_that_changes_when_it_is_read_is_read_once_where_a_pair_runs_apart(fuse):
    model = prepared(Pair(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32)))
    parametrizations.spectral_norm(model.conv.train())
    after = fuse(model)
    for _ in range(2):
        assert_equivalent(model, after, data(1, 32, 3, 3))
        with torch.no_grad():
            assert_equivalent(model, after, data(1, 32, 3, 3))
