"""deploy: who else uses a convolution or a batch norm is judged by identity, over every way to reach them."""

import enum
import functools
import weakref
from types import MethodType

import pytest
import torch
from deployed import assert_same, norms_in
from models import ConvNormAct, Pair, conv_norm, data, prepared, reasons
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from convbn_fx import deploy, report, symbolic_trace, transform, tune
from convbn_fx.deploying import baking

X = data(2, 3, 6, 6)


class Both(nn.Module):
    """Two parts beside each other."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x) + self.second(x)


class Alone(nn.Module):
    """Calls something by itself, wherever it has it from."""

    def __init__(self, get):
        super().__init__()
        self.get = get

    @property
    def part(self):
        return self.held[0]

    def forward(self, x):
        return self.get(self)(x)


class ByGradMode(nn.Module):
    """A batch norm after one convolution where gradients are recorded, and after another where they are not."""

    def __init__(self, asks):
        super().__init__()
        self.asks = asks
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if torch.is_grad_enabled() if self.asks == "grad" else torch.is_inference_mode_enabled():
            return self.norm(self.conv(x))
        return self.norm(self.other(x))


class BlockByGradMode(nn.Module):
    """Calls a block that ends in the convolution, and its batch norm where gradients are recorded alone."""

    def __init__(self):
        super().__init__()
        self.block, self.norm = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)

    def forward(self, x):
        if torch.is_grad_enabled():
            return self.norm(self.block(x))
        return self.block(x)


def test_a_block_that_ends_in_the_convolution_is_called_alone_elsewhere():
    model = prepared(BlockByGradMode())
    deployed = deploy(model)
    torch.testing.assert_close(deployed(X), model(X), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(deployed(X), model(X), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("asks", ["grad", "inference"])
def test_what_is_around_a_call_decides(asks):
    model = prepared(ByGradMode(asks))
    deployed = deploy(model)
    for around in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with around():
            torch.testing.assert_close(deployed(X), model(X), rtol=1e-9, atol=1e-9)


class Holder:
    """An object that is no module."""


def helper_with(conv):
    helper = Holder()
    helper.conv = conv
    return helper


#: What a module holds that reaches a convolution, and how it gets at the convolution.
WAYS = {
    "registered": (lambda conv: conv, lambda self: self.held),
    "list": (lambda conv: [conv], lambda self: self.held[0]),
    "tuple": (lambda conv: (1, (conv,)), lambda self: self.held[1][0]),
    "dictionary": (lambda conv: {"conv": conv}, lambda self: self.held["conv"]),
    "set": (lambda conv: {conv}, lambda self: next(iter(self.held))),
    "helper": (helper_with, lambda self: self.held.conv),
    "closure": (lambda conv: lambda: conv, lambda self: self.held()),
    "default": (lambda conv: lambda conv=conv: conv, lambda self: self.held()),
    "bound method": (lambda conv: conv.forward, lambda self: self.held),
    "partial": (functools.partial, lambda self: self.held),
    "weak reference": (weakref.ref, lambda self: self.held()),
    "property": (lambda conv: [conv], lambda self: self.part),
    "attribute": (lambda conv: conv, lambda self: self.held),
    "pre-forward hook": (lambda conv: lambda module, args: (conv(args[0]),), lambda self: torch.sin),
}


def held_by(way, conv, cls=Alone):
    """A module that reaches a convolution, and in which way it does."""
    hold, get = WAYS[way]
    alone = cls(get)
    if way == "pre-forward hook":
        alone.register_forward_pre_hook(hold(conv))
    elif way == "registered":
        alone.held = conv
    else:
        vars(alone)["held"] = hold(conv)
    return alone


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["conv", "norm"])
def test_another_module_reaches_it(way, which):
    """What runs as one elsewhere is used by itself here."""
    torch.manual_seed(0)
    pair = Pair(*conv_norm(3, 3))
    model = prepared(Both(pair, held_by(way, getattr(pair, which))))
    deployed = deploy(model)
    assert_same(model, deployed, X)
    assert norms_in(deployed)
    skip = next(skip for skip in report(deployed).skipped if skip.batch_norm == "first.norm")
    assert skip.reason.name in ("MAY_BE_USED_ELSEWHERE", "CONVOLUTION_OUTPUT_USED_ELSEWHERE")
    assert skip.detail


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"bound method", "partial", "pre-forward hook"}))
def test_the_block_around_it_is_reached(way):
    """By a part that reaches into the block."""

    class Reaching(Alone):
        def forward(self, x):
            return self.get(self).conv(x)

    torch.manual_seed(0)
    pair = Pair(*conv_norm(3, 3))
    model = prepared(Both(pair, held_by(way, pair, Reaching)))
    assert_same(model, deploy(model), X)


def test_levels_that_share_a_convolution_have_batch_norms_of_their_own():
    """As RTMDet's head: the levels are blocks, and each of them is a pair."""
    levels = [nn.Sequential(*conv_norm(3, 3), nn.ReLU()) for _ in range(3)]
    for level in levels[1:]:
        level[0] = levels[0][0]
    model = prepared(Both(Both(levels[0], levels[1]), levels[2]))
    deployed = deploy(model)
    assert len(report(deployed).fused) == 3
    assert_same(model, deployed, X)


