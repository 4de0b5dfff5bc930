"""Random architectures: what a spec is, builds and predicts, and the strategies that draw it.

A spec is a straight-line program of frozen dataclasses. Value 0 is the input, step i computes value i + 1 from earlier
values, and the last value is returned. Layers belong to the step that calls them first; `Again` calls one once more.

Strategies pick each step from those that fit the values there are, so that no draw is ever discarded. Predictions are
made from the spec alone, by following its values: they share nothing with the matcher.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count, product
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from convbn_fx import SkipReason
from convbn_fx.testing import randomize_batchnorms

Shape = tuple[int, ...]

LARGEST_SIZE = 8  # of a channel or spatial dimension that a convolution reads or makes
LARGEST_VALUE = 1500  # elements
#: From this eps on a batch norm may use the statistics of a batch of two without magnifying rounding errors.
SMALLEST_TRAINING_EPS = 1e-3


# --- Steps: what a spec consists of ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One line of a program: a layer or a function of earlier values."""

    source: int

    name: ClassVar[str] = ""
    makes_new_tensor: ClassVar[bool] = False  # that its own backward pass does not read

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.source,)

    @property
    def reads(self) -> tuple[int, ...]:
        """The sources of which it reads more than the shape."""
        return self.sources

    @property
    def overwrites(self) -> bool:
        """Whether it changes a tensor in place: its input, or running statistics."""
        return False

    def shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def fits(self, shape: Shape, first: Shape) -> bool:
        """Whether its layer, first called on a tensor of shape `first`, can be called on one of `shape`."""
        return shape == first

    def build(self) -> nn.Module | None:
        return None

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        raise NotImplementedError


class Geometry(NamedTuple):
    """A convolution along one spatial dimension."""

    kernel: int = 1
    dilation: int = 1
    stride: int = 1
    padding: int = 0
    output_padding: int = 0

    @property
    def reach(self) -> int:
        return self.dilation * (self.kernel - 1)

    def size(self, size: int, transposed: bool = False) -> int:
        if transposed:
            return (size - 1) * self.stride - 2 * self.padding + self.reach + self.output_padding + 1
        return (size + 2 * self.padding - self.reach - 1) // self.stride + 1


@dataclass(frozen=True)
class Conv(Step):
    """A convolution, transposed convolution or (without spatial dimensions) linear layer."""

    in_channels: int
    out_channels: int
    geometry: tuple[Geometry, ...] = ()
    transposed: bool = False
    groups: int = 1
    bias: bool = True
    padding: str | None = None  # "same" or "valid" in place of numbers
    padding_mode: str = "zeros"
    output_size: Shape | None = None  # given with the call
    is_function: bool = False
    positional: int = 1  # so many arguments of the call go without their name
    frozen: tuple[str, ...] = ()

    name = "conv"
    makes_new_tensor = True

    @property
    def rank(self) -> int:
        return len(self.geometry)

    @property
    def batched_rank(self) -> int:
        return self.rank + 2

    def shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if not self.rank:
            return (*shape[:-1], self.out_channels)
        if self.padding == "same":
            sizes = shape[-self.rank :]
        else:
            sizes = tuple(
                line.size(size, self.transposed)
                for line, size in zip(self.geometry, shape[-self.rank :], strict=True)
            )
        return (*shape[: -self.rank - 1], self.out_channels, *sizes)

    def _options(self) -> dict[str, Any]:
        """How the kernel is laid, by the names that modules and functions share; lists are numbers if they can be."""
        _, dilation, stride, padding, output_padding = map(_compact, zip(*self.geometry, strict=True))
        options = {"stride": stride, "padding": self.padding or padding}
        last = {"groups": self.groups, "dilation": dilation}
        if self.transposed:
            return options | {"output_padding": output_padding} | last
        return options | dict(reversed(last.items()))

    def build(self) -> nn.Module:
        if not self.rank:
            layer: nn.Module = nn.Linear(self.in_channels, self.out_channels, self.bias)
        else:
            options = self._options() | {"bias": self.bias}
            if not self.transposed:
                options["padding_mode"] = self.padding_mode
            make = getattr(nn, f"Conv{'Transpose' if self.transposed else ''}{self.rank}d")
            kernel = tuple(line.kernel for line in self.geometry)
            layer = make(self.in_channels, self.out_channels, kernel, **options)
        _freeze(layer, self.frozen)
        return Operands(layer) if self.is_function else layer

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        (input,) = values
        if not self.is_function:
            size = None if self.output_size is None else list(self.output_size)
            return _spelled(layer, {"input": input, "output_size": size}, self.positional)
        arguments = {"input": input, "weight": layer.weight, "bias": layer.bias}
        if not self.rank:
            return _spelled(F.linear, arguments, self.positional)
        function = getattr(F, f"conv{'_transpose' if self.transposed else ''}{self.rank}d")
        return _spelled(function, arguments | self._options(), self.positional)


