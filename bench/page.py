"""The report as one page without anything outside of it: plots and tables, on a screen and on paper."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterator
from pathlib import Path

from gpubackprop.bench import plots
from gpubackprop.bench.case import Row, best_seconds
from gpubackprop.bench.report import Report
from gpubackprop.bench.text import SAME, number, times, unit_of
from gpubackprop.machine.files import write_whole

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2733; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; } .small { color: #5b6b7b; font-size: .88em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; width: 100%; }
td, th { padding: .15rem .6rem .15rem 0; text-align: right; border-bottom: 1px solid #e4e9ee; vertical-align: top; }
td:first-child, th:first-child, .text { text-align: left; }
td:first-child { width: 34%; } th { color: #5b6b7b; font-weight: 600; }
.wrong { color: #b3261e; font-weight: 600; } .ours { font-weight: 600; } .warning { background: #fff3cd; padding: .5rem .8rem; }
figure { margin: .6rem 0; } figure svg { max-width: 100%; height: auto; }
.case { break-inside: avoid; page-break-inside: avoid; }
@media print {
  body { font-size: 10pt; margin: 0; max-width: none; } h2 { break-after: avoid; } h3 { break-after: avoid; }
  figure { break-inside: avoid; } table { font-size: 8pt; } @page { size: A4; margin: 15mm; }
}
"""

TITLES = {
    "transfer": "Copies between host and device", "bandwidth": "Copies on the device", "gemm": "Matrix products",
    "kernels": "Fused kernels", "step": "One training step", "epoch": "One epoch, from data to trained weights",
    "latency": "Small mini-batches", "coldstart": "From the start of a process to the first step",
    "crossover": "Where a GPU overtakes the CPU",
}  # fmt: skip


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    write_whole(path, "\n".join(_page(report)).encode())


def _page(report: Report) -> Iterator[str]:
    e = report["environment"]
    devices = ", ".join([e["cpu"]["name"], *(gpu["name"] for gpu in e["gpus"])])
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>gpubackprop bench: {_text(devices)}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>gpubackprop bench</h1><p>{_text(devices)}</p>"
    yield (
        f"<p class='small'>{_text(e['host'])}, {_text(report['date'])}, {e['cpu']['threads']} of {e['cpu']['processors']} "
        f"processors, gpubackprop {_text(e['packages']['gpubackprop'])}, commit {_text((e['commit'] or 'unknown')[:12])}<br>"
        f"<code>gpubackprop {_text(' '.join(report['command']))}</code></p>"
    )
    if report["settings"]["dry"]:
        yield "<p class='warning'>A dry run: these times mean nothing.</p>"
    if report["interrupted"]:
        yield "<p class='warning'>The run was interrupted: cases are missing.</p>"
    yield (
        "<p>Contestants are timed in turn, round by round, so that a slow moment falls on all of them. Times are medians with "
        "their interquartile range (IQR); ratios are medians over rounds with a 95&nbsp;% bootstrap interval. Results are "
        "checked against the reference before they are timed. Compilation and transfers are in no time but those of their "
        "own suites.</p>"
    )
    for title, figure in plots.figures(report):
        yield f"<div class='case'><h2>{_text(title)}</h2><figure>{plots.svg(figure)}</figure></div>"
    for suite in dict.fromkeys(row["suite"] for row in report["rows"]):
        yield f"<h2>{TITLES[suite]}</h2>"
        rows = [row for row in report["rows"] if row["suite"] == suite]
        yield from _kernels(rows) if suite == "kernels" else (part for row in rows for part in _case(row))
    yield from _left_out(report)
    yield from _environment(report)
    yield "</body></html>"


def _case(row: Row) -> Iterator[str]:
    yield f"<div class='case'><h3>{_text(row['case'])} <span class='small'>{row['device']}, {row['dtype']}</span></h3><table>"
    entries = row["contestants"]
    if entries:
        unit, factor = unit_of(best_seconds(entries[row["base"]])["median"])
        on_gpu = any(entry["device_seconds"] for entry in entries.values())
        made = any(entry["setup_seconds"] is not None for entry in entries.values())
        clocks = [("device", "device_seconds"), ("wall", "wall_seconds")] if on_gpu else [("time", "wall_seconds")]
        yield "<tr><th></th>" + "".join(f"<th>{label}, {unit}</th><th>IQR</th>" for label, _ in clocks)
        yield f"<th>n</th><th>over {_text(row['base'])}</th><th>95&nbsp;%</th>{'<th>made in, s</th>' if made else ''}</tr>"
        for name, entry in entries.items():
            cells = "".join(_time(entry[clock], factor) for _, clock in clocks)
            ours = " class='ours'" if name.startswith("gpubackprop") else ""
            cells += f"<td>{best_seconds(entry)['n']}</td>{_ratio(entry)}{_setup(entry, made)}"
            yield f"<tr><td{ours}>{_text(name)}</td>{cells}</tr>"
    for name, reason in row["wrong"].items():
        yield f"<tr><td>{_text(name)}</td><td class='wrong text' colspan='8'>wrong: {_text(reason)}</td></tr>"
    yield "</table>"
    if "ledger" in row:
        yield f"<p class='small'>{_ledger(row)}</p>"
    if "phases" in row:
        yield from _phases(row)
    yield "</div>"


