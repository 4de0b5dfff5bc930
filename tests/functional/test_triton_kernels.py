"""The kernels of CUDA, run by Triton's interpreter on the CPU, against the plain operations."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

#: Runs in a process of its own: whether Triton interprets is decided when the kernels are made.
CHECK = """
import torch
from torch.testing import assert_close

from convbn_fx.functional.folding import Folding
from convbn_fx.operands import BatchNorm, Convolution
from convbn_fx.functional.triton_kernels import KernelFolding, applies_to

torch.manual_seed(0)


def check(weight, transposed=False, groups=1, bias=True, affine=True):
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    vector = lambda: torch.randn(channels)
    conv = Convolution("", weight, vector() if bias else None, transposed=transposed, groups=groups)
    parameters = (vector(), vector()) if affine else (None, None)
    norm = BatchNorm(vector(), vector().abs() + 0.1, *parameters, 1e-3)
    assert applies_to(conv, norm)
    plain, kernels = Folding(conv, norm), KernelFolding(conv, norm)
    assert_close(kernels.parameters(), plain.parameters())
    assert_close(kernels.weight(), plain.weight())
    for wanted in ((True, True, True), (False, False, True), (True, False, False), (True, True, False)):
        grad_weight, grad_shift = torch.randn_like(weight), vector()
        gradients = [
            folding.gradients(grad_weight.clone(), grad_shift, torch.empty_like(weight), *wanted)
            for folding in (kernels, plain)
        ]
        assert [gradient is not None for gradient in gradients[0]] == list(wanted)
        assert_close(*gradients)
    assert_close(
        kernels.gradients(grad_weight.clone(), None, None, True, False, False),
        plain.gradients(grad_weight.clone(), None, None, True, False, False),
    )


check(torch.randn(5, 3, 3, 3))
check(torch.randn(4, 300, 3, 3).to(memory_format=torch.channels_last), bias=False)
check(torch.randn(8, 1, 3, 3), groups=8, affine=False)
check(torch.randn(6, 4, 3, 3), transposed=True, groups=2)
check(torch.randn(3, 4, 2), transposed=True, bias=False)
check(torch.randn(7, 9), bias=False, affine=False)

channels_last = torch.randn(4, 4, 3, 3).to(memory_format=torch.channels_last)
norm = BatchNorm(torch.zeros(4), torch.ones(4))
assert not applies_to(Convolution("", channels_last, transposed=True), norm)
assert not applies_to(Convolution("", channels_last.double()), norm)
assert not applies_to(Convolution("", channels_last[:, ::2]), norm)
conv = Convolution("", channels_last)
gradient = torch.randn(4, 4, 3, 3)  # laid out in another way than the weight
assert_close(
    KernelFolding(conv, norm).gradients(gradient.clone(), torch.ones(4), None, True, True, True),
    Folding(conv, norm).gradients(gradient.clone(), torch.ones(4), None, True, True, True),
)
"""


def test_kernels_compute_what_the_plain_operations_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    subprocess.run([sys.executable, "-c", CHECK], check=True, timeout=200)
