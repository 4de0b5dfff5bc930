"""Where the output channels lie, and whether they are what the batch norm normalises."""

import pytest
import torch
from models import KINDS, LAYOUTS, Functional, Pair, data, fused, prepared, reasons, tuned_with
from torch import nn
from torch.nn import functional as F

from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent


@pytest.mark.parametrize("layer", KINDS | LAYOUTS)
def test_every_layout(layer):
    layer = (KINDS | LAYOUTS)[layer]
    model = layer.model()
    graph_module = fused(model)
    assert_equivalent(model, graph_module, layer.input())
    assert saved_bytes(graph_module, layer.input()) < saved_bytes(model, layer.input())


@pytest.mark.parametrize("layer", KINDS | LAYOUTS)
def test_every_layout_exported(layer):
    layer = (KINDS | LAYOUTS)[layer]
    model = layer.model()
    graph_module = fused(model, trace=lambda model: torch.export.export(model, (layer.input(),)).module())
    assert_equivalent(model, graph_module, layer.input())


@pytest.mark.parametrize("layer", KINDS | LAYOUTS)
def test_outputs_larger_than_any_weight(layer):
    """The same on inputs that are far larger than the weight, and on a single one."""
    layer = (KINDS | LAYOUTS)[layer]
    model = layer.model()
    graph_module = fused(model)
    for batch in (1, 7):
        assert_equivalent(model, graph_module, data(batch, *layer.shape[1:]))
    assert_equivalent(model, graph_module, layer.input().repeat_interleave(3, dim=-1)[..., : layer.shape[-1]])


# --- Decided at run time, where the rank is known ----------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize(
    ("shape", "saves_less"), [((5, 3), True), ((5, 4, 3), False), ((4, 4, 3), False), ((1, 4, 3), False)]
)
def test_linear_whose_input_has_three_dimensions(norm, shape, saves_less):
    """(N, L, C_in) becomes (N, L, C_out), and the batch norm normalises L, which here has the size of C_out."""
    model = prepared(Pair(nn.Linear(3, 4), norm(4)))
    graph_module = fused(model)
    assert_equivalent(model, graph_module, data(*shape))
    assert (saved_bytes(graph_module, data(*shape)) < saved_bytes(model, data(*shape))) == saves_less


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize(("shape", "saves_less"), [((3, 6), False), ((2, 3, 6), True), ((1, 3, 6), True)])
@pytest.mark.parametrize(
    "conv", [lambda: nn.Conv1d(3, 4, 3), lambda: nn.ConvTranspose1d(3, 8, 3)], ids=["conv", "transposed"]
)
def test_unbatched_conv1d(conv, norm, shape, saves_less):
    """(C_out, L) is read as (N, C) by the batch norm; here L has the size of C_out."""
    torch.manual_seed(0)
    conv = conv()
    model = prepared(Pair(conv, norm(conv.out_channels)))
    graph_module = fused(model)
    assert_equivalent(model, graph_module, data(*shape))
    assert (saved_bytes(graph_module, data(*shape)) < saved_bytes(model, data(*shape))) == saves_less


