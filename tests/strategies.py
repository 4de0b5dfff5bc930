"""Random architectures: what a spec is, builds and predicts, and the strategies that draw it.

A spec is a straight-line program of frozen dataclasses. Value 0 is the input, step i computes value i + 1 from earlier
values, and the last value is returned. Layers belong to the step that calls them first; `Again` calls one once more.

Strategies pick each step from those that fit the values there are, so that no draw is ever discarded. Predictions are
made from the spec alone, by following its values: they share nothing with the matcher.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from convbn_fx import SkipReason
from convbn_fx.testing import randomize_batchnorms

Shape = tuple[int, ...]

LARGEST_SIZE = 8  # of a channel or spatial dimension that a convolution reads or makes
LARGEST_INPUT = 800  # elements that a convolution reads
#: Before version 2.13 PyTorch takes no eps of 0.
SMALLEST_EPS = 0.0 if torch.__version__ >= (2, 13) else 1e-12
#: From this eps on a batch norm may use the statistics of a batch of two without magnifying rounding errors.
SMALLEST_TRAINING_EPS = 1e-3
#: Numbers of dimensions that each kind of batch norm takes.
NORM_RANKS: dict[str, tuple[int, ...]] = {
    "BatchNorm1d": (2, 3),
    "BatchNorm2d": (4,),
    "BatchNorm3d": (5,),
    "SyncBatchNorm": (2, 3, 4, 5),
    "F.batch_norm": (2, 3, 4, 5),
    "torch.batch_norm": (2, 3, 4, 5),
}


# --- Steps: what a spec consists of ------------------------------------------------------------------------------


_step = dataclass(frozen=True, repr=False)


def _brief(spec: Any, defaults: dict[str, Any]) -> str:
    """The call that makes the spec, without the arguments that are defaults."""
    given = {
        name: getattr(spec, name) for name, default in defaults.items() if getattr(spec, name) != default
    }
    return f"{type(spec).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


class Brief:
    """A dataclass whose repr leaves out what is a default."""

    def __repr__(self) -> str:
        return _brief(self, {each.name: each.default for each in fields(self)})  # type: ignore[arg-type]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print the defaults too


@_step
class Step(Brief):
    """One line of a program: a layer or a function of earlier values."""

    source: int

    # Without annotations, hence no fields.
    name = ""
    makes_new_tensor = False  # that its own backward pass does not read

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.source,)

    @property
    def reads(self) -> tuple[int, ...]:
        """The sources of which it reads more than the shape."""
        return self.sources

    @property
    def may_write(self) -> bool:
        """Whether it changes a tensor in place, as far as is known."""
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

    def __repr__(self) -> str:
        return _brief(self, self._field_defaults)


@_step
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
        """How the kernel is laid, in the order in which functions take it."""
        names = ("stride", "padding", "dilation", "groups")
        if self.transposed:
            names = ("stride", "padding", "output_padding", "groups", "dilation")
        given = {"groups": self.groups, "padding": self.padding}
        lines = zip(*self.geometry, strict=True)
        laid = dict(zip(Geometry._fields, map(_compact, lines), strict=True))
        return {name: given.get(name) or laid[name] for name in names}

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


@_step
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

    @property
    def is_function(self) -> bool:
        return "." in self.kind

    @property
    def uses_batch_statistics(self) -> bool:
        return self.training or not self.tracked

    @property
    def may_write(self) -> bool:
        return self.uses_batch_statistics

    @staticmethod
    def can_read(shape: Shape) -> bool:
        """Whether there is a batch norm for tensors of this shape, with two values per channel at least."""
        return 2 <= len(shape) <= 5 and prod(shape) >= 2 * shape[1]

    def fits(self, shape: Shape, first: Shape) -> bool:
        return len(shape) in NORM_RANKS[self.kind] and shape[1] == self.channels and self.can_read(shape)

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


#: Smooth ones: at a kink, rounding errors would decide what a gradient is.
ACTIVATIONS: dict[str, tuple[type[nn.Module], Callable[..., Tensor]]] = {
    "ELU": (nn.ELU, F.elu),
    "SiLU": (nn.SiLU, F.silu),
    "Mish": (nn.Mish, F.mish),
}


@_step
class Activation(Step):
    """An activation."""

    form: str = "module"  # or "function" or "method"
    in_place: bool = False
    kind: str = "ELU"

    name = "activation"

    @property
    def may_write(self) -> bool:
        return self.in_place or self.form != "method"

    def build(self) -> nn.Module | None:
        return ACTIVATIONS[self.kind][0](inplace=self.in_place) if self.form == "module" else None

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        (input,) = values
        if self.form == "module":
            return layer(input)
        if self.form == "function":
            return ACTIVATIONS[self.kind][1](input, inplace=self.in_place)
        return input.tanh_() if self.in_place else input.tanh()


@_step
class Combine(Step):
    """A residual addition, a concatenation of channels, or a product with a gate."""

    other: int
    concatenates: bool = False
    gates: bool = False

    makes_new_tensor = True

    @property
    def sources(self) -> tuple[int, ...]:
        return self.source, self.other

    def shape(self, *shapes: Shape) -> Shape:
        left, right = shapes
        return (left[0], left[1] + right[1], *left[2:]) if self.concatenates else left

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        left, right = values
        if self.gates:
            return left * right.sigmoid()
        return torch.cat([left, right], 1) if self.concatenates else left + right


@_step
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


@_step
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


@_step
class Block(Step):
    """A module of its own with a program of its own."""

    steps: tuple[Step, ...]
    result_shape: Shape

    name = "block"
    may_write = True

    @property
    def ends_in_convolution(self) -> bool:
        last = self.steps[-1]
        layer = self.steps[last.step] if isinstance(last, Again) else last
        return layer.ends_in_convolution if isinstance(layer, Block) else isinstance(layer, Conv)

    def shape(self, *shapes: Shape) -> Shape:
        return self.result_shape

    def build(self) -> nn.Module:
        return Network(self.steps)

    def call(self, layer: Any, *values: Tensor) -> Tensor:
        return layer(*values)


@_step
class Again(Step):
    """The layer of an earlier step, on another value or once more on the same."""

    step: int


def _compact(numbers: Sequence[int]) -> int | Sequence[int]:
    """One number for all dimensions if it will do."""
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
        if not (
            isinstance(arguments[name], float | int | None) and arguments[name] == _DEFAULTS.get(name, ...)
        )
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
    """A step with its qualified name and with values numbered through the whole architecture."""

    step: Step
    name: str
    sources: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()
    result: int = -1

    @property
    def module(self) -> str:
        """The qualified name of what is called, "" for a function."""
        return "" if self.step.is_function else self.name


@dataclass(frozen=True)
class Expectation:
    """What the pass has to do, in the order of the calls.

    Attributes:
        fused: Convolution and batch norm of each pair.
        skipped: Each batch norm that stays, with every reason there is for it.
    """

    fused: list[tuple[Call, Call]] = field(default_factory=list)
    skipped: list[tuple[Call, frozenset[SkipReason]]] = field(default_factory=list)

    @property
    def places(self) -> dict[int, int]:
        """Where each fused batch norm runs, both by results."""
        return {norm.result: conv.result for conv, norm in self.fused}


@dataclass(frozen=True)
class Architecture:
    """A whole model and its input."""

    input_shape: Shape
    steps: tuple[Step, ...]
    outputs: tuple[int, ...] = ()  # values that are returned besides the last one
    dtype: torch.dtype = torch.float64
    wide_norms: bool = False  # batch norms stay in float32
    zero_gamma: bool = False  # in one channel of every batch norm
    has_idle_pair: bool = False  # modules that are never called
    input_gradients: bool = True
    seed: int = 0

    @property
    def layers(self) -> list[Step]:
        """The steps, those of blocks too."""
        return list(_nested(self.steps))

    @property
    def uses_batch_statistics(self) -> bool:
        return any(isinstance(step, Norm) and step.uses_batch_statistics for step in self.layers)

    def build(self) -> Network:
        """The model, every parameter and statistic of it random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = Network(self.steps, self.outputs)
            if self.has_idle_pair:
                network.idle = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2).eval())
        randomize_batchnorms(network.double(), self.seed)
        for module in network.modules():
            is_norm = hasattr(module, "running_mean")
            if is_norm and self.zero_gamma and module.weight is not None:
                module.weight.data[0] = 0
            if not any(module.children()):
                module.to(torch.float32 if is_norm and self.wide_norms else self.dtype)
        return network

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.input_shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def expect(self, *, keeps_leaves: bool, include_training: bool = False) -> Expectation:
        """Predicts what becomes of each batch norm.

        Args:
            keeps_leaves: Whether blocks without a batch norm stay one node, as with our tracer, unless a batch
                norm reads what they return; torch.fx's tracer walks through all blocks.
            include_training: As `transform` takes it.
        """
        program = _inlined(self, self._leaves() if keeps_leaves else frozenset())
        expectation = Expectation()
        while True:  # a fused batch norm runs where its convolution is, and so no longer between others
            fused = []
            expectation.skipped.clear()
            for norm in program.calls:
                if not isinstance(norm.step, Norm) or norm.result in expectation.places:
                    continue
                conv = next((call for call in program.calls if call.result == norm.sources[0]), None)
                reasons = _reasons_in_itself(norm.step, include_training)
                if conv is None or not isinstance(conv.step, Conv):
                    reasons.add(SkipReason.NOT_AFTER_CONVOLUTION)
                else:
                    reasons |= _reasons_between(conv, norm, program, expectation.places)
                if reasons:
                    expectation.skipped.append((norm, frozenset(reasons)))
                else:
                    fused.append((conv, norm))
            if not fused:
                break
            expectation.fused.extend(fused)
        if self.has_idle_pair and keeps_leaves:  # torch.fx's tracer forgets modules that are not called
            idle = Call(Norm(0, channels=2, kind="BatchNorm2d"), "idle.1")
            expectation.skipped.append((idle, frozenset({SkipReason.NOT_CALLED})))
        return expectation

    def _leaves(self) -> frozenset[str]:
        """The blocks that our tracer does not walk through."""
        blocks = dict(_blocks(self.steps))
        leaves = {
            name
            for name, block in blocks.items()
            if not any(isinstance(s, Norm) for s in _nested(block.steps))
        }
        while True:
            calls = _inlined(self, frozenset(leaves)).calls
            read = {call.sources[0] for call in calls if isinstance(call.step, Norm)}
            opened = {
                call.name
                for call in calls
                if call.name in leaves and call.result in read and _holds_convolution_module(call.step)
            }
            if not opened:
                return frozenset(leaves)
            leaves -= opened


