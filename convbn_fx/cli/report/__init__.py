"""Knows what `convbn-fx report` tells of one model: what its pairs save, their coefficients, and how to show it.

Must not know of sweeps over many models (`zoo`).
"""
