"""The command line: `convbn-fx report`, `sweep` and `gate`. A command reads options, others do the work.

A command imports what it needs for itself: not all of them need PyTorch, which takes seconds.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer import Argument, Option

from convbn_fx.cli import Unusable
from convbn_fx.cli import gate as gating
from convbn_fx.cli.zoo import results
from convbn_fx.cli.zoo.results import Level, Row, matches
from convbn_fx.cli.zoo.sweeping import Backend, Cluster, Limits

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

SizeOption = Annotated[
    int | None, Option(min=1, help="Height and width of the images; the model's own unless told.")
]


@app.command(epilog="Example: convbn-fx report timm:resnet50 --batch 32 --size 224 --plot memory.png")
def report(
    model: Annotated[
        str,
        Argument(
            help="timm:NAME, torchvision:NAME, or package.module:factory, a function of yours that returns a model, "
            "or a model and a tuple of its inputs",
            show_default=False,
        ),
    ],
    batch: Annotated[int | None, Option(min=1, help="Images in a batch; 32 unless told.")] = None,
    size: SizeOption = None,
    pretrained: Annotated[
        bool, Option("--pretrained", help="With trained weights; a library downloads its own.")
    ] = False,
    check: Annotated[
        bool,
        Option(
            "--check", help="Compare outputs and all gradients in float64, too, the batch norms made random."
        ),
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[Path | None, Option(help="Write a page with the tables and the pictures.")] = None,
    plot: Annotated[
        Path | None,
        Option(help="Write a picture (png, svg or pdf): memory layer by layer, the coefficients."),
    ] = None,
    graph: Annotated[
        Path | None,
        Option(
            help="Draw the graph, if it can be traced, before and after (dot, png, svg or pdf); needs pydot."
        ),
    ] = None,
) -> None:
    """Tell what Tune mode does to a model: its pairs, the bytes they save, what is left and why.

    Bytes are those that one call keeps for the backward pass, counted on tensors that hold no memory: any size fits.

    Exits with 1 if --check finds a difference, with 2 if there is no such model.
    """
    with _failures_explained():
        from convbn_fx.cli.report import drawing, plotting, terminal
        from convbn_fx.cli.report.inspection import inspect_model
        from convbn_fx.cli.zoo.architectures import load
        from convbn_fx.cli.zoo.measuring import compare_numbers, for_smallest_images
        from convbn_fx.fx.tracing import TracingError

        _check_writable(html)
        _check_writable(plot, plotting.PICTURE_FORMATS)
        _check_writable(graph, drawing.GRAPH_FORMATS)
        subject = load(model, pretrained=pretrained)
        if not subject.resizable and (batch or size):
            raise Unusable(f"{model} brings its own inputs; --batch and --size are for models that do not")
        inspection = inspect_model(subject.model, subject.inputs(batch or 32, size), body=subject.body)
        inspection = dataclasses.replace(inspection, model=model)
        facts: dict[str, Any] = inspection.to_json()
        if html is not None:
            terminal.write_html(inspection, html)
        if plot is not None:
            plotting.plot(inspection, plot)
        if graph is not None:
            try:
                drawing.draw(subject.model, graph)
            except TracingError as error:
                raise Unusable(str(error)) from error
        numbers = None
        if check:  # with trained weights as it is, else with the smallest images that it can be built for
            subject, side = (subject, None) if pretrained else for_smallest_images(subject, seed=0)
            numbers = compare_numbers(subject, side, seed=0)

    console = _console()
    if numbers is not None:
        facts["check"] = numbers.to_json()
    if as_json:
        console.out(json.dumps(facts, indent=2, allow_nan=False), highlight=False)
    else:
        console.print(terminal.render(inspection))
        console.print(str(numbers) if numbers is not None else "", markup=False)
    if numbers is not None and numbers.failure:
        raise typer.Exit(CHANGED)


# --- sweep ----------------------------------------------------------------------------------------------------------

MatchOption = Annotated[str, Option(help="Only models whose name matches, such as 'resnet*'.")]


@app.command(
    epilog="Example: convbn-fx sweep --suite timm --match 'resnet*' --level numeric --jobs 2 --out results.csv"
)
def sweep(
    suite: Annotated[
        list[str] | None,
        Option(
            "--suite",
            help="timm (unless told), torchvision, or a file: one model a line, or a results file. "
            "More than one is fine.",
        ),
    ] = None,
    match: MatchOption = "*",
    level: Annotated[
        Level,
        Option(help="structure: pairs and bytes, with no memory at all. numeric: errors and gradients, too."),
    ] = Level.STRUCTURE,
    out: Annotated[
        Path | None,
        Option(help="The results file, a row a model, written as they come; results.csv unless told."),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the results file where it stopped.")] = False,
    retry: Annotated[
        bool, Option("--retry", help="With --resume, measure again what crashed or was stopped at a limit.")
    ] = False,
    jobs: Annotated[
        int | None, Option(min=1, help="Models at a time; one for each processor unless told.")
    ] = None,
    shard: Annotated[str, Option(help="Only this part of the models, such as 3/16.")] = "1/1",
    timeout: Annotated[float, Option(min=1, help="Seconds that one model may take.")] = 900.0,
    memory_limit: Annotated[
        str | None,
        Option(
            help="Memory that one model may take, such as 8GB; its share of 90% of the machine's unless told."
        ),
    ] = None,
    max_params: Annotated[
        float, Option(min=0, help="Models with more parameters, such as 1e8, are measured in structure only.")
    ] = math.inf,
    batch: Annotated[int, Option(min=1, help="Images in the batch whose bytes are counted.")] = 2,
    size: SizeOption = None,
    seed: Annotated[int, Option(help="Of weights, batch norms and images.")] = 0,
    backend: Annotated[
        Backend, Option(help="What the models run on: this machine, or a cluster.")
    ] = Backend.LOCAL,
    address: Annotated[
        str | None, Option(help="Of a cluster's scheduler; one is started on this machine unless told.")
    ] = None,
    html: Annotated[Path | None, Option(help="Write the results as a page, too.")] = None,
    sum_up: Annotated[
        list[Path] | None,
        Option(
            "--from",
            help="Measure nothing: sum up this results file, and write its page with --html. Given again, files of "
            "shards are put together, into one with --out.",
        ),
    ] = None,
) -> None:
    """Measure many models, each in a process of its own: one row of results for each, whatever happens to it.

    Exits with 0 whatever the rows say (to judge them is for convbn-fx gate), with 2 if the sweep cannot be made, with
    130 after Ctrl-C; --resume goes on then.
    """
    with _failures_explained():
        from convbn_fx.cli.zoo import running
        from convbn_fx.cli.zoo.architectures import suite as models_of
        from convbn_fx.cli.zoo.measuring import Settings

        _check_writable(html)
        _check_writable(out)
        if sum_up:
            rows = [row for path in sum_up for row in results.read(path) if matches(row.name, match)]
            results.check_names(rows, " and ".join(map(str, sum_up)))
            if out is not None:
                results.write(out, rows)
            _sum_up(rows, ", ".join(path.name for path in sum_up), html)
            return
        out = out or Path("results.csv")
        suites = suite or ["timm"]
        found = [name for each in suites for name in models_of(each) if matches(name, match)]
        names = running.part_of(found, shard)
        if not names:
            raise Unusable(f"no model of {', '.join(suites)} matches {match!r} in shard {shard}")
        if address is not None and backend is Backend.LOCAL:
            raise Unusable("--address is for --backend dask and ray, not for this machine")
        if address is not None and jobs is not None:
            raise Unusable(
                "--jobs is for this machine; the cluster at --address takes as many as it has threads"
            )
        jobs = min(jobs or running.processors(), len(names))
        memory = running.memory_of(memory_limit) if memory_limit else None
        if memory is None and address is None:
            memory = running.memory_share(jobs)
        settings = Settings(level, seed, max_params, batch, size)
        progress = Console(stderr=True, soft_wrap=True, highlight=False)
        with running.alone_with(out):
            done = running.begin(out, settings, resume=resume, retry=retry)
            todo = [name for name in names if name not in done]
            try:
                cluster = Cluster(jobs, backend, address)
                rows = running.fill(out, todo, settings, Limits(timeout, memory), cluster, progress)
            except KeyboardInterrupt:
                progress.print(f"stopped: what is measured is in {out}, and --resume goes on")
                raise typer.Exit(INTERRUPTED) from None
        _sum_up(rows, out.name, html)


def _sum_up(rows: list[Row], source: str, html: Path | None) -> None:
    from convbn_fx.cli.zoo import page, summary

    _console().print(summary.render(summary.summarize(rows)))
    if html is not None:
        page.write_page(html, rows, title=TITLE, source=source)


# --- gate -----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: convbn-fx gate results.csv --expected expected.csv")
def gate(
    actual: Annotated[Path, Argument(help="The results file of a sweep.", show_default=False)],
    expected: Annotated[Path, Option(help="The baseline: a results file, too.", show_default=False)],
    update: Annotated[
        bool, Option("--update", help="Write what changed into the baseline, and expect it from then on.")
    ] = False,
    match: MatchOption = "*",
) -> None:
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
    except Unusable as error:
        _give_up(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _give_up(f"{error.filename}: {error.strerror}")
    except ModuleNotFoundError as error:
        extra = {"distributed": "dask", "ray": "ray"}.get(error.name or "")
        if extra is None:
            raise
        _give_up(f"{error.name} is not installed: pip install 'convbn-fx[{extra}]'")


def _check_writable(path: Path | None, formats: tuple[str, ...] = ()) -> None:
    """Makes the folder of a file that is to be written, before the work."""
    if path is None:
        return
    if formats and path.suffix.lower() not in formats:
        raise Unusable(f"no picture can be written as {path.name}; the formats are {', '.join(formats)}")
    if path.is_dir():
        raise Unusable(f"{path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)


def _give_up(message: str) -> NoReturn:
    print(f"convbn-fx: {message}", file=sys.stderr)  # noqa: T201 - one line, whatever the terminal's width
    raise typer.Exit(UNUSABLE)
