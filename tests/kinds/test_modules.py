"""How modules hold their operands: batch norms without this or that, extreme values; all is read at every call."""

import copy

import pytest
import torch
from models import KINDS, LAYOUTS, Pair, data, fused, prepared, reasons
from strategies import SMALLEST_EPS
from torch import nn

from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent, randomize_batchnorms

LAYERS = {
    name: (KINDS | LAYOUTS)[name]
    for name in (
        "conv2d",
        "linear",
        "conv1d",
        "grouped_transpose2d",
        "depthwise2d",
        "no_bias",
        "linear_no_bias",
    )
}


def without_gamma(norm):
    norm.weight = None


def without_beta(norm):
    norm.bias = None


def without_both(norm):
    norm.weight = norm.bias = None
    norm.affine = False


def without_momentum(norm):
    norm.momentum = None


def eps_zero(norm):
    norm.eps = SMALLEST_EPS


def eps_large(norm):
    norm.eps = 3.0


def eps_as_integer(norm):
    norm.eps = 1


def variance_zero(norm):
    norm.running_var.data[0] = 0.0


def variance_huge(norm):
    norm.running_var.data.fill_(1e12)


def gamma_zero(norm):
    norm.weight.data.zero_()


def gamma_partly_zero(norm):
    norm.weight.data[::2] = 0.0


def gamma_negative(norm):
    norm.weight.data.abs_().neg_()


def gamma_huge(norm):
    norm.weight.data.mul_(1e12)


def gamma_tiny(norm):
    norm.weight.data.mul_(1e-30)


def statistics_marked_untracked(norm):
    """Eval mode uses statistics that are there, whatever the flag says."""
    norm.track_running_stats = False


def gamma_and_beta_as_constants(norm):
    gamma, beta = norm.weight.detach(), norm.bias.detach()
    del norm.weight, norm.bias
    norm.weight, norm.bias = gamma, beta


