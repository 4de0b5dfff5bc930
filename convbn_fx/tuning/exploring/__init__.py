"""Knows which pairs the forwards of a model run, on which paths, and who else uses what is in them.

Must not change the model, nor know what is done with a pair that was found.
"""
