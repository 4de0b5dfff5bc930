"""convbn_fx: convolution and frozen batch norm as one convolution, while everything still trains.

A `torch.fx` pass for models whose batch norms are in Eval mode (frozen statistics): see
[`transform`][convbn_fx.transform].
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from convbn_fx import functional, kinds, memory, operands, testing
    from convbn_fx.api import deploy, report, transform, tune, untune
    from convbn_fx.fx.tracing import TracingError, symbolic_trace
    from convbn_fx.kinds import register_activation, register_batch_norm, register_conv
    from convbn_fx.kinds.modes import batchnorm_mode
    from convbn_fx.records import Pair, Report, SavedLess, Skip, SkipReason

__all__ = [
    "Pair",
    "Report",
    "SavedLess",
    "Skip",
    "SkipReason",
    "TracingError",
    "batchnorm_mode",
    "deploy",
    "functional",
    "kinds",
    "memory",
    "operands",
    "register_activation",
    "register_batch_norm",
    "register_conv",
    "report",
    "symbolic_trace",
    "testing",
    "transform",
    "tune",
    "untune",
]
__version__ = "0.1.0"

_LIES_IN: Final = {
    "Pair": "records",
    "Report": "records",
    "SavedLess": "records",
    "Skip": "records",
    "SkipReason": "records",
    "TracingError": "fx.tracing",
    "batchnorm_mode": "kinds.modes",
    "deploy": "api",
    "register_activation": "kinds",
    "register_batch_norm": "kinds",
    "register_conv": "kinds",
    "report": "api",
    "symbolic_trace": "fx.tracing",
    "transform": "api",
    "tune": "api",
    "untune": "api",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for: what holds results against a baseline needs no PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _LIES_IN:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_LIES_IN[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
