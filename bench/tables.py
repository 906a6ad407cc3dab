"""A report as tables, from one list of columns. :mod:`gpubackprop.bench.render` writes them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from gpubackprop.bench.busy import BESIDE
from gpubackprop.bench.case import AGAIN, Row, best_seconds, is_ours
from gpubackprop.bench.report import Report
from gpubackprop.bench.sizes import SUITES
from gpubackprop.bench.timing import AMBIGUOUS, FASTER, SAME, SLOWER

MARKS = {SAME: " ~", AMBIGUOUS: " ?"}
LEGEND = "~: SAME, no more than noise; ?: AMBIGUOUS, the interval holds both a difference and none"
UNITS = ((1e-3, "us", 1e6), (1.0, "ms", 1e3), (float("inf"), "s", 1.0))
TIME = "time"  # the unit of a column is the one that suits the case
KERNELS = ("kernels",)  # suites with one line per case, not per candidate
OTHERS = tuple(suite for suite in SUITES if suite not in KERNELS)
PIVOTS = {"step": "gpubackprop", "products": "plain products"}
"""Suites shown in Markdown, one line per case, and the baseline of each."""


class Line(NamedTuple):
    """A line of a table: a candidate of a row, its times per second, and the entry whose ratio is shown."""

    label: str
    row: Row
    entry: Row
    factor: float
    compared: Row


@dataclass(frozen=True)
class Column:
    """A column: its heading, and its text for an item.

    Parameters
    ----------
    text : callable
        Returns the cell of an item, "" for an empty one; a column of empty cells is not shown.
    suites : sequence of str
        Those whose tables have the column.
    only_page : sequence of str
        Those where it does not fit into the 80 columns of a terminal.
    width : int
        The least width on a terminal.
    """

    name: str
    text: Callable[[Any], str]
    unit: str = ""
    suites: Sequence[str] = SUITES
    only_page: Sequence[str] = ()
    width: int = 5


@dataclass
class Table:
    """Cells with their headings; facts beside the title; what is wrong; notes below; ``words`` if cells are not numbers."""

    columns: list[Column]
    cells: list[list[str]]
    suite: str = ""
    title: str = ""
    facts: str = ""
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    words: bool = False


def _middle(clock: str) -> Callable[[Line], str]:
    return lambda line: number(line.entry[clock]["median"] * line.factor) if line.entry[clock] else ""


def _spread(clock: str) -> Callable[[Line], str]:
    def text(line: Line) -> str:
        found = line.entry[clock]
        return number((found["q3"] - found["q1"]) * line.factor) if found else ""

    return text


def _ratio(line: Line) -> str:
    found = line.compared["over_base"]
    return ratio(found) if found else "base" if len(line.row["candidates"]) > 1 else ""


def _interval(line: Line) -> str:
    found = line.compared["over_base"]
    return interval_text(found["low"], found["high"]) if found else ""


def _rate(line: Line) -> str:
    return number(line.row["bytes"] / best_seconds(line.entry)["median"] / 1e9)


def _verdict(line: Line) -> str:
    found = line.compared["over_base"]
    return found["verdict"] if found else ""


def _share(line: Line) -> str:
    share = line.row.get("share_of_memory")
    return f"in {line.row['level']}" if share is None else f"{share:.0%}"


def _setup(line: Line) -> str:
    seconds = line.entry["setup_seconds"]
    return "" if seconds is None else f"{seconds:.2f}"


COLUMNS = (
    Column("", lambda line: line.label, suites=KERNELS, width=45),
    Column("", lambda line: line.label, suites=OTHERS, width=20),
    Column("device", _middle("device_seconds"), TIME),
    Column("IQR", _spread("device_seconds"), TIME, only_page=KERNELS),
    Column("wall", _middle("wall_seconds"), TIME),
    Column("IQR", _spread("wall_seconds"), TIME, only_page=KERNELS),
    Column("rate", _rate, "GB/s", KERNELS),
    Column("share", _share, "memory", KERNELS),
    Column("plain", _ratio, "over ours", KERNELS, width=9),
    Column("ratio", _ratio, suites=OTHERS, width=8),
    Column("95 %", _interval, width=14, only_page=KERNELS),
    Column("verdict", _verdict, suites=OTHERS, only_page=SUITES),
    Column("made", _setup, "s", only_page=KERNELS),
)


def table(columns: Iterable[Column], items: Iterable[Any], suite: str = "", unit: str = "", **more: Any) -> Table:
    """Return the table of the items, without the columns of other suites and empty ones.

    ``unit`` is that of columns of time.
    """
    items = list(items)
    columns = [replace(c, unit=unit) if c.unit == TIME else c for c in columns if not suite or suite in c.suites]
    found = [(column, [column.text(item) for item in items]) for column in columns]
    shown = [(column, cells) for column, cells in found if any(cells)]
    lines = map(list, zip(*(cells for _, cells in shown), strict=True))
    return Table([column for column, _ in shown], list(lines), suite, **more)


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Return the rows by suite, device and dtype."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["suite"], row["device"], row["dtype"]), []).append(row)
    return found


def tables(rows: list[Row]) -> Iterator[Table]:
    """Yield the tables of rows of one group: one for all kernels, one or two for each other case."""
    if rows[0]["suite"] in KERNELS:
        wrong = [f"{row['case']}: {text}" for row in rows for text in _wrong(row)]
        yield table(COLUMNS, [_kernel(row) for row in rows if row["candidates"]], "kernels", "us", wrong=wrong)
        return
    for row in rows:
        entries, wrong = row["candidates"], _wrong(row)
        if not entries:
            yield Table([], [], title=row["case"], wrong=wrong)
            continue
        base = best_seconds(entries[row["base"]])
        unit, factor = unit_of(base["median"])
        facts = ", ".join([*_speed(row, base["median"]), f"n = {base['n']}"])
        lines = [Line(name, row, entry, factor, entry) for name, entry in entries.items()]
        notes = [*_noise(row), *_ledger(row, unit, factor), *_memory(row)]
        yield table(COLUMNS, lines, row["suite"], unit, title=row["case"], facts=facts, wrong=wrong, notes=notes)
        starts = {name: found for name, found in row.get("phases", {}).items() if name in entries}
        if starts:
            phases = [phase for phase in next(iter(starts.values()))[0] if phase != "loss"]
            yield table([Column("", lambda item: item[0], width=20), *map(_phase, phases)], starts.items())


def _kernel(row: Row) -> Line:
    ours = row["candidates"]["gpubackprop"]
    plain = [entry for name, entry in row["candidates"].items() if name.startswith("plain")]
    return Line(row["case"], row, ours, 1e6, [*plain, {"over_base": None}][0])


def _phase(phase: str) -> Column:
    def text(item: Any) -> str:
        return f"{statistics.median(start[phase] for start in item[1]):.3f}"

    return Column(phase, text, "s")


def _wrong(row: Row) -> list[str]:
    return [f"WRONG: {name}: {reason}; it is not timed" for name, reason in row["wrong"].items()]


def _noise(row: Row) -> Iterator[str]:
    """Yield what ratios mean that are not over the base, and what is noise."""
    if any(entry["against"] for entry in row["candidates"].values()):
        yield "Beside a busy program on one core: times over those alone."
    if row["base"] + AGAIN in row["candidates"]:
        yield f"{row['instances']} processes; {row['base']} against itself differs by up to {row['noise_floor'] - 1:.1%}: noise."


def _speed(row: Row, seconds: float) -> Iterator[str]:
    if row["suite"] in ("transfer", "bandwidth"):
        yield f"{row['bytes'] / seconds / 1e9:.3g} GB/s"
        if "level" in row:
            yield f"in {row['level']}"
    elif row["flops"]:
        yield f"{row['flops'] / seconds / 1e9:.3g} GFLOP/s"


def _ledger(row: Row, unit: str, factor: float) -> Iterator[str]:
    """Yield what a step does and how close it comes to the floor."""
    ledger, on_gpu = row.get("ledger"), row["device"] != "cpu"
    if ledger is None:
        return
    parts = [f"{ledger['flops']:,} FLOP", f"{ledger['bytes']:,} bytes"]
    parts.append(f"{ledger['launches']} {'launches' if on_gpu else 'calls of kernels and products'}")
    if ledger["graph_launches"]:
        parts.append(f"in {ledger['graph_launches']} graph, up to {ledger['steps_per_graph']} steps to a launch")
    if ledger["synchronizations"] is not None:
        parts.append(f"{ledger['synchronizations']} synchronizations")
    parts.append(f"{ledger['allocations']:,} {'allocations' if on_gpu else 'bytes allocated, by Python for the call'}")
    if "floor_seconds" in row:
        floor = f"{number(row['floor_seconds'] * factor)} {unit}"
        parts.append(f"floor of this machine {floor}: {row['share_of_floor']:.0%} of its speed reached")
    yield "A step does: " + ", ".join(parts) + "."


def _memory(row: Row) -> Iterator[str]:
    found = row.get("memory")
    if found:
        needed, grown = (
            sum(found[0]["needed_bytes"].values()),
            statistics.median(one["resident_bytes"] for one in found),
        )
        what = ", ".join(found[0]["needed_bytes"])
        yield f"The resident set grows by {grown / needed:.2f} of the {needed / 1e6:.1f} MB of {what}."


def pivots(report: Report) -> Iterator[Table]:
    """Yield a table per suite, device and dtype with a line per case: times over those of the base."""
    for (suite, device, dtype), rows in groups(report["rows"]).items():
        heading = f"{suite}, {device}, {dtype}"
        if suite == "fit":
            yield fits(rows)
        if suite == "sklearn":
            yield estimators(rows)
        chosen = [row for row in rows if suite in PIVOTS and row["base"] == PIVOTS[suite]]
        names = dict.fromkeys(name for row in chosen for name in row["candidates"] if not name.startswith(" "))
        names.pop(PIVOTS.get(suite), None)
        if chosen:
            columns = [Column(heading, lambda row: row["case"]), *(_pivoted(name, name) for name in names)]
            yield table(columns, chosen)


def _pivoted(heading: str, name: str, unit: str = "") -> Column:
    def text(row: Row) -> str:
        entry = row["candidates"].get(name)
        return "-" if entry is None or entry["over_base"] is None else ratio(entry["over_base"])

    return Column(heading, text, unit)


def estimators(rows: list[Row]) -> Table:
    """Return a table with a line per network: scikit-learn's time over ours of each call."""
    by_size: dict[str, dict[str, Row]] = {}
    for row in rows:
        network = _network(row)
        by_size.setdefault(network, {})[row["case"].partition(f" {network}")[0]] = row

    def of_call(call: str) -> Column:
        ratios = _pivoted(call, "sklearn")
        return replace(ratios, text=lambda item: ratios.text(item[1][call]) if call in item[1] else "-")

    calls = dict.fromkeys(call for of_size in by_size.values() for call in of_size)
    columns = [Column(f"sklearn, {rows[0]['device']}, {rows[0]['dtype']}", lambda item: item[0]), *map(of_call, calls)]
    return table(columns, by_size.items())


