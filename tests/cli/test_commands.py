"""`convbn-fx report`, the options of `sweep`, and what every command says when it cannot be carried out."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import zoo_models
from typer.testing import CliRunner

from convbn_fx import tune
from convbn_fx.cli.commands import app
from convbn_fx.cli.zoo import results
from convbn_fx.cli.zoo.architectures import load, suite
from convbn_fx.cli.zoo.results import Level, Row, Status
from convbn_fx.memory import saved_bytes

ROOT = Path(__file__).parents[2]
COMMANDS = ("report", "sweep", "gate")


@pytest.fixture(autouse=True)
def _among_the_models(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # where a user's own modules are looked for


def run(*arguments, status=0):
    """The output of a command."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return done


def in_a_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# --- Help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_can_be_typed(command):
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", run(command, "--help").stdout).split())
    (example,) = re.findall(r"Example: (convbn-fx .*)$", text)
    assert example.startswith(f"convbn-fx {command} ")
    for option in re.findall(r"--[a-z-]+", example):
        assert option in text.replace(example, "")


def test_without_arguments_there_is_help():
    assert "Usage" in run(status=2).output
    assert set(COMMANDS) <= set(run("--help").stdout.split())


def test_the_script_and_the_module_are_one():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"convbn-fx": "convbn_fx.__main__:main"}
    done = subprocess.run(
        [sys.executable, "-m", "convbn_fx", "--help"], capture_output=True, text=True, check=True
    )
    assert "convbn-fx" in done.stdout


@pytest.mark.parametrize("missing", ["typer", "rich", "psutil"])
def test_without_the_extra_it_says_what_to_install(missing):
    done = in_a_process(
        f"import sys; sys.modules[{missing!r}] = None; from convbn_fx.__main__ import main; main()"
    )
    assert done.returncode == 2
    assert f"the command line needs {missing}" in done.stderr
    assert "pip install 'convbn-fx[cli,zoo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_gate_needs_no_pytorch_and_a_report_no_dask(tmp_path):
    results.write(tmp_path / "a.csv", [Row(name="timm:a", status=Status.PASS, level=Level.STRUCTURE)])
    for library, arguments in {
        "torch": ["gate", str(tmp_path / "a.csv"), "--expected", str(tmp_path / "a.csv")],
        "distributed": ["report", "zoo_models:small", "--size", "20"],
    }.items():
        done = in_a_process(
            f"import sys; sys.modules[{library!r}] = None; sys.argv[1:] = {arguments}; "
            "from convbn_fx.__main__ import main; main()"
        )
        assert done.returncode == 0, done.stderr


# --- report -------------------------------------------------------------------------------------------------------


def test_report_of_a_model_of_ones_own():
    text = run("report", "zoo_models:small", "--batch", 3, "--size", 20).stdout
    assert "zoo_models:small" in text
    assert "3, 3, 20, 20" in text
    assert "2 pairs fused, 1 batch norm left" in text
    assert "NOT_AFTER_CONVOLUTION" in text
    for column in ("Eval", "Tune", "Deploy"):
        assert column in text


def test_report_as_json():
    facts = json.loads(run("report", "zoo_models:small", "--batch", 3, "--size", 20, "--json").stdout)
    assert (facts["model"], facts["fused"], facts["left"]) == ("zoo_models:small", 2, 1)
    model = zoo_models.small().eval()
    image = torch.zeros(3, 3, 20, 20)
    assert facts["saved_bytes"]["eval"] == saved_bytes(model, image)
    assert facts["saved_bytes"]["tune"] == saved_bytes(tune(model), image)
    assert [pair["batch_norm"] for pair in facts["pairs"]] == ["2", "5"]
    assert [skip["reason"] for skip in facts["skipped"]] == ["NOT_AFTER_CONVOLUTION"]
    assert "check" not in facts


def test_a_batch_is_32_images_of_the_models_own_size():
    facts = json.loads(run("report", "timm:test_resnet", "--json").stdout)
    assert facts["inputs"] == ["float32[32, 3, 160, 160]"]


def test_report_writes_pages_and_pictures(tmp_path):
    page, picture = tmp_path / "report.html", tmp_path / "report.svg"
    run("report", "zoo_models:small", "--size", 20, "--html", page, "--plot", picture)
    assert "zoo_models:small" in page.read_text()
    assert "<svg" in picture.read_text()


def test_report_draws_the_graph(tmp_path):
    run("report", "zoo_models:small", "--size", 20, "--graph", tmp_path / "graph.dot")
    before, after = ((tmp_path / f"graph-{which}.dot").read_text() for which in ("before", "after"))
    assert "conv_batch_norm" not in before
    assert "conv_batch_norm" in after


def test_report_checks():
    facts = json.loads(run("report", "zoo_models:small", "--size", 20, "--check", "--json").stdout)
    assert facts["check"]["passed"]
    assert 0 < facts["check"]["gradient_error"] < 1e-12
    assert "Checked in float64" in run("report", "zoo_models:with_inputs", "--check").stdout


def test_a_model_is_checked_with_the_smallest_images_that_it_can_be_built_for():
    assert "Checked in float64" in run("report", "timm:test_coatnet", "--batch", 1, "--check").stdout


def test_a_check_that_fails(monkeypatch):
    from convbn_fx.cli.zoo import measuring

    monkeypatch.setattr(measuring, "TOLERANCE", 0.0)
    done = run("report", "zoo_models:small", "--size", 20, "--check", status=1)
    assert re.search(r"differs by .* in float64", done.stdout)
    facts = json.loads(run("report", "zoo_models:small", "--check", "--json", status=1).stdout)
    assert not facts["check"]["passed"]
    assert "differs by" in facts["check"]["failure"]


