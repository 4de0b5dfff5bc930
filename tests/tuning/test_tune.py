"""tune: the model stays itself, whatever is around it, done to it, or asked of it."""

import copy
import functools
import inspect
import os
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from blocks import (
    CROSSING,
    GRAPHS,
    WAYS,
    ByReference,
    Chain,
    ConvLast,
    NormFirst,
    traced_by_torch,
    transformed,
    untransformed,
)
from hooks import GLOBAL_HOOKS, HOOKS
from models import (
    ALL_NET_PAIRS,
    ConvNormAct,
    Functional,
    Net,
    Pair,
    conv_norm,
    data,
    modes,
    net,
    prepared,
    reasons,
    snapshot,
    through_pickle,
    through_torch_save,
    tuned_with,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import convbn_fx
from convbn_fx import report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)
#: Deprecated, and still used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
]


def runs_fused(model, tuned, *inputs):
    return saved_bytes(tuned, *(inputs or (X,))) < saved_bytes(model, *(inputs or (X,)))


def gradients(model, run, x=X):
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = run(x)
    output.sin().sum().backward()
    return [output.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def pair():
    torch.manual_seed(0)
    return prepared(Pair(nn.Conv2d(3, 4, 3, padding=1)))


# --- The result -------------------------------------------------------------------------------------------------


def test_a_network():
    model = net()
    tuned = tuned_with(model, ALL_NET_PAIRS)
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned)
    assert not reasons(tuned)


def test_the_names_in_the_report():
    fused = report(tune(net())).fused
    assert {(pair.convolution, pair.batch_norm) for pair in fused} == {
        ("stem.conv", "stem.norm"),
        ("block.first.conv", "block.first.norm"),
        ("block.second.conv", "block.second.norm"),
        ("unused.0", "unused.1"),
    }
    assert {(pair.convolution_kind, pair.batch_norm_kind) for pair in fused} == {
        ("Conv2d", "BatchNorm2d"),
        ("Linear", "BatchNorm1d"),
    }


@pytest.mark.parametrize(("name", "pairs"), [("", 4), ("stem", 1), ("block", 2), ("block.second", 1)])
def test_the_report_of_a_sub_module(name, pairs):
    part = tune(net()).get_submodule(name)
    assert len(report(part).fused) == pairs
    assert all(
        isinstance(part.get_submodule(p.convolution), nn.Conv2d | nn.Linear) for p in report(part).fused
    )


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity(), nn.ReLU(), nn.Sequential()],
    ids=lambda model: type(model).__name__,
)
def test_nothing_to_fuse(model):
    model = prepared(model)
    tuned = tuned_with(model, 0)
    assert_equivalent(model, tuned, data(2, 3, 3, 3))
    assert type(tuned) is type(model)
    assert str(report(tuned))


def test_a_batch_norm_in_train_mode_is_left():
    model = net()
    model.block.first.norm.train()
    tuned = tuned_with(model, ALL_NET_PAIRS - 1)
    assert reasons(tuned)["block.first.norm"] == "TRAINING_MODE"
    assert_equivalent(model, tuned, X)


def test_include_training():
    model = net().train()
    model.dropout.eval()
    tuned = tuned_with(model, ALL_NET_PAIRS, include_training=True)
    assert_equivalent(model, tuned, X)
    assert not runs_fused(model, tuned)
    for other in (model, tuned):
        other.eval()
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned)


def test_mixed_modes_flipped_after_tune():
    model = net()
    tuned = tuned_with(model, ALL_NET_PAIRS)
    for names in (["stem.norm"], ["block"], ["block.second", "dropout"], ["stem", "head"], [""]):
        for other in (model, tuned):
            for name in names:
                part = other.get_submodule(name)
                part.train(not part.training)
        assert_equivalent(model, tuned, X)


# --- modules= and norm_eval= --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["block", "unused"], {"stem.norm"}),
        (("stem", "block.second", "unused"), {"block.first.norm"}),
        (["block", "block.second"], {"stem.norm", "unused.1"}),
        ([], {"stem.norm", "block.first.norm", "block.second.norm", "unused.1"}),
        (["", "stem"], set()),
        (["head"], {"stem.norm", "block.first.norm", "block.second.norm", "unused.1"}),
    ],
)
def test_only_some_modules(names, left):
    model = net()
    tuned = tuned_with(model, ALL_NET_PAIRS - len(left), modules=names)
    assert {name for name, reason in reasons(tuned).items() if reason == "NOT_SELECTED"} == left
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned) == (len(left) < ALL_NET_PAIRS)


