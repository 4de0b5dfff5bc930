"""Models for the sweep's tests, as a user would name them: `zoo_models:small`. Some do what no model should."""

import os
import signal
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


def small():
    """Two pairs, and a batch norm without a convolution."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, stride=2),
        nn.BatchNorm2d(4),
    )


def with_inputs():
    """A model of no images, which brings its inputs along."""
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (torch.ones(5, 4),)


class Functions(nn.Module):
    """Convolution and batch norm as functions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, image):
        return F.batch_norm(F.conv2d(image, self.weight), self.running_mean, self.running_var)


def functions():
    return Functions()


def without_batch_norm():
    return nn.Conv2d(3, 4, 3)


def broken():
    raise RuntimeError("no such\nluck, <really>")


def no_model():
    return 7


class Refusing(nn.Module):
    """Built without trouble, and raises when it is called."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, image):
        raise ValueError("never, on any input")


def refusing():
    return Refusing()


def chatty():
    sys.stdout.write("a line on stdout\n")
    sys.stderr.write("a line on stderr\n")
    return small()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def aborting():
    os.abort()


def exiting():
    os._exit(3)


def hanging():
    time.sleep(1000)


def hungry():
    """Takes 2 GB, bit by bit, and holds them."""
    held = []
    for _ in range(20):
        held.append(bytearray(os.urandom(1) * 100_000_000))
        time.sleep(0.1)
    time.sleep(1000)


def _slowly():
    time.sleep(0.7)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


#: What is measured slowly enough to be interrupted: `zoo_models:slow_0`, ...
SLOW = [f"zoo_models:slow_{number}" for number in range(8)]
globals().update({name.partition(":")[2]: _slowly for name in SLOW})


def pretrained(pretrained=False):
    """Tells whether trained weights were asked for, by its bias."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.constant_(model[0].bias, float(pretrained))
    return model