def test_only_some_levels_that_share_a_convolution_normalise():
    levels = [nn.Sequential(*conv_norm(3, 3), nn.ReLU()) for _ in range(3)]
    for level in levels[1:]:
        level[0] = levels[0][0]
    levels[2][1] = nn.Identity()
    model = prepared(Both(Both(levels[0], levels[1]), levels[2]))
    assert_same(model, deploy(model), X)


@pytest.mark.parametrize("ends", ["with the convolution", "with the batch norm"])
def test_a_shared_block_at_whose_border_a_pair_is(ends):
    """One branch normalises what the block returns (or convolves what it is given), the other does not."""
    torch.manual_seed(0)
    if ends == "with the convolution":
        block = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1))
        first = nn.Sequential(block, nn.BatchNorm2d(3))
    else:
        block = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
        first = nn.Sequential(nn.Conv2d(3, 3, 1), block)
    model = prepared(Both(first, nn.Sequential(nn.Tanh(), block, nn.Tanh())))
    deployed = deploy(model)
    assert not report(deployed).fused
    assert_same(model, deployed, X)
    both = prepared(Both(first, nn.Sequential(nn.Tanh(), first)))
    assert len(report(deploy(both)).fused) == 1
    assert_same(both, deploy(both), X)


class TiedAutoencoder(nn.Module):
    def __init__(self, decode):
        super().__init__()
        self.encoder = nn.Sequential(*conv_norm(3, 3), nn.ReLU())
        self.decoder = decode(self.encoder[0])

    def forward(self, x):
        return self.decoder(self.encoder(x))


class ByList(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.held = [conv]

    def forward(self, x):
        return F.conv_transpose2d(x, self.held[0].weight, padding=1)


class ByWeight(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.held = [conv.weight]

    def forward(self, x):
        return F.conv_transpose2d(x, self.held[0], padding=1)


class ByParameter(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.weight = conv.weight

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, padding=1)


@pytest.mark.parametrize("decode", [ByList, ByWeight, ByParameter])
def test_a_tied_weight(decode):
    torch.manual_seed(0)
    model = prepared(TiedAutoencoder(decode))
    assert_same(model, deploy(model), X)


def test_a_weight_tied_to_that_of_another_convolution():
    torch.manual_seed(0)
    model = prepared(Both(nn.Sequential(*conv_norm(3, 3)), nn.Sequential(*conv_norm(3, 3))))
    model.second[0].weight = model.first[0].weight
    deployed = deploy(model)
    assert len(report(deployed).fused) == 2
    assert_same(model, deployed, X)


def test_a_hook_that_looks_into_its_module():
    torch.manual_seed(0)
    model = prepared(nn.Sequential(Pair(*conv_norm(3, 3))))
    model[0].register_forward_pre_hook(lambda module, args: (module.conv(args[0]),))
    deployed = deploy(model)
    assert reasons(deployed) == {"0.norm": "MAY_BE_USED_ELSEWHERE"}
    assert_same(model, deployed, X)


def test_a_hook_between_the_two_sees_what_it_saw():
    torch.manual_seed(0)
    model = prepared(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.sum().item()))
    assert_same(model, deploy(model), X)
    assert seen[0] == pytest.approx(seen[1])


def test_a_weak_proxy_of_what_is_gone():
    model = prepared(Pair(*conv_norm(3, 3)))
    gone = Holder()
    vars(model)["parents"] = [weakref.proxy(gone), weakref.ref(gone)]
    del gone
    deployed = deploy(model)
    assert len(report(deployed).fused) == 1
    assert_same(model, deployed, X)


def test_the_selection_leaves_a_pair_that_shares_a_convolution():
    torch.manual_seed(0)
    first, second = ConvNormAct(3, 3), ConvNormAct(3, 3)
    second.conv = first.conv
    model = prepared(Both(first, second))
    deployed = deploy(model, modules=["second"])
    assert not report(deployed).fused
    assert_same(model, deployed, X)


def test_what_is_not_baked_is_fused_at_every_call():
    torch.manual_seed(0)
    pair = Pair(*conv_norm(3, 3))
    model = prepared(Both(pair, held_by("list", pair.conv)))
    deployed = deploy(model)
    assert type(deployed.first.conv) is type(tune(model).first.conv)
    deployed.first.norm.running_mean.add_(1)  # read at every call
    model.first.norm.running_mean.copy_(deployed.first.norm.running_mean)
    assert_same(model, deployed, X)


# --- Forwards that look at what is exchanged ----------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.layers = nn.ModuleList([*conv_norm(3, 3), nn.ReLU()])
        self.layers[0].mark = 2.0
        self.run = run

    def forward(self, x):
        return self.run(self.layers, x)


def relu_after_batch_norms(layers, x):
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.BatchNorm2d):
            x = x.relu() + 1
    return x