def _reasons_in_itself(norm: Norm, include_training: bool) -> set[SkipReason]:
    reasons = set()
    if norm.training and (norm.is_function or not include_training):
        reasons.add(SkipReason.TRAINING_MODE)
    if not norm.tracked:
        reasons.add(SkipReason.NO_RUNNING_STATISTICS)
    return reasons


def _reasons_between(
    conv: Call, norm: Call, program: "Program", places: Mapping[int, int]
) -> set[SkipReason]:
    reasons = set()
    readers = [call for call in program.calls if conv.result in call.reads]
    if readers != [norm] or conv.result in program.returned:
        reasons.add(SkipReason.CONVOLUTION_OUTPUT_USED_ELSEWHERE)
    ranks, channels = NORM_RANKS[norm.step.kind], norm.step.channels
    if conv.step.rank + 2 not in ranks or conv.step.out_channels != channels:
        reasons.add(SkipReason.CHANNELS_DIFFER)
    between = [
        call for call in program.calls if conv.result < places.get(call.result, call.result) < norm.result
    ]
    if any(call.step.may_write for call in between):
        reasons.add(SkipReason.MODIFIED_IN_BETWEEN)
    return reasons


class Program(NamedTuple):
    """All calls in the order in which they run, and the values that the model returns."""

    calls: list[Call]
    returned: set[int]


