"""What random trees of modules are made of besides PyTorch's own: classes and functions as people write them."""

import enum
import functools

import torch
from torch import nn
from torch.nn import functional as F


class Way(enum.Enum):
    """What a forward branches on."""

    FIRST = 1
    SECOND = 2


def decorated(method):
    """Adds nothing but a frame."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return wrapper


def apply(module, x):
    return module(x)


def pick(number, modules):
    return modules[number]


class Numbered:
    """A plain object that has modules under numbered names."""

    def __init__(self, *modules):
        for number, module in enumerate(modules):
            setattr(self, f"part{number}", module)


class Holder:
    """A plain object that knows a module."""

    def __init__(self, module):
        self.module = module


# --- autograd functions ------------------------------------------------------------------------------------------


class Swish(torch.autograd.Function):
    """The memory-efficient activation of many repositories."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        return grad_output * (sigmoid * (1 + x * (1 - sigmoid)))


class ScaledGradient(torch.autograd.Function):
    """The identity, with half of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return 0.5 * grad_output


class SwishModule(nn.Module):
    def forward(self, x):
        return Swish.apply(x)


# --- Convolutions ------------------------------------------------------------------------------------------------


class NamedConv(nn.Conv2d):
    """With an attribute of its own, and PyTorch's forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = 2.0


class SamePaddingConv(nn.Conv2d):
    """Pads by itself and calls the function."""

    def forward(self, x):
        size = self.kernel_size[0] // 2
        x = F.pad(x, [size, size, size, size])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class DoublingConv(nn.Conv2d):
    """Does something with the output."""

    def forward(self, x):
        return 2 * super().forward(x)


class DoublingCallConv(nn.Conv2d):
    """Does it around the call."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class StandardizedConv(nn.Conv2d):
    """Does something with the weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class StandardizedInnerConv(nn.Conv2d):
    """The same, in the method that PyTorch's forward calls."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class PropertyConv(nn.Conv2d):
    """Its weight is computed when it is read."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.raw = self._parameters.pop("weight")

    @property
    def weight(self):
        return 2 * self.raw


class InterceptedConv(nn.Conv2d):
    """The same, by another way of Python's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.normal_(self._parameters["weight"])

    def __getattr__(self, name):
        value = super().__getattr__(name)
        return 2 * value if name == "weight" else value


class PlainConv(nn.Module):
    """Derives from no convolution."""

    def __init__(self, in_channels, out_channels, kernel_size, padding, bias):
        super().__init__()
        layer = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=bias)
        self.weight, self.bias, self.out_channels, self.padding = (
            layer.weight,
            layer.bias,
            out_channels,
            padding,
        )

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


# --- Batch norms -------------------------------------------------------------------------------------------------


class NamedNorm(nn.BatchNorm2d):
    """With an attribute of its own, and PyTorch's forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.act = nn.Tanh()  # that nobody calls


class ActivatedNorm(nn.BatchNorm2d):
    """Does something with the output."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


class DoublingNorm(nn.BatchNorm2d):
    """Does something with the input."""

    def forward(self, x):
        return super().forward(2 * x)


class FunctionalNorm(nn.Module):
    """A batch norm of one's own around the function."""

    def __init__(self, num_features, affine=True):
        super().__init__()
        self.num_features, self.eps = num_features, 1e-5
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.1, self.eps)


class FrozenNorm(nn.Module):
    """Four buffers and a formula, as detectors have it."""

    def __init__(self, num_features, affine=True):
        super().__init__()
        self.num_features, self.eps = num_features, 1e-5
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(num_features))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(num_features))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]