@dataclass(frozen=True)
class Norm(Step):
    """A batch norm: a class of torch.nn, or a function."""

    channels: int
    kind: str
    affine: tuple[str, ...] = ("weight", "bias")
    tracked: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    training: bool = False
    positional: int = 1
    frozen: tuple[str, ...] = ()

    name = "norm"
    makes_new_tensor = True

    #: Numbers of dimensions that each kind takes.
    RANKS: ClassVar[dict[str, tuple[int, ...]]] = {
        "BatchNorm1d": (2, 3),
        "BatchNorm2d": (4,),
        "BatchNorm3d": (5,),
        "SyncBatchNorm": (2, 3, 4, 5),
        "F.batch_norm": (2, 3, 4, 5),
        "torch.batch_norm": (2, 3, 4, 5),
    }

    @property
    def is_function(self) -> bool:
        return "." in self.kind

    @property
    def uses_batch_statistics(self) -> bool:
        return self.training or not self.tracked

    @property
    def overwrites(self) -> bool:
        return self.training and self.tracked

    @staticmethod
    def can_read(shape: Shape) -> bool:
        """Whether there is a batch norm for tensors of this shape, with two values per channel at least."""
        return 2 <= len(shape) <= 5 and prod(shape) >= 2 * shape[1]

    def fits(self, shape: Shape, first: Shape) -> bool:
        return len(shape) in self.RANKS[self.kind] and shape[1] == self.channels and self.can_read(shape)

    def build(self) -> nn.Module:
        make = nn.BatchNorm1d if self.is_function else getattr(nn, self.kind)
        layer = make(self.channels, self.eps, self.momentum, bool(self.affine), self.tracked)
        for parameter in {"weight", "bias"} - set(self.affine):
            setattr(layer, parameter, None)
        layer.train(self.training)
        _freeze(layer, self.frozen)
        return Operands(layer) if self.is_function else layer

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"input": values[0]}
        if not self.is_function:
            return _spelled(layer, arguments, self.positional)
        affine = {"weight": layer.weight, "bias": layer.bias}
        statistics = {"running_mean": layer.running_mean, "running_var": layer.running_var}
        rest = {"training": self.training, "momentum": self.momentum, "eps": self.eps}
        if self.kind == "F.batch_norm":
            return _spelled(F.batch_norm, arguments | statistics | affine | rest, self.positional)
        arguments |= affine | statistics | rest | {"cudnn_enabled": False}
        return _spelled(torch.batch_norm, arguments, len(arguments))


@dataclass(frozen=True)
class Activation(Step):
    """A smooth activation: at a kink, rounding errors would decide what a gradient is."""

    form: str = "module"  # or "function" or "method"
    in_place: bool = False

    name = "activation"

    @property
    def overwrites(self) -> bool:
        return self.in_place

    def build(self) -> nn.Module | None:
        return nn.ELU(inplace=self.in_place) if self.form == "module" else None

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        (input,) = values
        if self.form == "module":
            return layer(input)
        if self.form == "function":
            return F.elu(input, 1.0, self.in_place)
        return input.tanh_() if self.in_place else input.tanh()


@dataclass(frozen=True)
class Combine(Step):
    """A residual addition, or a concatenation of channels."""

    other: int
    concatenates: bool = False

    makes_new_tensor = True

    @property
    def sources(self) -> tuple[int, ...]:
        return self.source, self.other

    def shape(self, *shapes: Shape) -> Shape:
        left, right = shapes
        return (left[0], left[1] + right[1], *left[2:]) if self.concatenates else left

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        left, right = values
        return torch.cat([left, right], 1) if self.concatenates else left + right


@dataclass(frozen=True)
class Flatten(Step):
    """Several dimensions become one."""

    first: int
    last: int

    def shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        end = len(shape) if self.last == -1 else self.last + 1
        return (*shape[: self.first], prod(shape[self.first : end]), *shape[end:])

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        return torch.flatten(values[0], self.first, self.last)


