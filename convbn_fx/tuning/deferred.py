"""What a tuned model does at run time: a convolution waits for its batch norm, and tells nobody but it.

[`tune`][convbn_fx.tune] leaves every forward as its author wrote it. A convolution that is followed by a frozen batch
norm reads the operands of its call, and returns a [`Deferred`][convbn_fx.tuning.deferred.Deferred] in the place of its
output. Its batch norm takes the operands out of it, and computes both as one; for anything else that touches it, the
convolution's own output is computed there and then. So whatever path a forward takes, foreseen or not, its result is
that of the untouched model.

A convolution waits only while the forward that runs the pair is running (its
[`Scope`][convbn_fx.tuning.deferred.Scope] is open), and only if its output reaches the batch norm unseen by hooks. What
leaves that forward is a tensor again. Where Dynamo captures the forward, nothing waits: the pass is at hand for its
graphs (`backend="convbn"`).
"""

import math
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from convbn_fx import _torch, kinds
from convbn_fx._torch import has_any_global_hook, pytree
from convbn_fx.functional import native
from convbn_fx.functional.arithmetic import convolution
from convbn_fx.functional.autocast import autocast_of, computing_dtype, in_autocast_state
from convbn_fx.functional.autograd import convolution_gradients
from convbn_fx.functional.dispatch import (
    batch_norm_operands,
    fusible_kind,
    normalised_convolution,
    with_epilogue,
)
from convbn_fx.functional.geometry import output_shape
from convbn_fx.operands import BatchNorm, Convolution

# --- Where deferring is allowed ----------------------------------------------------------------------------------

#: What is around a call: grad mode, hooks on saved tensors by which regions are recomputed or offloaded, a backward
#: pass, modes that see operators, function transforms.
Surroundings = tuple[bool, object, int, int, int | None]


def _surroundings() -> Surroundings:
    return (
        torch.is_grad_enabled(),
        _torch.saved_tensors_hooks(),
        _torch.backward_pass(),
        _torch.dispatch_modes(),
        _torch.transform_level(),
    )


class Scope(threading.local):
    """A context that is open while the forward that owns some pairs runs in this thread.

    Attributes:
        calls: Of each call of the forward that is running, what was around it when it began, and the convolutions that
            have been called in it.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Surroundings, list[weakref.ReferenceType[Waiting]]]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies as a closed one."""
        return Scope, ()

    def __enter__(self) -> None:
        self.calls.append((_surroundings(), []))

    def __exit__(self, exception: object, *_: object) -> None:
        _, called = self.calls.pop()
        for reference in called if exception is None else ():
            kept = reference()
            if kept is not None:  # who keeps the output may read it when the weights are others
                kept.materialize_for_later()


class Running(threading.local):
    """What counts the convolutions that the forward running now calls as functions; None where nothing does."""

    counter: Any = None


running: Final = Running()


class Uncounted:
    """A context in which what is called is not called by the forward that counts."""

    __slots__ = ("outer",)

    def __enter__(self) -> None:
        self.outer, running.counter = running.counter, None

    def __exit__(self, *_: object) -> None:
        running.counter = self.outer


@dataclass
class Pairing:
    """What is known of the way from a convolution to the batch norms after it.

    Attributes:
        scopes: Of the forwards that run the convolution and a batch norm after it.
        norms: The batch norms that its output goes to.
        to_function: Whether it also goes to a batch norm that is a function.
        watched: The convolution, the batch norms, and the modules in between out of or into which its output goes.
        places: Where those are: parent, name and child. What has been wrapped or exchanged since is not known.
    """

    scopes: list[Scope] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    to_function: bool = False
    watched: list[nn.Module] = field(default_factory=list)
    places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def allows(self) -> Surroundings | None:
        """What is around a convolution that may wait: a frozen batch norm may be next, and nobody looks in between.

        Returns:
            None where it may not; nor in a region inside of the forward that is recomputed or has no gradients.
        """
        surroundings = _surroundings()
        for scope in self.scopes:
            if scope.calls and scope.calls[-1][0] == surroundings:
                break
        else:
            return None
        for module in self.watched:
            if kinds.has_hooks(module):
                return None
        for parent, name, child in self.places:
            if parent._modules.get(name) is not child:
                return None
        if has_any_global_hook() or _torch.is_jit_tracing():
            return None
        for norm in self.norms:
            if not norm.training or kinds.frozen_kind(norm) is not None:
                return surroundings
        return surroundings if self.to_function else None

    def changed_since(self) -> str:
        """What has been done to the modules of the pair that takes it apart for good; empty where nothing has."""
        for parent, name, child in self.places:
            there = parent._modules.get(name)
            if there is not child:
                return f"{name} is " + (
                    "gone" if there is None else f"another module now, a {type(there).__name__}"
                )
        patched = [type(part).__name__ for part in self.watched if "forward" in vars(part)]
        return f"the forward of a {patched[0]} was replaced" if patched else ""


