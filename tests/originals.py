"""What a tuned model of a library is compared with: the library's own, its batch norms frozen by hand, its pairs counted."""

import torch
from bench.structure import PairCounter
from models import prepared
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torchvision.ops import FrozenBatchNorm2d

from convbn_fx import report, tune
from convbn_fx.testing import assert_equivalent


def with_frozen_norms(model):
    """The model in Train mode, with every batch norm in Eval mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


class _Watcher(PairCounter):
    """Keeps every value alive: where one dies, another may take its id."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        self.values.append((args, kwargs, result))
        return result

    def see(self, norm, args):
        """A pre-forward hook of a FrozenBatchNorm2d, which calls no function that says so."""
        self.normalised.append(id(args[0]))


def pairs_run(model, *inputs):
    """How many pairs one call of the model runs, told by watching its functions."""
    watcher = _Watcher()
    hooks = [
        module.register_forward_pre_hook(watcher.see)
        for module in model.modules()
        if isinstance(module, FrozenBatchNorm2d)
    ]
    with torch.no_grad(), watcher:
        output = model(*inputs)
    for hook in hooks:
        hook.remove()
    for value in pytree.tree_leaves(output):
        if isinstance(value, torch.Tensor):
            watcher.uses[id(value)] = watcher.uses.get(id(value), 0) + 1
    return watcher.pairs


def assert_trains_like(original, pairs, *inputs):
    """Tuned, the model fuses so many pairs, and trains as the original does with frozen batch norms."""
    tuned = tune(prepared(original), norm_eval=True).train()
    with_frozen_norms(original)
    assert pairs_run(original, *inputs) == len(report(tuned).fused) == pairs
    assert_equivalent(original, tuned, *inputs)
