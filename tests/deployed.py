"""Deploy mode as the tests ask for it: so many pairs folded, the caller's model as it was, the outputs the same."""

import torch
from models import Pair, conv_norm, prepared, snapshot
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from convbn_fx import deploy, report
from convbn_fx.testing import compare

NORMS = (_BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def assert_same(model, deployed, *inputs, **kwargs):
    """Outputs, gradients of the inputs and random numbers are the same; parameters have no counterparts."""
    calls = (lambda *args, call=call, **kwargs: call(*args, **kwargs) for call in (model, deployed))
    comparison = compare(*calls, *inputs, kwargs=kwargs)
    errors = {**comparison.outputs, **comparison.gradients, **comparison.state}
    assert comparison.outputs
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCES[inputs[0].dtype]}
    assert not wrong


def deployed_with(model, pairs, **options):
    """The deployed model, in which so many pairs were folded; the caller's model is as it was."""
    before = snapshot(model)
    deployed = deploy(model, **options)
    assert snapshot(model) == before
    assert len(report(deployed).fused) == pairs, report(deployed)
    return deployed


def norms_in(model):
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def storages(model):
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values() if tensor.numel()}


def two_convs(forward):
    """Two convolutions and two batch norms of the same shapes, called as a test says."""
    torch.manual_seed(0)
    model = Pair(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), forward)
    model.conv2, model.norm2 = conv_norm(3, 3)
    return prepared(model)