def _inlined(architecture: Architecture, leaves: frozenset[str]) -> Program:
    """The program with the calls of blocks in place of the blocks; those in `leaves` are one call."""
    calls: list[Call] = []

    def run(steps: tuple[Step, ...], prefix: str, given: int) -> list[int]:
        values = [given]
        for index, step in enumerate(steps):
            owner = step.step if isinstance(step, Again) else index
            layer, name = steps[owner], f"{prefix}{steps[owner].name}{owner}"
            sources, reads = (tuple(values[value] for value in place) for place in (step.sources, step.reads))
            if isinstance(layer, Block) and name not in leaves:
                values.append(run(layer.steps, f"{name}.", sources[0])[-1])
            else:
                values.append(len(calls) + 1)
                calls.append(Call(layer, name, sources, reads, values[-1]))
        return values

    values = run(architecture.steps, "", 0)
    return Program(calls, {values[output] for output in (*architecture.outputs, -1)})


def _nested(steps: Iterable[Step]) -> Iterator[Step]:
    for step in steps:
        yield step
        if isinstance(step, Block):
            yield from _nested(step.steps)


def _blocks(steps: Iterable[Step], prefix: str = "") -> Iterator[tuple[str, Block]]:
    for index, step in enumerate(steps):
        if isinstance(step, Block):
            name = f"{prefix}{step.name}{index}"
            yield name, step
            yield from _blocks(step.steps, f"{name}.")