@pytest.mark.parametrize(
    ("weight_shape", "convolve", "shapes"),
    [
        ((4, 3), lambda m, x: F.linear(x, m.weight, m.bias), [(5, 3), (5, 4, 3), (2, 4, 5, 3)]),
        ((4, 3, 3), lambda m, x: F.conv1d(x, m.weight, m.bias), [(2, 3, 6), (3, 6)]),
        ((4, 3, 3, 3), lambda m, x: F.conv2d(x, m.weight, m.bias), [(2, 3, 6, 6), (3, 6, 6)]),
        ((3, 4, 3, 3), lambda m, x: F.conv_transpose2d(x, m.weight, m.bias), [(2, 3, 2, 2), (3, 2, 2)]),
        (
            (4, 3, 3, 3),
            lambda m, x: torch.convolution(x, m.weight, m.bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
            [(2, 3, 6, 6)],
        ),
    ],
    ids=["linear", "conv1d", "conv2d", "conv_transpose2d", "convolution"],
)
def test_functions_decide_at_run_time_too(weight_shape, convolve, shapes):
    torch.manual_seed(0)
    model = Functional(lambda m, x: m.normalize(convolve(m, x)), weight_shape, 4).double()
    graph_module = fused(model)
    for shape in shapes:
        assert_equivalent(model, graph_module, data(*shape))


def test_linear_then_flatten_then_batch_norm():
    """The channels are the right ones, but the convolution's own output is what is flattened."""
    model = prepared(
        Pair(nn.Linear(3, 4), nn.BatchNorm1d(4), lambda m, x: m.norm(m.conv(x).flatten(0, 1)).view(2, 5, 4))
    )
    graph_module = fused(model, 0)
    assert reasons(graph_module) == {"norm": "NOT_AFTER_CONVOLUTION"}
    assert_equivalent(model, graph_module, data(2, 5, 3))


def test_flatten_then_linear_then_batch_norm():
    model = prepared(
        Pair(nn.Linear(3, 4), nn.BatchNorm1d(4), lambda m, x: m.norm(m.conv(x.flatten(0, 1))).view(2, 5, 4))
    )
    assert_equivalent(model, fused(model), data(2, 5, 3))


def test_transposed_channels():
    """Linear over the last dimension with the channels moved to dimension 1: legal, and not a pair."""
    model = prepared(Pair(nn.Linear(3, 4), nn.BatchNorm1d(4), lambda m, x: m.norm(m.conv(x).transpose(1, 2))))
    assert_equivalent(model, fused(model, 0), data(2, 5, 3))


@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [
        (nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4), (3, 6, 5)),  # unbatched: (4, 4, 3) as (N, C, L)
        (nn.Linear(3, 5), nn.BatchNorm2d(4), (2, 4, 2, 3)),  # (2, 4, 2, 5) as (N, C, H, W)
        (nn.Conv3d(3, 5, 2), nn.BatchNorm2d(3), (3, 4, 3, 3)),  # unbatched: (5, 3, 2, 2) as (N, C, H, W)
        (nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm1d(4), (3, 3, 2)),
    ],
)
def test_norms_of_another_rank(conv, norm, shape):
    model = prepared(Pair(conv, norm))
    graph_module = fused(model, 0)
    assert reasons(graph_module) == {"norm": "CHANNELS_DIFFER"}
    assert_equivalent(model, graph_module, data(*shape))


@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [
        (nn.Linear(3, 2), nn.BatchNorm1d(4), (5, 4, 3)),  # (5, 4, 2) as (N, C, L)
        (nn.Conv1d(3, 2, 1), nn.BatchNorm1d(4), (3, 6)),  # raises: (2, 6) as (N, C)
        (nn.ConvTranspose1d(6, 6, 1, groups=2), nn.BatchNorm1d(3), (2, 6, 5)),  # raises
    ],
)
def test_channels_that_can_never_match(conv, norm, shape):
    model = prepared(Pair(conv, norm))
    for treated in (fused(model, 0), tuned_with(model, 0)):
        assert reasons(treated) == {"norm": "CHANNELS_DIFFER"}
        if "Linear" in str(conv):
            assert_equivalent(model, treated, data(*shape))


def test_channels_of_functions_that_can_never_match():
    def forward(m, x):
        y = F.linear(x, m.conv.weight)
        return F.batch_norm(y, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias)

    model = prepared(Pair(nn.Linear(3, 2), nn.BatchNorm1d(4), forward))
    graph_module = fused(model, 0)
    assert set(reasons(graph_module).values()) == {"CHANNELS_DIFFER"}
    assert_equivalent(model, graph_module, data(5, 4, 3))


