"""deploy: which modules, in which mode, from whatever was made of a model; what the result is."""

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from blocks import CROSSING, WAYS, ByReference
from deployed import LAYERS, SOURCES, assert_same, called_norms, deployed_with, norms_in, storages, two_convs
from models import (
    ALL_NET_PAIRS,
    KINDS,
    Functional,
    Net,
    Pair,
    Residual,
    conv_norm,
    data,
    in_train_mode,
    net,
    pair,
    prepared,
    reasons,
    snapshot,
    through_pickle,
    through_torch_save,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations
from torchvision.models.feature_extraction import create_feature_extractor

import convbn_fx
from convbn_fx import deploy, report, transform

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
]


# --- Borders and references ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CROSSING)
def test_a_pair_across_borders(name):
    torch.manual_seed(0)
    model = prepared(CROSSING[name]())
    deployed = deployed_with(model, 1)
    assert not norms_in(deployed)
    assert_same(model, deployed, X)


@pytest.mark.parametrize("way", WAYS)
def test_references_to_modules(way):
    torch.manual_seed(0)
    model = prepared(ByReference(way))
    deployed = deploy(model)
    assert_same(model, deployed, X)
    assert not storages(deployed) & storages(model) or norms_in(deployed)


def test_batch_norms_as_functions():
    def forward(self, x):
        return self.normalize(F.conv2d(x, self.weight, self.bias))

    torch.manual_seed(0)
    model = Functional(forward, (4, 3, 3, 3), 4).double().eval()
    deployed = deployed_with(model, 0)
    assert set(reasons(deployed).values()) == {"FUNCTION_CALL"}
    assert_same(model, deployed, X)
    assert_same(model, deploy(transform(convbn_fx.symbolic_trace(model))), X)


# --- modules=, modes, errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["block", "unused"], {"stem.norm"}),
        ([], {"stem.norm", "block.first.norm", "block.second.norm", "unused.1"}),
        (["", "stem"], set()),
        (("block.first",), {"stem.norm", "block.second.norm", "unused.1"}),
    ],
)
def test_only_some_modules(names, left):
    model = net()
    deployed = deployed_with(model, ALL_NET_PAIRS - len(left), modules=names)
    assert {name for name, reason in reasons(deployed).items() if reason == "NOT_SELECTED"} == left
    assert set(norms_in(deployed)) == left
    assert_same(model, deployed, X)


@pytest.mark.parametrize("made", [torch.fx.symbolic_trace, lambda m: transform(convbn_fx.symbolic_trace(m))])
def test_only_some_modules_around_a_graph(made):
    model = prepared(nn.ModuleDict({"a": nn.Sequential(*conv_norm()), "b": made(prepared(Residual(4)))}))
    model.forward = None
    deployed = deploy(model, modules=["a"])
    assert type(deployed["a"][1]) is nn.Identity
    assert len(report(deployed["a"]).fused) == 1
    assert len(norms_in(deployed["b"])) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((net(), ["stem", "bakbone"]), ValueError, "bakbone"),
        ((net(), "stem"), TypeError, "list"),
        ((torch.relu,), TypeError, "Module"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        deploy(*arguments)


@in_train_mode
def test_a_model_in_train_mode():
    model = net().train()
    deployed = deployed_with(model, 0)
    assert Counter(reasons(deployed).values()) == {"TRAINING_MODE": ALL_NET_PAIRS}
    assert "eval()" in str(report(deployed))
    assert len(norms_in(deployed)) == ALL_NET_PAIRS
    assert_same(model, deployed, X)


@in_train_mode
def test_a_graph_in_train_mode():
    model = pair().train()
    graph_module = transform(convbn_fx.symbolic_trace(model), include_training=True)
    deployed = deploy(graph_module)
    assert reasons(deployed) == {"norm": "TRAINING_MODE"}
    assert not report(deployed).fused
    assert_same(model, deployed, X)


def test_one_batch_norm_in_train_mode():
    model = net()
    model.block.first.norm.train()
    deployed = deployed_with(model, ALL_NET_PAIRS - 1)
    assert reasons(deployed) == {"block.first.norm": "TRAINING_MODE"}
    assert_same(model, deployed, X)


@in_train_mode
def test_a_shared_convolution_before_a_batch_norm_in_train_mode():
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm2(self.conv(x.sin())))
    model.norm2.train()
    assert_same(model, deploy(model), X)


def test_batch_norms_frozen_by_hand():
    model = net().train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    deployed = deployed_with(model, ALL_NET_PAIRS)
    assert deployed.training
    assert deployed.dropout.training
    assert_same(model, deployed, X)


