"""Pairs across the borders of blocks, shared modules, and hooks on them: which module plays which part in a pair."""

import functools
import weakref

import pytest
import torch
from hooks import GLOBAL_HOOKS, HOOKS
from models import ConvNormAct, Pair, data, net, pair, prepared, runs_fused, tuned_with
from torch import nn

from convbn_fx import tune
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
]


# --- Pairs across borders, shared modules -------------------------------------------------------------------------


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
