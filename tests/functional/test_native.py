"""The operator in C++: the same as plain operations in everything but time; how it is built, or is not."""

import itertools
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import KINDS, LAYOUTS, Pair, data, fused, prepared, tuned_with
from mutants import core_check
from torch import nn
from torch.library import opcheck

from convbn_fx.functional import native
from convbn_fx.memory import saved_bytes

is_built = pytest.mark.skipif(native.operator is None, reason="the operator is not built: make setup")
LAYERS = KINDS | LAYOUTS

every_layer = pytest.mark.parametrize("layer", LAYERS)


def both(monkeypatch, function):
    """What a function returns with the operator, and without it."""
    with_operator = function()
    with monkeypatch.context() as patch:
        patch.setattr(native, "operator", None)
        return with_operator, function()


def results(model, x, sources, **options):
    output = model(x)
    wanted = [source for source in sources if source.requires_grad]
    found = torch.autograd.grad(output.square().sum(), wanted, **options) if wanted else ()
    return [output, *found]


# --- Equal to plain operations ------------------------------------------------------------------------------------


@is_built
@every_layer
def test_every_combination_of_gradients(layer, monkeypatch):
    model, x = fused(LAYERS[layer].model()), LAYERS[layer].input().requires_grad_()
    sources = [x, *model.parameters()]
    for wanted in itertools.product([False, True], repeat=len(sources)):
        for source, is_wanted in zip(sources, wanted, strict=True):
            source.requires_grad_(is_wanted)
        actual, expected = both(monkeypatch, lambda: results(model, x, sources))
        torch.testing.assert_close(actual, expected, msg=lambda text, wanted=wanted: f"{wanted}: {text}")
        if any(wanted):
            assert actual[0].grad_fn is not None
            in_cpp, in_python = both(monkeypatch, lambda: saved_bytes(model, x))
            assert in_cpp <= in_python, wanted


