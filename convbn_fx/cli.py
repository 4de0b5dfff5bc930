"""The command line: `convbn-fx report`, `sweep` and `gate`. Each command reads its options and calls one module."""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import psutil
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from convbn_fx import gate as gating
from convbn_fx.zoo import results
from convbn_fx.zoo.architectures import Subject, UnknownModel, UnknownSuite, load, matches
from convbn_fx.zoo.architectures import suite as models_of
from convbn_fx.zoo.results import Level, ResultsError, Row, Status
from convbn_fx.zoo.sweeping import Backend, Cluster, Limits, processors

#: What a command exits with: all is well; something is not as it should be; the command cannot be carried out.
HELD, CHANGED, UNUSABLE = 0, 1, 2

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Convolutions and frozen batch norms, fused while everything still trains.",
    epilog="Example: convbn-fx report timm:resnet50",
)


class Unusable(ValueError):
    """Options that make no sense together; the message says which."""


@app.command(epilog="Example: convbn-fx report timm:resnet50 --batch 32 --size 224 --plot memory.png")
def report(
    model: Annotated[
        str,
        typer.Argument(
            help="timm:NAME, torchvision:NAME, or package.module:factory, a function that returns a model, or a model "
            "and a tuple of its inputs",
            show_default=False,
        ),
    ],
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images in a batch.  [default: 32]", show_default=False)
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Height and width of the images.  [default: the model's own]", show_default=False
        ),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Load trained weights; those of a library are downloaded.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Compare outputs and all gradients in float64 too, with batch norms made random."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the tables and the pictures.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a picture (png, svg or pdf): memory by layer, the coefficients."),
    ] = None,
) -> None:
    """Tell what Tune mode does to a model: the pairs, the bytes they save, what is left and why.

    Bytes are those that one call keeps for the backward pass, counted on tensors that hold no memory: any size fits.
    Exits with 1 if --check finds a difference, with 2 if the model cannot be found.
    """
    with _failures_explained():
        subject = load(model, pretrained=pretrained)
        if not subject.resizable and (batch is not None or size is not None):
            raise Unusable(f"{model} brings its own inputs; --batch and --size are for models that do not")
        _report(subject, batch or 32, size, check, as_json, html, plot)


def _report(
    subject: Subject,
    batch: int,
    side: int | None,
    check: bool,
    as_json: bool,
    html: Path | None,
    plot: Path | None,
) -> None:
    from convbn_fx import presentation
    from convbn_fx.inspection import inspect_model
    from convbn_fx.zoo.measuring import compare_numbers, smallest_side

    console = _console()
    inspection = inspect_model(subject.model, subject.inputs(batch, side), body=subject.body)
    facts: dict[str, Any] = inspection.to_json() | {"name": subject.name}
    if not as_json:
        console.print(presentation.render(inspection))
    if html is not None:
        presentation.write_html(inspection, html)
    if plot is not None:
        presentation.plot(inspection, plot)
    failure = ""
    if check:
        numbers = compare_numbers(subject, smallest_side(subject), seed=0)
        failure = numbers.failure
        facts["check"] = {
            "passed": not failure,
            "output_error": numbers.output_error,
            "gradient_error": numbers.gradient_error,
            "float32_error_tune": numbers.float32_error_tune,
            "float32_error_eval": numbers.float32_error_eval,
        }
        if not as_json:
            console.print(
                failure
                or f"checked in float64: outputs differ by {numbers.output_error:.1e} at most, gradients by "
                f"{numbers.gradient_error:.1e}"
            )
    if as_json:
        console.out(json.dumps(facts, indent=2, allow_nan=False), highlight=False)
    if failure:
        raise typer.Exit(CHANGED)