def _holds_convolution_module(block: Block) -> bool:
    return any(isinstance(step, Conv) and not step.is_function for step in _nested(block.steps))


# --- Strategies --------------------------------------------------------------------------------------------------


class _Scope:
    """The values that there are while a program is drawn."""

    def __init__(self, shape: Shape, depth: int, batch_statistics: bool) -> None:
        self.depth = depth
        self.batch_statistics = batch_statistics
        self.steps: list[Step] = []
        self.shapes: list[Shape] = [shape]
        self.unread = {0}
        self.convolved: set[int] = set()  # made by convolutions
        self.unsaved = set() if depth else {0}  # not kept for the backward pass of what made them

    def add(self, step: Step) -> None:
        layer = self.steps[step.step] if isinstance(step, Again) else step
        self.steps.append(step)
        self.shapes.append(layer.shape(*(self.shapes[source] for source in step.sources)))
        value = len(self.steps)
        self.unread = self.unread - set(step.sources) | {value}
        if layer.makes_new_tensor:
            self.unsaved.add(value)
        if isinstance(layer, Conv) or (isinstance(layer, Block) and layer.ends_in_convolution):
            self.convolved.add(value)

    def select(self, condition: Callable[[Shape], bool] = bool) -> list[int]:
        """The values whose shape fulfils a condition."""
        return [value for value, shape in enumerate(self.shapes) if condition(shape)]


def _sources(scope: _Scope, condition: Callable[[Shape], bool] = bool) -> st.SearchStrategy[int]:
    """A value whose shape fulfils the condition: often the last one, rarely one that a batch norm could be fused to."""
    values = scope.select(condition)
    others = [value for value in values if value not in scope.convolved]
    return st.sampled_from([*values[-1:] * len(values), *reversed(values), *others * 4])


def _norm_sources(scope: _Scope, condition: Callable[[Shape], bool]) -> st.SearchStrategy[int]:
    """The same for a batch norm: mostly the output of a convolution that nothing has read yet."""
    values = scope.select(condition)
    waiting = [value for value in values if value in scope.convolved & scope.unread]
    return st.sampled_from([*reversed(values), *waiting * (1 + 4 * len(values))])


@cache
def _geometries(size: int, transposed: bool, padding: str | None, output_size: bool) -> list[Geometry]:
    """All that can be laid on a dimension of that size, the simplest first."""

    def is_possible(line: Geometry) -> bool:
        most_output_padding = line.stride if output_size else max(line.stride, line.dilation)
        return (
            (padding is None or line.padding == 0)
            and line.output_padding < (most_output_padding if transposed else 1)
            and (line.stride == 1 if padding == "same" else 1 <= line.size(size, transposed) <= LARGEST_SIZE)
        )

    lines = map(Geometry._make, product((1, 2, 3, 4), (1, 2), (1, 2), (0, 1, 2), (0, 1)))
    return sorted(filter(is_possible, lines), key=sum)


def _convolution_ranks(shape: Shape) -> list[int]:
    """Numbers of spatial dimensions that a convolution on such a tensor can have, as often as they are likely."""
    batched, unbatched = (
        [rank]
        if 1 <= rank <= 3 and max(shape[-rank - 1 :]) <= LARGEST_SIZE and prod(shape) <= LARGEST_INPUT
        else []
        for rank in (len(shape) - 2, len(shape) - 1)
    )
    return [*batched * 12, *unbatched, *[0] * (18 if len(shape) == 2 else 1)]  # 0 is a linear layer


