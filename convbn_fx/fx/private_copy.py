"""A private copy of a model, in which a forward is traced: nothing that it does there reaches the model.

`torch.fx` patches `nn.Module` while it traces, for every model and thread of the process. Here the modules of the
copy, one by one, hand their calls to the tracer; their parameters and buffers are proxies, so that no forward gets hold
of the model's own, and their other tensors are copies.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from convbn_fx import _torch
from convbn_fx.fx.copying import Copies, derived
from convbn_fx.fx.proxies import READ_BY_NAME, StoredTensor
from convbn_fx.fx.side_effects import WritesNothing, attributes_as_found, random_state_as_found

# Functions that are kept whole are exchanged in the modules that use them. Whoever else calls one meanwhile is served
# as before, but two that exchange and put back at once would not leave what they found.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def private_copy(
    model: nn.Module, stored_tensor: type[StoredTensor] = StoredTensor
) -> Iterator["PrivateCopy"]:
    """Copies a model for as long as its forwards are traced.

    Args:
        model: The model.
        stored_tensor: What stands for its parameters and buffers.

    Yields:
        The copy. One thread at a time has one.
    """
    with _ONE_AT_A_TIME, random_state_as_found(), _torch.Patcher() as patcher, WritesNothing() as writes:
        _torch.patch_wrapped_functions(patcher)
        private = PrivateCopy(model, stored_tensor, patcher, writes)
        try:
            with attributes_as_found(private.modules, private.is_shared):
                yield private
        finally:
            for module in private.originals:  # which refer to themselves, and to the model's tensors
                _torch.hand_calls_to(module, None)
                vars(module).update(_parameters={}, _buffers={})


class PrivateCopy(Copies):
    """The modules of the copy, and what they have in common.

    Args:
        model: The model.
        stored_tensor: What stands for its parameters and buffers.
        patcher: Exchanges functions that are kept whole.
        writes: What all of this runs in.

    Attributes:
        tracer: The tracer that is at work.
        originals: The model's module for each module of the copy.
        copies: The copy's module for each module of the model.
    """

    entered = (*Copies.entered, FunctionType, CellType)
    holds_all = True

    def __init__(
        self,
        model: nn.Module,
        stored_tensor: type[StoredTensor],
        patcher: _torch.Patcher,
        writes: WritesNothing,
    ) -> None:
        super().__init__(model)
        self.tracer: Any = None
        self.patcher = patcher
        self.writes = writes
        self.copies = {module: self[id(module)] for module in self.modules}
        self.originals = {copied: module for module, copied in self.copies.items()}
        for module in self.modules:
            self[id(vars(module))] = vars(self.copies[module])
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self[id(tensor)] = stored_tensor(self, tensor)
        for value in self.own:
            if id(value) not in self:
                self[id(value)] = _own(value)
        for module, copied in self.copies.items():
            if not isinstance(copied, _Opaque):
                self.fill(module)
                for name in ("_parameters", "_buffers"):
                    vars(copied)[name] = _StoredTensors(vars(copied)[name])
            self._take_calls(copied)
        writes.tracing_begins()

    def blank(self, module: nn.Module) -> nn.Module:
        """The empty copy of a module; what stands for one that cannot be copied."""
        return _Opaque(module) if isinstance(module, torch.jit.ScriptModule) else super().blank(module)

    def is_own(self, value: Any) -> bool:
        """Tensors and arrays: a forward may write to them."""
        numpy: Any = sys.modules.get("numpy")
        return issubclass(type(value), Tensor) or (numpy is not None and type(value) is numpy.ndarray)

    def _take_calls(self, module: nn.Module) -> None:
        """Has calls of a module go to the tracer."""
        cls = type(module)
        if cls.__call__ is nn.Module.__call__:
            _torch.hand_calls_to(module, partial(self._called, module, module._call_impl))
            return

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._called(module, partial(cls.__call__, module), *args, **kwargs)

        _torch.hand_calls_to(module, None)
        module.__class__ = derived(cls, {"__call__": call})

    def _called(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.keep_functions_whole(getattr(module.forward, "__globals__", {}))
        return self.tracer.call_module(module, forward, args, kwargs)

    def keep_functions_whole(self, namespace: dict[str, Any]) -> None:
        """Exchanges, in the namespace of a forward, the functions that are to be nodes."""
        if self.patcher.visit_once(namespace):
            for name, value in list(namespace.items()):
                if callable(value) and id(value) in self.tracer._autowrap_function_ids and name[:1] != "_":
                    self.patcher.patch(namespace, name, _torch.create_wrapped_function(value))


def _own(value: Any) -> Any:
    """A copy of a tensor or an array; the value itself if it is of a kind that is hard to copy."""
    if not isinstance(value, Tensor):
        return value.copy()
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_inference():
        return value
    make = nn.Parameter if type(value) is nn.Parameter else Tensor.requires_grad_
    return make(value.detach().clone(), value.requires_grad)


class _StoredTensors(dict[str, Any]):
    """The parameters or buffers of a module: those that are asked for by name are nodes at once."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if not isinstance(value, StoredTensor):
            return value
        proxy = value.read()
        proxy.node.meta[READ_BY_NAME] = True
        return proxy


class _Opaque(nn.Module):
    """In the place of a module that cannot be copied."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        vars(self)["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        return vars(self)["_module"](*args, **kwargs)
