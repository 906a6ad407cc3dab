"""Rows as text: for a terminal of 80 columns, and as Markdown."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator
from typing import Any

from gpubackprop.bench.case import Row, best_seconds
from gpubackprop.bench.report import Report

WIDTH = 80
NAME = 21
SAME = "no significant difference"
NOTABLE = 0.5  # seconds of making a contestant
UNITS = ((1e-3, "us", 1e6), (1.0, "ms", 1e3), (float("inf"), "s", 1.0))


class Tables:
    """Turns rows into lines as they come: a heading where the suite, the device or the dtype changes, a reason once."""

    def __init__(self) -> None:
        self._last: tuple[str, str, str] | None = None
        self._named: set[tuple[str, ...]] = set()

    def lines(self, row: Row) -> Iterator[str]:
        """Yield the lines of a row."""
        group = row["suite"], row["device"], row["dtype"]
        if group != self._last:
            self._last = group
            yield ""
            yield f"{row['suite']}, {row['device']}, {row['dtype']}".upper()
            if row["suite"] == "kernels":
                yield f"{'~ ' + SAME:45s}{'us':>8s}{'GB/s':>7s}{'of copy':>8s}  plain/ours"
        yield from kernel_line(row) if row["suite"] == "kernels" else block(row)
        for name, reason in row["wrong"].items():
            yield from wrapped(f"  WRONG: {name}: {reason}; it gets no time")
        for name, reason in row["left_out"].items():
            if (row["suite"], row["device"], name, reason) not in self._named:
                self._named.add((row["suite"], row["device"], name, reason))
                yield from wrapped(f"  left out: {name}: {reason}")


def block(row: Row) -> Iterator[str]:
    """Yield a case as one line per contestant."""
    if not row["contestants"]:
        yield row["case"]
        return
    entries: dict[str, Row] = row["contestants"]
    unit, factor = unit_of(best_seconds(entries[row["base"]])["median"])
    on_gpu = any(entry["device_seconds"] for entry in entries.values())
    samples = best_seconds(entries[row["base"]])["n"]
    facts = ", ".join(part for part in (_rate(row), f"n = {samples}") if part)
    yield f"{row['case']:{WIDTH - len(facts) - 2}s}  {facts}"
    over = f"over {row['base']}" if len(entries) > 1 else ""
    head = f"{'device ' + unit:>9s}{'IQR':>7s}{'wall ' + unit:>9s}" if on_gpu else f"{'median ' + unit:>10s}{'IQR':>9s}"
    yield f"{'':{NAME}s}{head}   {over}"
    for name, entry in entries.items():
        yield f" {name:{NAME - 1}.{NAME - 1}s}{_times(entry, factor, on_gpu)}{_ratio(entry['over_base'])}".rstrip()
    yield from wrapped(ledger_line(row, unit, factor))
    for name, starts in row.get("phases", {}).items():
        if name in entries:
            middle = {
                phase: statistics.median(start[phase] for start in starts) for phase in starts[0] if phase != "loss"
            }
            yield from wrapped(f"  {name}: " + ", ".join(f"{phase} {number(s)} s" for phase, s in middle.items()))
    setup = {
        name: entry["setup_seconds"] for name, entry in entries.items() if (entry["setup_seconds"] or 0) >= NOTABLE
    }
    if setup:
        made = ", ".join(f"{name.strip()} {number(seconds)} s" for name, seconds in setup.items())
        yield from wrapped(f"  made and compiled, in no time above: {made}")


def _times(entry: Row, factor: float, on_gpu: bool) -> str:
    wall, device = entry["wall_seconds"], entry["device_seconds"]
    if not on_gpu:
        return f"{number(wall['median'] * factor):>10s}{number((wall['q3'] - wall['q1']) * factor):>9s}"
    if device is None:
        return f"{'-':>9s}{number((wall['q3'] - wall['q1']) * factor):>7s}{number(wall['median'] * factor):>9s}"
    spread = number((device["q3"] - device["q1"]) * factor)
    return f"{number(device['median'] * factor):>9s}{spread:>7s}{number(wall['median'] * factor):>9s}"


def _ratio(found: Row | None) -> str:
    if found is None:
        return ""
    return f"{times(found['median']):>7s} " + (
        f"[{times(found['low'])}, {times(found['high'])}]" if found["significant"] else SAME
    )


def ledger_line(row: Row, unit: str, factor: float) -> str:
    """Return what a step does and how near it comes to the floor, or nothing."""
    ledger = row.get("ledger")
    if ledger is None:
        return ""
    parts = [f"{ledger['launches']} {'launches' if row['device'] != 'cpu' else 'calls'}"]
    if ledger["graph_launches"]:
        parts[0] += f" in {ledger['graph_launches']} graph"
    if ledger["synchronizations"] is not None:
        parts.append(f"{ledger['synchronizations']} waits")
    parts.append(f"{ledger['allocations']:,} {'allocations' if row['device'] != 'cpu' else 'bytes allocated'}")
    parts.append(f"{ledger['bytes'] / 1e6:.3g} MB")
    if "floor_seconds" in row:
        parts.append(f"floor {number(row['floor_seconds'] * factor)} {unit}: {row['share_of_floor']:.0%} of it reached")
    return "  does " + ", ".join(parts)


def kernel_line(row: Row) -> Iterator[str]:
    """Yield a kernel as one line."""
    if not row["contestants"]:
        yield row["case"]
        return
    ours = best_seconds(row["contestants"]["gpubackprop"])["median"]
    plain = next((entry for name, entry in row["contestants"].items() if name.startswith("plain")), None)
    share = f"{row['share_of_copy_bandwidth']:.0%}" if "share_of_copy_bandwidth" in row else "-"
    ratio = "" if plain is None else f"  {times(plain['over_base']['median'])}"
    if plain is not None and not plain["over_base"]["significant"]:
        ratio += " ~"
    yield f"{row['case']:45s}{number(ours * 1e6):>8s}{row['bytes'] / ours / 1e9:7.1f}{share:>8s}{ratio}"


def _rate(row: Row) -> str:
    base = best_seconds(row["contestants"][row["base"]])["median"]
    if row["suite"] in ("transfer", "bandwidth"):
        return f"{row['bytes'] / base / 1e9:.3g} GB/s"
    return f"{row['flops'] / base / 1e9:.3g} GFLOP/s" if row["flops"] else ""


def unit_of(seconds: float) -> tuple[str, float]:
    """Return the unit that suits a time, and how many of it a second has."""
    return next((unit, factor) for limit, unit, factor in UNITS if seconds < limit * 1.0 or limit == float("inf"))


def number(x: float) -> str:
    """Return a number with about four digits."""
    return f"{x:.0f}" if x >= 1000 else f"{x:.1f}" if x >= 100 else f"{x:.2f}" if x >= 10 else f"{x:.3f}"


def times(x: float) -> str:
    """Return a ratio."""
    return f"{x:.0f}x" if x >= 1000 else f"{x:.1f}x" if x >= 100 else f"{x:.2f}x"


def wrapped(text: str) -> list[str]:
    """Return a text in lines of at most 80 columns."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", drop_whitespace=True) if text else []


