"""The parts that modules play in pairs: generated subclasses, which keep the name, methods and state of the original.

A convolution that may wait, a batch norm that takes what waits, and the owner of the forward that runs both. Which
convolution may wait when is decided in [`deferred`][convbn_fx.tuning.deferred].
"""

import functools
import inspect
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convbn_fx import kinds
from convbn_fx._torch import BatchNormBase, has_any_global_hook
from convbn_fx.functional import gates
from convbn_fx.functional.activations import activated, is_for_the_operator
from convbn_fx.functional.norms import normalised
from convbn_fx.fx.copying import PART_OF_PAIR, derived
from convbn_fx.tuning.deferred import Deferred, Scope, Uncounted, defer, materialized, running
from convbn_fx.tuning.function_pairs import while_running

#: Attributes of tuned modules, in their `__dict__`.
PAIRING: Final = f"{PART_OF_PAIR}pairing"
SCOPE: Final = f"{PART_OF_PAIR}scope"
FUNCTION_CALLS: Final = f"{PART_OF_PAIR}function_calls"
REPORT: Final = f"{PART_OF_PAIR}report"
#: What copies have, too.
STAYS_IN_EVAL_MODE: Final = "convbn_fx_stays_in_eval_mode"


def _convolution_forward(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(cls, name))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = getattr(cls, name)
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        if running.counter is not None:
            running.counter.number += 1  # as if it called one function, whatever it does
            with Uncounted():
                return forward(self, *args, **kwargs)
        if len(args) != 1 or kwargs or type(args[0]) is not Tensor:
            args, kwargs = materialized(args), materialized(kwargs)
        pairing = self.__dict__.get(PAIRING)
        if pairing is not None and (surroundings := pairing.allows()) is not None:
            kind = kinds.convolution_kind(self)
            if kind is not None:
                return defer(*kind.operands(self, *args, **kwargs), pairing, surroundings)
        return original(self, *args, **kwargs)

    return forward


def _batch_norm_forward(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(cls, name))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = getattr(cls, name)
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        if running.counter is not None:
            with Uncounted():
                return forward(self, *args, **kwargs)
        for value in (*args, *kwargs.values()) if kwargs else args:
            if type(value) is Deferred and (normalised := value.waiting.normalized_by(self)) is not None:
                return normalised
        return original(self, *materialized(args), **materialized(kwargs))

    return forward


