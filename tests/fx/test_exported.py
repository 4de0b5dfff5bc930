"""Graphs that others capture: torch.export, make_fx, Dynamo."""

import copy
import pickle

import pytest
import torch
from models import (
    KINDS,
    LAYOUTS,
    NET_PAIRS,
    Pair,
    data,
    exported,
    fused,
    fused_nodes,
    in_train_mode,
    net,
    prepared,
    reasons,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from convbn_fx import report, transform
from convbn_fx.fx.rewriting import BATCH_NORM
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)
ITSELF = {"trace": lambda captured: captured}


# --- torch.export --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network(strict):
    model = net()
    captured = exported(model, X, strict=strict)
    graph_module = fused(captured, NET_PAIRS, **ITSELF)
    assert all(pair.mode_is_constant for pair in report(graph_module).fused)
    assert all(pair.batch_norm.startswith("batch_norm") for pair in report(graph_module).fused)
    assert_equivalent(captured, graph_module, X)
    torch.testing.assert_close(graph_module(X), model(X))
    assert saved_bytes(graph_module, X) < saved_bytes(captured, X)
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)guard|shape"):
        graph_module(data(3, 3, 6, 6))  # what export checks is still checked


def test_the_exported_graph_node_by_node():
    captured = exported(prepared(Pair()), X)
    (norm,) = [node for node in captured.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    graph_module = fused(captured, **ITSELF)
    targets = {node.target for node in graph_module.graph.nodes}
    assert not {target for target in targets if isinstance(target, torch._ops.OpOverload)}
    (node,) = fused_nodes(graph_module)
    assert isinstance(node.meta["val"], FakeTensor)
    assert node.meta["val"] is norm.meta["val"]
    assert node.meta["val"].shape == (2, 4, 4, 4)
    assert node.meta.get("stack_trace") == norm.meta.get("stack_trace")
    assert node.meta.keys() == norm.meta.keys() | {BATCH_NORM}


def test_an_exported_network_with_a_dynamic_batch():
    model = net()
    captured = exported(model, X, dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    graph_module = fused(captured, NET_PAIRS, **ITSELF)
    for batch in (2, 5):
        assert_equivalent(captured, graph_module, data(batch, 3, 6, 6))


@in_train_mode
def test_an_exported_network_in_train_mode():
    captured = exported(net().train(), X)
    graph_module = fused(captured, 0, **ITSELF)
    assert set(reasons(graph_module).values()) == {"TRAINING_MODE"}
    assert graph_module.code == captured.code
    assert_equivalent(captured, graph_module, X)


def test_an_exported_network_of_which_one_norm_trains():
    model = net()
    model.stem.norm.train()
    captured = exported(model, X)
    graph_module = fused(captured, NET_PAIRS - 1, **ITSELF)
    assert list(reasons(graph_module).values()) == ["TRAINING_MODE"]
    assert_equivalent(captured, graph_module, X)


def test_an_exported_network_is_live():
    captured = exported(net(), X)
    graph_module = fused(captured, NET_PAIRS, **ITSELF)
    before = graph_module(X)
    with torch.no_grad():
        for tensor in (*captured.parameters(), *captured.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    assert not torch.allclose(graph_module(X), before)
    assert_equivalent(captured, graph_module, X)


@pytest.mark.parametrize("pre_autograd", [False, True])
def test_decomposed_to_core_aten(pre_autograd):
    """`aten.convolution` and `aten._native_batch_norm_legit_no_training`, whose results are unpacked."""
    model = net()
    program = torch.export.export(model, (X,)).run_decompositions({} if pre_autograd else None)
    captured = program.module()
    graph_module = fused(captured, NET_PAIRS, **ITSELF)
    with torch.no_grad():
        assert_equivalent(captured, graph_module, X)
    torch.testing.assert_close(graph_module(X), model(X))


def test_the_result_can_be_exported_again():
    model = net()
    graph_module = fused(exported(model, X), NET_PAIRS, **ITSELF)
    again = exported(graph_module, X)
    torch.testing.assert_close(again(X), model(X))
    assert not [node for node in again.graph.nodes if "batch_norm" in str(node.target)]


# --- make_fx ------------------------------------------------------------------------------------------------------


def as_function(model):
    return lambda parameters, x: functional_call(model, parameters, (x,))


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(pre_dispatch, tracing_mode):
    model = net()
    model.dropout = nn.Identity()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    call = as_function(model)
    captured = make_fx(
        call, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True
    )(parameters, X)
    graph_module = fused(captured, NET_PAIRS, **ITSELF)
    if tracing_mode != "real":
        assert all(isinstance(node.meta["val"], torch.Tensor) for node in fused_nodes(graph_module))
    with torch.no_grad():
        torch.testing.assert_close(graph_module(parameters, X), call(parameters, X))
    x = X.clone().requires_grad_()
    inputs = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    sources = [x, *(p for name, p in inputs.items() if "unused" not in name)]
    expected = torch.autograd.grad(call(inputs, x).sin().sum(), sources)
    actual = torch.autograd.grad(graph_module(inputs, x).sin().sum(), sources)
    torch.testing.assert_close(actual, expected)


def test_make_fx_with_the_backward_pass():
    """What the backward pass reads has to stay."""
    model = prepared(Pair())
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def step(parameters, x):
        return torch.func.grad(lambda p, x: functional_call(model, p, (x,)).sin().sum())(parameters, x)

    captured = make_fx(step)(parameters, X)
    graph_module = fused(captured, 0, **ITSELF)
    assert set(reasons(graph_module).values()) <= {
        "CONVOLUTION_OUTPUT_USED_ELSEWHERE",
        "BATCH_NORM_OUTPUTS_USED",
    }
    assert len(reasons(graph_module)) == 1
    torch.testing.assert_close(graph_module(parameters, X), step(parameters, X))


# --- Dynamo -------------------------------------------------------------------------------------------------------


@pytest.fixture
def captured_by_dynamo():
    """Compiles with the pass as backend; the graphs, before and after, are in the list."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph_module, inputs):
        graphs.append((graph_module, transform(graph_module)))
        return graphs[-1][1]

    def compiled(model, **options):
        return torch.compile(model, backend=backend, **options), graphs

    yield compiled
    torch._dynamo.reset()


def test_dynamo(captured_by_dynamo):
    model = net()
    compiled, graphs = captured_by_dynamo(model, fullgraph=True)
    assert_equivalent(model, compiled, X)
    ((before, after),) = graphs
    assert len(fused_nodes(after)) == NET_PAIRS
    assert not report(after).skipped
    assert not fused_nodes(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_equivalent(model, compiled, X)
    assert len(graphs) == 1
    assert saved_bytes(compiled, X) < saved_bytes(model, X)


@in_train_mode
def test_dynamo_follows_modes_by_recompiling(captured_by_dynamo):
    model = net()
    compiled, graphs = captured_by_dynamo(model)
    assert_equivalent(model, compiled, X)
    model.train()
    assert_equivalent(model, compiled, X)
    model.stem.norm.eval()
    assert_equivalent(model, compiled, X)
    assert [len(fused_nodes(after)) for _, after in graphs] == [NET_PAIRS, 0, 1]


@pytest.mark.parametrize("kind", KINDS | LAYOUTS)
def test_dynamo_on_every_kind(captured_by_dynamo, kind):
    layer = (KINDS | LAYOUTS)[kind]
    model = layer.model()
    compiled, graphs = captured_by_dynamo(model, fullgraph=True)
    assert_equivalent(model, compiled, layer.input())
    assert [len(fused_nodes(after)) for _, after in graphs] == [1]


def test_dynamo_with_a_graph_break_between_the_two(captured_by_dynamo):
    def forward(m, x):
        y = m.conv(x)
        torch._dynamo.graph_break()
        return m.norm(y)

    model = prepared(Pair(forward=forward))
    compiled, graphs = captured_by_dynamo(model)
    assert_equivalent(model, compiled, X)
    assert len(graphs) == 2
    assert not any(fused_nodes(after) for _, after in graphs)


def test_dynamo_with_dynamic_shapes(captured_by_dynamo):
    model = net()
    compiled, graphs = captured_by_dynamo(model, dynamic=True, fullgraph=True)
    for shape in ((2, 3, 6, 7), (4, 3, 8, 9)):
        assert_equivalent(model, compiled, data(*shape))
    assert len(graphs) == 1


def test_dynamo_control_flow_and_optional_arguments(captured_by_dynamo):
    """What no symbolic trace can do: the branch is chosen at every call."""

    class Branching(Pair):
        def forward(self, x, mask=None):
            y = self.norm(self.conv(x))
            y = y if y.sum() > 0 else -y
            return y if mask is None else y * mask

    model = prepared(Branching())
    compiled, graphs = captured_by_dynamo(model)
    for sign in (1, -1):
        assert_equivalent(model, compiled, sign * X)
        assert_equivalent(model, compiled, sign * X, data(2, 4, 4, 4, seed=2))
    assert sum(len(fused_nodes(after)) for _, after in graphs) >= 1


# --- Graphs inside graphs -----------------------------------------------------------------------------------------


def nested_pairs(graph_module):
    return {
        name: len(fused_nodes(part))
        for name, part in graph_module.named_modules()
        if isinstance(part, torch.fx.GraphModule)
    }


def test_a_checkpoint_in_a_dynamo_graph(captured_by_dynamo):
    model = prepared(Pair(forward=lambda m, x: checkpoint(m.inner, x, use_reentrant=False)))
    model.inner = prepared(nn.Sequential(Pair(), Pair(nn.Conv2d(4, 4, 3))))
    compiled, graphs = captured_by_dynamo(model, fullgraph=True)
    assert_equivalent(model, compiled, X)
    ((before, after),) = graphs
    assert sum(nested_pairs(after).values()) == len(report(after).fused) == 2
    assert sum(nested_pairs(before).values()) == 0
    assert report(transform(after)) == report(after)


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch.export cannot capture the condition")
def test_branches_of_an_exported_condition():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Pair(), Pair()

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.one, self.other, (x,))

    model = prepared(Branching())
    captured = exported(model, X)
    graph_module = transform(captured)
    assert nested_pairs(graph_module) | {"": 0} == nested_pairs(graph_module)
    assert sum(nested_pairs(graph_module).values()) == len(report(graph_module).fused) == 2
    assert sum(nested_pairs(captured).values()) == 0
    with torch.no_grad():
        for x in (X, -X):
            torch.testing.assert_close(graph_module(x), model(x))
            torch.testing.assert_close(copy.deepcopy(graph_module)(x), model(x))


def test_a_graph_that_was_split():
    traced = torch.fx.symbolic_trace(net())
    positions = {node: index // 6 for index, node in enumerate(traced.graph.nodes)}
    captured = split_module(traced, None, positions.__getitem__)
    graph_module = transform(captured)
    assert sum(nested_pairs(graph_module).values()) == len(report(graph_module).fused) == NET_PAIRS
    assert sum(nested_pairs(captured).values()) == 0
    assert set(graph_module.state_dict()) == set(captured.state_dict())
    assert_equivalent(captured, graph_module, X)
    assert report(pickle.loads(pickle.dumps(graph_module))) == report(graph_module)
    twice = transform(graph_module)
    assert report(twice) == report(graph_module)
    assert nested_pairs(twice) == nested_pairs(graph_module)
