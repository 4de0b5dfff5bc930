"""Bytes saved for the backward pass, against what one can count by hand."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import symbolic_trace
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

import convbn_fx
from convbn_fx.memory import saved_bytes

X = torch.zeros(2, 3, 8, 8)
X_BYTES = 2 * 3 * 8 * 8 * 4
Y_BYTES = 2 * 5 * 6 * 6 * 4  # what a 3x3 convolution to 5 channels makes of X


def conv():
    return nn.Conv2d(3, 5, 3)


@pytest.fixture(params=[False, True], ids=["real", "fake"])
def count(request):
    return lambda *args, **kwargs: saved_bytes(*args, fake=request.param, **kwargs)


def test_a_convolution_keeps_its_input(count):
    assert count(conv(), X) == X_BYTES
    assert count(conv(), X.double().float()) == X_BYTES
    assert count(conv().double(), X.double()) == 2 * X_BYTES


def test_only_what_the_gradients_need_is_kept(count):
    assert count(conv().requires_grad_(False), X) == 0
    frozen = nn.Linear(8, 5).requires_grad_(False)
    assert count(frozen, X.clone().requires_grad_()) == 0
    # an eager convolution keeps an input that it does not need
    assert count(conv().requires_grad_(False), X.clone().requires_grad_()) == X_BYTES


def test_an_eval_mode_batch_norm_keeps_the_output_of_the_convolution_too(count):
    model = nn.Sequential(conv(), nn.BatchNorm2d(5)).eval()
    assert count(model, X) == X_BYTES + Y_BYTES
    assert count(symbolic_trace(model), X) == X_BYTES + Y_BYTES


def test_a_train_mode_batch_norm_keeps_its_statistics_besides(count):
    model = nn.Sequential(conv(), nn.BatchNorm2d(5))
    assert count(model, X) == X_BYTES + Y_BYTES + 2 * 5 * 4


def test_one_storage_is_counted_once(count):
    assert count(nn.Sequential(conv(), nn.ReLU()), X) == X_BYTES + Y_BYTES
    two_readers = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
    assert count(two_readers, X.clone().requires_grad_()) == X_BYTES
    views = nn.Sequential(nn.ReLU(), nn.Flatten(1), nn.Linear(192, 2))
    assert count(views, X.clone().requires_grad_()) == X_BYTES


def test_a_view_keeps_the_whole_storage(count):
    class Part(nn.Module):
        def forward(self, x):
            return x.sin()[:, :1].exp().sum() + x.cos()[0].square().sum()

    bytes_of_exp = X_BYTES // 3
    assert count(Part(), X.clone().requires_grad_()) == 2 * X_BYTES + bytes_of_exp


def test_one_input_passed_twice_is_one_input(count):
    class Product(nn.Module):
        def forward(self, x, y):
            return x * y

    x = X.clone().requires_grad_()
    assert count(Product(), x, x) == X_BYTES
    assert count(Product(), x, x.detach().clone().requires_grad_()) == 2 * X_BYTES
    assert count(Product(), x, kwargs={"y": x}) == X_BYTES


def test_parameters_and_buffers_are_left_out(count):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000, 10))
            self.register_buffer("mask", torch.ones(1000, 10))

        def forward(self, x):
            return x * (self.weight.t() * self.mask.t()).sum() * x

    # x * sum keeps x and the scalar; (x * sum) * x keeps x and the product; weight and mask are the model's
    assert count(Scale(), X.clone().requires_grad_()) == 2 * X_BYTES + 4


def test_a_graph_that_is_dropped_keeps_nothing(count):
    class Auxiliary(nn.Module):
        def forward(self, x):
            for _ in range(3):
                x.exp().sin()
            return x.exp()

    assert count(Auxiliary(), X.clone().requires_grad_()) == X_BYTES


def test_nothing_is_kept_without_grad_mode(count):
    with torch.no_grad():
        assert count(conv(), X) == 0


def test_gradients_inside_the_forward_pass_work():
    class Penalty(nn.Module):
        def forward(self, x):
            x = x.exp()
            (gradient,) = torch.autograd.grad(x.square().sum(), x, create_graph=True)
            assert torch.equal(gradient, 2 * x)
            return gradient.square().sum()

    assert saved_bytes(Penalty(), X.clone().requires_grad_()) > 0


def test_what_inner_hooks_keep_is_invisible(count):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    assert count(Checkpointed(conv(), nn.ReLU()), X.clone().requires_grad_()) == X_BYTES


def test_real_equals_fake_for_a_whole_network_in_either_mode():
    torch.manual_seed(0)
    model, image = resnet18(), torch.randn(2, 3, 64, 64)
    for training in (True, False):
        model.train(training)
        real = saved_bytes(model, image)
        assert real == saved_bytes(model, image, fake=True) == saved_bytes(model, image, fake=True)
        assert real > 3e6
    with FakeTensorMode():
        fake = resnet18().eval()
        assert saved_bytes(fake, torch.empty(2, 3, 64, 64)) == real


def test_a_large_batch_needs_no_memory():
    huge = torch.empty(()).expand(100_000, 3, 224, 224)  # 60 GB
    model = nn.Sequential(conv(), nn.BatchNorm2d(5)).eval()
    assert saved_bytes(model, huge, fake=True) == 100_000 * (3 * 224**2 + 5 * 222**2) * 4


def test_the_model_and_the_random_state_are_left_as_found(count):
    class Fails(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    model = nn.Sequential(conv(), nn.BatchNorm2d(5), nn.Dropout(), nn.Identity())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    state, x = torch.get_rng_state(), X.clone()
    count(model, x)
    model[3] = Fails()
    with pytest.raises(ZeroDivisionError):
        count(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert identities == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, X)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_activations_save_is_counted_without_memory_too(activation, inplace):
    pair = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(inplace=inplace))
    tuned = convbn_fx.tune(nn.Sequential(pair, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval())
    shape = (2, 3, 32, 32)
    counted = saved_bytes(tuned, torch.empty(()).expand(shape), fake=True)
    assert counted == saved_bytes(tuned, torch.randn(shape))