def names_of_classes(layers, x):
    for layer in layers:
        x = layer(x)
        if "Norm" in type(layer).__name__:
            x = x.sin()
    return x


def with_affine_parameters(layers, x):
    for layer in layers:
        x = layer(x)
        if getattr(layer, "weight", None) is None:
            x = x.sin()
    return x


def with_number_of_features(layers, x):
    for layer in layers:
        x = layer(x)
    return x * layers[1].num_features * layers[1].eps * layers[0].mark * layers[0].out_channels


@pytest.mark.parametrize("run", [relu_after_batch_norms, names_of_classes, with_affine_parameters])
def test_a_forward_that_asks_what_its_modules_are(run):
    model = prepared(Layers(run))
    deployed = deploy(model)
    assert_same(model, deployed, X)
    (skip,) = report(deployed).skipped
    assert skip.reason.name in ("MAY_BE_USED_ELSEWHERE", "CONVOLUTION_OUTPUT_USED_ELSEWHERE")


def test_attributes_of_what_is_exchanged_are_kept():
    model = prepared(Layers(with_number_of_features))
    deployed = deploy(model)
    assert len(report(deployed).fused) == 1
    assert_same(model, deployed, X)
    assert (deployed.layers[1].num_features, deployed.layers[0].mark) == (3, 2.0)


