"""convbn_fx: convolution and frozen batch norm as one convolution, while everything still trains.

A `torch.fx` pass for models whose batch norms are in Eval mode (frozen statistics): see
[`transform`][convbn_fx.transform].
"""

from convbn_fx import functional, kinds, memory, operands, testing
from convbn_fx.api import deploy, report, transform, tune, untune
from convbn_fx.fx.tracing import TracingError, symbolic_trace
from convbn_fx.kinds import register_batch_norm, register_conv
from convbn_fx.kinds.modes import batchnorm_mode
from convbn_fx.report import Pair, Report, Skip, SkipReason

__all__ = [
    "Pair",
    "Report",
    "Skip",
    "SkipReason",
    "TracingError",
    "batchnorm_mode",
    "deploy",
    "functional",
    "kinds",
    "memory",
    "operands",
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
