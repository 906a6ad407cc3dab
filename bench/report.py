"""The report: a JSON document, written after every case, so an interruption loses nothing. ``schema.json`` describes it."""

from __future__ import annotations

import datetime
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpubackprop.bench.case import Row, Settings, is_ours, key_of
from gpubackprop.bench.ledger import annotate
from gpubackprop.definitions import one_line, shown
from gpubackprop.machine.files import write_whole

SCHEMA = 4
NAME = "report.json"

Report = dict[str, Any]


def new_report(settings: Settings, environment: Row, command: list[str]) -> Report:
    """Return a report without rows."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "settings": asdict(settings),
        "environment": environment,
        "interrupted": False,
        "seconds": 0.0,
        "rows": [],
        "left_out": [],
    }


def write_report(report: Report, folder: Path) -> None:
    """Write the report into a folder, the whole file or nothing; a list of numbers is one line."""
    text = json.dumps(report, indent=1, allow_nan=False)
    text = re.sub(r"\[[-+.\de,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    write_whole(folder / NAME, (text + "\n").encode())


def read_report(path: Path) -> Report:
    """Return a report from its file or its folder, as ``schema.json`` describes it.

    Raises
    ------
    ValueError
        It is not a report, has another schema, or is damaged.
    """
    file = path / NAME if path.is_dir() else path
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    try:
        report: Report = json.loads(
            file.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite, parse_int=_whole
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a report of gpubackprop bench: {type(error).__name__} {one_line(str(error))}"
        ) from None
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema is None:
        raise ValueError(f"{file} is not a report of gpubackprop bench: it names no schema")
    if schema != SCHEMA:
        raise ValueError(f"{file} has schema {shown(schema)}; this version reads schema {SCHEMA}: measure again")
    _check(report, str(file))
    return report


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def _whole(text: str) -> int:
    if len(text) > 25:  # the count of operations of a step has no more digits
        raise ValueError(f"{text[:40]}... is too large")
    return int(text)


def _check(report: Report, name: str) -> None:
    """Raise ValueError unless a report is as ``schema.json`` describes it, and its rows are consistent."""
    from jsonschema import Draft202012Validator  # which only a reader of reports needs

    schema = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    for error in Draft202012Validator(schema).iter_errors(report):
        raise ValueError(f"{name} is damaged: {one_line(error.json_path)}: {one_line(error.message, 200)}")
    seen = set()
    for row in report["rows"]:
        if key_of(row) in seen:
            raise ValueError(f"{name} is damaged: it has {', '.join(key_of(row))} twice")
        seen.add(key_of(row))
        if row["candidates"] and row["base"] not in row["candidates"]:
            raise ValueError(
                f"{name} is damaged: {', '.join(key_of(row))} has no time of its base {shown(row['base'])}"
            )


def resumed(folder: Path, settings: Settings, environment: Row) -> Report:
    """Return the report in a folder, to continue it.

    Raises
    ------
    ValueError
        There is none, or it was measured differently: rows of two machines, versions or settings do not belong in one report.
    """
    if not (folder / NAME).is_file():
        raise ValueError(f"--resume continues {folder / NAME}, which does not exist")
    report = read_report(folder)
    before, now = dict(report["settings"]), json.loads(json.dumps(asdict(settings)))
    for same in ("sizes", "libraries"):  # more of either may be requested
        before.pop(same), now.pop(same)
    for name, was, is_now in (
        ("settings", before, now),
        ("commit", report["environment"]["commit"], environment["commit"]),
        ("packages", report["environment"]["packages"], environment["packages"]),
        ("host", report["environment"]["host"], environment["host"]),
    ):
        if was != is_now:
            raise ValueError(
                f"{folder / NAME} was measured with other {name}: {_difference(was, is_now)}; name another folder with --out"
            )
    report["interrupted"], report["left_out"] = False, []
    return report


def _difference(was: Any, now: Any) -> str:
    if not isinstance(was, dict):
        return f"{was}, now {now}"
    changed = [key for key in now if was.get(key) != now[key]]
    return ", ".join(f"{key} {was.get(key)}, now {now[key]}" for key in changed)


def add_row(report: Report, row: Row) -> None:
    """Add a row, with what follows from the rows before it."""
    annotate(row, report["rows"])
    report["rows"].append(row)


def keys(report: Report) -> set[tuple[str, str, str, str]]:
    """Return the cases that are in the report."""
    return {key_of(row) for row in report["rows"]}


def errors(report: Report) -> list[str]:
    """Return our failures: wrong results, and cases that could not be measured."""
    found = [
        f"{', '.join(key_of(row))}: {name} is WRONG: {reason}"
        for row in report["rows"]
        for name, reason in row["wrong"].items()
        if is_ours(name, row)
    ]
    failed = [one for one in report["left_out"] if one["failed"]]
    return found + [
        f"{one['suite']}, {one['device']}, {one['dtype']}, {one['case']}: {one['reason']}" for one in failed
    ]
