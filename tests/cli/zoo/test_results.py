"""The results file: what is written is read, nothing else is; an interrupted file is completed, never mended."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import FULL, rows, tables

from convbn_fx.cli.zoo import results
from convbn_fx.cli.zoo.results import COLUMNS, HEADER, Level, ResultsError, Row, Status

OTHER = replace(FULL, name="timm:other", detail='said "no, never" \u2014 twice')
LINE = results.line(FULL)


def text(*rows):
    return HEADER + "".join(map(results.line, rows))


def with_cell(column, cell):
    """The text of a file of one row, one cell of it replaced."""
    cells = results.cells(FULL) | {column: cell}
    return HEADER + ",".join(cells.values()) + "\n"


# --- There and back -----------------------------------------------------------------------------------------------


@given(tables())
def test_what_is_written_is_read(table):
    found = results.parse(text(*table), "x.csv")
    # By cells, for NaN is not itself; and by type, for 1 is 1.0.
    assert list(map(results.cells, found)) == list(map(results.cells, table))
    for row, original in zip(found, table, strict=True):
        for column in COLUMNS:
            value, given_value = getattr(row, column), getattr(original, column)
            assert value == given_value or value != value, column
            assert isinstance(value, dict if column == "refused" and value is not None else type(given_value))


@given(rows())
def test_a_row_is_one_line(row):
    line = results.line(row)
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert "\r" not in line


def test_a_line():
    assert LINE == (
        "timm:resnet50,timm.resnet,pass,numeric,25557032,54,53,NOT_AFTER_CONVOLUTION:1,2x3x224x224,"
        "200000,120000,100000,3.00e-14,2.00e-14,2.00e-06,1.00e-06,12.3,\n"
    )
    assert tuple(results.cells(FULL)) == COLUMNS


def test_nothing_measured_is_not_zero():
    bare = Row(name="a", status=Status.CRASH, level=Level.STRUCTURE)
    assert results.line(bare) == "a,,crash,structure" + "," * (len(COLUMNS) - 4) + "\n"
    zero = replace(bare, fused=0, refused={}, output_error=0.0)
    assert results.parse(text(zero), "x.csv") == [zero]
    assert results.parse(text(bare), "x.csv") == [bare]


def test_a_text_becomes_one_line():
    row = replace(FULL, detail="two\nlines\r\n\tand\x85more\u2028of it ")
    assert results.cells(row)["detail"] == "two lines and more of it"


def test_a_file_that_windows_has_touched_is_read(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(text(FULL, OTHER).replace("\n", "\r\n").encode())
    assert results.read(path) == [FULL, OTHER]


# --- What is no results file --------------------------------------------------------------------------------------

UNUSABLE = {
    "empty": ("", "x.csv: the file is empty"),
    "header alone, truncated": (HEADER[:-1], "x.csv:1: the last line is truncated"),
    "last line truncated": (text(FULL, OTHER)[:-1], "x.csv:3: the last line is truncated"),
    "last line truncated in a cell": (text(FULL) + LINE[:30], "x.csv:3: the last line is truncated"),
    "a cell too few": (text(FULL) + "timm:a,pass\n", "x.csv:3: 2 cells instead of 18"),
    "a cell too many": (HEADER + LINE[:-1] + ",\n", "x.csv:2: 19 cells instead of 18"),
    "a blank line": (text(FULL) + "\n", "x.csv:3: 0 cells instead of 18"),
    "an unknown column": (HEADER.replace("fused", "fusde"), "x.csv:1: unknown column 'fusde'"),
    "a byte order mark": ("\ufeff" + HEADER, "x.csv:1: unknown column '\\ufeffname'"),
    "a missing column": (HEADER.replace(",fused,", ","), "x.csv:1: column 'fused' is missing"),
    "columns in another order": (
        HEADER.replace("fused,refused", "refused,fused"),
        "x.csv:1: the columns are not in their order",
    ),
    "a column twice": (HEADER.replace("name", "name,name"), "x.csv:1: the columns are not in their order"),
    "no header": (LINE, "x.csv:1: unknown column"),
    "a model twice": (
        text(FULL, OTHER, FULL),
        "x.csv:4: timm:resnet50 is there already, at line 2",
    ),
    "an open quote": (text(FULL) + '"timm:a\n', "x.csv:3: "),
    "text after a quote": (text(FULL) + '"timm:a"b\n', "x.csv:3: "),
    "an unknown status": (with_cell("status", "passed"), "x.csv:2: column status: 'passed' makes no sense"),
    "no status": (with_cell("status", ""), "x.csv:2: column status is empty"),
    "no level": (with_cell("level", ""), "x.csv:2: column level is empty"),
    "no name": (with_cell("name", ""), "x.csv:2: column name is empty"),
    "a negative count": (with_cell("fused", "-1"), "x.csv:2: column fused: '-1' makes no sense"),
    "a count that is none": (with_cell("fused", "5e1"), "x.csv:2: column fused: '5e1' makes no sense"),
    "digits of another script": (with_cell("fused", "\u0663"), "x.csv:2: column fused"),
    "a count beyond reason": (with_cell("fused", "9" * 5000), "x.csv:2: column fused"),
    "an error that is none": (with_cell("output_error", "small"), "x.csv:2: column output_error: 'small'"),
    "a reason without count": (with_cell("refused", "SHARED"), "x.csv:2: column refused: 'SHARED'"),
    "a reason with a negative count": (with_cell("refused", "SHARED:-1"), "x.csv:2: column refused"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_makes_no_sense_is_refused_with_its_place(case):
    content, message = UNUSABLE[case]
    with pytest.raises(ResultsError) as caught:
        results.parse(content, "x.csv")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("case", UNUSABLE)
def test_reading_names_the_file(case, tmp_path):
    content, message = UNUSABLE[case]
    path = tmp_path / "x.csv"
    path.write_bytes(content.encode())
    with pytest.raises(ResultsError) as caught:
        results.read(path)
    assert str(caught.value).startswith(str(tmp_path / message))


def test_what_is_no_file_of_text_is_refused(tmp_path):
    latin = tmp_path / "latin.csv"
    latin.write_bytes(text(FULL).encode() + "caf\u00e9\n".encode("latin-1"))
    for path in (tmp_path, tmp_path / "not there.csv", latin):
        with pytest.raises(ResultsError) as caught:
            results.read(path)
        assert str(caught.value).startswith(f"{path}: cannot be read: ")


@given(st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(data):
    whole = text(*data.draw(tables(min_size=1)))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    damage = data.draw(st.text(st.sampled_from(',"\n\r:- 19enaif') | st.characters(), max_size=5))
    try:
        found = results.parse(whole[:start] + damage + whole[stop:], "x.csv")
    except ResultsError as error:
        assert str(error).startswith("x.csv:")  # noqa: PT017 - either way will do
    else:
        assert all(isinstance(row, Row) for row in found)


# --- Writing ------------------------------------------------------------------------------------------------------


def test_a_file_is_sorted_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "b" / "x.csv"
    results.write(path, [OTHER, FULL])
    assert path.read_text(encoding="utf-8") == text(*sorted([FULL, OTHER], key=lambda row: row.name))
    assert results.read(path) == [OTHER, FULL]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / "x.csv"
    results.write(path, [FULL])
    before = path.read_bytes()

    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], fail)
    with pytest.raises(OSError, match="disk full"):
        results.write(path, [FULL, OTHER])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_rows_that_fail_to_come_leave_what_was_there(tmp_path):
    path = tmp_path / "x.csv"
    results.write(path, [FULL])

    def broken():
        yield OTHER
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        results.write(path, broken())
    assert results.read(path) == [FULL]
    assert list(tmp_path.iterdir()) == [path]


def test_an_open_reader_keeps_the_whole_old_file(tmp_path):
    path = tmp_path / "x.csv"
    results.write(path, [FULL])
    with path.open(encoding="utf-8") as reader:
        results.write(path, [OTHER])
        assert reader.read() == text(FULL)


def test_a_row_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    results.write(path, [])
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_text(encoding="utf-8")))
    results.append(path, OTHER)
    results.append(path, FULL)
    assert synced == [text(OTHER), text(OTHER, FULL)]


# --- Resuming -----------------------------------------------------------------------------------------------------


def test_a_half_written_line_is_cut_wherever_it_ends(tmp_path):
    path = tmp_path / "x.csv"
    whole, last = text(FULL).encode(), results.line(OTHER).encode()
    assert len(last) > len(results.line(OTHER)), "a character of several bytes is cut, too"
    for length in range(len(last)):
        path.write_bytes(whole + last[:length])
        assert results.resume(path) == [FULL]
        assert path.read_bytes() == whole
        results.append(path, OTHER)
        assert path.read_bytes() == whole + last


def test_a_whole_file_is_left_alone(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(text(FULL, OTHER), encoding="utf-8")
    before = path.stat()
    assert results.resume(path) == [FULL, OTHER]
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_file_that_is_not_there_is_begun(tmp_path):
    path = tmp_path / "new" / "x.csv"
    assert results.resume(path) == []
    assert path.read_text(encoding="utf-8") == HEADER


def test_a_header_is_completed_wherever_it_ends(tmp_path):
    path = tmp_path / "x.csv"
    for length in range(len(HEADER) + 1):
        path.write_text(HEADER[:length], encoding="utf-8")
        assert results.resume(path) == []
        assert path.read_text(encoding="utf-8") == HEADER


NOT_RESUMABLE = {
    "a text without newline": b"my novel",
    "a text": b"my novel\nis short\n",
    "not UTF-8": HEADER.encode() + b"caf\xe9\n",
    "a bad row before the half one": HEADER.encode() + b"timm:a,pass\n" + LINE[:20].encode(),
    "another version's columns": HEADER.replace(",fused,", ",").encode() + b"half",
}


@pytest.mark.parametrize("case", NOT_RESUMABLE)
def test_what_is_no_results_file_is_left_as_it_is(tmp_path, case):
    path = tmp_path / "x.csv"
    path.write_bytes(NOT_RESUMABLE[case])
    with pytest.raises(ResultsError) as caught:
        results.resume(path)
    assert str(caught.value).startswith(str(path))
    assert path.read_bytes() == NOT_RESUMABLE[case]


def test_a_folder_is_not_resumed(tmp_path):
    with pytest.raises(ResultsError, match="cannot be read"):
        results.resume(tmp_path)
