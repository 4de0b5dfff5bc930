"""Deploy mode as the tests ask for it: so many pairs folded, the caller's model as it was, the outputs the same."""

import copy

import torch
from models import KINDS, LAYOUTS, Layer, Pair, conv_norm, data, prepared, snapshot, through_pickle
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

import convbn_fx
from convbn_fx import deploy, report, transform, tune
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


PADDINGS = {
    f"{mode} {padding} {dimensions}d": Layer(
        lambda mode=mode, padding=padding, dimensions=dimensions: getattr(nn, f"Conv{dimensions}d")(
            2, 3, 3, padding=padding, padding_mode=mode, dilation=2 if padding == "same" else 1
        ),
        lambda dimensions=dimensions: getattr(nn, f"BatchNorm{dimensions}d")(3),
        (2, 2, 5, 6, 5)[: dimensions + 2],
    )
    for mode in ("zeros", "reflect", "replicate", "circular")
    for padding in (1, "same", "valid")
    for dimensions in (1, 2, 3)
    if padding == "same" or dimensions == 2
}
LAYERS = {
    **KINDS,
    **LAYOUTS,
    **PADDINGS,
    "sync, linear": Layer(lambda: nn.Linear(2, 3), lambda: nn.SyncBatchNorm(3), (5, 2)),
    "double bias": Layer(
        lambda: nn.Conv2d(2, 3, 1, bias=True), lambda: nn.BatchNorm2d(3, eps=0.1), (2, 2, 3, 3)
    ),
}


class SharedWithoutNorm(nn.Module):
    """A convolution that is followed by a batch norm here, and by nothing in another block."""

    def __init__(self):
        super().__init__()
        self.pair = Pair(nn.Conv2d(3, 4, 3, padding=1))
        self.alone = nn.Sequential(self.pair.conv)

    def forward(self, x):
        return self.pair(x) + self.alone(x)


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.alone = nn.Sequential(self.pair.norm)

    def forward(self, x):
        return self.pair(x) + self.alone(x)


SOURCES = {
    "tuned": tune,
    "tuned for training": lambda m: tune(m, include_training=True, norm_eval=True),
    "tuned twice": lambda m: tune(tune(m)),
    "tuned and copied": lambda m: copy.deepcopy(tune(m)),
    "transformed": lambda m: transform(convbn_fx.symbolic_trace(m)),
    "transformed from torch.fx": lambda m: transform(torch.fx.symbolic_trace(m)),
    "traced": convbn_fx.symbolic_trace,
    "traced by torch.fx": torch.fx.symbolic_trace,
    "exported": lambda m: torch.export.export(m, (data(2, 3, 6, 6),)).module(),
    "exported and transformed": lambda m: transform(torch.export.export(m, (data(2, 3, 6, 6),)).module()),
    "transformed and copied": lambda m: copy.deepcopy(transform(convbn_fx.symbolic_trace(m))),
    "transformed and pickled": lambda m: through_pickle(transform(convbn_fx.symbolic_trace(m))),
}


def called_norms(model):
    """Batch norms that are called in the graph, as a module or as a function."""
    nodes = model.graph.nodes if isinstance(model, torch.fx.GraphModule) else []
    return [
        node
        for node in nodes
        if (node.op == "call_function" and "batch_norm" in str(node.target))
        or (node.op == "call_module" and isinstance(model.get_submodule(node.target), NORMS))
    ]
