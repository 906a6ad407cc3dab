"""Two reports side by side: what changed beyond noise.

Two runs also differ by the load of the machine. So a time counts as changed only if it changed both by the clock and relative to
each of the others in its row, which were timed in the same rounds and show the load. The test is that of Mann and
Whitney (1947) on the samples, at 5 % over all times together (Holm (1979)); a change smaller than the threshold is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubackprop.bench.case import Row, is_ours, key_of
from gpubackprop.bench.render import lines_of
from gpubackprop.bench.report import Report, keys
from gpubackprop.bench.tables import Column, interval_text, number, table, times, unit_of
from gpubackprop.bench.timing import FASTER, RESAMPLES, SAME, SLOWER

LEVEL = 0.05

Key = tuple[str, str, str, str]


@dataclass
class Change:
    """How a time of ours changed from one report to another.

    Parameters
    ----------
    ratio, low, high : float
        The later median over the earlier one by the clock, and its 95 % interval.
    against : list of float
        The same ratio of the time over that of each of the others in its row.
    p : float
        The largest p-value of all these comparisons.
    """

    key: Key
    name: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    against: list[float]
    p: float
    verdict: str = SAME


def _time(of: str) -> Any:
    def text(change: Change) -> str:
        unit, factor = unit_of(change.before)
        return f"{number(getattr(change, of) * factor)} {unit}"

    return text


COLUMNS = (
    Column("", lambda change: change.name, width=20),
    Column("before", _time("before"), width=9),
    Column("after", _time("after"), width=9),
    Column("ratio", lambda change: times(change.ratio), width=8),
    Column("95 %", lambda change: interval_text(change.low, change.high), width=14),
    Column("", lambda change: change.verdict, width=6),
)


def compare_reports(reports: list[Report], threshold: float) -> tuple[list[str], int]:
    """Return lines that compare each report with the first, and how many times became slower in any."""
    lines: list[str] = []
    regressions = 0
    for report in reports[1:]:
        found = changes(reports[0], report, threshold)
        slower = sum(change.verdict == SLOWER for change in found)
        faster = sum(change.verdict == FASTER for change in found)
        regressions += slower
        lines += _environments(reports[0], report)
        by_case: dict[Key, list[Change]] = {}
        for change in found:
            by_case.setdefault(change.key, []).append(change)
        lines += lines_of(*(table(COLUMNS, some, title=", ".join(key)) for key, some in by_case.items()))
        lines.append(f"{slower} slower, {faster} faster, {len(found) - slower - faster} with no significant difference")
        missing = len(keys(reports[0]) ^ keys(report))
        if missing:
            lines.append(f"{missing} cases are in only one of the reports")
        lines.append("")
    return lines[:-1], regressions


def changes(before: Report, after: Report, threshold: float) -> list[Change]:
    """Return how the times of ours changed that both reports have."""
    earlier = {key_of(row): row for row in before["rows"]}
    found = [
        _change(key_of(row), name, earlier[key_of(row)], row)
        for row in after["rows"]
        if key_of(row) in earlier
        for name in row["candidates"]
        if is_ours(name, row) and name in earlier[key_of(row)]["candidates"]
    ]
    by_p = sorted(found, key=lambda change: change.p)
    for rank, change in enumerate(by_p):
        if change.p > LEVEL / (len(by_p) - rank):
            break
        if min(change.ratio, *change.against) > 1 + threshold:
            change.verdict = SLOWER
        elif max(change.ratio, *change.against) < 1 / (1 + threshold):
            change.verdict = FASTER
    return found


def _change(key: Key, name: str, before: Row, after: Row) -> Change:
    a, b = _samples(before, after, name)
    low, high = _interval(b, a)
    others = [_samples(before, after, other) for other in _others(before, after)]
    relative = [(a / x, b / y) for x, y in others]
    return Change(
        key,
        name,
        before=float(np.median(a)),
        after=float(np.median(b)),
        ratio=float(_ratio_of_medians(b, a)),
        low=low,
        high=high,
        against=[float(_ratio_of_medians(y, x)) for x, y in relative],
        p=max(_chance(x, y) for x, y in [(a, b), *relative]),
    )


def _chance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the probability that two samples of one distribution differ as much."""
    from scipy.stats import mannwhitneyu

    if min(len(x), len(y)) < 2 or np.ptp([*x, *y]) == 0:
        return 1.0
    return float(mannwhitneyu(x, y).pvalue)


def _interval(b: np.ndarray, a: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the ratio of medians (percentile method, Efron (1979))."""
    from scipy.stats import bootstrap

    if min(len(b), len(a)) < 2:
        only = float(_ratio_of_medians(b, a))
        return only, only
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"n_resamples": RESAMPLES, "method": "percentile", "rng": rng, "vectorized": True}
    found = bootstrap((b, a), _ratio_of_medians, **options).confidence_interval
    return float(found.low), float(found.high)


def _ratio_of_medians(b: Any, a: Any, axis: int = -1) -> Any:
    return np.median(b, axis=axis) / np.median(a, axis=axis)


def _samples(before: Row, after: Row, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples of a candidate in both rows, by the device's clock where both have it."""
    entries = before["candidates"][name], after["candidates"][name]
    clock = "device_seconds" if all(entry["device_seconds"] for entry in entries) else "wall_seconds"
    first, second = (np.maximum(entry[clock]["samples"], 1e-12) for entry in entries)
    return first, second


def _others(before: Row, after: Row) -> list[str]:
    """Return the candidates in both rows that are not ours; products and parts of a step count as ours."""
    names = [name for name in before["candidates"] if name in after["candidates"] and not is_ours(name, before)]
    return [name for name in names if not name.startswith((" ", "products"))]


def _environments(before: Report, after: Report) -> Iterator[str]:
    """Yield the environments of the two reports and their differences."""
    for label, report in (("a", before), ("b", after)):
        e = report["environment"]
        gpus = "".join(f", {gpu['name']}" for gpu in e["gpus"])
        yield f"{label}: {e['host']}, {e['cpu']['name']}, {e['cpu']['threads']} threads{gpus}"
        yield f"   {report['date']}, commit {(e['commit'] or '?')[:12]}"
    old, new = (report["environment"]["packages"] for report in (before, after))
    for name in new:
        if old.get(name) != new[name]:
            yield f"   {name}: {old.get(name)} in a, {new[name]} in b"
