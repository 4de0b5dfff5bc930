"""State_dict, copies, pickles; the caller's model is left as found."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import (
    KINDS,
    NET_PAIRS,
    Functional,
    Net,
    Pair,
    data,
    fused,
    fused_nodes,
    net,
    prepared,
    through_pickle,
    through_torch_save,
)
from torch import nn
from torch.nn import functional as F

import convbn_fx
from convbn_fx import report, symbolic_trace, transform
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)
KEYS = set(Net().state_dict())


def conv_then_norm(m, x):
    return m.norm(m.conv(x))


def times_a_constant(m, x):
    return m.norm(m.conv(x)) * torch.tensor(2.0) + m.offset


def functional_pair(m, x):
    return m.normalize(F.conv2d(x, m.weight, m.bias, padding=1))


# --- state_dict ---------------------------------------------------------------------------------------------------


def test_the_keys_are_those_of_the_model():
    graph_module = fused(net(), NET_PAIRS)
    assert set(graph_module.state_dict()) == KEYS
    assert "stem.norm.num_batches_tracked" in KEYS
    assert "unused.1.running_mean" in KEYS
    assert "unused_buffer" in KEYS
    assert "temporary" not in KEYS
    assert set(symbolic_trace(net()).state_dict()) == KEYS


@pytest.mark.parametrize("kind", ["parameters", "buffers", "children"])
def test_everything_has_the_same_name_and_is_the_same(kind):
    model = net()
    graph_module = fused(model, NET_PAIRS)
    expected, actual = (dict(getattr(m, f"named_{kind}")()) for m in (model, graph_module))
    assert expected.keys() == actual.keys()
    assert all(actual[name] is value for name, value in expected.items())


def test_checkpoints_move_both_ways():
    model, other = net(), prepared(Net())
    graph_module = fused(model, NET_PAIRS)
    for source, target in ((other, graph_module), (graph_module, other), (other, model)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(1)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(dict(target.state_dict()), dict(source.state_dict()))
        torch.testing.assert_close(target(X), source(X))
    assert_equivalent(model, graph_module, X)


def test_load_state_dict_with_assign():
    model, other = net(), prepared(Net())
    graph_module = fused(model, NET_PAIRS)
    graph_module.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(graph_module(X), other(X))
    assert_equivalent(model, graph_module, X)


def test_strict_loading_names_what_is_missing():
    state = net().state_dict()
    state.pop("stem.norm.running_mean")
    state["surplus"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*stem.norm.running_mean.*Unexpected.*surplus"):
        fused(net(), NET_PAIRS).load_state_dict(state)


def test_state_dict_hooks_of_modules_are_kept():
    model = net()
    model.stem.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(extra=X))
    assert "extra" in fused(model, NET_PAIRS).state_dict()


def test_constants_in_forward_add_no_keys():
    model = prepared(Pair(forward=times_a_constant))
    model.offset = torch.ones(1, dtype=torch.float64)  # a tensor, but no buffer
    keys = set(model.state_dict())
    graph_module = fused(model)
    assert set(symbolic_trace(model).state_dict()) == keys
    assert set(graph_module.state_dict()) == keys
    for candidate in (graph_module, copy.deepcopy(graph_module), through_pickle(graph_module)):
        torch.testing.assert_close(candidate(X), model(X))
        assert set(candidate.state_dict()) == keys
    assert set(model.state_dict()) == keys
    assert vars(model)["offset"] is model.offset


def test_an_exported_model_keeps_its_keys():
    captured = torch.export.export(net(), (X,)).module()
    graph_module = fused(captured, NET_PAIRS, trace=lambda captured: captured)
    assert set(graph_module.state_dict()) == set(captured.state_dict())
    assert_equivalent(captured, graph_module, X)


# --- Copies -------------------------------------------------------------------------------------------------------

COPIES = [copy.deepcopy, through_pickle, through_torch_save]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_the_same_model_on_its_own(copied):
    model = net()
    model.stem.norm.train()
    graph_module = fused(model, NET_PAIRS - 1)
    duplicate = copied(graph_module)
    assert isinstance(duplicate, torch.fx.GraphModule)
    assert len(fused_nodes(duplicate)) == NET_PAIRS - 1
    assert set(duplicate.state_dict()) == KEYS
    assert report(duplicate) == report(graph_module)
    assert_equivalent(model, duplicate, X)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.add_(1)
    assert not torch.allclose(duplicate(X), graph_module(X))
    assert not {id(p) for p in duplicate.parameters()} & {id(p) for p in model.parameters()}
    model.load_state_dict(duplicate.state_dict())
    assert_equivalent(model, duplicate, X)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_copies(copied):
    graph_module = fused(net(), NET_PAIRS)
    duplicate = copied(copied(graph_module))
    assert report(duplicate) == report(graph_module)
    assert transform(duplicate).code == duplicate.code
    assert_equivalent(graph_module, duplicate, X)
    assert set(duplicate.state_dict()) == KEYS


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_every_kind(copied, kind):
    model, x = KINDS[kind].model(), KINDS[kind].input()
    assert_equivalent(model, copied(fused(model)), x)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_functional_pairs(copied):
    model = Functional(functional_pair, (4, 3, 3, 3), 4).double()
    duplicate = copied(fused(model))
    assert len(fused_nodes(duplicate)) == 1
    assert_equivalent(model, duplicate, X)
    assert set(duplicate.state_dict()) == set(model.state_dict())


def test_copies_of_exported_models():
    """Copies by `deepcopy`: torch's own exported modules cannot be pickled either."""
    captured = torch.export.export(net(), (X,)).module()
    graph_module = fused(captured, NET_PAIRS, trace=lambda captured: captured)
    duplicate = copy.deepcopy(graph_module)
    assert_equivalent(graph_module, duplicate, X)
    assert report(duplicate) == report(graph_module)


