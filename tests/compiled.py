"""A compiled model as the tests ask for it."""

import pytest
import torch

from convbn_fx import report

NET = {
    ("stem.conv", "stem.norm"),
    ("block.first.conv", "block.first.norm"),
    ("block.second.conv", "block.second.norm"),
}
#: Inner backends that run the operators as they are; None is the plain form, without options.
INNER = [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("eager", "aot_eager"))]


def compiled(model, inner=None, **arguments):
    if inner is not None:
        arguments["options"] = {"inner": inner}
    return torch.compile(model, backend="convbn", **arguments)


def pairs(model):
    """Each fused pair by its names, which must be there once."""
    names = [(pair.convolution, pair.batch_norm) for pair in report(model).fused]
    assert len(names) == len(set(names))
    return set(names)


def skips(model):
    return {(skip.batch_norm, skip.reason.name) for skip in report(model).skipped}


def no_recompilation():
    return torch._dynamo.config.patch(error_on_recompile=True)