class Formula(nn.Module):
    """A batch norm in Eval mode, written down."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, y):
        mean, variance, gamma, beta = (
            vector.view(1, -1, *[1] * (y.ndim - 2))
            for vector in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
        )
        return (y - mean) * torch.rsqrt(variance + self.norm.eps) * gamma + beta


@pytest.mark.parametrize("frozen", [False, True], ids=["all train", "conv frozen"])
@pytest.mark.parametrize("layer", ["strided", "grouped_transpose2d", "heavy", "heavy_transpose"])
def test_one_sample_whose_gradient_looks_like_channels_last(layer, frozen):
    """As after `flatten(2).transpose(1, 2)`, before a transformer.

    PyTorch's own batch norm (2.15, CPU, either mode) computes wrong gradients here, of everything: the strides of a
    single sample are ambiguous, and its kernel reads gradient and input with different ones.
    """
    layer = LAYOUTS[layer]
    model = layer.model()
    model.conv.requires_grad_(not frozen)
    graph_module = fused(model)
    reference = nn.Sequential(model.conv, Formula(model.norm))
    x = layer.input()[:1].requires_grad_()
    sources = [x, *(p for p in model.parameters() if p.requires_grad)]

    def gradients(net):
        output = net(x).flatten(2).transpose(1, 2)
        return torch.autograd.grad(output, sources, data(*output.shape, seed=3))

    torch.testing.assert_close(gradients(graph_module), gradients(reference))


# --- What Eval mode raises ----------------------------------------------------------------------------------------

WRONG_INPUTS = {
    "conv2d unbatched": ("conv2d", (2, 4, 5), ValueError),
    "conv2d of rank 1": ("conv2d", (2,), RuntimeError),
    "conv2d of rank 5": ("conv2d", (1, 2, 2, 4, 5), RuntimeError),
    "conv2d with other channels": ("conv2d", (2, 3, 4, 5), RuntimeError),
    "conv2d too small": ("conv2d", (2, 2, 2, 2), RuntimeError),
    "conv1d of rank 4": ("conv1d", (2, 2, 2, 6), RuntimeError),
    "conv1d unbatched, other length": ("conv1d", (2, 6), RuntimeError),
    "conv3d unbatched": ("conv3d", (2, 3, 3, 4), ValueError),
    "conv_transpose1d of rank 1": ("conv_transpose1d", (2,), (RuntimeError, ValueError)),
    "conv_transpose2d unbatched": ("conv_transpose2d", (2, 3, 4), ValueError),
    "conv_transpose2d with other channels": ("conv_transpose2d", (2, 3, 3, 4), RuntimeError),
    "linear of rank 1": ("linear", (2,), ValueError),
    "linear of rank 3, other length": ("linear", (5, 4, 2), RuntimeError),
    "linear of rank 4": ("linear", (5, 3, 2, 2), ValueError),
    "linear with other channels": ("linear", (5, 3), RuntimeError),
    "sync of rank 3, other length": ("sync_batch_norm", (2, 4, 5), RuntimeError),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_shapes_raise_as_before(case):
    kind, shape, error = WRONG_INPUTS[case]
    model = KINDS[kind].model()
    graph_module = fused(model)
    with pytest.raises(error):
        assert_equivalent(model, graph_module, data(*shape))


@pytest.mark.parametrize(
    "x",
    [
        data(2, 2, 4, 5, dtype=torch.float32),
        data(2, 2, 4, 5, dtype=torch.float16),
        torch.ones(2, 2, 4, 5, dtype=torch.long),
        torch.ones(2, 2, 4, 5, dtype=torch.complex128),
        torch.ones(2, 2, 4, 5, dtype=torch.bool),
    ],
    ids=lambda x: str(x.dtype),
)
def test_wrong_dtypes_raise_as_before(x):
    model = KINDS["conv2d"].model()
    graph_module = fused(model)
    with pytest.raises(RuntimeError):
        assert_equivalent(model, graph_module, x)


@pytest.mark.parametrize("x", [None, 3, [1.0]])
def test_what_is_no_tensor_raises_as_before(x):
    model = KINDS["conv2d"].model()
    graph_module = fused(model)
    with pytest.raises(TypeError):
        assert_equivalent(model, graph_module, x)


@pytest.mark.parametrize("change", ["conv", "norm", "mean", "gamma"])
def test_channels_that_do_not_match_raise_as_before(change):
    model = KINDS["conv2d"].model()
    graph_module = fused(model)
    if change == "conv":
        model.conv.weight = nn.Parameter(data(4, 2, 3, 3))
        model.conv.bias = None
    elif change == "norm":
        model.norm.running_mean, model.norm.running_var = data(1), data(1).abs()
    elif change == "mean":
        model.norm.running_mean = data(4)
    else:
        model.norm.weight = nn.Parameter(data(1))
    with pytest.raises(RuntimeError):
        assert_equivalent(model, graph_module, KINDS["conv2d"].input())


@pytest.mark.parametrize("shape", [(1,), (), (6, 4), (6, 1)])
def test_linear_with_a_bias_that_broadcasts(shape):
    model = Functional(lambda m, x: m.normalize(F.linear(x, m.weight, m.bias)), (4, 3), 4)
    model.bias = nn.Parameter(data(*shape))
    model.double()
    assert_equivalent(model, fused(model), data(6, 3))


@pytest.mark.parametrize("shape", [(1,), ()])
def test_conv_with_a_bias_of_a_wrong_shape_raises_as_before(shape):
    model = Functional(lambda m, x: m.normalize(F.conv2d(x, m.weight, m.bias)), (4, 3, 3, 3), 4)
    model.bias = nn.Parameter(data(*shape))
    model.double()
    graph_module = fused(model)
    with pytest.raises(RuntimeError):
        assert_equivalent(model, graph_module, data(2, 3, 5, 5))