class WithUnusedActivation(nn.BatchNorm2d):
    """A child that its forward, the base's, does not call."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.Tanh()


def test_a_child_that_the_batch_norm_does_not_call():
    model = prepared(Pair(nn.Conv2d(3, 4, 3), WithUnusedActivation(4)))
    deployed = deploy(model)
    assert len(report(deployed).fused) == 1
    assert_same(model, deployed, X)


# --- Forwards that were not followed ------------------------------------------------------------------------------


def test_a_shape_that_is_unpacked_before_another_use():
    class Unpacking(Pair):
        def forward(self, x):
            y = self.norm(self.conv(x))
            b, c, h, w = y.size()
            return y.view(b, c, h * w) * self.conv(x.sin()).view(b, c, h * w)

    torch.manual_seed(0)
    model = prepared(Unpacking())
    assert_same(model, deploy(model), X)


class Mode(enum.Enum):
    FULL = 1
    RAW = 2


#: Forwards that ask what no tensor stands for, and the keyword argument that makes them use one of the two alone.
QUESTIONS = {
    "an enum": (
        lambda self, x, mode=Mode.FULL: self.conv(x) if mode is Mode.RAW else self.norm(self.conv(x)),
        Mode.RAW,
    ),
    "a class": (
        lambda self, x, mode=None: self.norm(x) if isinstance(mode, str) else self.norm(self.conv(x)),
        "raw",
    ),
    "a class of numbers": (
        lambda self, x, mode=0.5: self.conv(x) * mode if type(mode) is int else self.norm(self.conv(x)),
        2,
    ),
    "keywords": (lambda self, x, **kwargs: self.conv(x) if "mode" in kwargs else self.norm(self.conv(x)), 1),
    "a keyword": (
        lambda self, x, **kwargs: self.conv(x) if kwargs.get("mode") else self.norm(self.conv(x)),
        1,
    ),
    "a dtype": (
        lambda self, x, mode=0: self.norm(self.conv(x)) + (0 if x.dtype is torch.float32 else self.norm(x)),
        1,
    ),
}


def raw_output(self, x, mode=None):
    y = self.conv(x)
    if isinstance(mode, str):
        return y
    return self.norm(y)


@pytest.mark.parametrize("question", [*QUESTIONS, "the output"])
def test_a_question_that_decides_on_another_use(question):
    class Asking(Pair):
        forward, argument = QUESTIONS.get(question, (raw_output, "raw"))

    torch.manual_seed(0)
    model = prepared(Asking(*conv_norm(3, 3)))
    deployed = deploy(model)
    assert not report(deployed).fused
    assert_same(model, deployed, X)
    torch.testing.assert_close(deployed(X, mode=Asking.argument), model(X, mode=Asking.argument))


def test_a_question_that_decides_on_what_an_attribute_leads_to():
    class Asking(Pair):
        def forward(self, x, mode=None):
            y = self.norm(self.conv(x))
            return y * self.alone[0](x) if isinstance(mode, str) else y

    torch.manual_seed(0)
    model = prepared(Asking())
    vars(model)["alone"] = [functools.partial(model.conv)]
    deployed = deploy(model)
    assert_same(model, deployed, X)
    torch.testing.assert_close(deployed(X, mode="raw"), model(X, mode="raw"))


def on_the_other_way(self, x, mode=None):
    block = self.block
    y = block(x)
    return y * block.conv(x) if isinstance(mode, str) else y


def in_a_loop(self, x, mode=None):
    for _, layer in enumerate(self.layers):
        x = layer[0](x) if isinstance(mode, str) else layer(x)
    return x


def after_a_list(self, x, mode=None):
    blocks = [self.block]
    y = self.block(x)
    return y + blocks[0].conv(x) if isinstance(mode, str) else y


def in_a_loop_over_none(self, x, mode=None):
    x = self.layers[0](x)
    for layer in self.layers[0][: int(x.shape[0]) - 1]:
        x = layer(x)
    return x


def in_a_longer_loop(self, x, mode=None):
    for i, layer in enumerate([self.layers[0]] * int(x.shape[0])):
        x = layer(x) if i < 1 else layer[0](x)
    return x


@pytest.mark.parametrize(
    "forward",
    [on_the_other_way, in_a_loop, after_a_list, in_a_loop_over_none, in_a_longer_loop],
    ids=lambda forward: forward.__name__,
)
def test_what_a_variable_leads_to(forward):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Pair(*conv_norm(3, 3))
            self.layers = nn.ModuleList([nn.Sequential(*conv_norm(3, 3))])

    torch.manual_seed(0)
    Asking.forward = forward
    model = prepared(Asking())
    deployed = deploy(model)
    assert_same(model, deployed, X)
    torch.testing.assert_close(deployed(X, mode="raw"), model(X, mode="raw"))


def test_a_question_that_decides_on_something_else():
    class Asking(Pair):
        def forward(self, x, mode=None):
            x = self.norm(self.conv(x))
            if isinstance(mode, str):
                x = x.relu()
            return x if mode is Mode.RAW else x.sin()

    torch.manual_seed(0)
    model = prepared(Asking())
    assert len(report(deploy(model)).fused) == 1
    assert_same(model, deploy(model), X)


class WithMethods(Pair):
    def embed(self, x):
        return self.conv(x).sin()

    def normalised(self, x):
        return self.norm(x)

    def both(self, x):
        return self.norm(self.conv(x)).sin()


@pytest.mark.parametrize("kept", ["embed", "normalised", "both"])
def test_another_public_method(kept):
    removed = {name: None for name in ("embed", "normalised", "both") if name != kept}
    cls = type("WithOneMethod", (WithMethods,), removed)
    torch.manual_seed(0)
    model = prepared(cls(*conv_norm(3, 3)))
    deployed = deploy(model)
    assert len(report(deployed).fused) == (kept == "both")
    assert_same(model, deployed, X)
    torch.testing.assert_close(getattr(deployed, kept)(X), getattr(model, kept)(X))


def through_a_child(self, x):
    return self.child.conv(x).sin()


def through_a_property(self, x):
    return self.inner(x).sin()


def through_a_part_of_the_forward(self, x):
    return self.convolved(x).sin()


@pytest.mark.parametrize("method", [through_a_child, through_a_property, through_a_part_of_the_forward])
@pytest.mark.parametrize("decorated", [False, True])
def test_another_method_that_leads_to_the_convolution(method, decorated):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Pair(*conv_norm(3, 3))

        @property
        def inner(self):
            return self.child.conv

        def convolved(self, x):
            return self.child.conv(x)

        def forward(self, x):
            return self.child.norm(self.convolved(x))

        embed = torch.no_grad()(method) if decorated else method

    torch.manual_seed(0)
    model = prepared(Around())
    deployed = deploy(model)
    assert_same(model, deployed, X)
    torch.testing.assert_close(deployed.embed(X), model.embed(X))
    del Around.embed
    deployed = deploy(model)
    assert len(report(deployed).fused) == 1
    assert not torch.equal(deployed.convolved(X), model.convolved(X))  # a part of the forward


@pytest.mark.parametrize("is_bound", [False, True])
def test_a_function_that_an_instance_has_as_if_it_were_a_method(is_bound):
    torch.manual_seed(0)
    model = prepared(Pair(*conv_norm(3, 3)))
    model.embed = (
        MethodType(lambda self, x: self.conv(x), model) if is_bound else lambda x: model.conv(x).sin()
    )
    deployed = deploy(model)
    assert reasons(deployed) == {"norm": "MAY_BE_USED_ELSEWHERE"}
    torch.testing.assert_close(deployed.embed(X), model.embed(X))
    assert_same(model, deployed, X)


def test_the_method_for_when_the_batch_norm_is_gone():
    """What takes the forward's place once it was fused, by the convention of many libraries: it is, now."""

    class Fusable(Pair):
        def forward_fuse(self, x):
            return self.conv(x)

    torch.manual_seed(0)
    model = prepared(Fusable())
    deployed = deploy(model)
    assert len(report(deployed).fused) == 1
    torch.testing.assert_close(deployed.forward_fuse(X), model(X))