def _phases(row: Row) -> Iterator[str]:
    starts = {name: found for name, found in row["phases"].items() if name in row["contestants"]}
    names = [phase for phase in next(iter(starts.values()), [{}])[0] if phase != "loss"]
    yield "<table><tr><th></th>" + "".join(f"<th>{_text(phase)}, s</th>" for phase in names) + "</tr>"
    for name, found in starts.items():
        cells = "".join(f"<td>{statistics.median(start[phase] for start in found):.3f}</td>" for phase in names)
        yield f"<tr><td>{_text(name)}</td>{cells}</tr>"
    yield "</table>"


def _time(found: Row | None, factor: float) -> str:
    if found is None:
        return "<td>-</td><td></td>"
    return f"<td>{number(found['median'] * factor)}</td><td>{number((found['q3'] - found['q1']) * factor)}</td>"


def _ratio(entry: Row) -> str:
    found = entry["over_base"]
    if found is None:
        return "<td></td><td></td>"
    note = "" if found["significant"] else f" <span class='small'>({SAME})</span>"
    return f"<td>{times(found['median'])}</td><td>{times(found['low'])} to {times(found['high'])}{note}</td>"


def _setup(entry: Row, made: bool) -> str:
    if not made:
        return ""
    seconds = entry["setup_seconds"]
    return "<td></td>" if seconds is None else f"<td>{seconds:.2f}</td>"


def _ledger(row: Row) -> str:
    ledger = row["ledger"]
    unit, factor = (
        unit_of(best_seconds(row["contestants"][row["base"]])["median"]) if row["contestants"] else ("s", 1.0)
    )
    on_gpu = row["device"] != "cpu"
    parts = [f"{ledger['flops']:,} FLOP", f"{ledger['bytes']:,} bytes"]
    parts.append(f"{ledger['launches']} {'launches' if on_gpu else 'calls of kernels and products'}")
    if ledger["graph_launches"]:
        parts.append(f"in {ledger['graph_launches']} graph, up to {ledger['steps_per_graph']} steps to a launch")
    if ledger["synchronizations"] is not None:
        parts.append(f"{ledger['synchronizations']} synchronizations")
    parts.append(f"{ledger['allocations']:,} {'allocations' if on_gpu else 'bytes allocated, by Python for the call'}")
    if "floor_seconds" in row:
        floor = number(row["floor_seconds"] * factor)
        parts.append(f"floor of this machine {floor} {unit}: {row['share_of_floor']:.0%} of its speed reached")
    return "A step does: " + ", ".join(parts) + "."


def _kernels(rows: list[Row]) -> Iterator[str]:
    yield "<p class='small'>Arrays come from memory, not from the cache. Share: of the bandwidth of a large copy.</p><table>"
    yield "<tr><th></th><th>us</th><th>IQR</th><th>GB/s</th><th>share</th><th>plain, over ours</th><th>95&nbsp;%</th></tr>"
    for row in rows:
        label = f"{_text(row['case'])} <span class='small'>{row['device']}, {row['dtype']}</span>"
        if not row["contestants"]:
            wrong = "; ".join(f"{name}: {reason}" for name, reason in row["wrong"].items())
            yield f"<tr><td>{label}</td><td class='wrong text' colspan='6'>wrong: {_text(wrong)}</td></tr>"
            continue
        found = best_seconds(row["contestants"]["gpubackprop"])
        plain = next((entry for name, entry in row["contestants"].items() if name.startswith("plain")), None)
        share = f"{row['share_of_copy_bandwidth']:.0%}" if "share_of_copy_bandwidth" in row else ""
        yield (
            f"<tr><td>{label}</td>{_time(found, 1e6)}<td>{row['bytes'] / found['median'] / 1e9:.1f}</td><td>{share}</td>"
            f"{'<td></td><td></td>' if plain is None else _ratio(plain)}</tr>"
        )
    yield "</table>"


def _left_out(report: Report) -> Iterator[str]:
    reasons = {
        (one["suite"], one["case"] or "all", one["device"], one["dtype"], one["reason"]) for one in report["left_out"]
    }
    reasons |= {
        (row["suite"], name, row["device"], "", reason)
        for row in report["rows"]
        for name, reason in row["left_out"].items()
    }
    if reasons:
        yield "<h2>Left out</h2><table><tr>"
        yield (
            "".join(f"<th class='text'>{name}</th>" for name in ("suite", "who or what", "device", "reason")) + "</tr>"
        )
        for suite, what, device, dtype, reason in sorted(reasons):
            cells = (suite, what, f"{device} {dtype}", reason)
            yield "<tr>" + "".join(f"<td class='text'>{_text(cell)}</td>" for cell in cells) + "</tr>"
        yield "</table>"


def _environment(report: Report) -> Iterator[str]:
    yield "<h2>What the numbers depend on</h2><table>"
    e = report["environment"]
    facts = {**{f"cpu, {k}": v for k, v in e["cpu"].items()}, "python": e["python"], "platform": e["platform"]}
    for gpu in e["gpus"]:
        facts.update({f"{gpu['device']}, {name}": value for name, value in gpu.items()})
    for i, library in enumerate(e["blas"], 1):
        facts[f"library {i}"] = ", ".join(f"{k} {v}" for k, v in library.items() if v is not None)
    facts["TF32"] = ", ".join(f"{name}: {value}" for name, value in e["tf32"].items())
    facts["packages"] = ", ".join(f"{name} {number}" for name, number in e["packages"].items() if number)
    for name, value in facts.items():
        if value is not None:
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            yield f"<tr><td>{_text(name)}</td><td class='text'>{_text(shown)}</td></tr>"
    yield "</table>"


def _text(value: object) -> str:
    return html.escape(str(value))
