"""What surrounds a measurement: processors, a busy program, fresh processes, the table of fits, and the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gpubackprop.bench import case as cases
from gpubackprop.bench import devices, ledger, page, plots, render, report, run, sizes, tables, timing
from gpubackprop.bench import threads as limits
from gpubackprop.bench.busy import BESIDE, BusyProgram, add_busy
from gpubackprop.bench.devices import Host
from gpubackprop.bench.environment import environment
from gpubackprop.bench.instance import in_instances, scattered
from gpubackprop.bench.suites import cases_of

SETTINGS = cases.Settings(sizes.DRY, (), rounds=3, seconds=0.0, dry=True)
linux = pytest.mark.skipif(not limits.TASKS.is_dir(), reason="only Linux lists the threads of a process")


# ---------------------------------------------------------------------- processors and the busy program


@linux
def test_all_threads_are_kept_to_as_many_processors_as_there_are_threads() -> None:
    before, ended = os.sched_getaffinity(0), threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        with limits.pinned(1):
            assert [os.sched_getaffinity(task) for task in (0, other.native_id or 0)] == [{max(before)}] * 2
            child = subprocess.run(
                [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"],
                capture_output=True,
                text=True,
                check=True,
            )
            assert child.stdout.strip() == str({max(before)})
        assert [os.sched_getaffinity(task) for task in (0, other.native_id or 0)] == [before] * 2
    finally:
        ended.set()
        other.join()
    assert limits.chosen(10_000) == sorted(before)


@linux
def test_the_report_names_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment([Host(1)], 1)
    assert found["cpu"]["pinned_to"] == [max(os.sched_getaffinity(0))]
    made = report.new_report(SETTINGS, found, [])
    assert f"pinned to number {max(os.sched_getaffinity(0))}" in tables.heading(made)[0]
    monkeypatch.delattr(os, "sched_setaffinity")
    assert environment([Host(1)], 1)["cpu"]["pinned_to"] is None


@linux
def test_cases_on_the_cpu_are_measured_pinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def run_case(case: Any, settings: Any) -> Any:
        seen.append(os.sched_getaffinity(0))
        raise RuntimeError("enough")

    monkeypatch.setattr(run, "run_case", run_case)
    made = report.new_report(SETTINGS, {"commit": None}, [])
    run.Run(made, SETTINGS, tmp_path, print, print).measure(["bandwidth"], [Host(1)])
    assert seen == [{max(os.sched_getaffinity(0))}]


@linux
def test_the_busy_program_computes_only_while_it_is_meant_to() -> None:
    program = BusyProgram()
    process = program._process

    def ticks() -> int:
        return int(Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11])

    with program.running():
        deadline = time.monotonic() + 120
        while ticks() < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
    done = ticks()
    assert done >= 10
    time.sleep(0.1)
    assert ticks() <= done + 1
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()  # as when its parent is killed
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_what_trains_is_timed_beside_the_busy_program_over_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Program:
        def running(self) -> Any:
            log.append("busy")
            return limits.contextlib.nullcontext()

    monkeypatch.setattr("gpubackprop.bench.busy.busy_program", Program)
    timer = timing.WallTimer(lambda: None)
    made = [
        timing.Candidate(n, lambda n=n: log.append(n), timer, trains=n != "products") for n in ("a", "b", "products")
    ]  # type: ignore[misc]
    prepared = cases.Prepared(made)
    case = cases.Case("step", "s", "cpu", "float32", lambda: prepared, busy=True)
    row = cases.run_case(case, replace(SETTINGS, rounds=2))
    assert list(row["candidates"]) == ["a", "b", "products", "a" + BESIDE, "b" + BESIDE]
    assert row["candidates"]["b" + BESIDE]["against"] == "b"
    assert row["candidates"]["b"]["against"] is None
    assert [log[i + 1] for i, entry in enumerate(log) if entry == "busy"].count("b") == timing.WARM_UP + 2
    assert any("times over those alone" in line for line in render.Terminal().lines(row))
    monkeypatch.undo()
    add_busy([])  # starts nothing


def test_one_core_is_too_few_for_a_busy_program() -> None:
    command = [sys.executable, "-m", "gpubackprop", "bench", "--busy"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--busy needs --threads 2 or more" in result.stderr


def test_step_and_epoch_take_part_beside_a_busy_program() -> None:
    settings = replace(SETTINGS, busy=True)
    assert all(case.busy for suite in ("step", "epoch") for case in cases_of(suite, Host(2), "float32", settings))


# ---------------------------------------------------------------------- fresh processes


def test_a_case_in_fresh_processes_shows_its_noise(tmp_path: Path) -> None:
    (case,) = cases_of("bandwidth", Host(1), "float32", SETTINGS)
    row = in_instances(case, replace(SETTINGS, instances=2))
    assert row["instances"] == 2
    assert list(row["candidates"]) == ["copyto", "copyto, again", "dot product"]
    assert all(len(entry["wall_seconds"]["samples"]) == 6 for entry in row["candidates"].values())
    again = row["candidates"]["copyto, again"]["over_base"]
    assert row["noise_floor"] == timing.noise_floor(again)
    assert again["verdict"] in ("SAME", "AMBIGUOUS")  # by its own noise
    made = report.new_report(replace(SETTINGS, instances=2), environment([Host(1)], 1), [])
    report.add_row(made, row)
    report.write_report(made, tmp_path)
    assert report.read_report(tmp_path)["rows"][0]["noise_floor"] == row["noise_floor"]
    assert any("2 processes; copyto against itself differs by" in line for line in render.Terminal().lines(row))


def test_who_fails_in_one_process_takes_no_part() -> None:
    def raw(*names: str, **more: Any) -> dict[str, Any]:
        entry = {"samples": [[None, 1.0], [None, 1.0]], "setup_seconds": None, "units": 1, "against": None}
        found = {"left_out": {}, "wrong": {}, "candidates": dict.fromkeys(names, entry), **more}
        return {"suite": "step", "case": "c", "device": "cpu", "dtype": "float32", **found}

    row = cases.row_of([raw("a", "b", "c"), raw("a", "b", wrong={"c": "off"}), raw("a", left_out={"b": "broke"})])
    assert (row["base"], list(row["candidates"])) == ("a", ["a"])
    assert (row["wrong"], row["left_out"]) == ({"c": "off"}, {"b": "broke"})


def test_a_case_that_fails_in_a_fresh_process_says_why() -> None:
    (case,) = cases_of("bandwidth", Host(1), "float32", SETTINGS)
    with pytest.raises(RuntimeError, match="StopIteration"):
        in_instances(replace(case, name="no such case"), SETTINGS)


def test_the_arrays_of_two_processes_lie_elsewhere() -> None:
    sizes_of = [[len(block) for block in scattered()] for _ in range(2)]
    assert sizes_of[0] != sizes_of[1]


# ---------------------------------------------------------------------- fits


def test_a_fit_is_short_and_long_with_one_thread_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpubackprop.bench.suites.fit.usable", lambda: 4)
    made = list(cases_of("fit", Host(1), "float32", SETTINGS))
    found = [(case.name.partition("16, ")[2], case.threads, case.size["epochs"], case.busy) for case in made]
    assert found == [
        ("one core, short", 1, 2, False), ("one core, long", 1, 16, False), ("all cores, short", 4, 2, True),
        ("all cores, long", 4, 16, False),
    ]  # fmt: skip
    quick = cases_of("fit", Host(1), "float32", replace(SETTINGS, quick=True))
    assert [case.size["length"] for case in quick] == ["short", "short"]
    monkeypatch.setattr("gpubackprop.bench.suites.fit.usable", lambda: 1)
    assert [case.size["cores"] for case in cases_of("fit", Host(1), "float32", SETTINGS)] == ["one core"] * 2
    prepared = made[0].prepare()
    (candidate,) = prepared.candidates
    assert candidate.trains
    assert prepared.flops == 2 * 6 * 64 * (12 * 16 + 16 * 8 + 8 * 3)
    candidate.run()


def test_a_fit_is_measured_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked, here = [], []

    def instead(names: list[str]) -> Any:
        def measure(case: Any, settings: Any) -> Any:
            names.append(case.suite)
            raise RuntimeError("enough")

        return measure

    monkeypatch.setattr(run, "in_instances", instead(asked))
    monkeypatch.setattr(run, "run_case", instead(here))
    made = report.new_report(SETTINGS, {"commit": None}, [])
    run.Run(made, SETTINGS, tmp_path, print, print).measure(["fit"], [Host(1)])
    assert set(asked) == {"fit"}
    assert here == []
    asked.clear()
    robust = replace(SETTINGS, instances=3)
    run.Run(made, robust, tmp_path, print, print).measure(["bandwidth", "coldstart"], [Host(1)])
    assert (asked, here) == (["bandwidth"], ["coldstart"])  # each sample of a start is a process already


def fit_row(batch: int, cores: str, length: str, **over: float) -> dict[str, Any]:
    """A row of a fit in which each candidate takes so many times as long as what it is compared with."""
    summary = {"median": 1.0, "q1": 1.0, "q3": 1.0, "n": 2, "samples": [1.0, 1.0]}

    def entry(name: str, ratio: float) -> dict[str, Any]:
        low, high = 0.995 * ratio, 1.005 * ratio
        found = {"median": ratio, "low": low, "high": high, "verdict": timing.verdict(low, high, 1.01), "clock": "wall"}
        against = name.removesuffix(BESIDE) if name.endswith(BESIDE) else None
        return {
            "device_seconds": None, "wall_seconds": summary, "setup_seconds": None, "units": 1, "against": against,
            "over_base": found if name != "gpubackprop" else None,
        }  # fmt: skip

    names = {"gpubackprop": 1.0, **{name.replace("_busy", BESIDE): ratio for name, ratio in over.items()}}
    return {
        "suite": "fit", "case": f"8-16-3, batch {batch}, {cores}, {length}", "device": "cpu", "dtype": "float32",
        "size": {"layers": [8, 16, 3], "batch": batch, "cores": cores, "length": length}, "flops": 1, "bytes": 0,
        "base": "gpubackprop", "instances": 1, "noise_floor": 1.01, "left_out": {}, "wrong": {},
        "candidates": {name: entry(name, ratio) for name, ratio in names.items()},
    }  # fmt: skip


ROWS = [
    fit_row(16, "one core", "short", jax=1.5), fit_row(16, "all cores", "short", jax=0.5, gpubackprop_busy=1.25, jax_busy=2.0),
    fit_row(32, "one core", "short", jax=1.0), fit_row(32, "all cores", "short"),
]  # fmt: skip


def test_fits_are_a_table_of_one_line_per_network() -> None:
    lines = render.markdown({"rows": ROWS}).splitlines()
    assert lines[0] == "| fit, cpu, float32 | one core, short | all cores, short | ours, busy | jax, busy |"
    assert lines[2:] == [
        "| 8-16-3, batch 16 | 1.50x | 0.50x | 1.25x | 2.00x |",
        "| 8-16-3, batch 32 | 1.00x ~ | - |  |  |",
    ]
    assert (
        render.markdown({"rows": ROWS[2:]}).splitlines()[0]
        == "| fit, cpu, float32 | one core, short | all cores, short |"
    )
    assert max(map(len, render.lines_of(tables.fits(ROWS)))) <= 80


def test_estimators_are_a_table_of_one_line_per_network() -> None:
    def row(case: str, batch: int, ratio: float) -> dict[str, Any]:
        return fit_row(batch, "", "", sklearn=ratio) | {"suite": "sklearn", "dtype": "float64", "case": case}

    rows = [
        row("fit 8-16-3, batch 32, samples 1600", 32, 9.0),
        row("predict all 8-16-3, batch 32, samples 1600", 32, 2.0),
        row("fit 8-16-3, batch 200, samples 1600", 200, 1.0),
    ]
    assert render.markdown({"rows": rows}).splitlines() == [
        "| sklearn, cpu, float64 | fit | predict all |",
        "|---|---|---|",
        "| 8-16-3, batch 32 | 9.00x | 2.00x |",
        "| 8-16-3, batch 200 | 1.00x ~ | - |",
    ]


def test_the_result_is_one_sentence() -> None:
    said = tables.result({"rows": ROWS})
    assert said == (
        "The fastest other library takes 0.50 to 1.50 times as long as gpubackprop, which is faster than it in 1, as fast in 1, "
        "slower in 1 of 3 cases."
    )
    assert tables.result({"rows": ROWS[3:]}).startswith("No other library took part")


# ---------------------------------------------------------------------- where arrays are, and the page


def test_arrays_are_in_the_cache_that_holds_them_or_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = {"L1 data": "32K", "L1 instruction": "64K", "L2 unified": "512K", "L3 unified": "32768K"}
    monkeypatch.setattr(devices, "cache_sizes", lambda: caches)
    found = [devices.level(Host(1), n << 10) for n in (32, 33, 32768, 32769, 65535, 65536)]
    assert found == ["L1", "L2", "L3", "cache and memory", "cache and memory", "memory"]


def kernel_row(seconds: float, level: str, suite: str = "kernels") -> dict[str, Any]:
    summary = {"median": seconds, "q1": seconds, "q3": seconds, "n": 1, "samples": [seconds]}
    entry = {
        "device_seconds": None, "wall_seconds": summary, "over_base": None, "setup_seconds": None, "units": 1, "against": None,
    }  # fmt: skip
    return {
        "suite": suite, "case": f"clip, {level}", "device": "cpu", "dtype": "float32", "bytes": 100, "flops": 0, "level": level,
        "base": "gpubackprop", "candidates": {"gpubackprop": entry}, "left_out": {}, "wrong": {}, "size": {},
        "instances": 1, "noise_floor": 1.01,
    }  # fmt: skip


def test_no_kernel_is_faster_than_memory() -> None:
    copy = kernel_row(1.0, "memory", "bandwidth")
    cached, slow, fast = kernel_row(0.1, "L2"), kernel_row(2.0, "memory"), kernel_row(0.8, "memory")
    for row in (cached, slow, fast):
        ledger.annotate(row, [copy])
    assert "share_of_memory" not in cached
    assert (slow["share_of_memory"], fast["share_of_memory"]) == (0.5, 1.0)
    (shown,) = tables.tables([cached, slow])
    assert [cells[[c.name for c in shown.columns].index("share")] for cells in shown.cells] == ["in L2", "50%"]
    assert len(list(plots.figures({"rows": [cached, slow]}))) == 1


def test_the_parts_of_a_step_are_compiled_as_the_step_is() -> None:
    (case,) = cases_of("step", Host(1), "float32", SETTINGS)
    prepared = case.prepare()
    by_name = {one.name: one for one in prepared.candidates}
    for name in ("products", "  forward alone", "  backward alone", "  update alone"):
        by_name[name].run()


class Tables(HTMLParser):
    """Collects the attributes of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_begins_with_the_result_and_fits_a_phone(tmp_path: Path) -> None:
    made = report.new_report(SETTINGS, environment([Host(1)], 1), [])
    made["rows"] = [*ROWS, kernel_row(0.1, "L2")]
    page.write_page(made, tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert text.index("<p class='result'>The fastest other library takes") < text.index("<table")
    found = Tables(text).found
    around = [found[i - 1] for i, (tag, _) in enumerate(found) if tag in ("table", "svg")]
    assert around
    assert all(attributes.get("class") == "scroll" for _, attributes in around)
    assert "table.numbers { table-layout: fixed; }" in text
    assert "in L2" in text


def test_the_legend_of_a_plot_is_text_beside_it(tmp_path: Path) -> None:
    rows = json.loads((Path(__file__).with_name("golden") / "report.json").read_text(encoding="utf-8"))["rows"]
    found = list(plots.figures({"rows": rows}))
    assert found
    for _, figure in found:
        entries = plots.legend(figure)
        drawn = plots.svg(figure)
        assert "<svg" in drawn
        for color, glyph, label in entries:
            assert re.fullmatch("#[0-9a-f]{6}", color)
            assert len(glyph) == 1
            assert f">{label}</text>" not in drawn