def _activation_forward(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    known = getattr(cls, name)
    kind = kinds.activation_kind_of(cls)

    @functools.wraps(known)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = getattr(cls, name)
        if original is known and len(args) == 1 and not kwargs and is_for_the_operator(args[0]):
            operands = None if kind is None else kind.operands(self)
            if operands is not None:
                return activated(operands, *args)
        return original(self, *args, **kwargs)

    return forward


def _batch_norm_that_stays_forward(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(cls, name))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and (output := normalised(self, *args, operator.call)) is not None:
            return output
        return getattr(cls, name)(self, *args, **kwargs)

    return forward


def _gate_forward(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    activation_forward = _activation_forward(cls, name)

    @functools.wraps(getattr(cls, name))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = activation_forward(self, *args, **kwargs)
        if not gates.running.depth or kinds.has_hooks(self) or has_any_global_hook():
            return output
        return gates.Gate(output) if is_for_the_operator(output) else output

    return forward


def _gated_forward(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(cls, name))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = getattr(cls, name)
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        gates.running.depth += 1
        try:
            return gates.without_gate(original(self, *args, **kwargs))
        finally:
            gates.running.depth -= 1

    return forward


def _owning_method(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(cls, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = getattr(cls, name)
        attributes = self.__dict__
        # What is known of the pairs is known of the modules, not of their replicas (nn.DataParallel).
        if "_is_replica" in attributes or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        scope, calls = attributes.get(SCOPE), attributes.get(FUNCTION_CALLS)
        if calls is None and running.counter is None:
            return _in_scope(scope, original, self, args, kwargs)
        with while_running(self, calls, name):
            return _in_scope(scope, original, self, args, kwargs)

    return method


def _in_scope(
    scope: Scope | None, method: Callable[..., Any], self: nn.Module, args: Any, kwargs: Any
) -> Any:
    if scope is None:
        return method(self, *args, **kwargs)
    with scope:
        return materialized(method(self, *args, **kwargs), scope)


def _train(cls: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(cls.train)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        returned = cls.train(self, *args, **kwargs)
        if STAYS_IN_EVAL_MODE in vars(self):
            self.training = False
        return returned

    return train


def _reset_running_stats(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.reset_running_stats)
    def reset_running_stats(self: Any) -> Any:
        if STAYS_IN_EVAL_MODE in vars(self):
            raise RuntimeError(
                "reset_running_stats: norm_eval=True keeps this batch norm in Eval mode, and no data would fill its "
                "statistics again. Update those of convbn_fx.untune(model), which has the same tensors: "
                "torch.optim.swa_utils.update_bn(loader, convbn_fx.untune(model))"
            )
        return cls.reset_running_stats(self)

    return reset_running_stats


def _refuse_scripting(self: nn.Module) -> nn.Module:
    raise TypeError(
        f"torch.jit.script: {type(self).__name__} is part of a model that convbn_fx.tune returned, and no forward of "
        "it is TorchScript. Script convbn_fx.untune(model), which has the same tensors, or convbn_fx.deploy(model)"
    )


#: Each makes of a class's method what takes its place; the method is looked up at each call, since classes are patched.
_REPLACEMENTS: Final[dict[str, Callable[[type[nn.Module], str], Callable[..., Any]]]] = {
    "convolution": _convolution_forward,
    "batch_norm": _batch_norm_forward,
    "activation": _activation_forward,
    "batch_norm_that_stays": _batch_norm_that_stays_forward,
    "gate": _gate_forward,
    "gated": _gated_forward,
    "owner": _owning_method,
}


def give_role(module: nn.Module, role: str, methods: frozenset[str] = frozenset({"forward"})) -> None:
    """Makes a module play a role in a pair, by giving it a generated subclass of its class.

    Args:
        module: The module. If it plays the role already, the methods are added.
        role: `convolution`, `batch_norm`, `activation`, `batch_norm_that_stays`, `gate`, `gated` or `owner`; the last
            also for a module that calls functions of pairs, or is called between such functions.
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
    return isinstance(inspect.getattr_static(cls, name, None), types.FunctionType) and not name.startswith(
        "__"
    )


_METHODS: Final = "_convbn_fx_methods"


# A class that is defined in a function is as short-lived as its models.
_tuned_classes: Final = weakref.WeakValueDictionary[
    tuple[type[nn.Module], str, frozenset[str]], type[nn.Module]
]()


def _tuned_class(cls: type[nn.Module], role: str, methods: frozenset[str]) -> type[nn.Module]:
    known = _tuned_classes.get((cls, role, methods))
    if known is not None:
        return known
    body: dict[str, Any] = {name: _REPLACEMENTS[role](cls, name) for name in methods}
    if role == "batch_norm" or issubclass(cls, BatchNormBase):  # one may own a pair, too
        body["train"] = _train(cls)
        if hasattr(cls, "reset_running_stats"):
            body["reset_running_stats"] = _reset_running_stats(cls)

    def reduce(self: Any, protocol: Any) -> Any:
        function, args, *state = super(tuned, self).__reduce_ex__(max(protocol, 2))
        if args[:1] != (tuned,):  # the class has a way of its own, which does not know of this one
            return function, args, *state
        return _restored, (cls, role, methods, *args[1:]), *state

    body |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {
        "__reduce_ex__": reduce,
        "__prepare_scriptable__": _refuse_scripting,
        kinds.TUNED_FROM: cls,
        _METHODS: methods,
    }
    tuned = derived(cls, body)
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
        self.scope.__enter__()

    def leave(self, *call: Any) -> Any:
        """A forward hook that is always called."""
        try:
            return materialized(call[-1], self.scope)
        finally:
            self.scope.__exit__(None)

    @staticmethod
    def removed_from(module: nn.Module) -> None:
        """Takes such hooks off a module."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), ScopeHooks):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