def test_modes_are_kept_and_switched():
    model = net()
    model.dropout.train()
    deployed = deployed_with(model, ALL_NET_PAIRS)
    assert_same(model, deployed, X)
    expected = model.eval()(X)
    torch.testing.assert_close(deployed.train().eval()(X), expected)


def test_deployed_twice():
    model = net()
    once = deploy(model)
    twice = deployed_with(once, 0)
    assert str(twice) == str(once)
    assert not reasons(twice)
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), rtol=0, atol=0)
    assert torch.equal(twice(X), once(X))


def test_deployed_twice_with_a_module_in_the_place_of_a_batch_norm():
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm2(self.conv(x.sin())))
    once = deploy(model)
    assert torch.equal(deploy(once)(X), once(X))


def test_part_by_part():
    model = net()
    deployed = model
    for name in ("stem", "block.first", "block", "unused"):
        deployed = deployed_with(deployed, 1, modules=[name])
        assert_same(model, deployed, X)
    assert not norms_in(deployed)


@pytest.mark.parametrize("kind", [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity(), nn.Sequential()])
def test_nothing_to_fold(kind):
    model = prepared(kind)
    deployed = deployed_with(model, 0)
    assert_same(model, deployed, X)
    assert str(report(deployed))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).double().eval()
    deployed = deploy(model)
    assert reasons(deployed) == {"1": "UNINITIALIZED"}


# --- From whatever was made of a model ----------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_deployed_from(source):
    model = net()
    made = SOURCES[source](model)
    used = 3 if isinstance(made, torch.fx.GraphModule) else 4
    before = snapshot(made), snapshot(model), getattr(made, "code", None)
    deployed = deploy(made)
    assert (snapshot(made), snapshot(model), getattr(made, "code", None)) == before
    assert len(report(deployed).fused) == used
    assert_same(model, deployed, X)
    assert not called_norms(deployed)
    convs = [module for module in deployed.modules() if isinstance(module, _ConvNd)]
    assert {type(conv) for conv in convs} == {nn.Conv2d}
    assert_same(model, copy.deepcopy(deployed), X)
    if "exported" not in source:
        assert_same(model, through_pickle(deployed), X)
    assert_same(model, deploy(deployed), X)
    assert_same(model, made, X)


@pytest.mark.parametrize("source", [name for name in SOURCES if "tuned" not in name])
def test_nothing_that_was_folded_is_left_in_a_graph(source):
    """Neither dead parameters, which training in parallel would wait for, nor the statistics."""
    deployed = deploy(SOURCES[source](net()))
    assert not [name for name in deployed.state_dict() if "running" in name and "unused" not in name]
    convs = {name.rpartition(".")[0] for name, p in deployed.named_parameters() if p.ndim == 4}
    assert len(convs) == 3


def test_a_name_that_begins_that_of_what_takes_its_place():
    """`conv` is not used any more only because the graph calls a `conv_batch_norm_folded_0`."""
    deployed = deploy(transform(convbn_fx.symbolic_trace(pair())))
    assert len(list(deployed.parameters())) == 2


@pytest.mark.parametrize("source", SOURCES)
def test_deployed_as_a_part_of_a_model(source):
    torch.manual_seed(0)
    part = prepared(Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model = prepared(nn.Sequential(*conv_norm(3, 3), nn.ReLU(), part))
    made = copy.copy(model)
    made._modules = dict(model._modules)
    made[3] = SOURCES[source](part)
    deployed = deploy(made)
    assert len(report(deployed).fused) == 2
    assert_same(model, deployed, X)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        *((name, "transformed") for name in LAYERS),
        *(
            (name, "exported")
            for name in (*KINDS, "strided", "strided_transpose", "zeros same 2d", "no_bias")
        ),
    ],
)
def test_a_layer_in_a_graph(layer, source):
    layer = LAYERS[layer]
    model = layer.model()
    if source == "exported":
        graph_module = torch.export.export(model, (layer.input(),)).module()
    else:
        graph_module = SOURCES[source](model)
    deployed = deploy(graph_module)
    assert len(report(deployed).fused) == 1
    assert not called_norms(deployed)
    assert_same(model, deployed, layer.input())


