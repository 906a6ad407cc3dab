"""A report in words and tables, for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpubackprop.bench import report as reports
from gpubackprop.bench.case import Row
from gpubackprop.bench.render import Terminal, lines_of
from gpubackprop.bench.tables import heading, warnings

Stages = list[dict[str, Any]]


def summary_of(folder: Path, facts: dict[str, Any], stages: Stages) -> str:
    """Return the summary of a report's folder so far."""
    parts = [
        _head(facts, stages),
        _doctor(folder),
        _check(_rows(folder / "check.jsonl")),
        _capture(_rows(folder / "capture.jsonl")),
        *(_timeline(row) for row in _rows(folder / "timeline.jsonl") if "operations" in row),
        *(_bench(folder / f"bench-{suite}") for suite in ("step", "kernels", "epoch")),
    ]
    return "\n\n".join("\n".join(lines) for lines in map(list, parts) if lines) + "\n"


def _head(facts: dict[str, Any], stages: Stages) -> Iterator[str]:
    yield f"gpubackprop {facts['gpubackprop']}, commit {(facts['commit'] or '?')[:12]}, {facts['date']}"
    yield f"device {facts['device']}, at most {facts['minutes']:g} minutes"
    if facts["quick"]:
        yield "A quick run: its times mean nothing."
    for one in stages:
        reason = f"  {one['reason']}" if one["reason"] else ""
        yield f"  {one['stage']:9s} {one['state']:8s} {one['seconds']:5.0f} s{reason}"


def _doctor(folder: Path) -> Iterator[str]:
    try:
        findings = json.loads((folder / "doctor.json").read_text(encoding="utf-8"))["findings"]
    except (OSError, ValueError, KeyError):
        return
    yield "DOCTOR"
    for found in findings:
        yield f"  {found['state']:8s} {found['name']}: {'; '.join(part for part in (found['text'], found['advice']) if part)}"
        if found["command"]:
            yield f"{'':11s}run: {found['command']}"


def _rows(file: Path) -> list[Row]:
    """Return the rows of a stage; the last may have been cut."""
    rows = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def _wrong(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if not row["ok"]:
            facts = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("case", "ok"))
            yield f"  WRONG: {row['case']}: {facts}"


def _check(rows: list[Row]) -> Iterator[str]:
    if rows:
        yield f"CHECK: {sum(row['ok'] for row in rows)} of {len(rows)} networks agree with finite differences and the reference"
        if measured := [row for row in rows if "ulps" in row]:
            worst = max(measured, key=lambda row: row["ulps"] / row["bound"])
            yield f"  the worst: {worst['case']}: {worst['array']} is {worst['ulps']:.1f} ulps off, of {worst['bound']:.0f} allowed"
        yield from _wrong(rows)


def _capture(rows: list[Row]) -> Iterator[str]:
    if rows:
        same = sum(row["ok"] for row in rows)
        yield f"CAPTURE: {same} of {len(rows)} times the same bits, compiled or one operation at a time, on any stream and thread"
        yield from _wrong(rows)


def _timeline(row: Row) -> Iterator[str]:
    step, eager = (f"{row[name]['median'] * 1e6:.2f} us" for name in ("step", "eager"))
    operations = [(one, one["seconds"]["median"]) for one in row["operations"]]
    total = sum(seconds for _, seconds in operations)
    yield f"TIMELINE: {row['case']}, adam, by the clock of the {'device' if row['clock'] == 'device' else 'wall'}"
    yield f"  a step {step}; one operation at a time {eager}; each alone, its arrays in the cache, {total * 1e6:.2f} us together"
    yield f"  {'us':>9s} {'share':>6s} {'GFLOP/s':>9s} {'GB/s':>8s}"
    for one, seconds in operations:
        rates = f"{one['flops'] / seconds / 1e9:9.1f} {one['bytes'] / seconds / 1e9:8.1f}"
        yield f"  {seconds * 1e6:9.2f} {seconds / total:6.1%} {rates}  {one['equation']}"


def _bench(folder: Path) -> Iterator[str]:
    try:
        found = reports.read_report(folder)
    except (OSError, ValueError):  # it has not started
        return
    yield f"BENCH {folder.name.removeprefix('bench-').upper()}"
    yield from lines_of(*heading(found)[1:], *warnings(found))
    terminal = Terminal()
    for row in found["rows"]:
        yield from terminal.lines(row)
    for one in found["left_out"]:
        yield f"left out: {one['suite']}, {one['case'] or one['dtype']}: {one['reason']}"
