"""The operator in C++: built once by PyTorch's own means, loaded where it is built, and nobody's condition.

A build belongs to one version of PyTorch, of Python and of the source. The first `tune`, `transform` or `deploy` that
finds none makes it, in PyTorch's directory for such builds (`TORCH_EXTENSIONS_DIR`); `python -m convbn_fx build` makes
it ahead. Without a compiler everything runs on the plain operations of [`autograd`][convbn_fx.functional.autograd],
after one warning.

The environment variable `CONVBN_FX_NATIVE` is `0` to do without the operator, `require` to have an error in the
warning's place.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional as F

from convbn_fx.functional.geometry import Geometry
from convbn_fx.operands import BatchNorm, Convolution

_SOURCES: Final = Path(__file__).with_name("cpp")
_NAME: Final = "convbn_fx_native"
_FLAGS: Final = ["-O3", "-fno-math-errno"]  # with it, a square root is an instruction

#: The operator; None where it is not loaded.
operator: Callable[..., torch.Tensor] | None = None
#: Activations by the operator, and the numbers of their kinds.
activation: Callable[..., torch.Tensor]
activation_: Callable[..., torch.Tensor]
activation_kinds: dict[str, int] = {}

#: What Python calls without boxes (`cpp/python.cpp`); None where it is not loaded.
calls: Any = None

_building: Final = threading.Lock()
_has_been_tried = False


class BuildError(RuntimeError):
    """The operator could not be built; the message says why, and what to do."""


def wish() -> str:
    """What the environment says: `0`, `require`, or nothing.

    Raises:
        ValueError: It says something else.
    """
    value = os.environ.get("CONVBN_FX_NATIVE", "")
    if value not in ("", "0", "1", "require"):
        raise ValueError(f"CONVBN_FX_NATIVE is {value!r}; it may be 0, 1 or require")
    return value


def library() -> Path:
    """Where the build for this PyTorch, Python and source is, or would be."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    python = f"{sys.implementation.cache_tag}-{platform.machine()}"
    sources = b"".join(file.read_bytes() for file in sorted(_SOURCES.iterdir()))
    source = hashlib.sha256(sources + " ".join(_FLAGS).encode()).hexdigest()[:12]
    return Path(root) / "convbn_fx" / f"{torch.__version__}-{python}-{source}" / f"{_NAME}.so"


def load() -> bool:
    """Loads the operator if there is a build. Returns whether it is loaded."""
    global operator, calls, activation, activation_  # noqa: PLW0603 - what a call finds soonest are a module's attributes
    if operator is None and wish() != "0":
        with suppress(
            OSError, RuntimeError
        ):  # no home, nothing built, or built by another compiler's runtime
            path = library()
            if path.exists():
                torch.ops.load_library(path)
                operators = torch.ops.convbn_fx
                activation_kinds.update((name, i) for i, name in enumerate(operators.activation_kinds()))
                activation, activation_ = operators.activation.default, operators.activation_.default
                operator = operators.conv_batch_norm.default
                spec = spec_from_file_location(f"{__package__}.{_NAME}", path)
                with suppress(ImportError):  # it was built without headers of Python's
                    calls = module_from_spec(spec)  # type: ignore[arg-type] # the file is there
                    activation, activation_ = calls.activation, calls.activation_
    return operator is not None


def ensure() -> None:
    """Loads the operator, built if need be; once in a process.

    Raises:
        BuildError: It cannot be built, and the environment requires it.
    """
    global _has_been_tried  # noqa: PLW0603 - once in a process
    if operator is not None or (_has_been_tried and wish() != "require") or wish() == "0":
        return
    with _building:
        if load():
            return
        try:
            build()
        except BuildError as error:
            if wish() == "require":
                raise
            if not _has_been_tried:
                _has_been_tried = True
                warnings.warn(
                    f"convbn_fx runs without its operator in C++, correct and slower. {error} "
                    "CONVBN_FX_NATIVE=0 silences this.",
                    RuntimeWarning,
                    stacklevel=3,
                )