# --- The deferred convolution ------------------------------------------------------------------------------------


def defer(input: Any, conv: Convolution, pairing: Pairing, surroundings: Surroundings) -> Any:
    """Calls a convolution whose batch norm may come.

    Args:
        input: The convolution's input.
        conv: Its other operands.
        pairing: What is known of the way to its batch norms.
        surroundings: What is around the call, and allows it to wait.

    Returns:
        What stands for the convolution's output; the output itself where that is better computed here.
    """
    # A change of the input has to show, and forward-mode AD has to know what is computed.
    if not isinstance(input, Tensor) or input.is_inference() or _torch.is_forward_ad_on():
        return convolution(conv, input)
    waiting = Waiting(input, conv, pairing, surroundings)
    # For Python to look at are autocast, modes, function transforms, and padding that is "same" or "valid".
    if (
        native.calls is not None
        and waiting.autocast is None
        and surroundings[-2:] == (0, None)
        and type(conv.padding) is not str
    ):
        deferred = native.calls.stand_in(waiting, input, conv)
    else:
        deferred = _stand_in(waiting)
    if deferred is None:
        return convolution(conv, input)
    deferred.__class__ = Deferred
    deferred.waiting = waiting
    for scope in pairing.scopes:
        if scope.calls:
            scope.calls[-1][1].append(weakref.ref(waiting))
    return deferred


def _unforeseen(what: str) -> str:
    return (
        f"{what}, on a path of the forward that was not foreseen. tune(model, modules=[...]) names the modules to "
        "tune: leave the one around this convolution out"
    )


