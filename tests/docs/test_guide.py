"""What docs/gate.md tells users to do, and the workflow that it offers them, does what it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from convbn_fx.cli.gate import RULES, UNGATED, May
from convbn_fx.cli.zoo.results import COLUMNS, Status

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "gate.md").read_text(encoding="utf-8")
ONE_LINE = " ".join(GUIDE.split())
WORKFLOW = yaml.safe_load((DOCS / "examples" / "convbn-fx.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step["run"] for step in WORKFLOW["jobs"]["gate"]["steps"] if "run" in step}

SEGMENTER = """
from torch import nn


def make_segmenter():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*layers)
"""


def run(command, folder):
    """Runs one command of the guide as it is written, `convbn-fx` being this checkout's."""
    words = shlex.split(command)
    assert words[0] == "convbn-fx"
    words[:1] = [sys.executable, "-m", "convbn_fx"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's project that the guide's first steps were taken in, and a file of results."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_models.py").write_text(SEGMENTER)
    (folder / "convbn-fx").mkdir()
    (models,) = re.findall(r"```text\n# (convbn-fx/models.txt\n.*?)```", GUIDE, flags=re.DOTALL)
    (folder / "convbn-fx/models.txt").write_text(models.replace("convbn-fx/models.txt\n", ""))
    (commands,) = re.findall(r"```console\n(.*?)```", GUIDE, flags=re.DOTALL)
    measure, update, add = commands.splitlines()
    assert add == "git add convbn-fx"
    for command in (measure, update):
        done = run(command, folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_the_workflow_measures_what_the_guide_measures():
    assert STEPS["Measure"] in GUIDE
    assert STEPS["Hold"] + " --update" in GUIDE
    assert re.fullmatch(r'pip install "convbn-fx\[cli,zoo\]" \.', STEPS["Install"])


@pytest.mark.slow
def test_an_untouched_run_passes_twice_in_a_row(project):
    for _ in range(2):
        (project / "results.csv").unlink()
        assert run(STEPS["Measure"], project).returncode == 0
        done = run(STEPS["Hold"], project)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "3 models: 3 PASS" in done.stdout


@pytest.mark.slow
def test_a_lost_pair_breaks_the_gate(project):
    lost = SEGMENTER.replace("nn.BatchNorm2d(4)", "nn.Identity(), nn.ReLU(), nn.BatchNorm2d(4)")
    (project / "my_models.py").write_text(lost)
    try:
        (project / "results.csv").unlink()
        assert (
            run(STEPS["Measure"].replace("models.txt", "models.txt --match '*segmenter'"), project).returncode
            == 0
        )
        done = run(STEPS["Hold"] + " --match '*segmenter'", project)
    finally:
        (project / "my_models.py").write_text(SEGMENTER)
    assert done.returncode == 1
    assert "fused: 1 expected, 0 found" in done.stdout
    assert "--update" in done.stdout


def test_the_table_of_columns():
    words = {May.STAY: "not change", May.FALL: "only fall", May.RISE: "only rise"}
    for rule in RULES:
        (row,) = re.findall(rf"\| `{rule.column}` \| (.*?) \| (.*?) \|", GUIDE)
        if rule.factor == 1:
            told = "nothing"
        elif rule.factor < 2:
            told = f"{float(rule.factor - 1):.0%}"
        else:
            told = f"a factor of {rule.factor}, above {rule.floor:.1e}"
        assert row == (words[rule.may], told)
    assert GUIDE.count("| `") == len(RULES)
    for column, reason in UNGATED.items():
        assert f"`{column}` ({reason})" in ONE_LINE


def test_every_column_and_status_is_told():
    page = (DOCS / "sweep.md").read_text(encoding="utf-8")
    told = re.findall(
        r"`(\w+)`", "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    )
    assert sorted(told) == sorted([*COLUMNS, *Status])
