"""What a tuned model does at run time: a convolution that does its batch norm's work, and tells nobody but it.

[`tune`][convbn_fx.tune] leaves every forward as its author wrote it. A convolution that is followed by a frozen batch
norm computes both as one, and returns a [`Deferred`][convbn_fx.deferral.Deferred] in the place of its output. Its batch
norm takes the result out of it; for anything else that touches it, the convolution's own output is computed there and
then, from the operands of its call. So whatever path a forward takes, foreseen or not, its result is that of the
untouched model.

A convolution does so only while the forward that runs the pair is running (its [`Scope`][convbn_fx.deferral.Scope] is
open), and only if its output reaches the batch norm unseen by hooks. What leaves that forward is a tensor again. Where
Dynamo captures the forward, nothing waits: the pass is at hand for its graphs (`backend="convbn"`).
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from convbn_fx import kinds
from convbn_fx.arithmetic import convolution
from convbn_fx.autocast import autocast_state, in_autocast_state
from convbn_fx.functional import (
    are_cheaper_apart,
    batch_norm_operands,
    finished,
    frozen_kind,
    normalised_convolution,
)
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
                    kept.settle_for_later()
        finally:
            scope.depth -= 1
            scope.surroundings, scope.waiting = self.outer


_hooks: Final = partial(torch._C._autograd._top_saved_tensors_default_hooks, True)


def _surroundings() -> tuple[bool, *tuple[object, ...]]:
    """Grad mode, hooks on saved tensors by which regions are recomputed or offloaded, a backward pass, transforms."""
    return (
        torch.is_grad_enabled(),
        _hooks(),
        torch._C._current_graph_task_id(),
        torch._C._functorch.maybe_current_level(),
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
    """

    scopes: list[Scope] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    to_function: bool = False
    watched: list[nn.Module] = field(default_factory=list)
    places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def allows(self) -> bool:
        """Whether the convolution may wait now: a frozen batch norm may be next, and nobody looks in between."""
        if not any(map(Scope.is_open_here, self.scopes)) or any(map(kinds.has_hooks, self.watched)):
            return False
        for parent, name, child in self.places:
            if parent._modules.get(name) is not child:
                return False
        if self.only_norm is None and not (self.to_function or any(map(kinds.frozen_kind, self.norms))):
            return False
        return not _has_any_global_hook() and torch._C._get_tracing_state() is None

    def are_cheaper_apart(self, conv: nn.Module, input: Any) -> bool:
        """Whether sizes alone say that the convolution need not wait."""
        norm = self.only_norm
        return norm is not None and are_cheaper_apart(conv, norm, input)

    @property
    def only_norm(self) -> nn.Module | None:
        """The batch norm that is next, if only one can be."""
        return self.norms[0] if len(self.norms) == 1 and not self.to_function else None


# --- The deferred convolution ------------------------------------------------------------------------------------


