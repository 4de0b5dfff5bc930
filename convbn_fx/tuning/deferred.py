"""What a tuned model does at run time: a convolution that does its batch norm's work, and tells nobody but it.

[`tune`][convbn_fx.tune] leaves every forward as its author wrote it. A convolution that is followed by a frozen batch
norm computes both as one, and returns a [`Deferred`][convbn_fx.tuning.deferred.Deferred] in the place of its output.
Its batch norm takes the result out of it; for anything else that touches it, the convolution's own output is computed
there and then, from the operands of its call. So whatever path a forward takes, foreseen or not, its result is that of
the untouched model.

A convolution does so only while the forward that runs the pair is running (its
[`Scope`][convbn_fx.tuning.deferred.Scope] is open), and only if its output reaches the batch norm unseen by hooks. What
leaves that forward is a tensor again. Where Dynamo captures the forward, nothing waits: the pass is at hand for its
graphs (`backend="convbn"`).
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from convbn_fx import _torch, kinds
from convbn_fx._torch import has_any_global_hook, pytree
from convbn_fx.functional.arithmetic import convolution
from convbn_fx.functional.autocast import autocast_state, computing_dtype, in_autocast_state
from convbn_fx.functional.dispatch import (
    are_cheaper_apart,
    batch_norm_operands,
    fusible_kind,
    normalised_convolution,
    with_epilogue,
)
from convbn_fx.functional.geometry import output_shape, output_size
from convbn_fx.operands import BatchNorm, Convolution

# --- Where deferring is allowed ----------------------------------------------------------------------------------


class Scope(threading.local):
    """Open while the forward that owns some pairs runs in this thread.

    Attributes:
        depth: How many calls of it are running.
        surroundings: What was around the innermost of them when it began.
        waiting: The convolutions that have been called in it.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.surroundings: tuple[object, ...] = ()
        self.waiting: list[weakref.ReferenceType[Waiting]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies as a closed one."""
        return Scope, ()

    def opened(self) -> "_Opening":
        """Opens the scope for one call."""
        return _Opening(self)

    def let_go_of_inputs(self) -> None:
        """Keeps outputs instead of inputs for what the forward keeps although its batch norm is through with it."""
        last = self.waiting[-1]() if self.waiting else None
        if last is not None:
            last.let_go_of_input()

    def is_open_here(self) -> bool:
        """Whether the forward is running, outside of any region in it that is recomputed or has no gradients."""
        return self.depth > 0 and self.surroundings == _surroundings()


class _Opening:  # a class, because a generator takes three times as long
    """A context in which a scope is open."""

    __slots__ = ("outer", "scope")

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __enter__(self) -> None:
        scope = self.scope
        self.outer = scope.surroundings, scope.waiting
        scope.depth += 1
        scope.surroundings, scope.waiting = _surroundings(), []

    def __exit__(self, exception: object, *_: object) -> None:
        scope = self.scope
        try:
            for reference in scope.waiting if exception is None else ():
                kept = reference()
                if kept is not None:  # who keeps the output may read it when the weights are others
                    kept.materialize_for_later()
        finally:
            scope.depth -= 1
            scope.surroundings, scope.waiting = self.outer


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


def _surroundings() -> tuple[bool, *tuple[object, ...]]:
    """Grad mode, hooks on saved tensors by which regions are recomputed or offloaded, a backward pass, transforms."""
    return (
        torch.is_grad_enabled(),
        _torch.saved_tensors_hooks(),
        _torch.backward_pass(),
        _torch.transform_level(),
    )


@dataclass
class Pairing:
    """What is known of the way from a convolution to the batch norms after it.

    Attributes:
        scopes: Of the forwards that run the convolution and a batch norm after it.
        norms: The batch norms that its output goes to.
        to_function: Whether it also goes to a batch norm that is a function.
        watched: The convolution, the batch norms, and the modules in between out of or into which its output goes.
        places: Where those are: parent, name and child. What has been wrapped or exchanged since is not known.
        outlives_its_norm: Whether a forward has been seen to keep the output, where the input is the larger.
    """

    scopes: list[Scope] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    to_function: bool = False
    watched: list[nn.Module] = field(default_factory=list)
    places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    outlives_its_norm: bool = False

    def allows(self) -> bool:
        """Whether the convolution may wait now: a frozen batch norm may be next, and nobody looks in between."""
        if not any(map(Scope.is_open_here, self.scopes)) or any(map(kinds.has_hooks, self.watched)):
            return False
        for parent, name, child in self.places:
            if parent._modules.get(name) is not child:
                return False
        if self.only_norm is None and not (self.to_function or any(map(kinds.frozen_kind, self.norms))):
            return False
        return not has_any_global_hook() and not _torch.is_jit_tracing()

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

    def are_cheaper_apart(self, conv: nn.Module, input: Any) -> bool:
        """Whether sizes alone say that the convolution need not wait."""
        norm = self.only_norm
        return norm is not None and are_cheaper_apart(conv, norm, input)

    @property
    def only_norm(self) -> nn.Module | None:
        """The batch norm that is next, if only one can be."""
        return self.norms[0] if len(self.norms) == 1 and not self.to_function else None


# --- The deferred convolution ------------------------------------------------------------------------------------


def _unforeseen(what: str) -> str:
    return (
        f"{what}, on a path of the forward that was not foreseen. tune(model, modules=[...]) names the modules to "
        "tune: leave the one around this convolution out"
    )


class Waiting:
    """A convolution that has been called, the operands of the call, and what its batch norm will make of it.

    Args:
        input: The input, as the convolution itself takes it (padded, say).
        conv: The other operands.
        pairing: What is known of the way to its batch norms. If only one can come, its work is done here.
    """

    def __init__(self, input: Tensor, conv: Convolution, pairing: Pairing) -> None:
        self.input = input
        self.conv = conv
        self.pairing = pairing
        self.norm = norm = pairing.only_norm
        self.is_taken = False
        self.output: Tensor | None = None
        self.autocast = autocast_state(input.device.type)
        self.surroundings = _surroundings()
        self.versions = _versions(input, conv.weight, conv.bias)
        self.normalised: Tensor | None = None
        self.norm_kind = None if norm is None else kinds.frozen_kind(norm)
        if norm is not None and self.norm_kind is not None:
            self.norm_operands = self.norm_kind.operands(norm)
            self.norm_versions = _versions(*self.norm_operands[:4])
            self.normalised = normalised_convolution(input, conv, self.norm_operands, self.norm_kind)

    @property
    def is_differentiable(self) -> bool:
        """Whether autograd alone differentiates it, and no function transform."""
        return self.surroundings[-1] is None

    def materialized(self) -> Tensor:
        """The convolution's own output."""
        if self.output is None:
            self._check_that_it_is_unchanged()
            with self._in_surroundings_of_the_call():
                self.output = convolution(self.conv, self.input)
            self.output_versions = _versions(self.output)
        return self.output

    def gradients(self, grad_output: Tensor, wanted: Iterable[bool]) -> list[Tensor | None]:
        """The gradients of input, weight and bias, for what took the output past Python."""
        self._check_that_it_is_unchanged()
        if self.output is not None and self.output_versions != _versions(self.output):
            raise RuntimeError(_unforeseen("the output of a convolution was changed in place"))
        operands: list[Any] = [self.input, self.conv.weight, self.conv.bias]
        wanted = list(wanted)
        with self._in_surroundings_of_the_call():
            # Others than the tensors themselves, whose hooks are to be called once.
            operands = [
                operand.view_as(operand) if is_wanted else operand
                for operand, is_wanted in zip(operands, wanted, strict=True)
            ]
            input, weight, bias = operands
            output = convolution(self.conv._replace(weight=weight, bias=bias), input)
        gradients = torch.autograd.grad(
            output, list(compress(operands, wanted)), grad_output, create_graph=torch.is_grad_enabled()
        )
        found = iter(gradients)
        return [next(found) if is_wanted else None for is_wanted in wanted]

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

    def materialize_for_later(self) -> None:
        """Settles, unless that has become impossible, which is nobody's concern before the output is read."""
        with suppress(RuntimeError):
            self.materialized()

    def let_go_of_input(self) -> None:
        """Keeps the output instead of a larger input, once the batch norm is through: Eval mode keeps no more."""
        size = output_size(self.input, self.conv.weight, self.conv)
        if self.is_taken and self.output is None and size < self.input.numel():
            self.pairing.outlives_its_norm = True
            self.materialize_for_later()
            if self.output is not None:
                self.input = self.output

    def normalized_by(self, norm: nn.Module | BatchNorm) -> Tensor | None:
        """What the batch norm makes of the output; None where it has to look at the output itself."""
        if self.output is not None or self.surroundings != _surroundings():
            return None
        if self.autocast != autocast_state(self.input.device.type):
            return None
        if norm is self.norm and self._has_done_what_it_would_do_now():
            # Once: the forward may change it in place, and then ask for it again.
            normalised, self.normalised = self.normalised, None
            self.is_taken = True
            return with_epilogue(self.norm, self.norm_kind, normalised)  # type: ignore[arg-type]
        # Which one would come was not known, or it computes its operands anew whenever they are read.
        kind = fusible_kind(norm)
        if kind is None or not self._is_unchanged():
            return None
        normalised = normalised_convolution(self.input, self.conv, batch_norm_operands(norm, kind), kind)
        self.is_taken = normalised is not None
        return None if normalised is None else with_epilogue(norm, kind, normalised)

    def _has_done_what_it_would_do_now(self) -> bool:
        """Whether the batch norm's work is done, and nothing has changed since."""
        norm, kind = self.norm, self.norm_kind
        if norm is None or kind is None or self.normalised is None or kinds.has_hooks(norm):
            return False
        return (kind.always_frozen or not norm.training) and self._were_read(kind.operands(norm))

    def _is_unchanged(self) -> bool:
        """Whether the convolution would still compute what it would have when it was called."""
        return self.versions == _versions(self.input, self.conv.weight, self.conv.bias)

    def _were_read(self, operands: BatchNorm) -> bool:
        """Whether the batch norm's operands are those of its work that is done."""
        for operand, read in zip(operands[:4], self.norm_operands[:4], strict=True):
            if operand is not read:
                return False
        return operands.eps == self.norm_operands.eps and self.norm_versions == _versions(*operands[:4])


def _versions(*tensors: Tensor | None) -> list[int]:
    """What changes when one of the tensors is changed in place."""
    try:
        return [0 if tensor is None else tensor._version for tensor in tensors]
    except RuntimeError:  # tensors made in inference mode have none
        return [0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors]


class Deferred(Tensor):
    """The output of a convolution, not computed yet. To everyone but its batch norm it is that tensor.

    It has the output's shape, dtype and device, and hands gradients on to the convolution's operands, for code that
    does not ask `__torch_function__`: an `autograd.Function`, a reentrant checkpoint, `torch.vmap`, an operator in C++.
    """

    _waiting: Waiting

    @staticmethod
    def like(metadata: Tensor, waiting: Waiting) -> "Deferred":
        """Makes the tensor that stands for a convolution's output.

        Args:
            metadata: A tensor of its shape, strides and dtype.
            waiting: The convolution.
        """
        if torch.is_grad_enabled() and waiting.is_differentiable:
            conv = waiting.conv
            deferred: Deferred = _Differentiable.apply(
                waiting.input, conv.weight, conv.bias, (waiting, metadata)
            )
            return deferred
        return _without_history(waiting, metadata)

    def materialized(self) -> Tensor:
        """The output, computed if it was not yet.

        Raises:
            RuntimeError: Code that does not ask `__torch_function__` has changed it in place.
        """
        with _torch.DisableTorchFunction():
            history = self.grad_fn
        if history is not None and getattr(history, "waiting", None) is not self._waiting:
            raise RuntimeError(_unforeseen("the output of a convolution was changed in place"))
        return self._waiting.materialized()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Any function of PyTorch computes with the convolution's output."""
        if func in _METADATA:
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
    if not deferred._waiting.is_differentiable:  # the transform would take it for a constant
        raise RuntimeError(_unforeseen("the output of a convolution was read past Python in a transform"))
    return deferred._waiting.materialized().detach()


def _without_history(waiting: Waiting, metadata: Tensor) -> Deferred:
    deferred: Deferred = torch.Tensor._make_wrapper_subclass(
        Deferred,
        metadata.shape,
        metadata.stride(),
        dtype=metadata.dtype,
        device=waiting.input.device,
    )
    deferred._waiting = waiting
    return deferred


class _Differentiable(torch.autograd.Function):
    """Makes what stands for a convolution's output, with the convolution's gradients."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Deferred:
        *_, (ctx.waiting, metadata) = args  # in a tuple, because gradients are not for the metadata
        return _without_history(ctx.waiting, metadata)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.waiting.gradients(grad_output, ctx.needs_input_grad[:3]), None)


# What can be told of the output before it is computed.
_METADATA: Final = frozenset(
    {
        *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__),  # type: ignore[attr-defined]
        *(Tensor.is_cuda.__get__, Tensor.requires_grad.__get__),  # type: ignore[attr-defined]
        *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
        *(Tensor.is_floating_point, torch.is_floating_point, torch.numel),
    }
)


def waiting_in(value: Any) -> Waiting | None:
    """The convolution that a value stands for, if it stands for one."""
    return value._waiting if type(value) is Deferred else None


def materialized(value: Any, scope: Scope | None = None) -> Any:
    """The value, with every deferred convolution in it (in tuples, lists and dicts too) replaced by its output.

    Args:
        value: Any value.
        scope: If given, what waits for a batch norm outside of it goes on waiting.
    """
    if type(value) is Deferred:
        return value.materialized() if scope is None or scope in value._waiting.pairing.scopes else value
    if not isinstance(value, (tuple, list, dict)):
        return value
    # Most often the arguments of a forward: tensors, and nothing inside of them.
    for part in value.values() if isinstance(value, dict) else value:
        if type(part) is Deferred or not isinstance(part, Tensor):
            break
    else:
        return value
    if all(waiting_in(leaf) is None for leaf in pytree.tree_leaves(value)):
        return value
    return pytree.tree_map(partial(materialized, scope=scope), value)


def defer(input: Any, conv: Convolution, pairing: Pairing) -> Any:
    """Calls a convolution together with the batch norm after it.

    Args:
        input: The convolution's input.
        conv: Its other operands.
        pairing: What is known of the way to its batch norms.

    Returns:
        What stands for the convolution's output; the output itself where the two have to run apart.
    """
    if not _can_wait(input) or (not torch.is_grad_enabled() and _would_hold_too_much(pairing)):
        return convolution(conv, input)
    waiting = Waiting(input, conv, pairing)
    metadata = _metadata(input, conv) if waiting.norm is None else waiting.normalised
    if metadata is None:
        return convolution(conv, input)
    for scope in pairing.scopes:
        if scope.depth:
            scope.waiting.append(weakref.ref(waiting))
    return Deferred.like(metadata, waiting)


def _can_wait(input: Any) -> bool:
    """Whether a convolution of this input may wait: a change of it shows, and forward-mode AD need not know of it."""
    return isinstance(input, Tensor) and not input.is_inference() and forward_ad._current_level < 0


def _would_hold_too_much(pairing: Pairing) -> bool:
    """Whether an input would live longer than in Eval mode, where no backward pass needs it."""
    for scope in pairing.scopes:
        scope.let_go_of_inputs()
    return pairing.outlives_its_norm


def _metadata(input: Tensor, conv: Convolution) -> Tensor | None:
    """A tensor of the shape and dtype of the output; None where they are not known, or the convolution will raise."""
    dtype = computing_dtype(input, conv)
    if dtype is None or input.ndim != conv.weight.ndim:
        return None
    shape = output_shape(input, conv.weight, conv)
    return torch.empty(shape, dtype=dtype, device="meta") if min(shape) >= 0 else None
