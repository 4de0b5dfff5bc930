"""What is built for others: the wheel in an environment that holds torch and nothing else, and the source archive."""

import email
import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the source archive, as `make dist` builds them."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def tracked(*folders):
    """Names of the files that git knows."""
    command = ["git", "ls-files", *folders]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def closure(name, found=None):
    """A distribution and all that it requires here, without extras."""
    found = {} if found is None else found
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return found  # required on other platforms only
    if distribution.name not in found:
        found[distribution.name] = distribution
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                closure(re.match(r"[\w.-]+", requirement)[0], found)
    return found


@pytest.fixture(scope="module")
def python(archives, tmp_path_factory):
    """A Python with torch, what torch requires, and the wheel."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    executable = home / "bin/python"
    (site,) = home.glob("lib/python*/site-packages")
    for distribution in closure("torch").values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    pip = [sys.executable, "-m", "pip", "--python", str(executable), "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(archives[0])], check=True, capture_output=True, text=True)
    return executable


def run(python, code):
    """What the code prints, as JSON; a warning is an error, but for torch's own that NumPy is not there."""
    command = [str(python), "-I", "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_but_torch_is_there_or_imported(python):
    found = run(
        python,
        """
import sys, json, importlib.util
import torch
before = set(sys.modules)
import convbn_fx
new = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
absent = [name for name in ("numpy", "torchvision", "timm", "typer", "pytest") if importlib.util.find_spec(name)]
print(json.dumps({"file": convbn_fx.__file__, "new": sorted(new), "absent": absent}))
""",
    )
    assert Path(found["file"]).is_relative_to(python.parent.parent)
    assert set(found["new"]) <= {"convbn_fx", "torch"}
    assert found["absent"] == []


def test_the_three_lines_run(python):
    found = run(
        python,
        """
import json, torch
from torch import nn
import convbn_fx
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
tuned = convbn_fx.tune(model)
convbn_fx.testing.assert_equivalent(model.double(), tuned.double(), torch.randn(2, 3, 8, 8, dtype=torch.double))
print(json.dumps({"fused": len(convbn_fx.report(tuned).fused), "version": convbn_fx.__version__}))
""",
    )
    assert found == {"fused": 1, "version": importlib.metadata.version("convbn_fx")}


def test_the_compiler_finds_the_backend(python):
    found = run(
        python,
        """
import json, torch
from torch import nn
import convbn_fx
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
compiled = torch.compile(model, backend="convbn")
image = torch.randn(2, 3, 8, 8)
torch.testing.assert_close(compiled(image), model(image))
print(json.dumps({
    "listed": "convbn" in torch._dynamo.list_backends(),
    "fused": len(convbn_fx.report(compiled).fused),
}))
""",
    )
    assert found == {"listed": True, "fused": 1}


def test_the_command_says_what_it_needs(python):
    command = [str(python.parent / "convbn-fx"), "--help"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "convbn-fx[cli,zoo]" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_wheel_holds(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        names = wheel.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(wheel.read(metadata))
        (entry_points,) = (
            wheel.read(name).decode() for name in names if name.endswith(".dist-info/entry_points.txt")
        )
    assert {name.partition("/")[0] for name in names} == {
        "convbn_fx",
        metadata.partition("/")[0],
    }
    assert "convbn_fx/py.typed" in names
    assert tracked("convbn_fx") <= set(names)
    assert "[torch_dynamo_backends]" in entry_points
    assert "convbn-fx = convbn_fx.__main__:main" in entry_points
    required = [each for each in fields.get_all("Requires-Dist") if "extra ==" not in each]
    assert required == ["torch>=2.11"]


def test_what_the_source_archive_holds(archives):
    """All that is needed to test and to document: whoever packages it elsewhere starts from here."""
    with tarfile.open(archives[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert tracked("convbn_fx", "tests", "docs", "bench") <= names
    assert {"pyproject.toml", "mkdocs.yml", "Makefile", "README.md", "LICENSE", "constraints.txt"} <= names
