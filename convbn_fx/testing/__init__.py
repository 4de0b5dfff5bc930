"""Knows how to observe what a call of a model does, and whether two models do the same.

Must not know of the pass: it imports torch alone, since an oracle must share no code with what it judges.
"""

from convbn_fx.testing.equivalence import Comparison, assert_equivalent, compare
from convbn_fx.testing.randomizing import randomize_batchnorms

__all__ = ["Comparison", "assert_equivalent", "compare", "randomize_batchnorms"]