def test_the_shape_of_an_output_that_several_batch_norms_follow():
    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y) * y.shape[1]
        y = self.conv(x.sin())
        return z + self.norm2(y) * y.shape[2]

    torch.manual_seed(0)
    model = Pair(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), forward)
    model.norm2 = nn.BatchNorm2d(5)
    prepared(model)
    assert_same(model, deploy(model), X)


# --- Numbers that an exploration guesses --------------------------------------------------------------------------


class Repeated(nn.Module):
    """Calls as many of its layers as the batch is large, or the first of them as often."""

    def __init__(self, run):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm = nn.BatchNorm2d(3)
        self.run = run

    def forward(self, x):
        return self.norm(self.run(self.convs, x))


def one_after_another(convs, x):
    for i in range(int(x.shape[0])):
        x = convs[i](x)
    return x


def one_again_and_again(convs, x):
    for _ in range(x.shape[0]):
        x = convs[0](x)
    return x


def as_often_as_a_tensor_says(convs, x):
    for _ in range(int((x < 1e30).sum().clamp(max=2))):
        x = convs[0](x)
    return x


def up_to_an_index(convs, x):
    for conv in convs[: int(x.shape[0])]:
        x = conv(x)
    return x


def perhaps_none(convs, x):
    for conv in convs[: int(x.shape[0]) - 2]:
        x = conv(x)
    return convs[2](x) if x.mean() > 100 else x


LOOPS = [one_after_another, one_again_and_again, as_often_as_a_tensor_says, up_to_an_index, perhaps_none]


@pytest.mark.parametrize("run", LOOPS, ids=lambda run: run.__name__)
def test_how_often_a_loop_runs_is_guessed(run):
    torch.manual_seed(0)
    model = prepared(Repeated(run))
    deployed = deploy(model)
    assert not report(deployed).fused
    assert_same(model, deployed, X)


class Chosen(nn.Module):
    """Has a block that is a pair, and a way to one of the two alone."""

    def __init__(self, choose):
        super().__init__()
        self.block = Pair(*conv_norm(3, 3))
        self.steps = nn.ModuleList([self.block, nn.ReLU(), self.block.conv])
        self.choose = choose

    def forward(self, x):
        return self.choose(self, x)