def test_a_name_that_begins_like_another_is_not_selected():
    model = prepared(nn.ModuleDict({"a": nn.Sequential(*conv_norm()), "ab": nn.Sequential(*conv_norm())}))
    tuned = tuned_with(model, 1, modules=["a"])
    assert reasons(tuned) == {"ab.1": "NOT_SELECTED"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((net(), ["stem", "bakbone"]), ValueError, "bakbone"),
        ((net(), ["conv.weight"]), ValueError, "conv.weight"),
        ((net(), "stem"), TypeError, "list"),
        ((torch.relu,), TypeError, "Module"),
        ((Net,), TypeError, "Module"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tune(*arguments)


def test_the_other_options_are_named():
    with pytest.raises(TypeError):
        tune(net(), None, True)


@pytest.mark.parametrize("copied", [nn.Module.eval, copy.deepcopy, through_pickle, tune])
def test_norm_eval(copied):
    model = net().train()
    tuned = copied(tuned_with(model, ALL_NET_PAIRS, norm_eval=True))
    assert len(report(tuned).fused) == ALL_NET_PAIRS
    for mode in (True, False, True):
        tuned.train(mode)
        norms = {name for name in modes(tuned) if name.endswith(("norm", "unused.1"))}
        assert modes(tuned) == {name: mode and name not in norms for name in modes(model)}
    assert all(modes(model).values())
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert_equivalent(model, tuned, X)


def test_norm_eval_of_a_part():
    tuned = tune(net().train(), modules=["block"], norm_eval=True).train()
    assert modes(tuned)["stem.norm"]
    assert not modes(tuned)["block.first.norm"]


# --- Pairs across borders, shared modules ------------------------------------------------------------------------


@pytest.fixture(params=CROSSING)
def crossing(request):
    torch.manual_seed(0)
    return prepared(CROSSING[request.param]())


def test_a_pair_across_borders(crossing):
    tuned = tuned_with(crossing, 1)
    assert_equivalent(crossing, tuned, X)
    assert runs_fused(crossing, tuned)


def test_a_method_called_directly(crossing):
    tuned = tune(crossing)
    features = tuned.forward_features(X)
    assert type(features) is torch.Tensor
    torch.testing.assert_close(features, crossing.forward_features(X))
    torch.testing.assert_close(tuned.forward_head(features), crossing(X))


def test_every_part_called_directly(crossing):
    tuned = tune(crossing)
    tuned(X)
    x = X
    for block, part in zip(crossing.blocks, tuned.blocks, strict=True):
        assert type(part(x)) is torch.Tensor
        assert_equivalent(block, part, x)
        x = block(x)


# A non-full backward hook looks for a tensor in what the block returns, and so without end in a stand-in.
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_a_block_that_a_pair_crosses(crossing, kind):
    tuned = tune(crossing)
    handles = [HOOKS[kind](m.blocks[0]) for m in (crossing, tuned)]
    assert_equivalent(crossing, tuned, X)
    for handle in handles:
        handle.remove()
    assert runs_fused(crossing, tuned)
    HOOKS[kind](crossing.blocks[0])
    assert_equivalent(crossing, tune(crossing), X)


def test_hooks_see_tensors_wherever_they_are(crossing):
    tuned = tune(crossing)
    seen = []
    handles = [
        module.register_forward_hook(lambda m, args, output: seen.extend([*args, output]))
        for module in tuned.modules()
    ]
    tuned(X)
    assert seen
    assert {type(tensor) for tensor in seen} == {torch.Tensor}
    for handle in handles:
        handle.remove()
    assert runs_fused(crossing, tuned)


def test_a_block_replaced_by_a_wrapper_with_a_hook(crossing):
    tuned = tune(crossing)
    tuned.blocks[0] = nn.Sequential(tuned.blocks[0])
    seen = []
    tuned.blocks[0].register_forward_hook(lambda m, args, output: seen.append(type(output)))
    torch.testing.assert_close(tuned(X), crossing(X))
    assert seen == [torch.Tensor]


def test_a_shared_block():
    block = ConvNormAct(3, 3)
    model = prepared(nn.Sequential(block, nn.Conv2d(3, 3, 1), block))
    tuned = tuned_with(model, 1)
    assert tuned[0] is tuned[2]
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned)


def test_a_convolution_shared_by_blocks():
    first, second = ConvNormAct(3, 3), ConvNormAct(3, 3)
    second.conv = first.conv
    model = prepared(nn.Sequential(first, second))
    tuned = tuned_with(model, 2)
    assert tuned[0].conv is tuned[1].conv
    assert_equivalent(model, tuned, X)
    tuned[0].norm.train()
    model[0].norm.train()
    assert_equivalent(model, tuned, X)


def test_a_batch_norm_shared_by_blocks():
    first, second = ConvNormAct(3, 3), ConvNormAct(3, 3)
    second.norm = first.norm
    model = prepared(nn.Sequential(first, second))
    tuned = tuned_with(model, 2)
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned)


def test_a_shared_convolution_without_a_batch_norm_elsewhere():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair(nn.Conv2d(3, 4, 3, padding=1))
            self.alone = nn.Sequential(self.pair.conv)

        def forward(self, x):
            return self.pair.norm(self.pair.conv(x)) + self.alone(x)

    model = prepared(Model())
    tuned = tune(model)
    seen = []
    handle = tuned.alone.register_forward_hook(lambda m, args, output: seen.append(output))
    tuned(X)
    assert [type(output) for output in seen] == [torch.Tensor]
    handle.remove()
    assert_equivalent(model, tuned, X)


def test_the_convolution_and_the_batch_norm_called_directly():
    model = pair()
    tuned = tune(model)
    tuned(X)
    y = tuned.conv(X)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, model.conv(X))
    torch.testing.assert_close(tuned.norm(y), model(X))
    assert_equivalent(model.conv, tuned.conv, X)
    assert_equivalent(model.norm, tuned.norm, y.detach())


def test_the_batch_norm_and_the_convolution_are_called_for_real():
    tuned = tune(pair())
    with pytest.raises(RuntimeError, match="channels"):
        tuned(data(2, 5, 6, 6))
    with pytest.raises(RuntimeError, match="channels"):
        tuned.conv(data(2, 5, 6, 6))
    assert type(tuned.conv(X)) is torch.Tensor  # what was open when it raised is closed


# --- Parameters and modules replaced ------------------------------------------------------------------------------


def test_an_optimizer_step_shows_in_both():
    model = net()
    tuned = tune(model)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    before = model(X).detach()
    tuned(X).sum().backward()
    optimizer.step()
    assert not torch.allclose(model(X), before)
    assert_equivalent(model, tuned, X)