def test_a_shallow_copy_shares_everything():
    graph_module = fused(net(), NET_PAIRS)
    duplicate = copy.copy(graph_module)
    assert report(duplicate) == report(graph_module)
    assert all(p is q for p, q in zip(graph_module.parameters(), duplicate.parameters(), strict=False))
    assert set(duplicate.state_dict()) == KEYS


@pytest.mark.parametrize("copied", [copy.copy, *COPIES])
def test_a_copy_keeps_the_name_of_the_class(copied):
    assert type(copied(fused(net(), NET_PAIRS))).__name__ == "Net"


@pytest.mark.parametrize("copied", COPIES)
def test_copies_keep_hooks(copied):
    model = prepared(Pair(forward=conv_then_norm))
    graph_module = fused(model)
    model.conv.register_forward_hook(double_output)
    graph_module.register_forward_hook(double_output)
    assert_equivalent(graph_module, copied(graph_module), X)


def double_output(module, args, output):
    return 2 * output


@pytest.mark.parametrize("copied", COPIES)
def test_a_model_around_it_is_copied_too(copied):
    model = nn.Sequential(fused(net(), NET_PAIRS), nn.ReLU())
    duplicate = copied(model)
    assert report(duplicate) == report(model)
    assert_equivalent(model, duplicate, X)


def test_shared_modules_stay_shared_in_a_copy():
    model = prepared(Pair())
    model.alias = model.conv
    duplicate = through_pickle(fused(model.requires_grad_()))
    assert duplicate.alias is duplicate.conv


IN_A_FRESH_PROCESS = """
import sys, torch
model, x, expected, keys, summary = torch.load(sys.argv[1], weights_only=False)
assert set(model.state_dict()) == keys, set(model.state_dict()) ^ keys
x.requires_grad_()
output = model(x)
output.sum().backward()
torch.testing.assert_close((output, x.grad), expected)
from convbn_fx import report
assert report(model).summary == summary
model.train()
before = model.stem.norm.num_batches_tracked.item()
model(x)
assert model.stem.norm.num_batches_tracked == before + 1
print("as before")
"""


@pytest.mark.parametrize("trace", [symbolic_trace, torch.fx.symbolic_trace], ids=["ours", "torch.fx"])
def test_a_fresh_process_loads_what_was_saved(tmp_path, trace):
    graph_module = fused(net(), NET_PAIRS, trace)
    x = X.clone().requires_grad_()
    output = graph_module(x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    keys = set(graph_module.state_dict())
    payload = (graph_module, X, (output.detach(), gradient), keys, report(graph_module).summary)
    torch.save(payload, tmp_path / "model.pt")
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_A_FRESH_PROCESS, str(tmp_path / "model.pt")],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(here), str(Path(convbn_fx.__file__).parent.parent)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "as before\n"


