"""Reports of the benchmarks that were damaged: one line that says where."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gpubackprop.bench.report import read_report

WHOLE = Path(__file__).with_name("golden") / "report.json"  # of a dry run


def test_a_whole_report_is_read() -> None:
    assert len(read_report(WHOLE)["rows"]) == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a report of gpubackprop bench: JSONDecodeError"),
        (b"\xff\xfe", "is not a report of gpubackprop bench: UnicodeDecodeError"),
        (b"[" * 200_000, "is not a report of gpubackprop bench: RecursionError"),
        (b"[]", "is not a report of gpubackprop bench: it names no schema"),
        (b"{}", "is not a report of gpubackprop bench: it names no schema"),
        (b'{"schema": NaN}', "ValueError NaN is not a finite number"),
        (b'{"schema": 1e999}', "ValueError 1e999 is not a finite number"),
        (b'{"schema": %b}' % (b"9" * 5000), "ValueError 9999999999999999999999999999999999999999... is too large"),
        (b'{"schema": 3}', "has schema 3; this version reads schema 4"),
        (b'{"schema": 4}', r"is damaged: [$]: 'date' is a required property"),
    ],
)
def test_what_is_no_report(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    refused(tmp_path, message)


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_report(path)
    assert "report.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(rows=3), "[$].rows: 3 is not of type 'array'"),
        (lambda r: r["environment"].pop("cpu"), "'cpu' is a required property"),
        (lambda r: r["rows"][0].update(candidates=[]), "is not of type 'object'"),
        (lambda r: r["rows"][0].update(base="torch"), "has no time of its base 'torch'"),
        (lambda r: r["rows"].append(r["rows"][0]), "it has .* twice"),
        (lambda r: _time(r).update(samples=[]), "samples.*should be non-empty"),
        (lambda r: _time(r).update(samples=["fast"]), "'fast' is not of type 'number'"),
        (lambda r: _time(r).update(median=-1), "-1 is less than the minimum"),
    ],
)
def test_a_damaged_report(change: Any, message: str, tmp_path: Path) -> None:
    report = json.loads(WHOLE.read_text(encoding="utf-8"))
    change(report)
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    refused(tmp_path / "report.json", message)


def _time(report: Any) -> Any:
    return next(iter(report["rows"][0]["candidates"].values()))["wall_seconds"]


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.json")
    refused(tmp_path / "report.json", "is not a regular file")
