"""The results file: one row a model, written as the rows come, read strictly.

A row is a line of CSV that ends in a newline, so that a line without one is the only thing that a power cut can leave
half-written; no field holds a newline.
"""

import csv
import fnmatch
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from convbn_fx.cli import Unusable


class Level(StrEnum):
    """How much of a model is measured."""

    STRUCTURE = "structure"
    NUMERIC = "numeric"


class Status(StrEnum):
    """How measuring a model ended. The value stands in the file."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    ERROR = "error"
    UNBUILDABLE = "unbuildable"
    CRASH = "crash"
    TIMEOUT = "timeout"
    MEMORY = "memory"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found out about one model; None where it was not measured.

    Attributes:
        name: The model as the command line names it, such as `timm:resnet50`.
        family: The module that its library keeps it in, such as `timm.resnet`.
        status: `pass` if everything that was asked for was measured and is right; `fail` if an output or a gradient
            is wrong, or the tuned model keeps more bytes; `error` if something raised; `unbuildable` if the model could
            not be made; `crash` if its process died; `timeout` and `memory` if it was stopped at a limit.
        level: `structure` (counted on the meta device) or `numeric` (compared in numbers, too).
        parameters: Number of elements of its parameters.
        batch_norms: Number of its batch norm modules.
        fused: Number of pairs that `tune` fused.
        refused: How many batch norms were left for each reason, by the name of the `SkipReason`.
        input: Shape of the input that the bytes belong to, such as `2x3x224x224`, after the name of the sub-module that
            gets it unless it is the model.
        bytes_eval: Bytes saved for the backward pass by the model as it is.
        bytes_tune: The same after `tune`.
        bytes_deploy: The same after `deploy`, the paper's lower limit.
        output_error: Worst relative error of an output of `tune` against the model's own, in float64.
        gradient_error: The same of the gradients by the input and every parameter.
        float32_error_tune: Worst relative error of the outputs of `tune` in float32 against float64.
        float32_error_eval: The same of the model's own.
        seconds: Wall time that the model took, its process's start included.
        detail: Why, if the status is not `pass`; one line.
    """

    name: str
    family: str = ""
    status: Status
    level: Level
    parameters: int | None = None
    batch_norms: int | None = None
    fused: int | None = None
    refused: Mapping[str, int] | None = None
    input: str = ""
    bytes_eval: int | None = None
    bytes_tune: int | None = None
    bytes_deploy: int | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    float32_error_tune: float | None = None
    float32_error_eval: float | None = None
    seconds: float | None = None
    detail: str = ""


class ResultsError(Unusable):
    """A results file cannot be used; the message names the file, the line and what to do."""


def _write_counts(counts: Mapping[str, int]) -> str:
    return " ".join(f"{name}:{counts[name]}" for name in sorted(counts)) or "none"


def _read_counts(cell: str) -> Counter[str]:
    if cell == "none":
        return Counter()
    pairs = [item.rpartition(":") for item in cell.split(" ")]
    counts = Counter({name: _read_count(count) for name, _, count in pairs})
    if len(counts) < len(pairs) or "" in counts:
        raise ValueError(cell)
    return counts


def _read_count(cell: str) -> int:
    if not (cell.isascii() and cell.isdecimal()):
        raise ValueError(cell)
    return int(cell)


def _read_error(cell: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?|inf|nan", cell):
        raise ValueError(cell)
    return float(cell)


def _write_text(text: str) -> str:
    """In one line; what is no Unicode, such as a path that cannot be decoded, escaped."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").split())


def _read_text(cell: str) -> str:
    if cell != " ".join(cell.split()):
        raise ValueError(cell)
    return cell


class _Format(NamedTuple):
    """How a column is written, and read again."""

    write: Callable[[Any], str]
    read: Callable[[str], Any]


_TEXT = _Format(_write_text, _read_text)
_COUNT = _Format(str, _read_count)
_ERROR = _Format("{:.2e}".format, _read_error)

#: The columns with errors, and what they are called.
ERRORS: Mapping[str, str] = {
    "output_error": "outputs, float64",
    "gradient_error": "gradients, float64",
    "float32_error_tune": "outputs, float32, Tune",
    "float32_error_eval": "outputs, float32, Eval",
}

#: The columns, in the order of the file.
COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(Row))
HEADER = ",".join(COLUMNS) + "\n"
_REQUIRED = frozenset({"name", "status", "level"})
_FORMATS: Mapping[str, _Format] = {
    **dict.fromkeys(COLUMNS, _COUNT),
    **dict.fromkeys(("name", "family", "input", "detail"), _TEXT),
    **dict.fromkeys(ERRORS, _ERROR),
    "status": _Format(str, Status),
    "level": _Format(str, Level),
    "refused": _Format(_write_counts, _read_counts),
    "seconds": _Format("{:.1f}".format, _read_error),
}


def cells(row: Row) -> dict[str, str]:
    """The text of each column; empty where nothing was measured."""
    values = ((column, getattr(row, column)) for column in COLUMNS)
    return {column: "" if value is None else _FORMATS[column].write(value) for column, value in values}


def line(row: Row) -> str:
    """The row as a line of the file, with its newline."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells(row).values())
    return text.getvalue()


def read(path: Path) -> list[Row]:
    """The rows of a results file, in its order; raises `ResultsError` if it cannot be read."""
    with _explained(path):
        text = path.read_text(encoding="utf-8")
    return parse(text, str(path))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}") from error