def other(tensor):
    return nn.Parameter(data(*tensor.shape, seed=5))


REPLACEMENTS = {
    "weight": lambda m: setattr(m.conv, "weight", other(m.conv.weight)),
    "no bias": lambda m: setattr(m.conv, "bias", None),
    "gamma": lambda m: setattr(m.norm, "weight", other(m.norm.weight)),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "mean": lambda m: setattr(m.norm, "running_mean", other(m.norm.running_mean).detach()),
    "stride": lambda m: setattr(m.conv, "stride", (2, 2)),
    "frozen": lambda m: m.conv.requires_grad_(False),
    "conv": lambda m: setattr(m, "conv", nn.Conv2d(3, 4, 1).double()),
    "conv of another class": lambda m: setattr(m, "conv", nn.Sequential(m.conv, nn.ReLU())),
    "norm": lambda m: setattr(m, "norm", prepared(nn.BatchNorm2d(4))),
    "group norm": lambda m: setattr(m, "norm", nn.GroupNorm(2, 4).double()),
    "no norm": lambda m: setattr(m, "norm", nn.Identity()),
    "scripted norm": lambda m: setattr(m, "norm", torch.jit.script(prepared(nn.BatchNorm2d(4)))),
    "patched conv": lambda m: setattr(
        m.conv, "forward", MethodType(lambda self, x: type(self).forward(self, x).sin(), m.conv)
    ),
    "patched norm": lambda m: setattr(m.norm, "forward", lambda x: x * 2),
    "patched owner": lambda m: setattr(m, "forward", MethodType(lambda self, x: self.conv(x), m)),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
def test_replaced_after_tune(what):
    model = pair()
    tuned = tune(model)
    expected = copy.deepcopy(model)
    for m in (expected, tuned):
        torch.manual_seed(1)
        REPLACEMENTS[what](m)
    assert_equivalent(expected, tuned, X)


def test_the_head_replaced():
    model = net()
    tuned = tune(model)
    head = model.head
    tuned.head = nn.Linear(4, 5).double()
    assert model.head is head
    expected = copy.deepcopy(model)
    expected.head = tuned.head
    assert_equivalent(expected, tuned, X)


def test_a_pair_on_the_meta_device_and_back():
    model = net()
    tuned = copy.deepcopy(tune(model)).to("meta")
    assert tuned(X.to("meta")).shape == (2, 5)
    tuned.to_empty(device="cpu").load_state_dict(model.state_dict())
    tuned.temporary.fill_(1)
    assert_equivalent(model, tuned, X)


# --- Hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["conv", "norm", ""])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_after_tune(kind, place):
    model = pair()
    tuned = tuned_with(model, 1)
    handles = [HOOKS[kind](m.get_submodule(place)) for m in (model, tuned)]
    assert_equivalent(model, tuned, X)
    for handle in handles:
        handle.remove()
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned)


@pytest.mark.parametrize("place", ["conv", "norm", ""])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_before_tune(kind, place):
    model = pair()
    HOOKS[kind](model.get_submodule(place))
    tuned = tuned_with(model, 1)
    assert_equivalent(model, tuned, X)


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_global_hook(kind, when):
    model = pair()
    tuned = tune(model) if when == "after" else None
    handle = GLOBAL_HOOKS[kind]()
    try:
        tuned = tuned or tune(model)
        assert_equivalent(model, tuned, X)
    finally:
        handle.remove()
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned)


def test_hooks_of_the_two_are_their_own():
    model = net()
    tuned = tune(model)
    events = []
    tuned.stem.conv.register_forward_hook(lambda *_: events.append("tuned"))
    model.stem.norm.register_forward_hook(lambda *_: events.append("model"))
    tuned(X)
    assert events == ["tuned"]
    model(X)
    assert events == ["tuned", "model"]


class Recording(nn.Module):
    """Registers hooks on itself, in the ways that feature extractors do."""

    def __init__(self, how):
        super().__init__()
        self.body = Pair(nn.Conv2d(3, 4, 3, padding=1))
        self.features = {}
        if how == "method":
            self.handle = self.body.register_forward_hook(self.save)
        elif how == "partial":
            self.handle = self.body.register_forward_hook(functools.partial(self.save_as, "body"))
        elif how == "closure":
            self.handle = self.body.register_forward_hook(self.saver("body"))
        else:
            this = weakref.ref(self)
            self.handle = self.body.register_forward_hook(
                lambda m, args, output: this().save(m, args, output)
            )

    def save(self, module, args, output):
        self.features["body"] = output

    def save_as(self, name, module, args, output):
        self.features[name] = output

    def saver(self, name):
        def hook(module, args, output):
            self.features[name] = output

        return hook

    def forward(self, x):
        self.features.clear()
        self.body(x)
        return self.features.get("body")


HOW = ["method", "partial", "closure"]


@pytest.mark.parametrize("how", HOW)
def test_a_hook_that_a_model_puts_on_itself(how):
    model = prepared(Recording(how))
    tuned = tuned_with(model, 1)
    assert_equivalent(model, tuned, X)
    model.features.clear()
    assert type(tuned(X)) is torch.Tensor
    assert not model.features


@pytest.mark.parametrize("how", HOW)
def test_a_handle_that_a_model_keeps(how):
    model = prepared(Recording(how))
    tuned = tune(model)
    tuned.handle.remove()
    assert not tuned.body._forward_hooks
    assert len(model.body._forward_hooks) == 1