@pytest.mark.xfail(
    strict=True, reason="of torchvision's two graphs only the one that is in place is explored"
)
def test_a_feature_extractor():
    """torchvision's puts one of two graphs in place with the mode."""
    model = net()
    extractor = create_feature_extractor(
        model, train_return_nodes={"stem.conv": "y", "block": "z"}, eval_return_nodes={"block": "z"}
    )
    deployed = deploy(extractor)
    assert_same(extractor, deployed, X)
    for m in (extractor, deployed):
        m.train()
        convbn_fx.batchnorm_mode(m, train=False)
    assert_same(extractor, deployed, X)


def test_two_deployed_models_are_apart():
    model = net()
    first, second = deploy(model), deploy(model)
    with torch.no_grad():
        first.stem.conv.weight.zero_()
    assert_same(model, second, X)


# --- The result ---------------------------------------------------------------------------------------------------


def test_the_names_in_the_report():
    fused = report(deploy(net())).fused
    assert {(p.convolution, p.batch_norm) for p in fused} == {
        ("stem.conv", "stem.norm"),
        ("block.first.conv", "block.first.norm"),
        ("block.second.conv", "block.second.norm"),
        ("unused.0", "unused.1"),
    }


def test_the_original_sees_nothing_of_training_the_result():
    model = net()
    before = copy.deepcopy(model.state_dict())
    expected = model(X)
    deployed = deploy(model)
    folded = [p for name, p in deployed.named_parameters() if "head" not in name]
    optimizer = torch.optim.SGD(folded, lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(deployed.train()(X).square().sum())
        losses[-1].backward()
        optimizer.step()
    assert all(
        p.grad is not None for name, p in deployed.named_parameters() if name.startswith(("stem", "block"))
    )
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(model(X), expected)
    assert not torch.equal(deployed.eval()(X), expected)


def test_the_result_sees_nothing_of_training_the_original():
    model = net()
    deployed = deploy(model)
    expected = deployed(X)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "head" not in name:
                p.add_(1)
    assert torch.equal(deployed(X), expected)


@pytest.mark.parametrize("change", ["to", "half", "load", "hook", "train"])
def test_what_is_done_to_the_result_is_not_done_to_the_original(change):
    model = pair()
    before = snapshot(model)
    deployed = deploy(model)
    match change:
        case "to":
            deployed.to("meta")
        case "half":
            deployed.half()
        case "load":
            deployed.load_state_dict({name: torch.zeros_like(t) for name, t in deployed.state_dict().items()})
        case "hook":
            deployed.conv.register_forward_hook(lambda *_: None)
        case "train":
            deployed.train()
    assert snapshot(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("build", [net, lambda: prepared(Pair(nn.Linear(6, 4), nn.BatchNorm1d(4)))])
def test_copies(build, copied):
    model = build()
    deployed = deploy(model)
    again = copied(deployed)
    x = X if isinstance(model, Net) else data(5, 6)
    assert_same(model, again, x)
    assert str(again) == str(deployed)
    assert report(again) == report(deployed)
    assert storages(again).isdisjoint(storages(deployed))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
path = sys.argv[1]
saved = torch.load(path, weights_only=False)
model = saved["model"]
assert torch.equal(model(saved["x"]), saved["y"])
if "shared" in saved:
    assert torch.equal(saved["shared"](saved["x"]), saved["shared_y"])
assert not any("BatchNorm" in type(module).__name__ for module in model.modules())
model(saved["x"]).sum().backward()
"""


def test_a_fresh_process(tmp_path):
    deployed = deploy(net())
    graph = deploy(transform(convbn_fx.symbolic_trace(net())))
    graph.delete_submodule("unused")
    path = tmp_path / "model.pt"
    saved = {"model": deployed, "x": X, "y": deployed(X), "shared": graph, "shared_y": graph(X)}
    torch.save(saved, path)
    tests = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(path)],
        check=True,
        cwd=tests,
        timeout=120,
    )


def test_state_dicts():
    torch.manual_seed(1)
    first, second = deploy(net()), deploy(prepared(Net()))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert not torch.equal(first(X), second(X))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(X), second(X))


def test_repr_and_signature():
    model = net()
    deployed = deploy(model)
    assert type(deployed) is Net
    assert "BatchNorm" not in repr(deployed)
    assert [name for name, _ in deployed.named_modules()] == [name for name, _ in model.named_modules()]


# --- What a graph's batch norms are called ------------------------------------------------------------------------


def test_a_pair_that_deploy_left_is_reported_once():
    model = prepared(Pair())
    parametrizations.weight_norm(model.conv)
    deployed = deploy(transform(torch.export.export(model, (X,)).module()))
    found = report(deployed)
    assert len(found.fused) + len(found.skipped) == 1
    torch.testing.assert_close(deployed(X), model(X))