def test_the_report_survives_copies_within_a_larger_report():
    model = nn.ModuleDict({"backbone": fused(net(), NET_PAIRS)})
    names = {pair.convolution for pair in report(through_pickle(model)).fused}
    assert names == {"backbone.stem.conv", "backbone.block.first.conv", "backbone.block.second.conv"}


# --- The caller's model is left as found --------------------------------------------------------------------------


class Changing(Pair):
    """Its forward assigns to itself and changes what it holds, and may then raise."""

    def __init__(self, fail=False):
        super().__init__()
        self.fail = fail
        self.calls = 0
        self.seen = []
        self.cache = {}
        self.names = {"a"}
        self.nested = {"list": [1]}
        self.plain = torch.zeros(3)
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.cache["x"] = x
        self.names.add("b")
        self.plain.add_(1)
        self.last = x
        self.conv.note = "changed"
        self.conv.stride = (1, 1)
        self.extra = nn.ReLU()
        self.register_buffer("added", torch.ones(1))
        self.new_parameter = nn.Parameter(torch.ones(1))
        y = self.norm(self.conv(x))
        if self.fail:
            torch.rand(1)
            raise ValueError("half-way")
        return y


def everything(model):
    """Attributes, registrations, identities and values of all modules."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            content = list(value.items()) if isinstance(value, dict) else value
            content = sorted(value) if isinstance(value, set) else content
            content = list(content) if isinstance(content, list) else content
            found[name, key] = (id(value), content)
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            found[name, key, "value"] = (id(value), None if value is None else value.tolist())
    return found


def identical(first, second):
    assert first.keys() == second.keys()
    for key, (identity, content) in first.items():
        assert second[key][0] == identity, f"{key} is another object"
        if not isinstance(content, torch.Tensor):
            assert second[key][1] == content, f"{key} has changed"


@pytest.mark.parametrize("fail", [False, True])
def test_tracing_leaves_the_model_as_found(fail):
    model = prepared(Changing(fail))
    plain = model.plain.clone()
    before, random = everything(model), torch.get_rng_state()
    with pytest.raises(
        convbn_fx.TracingError, match="half-way" if fail else "writes to a tensor that is no buffer"
    ):
        symbolic_trace(model)
    identical(before, everything(model))
    assert torch.equal(model.plain, plain)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("inner", [False, True])
def test_a_sub_module_that_raises_half_way(inner):
    model = prepared(nn.Sequential(Pair(), nn.Sequential(Changing(True)) if inner else Changing(True)))
    before = everything(model)
    with pytest.raises(convbn_fx.TracingError, match=r"1\.0" if inner else "'1'"):
        symbolic_trace(model)
    identical(before, everything(model))


def test_containers_are_not_exchanged():
    """Somebody else may hold them."""
    shared_list, shared_dict = [], {}
    model = prepared(Pair())
    model.shared_list, model.conv.shared_dict = shared_list, shared_dict
    fused(model)
    assert model.shared_list is shared_list
    assert model.conv.shared_dict is shared_dict


def test_hook_handles_work_after_tracing():
    model = prepared(Pair())
    handle = model.conv.register_forward_hook(double_output)
    fused(model)
    handle.remove()
    assert not model.conv._forward_hooks


def test_the_pass_leaves_the_model_and_the_graph_as_found():
    model = net()
    traced = symbolic_trace(model)
    code, meta = traced.code, dict(traced.meta)
    before, before_traced = everything(model), everything(traced)
    transform(traced)
    identical(before, everything(model))
    identical(before_traced, everything(traced))
    assert traced.code == code
    assert traced.meta == meta
    assert_equivalent(model, traced, X)


def test_the_original_sees_what_the_result_has_learnt():
    model = net()
    graph_module = fused(model, NET_PAIRS)
    before = model(X)
    optimizer = torch.optim.SGD(graph_module.parameters(), 0.1)
    graph_module(X).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(X), before)
    assert_equivalent(model, graph_module, X)


def test_attributes_of_the_root_are_there():
    model = net()
    model.config = {"classes": 5}
    model.scale = 3
    graph_module = fused(model, NET_PAIRS)
    assert graph_module.config == {"classes": 5}
    assert graph_module.scale == 3
    assert graph_module.training == model.training
