"""A row of the table of kinds: what is known of a class or function, and how a call of it is read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from torch import Tensor, nn

from convbn_fx.operands import Activation, Convolution

# Whatever a forward of torch.nn's convolutions and batch norms calls on itself: overridden on a class or patched on an
# instance, the forward is no longer the one that a row describes.
FORWARD_METHODS: Final = (
    "forward",
    "_conv_forward",
    "_output_padding",
    "_check_input_dim",
    "_check_non_zero_input_channels",
    "_call_impl",
)


class Methods:
    """The methods that the forward of a class consists of, as they were when this was made.

    Attributes:
        looked_up: The names that a forward looks up on its module. An attribute of the instance is found before those
            of its class, its parameters and its buffers.
    """

    def __init__(self, cls: type[nn.Module]) -> None:
        self._methods = tuple((name, getattr(cls, name)) for name in FORWARD_METHODS if hasattr(cls, name))
        self.looked_up = frozenset({*dict(self._methods), "weight", "bias", "running_mean", "running_var"})

    def are_those_of(self, cls: type) -> bool:
        """Whether another class, or the same one now, has the same methods."""
        for name, method in self._methods:  # noqa: SIM110 - at every call of every pair: no generator
            if getattr(cls, name, None) is not method:
                return False
        return True

    def overridden_in(self, cls: type) -> list[str]:
        """The names of the methods that another class has of its own."""
        return [name for name, method in self._methods if getattr(cls, name, None) is not method]


@dataclass(frozen=True)
class ConvolutionKind:
    """A row of the table: a module class or a function that is linear in a weight, plus a bias per output channel.

    Attributes:
        name: What the report calls it.
        operands: Given one call's arguments (for a module, the module first), returns `(input, Convolution)`.
        batched_rank: Number of dimensions of a batched input, None where only the weight's rank tells.
        plain: For a class, given the module, returns the class of a module with the same forward whose weight is a
            parameter, and the weight; None where there is no such class.
        methods: For a class, the methods that its forward consists of.
        reads: For a class, the attributes that `operands` reads, where it is one of the library's own.
        by_attribute: For a class, whether it may have a way of its own to a parameter or buffer: a property, say.
    """

    name: str
    operands: Callable[..., tuple[Any, Convolution[Any]]]
    batched_rank: int | None = None
    plain: Callable[[Any], tuple[type[nn.Module], Tensor]] | None = None
    methods: Methods | None = None
    reads: tuple[str, ...] = ()
    by_attribute: bool = False


@dataclass(frozen=True)
class BatchNormKind:
    """A row of the table: a module class or a function that normalises dimension 1 by running statistics in Eval mode.

    Attributes:
        name: What the report calls it.
        operands: For a module: given the module, returns its `BatchNorm`. For a function: given one call's
            arguments, returns `(input, training, BatchNorm)`.
        accepted_ranks: Numbers of dimensions of an input that the forward accepts; None for any from 2 on.
        output_index: Which element of a tuple the normalised tensor is; None where it is the only result.
        methods: For a class, the methods that its forward consists of.
        reads: For a class, the attributes that `operands` reads, where it is one of the library's own.
        by_attribute: For a class, whether it may have a way of its own to a parameter or buffer: a property, say.
        statistics: For a class, the attributes that are None where it normalises by the batch's own statistics.
        always_frozen: For a class, whether it normalises by running statistics in Train mode too.
        promotes: Whether its result is of the type that the input's and the statistics' promote to, where
            `F.batch_norm` gives the input's.
        epilogue: For a class, what its forward does after normalising (an activation, say), given the module, the
            normalised tensor, and what calls a module that is part of it.
    """

    name: str
    operands: Callable[..., Any]
    accepted_ranks: tuple[int, ...] | None = None
    output_index: int | None = None
    methods: Methods | None = None
    reads: tuple[str, ...] = ()
    by_attribute: bool = False
    statistics: tuple[str, ...] = ("running_mean", "running_var")
    always_frozen: bool = False
    promotes: bool = False
    epilogue: Callable[..., Tensor] | None = None

    def has_statistics(self, module: nn.Module) -> bool:
        """Whether the module has running statistics to normalise by in Eval mode."""
        buffers = {} if self.by_attribute else module._buffers
        for name in self.statistics:  # noqa: SIM110 - at every call of every pair: no generator
            if buffers.get(name) is None and getattr(module, name) is None:
                return False
        return True

    def accepts(self, rank: int) -> bool:
        """Whether an input of `rank` dimensions is one that the forward accepts."""
        return rank >= 2 if self.accepted_ranks is None else rank in self.accepted_ranks


@dataclass(frozen=True)
class ActivationKind:
    """A row of the table: a module class or a function that is one of the activations that can save less.

    Attributes:
        name: What the report calls it.
        operands: For a module: given the module, returns its `Activation`; None where it is such that its derivative
            cannot be told. For a function: given one call's arguments, returns `(input, Activation | None)`.
        methods: For a class, the methods that its forward consists of.
        reads: For a class, the attributes that `operands` reads, where it is one of the library's own.
        by_attribute: For a class, whether it may have a way of its own to a parameter or buffer: a property, say.
    """

    name: str
    operands: Callable[[Any], Activation | None]
    methods: Methods | None = None
    reads: tuple[str, ...] = ()
    by_attribute: bool = False


Row = TypeVar("Row", ConvolutionKind, BatchNormKind, ActivationKind)
