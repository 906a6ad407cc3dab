"""The suite: its arithmetic with a clock of the test's own, its sizes, its reports, and tiny runs as a user makes them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import gpubackprop as gb
import gpubackprop.bench
from gpubackprop.bench import case as cases
from gpubackprop.bench import compare, ledger, page, plots, render, report, run, sizes, timing
from gpubackprop.bench.devices import Host, device_of
from gpubackprop.bench.ours import Trained, entrants
from gpubackprop.bench.peers import make_problem
from gpubackprop.bench.suites import NothingToMeasureError, cases_of, memory
from gpubackprop.bench.suites import kernels as kernel_suite
from gpubackprop.bench.suites import sklearn as estimators
from gpubackprop.bench.suites.crossover import overtaking

SCHEMA = json.loads(Path(gpubackprop.bench.__file__).with_name("schema.json").read_text(encoding="utf-8"))
SETTINGS = cases.Settings(sizes.DRY, ("numpy",), rounds=3, seconds=0.0, dry=True)


class FakeClock:
    """Shows the seconds that the runs say they take."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def job(self, name, seconds):
        def run():
            self.now += seconds
            self.log.append(name)

        return run


# ---------------------------------------------------------------------- timing


def test_times_are_per_unit_and_fill_the_seconds_asked_for():
    clock = FakeClock()
    timer = timing.WallTimer(lambda: None, clock)
    candidates = [
        timing.Candidate("a", clock.job("a", 0.5), timer),
        timing.Candidate("b", clock.job("b", 3.0), timer, units=3),
    ]
    samples = timing.measure(candidates, rounds=4, seconds=1.0, clock=clock)
    assert [s.wall for s in samples["a"]] == [0.5] * 4
    assert [s.wall for s in samples["b"]] == [1.0] * 4
    # warmed up, then in turn, there and back; a has one run more before each of its samples of two runs
    assert clock.log == ["a"] * timing.WARM_UP + ["b"] * timing.WARM_UP + ["a", "a", "a", "b", "b", "a", "a", "a"] * 2


def test_threads_that_share_the_work_run_for_some_time_before_each_sample():
    clock = FakeClock()
    candidates = [timing.Candidate("a", clock.job("a", 0.5), timing.WallTimer(lambda: None, clock))]
    timing.measure(candidates, rounds=2, seconds=0.1, again=1.0, clock=clock)
    assert clock.log == ["a"] * timing.WARM_UP + 2 * ["a", "a", "a"]


def test_without_a_warm_up_every_run_is_a_sample():
    clock = FakeClock()
    candidates = [timing.Candidate("a", clock.job("a", 0.5), timing.WallTimer(lambda: None, clock))]
    assert len(timing.measure(candidates, 3, 9.0, warm=False)["a"]) == 3
    assert clock.log == ["a"] * 3


def test_what_was_queued_before_is_waited_for_outside_the_time():
    clock = FakeClock()
    waits = [7.0, 2.0]

    def synchronize():
        clock.now += waits.pop(0)

    assert timing.WallTimer(synchronize, clock)(clock.job("a", 1.0), 3).wall == 5.0


def test_repeats_are_bounded():
    assert timing.repeats_for(0.0, 1.0) == timing.MOST_REPEATS
    assert timing.repeats_for(2.0, 1.0) == 1
    assert timing.repeats_for(0.25, 1.0) == 4


