"""`python -m bench NAME`, from the command line to the page that is written from its results."""

import pytest
import typer
from typer.testing import CliRunner

from bench import __main__ as command
from bench.experiments import EXPERIMENTS
from bench.harness import environment, results
from bench.tools import page

app = typer.Typer()
app.command()(command.main)


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize("benchmark", [pytest.param("resnet50-grid", marks=pytest.mark.slow), "kernels"])
def test_from_the_command_to_the_page(benchmark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    file = results.RESULTS / f"{benchmark}.json"
    done = run(benchmark, "--smoke", "--json", file, "--plot", "picture.png")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("| ")
    result = results.read(file)
    assert result.benchmark == benchmark
    assert result.rows
    assert "torch" in result.environment
    assert (tmp_path / "picture.png").stat().st_size > 0
    assert page.main() == 0
    text = page.PAGE.read_text(encoding="utf-8")
    for table in command.module_of(benchmark).tables(result):
        assert table in text
    assert (page.PICTURES / f"{benchmark}-cpu.png").exists()


def test_a_list_of_numbers_is_one_line_of_six_digits(tmp_path):
    path = tmp_path / "result.json"
    row = {"seconds": [0.123456789, 1e-16, 3], "nothing": [], "texts": ["a, 1", "2"], "bytes": 123456789}
    results.Result("name", "command", {}, {"sizes": (1, 2)}, [row]).write(path)
    assert '"seconds": [ 0.123457, 1e-16, 3 ]' in path.read_text(encoding="utf-8")
    read = results.read(path)
    assert read.rows == [row | {"seconds": [0.123457, 1e-16, 3]}]
    assert read.settings == {"sizes": [1, 2]}


def test_what_the_host_took_is_told():
    assert list(command._stolen((10, 1000), (35, 2000))) == [
        "While this ran, the machine's host took 2.5 % of the processors' time for others."
    ]
    assert not list(command._stolen(None, None))


def test_processor_ticks_count_upwards():
    before, after = environment.processor_ticks(), environment.processor_ticks()
    assert before is None or (0 <= before[0] <= before[1] and before <= after)


def test_a_benchmark_that_is_none():
    done = run("resnet51")
    assert done.exit_code == 2
    assert "resnet50-grid" in done.output


def test_every_benchmark_has_its_parts():
    for benchmark in EXPERIMENTS:
        module = command.module_of(benchmark)
        assert module.__doc__
        assert callable(module.run)
        assert callable(module.tables)
        assert callable(module.plot)
