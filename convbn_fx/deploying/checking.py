"""Whether a deployed model gives what the model gave: called once with examples of inputs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from convbn_fx import kinds
from convbn_fx._torch import pytree
from convbn_fx.testing import compare


def check_example_inputs(example_inputs: Any) -> None:
    """Raises a TypeError unless these are a tensor, a tuple, a dictionary or None."""
    if not (example_inputs is None or isinstance(example_inputs, (Tensor, tuple, dict))):
        raise TypeError(
            f"deploy: example_inputs is of type {type(example_inputs).__name__}. Pass a tensor, a tuple of positional "
            "arguments such as (x,), or a dictionary of keyword arguments"
        )


def check_outputs(model: nn.Module, deployed: nn.Module, example_inputs: Any) -> None:
    """Raises where the outputs of two models differ beyond rounding.

    Args:
        model: The model that is right.
        deployed: What was made of it.
        example_inputs: A tensor, a tuple of positional arguments or a dictionary of keyword arguments.

    Raises:
        ValueError: An output differs; tells its place and its error.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else ()
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else args
    kwargs = example_inputs if isinstance(example_inputs, dict) else {}
    with torch.no_grad(), _in_eval_mode(model), _in_eval_mode(deployed):
        try:
            outputs = compare(model, deployed, *args, kwargs=kwargs, input_gradients=False).outputs
        except AssertionError as difference:
            raise ValueError(f"deploy: with the example inputs, {difference}. {_CURE}") from difference
    tolerance = _rounding(model, example_inputs)
    for name, error in outputs.items():
        if not error <= tolerance:
            raise ValueError(
                f"deploy: with the example inputs, {name} is off by {error:.2g} of its largest value. {_CURE}"
            )


_CURE = "deploy(model, modules=[...]) leaves a part as it is, and tune(model) looks at every call"


def _rounding(model: nn.Module, example_inputs: Any) -> float:
    """What rounding may amount to, relative to the largest value, after many layers."""
    tensors = [*model.parameters(), *pytree.tree_leaves(example_inputs)]
    dtypes = {t.dtype for t in tensors if isinstance(t, Tensor) and t.dtype.is_floating_point}
    return 4 * math.sqrt(max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0))


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for all modules but batch norms, which keep the mode that they were deployed in."""
    modes = {module: module.training for module in model.modules() if not kinds.resembles_batch_norm(module)}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training