def parse(text: str, path: str) -> list[Row]:
    """Reads the text of a results file, whose name is for the messages.

    Raises:
        ResultsError: It is truncated, has other columns, a cell that makes no sense, or a model twice.
    """
    if not text:
        raise ResultsError(f"{path}: the file is empty; a results file begins with the line {HEADER.strip()}")
    if not text.endswith("\n"):
        last = text.count("\n") + 1
        raise ResultsError(
            f"{path}:{last}: the last line is truncated; `sweep --resume` completes what it has begun"
        )
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        (_, header), *records = [(reader.line_num, record) for record in reader]
    except csv.Error as error:
        raise ResultsError(f"{path}:{reader.line_num}: {error}") from error
    _check_header(header, path)
    rows: dict[str, Row] = {}
    lines: dict[str, int] = {}
    for number, record in records:
        row = _row(record, f"{path}:{number}")
        if row.name in rows:
            raise ResultsError(f"{path}:{number}: {row.name} is there already, at line {lines[row.name]}")
        rows[row.name], lines[row.name] = row, number
    return list(rows.values())


def check_names(rows: Iterable[Row], place: str) -> None:
    """Raises `ResultsError`, which says in which place, if of rows that are to be one file's two are of one model."""
    counts = Counter(row.name for row in rows)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ResultsError(f"{place}: {twice[0]} is there {counts[twice[0]]} times")


def matches(name: str, pattern: str) -> bool:
    """Whether a model is meant by a pattern: `timm:resnet*`, or `resnet*` of any library."""
    return any(fnmatch.fnmatchcase(each, pattern) for each in (name, name.partition(":")[2]))


def _check_header(header: list[str], path: str) -> None:
    if unknown := [column for column in header if column not in COLUMNS]:
        raise ResultsError(f"{path}:1: unknown column {unknown[0]!r}; there are {', '.join(COLUMNS)}")
    if tuple(header) != COLUMNS:
        missing = [column for column in COLUMNS if column not in header]
        wrong = f"column {missing[0]!r} is missing" if missing else "the columns are not in their order"
        raise ResultsError(f"{path}:1: {wrong}; the first line has to be {HEADER.strip()}")


def _row(record: list[str], place: str) -> Row:
    if len(record) != len(COLUMNS):
        raise ResultsError(
            f"{place}: {len(record)} cells instead of {len(COLUMNS)}; the line is truncated or not of this file"
        )
    values: dict[str, Any] = {}
    for column, cell in zip(COLUMNS, record, strict=True):
        if column in _REQUIRED and not cell:
            raise ResultsError(f"{place}: column {column} is empty")
        if not cell and _FORMATS[column] is not _TEXT:
            continue
        try:
            values[column] = _FORMATS[column].read(cell)
        except ValueError:
            raise ResultsError(f"{place}: column {column}: {cell!r} makes no sense") from None
    return Row(**values)


def in_one_line(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its message."""
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {message}"[:300] if message else type(error).__name__


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes a whole results file, sorted by name; what was there before is replaced in one step."""
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = HEADER + "".join(line(row) for row in sorted(rows, key=lambda row: row.name))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def append(path: Path, row: Row) -> None:
    """Adds a row to the file, durably: once this returns, the row survives a power cut."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line(row))
        file.flush()
        os.fsync(file.fileno())


def resume(path: Path) -> list[Row]:
    """Reads what an interrupted run has left, and cuts off a line that it left half-written.

    A file that is not there is made, with its header alone.

    Raises:
        ResultsError: What is there is no results file.
    """
    with _explained(path):
        found = path.read_bytes() if path.exists() else b""
        whole = found[: found.rfind(b"\n") + 1]
        text = whole.decode("utf-8")
    if not whole:
        if not HEADER.encode().startswith(found):
            raise ResultsError(f"{path}: not a results file, and left as it is; name another with --out")
        write(path, [])
        return []
    rows = parse(text, str(path))
    if whole != found:
        os.truncate(path, len(whole))
    return rows
