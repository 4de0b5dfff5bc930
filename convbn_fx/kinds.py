"""The table of kinds: which modules and functions are convolutions and batch norms, and where their operands lie.

A *kind* knows how to read one call, of a module or of a function, into the normal form of
[`operands`][convbn_fx.operands], so that nothing behind this file needs to know which spelling a model used.

A class is in the table by identity. A subclass is known as long as it overrides nothing that the forward consists of.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType, FunctionType
from typing import Any, Final, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from convbn_fx import libraries
from convbn_fx.operands import (
    AsAttributes,
    BatchNorm,
    Convolution,
    batch_norm_call,
    batch_norm_module,
    batch_norm_no_training_call,
    conv_call,
    conv_module,
    conv_transpose_call,
    conv_transpose_module,
    convolution_call,
    functional_batch_norm_call,
    linear_call,
    linear_module,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvolutionKind:
    """A row of the table: a module class or a function that is linear in a weight, plus a bias per output channel.

    Attributes:
        name: What the report calls it.
        operands: Given one call's arguments (for a module, the module first), returns `(input, Convolution)`.
        batched_rank: Number of dimensions of a batched input, None where only the weight's rank tells.
        plain: For a class, given the module, returns the class of a module with the same forward whose weight is a
            parameter, and the weight; None where there is no such class.
        methods: For a class, the methods its forward consists of, as they were when it was registered.
        reads: For a class, the attributes that `operands` reads, where it is one of the library's own.
        by_attribute: For a class, whether it may have a way of its own to a parameter or buffer: a property, say.
    """

    name: str
    operands: Callable[..., tuple[Any, Convolution]]
    batched_rank: int | None = None
    plain: Callable[[Any], tuple[type[nn.Module], Tensor]] | None = None
    methods: tuple[tuple[str, object], ...] = ()
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
        methods: For a class, the methods its forward consists of, as they were when it was registered.
        reads: For a class, the attributes that `operands` reads, where it is one of the library's own.
        by_attribute: For a class, whether it may have a way of its own to a parameter or buffer: a property, say.
        statistics: For a class, the attributes that are None where it normalises by the batch's own statistics.
        always_frozen: For a class, whether it normalises by running statistics in Train mode too.
        promotes: Whether its result is of the type that the input's and the statistics' promote to, where
            `F.batch_norm` gives the input's.
        epilogue: For a class, what its forward does after normalising (an activation, say), given the module and the
            normalised tensor.
    """

    name: str
    operands: Callable[..., Any]
    accepted_ranks: tuple[int, ...] | None = None
    output_index: int | None = None
    methods: tuple[tuple[str, object], ...] = ()
    reads: tuple[str, ...] = ()
    by_attribute: bool = False
    statistics: tuple[str, ...] = ("running_mean", "running_var")
    always_frozen: bool = False
    promotes: bool = False
    epilogue: Callable[[Any, Tensor], Tensor] | None = None

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


Row = TypeVar("Row", ConvolutionKind, BatchNormKind)

# --- The table ---------------------------------------------------------------------------------------------------

# Whatever a forward of torch.nn's convolutions and batch norms calls on itself: overridden on a class or patched on an
# instance, the forward is no longer the one that this table describes.
_FORWARD_METHODS: Final = (
    "forward",
    "_conv_forward",
    "_output_padding",
    "_check_input_dim",
    "_check_non_zero_input_channels",
    "_call_impl",
)


def _methods(cls: type[nn.Module]) -> tuple[tuple[str, object], ...]:
    return tuple((name, getattr(cls, name)) for name in _FORWARD_METHODS if hasattr(cls, name))


def _is_as_shipped(cls: type[nn.Module]) -> bool:
    """Whether nobody had replaced a method of a torch.nn class before this file was imported."""
    functions = [method for _, method in _methods(cls) if isinstance(method, FunctionType)]
    return all(function.__module__.startswith("torch.nn.modules.") for function in functions)


