"""What PyTorch's own tools do with a GraphModule, they do with a rewritten one and with extractors that were tuned."""

import copy
import importlib
import sys
import warnings

import pytest
import torch
from models import NET_PAIRS, Residual, data, fused_nodes, net, prepared, through_pickle, through_torch_save
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from convbn_fx import report, symbolic_trace, transform, tune, untune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)
IMAGES = data(2, 3, 32, 32)


@pytest.fixture(params=[symbolic_trace, fx.symbolic_trace], ids=["ours", "torch.fx"])
def rewritten(request):
    return transform(request.param(net()))


def in_parts(graph_module):
    numbers = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    return split_module(graph_module, graph_module, lambda node: numbers[node] // 4)


TOOLS = {
    "Transformer": lambda graph_module: fx.Transformer(graph_module).transform(),
    "split_module": in_parts,
    "traced again": fx.symbolic_trace,
    "traced by ours": symbolic_trace,
    "copies of copies": lambda graph_module: copy.deepcopy(copy.deepcopy(graph_module)),
    "GraphModule": lambda graph_module: fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph)),
    "pickle of a Transformer's": lambda graph_module: through_pickle(
        fx.Transformer(graph_module).transform()
    ),
    "pickle of a GraphModule": lambda graph_module: through_pickle(fx.symbolic_trace(graph_module)),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_that_make_another_graph(rewritten, tool):
    result = TOOLS[tool](rewritten)
    graphs = [part for part in result.modules() if isinstance(part, fx.GraphModule)]
    assert sum(len(fused_nodes(graph)) for graph in graphs) == NET_PAIRS
    torch.testing.assert_close(result(X), rewritten(X))


def test_interpreters(rewritten):
    torch.testing.assert_close(fx.Interpreter(rewritten).run(X), rewritten(X))
    ShapeProp(rewritten).propagate(X)
    assert all("tensor_meta" in node.meta for node in fused_nodes(rewritten))
    assert rewritten.print_readable(print_output=False).count("functional_conv_batch_norm(") == NET_PAIRS


def test_a_graph_that_is_edited(rewritten):
    edited = copy.deepcopy(rewritten)
    edited.add_submodule("doubled", nn.Softplus())
    (output,) = edited.graph.find_nodes(op="output")
    with edited.graph.inserting_before(output):
        output.args = (edited.graph.call_module("doubled", output.args),)
    edited.graph.lint()
    edited.recompile()
    edited.delete_all_unused_submodules()
    expected = nn.functional.softplus(rewritten(X))
    for result in (edited, copy.deepcopy(edited), through_pickle(edited)):
        torch.testing.assert_close(result(X), expected)


def test_written_to_a_folder(tmp_path, monkeypatch):
    rewritten = transform(symbolic_trace(prepared(Residual(3)).float()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Was not able to save the following children", UserWarning)
        rewritten.to_folder(tmp_path / "written_by_fx", "Residual")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        result = importlib.import_module("written_by_fx").Residual().eval()
    finally:
        for name in [name for name in sys.modules if name.startswith("written_by_fx")]:
            del sys.modules[name]
    torch.testing.assert_close(result(X.float()), rewritten(X.float()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level:UserWarning")
def test_scripting_a_rewritten_graph():
    rewritten = transform(symbolic_trace(prepared(Residual(3))))
    with pytest.raises(TypeError, match=r"Script convbn_fx\.untune\(model\)"):
        torch.jit.script(rewritten)
    torch.testing.assert_close(torch.jit.script(untune(rewritten))(X), rewritten(X))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_of_an_extractor_that_was_tuned(copied):
    torch.manual_seed(0)
    original = create_feature_extractor(prepared(models.resnet18(num_classes=4)), ["layer1"]).eval()
    tuned = tune(original)
    duplicate = copied(copied(tuned))
    assert report(duplicate) == report(tuned)
    assert not {id(tensor) for tensor in duplicate.parameters()} & {
        id(tensor) for tensor in tuned.parameters()
    }
    for training in (False, True, False):
        assert_equivalent(original.train(training), duplicate.train(training), IMAGES)
    assert saved_bytes(duplicate, IMAGES) == saved_bytes(tuned, IMAGES) < saved_bytes(original, IMAGES)


def test_an_extractor_there_and_back():
    torch.manual_seed(0)
    original = create_feature_extractor(prepared(models.resnet18(num_classes=4)), ["layer1"]).eval()
    plain = untune(tune(original))
    assert not plain._forward_hooks
    with pytest.raises(ValueError, match="nothing in this"):
        report(plain)
    for training in (False, True, False):
        assert_equivalent(original.train(training), plain.train(training), IMAGES)
    assert saved_bytes(plain, IMAGES) == saved_bytes(original, IMAGES)
