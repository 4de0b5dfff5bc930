"""What must hold for every model: random architectures, judged by the untouched model and by predictions from the spec.

Each property is checked on graphs of both tracers. What torch.fx's makes is compared with itself, untransformed: it
leaves out the modules, parameters and buffers that the graph does not read.
"""

import copy
import pickle
import re
from collections.abc import Callable
from itertools import product
from math import prod
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from models import in_train_mode
from mutants import gradients
from strategies import (
    NORM_RANKS,
    SMALLEST_EPS,
    SMALLEST_TRAINING_EPS,
    Again,
    Architecture,
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

pytestmark = in_train_mode


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
    return architecture.uses_batch_statistics or any(
        norm.training or norm.running_mean is None for norm in batch_norms(model)
    )


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
    for next_mode in (lambda norm: not norm.training, lambda norm: True, lambda norm: False):
        for norm in trainable:
            norm.train(next_mode(norm))
        assert_same(architecture, reference, transformed)
    for parameter in reference.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    assert_same(architecture, reference, transformed)
    for norm in trainable:
        norm.running_mean = norm.running_var = None
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
    assert convbn_fx.report(again) == convbn_fx.report(transformed)
    for copied in (copy.deepcopy(transformed), pickle.loads(pickle.dumps(transformed))):
        assert convbn_fx.report(copied) == convbn_fx.report(transformed)
        assert copied.state_dict().keys() == transformed.state_dict().keys()
        assert training_flags(copied) == training_flags(transformed)
        assert_same(architecture, transformed, copied)


def training_flags(model):
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
        compare(exact, Rounded(exact, runner, architecture.dtype), architecture.input().double())
        for runner in (model, transformed)
    )
    # What gamma's gradient is summed from may cancel, in another way here and there.
    for with_gamma, factor in ((False, 1.5), (True, 6)):
        allowed = factor * worst_error(of_model, with_gamma) + 16 * torch.finfo(architecture.dtype).eps
        assert worst_error(of_transformed, with_gamma) <= allowed


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


def worst_error(comparison, with_gamma):
    errors = comparison.outputs | comparison.gradients
    return max(
        (error for name, error in errors.items() if with_gamma or not re.search(r"norm\d+\.weight$", name)),
        default=0.0,
    )


# --- What hypothesis found ---------------------------------------------------------------------------------------

FUNCTION_TWICE = Architecture(
    (2, 2, 2),
    (
        Conv(0, in_channels=2, out_channels=2, geometry=(Geometry(),)),
        Norm(1, channels=2, kind="F.batch_norm"),
        Conv(2, in_channels=2, out_channels=2, geometry=(Geometry(),)),
        Again(3, step=1),
    ),
)


@tracers
def test_one_functional_batch_norm_in_two_pairs(tracer):
    check_transform(tracer, FUNCTION_TWICE)


def test_the_pass_reports_the_same_the_second_time():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)).eval()
    transformed = convbn_fx.transform(convbn_fx.symbolic_trace(model))
    assert convbn_fx.report(convbn_fx.transform(transformed)) == convbn_fx.report(transformed)


# --- What is drawn -----------------------------------------------------------------------------------------------


SEARCH = settings(settings.get_profile("dev"), derandomize=True, database=None, max_examples=800)


def test_the_smallest_architecture_with_a_pair_is_small():
    """Failing examples shrink."""
    found = find(architectures(), lambda drawn: drawn.expect(keeps_leaves=True).fused, settings=SEARCH)
    assert [type(step) for step in found.steps] == [Conv, Norm]
    assert prod(found.input_shape) <= 8
    assert set(found.steps[0].geometry) <= {Geometry()}


#: Values that attributes of fused convolutions and batch norms must have had.
OF_PAIRS = {
    "rank": (0, 1, 2, 3),
    "transposed": (False, True),
    "is_function": (False, True),
    "bias": (False, True),
    "padding": (None, "same", "valid"),
    "padding_mode": ("zeros", "reflect", "replicate", "circular"),
    "kind": tuple(NORM_RANKS),
    "affine": ((), ("weight",), ("bias",), ("weight", "bias")),
    "eps": (SMALLEST_EPS, 1e-5, 1e-3, 0.5),
    "momentum": (0.1, None),
    "frozen": ((), ("weight",), ("bias",), ("weight", "bias")),
}
#: The same for architectures that have a pair, and for all their steps.
OF_WHOLES = {
    "concatenates": (False, True),
    "in_place": (False, True),
    "training": (False, True),
    "zero_gamma": (False, True),
    "input_gradients": (False, True),
}
#: What must have been true of a fused convolution.
OF_CONVOLUTIONS = {
    "grouped": lambda conv: 1 < conv.groups < conv.in_channels,
    "depthwise": lambda conv: 1 < conv.groups == conv.in_channels,
    "transposed and grouped": lambda conv: conv.transposed and conv.groups > 1,
    "strided": lambda conv: any(line.stride > 1 for line in conv.geometry),
    "dilated": lambda conv: any(line.dilation > 1 for line in conv.geometry),
    "padded": lambda conv: any(line.padding for line in conv.geometry),
    "padded unevenly": lambda conv: conv.padding == "same" and any(line.reach % 2 for line in conv.geometry),
    "with output padding": lambda conv: any(line.output_padding for line in conv.geometry),
    "with an output size": lambda conv: conv.output_size is not None,
}
#: What must have been true of the names of one architecture's fused convolutions and batch norms.
OF_NAMES = {
    "convolution in two pairs": lambda convs, norms: len(set(convs)) < len(convs),
    "batch norm in two pairs": lambda convs, norms: len(set(norms)) < len(norms),
    "pair across a border": lambda convs, norms: [*map(depth, convs)] != [*map(depth, norms)],
    "nested blocks": lambda convs, norms: any(depth(name) == 2 for name in convs),
}


def depth(name):
    return name.count(".")


def features(architecture):
    """Which of the above an architecture has, and why its other batch norms stay."""
    expectation = architecture.expect(keeps_leaves=True)
    for _, reasons in expectation.skipped:
        if len(reasons) == 1:
            yield from reasons
    if not expectation.fused:
        return
    convs, norms = zip(*expectation.fused, strict=True)
    for table, things in (
        (OF_PAIRS, [call.step for call in (*convs, *norms)]),
        (OF_WHOLES, [architecture, *architecture.layers]),
    ):
        yield from ((name, getattr(thing, name, ...)) for name, thing in product(table, things))
    yield from (name for name, holds in OF_CONVOLUTIONS.items() if any(holds(conv.step) for conv in convs))
    names = [call.name for call in convs], [call.name for call in norms]
    yield from (name for name, holds in OF_NAMES.items() if holds(*names))


def test_everything_is_drawn():
    """A property says nothing about what is never drawn."""
    tables = OF_PAIRS | OF_WHOLES
    missing = {*OF_CONVOLUTIONS, *OF_NAMES, *((name, value) for name in tables for value in tables[name])}
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
