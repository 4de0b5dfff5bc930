"""What is asked of a module: whether it is a convolution or a batch norm, and of which row.

A class is in the table by identity. A subclass is known as long as it overrides nothing that the forward consists of.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Generic
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.utils import parametrize

from convbn_fx._torch import BatchNormBase, ConvBase
from convbn_fx.kinds import activations, modules, third_party
from convbn_fx.kinds.rows import (
    FORWARD_METHODS,
    ActivationKind,
    BatchNormKind,
    ConvolutionKind,
    Methods,
    Row,
)

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
    return _row_of(module, CONVOLUTION_CLASSES)


def batch_norm_kind(module: nn.Module) -> BatchNormKind | None:
    """The row of a batch-norm module, or None if its forward is not one that the table knows."""
    return _row_of(module, BATCH_NORM_CLASSES)


def activation_kind(module: nn.Module) -> ActivationKind | None:
    """The row of an activation module, or None if its forward is not one that the table knows."""
    return _row_of(module, ACTIVATION_CLASSES)


def is_gated(module: nn.Module) -> bool:
    """Whether the module is a squeeze-and-excite module, which multiplies its input by what its last child returns."""
    if not third_party.is_gated(class_of(module)):
        return False
    *_, gate = module.children()
    return activation_kind(gate) is not None


def activation_kind_of(cls: type[nn.Module]) -> ActivationKind | None:
    """The row of an activation class, or None if its forward is not one that the table knows."""
    return ACTIVATION_CLASSES.row(cls)


def _row_of(module: nn.Module, table: "Classes[Row]") -> Row | None:
    cls: Any = type(module)
    cls = cls.__dict__.get(TUNED_FROM, cls)
    row = table.rows.get(cls)  # the commonest case: no subclass, not parametrised
    if row is None:
        cls = class_of(module)
        row = table.row(cls)
    if row is None or row.methods is None or not row.methods.are_those_of(cls):
        return None
    attributes = vars(module)
    if not row.methods.looked_up.isdisjoint(attributes) and _is_patched(attributes):
        return None
    return row


def _is_patched(attributes: dict[str, Any]) -> bool:
    """Whether something that an instance holds hides a method, a parameter or a buffer."""
    hidden = {*FORWARD_METHODS, *attributes["_parameters"], *attributes["_buffers"]}
    return not hidden.isdisjoint(attributes)


class Classes(Generic[Row]):
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
        self.rows[cls] = _as_read(cls, replace(row, name=cls.__name__, methods=Methods(cls)))
        self._others = WeakKeyDictionary()

    def _inherited(self, cls: type[nn.Module]) -> Row | None:
        """The row of the nearest base class in the table, if nothing that calling it consists of is overridden."""
        for base in cls.__mro__[1:]:
            row = self.row(base)
            if row is not None:
                same = row.methods is not None and row.methods.are_those_of(cls)
                same = same and defined(cls, base).isdisjoint(_CALLING)
                return _as_read(cls, replace(row, name=cls.__name__)) if same else None
        return None


# Whoever overrides one of these decides what calling a module, or reading its method, means.
_CALLING: Final = frozenset({"__call__", "__getattribute__"})


def defined(cls: type, base: type) -> frozenset[str]:
    """The names that a class defines, or any class that it inherits from and `base` does not."""
    return frozenset(name for other in cls.__mro__ if other not in base.__mro__ for name in vars(other))


def _as_read(cls: type[nn.Module], row: Row) -> Row:
    """The row of a class that may have ways of its own to what `operands` reads past the class, for speed."""
    ways = {*modules.PARAMETERS, "running_mean", "running_var", "__getattr__", "__getattribute__"}
    if row.by_attribute or defined(cls, nn.Module).isdisjoint(ways):
        return row
    operands = row.operands
    if row.reads:
        row = replace(
            row,
            operands=lambda module, *args, **kwargs: operands(modules.AsAttributes(module), *args, **kwargs),
        )
    return replace(row, by_attribute=True)


def _convolution_by_name(cls: type[nn.Module]) -> ConvolutionKind | None:
    found = third_party.CONVOLUTIONS.get(f"{cls.__module__}.{cls.__qualname__}")
    return None if found is None else ConvolutionKind(cls.__name__, found[0], 4, found[1], Methods(cls))


def _batch_norm_by_name(cls: type[nn.Module]) -> BatchNormKind | None:
    fields = third_party.batch_norm_fields(cls)
    if fields is None:
        return None
    row = BatchNormKind(
        cls.__name__, modules.batch_norm_module, (4,), methods=Methods(cls), reads=modules.BATCH_NORM
    )
    return replace(row, **fields)


def _activation_by_name(cls: type[nn.Module]) -> ActivationKind | None:
    kind = third_party.activation_kind(cls)
    return None if kind is None else ActivationKind(cls.__name__, activations.named(kind), Methods(cls))


CONVOLUTION_CLASSES: Final = Classes(dict(modules.CONVOLUTIONS), _convolution_by_name)
BATCH_NORM_CLASSES: Final = Classes(dict(modules.BATCH_NORMS), _batch_norm_by_name)

ACTIVATION_CLASSES: Final = Classes(dict(activations.ACTIVATIONS), _activation_by_name)


def frozen_kind(norm: nn.Module) -> BatchNormKind | None:
    """The row of a batch norm that, called now, normalises by running statistics and leaves them as they are."""
    kind = batch_norm_kind(norm)
    frozen = kind is not None and (kind.always_frozen or not norm.training) and kind.has_statistics(norm)
    return kind if frozen else None


def resembles_convolution(module: nn.Module) -> bool:
    """Whether a user would call the module a convolution (or linear layer), its forward known or not."""
    return isinstance(module, (ConvBase, nn.Linear)) or CONVOLUTION_CLASSES.row(class_of(module)) is not None


def resembles_batch_norm(module: nn.Module) -> bool:
    """Whether a user would call the module a batch norm, its forward known or not."""
    return (
        isinstance(module, BatchNormBase)
        or BATCH_NORM_CLASSES.row(class_of(module)) is not None
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
