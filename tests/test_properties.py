"""What must hold for every model: random architectures, judged by the untouched model and by predictions from the spec.

Each property is checked on graphs of both tracers. What torch.fx's makes is compared with itself, untransformed: it
leaves out the modules, parameters and buffers that the graph does not read.
"""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from mutants import gradients
from strategies import (
    NORM_RANKS,
    SMALLEST_TRAINING_EPS,
    Activation,
    Again,
    Architecture,
    Combine,
    Conv,
    Geometry,
    Norm,
    architectures,
)
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import convbn_fx
from convbn_fx import SkipReason, functional
from convbn_fx.testing import assert_equivalent, compare


class Tracer(NamedTuple):
    trace: Callable[[nn.Module], torch.fx.GraphModule]
    is_ours: bool


tracers = pytest.mark.parametrize(
    "tracer",
    [Tracer(convbn_fx.symbolic_trace, True), Tracer(torch.fx.symbolic_trace, False)],
    ids=["convbn_fx", "torch.fx"],
)


def assert_same(architecture, reference, candidate):
    """Equal outputs, gradients and buffers; where small batches are normalised, rounding errors grow."""
    tolerances = {"rtol": 1e-7, "atol": 1e-9} if any_batch_statistics(candidate, architecture) else {}
    options = {"input_gradients": architecture.input_gradients, **tolerances}
    assert_equivalent(reference, candidate, architecture.input(), **options)


def any_batch_statistics(model, architecture):
    return architecture.uses_batch_statistics or any(norm.training for norm in batch_norms(model))


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def records(model):
    """The report without the names of nodes: pairs, skips and reasons by the names of modules, "" for functions."""
    modules = dict(model.named_modules())
    report = convbn_fx.report(model)
    pairs = [(pair.convolution, pair.batch_norm) for pair in report.fused]
    return (
        [tuple(name if name in modules else "" for name in pair) for pair in pairs],
        [(skip.batch_norm if skip.batch_norm in modules else "", skip.reason) for skip in report.skipped],
    )


def assert_as_expected(expectation, transformed):
    fused, skipped = records(transformed)
    assert fused == [(conv.module, norm.module) for conv, norm in expectation.fused]
    assert [name for name, _ in skipped] == [norm.module for norm, _ in expectation.skipped]
    for (name, reason), (_, reasons) in zip(skipped, expectation.skipped, strict=True):
        assert reason in reasons, name
    calls = [node for node in transformed.graph.nodes if node.target is functional.conv_batch_norm]
    assert len(calls) == len(fused)


def snapshot(model):
    """All that a pass could change in a model: which tensors it has and what is in them, modes, hooks, attributes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        {name: (id(tensor), tensor.requires_grad, tensor.tolist()) for name, tensor in tensors},
        {
            name: {
                key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()
            }
            for name, module in model.named_modules()
        },
        getattr(model, "code", None),
    )


@tracers
@given(architecture=architectures())
def test_a_fused_model_is_the_same_function_and_the_spec_tells_its_pairs(tracer, architecture):
    check_transform(tracer, architecture)


def check_transform(tracer, architecture):
    model = architecture.build()
    before = snapshot(model)
    traced = tracer.trace(model)
    traced_before = snapshot(traced)
    transformed = convbn_fx.transform(traced)
    assert snapshot(traced) == traced_before
    assert snapshot(model) == before
    assert transformed.state_dict().keys() == traced.state_dict().keys()
    if tracer.is_ours:
        assert transformed.state_dict().keys() == model.state_dict().keys()
    expectation = architecture.expect(keeps_leaves=tracer.is_ours)
    assert_as_expected(expectation, transformed)
    if not expectation.fused:
        assert transformed.code == traced.code
    reference = model if tracer.is_ours else traced
    assert_same(architecture, reference, transformed)
    with torch.no_grad():
        assert_same(architecture, reference, transformed)
    assert snapshot(model) == before


@tracers
@given(architecture=architectures(), include_training=st.booleans())
def test_a_fused_model_follows_every_later_change(tracer, architecture, include_training):
    model = architecture.build()
    traced = tracer.trace(model)
    transformed = convbn_fx.transform(traced, include_training=include_training)
    expectation = architecture.expect(keeps_leaves=tracer.is_ours, include_training=include_training)
    assert_as_expected(expectation, transformed)
    reference = model if tracer.is_ours else traced
    exchange_tensors(reference)
    assert_same(architecture, reference, transformed)
    trainable = [norm for norm in batch_norms(reference) if can_train(norm)]
    for modes in (
        [not norm.training for norm in trainable],
        [True] * len(trainable),
        [False] * len(trainable),
    ):
        for norm, mode in zip(trainable, modes, strict=True):
            norm.train(mode)
        assert_same(architecture, reference, transformed)
    for parameter in reference.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    assert_same(architecture, reference, transformed)


def exchange_tensors(model):
    """Changes each parameter, statistic and eps: in place, behind autograd's back, or by putting another one there."""
    for module in model.modules():
        for number, (name, old) in enumerate([*module._parameters.items(), *module._buffers.items()]):
            if old is None or not old.is_floating_point():
                continue
            new = torch.rand_like(old) + 0.5 if name == "running_var" else torch.randn_like(old)
            if number % 3 == 0:
                old.data.copy_(new)
            elif number % 3 == 1:
                with torch.no_grad():
                    old.copy_(new)
            else:
                is_parameter = isinstance(old, nn.Parameter)
                setattr(module, name, nn.Parameter(new, old.requires_grad) if is_parameter else new)
        if hasattr(module, "eps"):
            module.eps = 2 * module.eps + 1e-4