def heading(report: Report) -> list[str]:
    """Return what a report was measured on."""
    e = report["environment"]
    lines = [f"{e['host']}: {e['cpu']['name']}, {e['cpu']['threads']} of {e['cpu']['processors']} processors"]
    lines += [
        f"{g['device']}: {g['name']}, driver for CUDA {g['cuda_driver']}, cuBLAS {g['cublas']}" for g in e["gpus"]
    ]
    lines.append(f"gpubackprop {e['packages']['gpubackprop']}, commit {(e['commit'] or '?')[:12]}, {report['date']}")
    if report["settings"]["dry"]:
        lines.append("dry run: these times mean nothing")
    return [line for text in lines for line in wrapped(text)]


def markdown(report: Report) -> str:
    """Return the steps as Markdown tables: times over that of one call per step; ``~`` where they do not differ for sure."""
    rows = [row for row in report["rows"] if row["suite"] == "step" and "gpubackprop" in row["contestants"]]
    tables = []
    for device, dtype in dict.fromkeys((row["device"], row["dtype"]) for row in rows):
        chosen = [row for row in rows if (row["device"], row["dtype"]) == (device, dtype)]
        names = list(dict.fromkeys(n for row in chosen for n in row["contestants"] if not n.startswith(" ")))
        names.remove("gpubackprop")
        lines = [f"| step, {device}, {dtype} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        lines += [f"| {row['case']} | {' | '.join(_cell(row, name) for name in names)} |" for row in chosen]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _cell(row: Row, name: str) -> str:
    entry: Any = row["contestants"].get(name)
    if entry is None:
        return "-"
    found = entry["over_base"]
    return times(found["median"]) if found["significant"] else f"{times(found['median'])} ~"