class Waiting:
    """A convolution that has been called, the operands of the call, and what its batch norm will make of it.

    Args:
        input: The input, as the convolution itself takes it (padded, say).
        conv: The other operands.
        norm: The batch norm that is to come, if only one can. It has no hooks, and its work is done here.
    """

    def __init__(self, input: Tensor, conv: Convolution, norm: nn.Module | None) -> None:
        self.input = input
        self.conv = conv
        self.norm = norm
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

    def settled(self) -> Tensor:
        """The convolution's own output."""
        if self.output is None:
            if not self._is_unchanged():
                raise RuntimeError(
                    "the input or a parameter of a convolution was changed in place before its output was read, on a "
                    "path of the forward that was not foreseen. tune(model, modules=[...]) names the modules to tune: "
                    "leave the one around this convolution out"
                )
            with self._in_surroundings_of_the_call():
                self.output = convolution(self.conv, self.input)
        return self.output

    @contextmanager
    def _in_surroundings_of_the_call(self) -> Iterator[None]:
        """Undoes what has been entered since: a region that is recomputed must save what it saves in Eval mode."""
        entered = []
        while _hooks() is not None and _hooks() not in self.surroundings:
            entered.append(_hooks())
            torch._C._autograd._pop_saved_tensors_default_hooks()
        try:
            state = in_autocast_state(self.input.device.type, self.autocast)
            with state, torch.set_grad_enabled(self.surroundings[0]):
                yield
        finally:
            for hooks in reversed(entered):
                torch._C._autograd._push_saved_tensors_default_hooks(*hooks)

    def settle_for_later(self) -> None:
        """Settles, unless that has become impossible, which is nobody's concern before the output is read."""
        with suppress(RuntimeError):
            self.settled()

    def taken_by(self, norm: nn.Module | BatchNorm) -> Tensor | None:
        """What the batch norm makes of the output; None where it has to look at the output itself."""
        if self.output is not None or self.surroundings != _surroundings():
            return None
        if self.autocast != autocast_state(self.input.device.type):
            return None
        if norm is self.norm and self._has_done_what_it_would_do_now():
            # Once: the forward may change it in place, and then ask for it again.
            normalised, self.normalised = self.normalised, None
            return finished(self.norm, self.norm_kind, normalised)  # type: ignore[arg-type]
        # Which one would come was not known, or it computes its operands anew whenever they are read.
        kind = frozen_kind(norm)
        if kind is None or not self._is_unchanged():
            return None
        normalised = normalised_convolution(self.input, self.conv, batch_norm_operands(norm, kind), kind)
        return None if normalised is None else finished(norm, kind, normalised)

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


# What the output has in common with the normalised one.
_METADATA: Final = frozenset(
    {
        *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__),  # type: ignore[attr-defined]
        *(Tensor.size, Tensor.dim, Tensor.numel),
    }
)


class Deferred(Tensor):
    """The output of a convolution, not computed yet. To everyone but its batch norm it is that tensor."""

    _waiting: Waiting

    @staticmethod
    def of(waiting: Waiting) -> "Deferred":
        """Makes the tensor that stands for a convolution's output. It has neither shape nor data of its own."""
        # Code that bypasses Python, an autograd function say, must not take it for a constant: a gradient for something
        # of this shape is an error.
        requires_grad = torch.is_grad_enabled()
        deferred: Deferred = torch.Tensor._make_wrapper_subclass(Deferred, (0,), requires_grad=requires_grad)
        deferred._waiting = waiting
        return deferred

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Any function of PyTorch computes with the convolution's output."""
        if func in _METADATA and args[0]._waiting.normalised is not None:
            return func(args[0]._waiting.normalised, *args[1:], **(kwargs or {}))
        return func(*settled(args), **settled(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # the stub lacks the arguments' names
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Raises: what comes this way has bypassed Python, and autograd with it."""
        raise RuntimeError(
            f"{func} was given the output of a convolution that waits for its batch norm, on a path of the forward "
            "that was not foreseen. tune(model, modules=[...]) names the modules to tune: leave this one out"
        )


def waiting_in(value: Any) -> Waiting | None:
    """The convolution that a value stands for, if it stands for one."""
    return value._waiting if type(value) is Deferred else None


def settled(value: Any) -> Any:
    """The value, with every deferred convolution in it (in tuples, lists and dicts too) replaced by its output."""
    if type(value) is Deferred:
        return value._waiting.settled()
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
    return pytree.tree_map(settled, value)


def defer(input: Any, conv: Convolution, pairing: Pairing) -> Any:
    """Calls a convolution together with the batch norm after it.

    Args:
        input: The convolution's input.
        conv: Its other operands.
        pairing: What is known of the way to its batch norms.

    Returns:
        What stands for the convolution's output; the output itself where the two have to run apart.
    """
    if not isinstance(input, Tensor) or input.is_inference():  # which has no version to tell changes by
        return convolution(conv, input)
    norm = pairing.only_norm
    waiting = Waiting(input, conv, norm)
    if norm is not None and waiting.normalised is None:
        return convolution(conv, input)
    for scope in pairing.scopes:
        scope.waiting.append(weakref.ref(waiting))
    return Deferred.of(waiting)
