"""What a tuned model does at run time: a convolution that waits for the batch norm after it.

[`tune`][convbn_fx.tune] leaves every forward as its author wrote it. A convolution that is followed by a frozen batch
norm returns a [`Deferred`][convbn_fx.deferral.Deferred] in place of its output: its batch norm takes that and computes
both as one; anything else that touches it gets the convolution's output, computed there and then. So whatever path a
forward takes, foreseen or not, its result is that of the untouched model.

A convolution defers only while the forward that runs the pair is running (its [`Scope`][convbn_fx.deferral.Scope] is
open), and only if its output reaches the batch norm unseen by hooks. What leaves that forward is a tensor again.

The convolution, the batch norm and the module that owns the forward are of generated subclasses, which keep the name,
the methods and the state of the original class.
"""

import functools
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from convbn_fx import kinds
from convbn_fx.autocast import autocast_state, in_autocast_state
from convbn_fx.functional import normalised_convolution
from convbn_fx.operands import BatchNorm, Convolution

# --- Where deferring is allowed ----------------------------------------------------------------------------------


class Scope(threading.local):
    """Open while the forward that owns some pairs runs in this thread.

    Attributes:
        depth: How many calls of it are running.
        surroundings: What was around the innermost of them when it began.
    """

    depth = 0
    surroundings: tuple[object, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies as a closed one."""
        return Scope, ()

    def is_open_here(self) -> bool:
        """Whether the forward is running, outside of any region in it that is recomputed or has no gradients."""
        return self.depth > 0 and self.surroundings == _surroundings()


def _surroundings() -> tuple[object, ...]:
    """Grad mode, and the hooks on saved tensors by which checkpointing recomputes and offloading moves."""
    if torch.compiler.is_compiling():
        return (torch.is_grad_enabled(),)
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


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
        """Whether the convolution may wait now: a frozen batch norm is next, and nobody looks in between."""
        return (
            any(scope.is_open_here() for scope in self.scopes)
            and (self.to_function or any(map(kinds.is_frozen, self.norms)))
            and not any(map(kinds.has_hooks, self.watched))
            and all(parent._modules.get(name) is child for parent, name, child in self.places)
            and not _has_any_global_hook()
            and torch._C._get_tracing_state() is None
        )


# --- The deferred convolution ------------------------------------------------------------------------------------


class Waiting:
    """A convolution that has been called and has not run, and what it takes to run it as it would have then."""

    def __init__(
        self,
        conv: nn.Module | Convolution,
        forward: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._conv = conv
        self._forward = forward
        self._args = args
        self._kwargs = kwargs
        self._output: Tensor | None = None
        self._autocast = autocast_state(self._device_type())
        self._versions = self._operand_versions()

    def _device_type(self) -> str:
        input: Tensor = self._args[0] if self._args else self._kwargs["input"]
        return input.device.type

    def _operand_versions(self) -> list[int]:
        """Counters that move on when an operand of the convolution is changed in place."""
        if torch.compiler.is_compiling():
            return []
        parameters = self._conv._parameters.values() if isinstance(self._conv, nn.Module) else self._conv
        values = (*self._args, *self._kwargs.values(), *parameters)
        return [value._version for value in values if isinstance(value, Tensor) and not value.is_inference()]

    def _check_operands(self) -> None:
        if self._versions != self._operand_versions():
            raise RuntimeError(
                f"the input or a parameter of this {type(self._conv).__name__} was changed in place between it and the "
                "batch norm after it, on a path of the forward that was not foreseen. tune(model, modules=[...]) "
                "names the modules to tune: leave the one around this pair out"
            )

    def settled(self) -> Tensor:
        """The convolution's output."""
        if self._output is None:
            self._check_operands()
            with in_autocast_state(self._device_type(), self._autocast):
                self._output = self._forward(self._conv, *self._args, **self._kwargs)
        return self._output

    def normalised(self, norm: nn.Module | BatchNorm) -> Tensor | None:
        """The output of the batch norm after the convolution, both in one; None where they have to run apart."""
        if self._output is not None or self._autocast != autocast_state(self._device_type()):
            return None
        self._check_operands()
        return normalised_convolution(self._conv, norm, *self._args, **self._kwargs)


class Deferred(Tensor):
    """The output of a convolution that has not run yet. To everyone but its batch norm it is that tensor."""

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


class _TracedDeferred:
    """A `Deferred` for Dynamo, which cannot make tensors of such a class: a plain object with a tensor's operators."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    __torch_function__ = Deferred.__torch_function__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._waiting.settled(), name)


def _of_settled(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self._waiting.settled(), name)(*settled(args))


for _name in (
    *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv", "itruediv"),
    *(
        "floordiv",
        "rfloordiv",
        "mod",
        "pow",
        "rpow",
        "matmul",
        "rmatmul",
        "and",
        "or",
        "xor",
        "neg",
        "abs",
        "invert",
    ),
    *("lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem", "len", "iter", "bool", "float", "int"),
):
    setattr(_TracedDeferred, f"__{_name}__", _of_settled(f"__{_name}__"))


def waiting_in(value: Any) -> Waiting | None:
    """The convolution that a value stands for, if it stands for one."""
    return value._waiting if type(value) in (Deferred, _TracedDeferred) else None


def settled(value: Any) -> Any:
    """The value, with every deferred convolution in it (in tuples, lists and dicts too) replaced by its output."""
    waiting = waiting_in(value)
    if waiting is not None:
        return waiting.settled()
    if isinstance(value, (tuple, list, dict)) and any(map(waiting_in, pytree.tree_leaves(value))):
        return pytree.tree_map(settled, value)
    return value


def _call(
    function: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls a forward whose arguments are tensors, with none of them deferred."""
    return function(module, *map(settled, args), **{name: settled(value) for name, value in kwargs.items()})


# --- The generated classes ---------------------------------------------------------------------------------------


def _convolution_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        input = args[0] if args else kwargs.get("input")
        pairing = vars(self).get(PAIRING)
        if isinstance(input, Tensor) and not waiting_in(input) and pairing and pairing.allows():
            waiting = Waiting(self, original, args, kwargs)
            return _TracedDeferred(waiting) if torch.compiler.is_compiling() else Deferred.of(waiting)
        return _call(original, self, args, kwargs)

    return forward


def _batch_norm_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            waiting = waiting_in(value)
            if waiting is not None and (normalised := waiting.normalised(self)) is not None:
                return normalised
        return _call(original, self, args, kwargs)

    return forward


def _owning_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope, calls = vars(self).get(SCOPE), vars(self).get(FUNCTION_CALLS)
        if scope is None:
            return original(self, *args, **kwargs)
        outer = scope.surroundings
        scope.depth, scope.surroundings = scope.depth + 1, _surroundings()
        try:
            if calls is None or torch.compiler.is_compiling():
                return settled(original(self, *args, **kwargs))
            with calls.mode():
                return settled(original(self, *args, **kwargs))
        finally:
            scope.depth, scope.surroundings = scope.depth - 1, outer

    return method


def _train(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Any, mode: bool = True) -> Any:
        original(self, mode)
        self.training = mode and not vars(self).get(STAYS_IN_EVAL_MODE, False)
        return self

    return train


#: Attributes of tuned modules, in their `__dict__`.
PAIRING: Final = "_convbn_fx_pairing"
SCOPE: Final = "_convbn_fx_scope"
FUNCTION_CALLS: Final = "_convbn_fx_function_calls"
REPORT: Final = "_convbn_fx_report"
STAYS_IN_EVAL_MODE: Final = "_convbn_fx_stays_in_eval_mode"

_REPLACEMENTS: Final[dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "convolution": _convolution_forward,
    "batch_norm": _batch_norm_forward,
    "owner": _owning_method,
}


def become(module: nn.Module, role: str, methods: frozenset[str] = frozenset({"forward"})) -> None:
    """Makes a module play a role in a pair, by giving it a generated subclass of its class.

    Args:
        module: The module. If it plays the role already, the methods are added.
        role: `convolution`, `batch_norm` or `owner`.
        methods: For an owner, names of the methods that run both members of a pair.
    """
    cls = type(module)
    if parametrize.is_parametrized(module):
        # PyTorch made this class for this one module, and finds the class before it as its only base.
        module.__class__ = remade(cls, _with_role(cls.__bases__[0], role, methods))
    else:
        module.__class__ = _with_role(cls, role, methods)


def remade(cls: type[nn.Module], *bases: type[nn.Module], without: tuple[str, ...] = ()) -> type[nn.Module]:
    """A class with the body of `cls`, but for some names, and with other bases."""
    kept = vars(cls).keys() - {"__dict__", "__weakref__", *without}
    body = {name: vars(cls)[name] for name in kept}
    return types.new_class(cls.__name__, bases, exec_body=lambda namespace: namespace.update(body))


def _with_role(cls: type[nn.Module], role: str, methods: frozenset[str]) -> type[nn.Module]:
    if kinds.TUNED_FROM in vars(cls):
        methods |= vars(cls)[_METHODS]
        cls = vars(cls)[kinds.TUNED_FROM]
    return _tuned_class(cls, role, frozenset(name for name in methods if _is_replaceable(cls, name)))


def _is_replaceable(cls: type, name: str) -> bool:
    return isinstance(getattr(cls, name, None), types.FunctionType) and not name.startswith("__")


_METHODS: Final = "_convbn_fx_methods"


_tuned_classes: Final[dict[tuple[type[nn.Module], str, frozenset[str]], type[nn.Module]]] = {}


def _tuned_class(cls: type[nn.Module], role: str, methods: frozenset[str]) -> type[nn.Module]:
    known = _tuned_classes.get((cls, role, methods))
    if known is not None:
        return known
    body: dict[str, Any] = {name: _REPLACEMENTS[role](getattr(cls, name)) for name in methods}
    if role == "batch_norm":
        body["train"] = _train(cls.train)

    def reduce(self: Any, protocol: Any) -> Any:
        function, args, *state = super(tuned, self).__reduce_ex__(max(protocol, 2))
        if args[:1] != (tuned,):  # the class has a way of its own, which does not know of this one
            return function, args, *state
        return _restored, (cls, role, methods, *args[1:]), *state

    body |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"__reduce_ex__": reduce, kinds.TUNED_FROM: cls, _METHODS: methods}
    tuned: type[nn.Module] = types.new_class(cls.__name__, (cls,), exec_body=lambda names: names.update(body))
    return _tuned_classes.setdefault((cls, role, methods), tuned)


def _restored(cls: type[nn.Module], role: str, methods: frozenset[str], *args: Any) -> nn.Module:
    """Makes the module that unpickling and copying then give its state."""
    tuned = _tuned_class(cls, role, methods)
    return tuned.__new__(tuned, *args)


class ScopeHooks:
    """Opens and closes a scope around the calls of a GraphModule, which writes its own forward anew at will."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def enter(self, *_: Any) -> None:
        """A pre-forward hook."""
        self.scope.depth, self.scope.surroundings = self.scope.depth + 1, _surroundings()

    def leave(self, *call: Any) -> Any:
        """A forward hook that is always called."""
        self.scope.depth -= 1
        return settled(call[-1])