def _own_weight(cls: type[nn.Module], module: Any) -> tuple[type[nn.Module], Tensor]:
    return cls, module.weight


_PARAMETERS: Final = ("weight", "bias")
_CONVOLUTION: Final = (*_PARAMETERS, "stride", "padding", "dilation", "groups")
_TRANSPOSED: Final = (*_CONVOLUTION, "kernel_size", "output_padding")
_BATCH_NORM: Final = (*_PARAMETERS, "running_mean", "running_var", "eps")

# Each row: the class, how its call is read, the rank of a batched input, and the attributes that are read.
_CONVOLUTION_ROWS: dict[type[nn.Module], ConvolutionKind] = {
    cls: ConvolutionKind(
        cls.__name__, operands, batched_rank, partial(_own_weight, cls), _methods(cls), reads
    )
    for cls, operands, batched_rank, reads in (
        (nn.Conv1d, conv_module("conv1d"), 3, (*_CONVOLUTION, "padding_mode")),
        (nn.Conv2d, conv_module("conv2d"), 4, (*_CONVOLUTION, "padding_mode")),
        (nn.Conv3d, conv_module("conv3d"), 5, (*_CONVOLUTION, "padding_mode")),
        (nn.ConvTranspose1d, conv_transpose_module("conv_transpose1d", 1), 3, _TRANSPOSED),
        (nn.ConvTranspose2d, conv_transpose_module("conv_transpose2d", 2), 4, _TRANSPOSED),
        (nn.ConvTranspose3d, conv_transpose_module("conv_transpose3d", 3), 5, _TRANSPOSED),
        (nn.Linear, linear_module, 2, _PARAMETERS),
    )
    if _is_as_shipped(cls)
}

_BATCH_NORM_ROWS: dict[type[nn.Module], BatchNormKind] = {
    cls: BatchNormKind(
        cls.__name__, batch_norm_module, accepted_ranks, methods=_methods(cls), reads=_BATCH_NORM
    )
    for cls, accepted_ranks in (
        (nn.BatchNorm1d, (2, 3)),
        (nn.BatchNorm2d, (4,)),
        (nn.BatchNorm3d, (5,)),
        (nn.SyncBatchNorm, None),
    )
    if _is_as_shipped(cls)
}

# Each row: the function, its name in reports, how its call is read, and the rank of a batched input.
CONVOLUTION_FUNCTIONS: Final[dict[object, ConvolutionKind]] = {
    function: ConvolutionKind(name, operands, batched_rank)
    for function, name, operands, batched_rank in (
        (torch.conv1d, "conv1d", conv_call("conv1d"), 3),
        (torch.conv2d, "conv2d", conv_call("conv2d"), 4),
        (torch.conv3d, "conv3d", conv_call("conv3d"), 5),
        (torch.conv_transpose1d, "conv_transpose1d", conv_transpose_call("conv_transpose1d"), 3),
        (torch.conv_transpose2d, "conv_transpose2d", conv_transpose_call("conv_transpose2d"), 4),
        (torch.conv_transpose3d, "conv_transpose3d", conv_transpose_call("conv_transpose3d"), 5),
        (torch.convolution, "convolution", convolution_call, None),
        (F.linear, "linear", linear_call, 2),
        (aten.conv1d.default, "aten.conv1d", conv_call("conv1d"), 3),
        (aten.conv1d.padding, "aten.conv1d", conv_call("conv1d"), 3),
        (aten.conv2d.default, "aten.conv2d", conv_call("conv2d"), 4),
        (aten.conv2d.padding, "aten.conv2d", conv_call("conv2d"), 4),
        (aten.conv3d.default, "aten.conv3d", conv_call("conv3d"), 5),
        (aten.conv3d.padding, "aten.conv3d", conv_call("conv3d"), 5),
        (aten.conv_transpose1d.default, "aten.conv_transpose1d", conv_transpose_call("conv_transpose1d"), 3),
        (aten.conv_transpose2d.input, "aten.conv_transpose2d", conv_transpose_call("conv_transpose2d"), 4),
        (aten.conv_transpose3d.input, "aten.conv_transpose3d", conv_transpose_call("conv_transpose3d"), 5),
        (aten.convolution.default, "aten.convolution", convolution_call, None),
        (aten.linear.default, "aten.linear", linear_call, 2),
    )
}

