"""The README shows what happens."""

import csv
import json
import re
from pathlib import Path

import pytest

from bench.harness.timing import ratio

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHOWN = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)


def run(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_code_shown_is_the_code_generated(capsys):
    run(BLOCKS[0])
    shown, _ = SHOWN
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert list(filter(None, printed)) == list(filter(None, shown.splitlines()))


def test_the_report_shown_is_the_report(capsys):
    pytest.importorskip("torchvision")
    run(BLOCKS[1])
    _, shown = SHOWN
    assert shown.endswith("\n...\n")
    assert capsys.readouterr().out.startswith(shown.removesuffix("...\n"))


def test_the_two_commands_are_shown():
    assert {"demo", "test", "help"} <= set(re.findall(r"\bmake (\w+)", README))


def test_the_numbers_of_the_zoo():
    with (ROOT / "bench/results/zoo.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    fused = [row for row in rows if int(row["fused"] or 0)]
    told = [
        len(rows),
        len(fused),
        sum(int(row["fused"]) for row in fused),
        sum(row["level"] == "numeric" for row in fused),
    ]
    assert all(row["status"] == "pass" for row in rows)
    (paragraph,) = re.findall(r"^Of the .*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    assert [int(number) for number in re.findall(r"\d+", paragraph)] == told
    page = (ROOT / "docs/zoo.md").read_text(encoding="utf-8")
    in_table = [int(number) for number in re.findall(r"^\|.*\| (\d+) \|$", page, flags=re.MULTILINE)]
    assert in_table == [told[0], told[1], told[3], told[2], 0]


def test_the_numbers_of_the_benchmarks():
    rows = json.loads((ROOT / "bench/results/resnet50-grid.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["model"], row["batch"], row["size"]): row for row in rows}
    large, small = found["resnet50", 16, 224], found["mobilenet_v2", 1, 64]
    ratios = [
        large["bytes"]["Tune"] / large["bytes"]["Eval"],
        *(ratio(row["seconds"]["Tune"], row["seconds"]["Eval"]).median for row in (large, small)),
    ]
    (paragraph,) = re.findall(r"^ResNet-50 on .*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"\d\.\d+", paragraph) == [f"{each:.2f}" for each in ratios]
