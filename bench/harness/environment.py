"""Where a measurement was made: what one needs to know to repeat it."""

import platform
import re
from pathlib import Path

import timm
import torch
import torchvision


def describe(device: str = "cpu") -> dict[str, str | int]:
    """Names the machine's processors and operating system, and the versions that matter."""
    accelerator: dict[str, str | int] = {}
    if device == "cuda":
        accelerator = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return {
        **accelerator,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def processor_ticks() -> tuple[int, int] | None:
    """What the processors have done since they were started, in ticks of the system.

    Returns:
        Ticks in which the host of a virtual machine ran something else, and all of them; None where nobody counts.
    """
    statistics = Path("/proc/stat")
    if not statistics.exists():
        return None
    ticks = [int(field) for field in statistics.read_text().splitlines()[0].split()[1:9]]
    return ticks[-1], sum(ticks)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match[1]
    return platform.processor() or platform.machine()