@app.command(
    epilog="Example: convbn-fx sweep --suite timm --match 'resnet*' --level numeric --jobs 2 --out results.csv"
)
def sweep(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="timm, torchvision, or a file: one model a line, or a results file. May be given again."
        ),
    ] = None,
    match: Annotated[str, typer.Option(help="Only models whose name matches, such as 'resnet*'.")] = "*",
    level: Annotated[
        Level,
        typer.Option(
            help="structure: pairs and bytes, on the meta device. numeric: errors and gradients too."
        ),
    ] = Level.STRUCTURE,
    out: Annotated[Path, typer.Option(help="The results file: a row a model, written as they come.")] = Path(
        "results.csv"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the results file where it stopped.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Models at a time.  [default: one a processor]", show_default=False),
    ] = None,
    shard: Annotated[
        str, typer.Option(help="Only this part of the models, such as 3/16.", show_default=False)
    ] = "1/1",
    timeout: Annotated[float, typer.Option(min=0, help="Seconds that one model may take.")] = 900.0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Memory that one model may take, such as 8GB.  [default: 90% of the machine's, over --jobs]",
            show_default=False,
        ),
    ] = None,
    max_params: Annotated[
        float,
        typer.Option(
            help="Models with more parameters, such as 1e8, are measured in structure only.",
            show_default=False,
        ),
    ] = math.inf,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch whose bytes are counted.")] = 2,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Their height and width.  [default: each model's own]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batch norms and images.")] = 0,
    backend: Annotated[Backend, typer.Option(help="What joblib runs the jobs on.")] = Backend.LOKY,
    address: Annotated[
        str | None, typer.Option(help="Of a cluster's scheduler; otherwise a cluster is started here.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the results as a page, too.")] = None,
    only_summarise: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Measure nothing: summarise this results file, and write its page with --html."
        ),
    ] = None,
) -> None:
    """Measure many models, each in a process of its own; one row of results for each, whatever happens to it.

    Exits with 0 whatever the rows say (`convbn-fx gate` judges them), with 2 if the sweep cannot be made, with 130
    after Ctrl-C; `--resume` goes on then.
    """
    from convbn_fx.zoo.measuring import Settings

    with _failures_explained():
        if only_summarise is not None:
            _summarise(results.read(only_summarise), only_summarise, html)
            return
        names = _sharded(
            [name for each in suite or ["timm"] for name in models_of(each) if matches(name, match)], shard
        )
        if not names:
            raise Unusable(
                f"no model matches {match!r} in the suite {', '.join(suite or ['timm'])}, shard {shard}"
            )
        jobs = min(jobs or processors(), len(names))
        settings = Settings(
            level=level,
            seed=seed,
            max_parameters=max_params,
            batch=batch,
            side=size,
            threads=max(1, processors() // jobs),
        )
        memory = (
            int(0.9 * psutil.virtual_memory().total / jobs) if memory_limit is None else _bytes(memory_limit)
        )
        done = _begun(out, resume, level)
        todo = [name for name in names if name not in done]
        _measure(todo, out, settings, Limits(timeout or None, memory), Cluster(jobs, backend, address))
        rows = results.read(out)
        results.write(out, rows)  # sorted, now that they are all there
        _summarise(rows, out, html)


def _begun(out: Path, resume: bool, level: Level) -> set[str]:
    """The models that have a row already."""
    if out.exists() and not resume:
        raise Unusable(f"{out} is there already; go on with it (--resume), or name another file (--out)")
    rows = results.resume(out)
    if level is Level.NUMERIC and (
        lower := [row for row in rows if row.level is not level and row.parameters is None]
    ):
        raise Unusable(f"{out} holds structure rows, such as {lower[0].name}; name another file (--out)")
    return {row.name for row in rows}


def _measure(names: list[str], out: Path, settings: Any, limits: Limits, cluster: Cluster) -> None:
    from convbn_fx.zoo.sweeping import sweep as rows_of

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with _progress(console, len(names)) as advance:
            for row in rows_of(names, settings, limits, cluster) if names else ():
                results.append(out, row)
                advance(row)
    except KeyboardInterrupt:
        console.print(f"stopped; every finished model is in {out}, and --resume goes on")
        raise typer.Exit(130) from None


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Any]:
    """A bar with the time left; lines where there is no terminal. Models that do not pass are always named."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    counts = {"done": 0, "not passed": 0}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("models", total=total)

        def advance(row: Row) -> None:
            counts["done"] += 1
            counts["not passed"] += row.status is not Status.PASS
            if row.status is not Status.PASS:
                progress.console.print(f"{row.name}: {row.status}: {row.detail}", markup=False)
            elif not console.is_terminal and counts["done"] % 25 == 0:
                console.print(f"{counts['done']} of {total} models, {counts['not passed']} not passed")
            progress.update(task, advance=1, description=row.name)

        yield advance


def _summarise(rows: list[Row], source: Path, html: Path | None) -> None:
    from convbn_fx.zoo import page, summary

    _console().print(summary.render(summary.summarize(rows)))
    if html is not None:
        page.write_page(html, rows, title="Convolutions and batch norms of the model zoo", source=source.name)


def _sharded(names: Iterable[str], shard: str) -> list[str]:
    """Every n-th model: neighbours in a library are of a size, so that the parts take about as long."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise Unusable(f"--shard {shard} makes no sense; give PART/PARTS, such as 3/16, from 1/16 to 16/16")
    return list(dict.fromkeys(names))[part - 1 :: parts]


_UNITS = {"": 10**9, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise Unusable(
            f"--memory-limit {text} makes no sense; give a number of GB, or one with MB, GB, MiB, GiB"
        )
    return int(float(found[1]) * unit)


@app.command(epilog="Example: convbn-fx gate results.csv --expected expected.csv")
def gate(
    actual: Annotated[Path, typer.Argument(help="The results file of a sweep.", show_default=False)],
    expected: Annotated[Path, typer.Option(help="The baseline: a results file, too.", show_default=False)],
    update: Annotated[
        bool, typer.Option("--update", help="Write what changed into the baseline, and hold it from then on.")
    ] = False,
    match: Annotated[str, typer.Option(help="Only models whose name matches, such as 'resnet*'.")] = "*",
) -> None:
    """Hold a results file to a baseline: PASS, FAIL, IMPROVED, MISSING or NEW for each model.

    Exits with 0 if all of them pass, with 1 if anything changed, for better or worse, with 2 if a file is unusable.
    """
    with _failures_explained():
        raise typer.Exit(gating.run(actual, expected, update=update, match=match, console=_console()))


def _console() -> Console:
    """Where results go; as wide as they need where they go into a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


@contextmanager
def _failures_explained() -> Iterator[None]:
    """Turns what is wrong with the command or its files into one line and an exit status."""
    try:
        yield
    except (UnknownModel, UnknownSuite, ResultsError, Unusable) as error:
        _give_up(str(error))
    except ModuleNotFoundError as error:
        if error.name not in {"distributed", "ray", "matplotlib", "jinja2"}:
            raise
        _give_up(f"{error.name} is not installed: pip install {error.name}")


def _give_up(message: str) -> NoReturn:
    print(f"convbn-fx: {message}", file=sys.stderr)  # noqa: T201 - one line, whatever the width
    raise typer.Exit(UNUSABLE)
