"""The command line: `convbn-fx report`, `sweep` and `gate`. A command reads options, others do the work."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import psutil
import typer
from rich.console import Console
from typer import Argument, Option

from convbn_fx import gate as gating
from convbn_fx import presentation
from convbn_fx.inspection import inspect_model
from convbn_fx.zoo import page, results, running, summary
from convbn_fx.zoo.architectures import UnknownModel, UnknownSuite, load, matches
from convbn_fx.zoo.architectures import suite as models_of
from convbn_fx.zoo.measuring import Settings, compare_numbers, smallest_size
from convbn_fx.zoo.results import Level, ResultsError, Row
from convbn_fx.zoo.running import Unusable
from convbn_fx.zoo.sweeping import Backend, Cluster, Limits, NoCluster, processors

#: What a command exits with where not with 0: something is not as it should be; the command cannot be carried out.
CHANGED, UNUSABLE, INTERRUPTED = 1, 2, 130

#: What a whole zoo's page is called.
TITLE = "Convolutions and batch norms of the model zoo"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Convolutions and frozen batch norms, fused while everything still trains.",
    epilog="Example: convbn-fx report timm:resnet50",
)


# --- report ---------------------------------------------------------------------------------------------------------

Model = Annotated[
    str,
    Argument(
        help="timm:NAME, torchvision:NAME, or package.module:factory, a function of yours that returns a model, or a "
        "model and a tuple of its inputs",
        show_default=False,
    ),
]
Batch = Annotated[int | None, Option(min=1, help="Images in a batch; 32 unless told.")]
Size = Annotated[
    int | None, Option(min=1, help="Height and width of the images; the model's own unless told.")
]
Pretrained = Annotated[
    bool, Option("--pretrained", help="With trained weights; a library downloads its own.")
]
Check = Annotated[
    bool,
    Option("--check", help="Compare outputs and all gradients in float64, too, the batch norms made random."),
]
AsJson = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]
ReportHtml = Annotated[Path | None, Option(help="Write a page with the tables and the pictures.")]
Plot = Annotated[
    Path | None, Option(help="Write a picture (png, svg or pdf): memory layer by layer, the coefficients.")
]


@app.command(epilog="Example: convbn-fx report timm:resnet50 --batch 32 --size 224 --plot memory.png")
def report(
    model: Model,
    batch: Batch = None,
    size: Size = None,
    pretrained: Pretrained = False,
    check: Check = False,
    as_json: AsJson = False,
    html: ReportHtml = None,
    plot: Plot = None,
) -> None:
    """Tell what Tune mode does to a model: its pairs, the bytes they save, what is left and why.

    Bytes are those that one call keeps for the backward pass, counted on tensors that hold no memory: any size fits.

    Exits with 1 if --check finds a difference, with 2 if there is no such model.
    """
    with _failures_explained():
        subject = load(model, pretrained=pretrained)
        if not subject.resizable and (batch or size):
            raise Unusable(f"{model} brings its own inputs; --batch and --size are for models that do not")
        inspection = inspect_model(subject.model, subject.inputs(batch or 32, size), body=subject.body)
        inspection = dataclasses.replace(inspection, model=model)
        facts: dict[str, Any] = inspection.to_json()
        if html is not None:
            presentation.write_html(inspection, html)
        if plot is not None:
            presentation.plot(inspection, plot)
        numbers = compare_numbers(subject, smallest_size(subject).side, seed=0) if check else None

    console = _console()
    if numbers is not None:
        facts["check"] = numbers.to_json()
    if as_json:
        console.out(json.dumps(facts, indent=2, allow_nan=False), highlight=False)
    else:
        console.print(presentation.render(inspection))
        console.print(str(numbers) if numbers is not None else "", highlight=False)
    if numbers is not None and numbers.failure:
        raise typer.Exit(CHANGED)


# --- sweep ----------------------------------------------------------------------------------------------------------

Suites = Annotated[
    list[str] | None,
    Option(
        "--suite",
        help="timm (unless told), torchvision, or a file: one model a line, or a results file. More than one is fine.",
    ),
]
Match = Annotated[str, Option(help="Only models whose name matches, such as 'resnet*'.")]
ALevel = Annotated[
    Level,
    Option(help="structure: pairs and bytes, with no memory at all. numeric: errors and gradients, too."),
]
Out = Annotated[Path, Option(help="The results file: a row a model, written as they come.")]
Resume = Annotated[bool, Option("--resume", help="Go on with the results file where it stopped.")]
Jobs = Annotated[int | None, Option(min=1, help="Models at a time; one for each processor unless told.")]
Shard = Annotated[str, Option(help="Only this part of the models, such as 3/16.")]
Timeout = Annotated[float, Option(min=1, help="Seconds that one model may take.")]
MemoryLimit = Annotated[
    str | None,
    Option(
        help="Memory that one model may take, such as 8GB; its share of 90% of the machine's unless told."
    ),
]
MaxParams = Annotated[
    float, Option(min=0, help="Models with more parameters, such as 1e8, are measured in structure only.")
]
CountedBatch = Annotated[int, Option(min=1, help="Images in the batch whose bytes are counted.")]
Seed = Annotated[int, Option(help="Of weights, batch norms and images.")]
ABackend = Annotated[Backend, Option(help="What joblib runs the models on.")]
Address = Annotated[
    str | None, Option(help="Of a cluster's scheduler; one is started on this machine unless told.")
]
Html = Annotated[Path | None, Option(help="Write the results as a page, too.")]
From = Annotated[
    Path | None,
    Option("--from", help="Measure nothing: sum up this results file, and write its page with --html."),
]


@app.command(
    epilog="Example: convbn-fx sweep --suite timm --match 'resnet*' --level numeric --jobs 2 --out results.csv"
)
def sweep(
    suite: Suites = None,
    match: Match = "*",
    level: ALevel = Level.STRUCTURE,
    out: Out = Path("results.csv"),
    resume: Resume = False,
    jobs: Jobs = None,
    shard: Shard = "1/1",
    timeout: Timeout = 900.0,
    memory_limit: MemoryLimit = None,
    max_params: MaxParams = math.inf,
    batch: CountedBatch = 2,
    size: Size = None,
    seed: Seed = 0,
    backend: ABackend = Backend.LOKY,
    address: Address = None,
    html: Html = None,
    only_sum_up: From = None,
) -> None:
    """Measure many models, each in a process of its own: one row of results for each, whatever happens to it.

    Exits with 0 whatever the rows say (to judge them is for convbn-fx gate), with 2 if the sweep cannot be made, with
    130 after Ctrl-C; --resume goes on then.
    """
    with _failures_explained():
        if only_sum_up is not None:
            _sum_up(results.read(only_sum_up), only_sum_up, html)
            return
        suites = suite or ["timm"]
        found = [name for each in suites for name in models_of(each) if matches(name, match)]
        names = running.part_of(found, shard)
        if not names:
            raise Unusable(f"no model of {', '.join(suites)} matches {match!r} in shard {shard}")
        if address is not None and backend is Backend.LOKY:
            raise Unusable("--address is for --backend dask and ray; loky runs on this machine")
        jobs = min(jobs or processors(), len(names))
        share = int(0.9 * psutil.virtual_memory().total / jobs)
        settings = Settings(level, seed, max_params, batch, size, threads=max(1, processors() // jobs))
        limits = Limits(timeout, running.memory_of(memory_limit) if memory_limit else share)
        done = running.begin(out, resume, level)
        todo = [name for name in names if name not in done]
        progress = Console(stderr=True, soft_wrap=True, highlight=False)
        try:
            rows = running.fill(out, todo, settings, limits, Cluster(jobs, backend, address), progress)
        except KeyboardInterrupt:
            progress.print(f"stopped: what is measured is in {out}, and --resume goes on")
            raise typer.Exit(INTERRUPTED) from None
        _sum_up(rows, out, html)


def _sum_up(rows: list[Row], source: Path, html: Path | None) -> None:
    _console().print(summary.render(summary.summarize(rows)))
    if html is not None:
        page.write_page(html, rows, title=TITLE, source=source.name)


# --- gate -----------------------------------------------------------------------------------------------------------

Actual = Annotated[Path, Argument(help="The results file of a sweep.", show_default=False)]
Expected = Annotated[Path, Option(help="The baseline: a results file, too.", show_default=False)]
Update = Annotated[
    bool, Option("--update", help="Write what changed into the baseline, and expect it from then on.")
]


@app.command(epilog="Example: convbn-fx gate results.csv --expected expected.csv")
def gate(actual: Actual, expected: Expected, update: Update = False, match: Match = "*") -> None:
    """Hold a results file to a baseline: PASS, FAIL, IMPROVED, MISSING or NEW for each model.

    Exits with 0 if every model passes, with 1 if anything changed, for better or worse, with 2 if a file is unusable.
    """
    with _failures_explained():
        raise typer.Exit(gating.run(actual, expected, update=update, match=match, console=_console()))


# --- all of them ----------------------------------------------------------------------------------------------------


def _console() -> Console:
    """Where results go; wide enough for every table where that is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


@contextmanager
def _failures_explained() -> Iterator[None]:
    """Turns what is wrong with a command or its files into one line and an exit status."""
    try:
        yield
    except (UnknownModel, UnknownSuite, ResultsError, NoCluster, Unusable) as error:
        _give_up(str(error))
    except ModuleNotFoundError as error:
        if error.name not in {"distributed", "ray"}:
            raise
        _give_up(f"{error.name} is not installed: pip install {error.name}")


def _give_up(message: str) -> NoReturn:
    print(f"convbn-fx: {message}", file=sys.stderr)  # noqa: T201 - one line, whatever the terminal's width
    raise typer.Exit(UNUSABLE)
