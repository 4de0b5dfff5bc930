"""Knows Deploy mode: parameters folded once, in a model or in a graph, and a check of what came out.

Must not know how pairs are found: it is told which, and which of them somebody else uses.
"""