@dataclass(frozen=True)
class Reshape(Step):
    """A value in the shape of another one, of which nothing but the shape is read."""

    like: int

    @property
    def sources(self) -> tuple[int, ...]:
        return self.source, self.like

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,)

    def shape(self, *shapes: Shape) -> Shape:
        return shapes[1]

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        return values[0].reshape(values[1].shape)


@dataclass(frozen=True)
class Block(Step):
    """A module of its own with a program of its own."""

    steps: tuple[Step, ...]
    result_shape: Shape

    name = "block"

    @property
    def overwrites(self) -> bool:
        """It may, as far as one can tell from the outside."""
        return True

    def shape(self, *shapes: Shape) -> Shape:
        return self.result_shape

    def build(self) -> nn.Module:
        return Network(self.steps)

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        return layer(*values)


@dataclass(frozen=True)
class Again(Step):
    """The layer of an earlier step, on another value or once more on the same."""

    step: int


def _compact(numbers: Sequence[int]) -> int | Sequence[int]:
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


_DEFAULTS = {
    "bias": None,
    "dilation": 1,
    "eps": 1e-5,
    "groups": 1,
    "momentum": 0.1,
    "output_padding": 0,
    "output_size": None,
    "padding": 0,
    "stride": 1,
    "training": False,
    "weight": None,
}


def _spelled(function: Any, arguments: dict[str, Any], positional: int) -> Tensor:
    """Calls with the first arguments by position and the others by name, defaults left out."""
    names = list(arguments)
    keywords = {
        name: arguments[name]
        for name in names[positional:]
        if not (isinstance(arguments[name], float | int | None) and arguments[name] == _DEFAULTS.get(name, ...))
    }
    return function(*(arguments[name] for name in names[:positional]), **keywords)


