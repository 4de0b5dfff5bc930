"""What a tuned model is compared with: the original, with its batch norms frozen by hand and its pairs counted."""

import torch
from models import prepared
from timm.layers import FrozenBatchNormAct2d
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from bench.tools.structure import PairCounter
from convbn_fx import report, tune
from convbn_fx.testing import assert_equivalent

#: They call no batch-norm function that a watcher of functions could see.
FROZEN = (FrozenBatchNorm2d, FrozenBatchNormAct2d)


def with_frozen_norms(model):
    """The model in Train mode, with every batch norm in Eval mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


class _Counter(PairCounter):
    def see(self, norm, args):
        """A pre-forward hook."""
        self.normalised += [id(args[0])] if id(args[0]) in self.uses else []


def pairs_run(model, *inputs):
    """How many pairs one call of the model runs, told by watching its functions."""
    counter = _Counter()
    norms = [module for module in model.modules() if isinstance(module, FROZEN)]
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
    run, fused = pairs_run(original, *inputs), len(report(tuned).fused)
    assert run == fused == pairs, f"{run} pairs run, {fused} are fused, {pairs} are expected"
    assert_equivalent(original, tuned, *inputs)
    return tuned
