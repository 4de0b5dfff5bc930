"""Knows how a convolution and a frozen batch norm are computed as one: what rewritten graphs and tuned modules call.

Must not know what a graph is, nor which module calls: it imports torch and the kinds, never `torch.fx`.
"""

from convbn_fx.functional.activations import (
    activation,
    batch_norm_that_stays,
    conv_batch_norm_act,
    product,
)
from convbn_fx.functional.dispatch import conv_batch_norm
from convbn_fx.functional.folding import fold
from convbn_fx.functional.gates import gated

# The path that graphs print and that pickles hold: the files behind it may move.
for _function in (
    conv_batch_norm,
    conv_batch_norm_act,
    activation,
    batch_norm_that_stays,
    gated,
    product,
    fold,
):
    _function.__module__ = __name__

__all__ = [
    "activation",
    "batch_norm_that_stays",
    "conv_batch_norm",
    "conv_batch_norm_act",
    "fold",
    "gated",
    "product",
]
