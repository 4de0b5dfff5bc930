"""What a tuned model of a library is compared with: the library's own, its batch norms frozen by hand, its pairs counted."""

import torch
from bench.structure import PairCounter
from models import prepared
from torch.nn.modules.batchnorm import _BatchNorm
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


class _Counter(PairCounter):
    def see(self, norm, args):
        """A pre-forward hook of a FrozenBatchNorm2d, which calls no function that would tell."""
        self.normalised += [id(args[0])] if id(args[0]) in self.uses else []


def pairs_run(model, *inputs):
    """How many pairs one call of the model runs, told by watching its functions."""
    counter = _Counter()
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(counter.see) for norm in norms]
    with torch.no_grad(), counter:
        output = model(*inputs)
    counter.count_uses(output)
    for hook in hooks:
        hook.remove()
    return counter.pairs


def assert_trains_like(original, pairs, *inputs):
    """Tuned, the model fuses so many pairs, and trains as the original does with frozen batch norms."""
    tuned = tune(prepared(original), norm_eval=True).train()
    with_frozen_norms(original)
    assert pairs_run(original, *inputs) == len(report(tuned).fused) == pairs
    assert_equivalent(original, tuned, *inputs)
    return tuned