def _freeze(layer: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        if (parameter := getattr(layer, name)) is not None:
            parameter.requires_grad_(False)


# --- Modules: what a spec builds ---------------------------------------------------------------------------------


class Operands(nn.Module):
    """The tensors of a layer whose function is called instead of the layer itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in layer._buffers.items():
            self.register_buffer(name, buffer)


class Network(nn.Module):
    """A program as a module; the layer of step i is its child `conv<i>`, `norm<i>`, ..."""

    def __init__(self, steps: tuple[Step, ...], outputs: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.steps = steps
        self.outputs = outputs
        for index, step in enumerate(steps):
            if (layer := step.build()) is not None:
                self.add_module(f"{step.name}{index}", layer)

    def forward(self, input: Tensor) -> Any:
        values = [input]
        for index, step in enumerate(self.steps):
            owner = step.step if isinstance(step, Again) else index
            layer = getattr(self, f"{self.steps[owner].name}{owner}", None)
            values.append(self.steps[owner].call(layer, *(values[source] for source in step.sources)))
        if not self.outputs:
            return values[-1]
        return {"last": values[-1], "others": [values[output] for output in self.outputs]}


# --- Predictions: what follows from a spec -----------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A step with its qualified name and with values numbered through the whole architecture, blocks inlined."""

    step: Step
    name: str
    sources: tuple[int, ...]
    reads: tuple[int, ...]
    result: int


@dataclass(frozen=True)
class Expectation:
    """What the pass has to do: names of modules, "" for functions, in the order of the calls.

    Attributes:
        fused: Convolution and batch norm of each pair.
        skipped: Each batch norm that stays, with every reason there is for it.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, frozenset[SkipReason]]] = field(default_factory=list)


@dataclass(frozen=True)
class Architecture:
    """A whole model and its input."""

    input_shape: Shape
    steps: tuple[Step, ...]
    outputs: tuple[int, ...] = ()  # values that are returned besides the last one
    dtype: torch.dtype = torch.float64
    wide_norms: bool = False  # batch norms stay in float32
    zero_gamma: bool = False  # in one channel
    has_idle_pair: bool = False  # modules that are never called
    input_gradients: bool = True
    seed: int = 0

    def build(self) -> Network:
        """The model, every parameter and statistic of it random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = Network(self.steps, self.outputs)
            if self.has_idle_pair:
                network.idle = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2).eval())
        randomize_batchnorms(network.to(torch.float64), self.seed)
        for module in network.modules():
            is_norm = hasattr(module, "running_mean")
            if is_norm and self.zero_gamma and module.weight is not None:
                module.weight.data[0] = 0
            if not (is_norm and self.wide_norms):
                module._apply(lambda tensor: tensor.to(self.dtype), recurse=False)
            else:
                module._apply(lambda tensor: tensor.to(torch.float32), recurse=False)
        return network

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.input_shape, generator=generator, dtype=torch.float64).to(self.dtype)

    @property
    def layers(self) -> list[Step]:
        """The steps of all blocks, `Again` aside."""
        return list(_nested(self.steps))

    @property
    def uses_batch_statistics(self) -> bool:
        return any(isinstance(step, Norm) and step.uses_batch_statistics for step in self.layers)

    def expect(self, *, keeps_leaves: bool, include_training: bool = False) -> Expectation:
        """Predicts what becomes of each batch norm.

        Args:
            keeps_leaves: Whether blocks without a batch norm module stay one node, as with our tracer, unless a batch
                norm reads what they return; torch.fx's tracer walks through all blocks.
            include_training: As `transform` takes it.
        """
        leaves: set[str] = set()
        if keeps_leaves:
            leaves = {call.name for call in self._calls(frozenset(), with_blocks=True) if _is_leaf(call.step)}
        while opened := self._read_by_norms(frozenset(leaves)):
            leaves -= opened
        calls = self._calls(frozenset(leaves))
        expectation = Expectation()
        for position, call in enumerate(calls):
            if not isinstance(call.step, Norm):
                continue
            name = "" if call.step.is_function else call.name
            producers = [made for made in calls[:position] if made.result == call.sources[0]]
            reasons = set(_own_reasons(call.step, include_training))
            if not producers or not isinstance(producers[0].step, Conv):
                reasons.add(SkipReason.NOT_AFTER_CONVOLUTION)
            else:
                reasons |= self._reasons_between(calls, producers[0], call)
            if reasons:
                expectation.skipped.append((name, frozenset(reasons)))
            else:
                conv = producers[0]
                expectation.fused.append(("" if conv.step.is_function else conv.name, name))
        if self.has_idle_pair and keeps_leaves:  # torch.fx's tracer forgets modules that are not called
            expectation.skipped.append(("idle.1", frozenset({SkipReason.NOT_CALLED})))
        return expectation

    def _reasons_between(self, calls: list[Call], conv: Call, norm: Call) -> set[SkipReason]:
        reasons = set()
        others = [call for call in calls if call is not norm and conv.result in call.reads]
        if others or conv.result in self._returned(calls):
            reasons.add(SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE)
        if conv.step.batched_rank not in Norm.RANKS[norm.step.kind]:
            reasons.add(SkipReason.CHANNELS_DIFFER)
        between = calls[calls.index(conv) + 1 : calls.index(norm)]
        if any(call.step.overwrites for call in between):
            reasons.add(SkipReason.MODIFIED_IN_BETWEEN)
        return reasons

    def _read_by_norms(self, leaves: frozenset[str]) -> set[str]:
        """The leaves that hold a convolution module and return what a batch norm reads."""
        calls = self._calls(leaves)
        read = {call.sources[0] for call in calls if isinstance(call.step, Norm)}
        return {
            call.name
            for call in calls
            if isinstance(call.step, Block)
            and call.result in read
            and any(isinstance(step, Conv) and not step.is_function for step in _nested(call.step.steps))
        }

    def _calls(self, leaves: frozenset[str], with_blocks: bool = False) -> list[Call]:
        """All calls in the order in which they run; a block is one call if it is a leaf, else all that it calls."""
        calls: list[Call] = []
        numbers = count(1)

        def run(steps: tuple[Step, ...], prefix: str, given: int) -> list[int]:
            values = [given]
            for index, step in enumerate(steps):
                owner = step.step if isinstance(step, Again) else index
                layer = steps[owner]
                name = f"{prefix}{layer.name}{owner}"
                sources, reads = (
                    tuple(values[number] for number in numbers_)
                    for numbers_ in ((step.sources, step.sources) if step is not layer else (step.sources, step.reads))
                )
                is_walked_through = isinstance(layer, Block) and name not in leaves
                if is_walked_through:
                    inner = run(layer.steps, f"{name}.", sources[0])
                if not is_walked_through or with_blocks:
                    calls.append(Call(layer, name, sources, reads, next(numbers)))
                values.append(inner[-1] if is_walked_through else calls[-1].result)
            return values

        self_values = run(self.steps, "", 0)
        calls_returned = {self_values[output] for output in self.outputs} | {self_values[-1]}
        object.__setattr__(self, "_last_returned", calls_returned)
        return calls