VARIANTS = [
    without_gamma,
    without_beta,
    without_both,
    without_momentum,
    eps_zero,
    eps_large,
    eps_as_integer,
    variance_zero,
    variance_huge,
    gamma_zero,
    gamma_partly_zero,
    gamma_negative,
    gamma_huge,
    gamma_tiny,
    statistics_marked_untracked,
    gamma_and_beta_as_constants,
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_before_and_after_the_rewrite(variant, layer):
    layer = LAYERS[layer]
    model = layer.model()
    graph_module = fused(model)
    variant(model.norm)
    assert_equivalent(model, graph_module, layer.input())
    assert saved_bytes(graph_module, layer.input()) < saved_bytes(model, layer.input())
    graph_module = fused(model)
    assert_equivalent(model, graph_module, layer.input())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_variants_as_constructed(affine, momentum, bias):
    norm = nn.BatchNorm2d(4, eps=1e-3, affine=affine, momentum=momentum)
    model = prepared(Pair(nn.Conv2d(3, 4, 3, bias=bias), norm))
    graph_module = fused(model)
    assert_equivalent(model, graph_module, data(2, 3, 5, 5))
    model.norm.train()
    assert_equivalent(model, graph_module, data(2, 3, 5, 5))


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_without_running_statistics(affine):
    model = prepared(Pair(norm=nn.BatchNorm2d(4, affine=affine, track_running_stats=False)))
    graph_module = fused(model, 0)
    assert reasons(graph_module) == {"norm": "NO_RUNNING_STATISTICS"}
    assert_equivalent(model, graph_module, data(2, 3, 5, 5))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_want_a_gradient_raise_as_before(name):
    model = prepared(Pair())
    graph_module = fused(model)
    getattr(model.norm, name).requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        assert_equivalent(model, graph_module, data(2, 3, 5, 5))


def test_running_statistics_taken_away_after_the_rewrite():
    model = prepared(Pair())
    graph_module = fused(model)
    mean, var = model.norm.running_mean, model.norm.running_var
    model.norm.running_mean = model.norm.running_var = None
    assert_equivalent(model, graph_module, data(2, 3, 5, 5))
    model.norm.running_mean = mean
    with pytest.raises(RuntimeError):
        assert_equivalent(model, graph_module, data(2, 3, 5, 5))
    model.norm.running_var = var
    assert_equivalent(model, graph_module, data(2, 3, 5, 5))
    assert saved_bytes(graph_module, data(2, 3, 5, 5)) < saved_bytes(model, data(2, 3, 5, 5))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("place", ["input", "running_mean", "gamma", "conv weight", "conv bias"])
def test_values_that_are_not_finite_stay_in_their_channel(value, place):
    """What is finite in Eval mode is finite, and the same; what is not, is not."""
    model = prepared(Pair())
    graph_module = fused(model)
    x = data(2, 3, 5, 5)
    tensor = {
        "input": x[0, 0, 0],
        "running_mean": model.norm.running_mean,
        "gamma": model.norm.weight.data,
        "conv weight": model.conv.weight.data[0, 0, 0],
        "conv bias": model.conv.bias.data,
    }[place]
    tensor[0] = float(value)
    expected, actual = model(x), graph_module(x)
    finite = expected.isfinite()
    assert finite.any()
    assert not finite.all()
    assert torch.equal(actual.isfinite(), finite)
    torch.testing.assert_close(actual[finite], expected[finite])


@pytest.mark.skipif(SMALLEST_EPS > 0, reason="PyTorch takes no eps of 0")
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_variance_and_eps_zero(mean):
    """The scale of a channel is infinite: not a number to agree on, but no other channel may suffer."""
    model = prepared(Pair())
    graph_module = fused(model)
    model.norm.eps, model.norm.running_var[0], model.norm.running_mean[0] = 0.0, 0.0, mean
    x = data(2, 3, 5, 5)
    expected, actual = model(x), graph_module(x)
    assert not expected[:, 0].isfinite().any()
    assert not actual[:, 0].isfinite().any()
    torch.testing.assert_close(actual[:, 1:], expected[:, 1:])


# --- Everything is read at every call -----------------------------------------------------------------------------


def other_parameters(model):
    torch.manual_seed(7)
    model.conv.weight = nn.Parameter(torch.randn_like(model.conv.weight))
    model.conv.bias = nn.Parameter(torch.randn_like(model.conv.bias))
    model.norm.weight = nn.Parameter(torch.randn_like(model.norm.weight))
    model.norm.bias = nn.Parameter(torch.randn_like(model.norm.bias))


def other_statistics(model):
    model.norm.running_mean = data(*model.norm.running_mean.shape, seed=3)
    model.norm.running_var = data(*model.norm.running_var.shape, seed=4).abs()


def changes_in_place(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
            tensor.mul_(1.5)


def changes_through_data(model):
    """These leave no trace in a version counter."""
    for tensor in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
        tensor.data.mul_(1.5)


def other_numbers_of_the_conv(model):
    model.conv.stride, model.conv.padding, model.conv.dilation = (2, 1), (1, 2), (1, 2)


def a_string_padding(model):
    model.conv.padding = "same"


def more_channels(model):
    model.conv.weight = nn.Parameter(data(6, 3, 1, 1))
    model.conv.bias = None
    vars(model.norm).update(vars(randomize_batchnorms(nn.BatchNorm2d(6).double().eval(), 5)))


def more_groups(model):
    more_channels(model)
    model.conv.weight = nn.Parameter(data(6, 1, 3, 3))
    model.conv.groups = 3


def no_conv_bias(model):
    model.conv.bias = None


def an_optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(data(2, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def another_state(model):
    model.load_state_dict({name: value * 2 + 1 for name, value in model.state_dict().items()})


LIVE = [
    other_parameters,
    other_statistics,
    changes_in_place,
    changes_through_data,
    other_numbers_of_the_conv,
    a_string_padding,
    more_channels,
    more_groups,
    no_conv_bias,
    an_optimizer_step,
    another_state,
]


@pytest.mark.parametrize("change", LIVE)
def test_changes_after_the_rewrite_take_effect_at_once(change):
    model = prepared(Pair())
    graph_module = fused(model)
    before = graph_module(data(2, 3, 6, 6))
    change(model)
    after = graph_module(data(2, 3, 6, 6))
    assert after.shape != before.shape or not torch.allclose(after, before)
    assert_equivalent(model, graph_module, data(2, 3, 6, 6))
    assert saved_bytes(graph_module, data(2, 3, 6, 6)) < saved_bytes(model, data(2, 3, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moved_to_another_dtype_after_the_rewrite(dtype):
    model = prepared(Pair())
    graph_module = fused(model)
    graph_module.to(dtype)
    assert model.conv.weight.dtype == dtype
    assert_equivalent(model, graph_module, data(2, 3, 6, 6, dtype=dtype))


def test_moved_to_the_meta_device_after_the_rewrite():
    model = prepared(Pair())
    graph_module = fused(model).to("meta")
    output = graph_module(data(2, 3, 6, 6).to("meta"))
    assert output.is_meta
    assert output.shape == (2, 4, 4, 4)


def test_a_training_run_follows_eval_mode():
    """Step for step the same parameters, because every gradient is the same."""
    model = prepared(Pair())
    reference = copy.deepcopy(model)
    graph_module = fused(model)
    runs = [
        (net, torch.optim.Adam(net.parameters(), 1e-2, weight_decay=1e-2))
        for net in (reference, graph_module)
    ]
    for step in range(5):
        for net, optimizer in runs:
            optimizer.zero_grad()
            net(data(2, 3, 6, 6, seed=step)).square().mean().backward()
            optimizer.step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-9, atol=1e-12)
