"""The classes and functions that are activations, and how a call of each is read."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from convbn_fx.kinds.modules import is_as_shipped
from convbn_fx.kinds.rows import ActivationKind, Methods
from convbn_fx.operands import Activation

aten = torch.ops.aten

# --- Readers -----------------------------------------------------------------------------------------------------


def named(kind: str) -> Callable[[Any], Activation]:
    """Reads the modules that have nothing but, perhaps, `inplace`."""
    return lambda module: Activation(kind, (), bool(getattr(module, "inplace", False)))


def _relu6(module: Any) -> Activation:
    return Activation("hardtanh", (0.0, 6.0), module.inplace)


def _hardtanh(module: Any) -> Activation:
    return Activation("hardtanh", (module.min_val, module.max_val), module.inplace)


def _leaky_relu(module: Any) -> Activation | None:
    return leaky_relu(module.negative_slope, module.inplace)


def _elu(module: Any) -> Activation | None:
    return elu(module.alpha, module.inplace)


def _gelu(module: Any) -> Activation:
    return gelu(module.approximate)


def leaky_relu(slope: float, inplace: bool) -> Activation | None:
    """None for a negative slope: the output then has no sign that tells the input's."""
    return Activation("leaky_relu", (slope,), inplace) if slope >= 0 else None


def elu(alpha: float, inplace: bool) -> Activation | None:
    """None for a negative alpha, for the same reason."""
    return Activation("elu", (alpha,), inplace) if alpha >= 0 else None


def gelu(approximate: str) -> Activation:
    """Either form."""
    return Activation("gelu_tanh" if approximate == "tanh" else "gelu")


# --- The tables --------------------------------------------------------------------------------------------------

# Each row: the class, how it is read, and the attributes that are read.
ACTIVATIONS: Final[dict[type[nn.Module], ActivationKind]] = {
    cls: ActivationKind(cls.__name__, operands, Methods(cls), reads)
    for cls, operands, reads in (
        (nn.ReLU, named("relu"), ("inplace",)),
        (nn.ReLU6, _relu6, ("inplace",)),
        (nn.Hardtanh, _hardtanh, ("min_val", "max_val", "inplace")),
        (nn.LeakyReLU, _leaky_relu, ("negative_slope", "inplace")),
        (nn.ELU, _elu, ("alpha", "inplace")),
        (nn.Hardsigmoid, named("hardsigmoid"), ("inplace",)),
        (nn.Sigmoid, named("sigmoid"), ()),
        (nn.Tanh, named("tanh"), ()),
        (nn.SiLU, named("silu"), ("inplace",)),
        (nn.Hardswish, named("hardswish"), ("inplace",)),
        (nn.GELU, _gelu, ("approximate",)),
        (nn.Mish, named("mish"), ("inplace",)),
    )
    if is_as_shipped(cls)
}

Reader = Callable[..., tuple[Any, Activation | None]]


def _call(kind: str) -> Reader:
    return lambda input, inplace=False: (input, Activation(kind, (), inplace))


def _in_place(reader: Reader) -> Reader:
    def operands(*args: Any, **kwargs: Any) -> tuple[Any, Activation | None]:
        input, activation = reader(*args, **kwargs)
        return input, None if activation is None else activation._replace(inplace=True)

    return operands


def _relu6_call(input: Any, inplace: bool = False) -> tuple[Any, Activation]:
    return input, Activation("hardtanh", (0.0, 6.0), inplace)


def _hardtanh_call(
    input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> tuple[Any, Activation]:
    return input, Activation("hardtanh", (min_val, max_val), inplace)


def _leaky_relu_call(
    input: Any, negative_slope: float = 0.01, inplace: bool = False
) -> tuple[Any, Activation | None]:
    return input, leaky_relu(negative_slope, inplace)


def _elu_call(input: Any, alpha: float = 1.0, inplace: bool = False) -> tuple[Any, Activation | None]:
    return input, elu(alpha, inplace)


def _gelu_call(input: Any, approximate: str = "none") -> tuple[Any, Activation]:
    return input, gelu(approximate)


# Each row: the functions, those that overwrite their input, and how a call of either is read.
ACTIVATION_FUNCTIONS: Final[dict[object, Reader]] = {
    function: reader
    for functions, in_place, reader in (
        ((F.relu, torch.relu, aten.relu.default), (torch.relu_, aten.relu_.default), _call("relu")),
        ((F.relu6, aten.relu6.default), (aten.relu6_.default,), _relu6_call),
        ((F.hardtanh, aten.hardtanh.default), (F.hardtanh_, aten.hardtanh_.default), _hardtanh_call),
        (
            (F.leaky_relu, aten.leaky_relu.default),
            (F.leaky_relu_, aten.leaky_relu_.default),
            _leaky_relu_call,
        ),
        ((F.elu, aten.elu.default), (F.elu_, aten.elu_.default), _elu_call),
        ((F.hardsigmoid, aten.hardsigmoid.default), (aten.hardsigmoid_.default,), _call("hardsigmoid")),
        (
            (F.sigmoid, torch.sigmoid, aten.sigmoid.default),
            (torch.sigmoid_, aten.sigmoid_.default),
            _call("sigmoid"),
        ),
        (
            (F.tanh, torch.tanh, aten.tanh.default),
            (torch.tanh_, aten.tanh_.default),
            _call("tanh"),
        ),
        ((F.silu, aten.silu.default), (aten.silu_.default,), _call("silu")),
        ((F.hardswish, aten.hardswish.default), (aten.hardswish_.default,), _call("hardswish")),
        ((F.gelu, aten.gelu.default), (), _gelu_call),
        ((F.mish, aten.mish.default), (aten.mish_.default,), _call("mish")),
    )
    for function, reader in (
        *((function, reader) for function in functions),
        *((function, _in_place(reader)) for function in in_place),
    )
}