def can_train(norm):
    return not isinstance(norm, nn.SyncBatchNorm) and norm.eps >= SMALLEST_TRAINING_EPS


@tracers
@given(architecture=architectures())
def test_a_fused_model_can_be_fused_again_copied_and_pickled(tracer, architecture):
    transformed = convbn_fx.transform(tracer.trace(architecture.build()))
    again = convbn_fx.transform(transformed)
    assert again.code == transformed.code
    for copied in (again, copy.deepcopy(transformed), pickle.loads(pickle.dumps(transformed))):
        assert records(copied) == records(transformed)
        assert copied.state_dict().keys() == transformed.state_dict().keys()
        assert modes(copied) == modes(transformed)
        assert_same(architecture, transformed, copied)


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@given(architecture=architectures(batch_statistics=False))
def test_function_transforms_of_a_fused_model_are_those_of_the_model(architecture):
    model = architecture.build()
    transformed = convbn_fx.transform(convbn_fx.symbolic_trace(model))

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        assert_equivalent(
            gradients(model, parameters), gradients(transformed, parameters), architecture.input()
        )


@given(
    architecture=architectures(dtypes=(torch.float32, torch.bfloat16, torch.float16), batch_statistics=False)
)
def test_a_fused_model_is_as_accurate_as_the_model(architecture):
    model = architecture.build()
    transformed = convbn_fx.transform(convbn_fx.symbolic_trace(model))
    assert_as_expected(architecture.expect(keeps_leaves=True), transformed)
    assert_equivalent(model, transformed, architecture.input(), rtol=1.0)  # same dtypes, same None
    exact = copy.deepcopy(model).double()
    of_model, of_transformed = (
        worst_error(compare(exact, Rounded(exact, runner, architecture.dtype), architecture.input().double()))
        for runner in (model, transformed)
    )
    assert of_transformed <= 1.5 * of_model + 16 * torch.finfo(architecture.dtype).eps


class Rounded(nn.Module):
    """A model in lower precision, run on rounded parameters of an exact one, for errors of gradients too."""

    def __init__(self, exact, runner, dtype):
        super().__init__()
        for name, child in exact.named_children():
            self.add_module(name, child)
        self.dtype = dtype
        vars(self)["runner"] = runner  # and not a sub-module, whose parameters would be this module's too

    def forward(self, input):
        exact = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        wanted = [*self.runner.named_parameters(), *self.runner.named_buffers()]
        rounded = {name: exact[name].to(tensor.dtype) for name, tensor in wanted}
        outputs = functional_call(self.runner, rounded, input.to(self.dtype))
        return pytree.tree_map(torch.Tensor.double, outputs)


def worst_error(comparison):
    return max([*comparison.outputs.values(), *comparison.gradients.values()], default=0.0)


# --- What hypothesis found ---------------------------------------------------------------------------------------

_FUNCTION_TWICE = Architecture(
    (2, 2, 2),
    (
        Conv(0, in_channels=2, out_channels=2, geometry=(Geometry(),)),
        Norm(1, channels=2, kind="F.batch_norm"),
        Conv(2, in_channels=2, out_channels=2, geometry=(Geometry(),)),
        Again(3, step=1),
    ),
)


@tracers
@pytest.mark.xfail(
    strict=True, reason="rewriting moves a get_attr node that an earlier pair reads behind that pair"
)
def test_one_functional_batch_norm_in_two_pairs(tracer):
    check_transform(tracer, _FUNCTION_TWICE)


@pytest.mark.xfail(strict=True, reason="the details of skips name nodes that the pass has renamed")
def test_the_pass_reports_the_same_the_second_time():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)).eval()
    transformed = convbn_fx.transform(convbn_fx.symbolic_trace(model))
    assert convbn_fx.report(convbn_fx.transform(transformed)) == convbn_fx.report(transformed)


# --- What is drawn -----------------------------------------------------------------------------------------------


