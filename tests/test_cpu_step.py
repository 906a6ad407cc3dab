"""The compiled CPU step: the bits of its operations run one at a time, whatever the number of threads."""

import gc
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpubackprop as gb
from gpubackprop.backends.cpu import CpuStep
from gpubackprop.kernels.cpu import gemm as cpu_product
from gpubackprop.kernels.cpu import program as cpu_step
from gpubackprop.kernels.cpu import threads as cpu_threads
from gpubackprop.kernels.cpu.gemm import scratch_for
from gpubackprop.network import Data

CASES = [
    (gb.SGD(0.1), {"activation": "tanh"}),
    (
        gb.Adam(gb.OneCycle(1e-2, steps=6), clip_norm=0.1, clip_value=0.05),
        {"activation": ["gelu", "relu"], "dropout": 0.3},
    ),
    (gb.RMSprop(1e-2, momentum=0.9, centered=True), {"dtype": "float64"}),
    (gb.AdamW(1e-2), {"activation": "silu", "loss": "huber"}),
]


def make(optimizer, sizes=(12, 9, 7, 3), n=10, samples=60, weighted=False, **options):
    rng = np.random.default_rng(0)
    model = gb.MLP(sizes, **options)
    dense = model.loss.targets != "classes"
    y = rng.random((samples, sizes[-1])).astype(model.dtype) if dense else rng.integers(0, sizes[-1], samples)
    weight = rng.random(samples).astype(model.dtype) if weighted else None
    X = rng.normal(size=(samples, sizes[0])).astype(model.dtype)
    return model, model.step(n, optimizer, data=Data(X, y, weight, rng.permutation(samples)))


@pytest.mark.parametrize(("optimizer", "options"), CASES)
def test_a_step_has_the_bits_of_its_operations(optimizer, options):
    (one, eager), (two, step) = (make(optimizer, **options) for _ in range(2))
    run = step.compile()
    np.testing.assert_array_equal(two.parameters.flat, one.parameters.flat)  # compiling runs nothing
    for _ in range(5):
        eager.run_eagerly()
    run(2)
    run(3)
    np.testing.assert_array_equal(two.parameters.flat, one.parameters.flat)
    assert two.optimizer_state.counters.tolist() == [5, 50]


@pytest.fixture(autouse=True)
def many_threads(monkeypatch):
    """Memory for products by up to five threads, however few cores there are."""
    monkeypatch.setattr(cpu_product, "scratch_for", lambda dtype, threads: scratch_for(dtype, max(5, threads)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("optimizer", "options"), CASES)
def test_a_step_does_not_depend_on_the_number_of_threads(optimizer, options, weighted):
    results = []
    for threads in (1, 2, 5):
        model, step = make(optimizer, (70, 65, 130, 5), 33, 99, weighted, **options)
        step.compile()._program(3, threads)
        results.append(np.concatenate([model.parameters.flat, step.names.array("loss")]))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 150), min_size=2, max_size=4), st.integers(1, 120), st.integers(2, 5))
def test_no_shape_depends_on_the_number_of_threads(sizes, n, threads):
    results = []
    for number in (1, threads):
        model, step = make(gb.Adam(1e-2), [*sizes, 3], n, n)
        step.compile()._program(1, number)
        results.append(model.parameters.flat)
    np.testing.assert_array_equal(*results)


def test_threads_are_tried_and_the_faster_number_is_kept(monkeypatch):
    monkeypatch.setattr(cpu_threads, "available_threads", lambda: 2)
    asked = []

    class Program:
        def __init__(self, calls):
            pass

        def __call__(self, times, threads=1):
            asked.append(threads)
            now[0] += times / threads  # twice as fast with two

        def alone(self, times):
            self(times)

    now = [0.0]
    monkeypatch.setattr("gpubackprop.kernels.cpu.program.Program", Program)
    monkeypatch.setattr("gpubackprop.backends.cpu.time.perf_counter", lambda: now[0])
    run = CpuStep([], 1e9)
    for _ in range(2 * CpuStep.TRIALS + 2):
        run(1)
    assert asked == [1, 2] * CpuStep.TRIALS + [2, 2]
    asked.clear()
    small = CpuStep([], 1e4)
    for _ in range(8):
        small(100_000)
    assert asked == [1] * 8


@pytest.mark.parametrize(
    ("value", "expected"), [("1", 1), ("1,4", 1), ("", None), ("nonsense", None), ("0", None), ("1000000", None)]
)
@pytest.mark.parametrize("name", cpu_threads.VARIABLES)
def test_the_usual_variables_limit_the_threads(name, value, expected, monkeypatch):
    for other in cpu_threads.VARIABLES:
        monkeypatch.delenv(other, raising=False)
    cores = cpu_threads.available_threads.__wrapped__()
    monkeypatch.setenv(name, value)
    assert cpu_threads.available_threads.__wrapped__() == (expected or cores)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_the_affinity_mask_limits_the_threads():
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    program += "from gpubackprop.kernels.cpu.threads import available_threads; print(available_threads())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("threads", [1, 2])
def test_models_in_several_python_threads_are_independent(threads):
    results = {}

    def train(number, threads):
        model, step = make(gb.Adam(1e-2), (200, 130, 3), 50, 50, seed=number)
        run = step.compile()
        for _ in range(20):
            model.optimizer_state.counters[1] = 0
            run._program(1, threads)
        return model.parameters.flat

    expected = [train(number, 1) for number in range(4)]
    workers = [
        threading.Thread(target=lambda k=number: results.__setitem__(k, train(k, threads))) for number in range(4)
    ]  # fmt: skip
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number in range(4):
        np.testing.assert_array_equal(results[number], expected[number])


def test_a_barrier_does_not_wait_for_a_thread_that_failed():
    def fails(thread, threads, barrier, times):
        if thread == 0:
            raise KeyboardInterrupt
        left.append(cpu_threads.barrier_wait(barrier, 2))

    left = []
    team = cpu_threads.ThreadTeam()
    with pytest.raises(KeyboardInterrupt):
        team.run(fails, 1, threads=2)
    team._others.shutdown(wait=True)
    assert left == [False]


def test_a_thread_that_runs_on_after_an_interruption_holds_the_arrays(monkeypatch):
    class Interrupted:
        def run(self, function, times, threads):
            left.append(function)
            raise KeyboardInterrupt

    left = []
    monkeypatch.setattr(cpu_step, "thread_team", Interrupted)
    program = cpu_step.Program([])
    with pytest.raises(KeyboardInterrupt):
        program(2, 2)
    alive = weakref.ref(program)
    del program
    gc.collect()
    assert alive() is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own():
    program = """
import os, warnings
import numpy as np
import gpubackprop as gb
warnings.simplefilter("ignore")
run = gb.MLP([8, 9, 3]).step(4, gb.Adam()).compile()
run._program(2, 2)
child = os.fork()
run._program(2, 2)
if child:
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