# Each row: the function, its name in reports, how its call is read, and where its output is.
BATCH_NORM_FUNCTIONS: Final[dict[object, BatchNormKind]] = {
    function: BatchNormKind(name, operands, output_index=output_index)
    for function, name, operands, output_index in (
        (F.batch_norm, "batch_norm", functional_batch_norm_call, None),
        (torch.batch_norm, "batch_norm", batch_norm_call, None),
        (torch.native_batch_norm, "native_batch_norm", batch_norm_call, 0),
        (aten.batch_norm.default, "aten.batch_norm", batch_norm_call, None),
        (aten.native_batch_norm.default, "aten.native_batch_norm", batch_norm_call, 0),
        (aten.cudnn_batch_norm.default, "aten.cudnn_batch_norm", batch_norm_call, 0),
        (aten._native_batch_norm_legit.default, "aten._native_batch_norm_legit", batch_norm_call, 0),
        (
            aten._native_batch_norm_legit_no_training.default,
            "aten._native_batch_norm_legit_no_training",
            batch_norm_no_training_call,
            0,
        ),
        (
            aten._batch_norm_no_update.default,
            "aten._batch_norm_no_update",
            batch_norm_no_training_call,
            0,
        ),
    )
}


# --- Look-ups ----------------------------------------------------------------------------------------------------