def _network(row: Row) -> str:
    return f"{'-'.join(map(str, row['size']['layers']))}, batch {row['size']['batch']}"


def fits(rows: list[Row]) -> Table:
    """Return a table with a line per network: JAX's time over ours of each kind of fit, and times beside a busy program."""
    by_size: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        by_size.setdefault(_network(row), {})[row["size"]["cores"], row["size"]["length"]] = row
    kinds = dict.fromkeys(kind for of_size in by_size.values() for kind in of_size)
    columns = [
        Column(f"fit, {rows[0]['device']}, {rows[0]['dtype']}", lambda item: item[0]),
        *(_of_fit(_pivoted(cores, "jax", length), (cores, length)) for cores, length in kinds),
        *(_of_fit(_pivoted(name, of + BESIDE, "busy"), None) for name, of in (("ours", "gpubackprop"), ("jax", "jax"))),
    ]
    notes = [
        "Time of JAX's best loop over that of fit (more than 1: fit is faster), short and long fits; busy: the time beside a busy "
        "program on one core over that alone, all cores, short fits."
    ]
    return table(columns, by_size.items(), notes=notes)


def _of_fit(column: Column, kind: tuple[str, str] | None) -> Column:
    """Return a column of one kind of fit, or of the one beside a busy program."""

    def text(item: tuple[str, dict[tuple[str, str], Row]]) -> str:
        rows = item[1]
        busy = (row for row in rows.values() if any(name.endswith(BESIDE) for name in row["candidates"]))
        row = next(busy, None) if kind is None else rows.get(kind)
        if row is None:
            return "" if kind is None else "-"
        return column.text(row)

    return replace(column, text=text)


