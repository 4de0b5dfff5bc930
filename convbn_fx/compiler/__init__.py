"""Knows what Dynamo hands a backend, and how to tell afterwards what was fused in its graphs.

Must not know how a pair is found or computed: it calls [`api`][convbn_fx.api].
"""

from convbn_fx.compiler.backend import convbn

__all__ = ["convbn"]
