"""Small models, the one way in which the tests fuse them: with the number of pairs pinned; and other common helpers."""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convbn_fx import functional, report, symbolic_trace, transform, tune
from convbn_fx.functional import native
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import randomize_batchnorms

#: For tests of models that are in Train mode on purpose, of which tune, transform and deploy warn.
in_train_mode = pytest.mark.filterwarnings("ignore:.* no pair was fused:UserWarning")


#: What autograd calls a fused pair.
FUSED_NODE = (
    "_FusedConvolutionBackward"
    if native.operator is None
    else "torch::autograd::CppNode<convbn_fx::ConvBatchNorm>"
)


def fused_nodes(graph_module):
    return [node for node in graph_module.graph.nodes if node.target is functional.conv_batch_norm]


def prepared(model, dtype=torch.float64):
    """In Eval mode, with statistics and affine parameters that hide no mistake."""
    return randomize_batchnorms(model.eval().to(dtype))


def with_slow(names, slow):
    """Parameters of a test, of which some are slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


def fused(model, pairs=1, trace=symbolic_trace, **options):
    """The model after tracing and the pass, which must have fused so many pairs."""
    graph_module = transform(trace(model), **options)
    assert len(fused_nodes(graph_module)) == pairs
    assert len(report(graph_module).fused) == pairs
    return graph_module


def tuned_with(model, pairs, **options):
    """The model tuned, which must have fused so many pairs."""
    tuned = tune(model, **options)
    assert len(report(tuned).fused) == pairs
    return tuned


def runs_fused(model, tuned, *inputs):
    """Whether the tuned model saves less at a call."""
    inputs = inputs or (data(2, 3, 6, 6),)
    return saved_bytes(tuned, *inputs) < saved_bytes(model, *inputs)


def reasons(graph_module):
    """Each batch norm that was left, with the name of its reason."""
    return {skip.batch_norm: skip.reason.name for skip in report(graph_module).skipped}


def modes(model):
    """Which modules are in Train mode, by name."""
    return {name: module.training for name, module in model.named_modules()}


def snapshot(model):
    """Everything that the modules of a model hold, by identity, and the contents of its tensors."""

    def frozen(value):
        if isinstance(value, dict):
            return [(key, frozen(item)) for key, item in value.items()]
        return [frozen(item) for item in value] if isinstance(value, (list, tuple)) else id(value)

    return (
        [(name, type(module), frozen(vars(module))) for name, module in model.named_modules()],
        [(name, t._version, t.tolist()) for name, t in [*model.named_parameters(), *model.named_buffers()]],
    )


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def exported(model, *inputs, **options):
    return torch.export.export(model, inputs, **options).module()


def data(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def conv_norm(channels_in=3, channels_out=4):
    return nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out)


class Pair(nn.Module):
    """A convolution and a batch norm; `forward` is a test's own where the plain one is not enough."""

    def __init__(self, conv=None, norm=None, forward=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 4, 3)
        self.norm = norm or nn.BatchNorm2d(4)
        self.function = forward

    def forward(self, x):
        return self.norm(self.conv(x)) if self.function is None else self.function(self, x)


def pair(forward=None):
    """A pair that keeps the height and width of its input."""
    torch.manual_seed(0)
    return prepared(Pair(nn.Conv2d(3, 4, 3, padding=1), forward=forward))


class Functional(nn.Module):
    """Parameters and statistics without modules, and a test's own function that calls something with them."""

    def __init__(self, function, weight_shape, channels):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(weight_shape))
        self.bias = nn.Parameter(torch.randn(channels))
        self.gamma = nn.Parameter(torch.randn(channels))
        self.beta = nn.Parameter(torch.randn(channels))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def normalize(self, y):
        return F.batch_norm(y, self.mean, self.var, self.gamma, self.beta)

    def forward(self, x):
        return self.function(self, x)


class ConvNormAct(nn.Module):
    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = ConvNormAct(channels, channels)
        self.second = ConvNormAct(channels, channels)

    def forward(self, x):
        return x + self.second(self.first(x))


class Net(nn.Module):
    """A small residual network: 3 pairs, dropout, a sub-module and buffers that its forward does not use."""

    def __init__(self):
        super().__init__()
        self.stem = ConvNormAct(3, 4)
        self.block = Residual(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)
        self.unused = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.register_buffer("unused_buffer", torch.arange(3.0))
        self.register_buffer("temporary", torch.ones(5), persistent=False)

    def forward(self, x):
        x = self.block(self.stem(x)).mean([2, 3])
        return self.head(self.dropout(x)) * self.temporary


NET_PAIRS = 3
#: With the one that its forward does not use.
ALL_NET_PAIRS = 4


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return prepared(Net(), dtype)


@dataclass(frozen=True)
class Layer:
    """A convolution and the batch norm that goes with it, and the shape of an input."""

    conv: Callable[[], nn.Module]
    norm: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self, dtype=torch.float64):
        torch.manual_seed(0)
        return prepared(Pair(self.conv(), self.norm()), dtype)

    def input(self, dtype=torch.float64, seed=0):
        return data(*self.shape, dtype=dtype, seed=seed)


