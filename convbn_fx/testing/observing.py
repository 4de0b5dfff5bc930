"""A call of a model, observed: everything that it does, by name.

Three flat dictionaries from a readable name to a value: the outputs, the gradients of one random linear function of
the outputs, and the state left behind (inputs, parameters, buffers, random numbers). A model is put back as it was
found after each call, so that two of them may share parameters, buffers and whole modules.

Imports torch only: an oracle must not share code with what it judges.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from convbn_fx._torch import BatchNormBase, pytree

#: A module, or any callable.
Model = Callable[..., object]

#: What torch.compile and checkpoint wrappers put into qualified names.
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")

Values = dict[str, object]


@dataclass
class Call:
    """What one call did: everything that is compared, by name.

    Attributes:
        error: what the model raised.
        outputs: the leaves of what it returned.
        gradients: by source; None where an output does not depend on it.
        state: what it left behind.
    """

    error: Exception | None = None
    outputs: Values = field(default_factory=dict)
    gradients: Values = field(default_factory=dict)
    state: Values = field(default_factory=dict)

    def __str__(self) -> str:
        return f"raised {self.error!r}" if self.error is not None else "returned"


@dataclass(frozen=True)
class Observer:
    """Calls models, and writes down what they do.

    Attributes:
        inputs: positional arguments; each model gets copies.
        kwargs: keyword arguments, treated alike.
        seed: of the cotangents.
        input_gradients: whether the inputs require grad.
    """

    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    seed: int
    input_gradients: bool

    def both(self, reference: Model, candidate: Model) -> tuple[Call, Call]:
        """Observe each of two models from the same state.

        Args:
            reference: a module, or any callable, of whose state nothing is known.
            candidate: the other.

        Returns:
            What each did.

        Raises:
            AssertionError: only one of them raised, or another type than the other.
        """
        models = (reference, candidate)
        devices = self._devices(*models)
        calls = []
        for model in models:
            with _left_as_found(models, devices):
                call = self._observe(model)
                after = {f"{name} after the call": value for name, value in _random_state(devices).items()}
                call.state |= after
                calls.append(call)
        expected, actual = calls
        if type(expected.error) is not type(actual.error):
            message = f"the reference {expected}, but the candidate {actual}"
            raise AssertionError(message) from (actual.error or expected.error)
        for name in _non_persistent_buffers(candidate):  # it may have more of them than the reference
            key = f"buffer {name} after the call"
            if key not in expected.state:
                actual.state.pop(key, None)
        return expected, actual

    def with_roundings(self, reference: Model, number: int) -> Call:
        """Observe a model whose inputs, parameters and buffers are off by at most one rounding each.

        How far its gradients move tells how exactly they can be known: what is zero but for rounding moves by as much
        as it is. Other numbers draw other roundings.
        """
        generator = torch.Generator().manual_seed(number)
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: (the tensor, what stands for it)

        def off(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            if id(tensor) not in moved:
                steps = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor.device)
                other = tensor.detach().clone()
                moved[id(tensor)] = tensor, other.add_(other * steps * torch.finfo(tensor.dtype).eps)
            return moved[id(tensor)][1]

        with _left_as_found([reference], self._devices(reference)):
            for kind in ("parameters", "buffers"):
                for tensor in _named(reference, kind).values():
                    tensor.data.copy_(off(tensor))
            inputs, kwargs = pytree.tree_map_only(Tensor, off, (self.inputs, dict(self.kwargs)))
            return replace(self, inputs=inputs, kwargs=kwargs)._observe(reference)

    def with_contiguous_gradients(self, reference: nn.Module) -> Call:
        """Observe a model whose batch norms are handed contiguous gradients.

        PyTorch's own backward pass of a batch norm on the CPU is wrong for a batch of one where they are not.
        """

        def contiguous(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(Tensor.contiguous)

        with ExitStack() as hooks, _left_as_found([reference], self._devices(reference)):
            for module in reference.modules():
                if isinstance(module, BatchNormBase):
                    hooks.enter_context(module.register_forward_hook(contiguous))
            return self._observe(reference)

    def _devices(self, *models: Model) -> list[torch.device]:
        """Devices other than the CPU that hold a tensor of the inputs or of models."""
        leaves = pytree.tree_leaves((self.inputs, dict(self.kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for kind in ("parameters", "buffers"):
            tensors += [tensor for model in models for tensor in _named(model, kind).values()]
        return [device for device in {t.device for t in tensors} if device.type not in ("cpu", "meta")]

    def _observe(self, model: Model) -> Call:
        """Call the model on a copy of the inputs, and write down what happens."""
        call = Call()
        copies: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: (the leaf, what the model gets)

        def copied(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                leaf = tensor.detach().clone()
                leaf.requires_grad_(torch.is_grad_enabled() and self.input_gradients and is_inexact(leaf))
                copies[id(tensor)] = leaf, leaf.clone()
            return copies[id(tensor)][1]

        given = {f"input {name}": value for name, value in [*enumerate(self.inputs), *self.kwargs.items()]}
        fed = pytree.tree_map_only(Tensor, copied, given)
        arguments = list(fed.values())
        positional, keywords = arguments[: len(self.inputs)], arguments[len(self.inputs) :]

        sources = {
            name: copies[id(tensor)][0]
            for name, tensor in _flatten_all(given).items()
            if id(tensor) in copies
        }
        sources |= _named(model, "parameters")
        sources = {
            f"gradient of {name}": source
            for name, source in sources.items()
            if torch.is_grad_enabled() and source.requires_grad
        }

        try:
            with warnings.catch_warnings():  # Dynamo reads .grad of its inputs, also where they are no leaves
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
                result = model(*positional, **dict(zip(self.kwargs, keywords, strict=True)))
            outputs = _flatten("output", result)
            call.outputs = {name: _frozen(value) for name, value in outputs.items()}
            call.gradients = _gradients(outputs, sources, self.seed)
        except Exception as error:  # noqa: BLE001 (whatever a model raises is compared too)
            call.error = error

        state = _flatten_all(fed)
        state |= {f"parameter {name}": tensor for name, tensor in _named(model, "parameters").items()}
        state |= {f"buffer {name}": tensor for name, tensor in _named(model, "buffers").items()}
        call.state = {f"{name} after the call": _frozen(value) for name, value in state.items()}
        return call


def _non_persistent_buffers(model: object) -> set[str]:
    """Names of the buffers that no checkpoint holds: constants of a traced graph, for example."""
    if not isinstance(model, nn.Module):
        return set()
    return {
        _WRAPPERS.sub("", f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def _gradients(outputs: Values, sources: Mapping[str, Tensor], seed: int) -> Values:
    """Gradients of ``sum(<cotangent, output>)``, or None, with random cotangents."""
    generator = torch.Generator().manual_seed(seed)
    roots, cotangents = [], []
    for output in outputs.values():
        if isinstance(output, Tensor) and is_inexact(output):
            dtype = torch.complex128 if output.is_complex() else torch.float64
            cotangent = torch.randn(output.shape, generator=generator, dtype=dtype)
            if output.requires_grad:
                roots.append(output)
                cotangents.append(cotangent.to(output))
    if not roots or not sources:
        return dict.fromkeys(sources)
    gradients = torch.autograd.grad(roots, list(sources.values()), cotangents, allow_unused=True)
    return dict(zip(sources, gradients, strict=True))


def _flatten(name: str, tree: object, around: frozenset[int] = frozenset()) -> Values:
    """Every leaf of a tree by its place, after the structure of the tree; objects that `_parts` knows are opened."""
    leaves: Iterable[tuple[str, object]]
    try:
        keyed, structure = pytree.tree_flatten_with_path(tree)
        leaves = [(pytree.keystr(path), leaf) for path, leaf in keyed]
    except ValueError:  # a container registered without names for its children
        unnamed, structure = pytree.tree_flatten(tree)
        leaves = [(f"<leaf {position}>", leaf) for position, leaf in enumerate(unnamed)]
    values: Values = {f"structure of {name}": structure}
    for path, leaf in leaves:
        place = name + path
        parts = _parts(leaf)
        if parts is None or id(leaf) in around:
            values[place] = leaf if parts is None else f"the {type(leaf).__name__} around it"
            continue
        values[f"structure of {place}"] = type(leaf)
        for part, value in parts.items():
            values |= _flatten(f"{place}.{part}", value, around | {id(leaf)})
    return values


def _parts(leaf: object) -> dict[str, object] | None:
    """What an object consists of, by attribute: dataclasses, and others that have no equality of their own (caches)."""
    if isinstance(leaf, (type, Tensor, nn.Module)) or callable(leaf):
        return None
    if is_dataclass(leaf):
        return {part.name: getattr(leaf, part.name) for part in fields(leaf)}
    return dict(vars(leaf)) if type(leaf).__eq__ is object.__eq__ and hasattr(leaf, "__dict__") else None


def _flatten_all(trees: Mapping[str, object]) -> Values:
    return {place: leaf for name, tree in trees.items() for place, leaf in _flatten(name, tree).items()}


@contextmanager
def _left_as_found(models: Iterable[Model], devices: Iterable[torch.device]) -> Iterator[None]:
    """Puts back all modules' attributes, registrations and tensors and the random state."""
    modules = {module for model in models if isinstance(model, nn.Module) for module in model.modules()}
    holders = [vars(module) for module in modules]
    holders += [held for m in modules for held in (m._parameters, m._buffers, m._modules)]
    found = [(holder, dict(holder)) for holder in holders]
    values = [value for _, items in found for value in items.values() if isinstance(value, Tensor)]
    contents = [(tensor, tensor.detach().clone()) for tensor in {id(v): v for v in values}.values()]
    random_state = _random_state(devices)

    try:
        yield
    finally:
        for holder, items in found:
            if [(k, id(v)) for k, v in holder.items()] != [(k, id(v)) for k, v in items.items()]:
                holder.clear()
                holder.update(items)
        for tensor, content in contents:
            if not torch.equal(tensor, content):
                tensor.data.copy_(content)  # .data: graphs of the caller must not see a new version
        _set_random_state(random_state, devices)


def _random_state(devices: Iterable[torch.device]) -> Values:
    return {
        "random state of Python": random.getstate(),
        "random state of cpu": torch.get_rng_state(),
        **{
            f"random state of {device}": torch.get_device_module(device).get_rng_state(device)
            for device in devices
        },
    }


def _set_random_state(state: Values, devices: Iterable[torch.device]) -> None:
    python, cpu, *others = state.values()
    random.setstate(python)  # type: ignore[arg-type]
    torch.set_rng_state(cpu)  # type: ignore[arg-type]
    for device, other in zip(devices, others, strict=True):
        torch.get_device_module(device).set_rng_state(other, device)


def _named(model: object, kind: str) -> dict[str, Tensor]:
    """Parameters or buffers under all their qualified names, as if no wrapper were there."""
    if not isinstance(model, nn.Module):
        return {}
    named = getattr(model, f"named_{kind}")(remove_duplicate=False)
    return {_WRAPPERS.sub("", name): tensor for name, tensor in named}


def _frozen(value: object) -> object:
    """What later changes in place cannot reach, and what needs no graph to say that it requires grad."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def is_inexact(tensor: Tensor) -> bool:
    """Whether the tensor has a dtype that rounds."""
    return tensor.is_floating_point() or tensor.is_complex()