def test_report_of_torchvisions_detectors_is_of_their_backbone():
    facts = json.loads(
        run("report", "torchvision:ssdlite320_mobilenet_v3_large", "--batch", 1, "--json").stdout
    )
    assert (facts["body"], facts["inputs"]) == ("backbone", ["float32[1, 3, 320, 320]"])
    assert facts["fused"] == 70
    assert facts["saved_bytes"]["tune"] < facts["saved_bytes"]["eval"]


def test_trained_weights_are_asked_for():
    for trained in (False, True):
        model = load("zoo_models:pretrained", pretrained=trained).model
        assert (model[0].bias == float(trained)).all()
    facts = json.loads(run("report", "zoo_models:pretrained", "--pretrained", "--size", 8, "--json").stdout)
    assert facts["fused"] == 1


# --- What cannot be carried out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "resnet50"], "give timm:NAME, torchvision:NAME or package.module:factory"),
        (["report", "timm:resnet5O"], "did you mean resnet50"),
        (["report", "torchvision:resnet5O"], "did you mean"),
        (["report", "no_such_module:make"], "there is no module 'no_such_module'"),
        (["report", "zoo_models:no_such_factory"], "zoo_models has no 'no_such_factory'"),
        (["report", "zoo_models:no_model"], "has to return a torch.nn.Module"),
        (["report", "zoo_models:SLOW"], "name a function"),
        (["report", "zoo_models:with_inputs", "--batch", 2], "brings its own inputs"),
        (["sweep", "--suite", "no/such/file.txt"], "give timm, torchvision, or a file"),
        (["sweep", "--match", "no-such-model"], "no model of timm matches 'no-such-model'"),
        (["sweep", "--match", "test_resnet", "--shard", "3"], "give PART/PARTS"),
        (["sweep", "--match", "test_resnet", "--shard", "4/3"], "give PART/PARTS"),
        (["sweep", "--match", "test_resnet", "--shard", "0/3"], "give PART/PARTS"),
        (["sweep", "--match", "test_resnet", "--memory-limit", "much"], "give a number of GB"),
        (["sweep", "--match", "test_resnet", "--memory-limit", "0GB"], "give a number of GB"),
        (["sweep", "--match", "test_resnet", "--address", "tcp://x:1"], "for --backend dask and ray"),
        (
            ["sweep", "--match", "test_resnet", "--backend", "dask", "--address", "a:1", "--jobs", "2"],
            "--jobs is for",
        ),
        (["sweep", "--from", "no/such/results.csv"], "cannot be read"),
        (["report", "zoo_models:small", "--html", "."], "is a folder"),
        (["report", "zoo_models:small", "--plot", "picture.jpg"], "the formats are"),
        (["report", "zoo_models:small", "--graph", "graph.jpg"], "the formats are"),
        (["report", "zoo_models:small", "--html", "/dev/null/page.html"], "/dev/null"),
        (["gate", "no/such/results.csv", "--expected", "e.csv"], "cannot be read"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(arguments, words, tmp_path):
    if arguments[0] == "sweep" and "--from" not in arguments:
        arguments = [*arguments, "--out", tmp_path / "results.csv"]
    done = run(*arguments, status=2)
    assert done.stderr.startswith("convbn-fx: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_error_in_the_users_module_is_the_users_to_see(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        run("report", "needs_more:make")


# --- Which models a sweep is made of --------------------------------------------------------------------------------


def test_suites_of_libraries():
    assert "timm:resnet50" in suite("timm")
    names = suite("torchvision")
    assert {"torchvision:resnet50", "torchvision:maskrcnn_resnet50_fpn", "torchvision:r3d_18"} <= set(names)
    assert not [name for name in names if "quantized" in name]


def test_a_results_file_is_a_suite(tmp_path):
    rows = [Row(name=name, status=Status.PASS, level=Level.STRUCTURE) for name in ("timm:a", "timm:b")]
    results.write(tmp_path / "expected.csv", rows)
    assert suite(str(tmp_path / "expected.csv")) == ["timm:a", "timm:b"]


def test_an_empty_suite_is_none(tmp_path):
    (tmp_path / "models.txt").write_text("# nothing yet\n")
    assert "no model is named there" in run("sweep", "--suite", tmp_path / "models.txt", status=2).stderr


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_shards_are_all_of_it_once(parts):
    from convbn_fx.cli.zoo.running import part_of

    names = suite("torchvision")
    shards = [part_of(names, f"{part}/{parts}") for part in range(1, parts + 1)]
    assert sorted(name for shard in shards for name in shard) == sorted(names)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_results_of_shards_are_put_together(tmp_path):
    for name in ("timm:a", "timm:b"):
        row = Row(name=name, status=Status.PASS, level=Level.STRUCTURE)
        results.write(tmp_path / f"{name[-1]}.csv", [row])
    parts = ["--from", tmp_path / "b.csv", "--from", tmp_path / "a.csv"]
    run("sweep", *parts, "--out", tmp_path / "all.csv")
    assert [row.name for row in results.read(tmp_path / "all.csv")] == ["timm:a", "timm:b"]
    twice = run("sweep", *parts, "--from", tmp_path / "a.csv", status=2)
    assert "timm:a is there 2 times" in twice.stderr


def test_a_results_file_is_summed_up_and_made_a_page(tmp_path):
    row = Row(
        name="timm:a",
        family="timm.a",
        status=Status.PASS,
        level=Level.STRUCTURE,
        batch_norms=3,
        fused=3,
        refused={},
    )
    results.write(tmp_path / "results.csv", [row])
    page = tmp_path / "zoo.html"
    text = run("sweep", "--from", tmp_path / "results.csv", "--html", page).stdout
    assert re.search(r"pairs fused\s+3", text)
    assert "timm:a" in page.read_text()
    assert "results.csv" in page.read_text()
