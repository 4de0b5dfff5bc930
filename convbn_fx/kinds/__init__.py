"""Knows what is a convolution, a batch norm, an activation, and how to read one call of each into its operands.

Must not know what is done with them: nothing behind this folder needs to know which spelling a model used.
"""

from convbn_fx.kinds.activations import ACTIVATION_FUNCTIONS
from convbn_fx.kinds.classes import (
    TUNED_FROM,
    activation_kind,
    activation_kind_of,
    batch_norm_kind,
    class_of,
    convolution_kind,
    frozen_kind,
    has_hooks,
    is_gated,
    may_hold_batch_norm,
    multiplies_and_adds,
    resembles_batch_norm,
    resembles_convolution,
)
from convbn_fx.kinds.functions import BATCH_NORM_FUNCTIONS, CONVOLUTION_FUNCTIONS
from convbn_fx.kinds.registration import register_activation, register_batch_norm, register_conv
from convbn_fx.kinds.rows import ActivationKind, BatchNormKind, ConvolutionKind

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "BATCH_NORM_FUNCTIONS",
    "CONVOLUTION_FUNCTIONS",
    "TUNED_FROM",
    "ActivationKind",
    "BatchNormKind",
    "ConvolutionKind",
    "activation_kind",
    "activation_kind_of",
    "batch_norm_kind",
    "class_of",
    "convolution_kind",
    "frozen_kind",
    "has_hooks",
    "is_gated",
    "may_hold_batch_norm",
    "multiplies_and_adds",
    "register_activation",
    "register_batch_norm",
    "register_conv",
    "resembles_batch_norm",
    "resembles_convolution",
]