def result(report: Report) -> str:
    """Return in one sentence how we compare with the fastest other library of each case."""
    found = [entry["over_base"] for row in report["rows"] if (entry := _fastest_other(row)) is not None]
    if not found:
        return "No other library took part: these are times of gpubackprop and of this machine."
    counts = {name: sum(one["verdict"] == name for one in found) for name in (SLOWER, SAME, FASTER, AMBIGUOUS)}
    words = ("faster than it", counts[SLOWER]), ("as fast", counts[SAME]), ("slower", counts[FASTER])
    parts = [f"{word} in {count}" for word, count in (*words, ("undecided", counts[AMBIGUOUS])) if count]
    medians = [one["median"] for one in found]
    return (
        f"The fastest other library takes {times(min(medians))[:-1]} to {times(max(medians))[:-1]} times as long as gpubackprop, "
        f"which is {', '.join(parts)} of {len(found)} cases."
    )


def _fastest_other(row: Row) -> Row | None:
    """Return the entry of the fastest other library in a row whose base is ours, if there is one."""
    if row["base"] != "gpubackprop" or row["suite"] in (*KERNELS, "gemm", "transfer", "bandwidth"):
        return None
    others = [
        entry
        for name, entry in row["candidates"].items()
        if not (is_ours(name, row) or name.startswith((" ", "products")) or entry["against"])
    ]
    return min(others, key=lambda entry: float(entry["over_base"]["median"]), default=None)