#: Attribute of the classes that `tune` generates: the class that one was generated from.
TUNED_FROM: Final = "_convbn_fx_tuned_from"


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class whose forward a module has: that before parametrisation, and before `tune`."""
    cls = type(module)
    if "parametrizations" in module._modules:
        cls = parametrize.type_before_parametrizations(module)
    original: type[nn.Module] = vars(cls).get(TUNED_FROM, cls)
    return original


def convolution_kind(module: nn.Module) -> ConvolutionKind | None:
    """The row of a convolution module, or None if its forward is not one that the table knows.

    Parametrised modules count as what they were before; lazy ones as what they become, once initialised. A subclass
    of a class in the table is known as long as it overrides nothing that the forward consists of. An instance or a
    class whose methods were replaced is not.
    """
    return _row_of(module, _CONVOLUTION_CLASSES)


def batch_norm_kind(module: nn.Module) -> BatchNormKind | None:
    """The row of a batch-norm module, or None if its forward is not one that the table knows."""
    return _row_of(module, _BATCH_NORM_CLASSES)


def _row_of(module: nn.Module, table: "_Classes[Row]") -> Row | None:
    cls = class_of(module)
    row = table.row(cls)
    if row is None:
        return None
    attributes = vars(module)
    if not _LOOKED_UP.isdisjoint(attributes) and _is_patched(attributes):
        return None
    for name, method in row.methods:  # at every call of every pair: no generator
        if getattr(cls, name) is not method:
            return None
    return row


# Names that a forward looks up on its module. An attribute of the instance is found before those of its class, its
# parameters and its buffers.
_LOOKED_UP: Final = frozenset((*_FORWARD_METHODS, "weight", "bias", "running_mean", "running_var"))


def _is_patched(attributes: dict[str, Any]) -> bool:
    """Whether something that an instance holds hides a method, a parameter or a buffer."""
    hidden = {*_FORWARD_METHODS, *attributes["_parameters"], *attributes["_buffers"]}
    return not hidden.isdisjoint(attributes)


class _Classes(Generic[Row]):
    """The rows of classes: those that were entered, and what follows for others, which is forgotten along with them.

    Args:
        rows: What is in the table from the start.
        named: The row of a class of another library, if it is in the table by name.
    """

    def __init__(
        self, rows: dict[type[nn.Module], Row], named: Callable[[type[nn.Module]], Row | None]
    ) -> None:
        self.rows: dict[type[nn.Module], Row] = rows
        self.named: Callable[[type[nn.Module]], Row | None] = named
        self._others: WeakKeyDictionary[type, Row | None] = WeakKeyDictionary()

    def row(self, cls: type) -> Row | None:
        """The row of a class, or None if its forward is not one that the table knows."""
        row = self.rows.get(cls)
        if row is not None:
            return row
        others = self._others  # what another thread enters meanwhile makes new ones
        try:
            return others[cls]
        except KeyError:
            row = self.named(cls) if issubclass(cls, nn.Module) else None
            row = others[cls] = self._inherited(cls) if row is None else _as_read(cls, row)
            return row

    def enter(self, cls: type[nn.Module], row: Row) -> None:
        """Adds a class, from which others may inherit."""
        self.rows[cls] = _as_read(cls, replace(row, name=cls.__name__, methods=_methods(cls)))
        self._others = WeakKeyDictionary()

    def _inherited(self, cls: type[nn.Module]) -> Row | None:
        """The row of the nearest base class in the table, if nothing that calling it consists of is overridden."""
        for base in cls.__mro__[1:]:
            row = self.row(base)
            if row is not None:
                same = all(getattr(cls, name) is method for name, method in row.methods)
                same = same and _defined(cls, base).isdisjoint(_CALLING)
                return _as_read(cls, replace(row, name=cls.__name__)) if same else None
        return None


# Whoever overrides one of these decides what calling a module, or reading its method, means.
_CALLING: Final = frozenset({"__call__", "__getattribute__"})


def _defined(cls: type, base: type) -> frozenset[str]:
    """The names that a class defines, or any class that it inherits from and `base` does not."""
    return frozenset(name for other in cls.__mro__ if other not in base.__mro__ for name in vars(other))


def _as_read(cls: type[nn.Module], row: Row) -> Row:
    """The row of a class that may have ways of its own to what `operands` reads past the class, for speed."""
    ways = {*_PARAMETERS, "running_mean", "running_var", "__getattr__", "__getattribute__"}
    if row.by_attribute or _defined(cls, nn.Module).isdisjoint(ways):
        return row
    operands = row.operands
    if row.reads:
        row = replace(
            row, operands=lambda module, *args, **kwargs: operands(AsAttributes(module), *args, **kwargs)
        )
    return replace(row, by_attribute=True)


def _convolution_by_name(cls: type[nn.Module]) -> ConvolutionKind | None:
    found = libraries.CONVOLUTIONS.get(f"{cls.__module__}.{cls.__qualname__}")
    return None if found is None else ConvolutionKind(cls.__name__, found[0], 4, found[1], _methods(cls))


def _batch_norm_by_name(cls: type[nn.Module]) -> BatchNormKind | None:
    fields = libraries.batch_norm_fields(cls)
    if fields is None:
        return None
    row = BatchNormKind(cls.__name__, batch_norm_module, (4,), methods=_methods(cls), reads=_BATCH_NORM)
    return replace(row, **fields)


_CONVOLUTION_CLASSES: Final = _Classes(_CONVOLUTION_ROWS, _convolution_by_name)
_BATCH_NORM_CLASSES: Final = _Classes(_BATCH_NORM_ROWS, _batch_norm_by_name)


def frozen_kind(norm: nn.Module) -> BatchNormKind | None:
    """The row of a batch norm that, called now, normalises by running statistics and leaves them as they are."""
    kind = batch_norm_kind(norm)
    frozen = kind is not None and (kind.always_frozen or not norm.training) and kind.has_statistics(norm)
    return kind if frozen else None


def resembles_convolution(module: nn.Module) -> bool:
    """Whether a user would call the module a convolution (or linear layer), its forward known or not."""
    return isinstance(module, (_ConvNd, nn.Linear)) or _CONVOLUTION_CLASSES.row(class_of(module)) is not None


def resembles_batch_norm(module: nn.Module) -> bool:
    """Whether a user would call the module a batch norm, its forward known or not."""
    return (
        isinstance(module, _BatchNorm)
        or _BATCH_NORM_CLASSES.row(class_of(module)) is not None
        or multiplies_and_adds(module)
    )


def multiplies_and_adds(module: nn.Module) -> bool:
    """Whether a module holds what frozen batch norms hold, and does not call the function of that name with it."""
    code = getattr(type(module).forward, "__code__", None)
    calls_the_function = code is not None and "batch_norm" in code.co_names
    return module._buffers.keys() >= _FROZEN_BUFFERS and not calls_the_function


_FROZEN_BUFFERS: Final = frozenset({"weight", "bias", "running_mean", "running_var"})


def may_hold_batch_norm(module: nn.Module) -> bool:
    """Whether a batch norm may be called inside the module: as a module, or as a function of running statistics."""
    return any(
        resembles_batch_norm(part) or {"running_mean", "running_var"} <= part._buffers.keys()
        for part in module.modules()
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward: hooks of any kind on it (global ones aside)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


# --- Registration ------------------------------------------------------------------------------------------------


def register_conv(
    cls: type[nn.Module],
    *,
    like: type[nn.Module] | None = None,
    operands: Callable[..., tuple[Tensor, Convolution]] | None = None,
) -> None:
    """Adds a convolution class to the table, for all later calls of the pass.

    By registering it you promise that calling the module equals calling the functional convolution that `operands`
    describes, for any weight and bias put in place of its own.

    Args:
        cls: The class itself; its subclasses are not meant.
        like: A class in the table whose forward `cls` computes, from the same attributes. By default the nearest
            base class of `cls` in the table, if `cls` leaves its forward as it is.
        operands: Instead of `like`: given the module and the arguments of its call, returns the input tensor (padded
            or reshaped as the forward does, batch first) and the [`Convolution`][convbn_fx.operands.Convolution].

    Raises:
        TypeError: `cls` is no `torch.nn.Module` class, or nothing tells what its forward computes, or `cls` has not
            the attributes that `like` has.

    Example:
        ```python
        import torch
        import torch.nn.functional as F
        import convbn_fx
        from convbn_fx.operands import Convolution

        class PaddedConv(torch.nn.Conv2d):  # its forward pads on the right, then convolves
            def forward(self, input):
                return super().forward(F.pad(input, (0, 1, 0, 1)))

        def operands(module, input):
            return F.pad(input, (0, 1, 0, 1)), Convolution("conv2d", module.weight, module.bias, module.stride)

        convbn_fx.register_conv(PaddedConv, operands=operands)
        model = torch.nn.Sequential(PaddedConv(3, 8, 2), torch.nn.BatchNorm2d(8)).eval()
        tuned = convbn_fx.tune(model)
        assert len(convbn_fx.report(tuned).fused) == 1
        torch.testing.assert_close(tuned(x := torch.randn(2, 3, 8, 8)), model(x))
        ```
    """
    if operands is not None and like is None and _is_module_class(cls):
        row = ConvolutionKind(cls.__name__, operands)
    else:
        row = _row_like(cls, like, _CONVOLUTION_CLASSES, "register_conv")
    _CONVOLUTION_CLASSES.enter(cls, row)


def register_batch_norm(
    cls: type[nn.Module],
    *,
    like: type[nn.Module] | None = None,
    operands: Callable[[Any], BatchNorm] | None = None,
    always_frozen: bool | None = None,
) -> None:
    """Adds a batch-norm class to the table, for all later calls of the pass.

    By registering it you promise that in Eval mode (`module.training` False) calling the module equals
    `F.batch_norm` with the operands and frozen statistics, and nothing more (no activation).

    Args:
        cls: The class itself; its subclasses are not meant.
        like: A class in the table whose forward `cls` computes, from the same attributes. By default the nearest
            base class of `cls` in the table, if `cls` leaves its forward as it is.
        operands: Instead of `like`: given the module, returns its [`BatchNorm`][convbn_fx.operands.BatchNorm].
        always_frozen: Whether `cls` normalises by running statistics in Train mode too. By default as `like` does;
            False with `operands`.

    Raises:
        TypeError: `cls` is no `torch.nn.Module` class, or nothing tells what its forward computes, or `cls` has not
            the attributes that `like` has.

    Example:
        ```python
        import torch
        import convbn_fx

        class Checked(torch.nn.BatchNorm2d):  # looks at its input, and does what its base does
            def forward(self, input):
                assert input.is_floating_point()
                return super().forward(input)

        convbn_fx.register_batch_norm(Checked, like=torch.nn.BatchNorm2d)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), Checked(8)).eval()
        assert len(convbn_fx.report(convbn_fx.tune(model)).fused) == 1
        ```
    """
    if operands is not None and like is None and _is_module_class(cls):
        row = BatchNormKind(cls.__name__, operands, statistics=())
    else:
        row = _row_like(cls, like, _BATCH_NORM_CLASSES, "register_batch_norm")
    if always_frozen is not None:
        # Such a class most often multiplies and adds, and what it returns is of the type that comes out of that.
        row = replace(row, always_frozen=always_frozen, promotes=always_frozen)
    _BATCH_NORM_CLASSES.enter(cls, row)


def _is_module_class(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, nn.Module)


def _row_like(
    cls: type[nn.Module],
    like: type[nn.Module] | None,
    table: _Classes[Row],
    function: str,
) -> Row:
    if not _is_module_class(cls):
        raise TypeError(f"{function}: expected a subclass of torch.nn.Module, got {cls!r}")
    candidates = cls.__mro__ if like is None else (like,)
    for candidate in candidates:
        row = table.row(candidate)
        if row is None:
            continue
        overridden = [name for name, method in row.methods if getattr(cls, name, None) is not method]
        if like is None and overridden:
            raise TypeError(
                f"{function}: {cls.__qualname__} has its own {', '.join(overridden)}. Pass operands=... to say what it "
                f"computes, or like={candidate.__name__} if it computes the same"
            )
        if missing := _missing(cls, row.reads):
            raise TypeError(
                f"{function}: {cls.__qualname__} has no {', '.join(missing)}, which is read from a module like "
                f"{candidate.__name__}. Pass operands=... to say what it computes with instead"
            )
        return row
    known = ", ".join(known_cls.__name__ for known_cls in list(table.rows))
    raise TypeError(
        f"{function}: cannot tell what {cls.__qualname__} computes. Pass operands=..., or like= one of: {known}"
    )


def _missing(cls: type[nn.Module], attributes: tuple[str, ...]) -> list[str]:
    """Those of the attributes that its instances cannot have, as far as the class itself tells.

    One whose constructors name none of them gets them in a way that cannot be read here.
    """
    methods = [
        (name, value.__code__)
        for base in cls.__mro__
        if base not in nn.Module.__mro__
        for name, value in vars(base).items()
        if isinstance(value, FunctionType)
    ]
    named = {word for name, code in methods if name == "__init__" for word in _words(code)}
    if named.isdisjoint(attributes):
        return []
    known = _defined(cls, nn.Module).union(*(_words(code) for _, code in methods))
    return [name for name in attributes if name not in known]


def _words(code: CodeType) -> Iterator[object]:
    """The names and the strings in a function's code."""
    yield from code.co_names
    for constant in code.co_consts:
        yield from constant if isinstance(constant, tuple) else (constant,)