@is_built
@every_layer
@pytest.mark.parametrize(
    ("dtype", "norm_dtype"),
    [
        *((dtype, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        *((dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_every_dtype(layer, dtype, norm_dtype, monkeypatch):
    model, x = LAYERS[layer].model(dtype), LAYERS[layer].input(dtype).requires_grad_()
    model.norm.to(norm_dtype)
    graph_module = fused(model)
    sources = [x, *model.parameters()]
    actual, expected = both(monkeypatch, lambda: results(graph_module, x, sources))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 3e-2)
    for found, wanted in zip(actual, expected, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@is_built
@every_layer
@pytest.mark.parametrize("memory_format", ["transposed weight", "expanded vectors", "channels_last"])
def test_every_memory_format(layer, memory_format, monkeypatch):
    """The loops are for weights whose channels lie together; whatever else there is takes another way."""
    model, x = LAYERS[layer].model(), LAYERS[layer].input()
    if memory_format == "transposed weight":
        weight = model.conv.weight.data
        model.conv.weight.data = weight.transpose(0, 1).contiguous().transpose(0, 1)
    elif memory_format == "expanded vectors":
        model.norm.running_var = torch.tensor(0.7, dtype=torch.float64).expand(len(model.norm.running_var))
        model.norm.weight.data = torch.stack([model.norm.weight.data] * 2, 1)[:, 0]
    elif x.ndim == 4:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    graph_module, x = fused(model), x.requires_grad_()
    actual, expected = both(monkeypatch, lambda: results(graph_module, x, [x, *model.parameters()]))
    torch.testing.assert_close(actual, expected)


@is_built
@every_layer
@pytest.mark.parametrize("trains", [True, False])
def test_the_output_may_be_changed_in_place(layer, trains, monkeypatch):
    model, x = (
        fused(LAYERS[layer].model().requires_grad_(trains)),
        LAYERS[layer].input().requires_grad_(trains),
    )
    sources = [x, *model.parameters()]
    actual, expected = both(monkeypatch, lambda: results(lambda x: model(x).mul_(2).tanh_(), x, sources))
    torch.testing.assert_close(actual, expected)


@is_built
@every_layer
def test_gradients_of_gradients(layer):
    model, x = fused(LAYERS[layer].model()), LAYERS[layer].input().requires_grad_()
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert "CppNode" in model(x).grad_fn.name()

    def call(x, *values):
        return torch.ops.convbn_fx.conv_batch_norm(
            *arguments(model, x, dict(zip(names, values, strict=True)))
        )

    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


def arguments(model, x, parameters):
    """Those of the operator."""
    conv, norm = model.conv, model.norm
    geometry = ((), (), (), False, (), 1)
    if not isinstance(conv, nn.Linear):
        geometry = (
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.transposed,
            conv.output_padding,
            conv.groups,
        )
    return (
        x,
        *(parameters.get(name) for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")),
        *(norm.running_mean, norm.running_var, norm.eps),
        *geometry,
    )


@is_built
@pytest.mark.parametrize("layer", ["conv2d", "grouped_transpose2d", "linear", "heavy"])
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the check's own
@pytest.mark.parametrize("trains", [True, False])
def test_it_is_a_proper_operator(layer, trains):
    model, x = LAYERS[layer].model(torch.float32).requires_grad_(trains), LAYERS[layer].input(torch.float32)
    opcheck(
        torch.ops.convbn_fx.conv_batch_norm.default,
        arguments(model, x.requires_grad_(trains), dict(model.named_parameters())),
        # Not with dynamic shapes: what compilers capture is the formula.
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        ),
    )


@is_built
def test_large_weights_on_several_threads(monkeypatch):
    model = prepared(Pair(nn.Conv2d(96, 128, 3), nn.BatchNorm2d(128)), torch.float32)
    graph_module, x = fused(model), data(3, 96, 24, 24, dtype=torch.float32).requires_grad_()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        actual, expected = both(monkeypatch, lambda: results(graph_module, x, [x, *model.parameters()]))
    finally:
        torch.set_num_threads(threads)
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@is_built
def test_no_mutant_would_pass_the_check_that_the_operator_passes():
    core_check()


# --- Building -----------------------------------------------------------------------------------------------------

SCRIPT = """
import warnings
warnings.simplefilter("always")
import torch, convbn_fx
from convbn_fx.functional import native
print("imported", native.operator is not None)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
for _ in range(2):
    tuned = convbn_fx.tune(model)
x = torch.randn(2, 3, 8, 8)
torch.testing.assert_close(tuned(x), model(x))
tuned(x).sum().backward()
print("loaded", native.operator is not None, tuned(x).grad_fn.name())
"""


def started(cache, code=SCRIPT, **environment):
    """A process with a cache of its own."""
    variables = {name: value for name, value in os.environ.items() if name != "CONVBN_FX_NATIVE"}
    command = [sys.executable, *(["-c", code] if code else ["-m", "convbn_fx", "build"])]
    return subprocess.Popen(
        command,
        env={**variables, "TORCH_EXTENSIONS_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    output, errors = process.communicate(timeout=280)
    return process.returncode, output, errors


def script(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.slow
@is_built
def test_two_processes_build_once(tmp_path):
    processes = [started(tmp_path), started(tmp_path)]
    ends = [finished(process) for process in processes]
    for status, output, errors in ends:
        assert status == 0, errors
        assert "imported False" in output
        assert "loaded True" in output
        assert "Warning" not in errors
    said = "".join(errors for *_, errors in ends)
    assert said.count("building its operator") == said.count("built in") == 1
    assert said.count("waiting for another process") <= 1
    (library,) = tmp_path.rglob("*.so")
    assert not [path for path in library.parent.iterdir() if path.is_dir()]

    status, output, errors = finished(
        started(tmp_path)
    )  # and a later one finds it when it imports the library
    assert (status, errors) == (0, "")
    assert "imported True" in output
    status, output, errors = finished(started(tmp_path, code=None))
    assert (status, output, errors) == (0, f"{library}\n", "")


def without_operator(end):
    """That a process went on on plain operations, and told so at most once; returns what it told."""
    status, output, errors = end
    assert status == 0, errors
    assert "imported False" in output
    assert "loaded False _FusedConvolutionBackward" in output
    assert errors.count("Warning") <= 1
    return errors


def test_without_a_compiler(tmp_path):
    (empty := tmp_path / "bin").mkdir()
    told = without_operator(finished(started(tmp_path, PATH=str(empty))))
    assert "<string>:9: RuntimeWarning: convbn_fx runs without its operator" in told
    assert "install a C++ compiler (there is no c++ on the PATH), pip install ninja" in told
    status, _, errors = finished(started(tmp_path, PATH=str(empty), CONVBN_FX_NATIVE="require"))
    assert status == 1
    assert "BuildError: To have it built: install a C++ compiler" in errors
    status, _, errors = finished(started(tmp_path, code=None, PATH=str(empty)))
    assert (status, errors.count("\n")) == (1, 1)


def test_a_build_that_fails_is_not_tried_again_unless_told_to(tmp_path):
    (folder := tmp_path / "bin").mkdir()
    script(folder, "c++", f"echo tried >>{tmp_path}/tries; echo 'no such header' >&2; exit 1")
    script(folder, "ninja", "echo 1.11; [ $# -gt 1 ] || exit 0; c++")
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    told = without_operator(finished(started(tmp_path, PATH=path)))
    assert "Building it has failed" in told
    (log,) = tmp_path.rglob("*.failed")
    tries = (tmp_path / "tries").read_text()
    assert str(log) in told
    assert "Building it has failed before" in without_operator(finished(started(tmp_path, PATH=path)))
    assert (tmp_path / "tries").read_text() == tries
    status, _, errors = finished(started(tmp_path, code=None, PATH=path))
    assert status == 1
    assert "Building it has failed:" in errors
    assert len((tmp_path / "tries").read_text()) > len(tries)


def test_where_nothing_can_be_written(tmp_path):
    (file := tmp_path / "file").touch()
    assert "set TORCH_EXTENSIONS_DIR to a directory that can" in without_operator(finished(started(file)))


def test_a_build_that_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native.library().parent.mkdir(parents=True)
    native.library().write_bytes(b"of another machine")
    assert "cannot be loaded: remove it" in without_operator(finished(started(tmp_path)))


def test_switched_off(tmp_path):
    assert without_operator(finished(started(tmp_path, CONVBN_FX_NATIVE="0"))) == ""
    assert not any(tmp_path.iterdir())
    status, _, errors = finished(started(tmp_path, CONVBN_FX_NATIVE="yes"))
    assert status == 1
    assert "CONVBN_FX_NATIVE is 'yes'; it may be 0, 1 or require" in errors


def test_a_build_belongs_to_its_source_and_pytorch(monkeypatch, tmp_path):
    library = native.library()
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert native.library() != library
    monkeypatch.undo()
    assert native.library() == library
    (tmp_path / "other.cpp").write_text("int main() {}")
    monkeypatch.setattr(native, "_SOURCES", tmp_path)
    assert native.library() != library


def test_tests_build_nothing():
    assert native.operator is not None or os.environ["CONVBN_FX_NATIVE"] == "0"
    tuned_with(prepared(Pair()), 1)
    assert list(Path(native._SOURCES).glob("*.cpp"))
