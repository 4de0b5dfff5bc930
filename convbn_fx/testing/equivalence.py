"""The oracle: does a candidate model do exactly what a reference model does?

Each is called once and observed (`observing`); two calls are equivalent if what was observed is.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convbn_fx.testing.observing import Model, Observer, Values, is_inexact

#: Errors allowed per dtype: relative to the largest magnitude of the tensor itself, and to that of all
#: tensors of the same module, because what is zero but for rounding (the gradient of a bias whose effect
#: a Train-mode batch norm removes) has no scale of its own. Python numbers come from tensors of unknown
#: dtype. Types that are not listed are compared exactly.
_TOLERANCES: Mapping[object, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-13),
    torch.complex128: (1e-9, 1e-13),
    torch.float32: (1e-4, 1e-6),
    torch.complex64: (1e-4, 1e-6),
    float: (1e-4, 1e-6),
    complex: (1e-4, 1e-6),
    torch.float16: (3e-2, 1e-3),
    torch.bfloat16: (3e-2, 1e-2),
}


#: How many times the reference is called with everything off by a rounding, if a gradient is not close; and how
#: many times as far as any of these moved the gradient the candidate's may be.
_ROUNDINGS, _NOISE = 4, 8.0


@dataclass(frozen=True)
class Comparison:
    """Worst error of each tensor, relative to the largest magnitude of the reference's tensor (or module).

    Attributes:
        outputs: by place in the output, such as ``"output['logits'][0]"``.
        gradients: by source, as ``"gradient of input 0"`` or ``"gradient of layer1.0.conv1.weight"``.
        state: by holder, such as ``"buffer bn1.running_mean after the call"``.
    """

    outputs: Mapping[str, float]
    gradients: Mapping[str, float]
    state: Mapping[str, float]


def compare(
    reference: Model,
    candidate: Model,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    input_gradients: bool = True,
    per_module: bool = False,
) -> Comparison:
    """Measure how far two models are apart.

    See [`assert_equivalent`][convbn_fx.testing.assert_equivalent] for the arguments and for what is
    compared. Parameters and buffers that only one of the models has are left out, and so are gradients
    that the reference does not have.

    Args:
        reference: see [`assert_equivalent`][convbn_fx.testing.assert_equivalent], as for all arguments but
            the last.
        candidate: the model to be judged.
        *inputs: positional arguments.
        kwargs: keyword arguments.
        seed: of the cotangents.
        input_gradients: whether the gradients by the inputs count.
        per_module: make errors relative to the largest magnitude among all the tensors of the same
            module, and to at least a millionth of that of the whole model: what is zero but for rounding,
            such as the gradient of an attention's key bias, has no scale of its own.

    Returns:
        The relative errors; infinite where only one of two values is NaN, or where the reference is
        all zero and the candidate is not.

    Raises:
        AssertionError: what is compared has no distance: containers, shapes or dtypes differ, a
            gradient is missing, or only one of the models raises.
        Exception: whatever both models raise.

    Example:
        ```python
        import copy
        import torch
        from convbn_fx.testing import compare

        model = torch.nn.Linear(4, 2).double()
        other = copy.deepcopy(model)
        other.weight.data *= 1 + 1e-6
        comparison = compare(model, other, torch.randn(3, 4, dtype=torch.float64))
        assert 0 < comparison.outputs["output"] < 1e-5
        assert comparison.gradients["gradient of bias"] == 0
        ```
    """
    observer = Observer(inputs, kwargs or {}, seed, input_gradients)
    expected, actual = observer.both(reference, candidate)
    if expected.error is not None:
        raise expected.error
    _assert_same_names(expected.outputs, actual.outputs)

    def relative_errors(wanted: Values, found: Values) -> dict[str, float]:
        differences = [
            _difference(name, value, found[name])
            for name, value in wanted.items()
            if name in found and isinstance(value, Tensor | float | complex)
        ]
        if not per_module:
            return {each.name: each.relative_to(each.scale) for each in differences}
        scales = _scales_of_owners(differences)
        least = 1e-6 * max(scales.values(), default=0.0)
        return {each.name: each.relative_to(max(scales[each.owner], least)) for each in differences}

    return Comparison(
        relative_errors(expected.outputs, actual.outputs),
        relative_errors(expected.gradients, actual.gradients),
        relative_errors(expected.state, actual.state),
    )


def assert_equivalent(
    reference: Model,
    candidate: Model,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    input_gradients: bool = True,
) -> None:
    """Assert that two models are the same function, with the same gradients and side effects.

    Each model is called once, on its own copy of the inputs and from the same state. Compared are

    - the outputs: containers and their types, and the dtype, shape, device, layout, ``requires_grad``
      and values of each tensor;
    - the gradients, along one random cotangent per output, of every floating point input and every
      parameter that requires grad, paired by qualified name (shared ones under all their names). None
      only equals None;
    - the state after the call: inputs, parameters, buffers, and the random numbers drawn. (The candidate may
      have non-persistent buffers of its own: the constants of a traced graph.)

    Both models are left as found, whatever is raised: values of parameters and buffers, attributes
    (training flags among them; what lists and the like hold is not followed), ``.grad``, random state.
    With grad mode disabled there are no gradients to compare. Reentrant checkpointing is not supported,
    because it refuses ``torch.autograd.grad``.

    Floating point values are close if ``|reference - candidate| <= atol + rtol * scale``, where scale is
    the largest finite magnitude of the reference's tensor. Defaults:

    | dtype    | rtol | atol, times the largest scale among the tensors of the same module |
    | -------- | ---- | ------------------------------------------------------------------ |
    | float64  | 1e-9 | 1e-13 |
    | float32  | 1e-4 | 1e-6 |
    | float16  | 3e-2 | 1e-3 |
    | bfloat16 | 3e-2 | 1e-2 |

    A gradient that is no closer may be nothing but rounding: that of an attention's key bias is 0 in exact
    arithmetic. So the reference is called again with inputs, parameters and buffers that are off by a rounding
    each, and the tolerance grows by eight times as far as its own gradient moves then (unless ``atol`` is given).

    Objects in the output that have no equality of their own, such as the caches of language models, are
    compared attribute by attribute.

    Complex dtypes follow their real ones, Python numbers float32. NaN equals NaN, infinity an infinity
    of the same sign; everything else is compared exactly.

    Args:
        reference: the module that is right by definition; or any callable, of whose state nothing is
            known.
        candidate: what is to equal it; may share parameters, buffers and modules with it.
        *inputs: positional arguments, of any nesting of ``torch.utils._pytree``. Their tensors are
            copied for each call, strides kept; floating point ones require grad without being leaves,
            and so may be changed in place.
        kwargs: keyword arguments, treated alike.
        rtol: relative tolerance for all floating point dtypes.
        atol: absolute tolerance for all floating point dtypes.
        seed: of the cotangents.
        input_gradients: False to feed inputs that do not require grad.

    Raises:
        AssertionError: the models differ; names the first offender, with its worst element.
        Exception: whatever the reference raises, if the candidate raises the same type and leaves the
            same state behind. Raised on, so that a call with wrong arguments proves nothing; expect it
            with ``pytest.raises``.

    Example:
        ```python
        import torch
        import convbn_fx
        from convbn_fx.testing import assert_equivalent, randomize_batchnorms

        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval().double()
        tuned = convbn_fx.tune(randomize_batchnorms(model))
        assert_equivalent(model, tuned, torch.randn(2, 3, 8, 8, dtype=torch.float64))
        ```
    """
    observer = Observer(inputs, kwargs or {}, seed, input_gradients)
    expected, actual = observer.both(reference, candidate)
    again = _Again(reference, observer)
    for wanted, found in (
        (expected.outputs, actual.outputs),
        (expected.gradients, actual.gradients),
        (expected.state, actual.state),
    ):
        _assert_same_names(wanted, found)
        differences = [_difference(name, value, found[name]) for name, value in wanted.items()]
        scales = _scales_of_owners(differences)
        for difference in differences:
            allowed = difference.allowed(rtol, atol, scales[difference.owner])
            if difference.absolute <= allowed.sum:
                continue
            if wanted is expected.gradients:
                again.judge(difference, allowed, found[difference.name], atol is None)
            else:
                raise AssertionError(difference.told(allowed))
    if expected.error is not None:
        raise expected.error


class _Allowed(NamedTuple):
    """The tolerance of a value."""

    atol: float
    rtol: float
    scale: float

    @property
    def sum(self) -> float:
        return self.atol + self.rtol * self.scale


@dataclass(frozen=True)
class _Difference:
    """The worst element of one value; ``absolute`` is 0 if and only if the two are equal."""

    name: str
    kind: object
    absolute: float = 0.0
    scale: float = 0.0
    worst: str = ""

    @property
    def owner(self) -> str:
        """The module in the name: "gradient of conv" of "gradient of conv.weight"."""
        return self.name.rpartition(".")[0] or self.name

    def relative_to(self, scale: float) -> float:
        if self.absolute == 0.0:
            return 0.0
        return self.absolute / scale if scale else float("inf")

    def allowed(self, rtol: float | None, atol: float | None, owner_scale: float) -> _Allowed:
        if self.kind not in _TOLERANCES:
            return _Allowed(0.0, 0.0, self.scale)
        default_rtol, default_atol = _TOLERANCES[self.kind]
        return _Allowed(
            default_atol * owner_scale if atol is None else atol,
            default_rtol if rtol is None else rtol,
            self.scale,
        )

    def told(self, allowed: _Allowed) -> str:
        return (
            f"{self.name} differs: worst absolute error {self.absolute:.3g}, "
            f"relative error {self.relative_to(self.scale):.3g}, {self.worst}; tolerance {allowed.sum:.3g} "
            f"(atol {allowed.atol:.3g} + rtol {allowed.rtol:.3g} * {allowed.scale:.3g})"
        )


@dataclass(frozen=True)
class _Again:
    """Further calls of the reference, for a gradient that is not close."""

    reference: Model
    observer: Observer

    def judge(self, difference: _Difference, allowed: _Allowed, found: object, counts_noise: bool) -> None:
        """Raise AssertionError unless the difference is rounding, or say whose fault it is."""
        if counts_noise:
            allowed = allowed._replace(atol=allowed.atol + _NOISE * self._noise(difference.name))
        if difference.absolute > allowed.sum:
            right = self._with_contiguous_gradients.get(difference.name)
            agrees = right is not None and _difference("", right, found).absolute <= allowed.sum
            raise AssertionError(difference.told(allowed) + (_FAULT_OF_PYTORCH if agrees else _PER_MODULE))

    def _noise(self, name: str) -> float:
        """How far a gradient moves when everything it is computed from is off by a rounding."""
        found = [gradients[name] for gradients in self._roundings if name in gradients]
        distances = [_difference(name, found[0], other).absolute for other in found]
        return max(filter(isfinite, distances), default=0.0)

    @cached_property
    def _roundings(self) -> list[Values]:
        return [
            self.observer.with_roundings(self.reference, number).gradients for number in range(_ROUNDINGS)
        ]

    @cached_property
    def _with_contiguous_gradients(self) -> Values:
        if not isinstance(self.reference, nn.Module):
            return {}
        return self.observer.with_contiguous_gradients(self.reference).gradients


_FAULT_OF_PYTORCH = (
    ". The reference is wrong, and the candidate is not: with contiguous gradients it gives what the candidate gives. "
    "PyTorch's backward pass of a batch norm on the CPU goes wrong for a batch of one whose gradient has the layout "
    "channels_last. Compare with a batch of two"
)

_PER_MODULE = (
    ". convbn_fx.testing.compare(..., per_module=True) measures every gradient on the scale of its module"
)


def _scales_of_owners(differences: Iterable[_Difference]) -> dict[str, float]:
    scales: dict[str, float] = {}
    for difference in differences:
        scales[difference.owner] = max(difference.scale, scales.get(difference.owner, 0.0))
    return scales


def _assert_same_names(wanted: Values, found: Values) -> None:
    """Assert that both have the same names; where structures differ, tell of these instead."""
    for name in wanted:
        if name.startswith("structure of") and name in found:
            _difference(name, wanted[name], found[name])
    for name in (*wanted, *found):
        if name not in found:
            raise AssertionError(f"{name}: the candidate has none")
        if name not in wanted:
            raise AssertionError(f"{name}: the reference has none")


def _difference(name: str, expected: object, actual: object) -> _Difference:
    """Measure the distance of two values; raise AssertionError if they have none."""
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        for trait in ("dtype", "shape", "device", "layout", "requires_grad"):
            ours, theirs = getattr(expected, trait), getattr(actual, trait)
            if ours != theirs:
                message = f"{trait} of {name} differs: reference {ours}, candidate {theirs}"
                raise AssertionError(message)
        return _tensor_difference(name, expected.dtype, expected.detach(), actual.detach())
    if type(expected) is type(actual) and isinstance(expected, float | complex):
        dtype = torch.complex128 if isinstance(expected, complex) else torch.float64
        numbers = (torch.tensor(number, dtype=dtype) for number in (expected, actual))
        return _tensor_difference(name, type(expected), *numbers)
    if type(expected) is type(actual) and (expected is actual or expected == actual):
        return _Difference(name, type(expected))
    ours, theirs = reprlib.repr(expected), reprlib.repr(actual)
    raise AssertionError(f"{name} differs: reference {ours}, candidate {theirs}")


def _tensor_difference(name: str, kind: object, expected: Tensor, actual: Tensor) -> _Difference:
    """Find the worst element of two tensors of one dtype, shape, device and layout."""
    if expected.layout is not torch.strided:
        expected, actual = expected.to_dense(), actual.to_dense()
    scale = _largest_magnitude(expected)
    if torch.equal(expected, actual):
        return _Difference(name, kind, scale=scale)
    same = ((expected == actual) | (expected.isnan() & actual.isnan())).cpu()
    if same.all():
        return _Difference(name, kind, scale=scale)
    wide = torch.complex128 if expected.is_complex() else torch.float64
    expected, actual = expected.cpu().to(wide), actual.cpu().to(wide)
    infinity, tiny = float("inf"), torch.finfo(torch.float64).tiny
    errors = (expected - actual).abs().nan_to_num(nan=infinity, posinf=infinity)
    errors.clamp_(min=tiny)  # integers may differ although they are equal as float64
    errors[same] = 0.0
    index = tuple(map(int, torch.unravel_index(errors.argmax(), errors.shape)))
    worst = f"at {index} reference {expected[index].item()}, candidate {actual[index].item()}"
    return _Difference(name, kind, errors[index].item(), scale, worst)


def _largest_magnitude(tensor: Tensor) -> float:
    """The largest finite magnitude in a tensor, 0 where there is none."""
    magnitudes = (tensor if is_inexact(tensor) else tensor.double()).abs()
    if magnitudes.numel() and not magnitudes.max().isfinite():
        magnitudes = magnitudes[magnitudes.isfinite()]
    return magnitudes.max().item() if magnitudes.numel() else 0.0
