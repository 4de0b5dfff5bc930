"""What the demo measures of one model: its pairs, errors in float64, bytes saved for backward, seconds of a step."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

import convbn_fx
from bench.harness.contenders import DEPLOY, EVAL, TUNE, make
from bench.harness.steps import count, images, times, training_step
from convbn_fx.testing import compare, randomize_batchnorms

#: What is compared.
VARIANTS = (EVAL, TUNE, DEPLOY)

#: What `measure` does, one after the other.
PHASES = ("fusing", "comparing", "counting bytes", "timing")

#: Largest relative error of an output or a gradient in float64 that counts as equal.
TOLERANCE = 1e-10

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """Shapes of the inputs, and the seconds that timing one model may take."""

    comparing: Shape
    counting: Shape
    timing: Shape
    seconds: float


FULL = Sizes(comparing=(2, 3, 64, 64), counting=(8, 3, 224, 224), timing=(8, 3, 112, 112), seconds=12.0)
SMOKE = Sizes(comparing=(1, 3, 64, 64), counting=(1, 3, 64, 64), timing=(1, 3, 64, 64), seconds=0.0)


@dataclass(frozen=True)
class Measurement:
    """One row of the demo.

    Attributes:
        model: The model's name.
        fused: Number of fused pairs.
        left: Number of batch norms that stayed, by the name of the reason.
        output_error: Worst relative error of Tune's output against Eval's, in float64.
        gradient_error: The same of the gradients by the input and every parameter.
        failures: One line for each variant that differs, naming the tensor; empty if all is well.
        saved_bytes: Bytes saved for the backward pass, by variant.
        step_seconds: Seconds of each forward and backward pass, by variant; position i is round i.
    """

    model: str
    fused: int
    left: dict[str, int]
    output_error: float
    gradient_error: float
    failures: list[str]
    saved_bytes: dict[str, int]
    step_seconds: dict[str, list[float]]


def measure(name: str, model: nn.Module, sizes: Sizes, announce: Callable[[str, str], object]) -> Measurement:
    """Measures one model in Eval, Tune and Deploy mode.

    Args:
        name: The model's name.
        model: The model, with one tensor as input and one as output. It is put in Eval mode, its batch norms are
            randomised and its memory format becomes channels_last.
        sizes: How large everything is.
        announce: Called with the name and each of `PHASES` when that begins.

    Returns:
        All that was measured.
    """
    fusing, comparing, counting, timing = PHASES

    announce(name, fusing)
    model = randomize_batchnorms(model.eval(), seed=0)
    variants = make(model, VARIANTS)
    report = convbn_fx.report(variants[TUNE])

    announce(name, comparing)
    output_error, gradient_error, failures = _compare(model, sizes.comparing)

    announce(name, counting)
    saved = {variant: count(module, sizes.counting) for variant, module in variants.items()}

    announce(name, timing)
    batch = images(sizes.timing, "cpu")
    steps = {variant: training_step(module, batch) for variant, module in variants.items()}
    seconds = times(steps, sizes.seconds, "cpu")

    return Measurement(
        model=name,
        fused=len(report.fused),
        left={reason.name: count for reason, count in report.reasons.most_common()},
        output_error=output_error,
        gradient_error=gradient_error,
        failures=failures,
        saved_bytes=saved,
        step_seconds=seconds,
    )


def _compare(model: nn.Module, shape: Shape) -> tuple[float, float, list[str]]:
    """Compares Tune with Eval, and Deploy's output too, in float64.

    Deploy's parameters are others, and so are its gradients; its output tells whether it is a fair contender.

    Returns:
        Tune's worst relative errors of outputs and gradients, and what is wrong, line by line.
    """
    variants = make(copy.deepcopy(model).double(), VARIANTS)
    image = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        tune = compare(variants[EVAL], variants[TUNE], image)
        with torch.no_grad():
            deploy = compare(variants[EVAL].forward, variants[DEPLOY].forward, image)
    except AssertionError as difference:
        return math.inf, math.inf, [str(difference)]
    failures = [
        f"{variant}: {tensor} differs from Eval's by {error:.2g} relative to its largest value; at most {TOLERANCE:g}"
        for variant, errors in ((TUNE, tune.outputs), (TUNE, tune.gradients), (DEPLOY, deploy.outputs))
        for tensor, error in (_worst(errors),)
        if not error <= TOLERANCE
    ]
    return _worst(tune.outputs)[1], _worst(tune.gradients)[1], failures


def _worst(errors: Mapping[str, float]) -> tuple[str, float]:
    return max(errors.items(), key=lambda item: item[1])
