"""The project's own gate: what its baselines are made of."""

from dataclasses import replace
from pathlib import Path

import pytest
from rows import FULL

from bench.tools import baselines
from convbn_fx.cli.zoo import results
from convbn_fx.cli.zoo.results import Level, Status

EXPECTED = Path(__file__).parents[2] / "bench" / "expected"
NAMES = ("structure", "deep", "sample", "families")


@pytest.fixture(scope="module")
def committed():
    return {name: results.read(EXPECTED / f"{name}.csv") for name in NAMES}


def test_the_structure_of_every_architecture_with_batch_norms(committed):
    rows = committed["structure"] + committed["deep"]
    assert {row.level for row in rows} == {Level.STRUCTURE}
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.batch_norms or row.fused for row in rows)
    assert sum(row.name.startswith("timm:") for row in rows) >= 740
    families = {row.family for row in rows}
    wanted = {"resnet", "deeplabv3", "faster_rcnn", "mask_rcnn", "retinanet", "s3d", "raft"}
    assert {f"torchvision.{name}" for name in wanted} <= families


def test_every_family_in_numbers(committed):
    numeric = committed["sample"] + committed["families"]
    assert {row.level for row in numeric} == {Level.NUMERIC}
    assert {row.status for row in numeric} == {Status.PASS}
    families = [row.family for row in numeric]
    assert len(families) == len(set(families))
    with_pairs = {
        row.family
        for row in committed["structure"] + committed["deep"]
        if row.fused and row.parameters <= 1e8 and "test_" not in row.name
    }
    assert set(families) == with_pairs
    assert committed["sample"]


def test_the_committed_baselines_are_as_good_as_they_have_to_be(committed):
    for row in [row for rows in committed.values() for row in rows]:
        assert row.status is Status.PASS
        assert row.bytes_tune <= row.bytes_eval
        assert row.seconds is None
        assert row.gradient_error is None or max(row.output_error, row.gradient_error) < 1e-8


def test_the_files_are_as_the_gate_writes_them(committed):
    for name, rows in committed.items():
        lines = (EXPECTED / f"{name}.csv").read_text().splitlines()
        assert lines[1:] == [results.line(row).strip() for row in sorted(rows, key=lambda row: row.name)]


def test_they_are_made_from_a_sweep(tmp_path):
    row = replace(FULL, level=Level.NUMERIC, family="a", parameters=10, seconds=100.0)
    rows = [
        replace(row, name="timm:test_a", parameters=1),
        replace(row, name="timm:large", parameters=20),
        replace(row, name="timm:small"),
        replace(row, name="timm:slow", family="b", seconds=200.0),
        replace(row, name="timm:deep", batch_norms=baselines.DEEP + 1, parameters=30),
        replace(row, name="timm:none", family="c", batch_norms=0, fused=0, gradient_error=None),
    ]
    results.write(tmp_path / "zoo.csv", rows)
    assert baselines.main(["--zoo", str(tmp_path / "zoo.csv"), "--expected", str(tmp_path)]) == 0
    made = {name: [row.name for row in results.read(tmp_path / f"{name}.csv")] for name in NAMES}
    assert made["structure"] == ["timm:large", "timm:slow", "timm:small", "timm:test_a"]
    assert made["deep"] == ["timm:deep"]
    assert made["sample"] == ["timm:small"]
    assert made["families"] == ["timm:slow"]


def test_what_does_not_pass_is_no_baseline(tmp_path, capsys):
    results.write(tmp_path / "zoo.csv", [replace(FULL, status=Status.TIMEOUT)])
    with pytest.raises(SystemExit):
        baselines.main(["--zoo", str(tmp_path / "zoo.csv"), "--expected", str(tmp_path)])
    assert FULL.name in capsys.readouterr().err
