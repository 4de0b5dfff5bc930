"""Tuned, transformed, deployed and exported models, and those of libraries, compiled and exported."""

import copy
import logging

import pytest
import timm
import torch
import torchvision
from compiled import INNER, NET, compiled, pairs, skips
from models import Pair, data, exported, fused, fused_nodes, in_train_mode, net, prepared, with_slow
from torch import nn
from torch.func import functional_call, grad
from torch.fx.experimental.proxy_tensor import make_fx

from bench.tools.structure import count_pairs
from convbn_fx import deploy, report, symbolic_trace, transform, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

pytestmark = [
    pytest.mark.usefixtures("_fresh_compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
    # Dynamo looks at .grad of every input
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


# --- Tuned, transformed, deployed, exported models, compiled ------------------------------------------------------


USED = "unused"  # `tune` takes the pair of the network that its forward does not use


@pytest.mark.parametrize("inner", INNER)
def test_a_tuned_model_compiled(inner):
    model = net()
    tuned = tune(model)
    candidate = compiled(tuned, inner)
    assert_equivalent(model, candidate, X)
    model.train()
    tuned.train()
    assert_equivalent(model, candidate, X)
    tuned.eval()
    model.eval()
    assert_equivalent(model, candidate, X)
    assert {pair for pair in pairs(candidate) if USED not in pair[0]} == NET


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_a_tuned_model_compiled_by_others(backend):
    model = net()
    tuned = tune(model)
    candidate = torch.compile(tuned, backend=backend)
    assert_equivalent(model, candidate, X)
    with torch.no_grad():
        assert_equivalent(model, candidate, X)
    tuned.stem.norm.train()
    model.stem.norm.train()
    assert_equivalent(model, candidate, X)
    names = pairs(candidate)
    assert {pair for pair in names if USED not in pair[0]} == NET
    assert pairs(tuned) == names


def untouched(model):
    return model


def transformed(model):
    return transform(symbolic_trace(model))


COMPOSITE = pytest.mark.xfail(strict=True, reason="a rewritten graph is captured as a fold and a convolution")


@pytest.mark.parametrize("change", [untouched, tune, pytest.param(transformed, marks=COMPOSITE)])
def test_a_layer_with_a_large_weight_saves_no_more_than_in_eval_mode(change):
    """At no shape, and so no folded weight either, whoever compiled what before."""
    model = prepared(Pair(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)))
    candidate = compiled(change(model))
    x = data(1, 32, 3, 4).requires_grad_()
    candidate(x)
    assert saved_bytes(candidate, x) <= saved_bytes(model, x)


def test_a_transformed_model_compiled():
    model = net()
    graph_module = fused(model, len(NET))
    candidate = compiled(graph_module, fullgraph=True)
    assert_equivalent(model, candidate, X)
    assert pairs(candidate) == pairs(graph_module) == NET


@pytest.mark.parametrize("inner", INNER)
def test_a_deployed_model_compiled(inner):
    model = net()
    deployed = deploy(model)
    candidate = compiled(deployed, inner, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(candidate(X), model(X))
    assert {pair for pair in pairs(candidate) if USED not in pair[0]} == NET


@pytest.mark.filterwarnings("ignore:.*_guards_fn:UserWarning")
def test_an_exported_model_compiled():
    model = net()
    candidate = compiled(exported(model, X))
    torch.testing.assert_close(candidate(X), model(X))
    assert pairs(candidate) == NET


# --- The exported side of tune and deploy -------------------------------------------------------------------------


def normalising(graph_module):
    """Nodes that are batch norms still, in all graphs of it."""
    return [
        node
        for part in graph_module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "call_function" and "batch_norm" in str(node.target) and node not in fused_nodes(part)
    ]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_a_tuned_model_exported(strict):
    model = net()
    program = torch.export.export(tune(model), (X,), strict=strict)
    assert set(program.state_dict) == set(model.state_dict())
    captured = program.module()
    torch.testing.assert_close(captured(X), model(X))
    graph_module = transform(captured)
    assert not normalising(graph_module)
    assert_equivalent(captured, graph_module, X)
    torch.testing.assert_close(graph_module(X), model(X))


def test_a_tuned_model_exported_and_its_gradients():
    model = net()
    captured = exported(tune(model), X)
    graph_module = transform(captured)
    for candidate in (captured, graph_module):
        x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
        wanted = torch.autograd.grad(
            model(x).sin().sum(), [x, *model.stem.parameters(), *model.block.parameters()]
        )
        parameters = dict(candidate.named_parameters())
        sources = [
            y,
            *(
                parameters[name]
                for name, _ in model.named_parameters()
                if name.startswith(("stem.", "block."))
            ),
        ]
        torch.testing.assert_close(torch.autograd.grad(candidate(y).sin().sum(), sources), wanted)


@in_train_mode
def test_a_tuned_model_in_train_mode_exported():
    model = net().train()
    model.dropout.eval()
    tuned = tune(model, include_training=True)
    graph_module = transform(exported(tuned, X))
    assert len(normalising(graph_module)) == len(NET)
    assert {skip.reason.name for skip in report(graph_module).skipped} == {"TRAINING_MODE"}


def test_a_tuned_model_exported_with_dynamic_shapes():
    model = net()
    shapes = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("height", min=4)}
    graph_module = transform(exported(tune(model), X, dynamic_shapes=({**shapes},)))
    for shape in ((2, 3, 6, 6), (5, 3, 9, 6)):
        torch.testing.assert_close(graph_module(data(*shape)), model(data(*shape)))


def test_an_exported_program_tuned():
    captured = exported(net(), X)
    tuned = tune(captured)
    assert len(report(tuned).fused) == len(NET)
    assert not normalising(tuned)
    assert normalising(captured)
    assert_equivalent(captured, tuned, X)


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_deployed(decomposed):
    model = net()
    program = torch.export.export(model, (X,))
    captured = (program.run_decompositions() if decomposed else program).module()
    deployed = deploy(captured)
    assert not normalising(deployed)
    assert not fused_nodes(deployed)
    assert len(report(deployed).fused) == len(NET)
    with torch.no_grad():
        torch.testing.assert_close(deployed(X), model(X))
        before = captured(X)
        shared = set(captured.parameters())
        folded = [parameter for parameter in deployed.parameters() if parameter not in shared]
        assert len(folded) == 2 * len(NET)
        for parameter in folded:
            parameter.add_(1)
        torch.testing.assert_close(captured(X), before)
    assert normalising(captured)


def test_a_transformed_export_deployed():
    model = net()
    graph_module = transform(exported(model, X))
    deployed = deploy(graph_module)
    assert not fused_nodes(deployed)
    assert len(fused_nodes(graph_module)) == len(NET)
    with torch.no_grad():
        torch.testing.assert_close(deployed(X), model(X))


def test_a_deployed_model_exported():
    model = net()
    captured = exported(deploy(model), X)
    assert not normalising(captured)
    with torch.no_grad():
        torch.testing.assert_close(captured(X), model(X))


@pytest.mark.parametrize(
    "tracing_mode", ["real", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("fake", "symbolic"))]
)
def test_make_fx_of_a_tuned_training_step(tracing_mode):
    model = net()
    tuned = tune(model)
    parameters = {
        name: parameter.detach() for name, parameter in model.named_parameters() if USED not in name
    }

    def step(candidate):
        def loss(parameters, x):
            return functional_call(candidate, parameters, (x,)).sin().sum()

        return grad(loss)

    captured = make_fx(step(tuned), tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(parameters, X)
    assert not normalising(captured)
    expected = step(model)(parameters, X)
    torch.testing.assert_close(captured(parameters, X), expected)
    torch.testing.assert_close(transform(captured)(parameters, X), expected)
    fresh = {name: parameter * 1.1 for name, parameter in parameters.items()}
    torch.testing.assert_close(captured(fresh, -X), step(model)(fresh, -X))


# --- Models of timm and torchvision -------------------------------------------------------------------------------


SMALL = data(2, 3, 64, 64)

ZOO = {
    "resnet18": lambda: torchvision.models.resnet18(weights=None, num_classes=4),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(weights=None, num_classes=4),
    "timm test_resnet": lambda: timm.create_model("test_resnet", num_classes=4),
    "timm test_efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=4),
    "timm test_byobnet": lambda: timm.create_model("test_byobnet", num_classes=4),
    "timm mobilevitv2_050": lambda: timm.create_model("mobilevitv2_050", num_classes=4),
}


LARGER = ("resnet18", "mobilenet_v3_small", "timm test_byobnet", "timm mobilevitv2_050")


@pytest.mark.parametrize("name", with_slow(ZOO, LARGER))
def test_models_of_libraries(name):
    model = prepared(ZOO[name]())
    candidate = compiled(model, fullgraph=True)
    assert_equivalent(model, candidate, SMALL)
    count = count_pairs(model, SMALL)
    assert count > 0
    assert len(report(candidate).fused) == count
    modules = {name for name, _ in model.named_modules()}
    assert {name for pair in pairs(candidate) for name in pair} <= modules
    norms = {
        name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    assert {norm for _, norm in pairs(candidate)} | {norm for norm, _ in skips(candidate)} == norms
    assert saved_bytes(candidate, SMALL) < saved_bytes(model, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm test_efficientnet", "timm test_byobnet"])
def test_models_of_libraries_in_train_mode(name):
    model = prepared(ZOO[name]()).train()
    candidate = compiled(model, "aot_eager")
    assert_equivalent(model, candidate, SMALL)
    assert not report(candidate).fused


def test_no_message_is_logged(caplog):
    """Nothing that a user would have to look after: no suppressed error, no fallback."""
    with caplog.at_level(logging.WARNING):
        candidate = compiled(net(), "aot_eager", dynamic=True)
        candidate(X).sum().backward()
        report(candidate)
    assert not caplog.records


def test_what_is_remembered_stays_with_the_tensors(tmp_path):
    """A copy is another model; and a file must be read where this library is not."""
    model = prepared(Pair())
    candidate = compiled(model)
    candidate(X)
    assert len(report(candidate).fused) == 1
    copied = copy.deepcopy(model)
    with pytest.raises(ValueError, match="report"):
        report(copied)
    assert len(report(tune(copied)).fused) == 1
    torch.save(model.state_dict(keep_vars=True), tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert loaded.keys() == model.state_dict().keys()
    candidate(X)
    assert len(report(candidate).fused) == 1