def left_out(report: Report) -> Table:
    """Return the candidates and cases without a time, and why."""
    found = {(o["suite"], o["case"] or "all", f"{o['device']} {o['dtype']}", o["reason"]) for o in report["left_out"]}
    for row in report["rows"]:
        found |= {(row["suite"], name, row["device"], reason) for name, reason in row["left_out"].items()}
    names = ("suite", "who or what", "device", "reason")
    columns = [Column(name, lambda item, i=i: str(item[i])) for i, name in enumerate(names)]  # type: ignore[misc]
    return table(columns, sorted(found), words=True)


def conditions(report: Report) -> Table:
    """Return the environment of the numbers."""
    e = report["environment"]
    facts = {**{f"cpu, {k}": v for k, v in e["cpu"].items()}, "python": e["python"], "platform": e["platform"]}
    for gpu in e["gpus"]:
        facts.update({f"{gpu['device']}, {name}": value for name, value in gpu.items()})
    for i, library in enumerate(e["blas"], 1):
        facts[f"library {i}"] = ", ".join(f"{k} {v}" for k, v in library.items() if v is not None)
    facts["TF32"] = ", ".join(f"{name}: {value}" for name, value in e["tf32"].items())
    facts["packages"] = ", ".join(f"{name} {number}" for name, number in e["packages"].items() if number)

    def value(item: tuple[str, Any]) -> str:
        return ", ".join(f"{k} {v}" for k, v in item[1].items()) if isinstance(item[1], dict) else str(item[1])

    given = [item for item in facts.items() if item[1] is not None]
    return table([Column("", lambda item: item[0]), Column("", value)], given, words=True)


def heading(report: Report) -> list[str]:
    """Return what a report was measured on."""
    e = report["environment"]
    lines = [f"{e['host']}: {e['cpu']['name']}, {e['cpu']['threads']} of {e['cpu']['processors']} processors"]
    lines += [
        f"{g['device']}: {g['name']}, driver for CUDA {g['cuda_driver']}, cuBLAS {g['cublas']}" for g in e["gpus"]
    ]
    lines.append(f"gpubackprop {e['packages']['gpubackprop']}, commit {(e['commit'] or '?')[:12]}, {report['date']}")
    if e["cpu"].get("pinned_to") is not None:
        lines[0] += f", pinned to number {', '.join(map(str, e['cpu']['pinned_to']))}"
    lines += [LEGEND, "IQR: interquartile range; n: samples of each time"]
    return lines


def warnings(report: Report) -> list[str]:
    """Return the warnings about the numbers."""
    dry = ["A dry run: these times mean nothing."] if report["settings"]["dry"] else []
    return dry + (["The run was interrupted: cases are missing."] if report["interrupted"] else [])


def unit_of(seconds: float) -> tuple[str, float]:
    """Return the unit that suits a time, and how many of it are in a second."""
    return next((unit, factor) for limit, unit, factor in UNITS if seconds < limit)


def number(x: float) -> str:
    """Return a number with about four digits."""
    return f"{x:.0f}" if x >= 1000 else f"{x:.1f}" if x >= 100 else f"{x:.2f}" if x >= 10 else f"{x:.3f}"


def times(x: float) -> str:
    """Return a ratio."""
    return f"{x:.0f}x" if x >= 1000 else f"{x:.1f}x" if x >= 100 else f"{x:.2f}x"


def ratio(found: Row) -> str:
    """Return a measured ratio, with a mark where it is no difference, or may be none."""
    return times(found["median"]) + MARKS.get(found["verdict"], "")


def interval_text(low: float, high: float) -> str:
    """Return the interval of a ratio."""
    return f"{times(low)[:-1]} to {times(high)[:-1]}"
