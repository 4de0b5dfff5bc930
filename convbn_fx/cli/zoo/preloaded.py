"""What the server of forks imports once, so that each process that it forks has it already.

A library that is missing or broken is the models' that need it to tell. Ctrl-C is for the sweep, which ends the server.
"""

import importlib
import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)

for _name in ("torch", "torchvision", "timm", "convbn_fx.cli.zoo.measuring"):
    try:
        importlib.import_module(_name)
    except Exception:  # noqa: BLE001, S112 - such as torchvision, built for another torch
        continue