def _spatial_paddings(sizes: Shape, geometry: Sequence[Geometry], padding: str | None) -> list[str]:
    """The padding modes that can fill what is padded."""
    pads = [line.reach - line.reach // 2 if padding == "same" else line.padding for line in geometry]
    modes = ["zeros", "zeros", "zeros", "replicate"]
    if all(pad <= size for pad, size in zip(pads, sizes, strict=True)):
        modes.append("circular")
    if all(pad < size for pad, size in zip(pads, sizes, strict=True)):
        modes.append("reflect")
    return modes


_frozen = st.sampled_from([(), ("weight",), ("bias",), ("weight", "bias")])


@st.composite
def _conv_steps(draw: st.DrawFn, scope: _Scope) -> Conv:
    source = draw(_sources(scope))
    shape = scope.shapes[source]
    rank = draw(st.sampled_from(_convolution_ranks(shape)))
    is_function = draw(st.booleans())
    given = {
        "source": source,
        "is_function": is_function,
        "positional": draw(st.integers(0, 9 if is_function else 1)),
        "bias": draw(st.booleans()),
        "frozen": draw(_frozen),
    }
    if rank == 0:
        return Conv(in_channels=shape[-1], out_channels=draw(st.integers(1, LARGEST_SIZE)), **given)
    channels, sizes = shape[-rank - 1], shape[-rank:]
    transposed = draw(st.booleans())
    output_size = transposed and not is_function and draw(st.booleans())
    padding = None if transposed else draw(st.sampled_from([None, "same", "valid"]))
    geometry = tuple(
        draw(st.sampled_from(_geometries(size, transposed, padding, output_size))) for size in sizes
    )
    groups = draw(st.sampled_from([count for count in range(1, channels + 1) if channels % count == 0]))
    mode = "zeros"
    if not (transposed or is_function):
        mode = draw(st.sampled_from(_spatial_paddings(sizes, geometry, padding)))
    conv = Conv(
        in_channels=channels,
        out_channels=groups * draw(st.integers(1, LARGEST_SIZE // groups)),
        geometry=geometry,
        transposed=transposed,
        groups=groups,
        padding=padding,
        padding_mode=mode,
        **given,
    )
    return replace(conv, output_size=conv.shape(shape)[-rank:]) if output_size else conv


@st.composite
def _norm_steps(draw: st.DrawFn, scope: _Scope) -> Norm:
    source = draw(_norm_sources(scope, Norm.can_read))
    shape = scope.shapes[source]
    kinds = [kind for kind, ranks in NORM_RANKS.items() if len(shape) in ranks]
    kind = draw(st.sampled_from([*kinds[:1] * 3, *kinds[1:]]))
    is_function = "." in kind
    eps = draw(st.sampled_from([1e-5, 1e-5, SMALLEST_TRAINING_EPS, 0.5, SMALLEST_EPS]))
    may_use_batch = scope.batch_statistics and eps >= SMALLEST_TRAINING_EPS
    return Norm(
        source,
        channels=shape[1],
        kind=kind,
        affine=draw(st.sampled_from([("weight", "bias"), (), ("weight",), ("bias",)])),
        tracked=is_function or not may_use_batch or draw(st.integers(0, 4)) > 0,
        momentum=0.3 if is_function else draw(st.sampled_from([0.1, 0.3, None])),
        eps=eps,
        # a SyncBatchNorm trains on accelerators only
        training=may_use_batch and kind != "SyncBatchNorm" and draw(st.booleans()),
        positional=draw(st.integers(0, 8 if is_function else 1)),
        frozen=draw(_frozen),
    )


@st.composite
def _activation_steps(draw: st.DrawFn, scope: _Scope) -> Activation:
    source = draw(_sources(scope))
    form = draw(st.sampled_from(["module", "function", "method"]))
    in_place = source in scope.unread & scope.unsaved and draw(st.booleans())
    return Activation(source, form, in_place, draw(st.sampled_from(list(ACTIVATIONS))))


@st.composite
def _combine_steps(draw: st.DrawFn, scope: _Scope) -> Combine:
    left = draw(_sources(scope))
    shape = scope.shapes[left]
    joinable = scope.select(lambda other: len(other) > 1 and (other[0], *other[2:]) == (shape[0], *shape[2:]))
    joinable = [value for value in joinable if shape[1] + scope.shapes[value][1] <= LARGEST_SIZE]
    concatenates = bool(joinable) and draw(st.booleans())
    right = draw(st.sampled_from(joinable if concatenates else scope.select(lambda other: other == shape)))
    return Combine(left, right, concatenates, gates=not concatenates and draw(st.booleans()))


@st.composite
def _flatten_steps(draw: st.DrawFn, scope: _Scope) -> Flatten:
    source = draw(_sources(scope, lambda shape: len(shape) > 2))
    return Flatten(source, *draw(st.sampled_from([(1, -1), (0, 1), (1, 2)])))


@st.composite
def _reshape_steps(draw: st.DrawFn, scope: _Scope) -> Reshape:
    source = draw(_sources(scope))
    size = prod(scope.shapes[source])
    return Reshape(source, draw(st.sampled_from(scope.select(lambda shape: prod(shape) == size))))


@st.composite
def _again_steps(draw: st.DrawFn, scope: _Scope) -> Again:
    layers = [index for index, step in enumerate(scope.steps) if isinstance(step, _LAYERS)]
    step = draw(st.sampled_from(layers[::-1]))
    layer = scope.steps[step]
    sources = _norm_sources if isinstance(layer, Norm) else _sources
    first = scope.shapes[layer.source]
    return Again(draw(sources(scope, lambda shape: layer.fits(shape, first))), step)


@st.composite
def _block_steps(draw: st.DrawFn, scope: _Scope) -> Block:
    source = draw(_sources(scope))
    inner = _Scope(scope.shapes[source], scope.depth + 1, scope.batch_statistics)
    _fill(draw, inner, 1, 4)
    return Block(source, tuple(inner.steps), inner.shapes[-1])


_LAYERS = (Conv, Norm, Block)


def _choices(scope: _Scope) -> list[Callable[[_Scope], st.SearchStrategy[Step]]]:
    """The strategies of the steps that are possible now, as often as they are likely."""
    choices = [_conv_steps] * 12
    if scope.select(Norm.can_read):
        choices += [_norm_steps] * (40 if scope.convolved & scope.unread else 2)
    choices += [_activation_steps, _activation_steps, _combine_steps, _combine_steps, _reshape_steps]
    if any(isinstance(step, _LAYERS) for step in scope.steps):
        choices += [_again_steps] * 5
    if scope.select(lambda shape: len(shape) > 2):
        choices.append(_flatten_steps)
    if scope.depth < 2:
        choices += [_block_steps] * 2
    return choices


def _fill(draw: st.DrawFn, scope: _Scope, least: int, most: int) -> None:
    for _ in range(draw(st.integers(least, most))):
        scope.add(draw(draw(st.sampled_from(_choices(scope)))(scope)))


@st.composite
def architectures(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    batch_statistics: bool = True,
) -> Architecture:
    """Models of 2 to 8 steps, on inputs of 0 to 3 spatial dimensions.

    Args:
        dtypes: What the model computes in.
        batch_statistics: Whether batch norms may be in Train mode or without running statistics.
    """
    largest = draw(st.sampled_from([(6, 6), (8,), (4, 4, 4), (6, 6), (8,), ()]))
    shape = (
        draw(st.integers(2, 3)),
        draw(st.integers(1, 6)),
        *(draw(st.integers(1, size)) for size in largest),
    )
    scope = _Scope(shape, 0, batch_statistics)
    _fill(draw, scope, 2, 8)
    value = st.integers(0, len(scope.steps))
    dtype = draw(st.sampled_from(dtypes))
    return Architecture(
        shape,
        tuple(scope.steps),
        outputs=draw(st.just(()) | st.just(()) | st.tuples(value) | st.tuples(value, value)),
        dtype=dtype,
        wide_norms=dtype == torch.bfloat16 and draw(st.booleans()),
        zero_gamma=draw(st.booleans()),
        has_idle_pair=draw(st.integers(0, 3)) == 3,
        input_gradients=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )
