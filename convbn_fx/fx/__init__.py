"""Knows one graph: `tracing` makes it, `matching` finds the pairs in it, `rewriting` puts fused ones in their place.

Must not know of models that stay modules (`tuning`), nor how a fused pair is computed (`functional`).
"""
