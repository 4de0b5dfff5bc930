"""Knows how a convolution and a frozen batch norm are computed as one: what rewritten graphs and tuned modules call.

Must not know what a graph is, nor which module calls: it imports torch and the kinds, never `torch.fx`.
"""

from convbn_fx.functional.dispatch import conv_batch_norm
from convbn_fx.functional.folding import fold

# The path that graphs print and that pickles hold: the files behind it may move.
conv_batch_norm.__module__ = fold.__module__ = __name__

__all__ = ["conv_batch_norm", "fold"]