def by_an_index(self, x):
    return self.steps[2 * int(x.shape[0]) - 2](x)


def by_a_name(self, x):
    return [self.block, self.block.conv][x.shape[0] - 1](x)


def by_their_number(self, x):
    for step in list(self.children())[1][: 2 * int(x.shape[0]) - 1]:
        x = step(x)
    return x


@pytest.mark.parametrize("choose", [by_an_index, by_a_name, by_their_number], ids=lambda f: f.__name__)
def test_a_guessed_number_chooses_what_is_called(choose):
    torch.manual_seed(0)
    model = prepared(Chosen(choose))
    deployed = deploy(model)
    assert_same(model, deployed, X)


def test_a_block_that_is_called_as_often_as_was_guessed_is_a_pair_each_time():
    def forward(self, x):
        for _ in range(int(x.shape[0])):
            x = self.block(x)
        return x

    torch.manual_seed(0)
    model = prepared(type("Again", (Chosen,), {"forward": forward})(None))
    del model.steps
    deployed = deploy(model)
    assert len(report(deployed).fused) == 1
    assert_same(model, deployed, X)


# --- Example inputs -----------------------------------------------------------------------------------------------


class Outputs(Pair):
    def forward(self, x, scale=1.0):
        return {"features": [self.norm(self.conv(x)) * scale, x]}


@pytest.mark.parametrize(
    "inputs", [X, (X,), (X, 2.0), {"x": X, "scale": 3.0}], ids=["tensor", "1", "2", "keywords"]
)
def test_example_inputs(inputs):
    torch.manual_seed(0)
    model = prepared(Outputs())
    model.drop = nn.Dropout()
    model.drop.train()
    before = torch.get_rng_state()
    deployed = deploy(model, example_inputs=inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.drop.training
    assert deployed.drop.training
    assert_same(model, deployed, X)


def test_example_inputs_that_tell_a_wrong_model(monkeypatch):
    monkeypatch.setattr(baking, "fold", lambda conv, norm: (conv.weight * 2, norm.running_mean))
    torch.manual_seed(0)
    model = prepared(Outputs())
    with pytest.raises(ValueError, match=r"output\['features'\]\[0\] is off by .* tune\(model\)"):
        deploy(model, example_inputs=(X,))
    deploy(model)


def test_example_inputs_of_another_type():
    with pytest.raises(TypeError, match=r"list.*\(x,\)"):
        deploy(prepared(Pair()), example_inputs=[X])


# --- Around the model ---------------------------------------------------------------------------------------------


def test_deployed_in_inference_mode_and_used_afterwards():
    torch.manual_seed(0)
    model = prepared(nn.Sequential(*conv_norm(3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)))
    with torch.inference_mode():
        deployed = deploy(model)
    deployed(X).sum().backward()
    assert all(parameter.grad is not None for parameter in deployed.parameters())
    deployed.load_state_dict(deployed.state_dict())
    assert_same(model, deployed, X)
    assert deployed.to(torch.float32)(X.float()).dtype is torch.float32


def test_a_model_inside_distributed_data_parallel():
    model = prepared(Pair())
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(TypeError, match=r"deploy\(model.module\)"):
        deploy(wrapped)


# --- Graphs -------------------------------------------------------------------------------------------------------


def test_a_block_that_a_graph_calls_keeps_its_convolution():
    """The graph names the convolution of a block, which it calls as a whole as well."""

    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh())
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.block[0](x)) + self.block(x)

    torch.manual_seed(0)
    model = prepared(Reusing())
    deployed = deploy(transform(symbolic_trace(model)))
    assert len(report(deployed).fused) == 1
    assert_same(model, deployed, X)


# --- What is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["model", "graph"])
def test_the_report_says_that_a_pair_is_baked(source):
    model = prepared(Pair())
    deployed = deploy(model if source == "model" else transform(symbolic_trace(model)))
    (pair,) = report(deployed).fused
    assert pair.is_baked
    assert "baked" in str(report(deployed))
    assert "read at every call" not in str(report(deployed))


def test_no_batch_norm_is_left_where_nothing_is_shared():
    model = prepared(nn.Sequential(ConvNormAct(3, 4), ConvNormAct(4, 4)))
    assert not any(isinstance(module, _BatchNorm) for module in deploy(model).modules())