def build(*, again: bool = False) -> Path:
    """Builds the operator unless it is built, and loads it.

    Args:
        again: Whether to try where it has failed before.

    Returns:
        The library.

    Raises:
        BuildError: It cannot be built.
    """
    try:
        path = library()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _compile(path, again)
    except OSError as error:
        raise BuildError(
            f"Nothing can be written where it is built ({error}): set TORCH_EXTENSIONS_DIR to a directory that can."
        ) from error
    if not load():
        raise BuildError(f"{path} cannot be loaded: remove it, and run `python -m convbn_fx build`.")
    return path


def _compile(path: Path, again: bool) -> None:
    """Compiles into a directory of its own, and moves the library to its place when it is whole."""
    failed = path.with_suffix(".failed")
    if failed.exists() and not again:
        raise BuildError(
            f"Building it has failed before: {failed} tells; `python -m convbn_fx build` tries again."
        )
    _check_tools()
    began = time.monotonic()
    _say(f"building its operator in C++ for torch {torch.__version__}, once: half a minute...")
    directory = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        with _without_advice():
            from torch.utils import cpp_extension

            cpp_extension.load(
                _NAME,
                [str(file) for file in sorted(_SOURCES.glob("*.cpp"))],
                extra_cflags=_FLAGS,
                build_directory=str(directory),
                is_python_module=False,
            )
        (directory / path.name).replace(path)
        failed.unlink(missing_ok=True)
    except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
        failed.write_text(str(error))
        raise BuildError(
            f"Building it has failed: {failed} tells; once that is mended, run `python -m convbn_fx build`."
        ) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    _say(f"built in {time.monotonic() - began:.0f} seconds: {path}")


def _check_tools() -> None:
    """What is missing is found in no time, so that it need not be remembered."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    missing = [
        cure
        for is_there, cure in (
            (shutil.which(compiler), f"install a C++ compiler (there is no {compiler} on the PATH)"),
            (shutil.which("ninja"), "pip install ninja"),
            (_is_importable("setuptools"), "pip install setuptools"),
        )
        if not is_there
    ]
    if missing:
        raise BuildError(f"To have it built: {', '.join(missing)}.")


def _is_importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The system takes the lock from a process that dies; without locks both may build."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        with suppress(OSError):  # a file system that knows none
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say("waiting for another process that builds its operator...")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _without_advice() -> Iterator[None]:
    """PyTorch tells on import that there is no CUDA runtime; none is needed."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _say(what: str) -> None:
    sys.stderr.write(f"convbn_fx: {what}\n")


def fused_convolution(input: torch.Tensor, conv: Convolution, norm: BatchNorm) -> torch.Tensor:
    """The convolution and the batch norm by the operator, which is loaded: as one wherever that is the same function.

    Args:
        input: Batched input.
        conv: The convolution.
        norm: The batch norm with frozen statistics.
    """
    if calls is not None and type(conv.padding) is not str:
        return calls.conv_batch_norm(input, conv, norm)  # type: ignore[no-any-return]
    _, weight, bias, stride, padding, dilation, transposed, output_padding, groups = conv
    mean, variance, gamma, beta, eps = norm
    if weight.ndim == 2:
        stride = padding = dilation = output_padding = ()
    elif not (type(padding) is type(stride) is type(dilation) is tuple) or (
        transposed and type(output_padding) is not tuple
    ):
        stride, padding, uneven, dilation, output_padding = Geometry.of(conv, weight.shape)
        if uneven is not None:
            input = F.pad(input, [pad for extra in reversed(uneven) for pad in (0, extra)])
    elif not transposed:
        output_padding = (0,) * len(stride)
    return operator(  # type: ignore[misc] # it is loaded
        input,
        weight,
        bias,
        gamma,
        beta,
        mean,
        variance,
        eps,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
    )
