"""`python -m bench NAME`: runs a benchmark, prints its table as Markdown, writes its results and its picture."""

import importlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer import Argument, Option

from bench.experiments import EXPERIMENTS, PARTS
from bench.harness.environment import describe, processor_ticks
from bench.harness.results import Options, Result


def module_of(benchmark: str) -> Any:
    """The module of a benchmark.

    Args:
        benchmark: Its name.

    Returns:
        The module. `run(options)` returns `settings, rows, notes`; `tables(result)` its tables in Markdown;
        `plot(result)` a figure; `cases(result)`, where contenders are set against each other, what
        [`better_than_tune`][bench.harness.better.better_than_tune] is to look at.
    """
    return importlib.import_module(f"bench.experiments.{benchmark.replace('-', '_')}")


def main(
    benchmark: Annotated[str, Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
    smoke: Annotated[bool, Option("--smoke", help="Toy sizes: does everything run?")] = False,
    seconds: Annotated[float, Option(min=0, help="How long the contenders of a row take turns.")] = 30.0,
    seeds: Annotated[int, Option(min=1, help="How often what depends on chance is repeated.")] = 5,
    image_folder: Annotated[
        Path | None, Option(exists=True, help="classification: images of your own, a folder a class.")
    ] = None,
    checkpoint: Annotated[
        Path | None, Option(exists=True, help="coefficients: a state_dict of your own.")
    ] = None,
    eps: Annotated[
        float,
        Option(min=0, help="coefficients: eps of the checkpoint's batch norms, which it does not tell."),
    ] = 1e-5,
    part: Annotated[str, Option(help=f"gpu: one of {', '.join(PARTS)}.")] = "",
    json: Annotated[Path | None, Option(help="Write every sample and the environment here.")] = None,
    plot: Annotated[Path | None, Option(help="Write a picture (png, svg or pdf) here.")] = None,
) -> None:
    """Run a benchmark and print its table as Markdown."""
    if benchmark not in EXPERIMENTS:
        raise typer.BadParameter(f"there is no benchmark {benchmark}; there are {', '.join(EXPERIMENTS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here")
    if part and part not in PARTS:
        raise typer.BadParameter(f"there is no part {part}; there are {', '.join(PARTS)}")
    options = Options(device, smoke, seconds, seeds, image_folder, checkpoint, eps, part)
    module = module_of(benchmark)
    before = processor_ticks()
    settings, rows, notes = module.run(options)
    notes = [*notes, *_stolen(before, processor_ticks())]
    command = f"python -m bench {shlex.join(sys.argv[1:])}"
    result = Result(benchmark, command, describe(device), settings, rows, notes)
    if json is not None:
        result.write(json)
    if plot is not None:
        module.plot(result).savefig(plot)
    typer.echo("\n".join([*module.tables(result), *[f"{note}\n" for note in result.notes]]))


def _stolen(before: tuple[int, int] | None, after: tuple[int, int] | None) -> Iterator[str]:
    """How much a reader may trust the times."""
    if before is not None and after is not None and after[1] > before[1]:
        share = (after[0] - before[0]) / (after[1] - before[1])
        yield f"While this ran, the machine's host took {100 * share:.1f} % of the processors' time for others."


if __name__ == "__main__":
    typer.run(main)