class Waiting:
    """A convolution that has been called, and the operands of the call.

    Args:
        input: The input, as the convolution itself takes it (padded, say).
        conv: The other operands.
        pairing: What is known of the way to its batch norms.
        surroundings: What is around the call.
    """

    __slots__ = (
        "__weakref__",
        "autocast",
        "conv",
        "input",
        "output",
        "output_version",
        "pairing",
        "surroundings",
        "versions",
    )

    def __init__(
        self, input: Tensor, conv: Convolution, pairing: Pairing, surroundings: Surroundings
    ) -> None:
        self.input = input
        self.conv = conv
        self.pairing = pairing
        self.surroundings = surroundings
        self.autocast = autocast_of(input)
        self.versions = _versions(input, conv.weight, conv.bias)
        self.output: Tensor | None = None

    @property
    def is_differentiable(self) -> bool:
        """Whether autograd alone differentiates it, and no function transform."""
        return self.surroundings[-1] is None

    @property
    def is_recomputed(self) -> bool:
        """Whether the convolution is in a checkpoint."""
        return _torch.are_of_checkpoint(self.surroundings[1])

    def normalized_by(self, norm: nn.Module | BatchNorm) -> Tensor | None:
        """What the batch norm makes of the output; None where it has to look at the output itself."""
        if self.output is not None or self.surroundings != _surroundings():
            return None
        input, conv = self.input, self.conv
        kind = fusible_kind(norm)
        if kind is None or self.autocast != autocast_of(input) or not self._is_unchanged():
            return None
        normalised = normalised_convolution(input, conv, batch_norm_operands(norm, kind), kind)
        return None if normalised is None else with_epilogue(norm, kind, normalised, operator.call)

    def materialized(self) -> Tensor:
        """The convolution's own output."""
        if self.output is None:
            self._check_that_it_is_unchanged()
            with self._in_surroundings_of_the_call():
                self.output = convolution(self.conv, self.input)
            self.output_version = self.output._version
        return self.output

    def materialize_for_later(self) -> None:
        """Materializes, unless that has become impossible, which is nobody's concern before the output is read."""
        with suppress(RuntimeError):
            self.materialized()

    def gradients(self, grad_output: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """The gradients of input, weight and bias, for what took the output past Python."""
        self._check_that_it_is_unchanged()
        if self.output is not None and self.output_version != self.output._version:
            raise RuntimeError(_unforeseen("the output of a convolution was changed in place"))
        return convolution_gradients(self.conv, self.input, grad_output, wanted)

    def _is_unchanged(self) -> bool:
        """Whether the convolution would still compute what it would have when it was called."""
        return self.versions == _versions(self.input, self.conv.weight, self.conv.bias)

    def _check_that_it_is_unchanged(self) -> None:
        if not self._is_unchanged():
            changed = (
                "the input or a parameter of a convolution was changed in place before its output was read"
            )
            raise RuntimeError(_unforeseen(changed))

    @contextmanager
    def _in_surroundings_of_the_call(self) -> Iterator[None]:
        """Undoes what has been entered since: a region that is recomputed must save what it saves in Eval mode."""
        entered = []
        while (
            _torch.saved_tensors_hooks() is not None and _torch.saved_tensors_hooks() not in self.surroundings
        ):
            entered.append(_torch.saved_tensors_hooks())
            _torch.leave_saved_tensors_hooks()
        try:
            state = in_autocast_state(self.input.device.type, self.autocast)
            with (
                Uncounted(),
                torch.inference_mode(False),
                state,
                torch.set_grad_enabled(self.surroundings[0]),
            ):
                yield
        finally:
            for hooks in reversed(entered):
                _torch.enter_saved_tensors_hooks(*hooks)


def _versions(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """What changes when one of a convolution's operands is changed in place."""
    try:
        return input._version, weight._version, 0 if bias is None else bias._version
    except RuntimeError:  # parameters made in inference mode have none
        return (input._version,)


class Deferred(Tensor):
    """The output of a convolution, not computed yet. To everyone but its batch norm it is that tensor.

    It has the output's shape, dtype and device, and hands gradients on to the convolution's operands, for code that
    does not ask `__torch_function__`: an `autograd.Function`, a reentrant checkpoint, `torch.vmap`, an operator in C++.

    Attributes:
        waiting: The convolution.
    """

    waiting: Waiting

    def materialized(self) -> Tensor:
        """The output, computed if it was not yet.

        Raises:
            RuntimeError: Code that does not ask `__torch_function__` has changed it in place.
        """
        with _torch.DisableTorchFunction():
            is_changed = not self.is_inference() and self._version > 0
        if is_changed:
            raise RuntimeError(_unforeseen("the output of a convolution was changed in place"))
        return self.waiting.materialized()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Any function of PyTorch computes with the convolution's output."""
        if func in _METADATA and not (func == _DEVICE and args[0].waiting.is_recomputed):
            with _torch.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        return func(*materialized(args), **materialized(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # the stub lacks the arguments' names
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What comes this way has bypassed Python; autograd, which comes before, knows of it."""
        if args and type(args[0]) is Deferred and func._schema.is_mutable:
            raise RuntimeError(_unforeseen("the output of a convolution was changed in place"))
        args, kwargs = pytree.tree_map_only(Deferred, _values, (args, kwargs or {}))
        return func(*args, **kwargs)


def _values(deferred: Deferred) -> Tensor:
    if not deferred.waiting.is_differentiable:  # the transform would take it for a constant
        raise RuntimeError(_unforeseen("the output of a convolution was read past Python in a transform"))
    return deferred.waiting.materialized().detach()


def _stand_in(waiting: Waiting) -> Any:
    """What stands for a convolution's output; None where that is better computed at once."""
    input, conv = waiting.input, waiting.conv
    dtype = computing_dtype(input, conv)
    if dtype is None or input.ndim != conv.weight.ndim:
        return None
    shape = output_shape(input, conv.weight, conv)
    trains = waiting.surroundings[0] and any(
        tensor is not None and tensor.requires_grad for tensor in (input, conv.weight, conv.bias)
    )
    # Where no gradient needs the input, it would live as long as what stands for a smaller output.
    if min(shape) < 1 or not (trains or math.prod(shape) >= input.numel()):
        return None
    if trains and waiting.is_differentiable:
        return _Differentiable.apply(input, conv.weight, conv.bias, (waiting, shape, dtype))
    return _without_history(waiting, shape, dtype)


def _without_history(waiting: Waiting, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.Tensor._make_wrapper_subclass(Deferred, shape, dtype=dtype, device=waiting.input.device)


class _Differentiable(torch.autograd.Function):
    """Makes what stands for a convolution's output, with the convolution's gradients."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *_, metadata = args  # in a tuple, because gradients are not for it
        ctx.waiting = metadata[0]
        return _without_history(*metadata)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.waiting.gradients(grad_output, ctx.needs_input_grad[:3]), None)


# What can be told of the output before it is computed. A checkpoint asks for the devices of its arguments before it
# saves them. In a region that is recomputed itself they have to be computed by then: the order of what is saved counts.
_DEVICE: Final = Tensor.device.__get__
_METADATA: Final = frozenset(
    {
        *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, _DEVICE),  # type: ignore[attr-defined]
        *(Tensor.is_cuda.__get__, Tensor.requires_grad.__get__),  # type: ignore[attr-defined]
        *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
        *(Tensor.is_floating_point, torch.is_floating_point, torch.numel),
    }
)


def materialized(value: Any, scope: Scope | None = None) -> Any:
    """The value, with every deferred convolution in it (in tuples, lists and dicts too) replaced by its output.

    Args:
        value: Any value.
        scope: If given, what waits for a batch norm outside of it goes on waiting.
    """
    if type(value) is Deferred:
        return value.materialized() if scope is None or scope in value.waiting.pairing.scopes else value
    if not isinstance(value, (tuple, list, dict)):
        return value
    # Most often the arguments of a forward: tensors, and nothing inside of them.
    for part in value.values() if isinstance(value, dict) else value:
        if type(part) is Deferred or not isinstance(part, Tensor):
            break
    else:
        return value
    if Deferred not in map(type, pytree.tree_leaves(value)):
        return value
    return pytree.tree_map(partial(materialized, scope=scope), value)
