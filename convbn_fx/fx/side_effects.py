"""What a forward does besides computing its output, while it is traced: left out, or undone."""

import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from convbn_fx._torch import TorchDispatchMode, pytree


class WritesNothing(TorchDispatchMode):
    """Leaves out what would write to a tensor that was not made in it, and draws random numbers of its own.

    Both hold for the thread that enters it alone.

    Attributes:
        has_drawn: Whether random numbers were drawn.
        has_written: Whether something was to be written to a tensor that there was already when tracing began.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_drawn = self.has_written = False
        self.before = frozenset[int]()  # those of `made` that are copies of the model's
        self.made: dict[int, Any] = {}  # storages, kept so that no other gets the address of one of them

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        keys = {key for key, _ in _storages(written)}
        self.has_written |= not keys <= self.made.keys() - self.before
        if not keys <= self.made.keys():
            returned = len(func._schema.returns)
            return written[0] if returned == 1 else tuple(written) if returned else None
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.has_drawn = True
            func, kwargs = _with_a_generator(func, args, kwargs)
        given = dict(_storages((args, kwargs)))
        result = func(*args, **kwargs)
        self.made |= {key: storage for key, storage in _storages(result) if key not in given}
        return result

    def tracing_begins(self) -> None:
        """Tells what was made up to now from what a forward makes."""
        self.before, self.has_written = frozenset(self.made), False


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of an operator that it writes to."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | kwargs
    written = [each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
    return [given[name] for name in written if name in given]


def _storages(values: Any) -> Iterator[tuple[int, Any]]:
    for tensor in pytree.tree_leaves(values):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            yield storage._cdata, storage


def _with_a_generator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The operator that draws from a generator of its own, where there is one: the usual one is the whole process's."""
    devices = [tensor.device for tensor in pytree.tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
    device = torch.device(kwargs.get("device") or next(iter(devices), "cpu"))
    if device.type == "meta":
        return func, kwargs
    for name in (func._overloadname, f"{func._overloadname}_generator", "generator"):
        overload = getattr(func.overloadpacket, name, None)
        if overload is not None and "generator" in {argument.name for argument in overload._schema.arguments}:
            return overload, {**kwargs, "generator": torch.Generator(device)}
    return func, kwargs


@contextmanager
def random_state_as_found() -> Iterator[None]:
    """Puts back Python's and NumPy's generators, if something was drawn from them, and PyTorch's, if it was seeded."""
    state = random.getstate()
    seed, torch_state = torch.initial_seed(), torch.get_rng_state()
    numpy: Any = sys.modules.get("numpy")  # if the forward draws from it, it is imported
    numpy_state: Any = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        if random.getstate() != state:
            random.setstate(state)
        if torch.initial_seed() != seed:  # what else changes it is another thread
            torch.set_rng_state(torch_state)
        if numpy is not None and not all(map(numpy.array_equal, numpy.random.get_state(), numpy_state)):
            numpy.random.set_state(numpy_state)


def random_states() -> list[Any]:
    """The states of Python's and NumPy's generators."""
    numpy: Any = sys.modules.get("numpy")
    _, keys, *others = (None, b"") if numpy is None else numpy.random.get_state()
    return [random.getstate(), bytes(keys), *others]


@contextmanager
def attributes_as_found(
    modules: Iterable[nn.Module], may_change: Callable[[Any], bool] = lambda _: True
) -> Iterator[Callable[[], bool]]:
    """Undoes what changes in the attributes of modules and of objects they hold, and in containers that are attributes.

    Only what has changed is touched, and in place: handles of hooks refer to the very containers.

    Args:
        modules: The modules.
        may_change: Whether somebody may write to a container.

    Yields:
        Whether anything has changed.
    """
    found = [(container, _parts(container)) for container in _containers(modules) if may_change(container)]

    def changed() -> Iterator[tuple[Any, list[Any]]]:
        for container, parts in found:
            if list(map(id, _parts(container))) != list(map(id, parts)):
                yield container, parts

    try:
        yield lambda: any(True for _ in changed())
    finally:
        for container, parts in changed():
            container.clear()
            if isinstance(container, dict):
                container.update(zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True))
            else:
                (container.update if isinstance(container, set) else container.extend)(parts)


def _containers(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The attributes of modules and of objects they hold, and the containers among them and in these."""
    containers: list[tuple[Any, bool]] = [(vars(module), True) for module in modules]
    known = {id(container) for container, _ in containers}
    for container, is_of_module in containers:  # those that are found inside are looked into as well
        yield container
        for value in list(container.values() if isinstance(container, dict) else container):
            kind = type(value)  # a weak proxy passes for what it refers to
            if issubclass(kind, (dict, list, set, deque)):
                inside = value, is_of_module
            elif is_of_module and not issubclass(kind, _NO_HELPERS) and hasattr(value, "__dict__"):
                inside = vars(value), False  # objects that it holds are left alone
            else:
                continue
            if id(inside[0]) not in known:
                known.add(id(inside[0]))
                containers.append(inside)


#: What is no object that may keep what a forward gives it, though it has attributes.
_NO_HELPERS: Final = (nn.Module, Tensor, torch.fx.Proxy, type, ModuleType, *weakref.ProxyTypes)


def _parts(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)