#: Every kind of module, plain.
KINDS = {
    "conv1d": Layer(lambda: nn.Conv1d(2, 3, 3), lambda: nn.BatchNorm1d(3), (2, 2, 6)),
    "conv2d": Layer(lambda: nn.Conv2d(2, 3, 3), lambda: nn.BatchNorm2d(3), (2, 2, 5, 6)),
    "conv3d": Layer(lambda: nn.Conv3d(2, 3, 2), lambda: nn.BatchNorm3d(3), (2, 2, 3, 3, 4)),
    "conv_transpose1d": Layer(lambda: nn.ConvTranspose1d(2, 3, 3), lambda: nn.BatchNorm1d(3), (2, 2, 5)),
    "conv_transpose2d": Layer(lambda: nn.ConvTranspose2d(2, 3, 2), lambda: nn.BatchNorm2d(3), (2, 2, 3, 4)),
    "conv_transpose3d": Layer(
        lambda: nn.ConvTranspose3d(2, 3, 2), lambda: nn.BatchNorm3d(3), (2, 2, 2, 2, 3)
    ),
    "linear": Layer(lambda: nn.Linear(2, 3), lambda: nn.BatchNorm1d(3), (5, 2)),
    "sync_batch_norm": Layer(lambda: nn.Conv2d(2, 3, 3), lambda: nn.SyncBatchNorm(3), (2, 2, 5, 6)),
}

#: The same with channels in groups, and everything else that a convolution can be told.
LAYOUTS = {
    "grouped1d": Layer(lambda: nn.Conv1d(4, 6, 3, groups=2), lambda: nn.BatchNorm1d(6), (2, 4, 6)),
    "grouped2d": Layer(lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "grouped3d": Layer(lambda: nn.Conv3d(4, 6, 2, groups=2), lambda: nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "depthwise1d": Layer(lambda: nn.Conv1d(4, 4, 3, groups=4), lambda: nn.BatchNorm1d(4), (2, 4, 6)),
    "depthwise2d": Layer(lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: nn.BatchNorm2d(8), (2, 4, 5, 5)),
    "depthwise3d": Layer(lambda: nn.Conv3d(4, 4, 2, groups=4), lambda: nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
    "grouped_transpose1d": Layer(
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), lambda: nn.BatchNorm1d(6), (2, 4, 5)
    ),
    "grouped_transpose2d": Layer(
        lambda: nn.ConvTranspose2d(6, 9, 2, groups=3), lambda: nn.BatchNorm2d(9), (2, 6, 3, 3)
    ),
    "grouped_transpose3d": Layer(
        lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), lambda: nn.BatchNorm3d(6), (2, 4, 2, 2, 2)
    ),
    "depthwise_transpose1d": Layer(
        lambda: nn.ConvTranspose1d(4, 4, 3, groups=4), lambda: nn.BatchNorm1d(4), (2, 4, 5)
    ),
    "depthwise_transpose2d": Layer(
        lambda: nn.ConvTranspose2d(4, 8, 2, groups=4), lambda: nn.BatchNorm2d(8), (2, 4, 3, 3)
    ),
    "depthwise_transpose3d": Layer(
        lambda: nn.ConvTranspose3d(4, 4, 2, groups=4), lambda: nn.BatchNorm3d(4), (2, 4, 2, 2, 2)
    ),
    "square_transpose": Layer(  # where the wrong channel axis has the right size
        lambda: nn.ConvTranspose2d(4, 4, 3), lambda: nn.BatchNorm2d(4), (2, 4, 3, 3)
    ),
    "strided": Layer(
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        lambda: nn.BatchNorm2d(3),
        (2, 2, 7, 6),
    ),
    "strided_transpose": Layer(
        lambda: nn.ConvTranspose2d(
            4, 6, 3, stride=(2, 3), padding=(1, 0), output_padding=(1, 0), groups=2, dilation=(1, 2)
        ),
        lambda: nn.BatchNorm2d(6),
        (2, 4, 3, 4),
    ),
    "no_bias": Layer(lambda: nn.Conv2d(2, 3, 3, bias=False), lambda: nn.BatchNorm2d(3), (2, 2, 5, 5)),
    "linear_no_bias": Layer(lambda: nn.Linear(4, 3, bias=False), lambda: nn.BatchNorm1d(3), (5, 4)),
    # Weights larger than the output, though not so much that the output is better saved.
    "heavy": Layer(lambda: nn.Conv2d(8, 4, 3), lambda: nn.BatchNorm2d(4), (2, 8, 4, 5)),
    "heavy_grouped": Layer(lambda: nn.Conv1d(8, 6, 7, groups=2), lambda: nn.BatchNorm1d(6), (1, 8, 9)),
    "heavy_transpose": Layer(
        lambda: nn.ConvTranspose2d(12, 4, 3, padding=1, groups=2), lambda: nn.BatchNorm2d(4), (1, 12, 2, 3)
    ),
    "heavy_linear": Layer(lambda: nn.Linear(16, 3), lambda: nn.BatchNorm1d(3), (3, 16)),
}