def test_summary_gives_quartiles():
    assert timing.summary([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert timing.summary([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0, "n": 1}


def test_ratio_is_of_pairs_and_says_when_it_may_be_1():
    rng = np.random.default_rng(0)
    drift = 1 + np.arange(25)
    a = [timing.Sample(2.0 * d, 9.0) for d in drift]
    b = [timing.Sample(1.0 * d, 9.0) for d in drift]
    assert timing.ratio([a], [b]) == {"median": 2.0, "low": 2.0, "high": 2.0, "verdict": "SLOWER", "clock": "device"}
    noisy = [[timing.Sample(None, w) for w in rng.uniform(0.9, 1.1, 25)] for _ in range(2)]
    found = timing.ratio(noisy[:1], noisy[1:])
    assert found["clock"] == "wall"
    assert found["low"] <= 1 <= found["high"]
    assert found["verdict"] == "AMBIGUOUS"
    assert timing.ratio([a], noisy[:1])["clock"] == "wall"


def test_the_interval_holds_the_median_as_often_as_it_says():
    """95 % of intervals hold it; of 200 at least 170 do, but for one time in 10^6 (binomial with p = 0.93 for the bootstrap)."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        low, high = timing.interval_of_medians(rng.lognormal(0, 0.2, (1, 25)))
        inside += low <= 1 <= high
    assert inside >= 170


def test_processes_that_differ_make_the_interval_as_wide_as_they_differ():
    """Rounds agree within a process; a bootstrap over all rounds alone would be ten times as sure as the processes are."""
    rng = np.random.default_rng(2)
    of_process = np.array([0.9, 0.95, 1.0, 1.05, 1.1, 1.02, 0.98])[:, None]
    low, high = timing.interval_of_medians(of_process * rng.lognormal(0, 0.001, (7, 25)))
    assert low < 0.96
    assert high > 1.04


@pytest.mark.parametrize(
    ("low", "high", "floor", "verdict"),
    [
        (0.90, 0.95, 1.03, "FASTER"), (1.05, 1.20, 1.03, "SLOWER"), (0.98, 1.02, 1.03, "SAME"),
        (0.95, 0.98, 1.03, "AMBIGUOUS"),  # a part of it is noise
        (1.02, 1.04, 1.03, "AMBIGUOUS"), (0.9, 1.1, 1.03, "AMBIGUOUS"),
        (1.002, 1.004, 1.01, "SAME"),  # excludes 1, but is less than noise
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_interval_and_the_noise(low, high, floor, verdict):
    assert timing.verdict(low, high, floor) == verdict
    mirrored = {"FASTER": "SLOWER", "SLOWER": "FASTER"}
    assert timing.verdict(1 / high, 1 / low, floor) == mirrored.get(verdict, verdict)


def test_noise_is_what_separates_a_candidate_from_itself():
    assert timing.noise_floor({"low": 0.99, "high": 1.04}) == 1.04
    assert timing.noise_floor({"low": 0.8, "high": 1.04}) == 1.25
    assert timing.noise_floor({"low": 0.999, "high": 1.001}) == timing.LEAST_FLOOR


def test_a_card_is_warmed_up_by_time():
    clock = FakeClock()
    timer = timing.WallTimer(lambda: None, clock)
    candidates = [timing.Candidate(name, clock.job(name, 0.01), timer) for name in "ab"]
    timing.measure(candidates, rounds=1, seconds=0.0, warm_seconds=0.5, clock=clock)
    warm = 0.5 / 0.01
    assert warm <= len(clock.log) - 2 < warm + 2 * timing.WARM_UP
    assert clock.log[: 2 * timing.WARM_UP] == ["a"] * timing.WARM_UP + ["b"] * timing.WARM_UP


# ---------------------------------------------------------------------- sizes


def test_every_default_size_can_be_read():
    for table in (sizes.FULL, sizes.QUICK, sizes.DRY):
        assert tuple(table) == sizes.SUITES
        for suite, texts in table.items():
            for one in texts:
                sizes.check_size(suite, one)


def test_sizes_come_from_a_file(tmp_path):
    path = tmp_path / "sizes.toml"
    path.write_text('step = ["3-4-2, batch 5"]\ngemm = ["3x4x5"]\n')
    assert sizes.read_sizes(path) == {"step": ["3-4-2, batch 5"], "gemm": ["3x4x5"]}
    assert sizes.parse_step("3-4-2, batch 5, samples 10") == sizes.StepSize((3, 4, 2), 5, 10)
    assert sizes.parse_step("3-4-2, batch 5, samples 10, epochs 4") == sizes.StepSize((3, 4, 2), 5, 10, 4)


@pytest.mark.parametrize(
    "content",
    [
        'steps = ["3-4, batch 5"]', 'step = ["3-4"]', 'step = ["3-0, batch 5"]', 'epoch = ["3-4, batch 5, samples 7"]',
        'fit = ["3-4, batch 5, epochs 2"]', 'fit = ["3-4, batch 5, samples 5, epochs 0"]', 'gemm = ["3x4"]',
        'bandwidth = ["1k"]', "step = 3", 'kernels = ["0x4"]',
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_read_are_refused(content, tmp_path):
    path = tmp_path / "sizes.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"size is|holds lists"):
        sizes.read_sizes(path)


# ---------------------------------------------------------------------- cases, checks, ledger


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_a_wrong_kernel_gets_no_time(name, monkeypatch):
    (case, *_) = cases_of("kernels", device_of(name, 1), "float32", SETTINGS)
    right = kernel_suite.check

    def spoilt(device, kernel, a):
        plain = kernel.unfused

        def expected(arrays):
            plain(arrays)
            arrays["out"][3, 2] += 1e-4

        kernel.expected = expected
        return right(device, kernel, a)

    monkeypatch.setattr(kernel_suite, "check", spoilt)
    row = cases.run_case(case, SETTINGS)
    assert "differs by" in row["wrong"]["gpubackprop"]
    assert row["candidates"] == {}
    assert any("WRONG: gpubackprop: out differs" in line for line in render.Terminal().lines(row))


def test_a_step_that_trains_otherwise_gets_no_time(monkeypatch):
    problem = make_problem((12, 16, 8, 3), 16)

    def ours(device, problem):
        yield "stands still", lambda: Trained("stands still", lambda: None, device.timer(), loss=lambda: 9.9)
        yield "is lost", lambda: Trained("is lost", lambda: None, device.timer(), loss=lambda: float("nan"))
        yield "breaks", lambda: 1 / 0
        yield "breaks later", lambda: Trained("breaks later", lambda: 1 / 0, device.timer(), loss=lambda: 1.2)

    monkeypatch.setattr("gpubackprop.bench.ours.ours", ours)
    trained, prepared = entrants(Host(1), problem, ("numpy",), slow=False)
    assert [one.name for one in trained] == ["numpy"]
    assert set(prepared.wrong) == {"stands still", "is lost"}
    assert "its loss after" in prepared.wrong["stands still"]
    assert set(prepared.left_out) == {"breaks", "breaks later"}
    assert prepared.facts["first_loss"] - prepared.facts["last_loss"] > 0


def test_the_ledger_is_the_sum_of_the_operations():
    device = Host(1)
    step = gb.MLP((12, 16, 3)).step(8, "sgd")
    found = ledger.ledger(device, step)
    assert found["flops"] == step.flops == sum(op[3] for op in found["operations"])
    assert found["bytes"] == step.bytes == sum(phase["bytes"] for phase in found["phases"].values())
    assert found["launches"] == len(step.operations)
    assert found["synchronizations"] == 0
    assert found["allocations"] < step.names.array("X").nbytes + 10_000  # no array, only what a call costs Python


def test_the_floor_is_the_slower_of_both_ceilings():
    ceilings = {"flops_per_second": 1e9, "copies": [[100, 8e9], [1000, 2e9], [10_000, 1e9]]}
    assert ledger.bandwidth_of(ceilings, 50) == 8e9
    assert ledger.bandwidth_of(ceilings, 999) == 8e9
    assert ledger.bandwidth_of(ceilings, 1000) == 2e9
    assert ledger.bandwidth_of(ceilings, 10**9) == 1e9
    operations = [["matmul", 5000, 100], ["update", 10, 20_000]]
    assert ledger.floor_seconds(ceilings, operations) == pytest.approx(5000 / 1e9 + 20_000 / 1e9)


def crossover_row(flops, faster, *, decided=True):
    over = {"median": 0.5 if faster else 2.0, "verdict": ("FASTER" if faster else "SLOWER") if decided else "AMBIGUOUS"}
    entry = {"device_seconds": None, "wall_seconds": {"median": 1.0}, "over_base": over}
    return {
        "suite": "crossover", "device": "cuda:0", "dtype": "float32", "flops": flops,
        "candidates": {"cpu": {**entry, "over_base": None}, "cuda:0": entry},
    }  # fmt: skip


def test_the_crossover_lies_between_the_last_slower_and_the_first_faster_size():
    assert overtaking([crossover_row(10, False), crossover_row(1000, True)], "cuda:0") == 100.0
    assert (
        overtaking([crossover_row(10, True), crossover_row(100, False), crossover_row(10_000, True)], "cuda:0")
        == 1000.0
    )
    assert overtaking([crossover_row(10, True)], "cuda:0") == 0.0
    assert overtaking([crossover_row(10, True, decided=False)], "cuda:0") == float("inf")


def test_auto_reads_the_crossover(monkeypatch, tmp_path):
    from gpubackprop import backends
    from gpubackprop.machine import crossover

    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(tmp_path))
    assert backends.choose_device((10, 10)) in ("cpu", "cuda:0")
    monkeypatch.setattr(backends, "available_devices", lambda: ["cpu", "cuda:0"])
    assert backends.choose_device((10, 10)) == "cuda:0"  # not measured
    assert "until 'gpubackprop bench --suite crossover'" in backends.meaning_of_auto()
    crossover.remember("cuda:0", crossover.step_flops((64, 64)))
    assert crossover.recall("cuda:0") == 6 * 128 * 64 * 64
    assert crossover.recall("cuda:1") is None
    assert backends.choose_device((64, 63)) == "cpu"
    assert backends.choose_device((64, 64)) == "cuda:0"
    assert "less than 3.15e+06 FLOP" in backends.meaning_of_auto()
    assert gb.MLP((64, 63), device="auto").device == "cpu"
    crossover.remember("cuda:0", float("inf"))
    assert backends.choose_device((10_000, 10_000)) == "cpu"
    (file,) = tmp_path.glob("crossover-*.json")
    file.write_text("half a fi")
    assert crossover.recall("cuda:0") is None
    monkeypatch.setattr(backends, "available_devices", lambda: ["cpu"])
    assert backends.choose_device((10_000, 10_000)) == "cpu"


def test_a_step_is_timed_beside_its_products_alone():
    rows = [
        cases.run_case(case, SETTINGS)
        for suite in ("products", "scaling")
        for case in cases_of(suite, Host(1), "float32", SETTINGS)
    ]
    assert set(rows[0]["candidates"]) == {"plain products", "gpubackprop, sgd", "gpubackprop, adam"}
    assert all(set(row["candidates"]) == {"plain products", "gpubackprop, sgd"} for row in rows[1:])
    assert all(row["wrong"] == {} and row["base"] == "plain products" for row in rows)
    titles = [title for title, _ in plots.figures({"rows": rows})]
    assert titles == ["Time against the mini-batch, 12-12-3, cpu, float32"]


@pytest.mark.skipif(not memory.RESET.exists(), reason="this system does not tell the largest resident set")
def test_a_training_takes_little_more_memory_than_it_needs():
    settings = cases.Settings(sizes.FULL, (), cold_rounds=1)
    (case,) = cases_of("memory", Host(1), "float32", settings)
    row = cases.run_case(case, settings)
    (found,) = row["memory"]
    # the data are new pages; arrays of the allocator's own may be used again
    assert found["resident_bytes"] > 0.7 * found["needed_bytes"]["data"]
    assert found["resident_bytes"] < 1.1 * sum(found["needed_bytes"].values())
    assert any("resident set grows by" in line for line in render.Terminal().lines(row))


# ---------------------------------------------------------------------- a run, as a user makes it


def bench(*arguments, **options):
    command = [sys.executable, "-m", "gpubackprop", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "r"
    result = bench("--dry", "--device", "cpu", "--peers", "numpy,cupy", "--rounds", "3", "--out", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


@pytest.mark.slow
def test_a_run_measures_every_suite_and_names_what_is_missing(tiny):
    out, printed = tiny
    found = report.read_report(out)
    measured = {row["suite"] for row in found["rows"]}
    assert measured == set(sizes.SUITES) - {"transfer", "crossover"}
    assert {one["suite"] for one in found["left_out"]} == {"transfer", "crossover"}
    assert "left out: the CPU has nothing to transfer" in printed
    for row in found["rows"]:
        assert row["wrong"] == {}
        assert row["base"] in row["candidates"]
        for entry in row["candidates"].values():
            assert entry["wall_seconds"]["median"] > 0
        if row["suite"] == "step":
            assert {"gpubackprop", "gpubackprop, K steps", "products", "numpy", "  update alone"} <= set(
                row["candidates"]
            )
            assert row["left_out"]["cupy"]
            assert row["floor_seconds"] > 0
        if row["suite"] == "kernels":
            assert {"gpubackprop", "copy of as many bytes", "plain NumPy"} == set(row["candidates"])


def test_estimators_are_compared_with_those_of_scikit_learn(monkeypatch):
    pytest.importorskip("sklearn")
    made = list(cases_of("sklearn", Host(1), "float64", replace(SETTINGS, libraries=("sklearn",))))
    assert [case.name.removesuffix(" 12-16-8-3, batch 16, samples 64") for case in made] == list(estimators.CALLS)
    assert [one.name for one in made[0].prepare().candidates] == ["gpubackprop", "sklearn"]
    from gpubackprop.sklearn import MLPClassifier

    monkeypatch.setattr(MLPClassifier, "predict_proba", lambda self, X: np.full((len(X), 3), 1 / 3))
    for case in made:
        prepared = case.prepare()
        assert ([one.name for one in prepared.candidates], [*prepared.wrong]) == (["sklearn"], ["gpubackprop"])
    with pytest.raises(NothingToMeasureError, match="float32 or float64"):
        next(cases_of("sklearn", Host(1), "float16", SETTINGS))


@pytest.mark.slow
def test_the_report_has_the_shape_that_is_documented(tiny):
    found = report.read_report(tiny[0])
    jsonschema.validate(found, SCHEMA)
    assert SCHEMA["properties"]["schema"]["const"] == report.SCHEMA
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found, "rows": [{}]}, SCHEMA)


@pytest.mark.slow
def test_the_tables_fit_80_columns(tiny):
    lines = [line for line in tiny[1].splitlines() if not line.startswith("wrote ")]  # a path is as long as it is
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_the_page_needs_nothing_else(tiny):
    page_text = (tiny[0] / "report.html").read_text(encoding="utf-8")
    assert page_text.count("<svg") >= 3
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page_text)
    assert "@import" not in page_text
    assert "A dry run" in page_text


@pytest.mark.slow
def test_show_prints_a_report_again(tiny):
    result = bench("show", str(tiny[0]))
    assert "64" in result.stdout
    assert "12-16-8-3, batch 16" in result.stdout
    assert result.returncode == 0
    markdown = bench("show", "--markdown", str(tiny[0])).stdout
    assert markdown.splitlines()[2].startswith("| 12-16-8-3, batch 16 |")
    bench("show", str(tiny[0]), "--pictures", str(tiny[0]))
    assert (tiny[0] / "one-step-against-the-peers-cpu-float32.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_report_is_not_overwritten_and_not_mixed(tiny, tmp_path):
    again = bench("--dry", "--device", "cpu", "--out", str(tiny[0]))
    assert again.returncode == 2
    assert "--resume" in again.stderr
    other = bench("--dry", "--device", "cpu", "--rounds", "4", "--out", str(tiny[0]), "--resume")
    assert other.returncode == 2
    assert "rounds 3, now 4" in other.stderr
    nothing = bench("--resume", "--out", str(tmp_path / "none"))
    assert nothing.returncode == 2
    assert "does not exist" in nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--suite", "steps"], "choose from transfer"), (["--peers", "tensorflow"], "choose from numpy"),
     (["--dtype", "int8"], "choose from float32"), (["--device", "cuda:7"], "gpubackprop: ")],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments, said, tmp_path):
    result = bench(*arguments, "--out", str(tmp_path / "r"))
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT for one process on Windows")
def test_an_interrupted_run_keeps_what_it_has_and_is_resumed(tmp_path):
    out = tmp_path / "r"
    arguments = ["--dry", "--device", "cpu", "--peers", "numpy", "--rounds", "3", "--suite", "bandwidth,gemm,kernels"]
    command = [sys.executable, "-m", "gpubackprop", "bench", *arguments, "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts in the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 600  # a busy machine imports and compiles for minutes before the first row is written
    while not (out / "report.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (out / "report.json").exists(), "nothing was measured"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert f"--resume --out {out}" in errors
    before = report.read_report(out)
    jsonschema.validate(before, SCHEMA)
    assert before["interrupted"]
    assert before["rows"]
    assert "interrupted" in (out / "report.html").read_text(encoding="utf-8")

    result = bench(*arguments, "--out", str(out), "--resume")
    assert result.returncode == 0, result.stderr
    after = report.read_report(out)
    assert not after["interrupted"]
    assert after["rows"][: len(before["rows"])] == before["rows"]
    found = [cases.key_of(row) for row in after["rows"]]
    assert len(found) == len(set(found))
    assert {row["suite"] for row in after["rows"]} == {"bandwidth", "gemm", "kernels"}


def test_a_case_that_breaks_is_an_error_and_one_too_large_is_not(tmp_path, monkeypatch):
    errors = [MemoryError("too large"), RuntimeError("broken")]

    def run_case(case, settings):
        raise errors.pop(0)

    monkeypatch.setattr(run, "run_case", run_case)
    settings = cases.Settings({**sizes.DRY, "bandwidth": ["64", "128"]}, ())
    made = report.new_report(settings, {"commit": None}, [])
    run.Run(made, settings, tmp_path, print, print).measure(["bandwidth"], [Host(1)])
    assert [one["failed"] for one in made["left_out"]] == [False, True]
    assert report.errors(made) == ["bandwidth, cpu, float32, 128 bytes: RuntimeError: broken"]


@pytest.mark.parametrize(("suite", "seconds"), [("bandwidth", -1.0), ("coldstart", run.COLD_SECONDS - 1.0)])
def test_a_quick_run_begins_nothing_when_its_time_is_over(suite, seconds, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "QUICK_SECONDS", seconds)
    settings = cases.Settings(sizes.DRY, (), rounds=2, seconds=0.0, quick=True)
    made = report.new_report(settings, {"commit": None}, [])
    said = []
    run.Run(made, settings, tmp_path, said.append, said.append).measure([suite], [Host(1)])
    assert made["rows"] == []
    assert made["left_out"][0]["reason"] == "no time left in a quick run"


@pytest.mark.slow
def test_developers_have_the_cases_under_pytest_benchmark():
    root = Path(__file__).parents[1]
    command = [
        str(Path(sys.executable).with_name("pytest")),
        "bench/",
        "--benchmark-only",
        "-q",
        "-k",
        "cpu and bandwidth",
    ]
    # it measures nothing as a worker of another pytest
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    result = subprocess.run(command, cwd=root, env=alone, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bandwidth-cpu-32,768 bytes" in result.stdout


def test_a_long_step_is_not_taken_many_times_in_a_call():
    assert make_problem((8, 16, 3), 16).steps_per_call == 16
    assert make_problem((784, 256, 128, 10), 32).steps_per_call == 1


# ---------------------------------------------------------------------- comparing


def made_report(ours, others, seed=0, *, noise=0.01, rounds=25):
    """A report with one step in which ours and another take some seconds, give or take the noise."""
    rng = np.random.default_rng(seed)
    common = np.exp(rng.normal(0, 0.05, rounds))  # what the machine does falls on both

    def entry(seconds):
        samples = list(seconds * common * np.exp(rng.normal(0, noise, rounds)))
        found = {**timing.summary(samples), "samples": samples}
        return {
            "device_seconds": None, "wall_seconds": found, "setup_seconds": None, "units": 1, "against": None,
            "over_base": None,
        }  # fmt: skip

    row = {
        "suite": "step", "case": "3-4-2, batch 5", "device": "cpu", "dtype": "float32", "size": {}, "flops": 1, "bytes": 1,
        "base": "gpubackprop", "left_out": {}, "wrong": {}, "instances": 1, "noise_floor": 1.01,
        "candidates": {"gpubackprop": entry(ours), "numpy": entry(others)},
    }  # fmt: skip
    cpu = {
        "name": "<c>", "processors": 2, "threads": 1, "cache_bytes": {}, "megahertz": None, "governor": None, "load": [],
    }  # fmt: skip
    environment = {
        "host": "h", "cpu": cpu, "gpus": [], "blas": [], "python": "3", "platform": "p", "tf32": {}, "commit": "abc",
        "packages": {"gpubackprop": "1", "numpy": str(seed)},
    }  # fmt: skip
    return {**report.new_report(cases.Settings(sizes.DRY, ()), environment, []), "rows": [row]}


def test_a_regression_is_found():
    lines, slower = compare.compare_reports([made_report(1.0, 2.0), made_report(1.2, 2.0, 1)], 0.05)
    assert slower == 1
    assert any("SLOWER" in line for line in lines)
    assert any("numpy: 0 in a, 1 in b" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_slower_machine_is_no_regression():
    _, slower = compare.compare_reports([made_report(1.0, 2.0), made_report(1.3, 2.6, 1)], 0.05)
    assert slower == 0


def test_a_change_below_the_threshold_is_none():
    reports = [made_report(1.0, 2.0), made_report(1.03, 2.0, 1)]
    assert compare.compare_reports(reports, 0.05)[1] == 0
    assert compare.compare_reports(reports, 0.01)[1] == 1


def test_what_became_faster_is_said():
    lines, slower = compare.compare_reports([made_report(1.2, 2.0), made_report(1.0, 2.0, 1)], 0.05)
    assert slower == 0
    assert any("FASTER" in line for line in lines)


def test_noise_is_rarely_called_a_regression():
    """At 5 % and no threshold, of 100 equal pairs at most 15 are: 15 or more is 1 in 10^4."""
    slower = sum(
        compare.compare_reports([made_report(1.0, 2.0, i), made_report(1.0, 2.0, 1000 + i)], 0.0)[1] for i in range(100)
    )
    assert slower <= 15


@pytest.mark.slow
def test_compare_tells_the_shell(tmp_path):
    paths = []
    for i, ours in enumerate((1.0, 1.01, 1.5)):
        folder = tmp_path / str(i)
        folder.mkdir()
        report.write_report(made_report(ours, 2.0, i), folder)
        paths.append(str(folder))
    same = bench("compare", *paths[:2])
    assert same.returncode == 0, same.stderr
    assert "1 with no significant difference" in same.stdout
    slower = bench("compare", *paths)
    assert slower.returncode == 1
    assert bench("compare", paths[0]).returncode == 2
    (tmp_path / "old.json").write_text('{"schema": 1}')
    assert "schema 1" in bench("compare", paths[0], str(tmp_path / "old.json")).stderr
    (tmp_path / "no.json").write_text("[]")
    assert (
        "no.json is not a report of gpubackprop bench: it names no schema"
        in bench("compare", paths[0], str(tmp_path / "no.json")).stderr
    )


def test_text_of_a_report_escapes_nothing_into_the_page(tmp_path):
    made = made_report(1.0, 2.0)
    made["rows"][0]["left_out"]["<script>"] = "<b>"
    made["rows"][0]["size"] = {"layers": [3, 4, 2], "batch": 5}
    made["rows"][0]["candidates"]["numpy"]["over_base"] = {
        "median": 2.0, "low": 1.9, "high": 2.1, "verdict": "SLOWER", "clock": "wall"
    }  # fmt: skip
    page.write_page(made, tmp_path / "p.html")
    written = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<script>" not in written
    assert "&lt;c&gt;" in written