SEARCH = settings(settings.get_profile("dev"), derandomize=True, database=None, max_examples=600)


def test_the_smallest_architecture_with_a_pair_is_small():
    """Failing examples shrink."""
    found = find(architectures(), lambda drawn: drawn.expect(keeps_leaves=True).fused, settings=SEARCH)
    assert found == Architecture(
        (2, 1, 1),
        (
            Conv(0, in_channels=1, out_channels=1, geometry=(Geometry(),), bias=False, positional=0),
            Norm(1, channels=1, kind="BatchNorm1d", positional=0),
        ),
        input_gradients=False,
    )


#: Values of attributes that fused convolutions and batch norms must have had.
VALUES = {
    "rank": (0, 1, 2, 3),
    "transposed": (False, True),
    "is_function": (False, True),
    "bias": (False, True),
    "padding": (None, "same", "valid"),
    "padding_mode": ("zeros", "reflect", "replicate", "circular"),
    "kind": tuple(NORM_RANKS),
    "affine": ((), ("weight",), ("bias",), ("weight", "bias")),
    "eps": (0.0, 1e-5, 1e-3, 0.5),
    "momentum": (0.1, None),
    "frozen": ((), ("weight",), ("bias",), ("weight", "bias")),
}
#: What must have been true of a fused convolution.
OF_CONVOLUTIONS = {
    "grouped": lambda conv: 1 < conv.groups < conv.in_channels,
    "depthwise": lambda conv: 1 < conv.groups == conv.in_channels,
    "transposed and grouped": lambda conv: conv.transposed and conv.groups > 1,
    "strided": lambda conv: any(line.stride > 1 for line in conv.geometry),
    "dilated": lambda conv: any(line.dilation > 1 for line in conv.geometry),
    "padded": lambda conv: any(line.padding for line in conv.geometry),
    "with output padding": lambda conv: any(line.output_padding for line in conv.geometry),
    "with an output size": lambda conv: conv.output_size is not None,
}
#: What must have been true of an architecture with a pair.
OF_ARCHITECTURES = {
    "residual": lambda drawn, pairs: any(isinstance(s, Combine) and not s.concatenates for s in drawn.layers),
    "concatenation": lambda drawn, pairs: any(
        isinstance(s, Combine) and s.concatenates for s in drawn.layers
    ),
    "activation in place": lambda drawn, pairs: any(
        isinstance(s, Activation) and s.in_place for s in drawn.layers
    ),
    "batch norm in Train mode": lambda drawn, pairs: any(
        isinstance(s, Norm) and s.training for s in drawn.layers
    ),
    "convolution in two pairs": lambda drawn, pairs: repeated(conv.name for conv, _ in pairs),
    "batch norm in two pairs": lambda drawn, pairs: repeated(norm.name for _, norm in pairs),
    "pair across a border": lambda drawn, pairs: any(
        conv.name.count(".") != norm.name.count(".") for conv, norm in pairs
    ),
    "nested blocks": lambda drawn, pairs: any(conv.name.count(".") == 2 for conv, _ in pairs),
    "several outputs": lambda drawn, pairs: drawn.outputs,
    "gamma 0": lambda drawn, pairs: drawn.zero_gamma,
    "input without gradient": lambda drawn, pairs: not drawn.input_gradients,
}


def features(architecture):
    """Which of the above an architecture has, and why its other batch norms stay."""
    expectation = architecture.expect(keeps_leaves=True)
    for conv, norm in expectation.fused:
        for name, step in product(VALUES, (conv.step, norm.step)):
            yield name, getattr(step, name, ...)
        yield from (name for name, holds in OF_CONVOLUTIONS.items() if holds(conv.step))
        yield from (
            name for name, holds in OF_ARCHITECTURES.items() if holds(architecture, expectation.fused)
        )
    for _, reasons in expectation.skipped:
        if len(reasons) == 1:
            yield from reasons


def repeated(names):
    return max(Counter(names).values()) > 1


def test_everything_is_drawn():
    """A property says nothing about what is never drawn."""
    missing = {
        *OF_CONVOLUTIONS,
        *OF_ARCHITECTURES,
        *((name, value) for name in VALUES for value in VALUES[name]),
    }
    missing |= {
        SkipReason.TRAINING_MODE,
        SkipReason.NO_RUNNING_STATISTICS,
        SkipReason.NOT_AFTER_CONVOLUTION,
        SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE,
        SkipReason.CHANNELS_DIFFER,
        SkipReason.MODIFIED_IN_BETWEEN,
        SkipReason.NOT_CALLED,
    }

    @settings(SEARCH, phases=[Phase.generate])
    @given(architectures())
    def draw(architecture):
        missing.difference_update(features(architecture))

    draw()
    assert missing == set()
