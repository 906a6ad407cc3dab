"""The GPU's benchmark: its arithmetic with a clock of the test's own, and a tiny run with the promised report."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpubackprop.backends.diagnosis import cuda_problem

BENCH = Path(__file__).parents[1] / "bench"
PROBLEM = cuda_problem()


@pytest.fixture(scope="module")
def timing():
    specification = importlib.util.spec_from_file_location("bench_timing", BENCH / "timing.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["bench_timing"] = module  # where dataclasses look their annotations up
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def bench_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


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


def test_times_are_per_unit_and_fill_the_seconds_asked_for(timing):
    clock = FakeClock()
    timer = timing.WallTimer(lambda: None, clock)
    contestants = [
        timing.Contestant("a", clock.job("a", 0.5), timer),
        timing.Contestant("b", clock.job("b", 3.0), timer, units=3),
    ]
    samples = timing.measure(contestants, rounds=4, seconds=1.0)
    assert [s.wall for s in samples["a"]] == [0.5] * 4
    assert [s.wall for s in samples["b"]] == [1.0] * 4
    assert clock.log == ["a"] * 2 + ["b"] * 2 + ["a", "a", "b"] * 4  # warmed up, then in turn


def test_what_was_queued_before_is_waited_for_outside_the_time(timing):
    clock = FakeClock()
    waits = [7.0, 2.0]

    def synchronize():
        clock.now += waits.pop(0)

    assert timing.WallTimer(synchronize, clock)(clock.job("a", 1.0), 3).wall == 5.0


def test_repeats_are_bounded(timing):
    assert timing.repeats_for(0.0, 1.0) == timing.MOST_REPEATS
    assert timing.repeats_for(2.0, 1.0) == 1
    assert timing.repeats_for(0.25, 1.0) == 4


def test_summary_gives_quartiles(timing):
    assert timing.summary([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert timing.summary([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0, "n": 1}


def test_device_time_is_not_given_where_a_sample_lacks_it(timing):
    found = timing.summaries([timing.Sample(1.0, 2.0), timing.Sample(None, 2.0)])
    assert found["device_seconds"] is None
    assert found["wall_seconds"]["median"] == 2.0


def test_ratio_is_of_pairs_and_says_when_it_may_be_1(timing):
    rng = np.random.default_rng(0)
    drift = 1 + np.arange(25)
    a = [timing.Sample(2.0 * d, 9.0) for d in drift]
    b = [timing.Sample(1.0 * d, 9.0) for d in drift]
    found = timing.ratio(a, b)
    assert found == {"median": 2.0, "low": 2.0, "high": 2.0, "significant": True, "clock": "device"}
    noisy = [[timing.Sample(None, w) for w in rng.uniform(0.9, 1.1, 25)] for _ in range(2)]
    found = timing.ratio(*noisy)
    assert found["clock"] == "wall"
    assert found["low"] <= 1 <= found["high"]
    assert not found["significant"]
    assert timing.ratio(a, noisy[0])["clock"] == "wall"


def test_without_a_gpu_the_command_says_why():
    if PROBLEM is None:
        pytest.skip("there is a GPU")
    result = run("--dry")
    assert result.returncode == 2
    assert PROBLEM in result.stderr


def run(*arguments):
    command = [sys.executable, str(BENCH / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "r.json"
    result = run("--dry", "--dtype", "float32,tf32", "--out", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(out.read_text()), result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
class TestDryRun:
    def test_the_report_says_what_the_numbers_depend_on(self, report):
        found, _ = report
        assert found["schema"] == 1
        assert found["dry"]
        assert not found["interrupted"]
        assert {"gpu", "cuda_driver", "cublas", "packages", "tf32", "commit", "now"} <= set(found["environment"])
        assert found["copy"]["bytes_per_second"] > 0
        assert isinstance(found["epilogues"], list)

    def test_every_kernel_is_right_and_timed(self, report):
        found, _ = report
        assert len(found["kernels"]) == 17
        for row in found["kernels"]:
            assert "error" not in row
            assert {"fused", "eager", "copy", "unfused"} == set(row["times"]), row["left_out"]
            assert row["bytes_per_second"] > 0
            assert row["share_of_copy_bandwidth"] > 0
            assert row["unfused_over_fused"]["low"] <= row["unfused_over_fused"]["high"]

    def test_every_step_is_timed_or_has_its_reason(self, report):
        found, _ = report
        float32, tf32 = found["steps"]
        names = {"products", "eager", "captured", "K steps per launch", "plain CuPy"}
        assert names <= set(float32["times"]) | set(float32["left_out"])
        assert {"eager", "captured"} <= set(tf32["times"])
        for row in (float32, tf32):
            for name in ("torch eager", "torch compile", "torch graph", "jax jit"):
                assert name in row["times"] or row["left_out"][name]
            for name in row["times"]:
                assert row["share_of_products"][name]["median"] > 0

    def test_tables_fit_in_100_columns(self, report):
        _, text = report
        table = text[text.index("\nKernels") : text.index("\nwritten")]
        assert max(map(len, table.splitlines())) <= 100
        assert "dry run" in text


@pytest.mark.gpu
@pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
def test_a_wrong_kernel_gets_no_time(bench_path):
    import cupy
    import gpu_kernel_times
    import gpu_kernels

    import gpubackprop as gb

    backend, stream = gb.get_backend("cuda"), cupy.cuda.Stream(non_blocking=True)
    case = next(iter(gpu_kernels.cases(backend, "float32", "quick", dry=True)))

    def expected(a):
        case.unfused(a)
        a["out"][3, 2] += 1e-4

    case.expected = expected
    row = gpu_kernel_times.time_kernel(backend, case, stream, 1e9, 2, 0.0, dry=True)
    assert "differs" in row["error"]
    assert "times" not in row


@pytest.mark.gpu
@pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
def test_arrays_of_16_bits_are_compared_in_float64(bench_path):
    import cupy
    import gpu_kernels
    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16):
        a = cupy.asarray(np.array([1.5, -2.0], dtype))
        wide = gpu_kernels.copied({"a": a, "b": a, "y": cupy.arange(2)}, np.dtype(np.float64))
        assert wide["a"] is wide["b"]
        assert wide["a"].dtype == np.float64
        assert wide["y"].dtype == np.int64
        np.testing.assert_array_equal(cupy.asnumpy(wide["a"]), [1.5, -2.0])


@pytest.mark.gpu
@pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
def test_a_step_that_trains_otherwise_gets_no_time(bench_path):
    import cupy
    import gpu_steps

    import gpubackprop as gb

    def peers(problem, units):
        yield "torch eager", "not installed"

        def wrong():
            one = gpu_steps.plain_cupy(problem, stream, np.dtype(np.float32))
            return gpu_steps.Trained("wrong", one.run, 1, lambda: one.loss() + 0.1, one.timer)

        yield "wrong", wrong
        yield "broken", lambda: 1 / 0

    stream = cupy.cuda.Stream(non_blocking=True)
    problem = gpu_steps.make_problem((12, 16, 8, 3), 16, "float32")
    row = gpu_steps.time_step(gb.get_backend("cuda"), problem, stream, peers, 2, 0.0)
    assert set(row["left_out"]) == {"torch eager", "wrong", "broken"}
    assert "its loss after" in row["left_out"]["wrong"]
    assert "ZeroDivisionError" in row["left_out"]["broken"]
    assert "wrong" not in row["times"]
    assert "captured" in row["times"]


@pytest.mark.gpu
@pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
def test_peers_take_the_same_steps_as_plain_cupy(bench_path):
    """On the CPU, since here only their mathematics is in question."""
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    import cupy
    import gpu_peers
    import gpu_steps

    problem = gpu_steps.make_problem((12, 16, 8, 3), 16, "float32")
    stream = cupy.cuda.Stream.null
    peers = [
        gpu_steps.plain_cupy(problem, stream, np.dtype(np.float32)),
        gpu_peers.torch_step(problem, "torch eager", "cpu"),
        gpu_peers.torch_step(problem, "torch compile", "cpu", compiler="eager"),
        gpu_peers.jax_step(problem, "jax jit", 4, "cpu"),
        gpu_peers.jax_step(problem, "jax jit, K steps per launch", 4, "cpu"),
    ]
    losses = []
    for peer in peers:
        for _ in range(8 // peer.units):
            peer.run()
        losses.append(peer.loss())
        assert peer.timer(lambda: None, 1).wall >= 0
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