# --- The caller's model -------------------------------------------------------------------------------------------


class Raising(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.log = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.log.append(x)
        self.latest = self.pair(x)
        raise LookupError("as always")


@pytest.mark.parametrize(
    "model", [net(), pair(), prepared(Raising()), prepared(Chain(ConvLast(), NormFirst()))]
)
def test_the_callers_model_is_left_as_found(model):
    before = snapshot(model)
    for options in ({}, {"norm_eval": True}, {"include_training": True}, {"modules": []}):
        tune(model, **options)
        assert snapshot(model) == before


def test_a_forward_that_raises():
    model = prepared(Raising())
    tuned = tuned_with(model, 1)
    with pytest.raises(LookupError, match="as always"):
        assert_equivalent(model, tuned, X)
    assert not hasattr(tuned, "latest") or type(tuned.latest) is torch.Tensor


def momentum_through_data(m):
    for slow, fast in zip(m.slow.parameters(), m.fast.parameters(), strict=True):
        slow.data = slow.data * 0.5 + fast.data * 0.5


def momentum_in_place(m):
    with torch.no_grad():
        for slow, fast in zip(m.slow.parameters(), m.fast.parameters(), strict=True):
            slow.mul_(0.5).add_(fast, alpha=0.5)


def momentum_by_state_dict(m):
    state = m.fast.state_dict()
    m.slow.load_state_dict({key: value * 0.5 for key, value in state.items()})


def statistics_decay(m):
    for buffer in m.buffers():
        if buffer.is_floating_point():
            buffer.mul_(0.5)


def counted_in_a_list(m):
    m.counters[0].add_(1)


def counted_in_buffers(m):
    m._buffers["count"].add_(1)


def weights_decay_by_apply(m):
    with torch.no_grad():
        m.apply(lambda part: part.weight.mul_(0.5) if isinstance(part, nn.Conv2d) else None)


UPDATES = [
    momentum_through_data,
    momentum_in_place,
    momentum_by_state_dict,
    statistics_decay,
    counted_in_a_list,
    counted_in_buffers,
    weights_decay_by_apply,
]


class Momentum(nn.Module):
    """As MoCo: a second encoder follows the first, at every call."""

    def __init__(self, update):
        super().__init__()
        self.fast, self.slow = Pair(), Pair()
        self.slow.requires_grad_(False)
        self.counters = [torch.zeros(())]
        self.register_buffer("count", torch.zeros(()))
        self.update = update

    def forward(self, x):
        self.update(self)
        return self.fast(x), self.slow(x)


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_exploring_updates_no_tensor(update):
    model = prepared(Momentum(update))
    values = [t.clone() for t in (*model.parameters(), *model.buffers(), *model.counters)]
    storages = [p.data_ptr() for p in model.parameters()]
    tune(model)
    torch.testing.assert_close([*model.parameters(), *model.buffers(), *model.counters], values)
    assert [p.data_ptr() for p in model.parameters()] == storages


class Journal(nn.Module):
    """Keeps what it sees wherever one can."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.nested = {"seen": []}
        self.object = SimpleNamespace(seen=[], count=0)

    def forward(self, x):
        self.nested["seen"].append(x)
        self.object.seen.append(x)
        self.object.count += 1
        return self.pair(x)


def test_exploring_leaves_no_trace():
    model = prepared(Journal())
    tuned = tune(model)
    for m in (model, tuned):
        assert m.nested == {"seen": []}


def test_modes_are_independent():
    model = net()
    tuned = tune(model)
    tuned.train()
    assert not any(modes(model).values())
    tuned.eval()
    model.train()
    assert not any(modes(tuned).values())


CHANGES = {
    "attribute": lambda m: setattr(m.stem.conv, "padding", (0, 0)),
    "child": lambda m: m.add_module("extra", nn.ReLU()),
    "deleted child": lambda m: delattr(m, "unused"),
    "weight norm": lambda m: nn.utils.weight_norm(m.stem.conv),
    "parametrization": lambda m: parametrizations.weight_norm(m.stem.conv),
    "sync": nn.SyncBatchNorm.convert_sync_batchnorm,
    "assign": lambda m: m.load_state_dict(prepared(Net()).state_dict(), assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("changed", ["model", "tuned"])
def test_what_is_changed_on_one_does_not_break_the_other(change, changed):
    model = net()
    tuned = tune(model)
    expected, keys = model(X).detach(), list(model.state_dict())
    one, two = (model, tuned) if changed == "model" else (tuned, model)
    torch.manual_seed(5)
    CHANGES[change](one)
    assert list(two.state_dict()) == keys
    torch.testing.assert_close(two(X), expected)


@pytest.mark.parametrize("part", ["stem.conv", "head"])
def test_parametrizations_removed_from_one(part):
    model = net()
    for name in ("stem.conv", "head"):
        parametrizations.weight_norm(model.get_submodule(name))
    tuned = tune(model)
    expected = model(X).detach()
    parametrize.remove_parametrizations(tuned.get_submodule(part), "weight")
    torch.testing.assert_close(tuned(X), expected)
    torch.testing.assert_close(model(X), expected)


# --- state_dict, copies --------------------------------------------------------------------------------------------


def test_the_state_dict():
    model = net()
    tuned = tune(model)
    assert list(tuned.state_dict()) == list(model.state_dict())
    for kind in ("parameters", "buffers"):
        mine, theirs = (dict(getattr(m, f"named_{kind}")()) for m in (model, tuned))
        assert mine.keys() == theirs.keys()
        assert all(theirs[name] is tensor for name, tensor in mine.items())


def test_checkpoints_move_freely():
    model, another = net(), prepared(Net())
    tuned, copied = tune(model), copy.deepcopy(tune(another))
    for source, target in ((another, tuned), (copied, model), (tuned, another)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(1)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target(X), source(X))
    assert_equivalent(model, tuned, X)


@pytest.fixture(params=[copy.copy, copy.deepcopy, through_pickle, through_torch_save])
def copied(request):
    return request.param


@pytest.mark.parametrize("times", [1, 2])
def test_a_copy_is_still_fused(copied, times):
    model = net()
    duplicate = tune(model)
    for _ in range(times):
        duplicate = copied(duplicate)
    assert len(report(duplicate).fused) == ALL_NET_PAIRS
    assert isinstance(duplicate, Net)
    assert_equivalent(model, duplicate, X)
    assert runs_fused(model, duplicate)
    for m in (model, duplicate):
        m.train()
        m.dropout.eval()
    assert_equivalent(model, duplicate, X)


def test_a_copy_of_a_pair_across_borders(crossing, copied):
    duplicate = copied(tune(crossing))
    assert_equivalent(crossing, duplicate, X)
    assert runs_fused(crossing, duplicate)


def test_a_copy_of_a_part(crossing, copied):
    tuned = tune(crossing)
    assert_equivalent(crossing.blocks[0], copied(tuned.blocks[0]), X)


def test_a_deep_copy_is_on_its_own():
    model = net()
    tuned = tune(model)
    duplicate = copy.deepcopy(tuned)
    assert not {id(p) for p in duplicate.parameters()} & {id(p) for p in model.parameters()}
    before = tuned(X).detach()
    with torch.no_grad():
        for tensor in (*duplicate.parameters(), *duplicate.buffers()):
            tensor.add_(1)
    torch.testing.assert_close(tuned(X), before)


FRESH = """
import sys, torch, convbn_fx
model, tuned, x = torch.load(sys.argv[1], weights_only=False)
convbn_fx.testing.assert_equivalent(model, tuned, x)
assert len(convbn_fx.report(tuned).fused) == 4
assert convbn_fx.memory.saved_bytes(tuned, x) < convbn_fx.memory.saved_bytes(model, x)
"""


def test_loaded_in_a_fresh_process(tmp_path):
    model = net()
    torch.save((model, tune(model), X), tmp_path / "model.pt")
    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, "-W", "error", "-c", FRESH, str(tmp_path / "model.pt")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})


def test_tuned_again():
    model = net()
    tuned = tune(tune(model))
    assert report(tuned) == report(tune(model))
    assert type(tuned).__mro__[1:] == type(tune(model)).__mro__[1:]
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned)


def test_tuned_again_the_first_lives_on():
    model = net()
    first = tune(model)
    second = tune(first, modules=["stem"])
    assert len(report(first).fused) == ALL_NET_PAIRS
    assert len(report(second).fused) == 1
    assert saved_bytes(first, X) < saved_bytes(second, X) < saved_bytes(model, X)
    assert_equivalent(first, second, X)


def test_a_tuned_part_of_a_larger_model():
    model = net()
    larger = nn.Sequential(tune(model), nn.Linear(5, 2).double())
    assert len(report(larger).fused) == ALL_NET_PAIRS
    assert runs_fused(model, larger[0])
    assert len(report(tune(larger)).fused) == ALL_NET_PAIRS


# --- Compositions -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    model = net()
    compiled = torch.compile(tune(model), backend="eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 6, 6), (3, 3, 7, 5)):
        assert_equivalent(model, compiled, data(*shape))
    with torch.no_grad():
        assert_equivalent(model, compiled, X)
        model.stem.norm.weight.mul_(3)
    assert_equivalent(model, compiled, X)


@pytest.mark.usefixtures("_fresh_compiler")
def test_the_backend_fuses_what_was_tuned():
    tuned = tune(net())
    compiled = torch.compile(tuned, backend="convbn", fullgraph=True)
    assert_equivalent(net(), compiled, X)
    assert saved_bytes(compiled, X) < saved_bytes(net(), X)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_follows_modes():
    model = pair()
    tuned = tune(model)
    compiled = torch.compile(tuned, backend="eager")
    for mode in (False, True, False):
        model.train(mode)
        tuned.train(mode)
        assert_equivalent(model, compiled, X)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_pairs_across_borders(crossing):
    assert_equivalent(crossing, torch.compile(tune(crossing), backend="eager", fullgraph=True), X)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_blocks():
    model = net()
    tuned = tune(model)
    tuned.block.compile(backend="eager", fullgraph=True)
    assert_equivalent(model, tuned, X)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_export(crossing, strict):
    exported = torch.export.export(tune(crossing), (X,), strict=strict)
    assert set(exported.state_dict) == set(crossing.state_dict())
    torch.testing.assert_close(exported.module()(X), crossing(X))
    assert len(report(convbn_fx.transform(exported.module())).fused) == len(report(tune(crossing)).fused)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode):
    model = net()
    tuned = tune(model)

    def step(x):
        return torch.autograd.grad(tuned(x).sin().sum(), [x])

    x = X.clone().requires_grad_()
    captured = make_fx(step, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(captured(x)[0], torch.autograd.grad(model(x).sin().sum(), x)[0])


def test_jit_trace():
    model = net()
    traced = torch.jit.trace(tune(model), X)
    torch.testing.assert_close(traced(data(3, 3, 7, 7)), model(data(3, 3, 7, 7)))


def test_fake_tensors():
    tuned = tune(net())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert tuned(torch.empty(7, 3, 6, 6, dtype=torch.float64)).shape == (7, 5)
    assert saved_bytes(tuned, X, fake=True) == saved_bytes(tuned, X)


def test_functional_call():
    model = net()
    tuned = tune(model)
    tensors = {
        name: data(*value.shape, seed=4).abs() for name, value in model.state_dict().items() if value.ndim
    }
    expected = functional_call(model, tensors, (X,))
    torch.testing.assert_close(functional_call(tuned, tensors, (X,)), expected)
    assert not torch.allclose(tuned(X), expected)


def loss_of(model):
    return lambda parameters, x: functional_call(model, parameters, (x,)).sin().sum()


TRANSFORMS = {
    "grad": lambda m, p: grad(loss_of(m), argnums=(0, 1))(p, X),
    "per sample": lambda m, p: vmap(grad(loss_of(m)), in_dims=(None, 0))(p, X[:, None]),
    "vmap": lambda m, p: vmap(m)(torch.stack([X, X.sin()])),
    "jvp": lambda m, p: jvp(m, (X,), (X.cos(),)),
    "jvp of parameters": lambda m, p: jvp(
        lambda p: loss_of(m)(p, X), (p,), ({k: torch.ones_like(v) for k, v in p.items()},)
    ),
    "hessian": lambda m, p: hessian(lambda x: m(x[None]).sum())(X[0, :, :2, :2]),
    "grad of grad": lambda m, p: grad(lambda x: grad(lambda z: m(z).sin().sum())(x).sum())(X),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms(transform):
    model = net()
    tuned = tune(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if not name.startswith("unused")}
    torch.testing.assert_close(
        TRANSFORMS[transform](tuned, parameters), TRANSFORMS[transform](model, parameters)
    )


def test_an_ensemble():
    models = [pair() for _ in range(3)]
    parameters, buffers = stack_module_state([tune(model) for model in models])
    base = tune(models[0])
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (X,)))(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([model(X) for model in models]))


def test_double_backward():
    model = pair()
    tuned = tune(model)

    def penalty(m):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(m(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *m.parameters()], allow_unused=True)

    torch.testing.assert_close(penalty(tuned), penalty(model))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    model = net()
    tuned = tune(model)
    with context():
        torch.testing.assert_close(tuned(X), model(X))
        assert tuned(X).is_inference() == model(X).is_inference()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_around(use_reentrant):
    model = net()
    tuned = tune(model)
    expected = gradients(model, model)
    run = functools.partial(checkpoint, use_reentrant=use_reentrant)
    torch.testing.assert_close(gradients(tuned, functools.partial(run, tuned)), expected)
    for block in (tuned.stem, tuned.block.second):
        block.forward = functools.partial(run, functools.partial(type(block).forward, block))
    torch.testing.assert_close(gradients(tuned, tuned), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_segments_that_a_pair_crosses(use_reentrant):
    torch.manual_seed(0)
    model = prepared(nn.Sequential(ConvLast(), NormFirst(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    tuned = tuned_with(model, 2)
    expected = gradients(model, model)

    def run(x):
        return checkpoint_sequential(tuned, 4, x, use_reentrant=use_reentrant)

    torch.testing.assert_close(gradients(tuned, run), expected)


def test_checkpoint_wrappers_on_blocks_that_a_pair_crosses():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    model = prepared(Chain(ConvLast(), NormFirst()))
    expected = gradients(model, model)
    for position in (0, 1):
        tuned = tune(model)
        tuned.blocks[position] = checkpoint_wrapper(tuned.blocks[position])
        torch.testing.assert_close(gradients(tuned, tuned), expected)
        model.blocks[position] = checkpoint_wrapper(model.blocks[position])
        torch.testing.assert_close(gradients(model, tune(model)), expected)


def test_saved_tensors_hooks():
    model = net()
    tuned = tune(model)
    with torch.autograd.graph.save_on_cpu():
        assert_equivalent(model, tuned, X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = net(torch.float32)
    tuned = tune(model)
    with torch.autocast("cpu", dtype):
        assert tuned(X.float()).dtype == model(X.float()).dtype
        assert_equivalent(model, tuned, X.float(), rtol=5e-2)


def test_two_threads():
    model = net()
    tuned = tune(model)
    inputs = [data(2, 3, 6, 6, seed=seed) for seed in range(8)]
    expected = [model(x) for x in inputs]
    results = {}

    def work(first):
        for _ in range(5):
            for index in range(first, len(inputs), 2):
                results[index] = tuned(inputs[index])

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close([results[index] for index in range(len(inputs))], expected)


# --- The model stays itself ---------------------------------------------------------------------------------------


REGISTER = {}


class Registered(nn.Module):
    """Keeps a register of its subclasses, each with a keyword of its own."""

    def __init_subclass__(cls, *, alias, **kwargs):
        super().__init_subclass__(**kwargs)
        assert alias not in REGISTER
        REGISTER[alias] = cls


class Named(Registered, alias="named"):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv_norm()

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Convolves."""
        return self.norm(self.conv(x)) * scale


def test_a_class_that_registers_its_subclasses():
    model = prepared(Named())
    tuned = tuned_with(model, 1)
    assert REGISTER == {"named": Named}
    assert_equivalent(model, tuned, X)


class Rich(nn.Module):
    """Has a little of everything that classes have."""

    kind = "rich"
    __slots__ = ("slot",)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv_norm()
        self.default_cfg = {"first_conv": "conv", "classifier": ["head"]}
        self.grad_checkpointing = False
        self.slot = 3

    @property
    def channels(self):
        return self.conv.out_channels

    @classmethod
    def make(cls):
        return cls()

    @staticmethod
    def twice(x):
        return 2 * x

    def set_grad_checkpointing(self, enable=True):
        self.grad_checkpointing = enable

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Convolves."""
        return self.twice(self.norm(self.conv(x))) * scale + self.slot

    def extra_repr(self):
        return f"kind={self.kind}"


def test_class_and_attributes():
    model = prepared(Rich())
    tuned = tuned_with(model, 1)
    assert isinstance(tuned, Rich)
    assert isinstance(tuned.conv, nn.Conv2d)
    assert isinstance(tuned.norm, nn.BatchNorm2d)
    for m, t in zip(model.modules(), tuned.modules(), strict=True):
        assert (type(t).__name__, type(t).__module__, type(t).__doc__) == (
            type(m).__name__,
            type(m).__module__,
            type(m).__doc__,
        )
    assert repr(tuned) == repr(model)
    assert inspect.signature(tuned.forward) == inspect.signature(model.forward)
    assert tuned.forward.__doc__ == "Convolves."
    assert tuned.default_cfg == model.default_cfg
    assert (tuned.channels, tuned.kind, tuned.twice(2), tuned.slot) == (4, "rich", 4, 3)
    assert set(dir(model)) <= set(dir(tuned))
    assert_equivalent(model, tuned, X)
    tuned.set_grad_checkpointing()
    assert (tuned.grad_checkpointing, model.grad_checkpointing) == (True, False)
    assert isinstance(type(tuned).make(), Rich)
    assert_equivalent(model, tuned, X, 2.0)


@pytest.mark.parametrize("way", WAYS)
def test_references_lead_to_the_copies(way):
    model = prepared(ByReference(way))
    tuned = tune(model)
    assert_equivalent(model, tuned, X)
    tuned.drop.train()
    model.drop.train()
    assert_equivalent(model, tuned, X)
    model.drop.eval()
    assert not torch.equal(tuned(X), model(X))
    if way != "bound method":
        seen = []
        tuned.conv.register_forward_hook(lambda *_: seen.append(1))
        tuned(X)
        assert seen == [1]


@pytest.mark.parametrize("kind", ["method", "closure"])
def test_a_patched_forward(kind):
    model = prepared(Net())
    original = model.block.forward
    model.block.forward = {
        "method": MethodType(lambda self, x: type(self).forward(self, x) * 2, model.block),
        "closure": lambda x: original(x) * 2,
    }[kind]
    tuned = tune(model)
    assert_equivalent(model, tuned, X)
    tuned.block.first.norm.train()
    model.block.first.norm.train()
    assert_equivalent(model, tuned, X)
    model.block.first.norm.eval()
    assert not torch.allclose(tuned(X), model(X))


def test_the_report_of_a_patched_owner_is_true():
    model = pair()
    model.forward = MethodType(lambda self, x: self.norm(self.conv(x).sin()), model)
    tuned = tune(model)
    assert_equivalent(model, tuned, X)
    assert bool(report(tuned).fused) == runs_fused(model, tuned)


def test_feature_extraction_by_hooks():
    model = net()
    tuned = tune(model)
    features = {}
    for name in ("stem", "block.first", "block"):
        tuned.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: features.update({name: output})
        )
    tuned(X)
    assert {type(feature) for feature in features.values()} == {torch.Tensor}
    torch.testing.assert_close(features["stem"], model.stem(X))
    assert runs_fused(model, tuned)


# --- Other modules inside -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
def test_a_graph_module_inside(graph):
    torch.manual_seed(0)
    model = prepared(nn.Sequential(*conv_norm(3, 4), nn.ReLU()))
    model.append(graph())
    before = snapshot(model)
    tuned = tuned_with(model, 1 + GRAPHS[graph])
    assert isinstance(tuned[3], torch.fx.GraphModule)
    assert_equivalent(model, tuned, X)
    assert saved_bytes(tuned[3], data(2, 4, 6, 6)) <= saved_bytes(model[3], data(2, 4, 6, 6))
    assert_equivalent(model[3], tuned[3], data(2, 4, 6, 6))
    assert_equivalent(model, copy.deepcopy(tuned), X)
    assert_equivalent(model, tune(tuned), X)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "graph", [traced_by_torch, transformed, untransformed], ids=lambda graph: graph.__name__
)
def test_a_graph_module_inside_is_pickled(graph):
    torch.manual_seed(0)
    model = prepared(nn.Sequential(*conv_norm(3, 4), nn.ReLU()))
    model.append(graph())
    assert_equivalent(model, through_pickle(tune(model)), X)


def test_a_graph_module_that_ends_in_a_convolution():
    torch.manual_seed(0)
    first = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)))
    model = prepared(nn.Sequential(first, nn.BatchNorm2d(4)))
    assert_equivalent(model, tune(model), X)


def test_graph_modules_keep_modes_of_their_own():
    model = prepared(nn.Sequential(*conv_norm(3, 4), transformed(), untransformed()))
    tuned = tune(model)
    tuned.train()
    assert not any(modes(model).values())
    model.train()
    assert_equivalent(model, tuned, X)


WEIGHTS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", WEIGHTS)
def test_computed_weights(change, training, when):
    model = pair()
    torch.manual_seed(0)
    if when == "before":
        WEIGHTS[change](model.conv)
    tuned = tuned_with(model, 1)
    if when == "after":
        model = copy.deepcopy(model)
        for m in (model, tuned):
            torch.manual_seed(0)
            WEIGHTS[change](m.conv)
    for m in (model, tuned):
        m.double()
        m.conv.train(training)
    assert_equivalent(model, tuned, X)
    if "old" not in change:
        assert runs_fused(model, tuned)
        assert_equivalent(model, copy.deepcopy(tuned), X)
        for m in (model, tuned):
            parametrize.remove_parametrizations(m.conv, "weight")
        assert_equivalent(model, tuned, X)
        assert runs_fused(model, tuned)


def test_old_weight_norm_removed():
    model = pair()
    nn.utils.weight_norm(model.conv)
    tuned = tune(model)
    expected = model(X)
    nn.utils.remove_weight_norm(tuned.conv)
    torch.testing.assert_close(tuned(X), expected)
    assert runs_fused(model, tuned)
    torch.testing.assert_close(model(X), expected)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.LazyConv2d(4, 3, padding=1)
        self.norm = nn.LazyBatchNorm2d()

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("first", ["model", "tuned"])
def test_lazy_modules(first):
    model = Lazy().double().eval()
    tuned = tune(model)
    assert set(reasons(tuned).values()) == {"UNINITIALIZED"}
    for m in (model, tuned)[:: 1 if first == "model" else -1]:
        for _ in range(2):
            m(X)
    assert type(tuned.conv) is nn.Conv2d
    assert_equivalent(model, tuned, X)
    model = prepared(model)
    assert_equivalent(model, tuned_with(model, 1), X)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_pair_with_a_lazy_layer_before_it():
    torch.manual_seed(0)
    model = prepared(nn.Sequential(nn.LazyConv2d(3, 1), *conv_norm()))
    tuned = tuned_with(model, 1)
    model(X)
    tuned(X)
    assert_equivalent(model, tuned, X)


def test_no_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tune(net())(X)
    assert not caught


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_batch_norm_whose_parameters_are_computed_at_each_call_saves_as_little(name):
    def model():
        conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        parametrize.register_parametrization(norm, name, Exponential())
        return prepared(nn.Sequential(conv, norm))

    torch.manual_seed(0)
    original = model()
    tuned = tune(original)
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert_equivalent(original, tuned, image)
    assert saved_bytes(tuned, image) < 0.5 * saved_bytes(original, image)


# --- Modules in containers ----------------------------------------------------------------------------------------


class Layers(NamedTuple):
    conv: nn.Module
    norm: nn.Module


def in_a_namedtuple(model):
    model.layers = Layers(model.conv, model.norm)
    return lambda self, x: self.layers.norm(self.layers.conv(x))


def in_a_list_of_an_object(model):
    model.box = SimpleNamespace(layers=[model.conv, model.norm])
    return lambda self, x: self.box.layers[1](self.box.layers[0](x))


def in_a_list_that_a_function_closes_over(model):
    layers = [model.conv, model.norm]
    model.run = lambda x: layers[1](layers[0](x))
    return lambda self, x: self.run(x)


def with_defaults(model):
    layers = [lambda x, layer=layer: layer(x) for layer in (model.conv, model.norm)]
    model.layers = layers
    return lambda self, x: self.layers[1](self.layers[0](x))


class Registry(dict):
    """A container of a class of its own."""


def in_a_registry(model):
    model.registry = Registry(conv=model.conv, norm=model.norm)
    return lambda self, x: self.registry["norm"](self.registry["conv"](x))


HOLDERS = (
    in_a_namedtuple,
    in_a_list_of_an_object,
    in_a_list_that_a_function_closes_over,
    with_defaults,
    in_a_registry,
)


@pytest.mark.parametrize("held", HOLDERS)
def test_modules_are_found_wherever_an_attribute_holds_them(held):
    model = prepared(Pair())
    forward = held(model)
    model.__class__ = type("Holding", (Pair,), {"forward": forward})
    tuned = tuned_with(model, 1)
    x = data(2, 3, 6, 6)
    assert saved_bytes(tuned, x) < saved_bytes(model, x)
    for training in (False, True, False):
        assert_equivalent(model.train(training), tuned.train(training), x)


def test_a_forward_that_is_replaced_on_its_class():
    class Own(Pair):
        def forward(self, x):
            return self.norm(self.conv(x))

    model = prepared(Own())
    tuned = tuned_with(model, 1)
    Own.forward = lambda self, x: 2 * self.norm(self.conv(x)).sin()
    for each in (tuned, tune(model)):
        assert_equivalent(model, each, X)
        assert runs_fused(model, each)


def test_replicas_run_as_they_are():
    tuned = tune(prepared(Pair()).float())
    replica = tuned._replicate_for_data_parallel()
    replica.conv, replica.norm = (child._replicate_for_data_parallel() for child in (tuned.conv, tuned.norm))
    for child, original in ((replica.conv, tuned.conv), (replica.norm, tuned.norm)):
        for name, tensor in (original._parameters | original._buffers).items():
            setattr(child, name, tensor.to("meta"))  # another device
    assert replica(torch.empty(2, 3, 6, 6, device="meta")).is_meta


def test_a_block_is_compiled_by_itself_where_functions_are_pairs():
    class Own(Functional):
        def __init__(self):
            super().__init__(None, (4, 3, 3, 3), 4)
            self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())

        def forward(self, x):
            return self.block(self.normalize(torch.nn.functional.conv2d(x, self.weight, self.bias)))

    torch.manual_seed(0)
    model = Own().double()
    tuned = tuned_with(model, 1)
    torch._dynamo.reset()
    tuned.block.compile(backend="eager", fullgraph=True)
    assert_equivalent(model, tuned, X)
