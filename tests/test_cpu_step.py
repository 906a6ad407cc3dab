"""The compiled CPU step: the bits of its operations run one at a time, whatever the number of threads."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpubackprop as gb
from gpubackprop.backends import cpu as cpu_backend
from gpubackprop.kernels.cpu import atomics
from gpubackprop.kernels.cpu import program as cpu_program
from gpubackprop.kernels.cpu import threads as cpu_threads
from gpubackprop.network import Data
from gpubackprop.step.dataflow import Access, dependencies, spans
from gpubackprop.step.state import CURSOR

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


def compiled(step, threads):
    """Return a step for a number of threads, however few cores there are and however small it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_threads, "available_threads", lambda: threads)
        for name, value in (("SHARED", 0), ("LEAST", 20), ("GRAIN", 30_000)):
            patch.setattr(cpu_backend, name, value)
        run = step.compile()
    assert run.threads == threads
    return run


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("optimizer", "options"), CASES)
def test_a_step_does_not_depend_on_the_number_of_threads(optimizer, options, weighted):
    results = []
    for threads in (1, 2, 5):
        model, step = make(optimizer, (70, 65, 130, 5), 33, 99, weighted, **options)
        run = compiled(step, threads)
        run(1)
        run(2)
        results.append(np.concatenate([model.parameters.flat, step.names.array("loss")]))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 150), min_size=2, max_size=4), st.integers(1, 120), st.integers(2, 5))
def test_no_shape_depends_on_the_number_of_threads(sizes, n, threads):
    results = []
    for number in (1, threads):
        model, step = make(gb.Adam(1e-2), [*sizes, 3], n, n)
        compiled(step, number)(1)
        results.append(model.parameters.flat)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("optimizer", "options"), CASES)
def test_the_update_by_outer_products_of_one_sample_has_the_bits_of_the_two(optimizer, options, threads):
    (one, eager), (two, step) = (make(optimizer, (20, 9, 7, 3), 1, 60, **options) for _ in range(2))
    run = compiled(step, threads)
    clipped = optimizer.clipping[0] is not None
    assert ("update_rows" in {task.kernel.function.__name__ for task in run.tasks}) != clipped
    run(30)
    for _ in range(30):
        eager.run_eagerly()
    np.testing.assert_array_equal(two.parameters.flat.view(np.uint8), one.parameters.flat.view(np.uint8))
    np.testing.assert_array_equal(two.optimizer_state.states, one.optimizer_state.states)


def test_micro_batches_do_not_depend_on_the_number_of_threads():
    results = []
    for threads in (1, 3):
        model, _ = make(gb.Adam(1e-2))
        rng = np.random.default_rng(1)
        data = Data(rng.random((90, 12), np.float32), rng.integers(0, 3, 90), None, np.arange(90))
        compiled(model.step(30, gb.Adam(1e-2), data=data, micro_batch_size=8), threads)(3)
        results.append(model.parameters.flat)
    np.testing.assert_array_equal(*results)


@pytest.mark.slow
def test_many_short_runs_by_more_threads_than_cores_have_the_bits_of_one():
    results = []
    for threads in (1, 7):
        model, step = make(gb.Adam(1e-3), (30, 40, 20, 3), 20, 20)
        run = compiled(step, threads)
        for times in [1, 2, 3, 50] * 500:
            model.optimizer_state.counters[CURSOR] = 0
            run(times)
        results.append(model.parameters.flat)
    np.testing.assert_array_equal(*results)


def test_only_large_steps_are_shared(monkeypatch):
    monkeypatch.setattr(cpu_threads, "available_threads", lambda: 6)
    assert make(gb.SGD(0.1))[1].compile().threads == 1
    shared = make(gb.SGD(0.1), (300, 200, 3), 128, 128)[1].compile()
    assert shared.threads == 6
    assert max(task.pieces for task in shared.tasks) == 6
    assert min(task.pieces for task in shared.tasks) == 1


def test_a_step_waits_for_what_it_reads_and_overwrites():
    _, step = make(gb.SGD(0.1), (4, 3, 2))
    names = [operation.name for operation in step.operations]
    assert names == [
        "gather", "gather", "matmul", "bias_activation_forward", "matmul", "bias_loss",
        "matmul", "matmul", "bias_activation_backward", "matmul", "advance", "update",
    ]  # fmt: skip
    X, y, z, h, o, loss, dW_o, dh, delta, dW, advance, update = range(12)
    assert [set(after) for after in dependencies([Access(spans(o.read), spans(o.written)) for o in step.bound()])] == [
        {
            (advance, 0),
            (dW, 0),
        },  # the cursor, and the last that reads X; the products of the update's step need not wait
        {(advance, 0), (loss, 0)},
        {(X, 1), (update, 0)},
        {(z, 1)},
        {(h, 1)},
        {(o, 1), (y, 1)},
        {(loss, 1)},
        {(loss, 1)},
        {(dh, 1)},
        {(delta, 1)},
        {(X, 1), (y, 1), (update, 0)},  # scalars that the update reads
        {(dW_o, 1), (dW, 1), (advance, 1)},
    ]


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
        run = compiled(step, threads)
        for _ in range(20):
            model.optimizer_state.counters[CURSOR] = 0
            run(1)
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


def test_an_interruption_before_a_run_leaves_nothing_running(monkeypatch):
    model, step = make(gb.SGD(0.1), (70, 65, 130, 5), 33, 99)
    run = compiled(step, 2)
    run(1)
    before = model.parameters.flat.copy()

    def interrupted(thread, times):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_walk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(1)
    time.sleep(0.05)
    np.testing.assert_array_equal(model.parameters.flat, before)
    assert not cpu_threads.crew().lock.locked()
    run(1)
    other, step = make(gb.SGD(0.1), (70, 65, 130, 5), 33, 99)
    compiled(step, 1)(2)
    np.testing.assert_array_equal(model.parameters.flat, other.parameters.flat)


def test_a_thread_that_is_late_holds_the_arrays(monkeypatch):
    _, step = make(gb.SGD(0.1), (70, 65, 130, 5), 33, 33)
    run = compiled(step, 2)
    inside, leave, helped = threading.Event(), threading.Event(), []

    def late(self, thread):
        inside.set()
        leave.wait()
        helped.append(self._entries.sum())

    with monkeypatch.context() as patch:
        patch.setattr(cpu_program.Program, "help", late)
        run(1)  # nobody helps
        assert inside.wait(10)
    alive = weakref.ref(run)
    del run
    gc.collect()
    assert alive() is not None
    leave.set()
    for _ in range(1000):
        gc.collect()
        if alive() is None:
            break
        time.sleep(0.01)
    assert helped
    assert alive() is None


def test_a_program_runs_alone_while_the_threads_are_busy():
    model, step = make(gb.SGD(0.1), (70, 65, 130, 5), 33, 99)
    other, other_step = make(gb.SGD(0.1), (70, 65, 130, 5), 33, 99)
    run = compiled(step, 2)
    with cpu_threads.crew().lock:
        run(2)
    run(1)
    compiled(other_step, 1)(3)
    np.testing.assert_array_equal(model.parameters.flat, other.parameters.flat)


@pytest.mark.parametrize("system", [sys.platform, "elsewhere"])
def test_a_sleeping_thread_is_woken(system):
    sleep, wake = atomics.sleeping_on(system)

    @numba.njit(nogil=True)
    def wait(at):
        while atomics.load(at) == 0:
            sleep(at, 0)
        return atomics.load(at)

    @numba.njit(nogil=True)
    def ring(at):
        atomics.add(at, 5)
        wake(at)

    word, seen = np.zeros(8, np.int64), []
    thread = threading.Thread(target=lambda: seen.append(wait(word.ctypes.data)))
    thread.start()
    time.sleep(0.05)
    assert not seen
    ring(word.ctypes.data)
    thread.join(60)
    assert seen == [5]
    ring(word.ctypes.data)
    assert wait(word.ctypes.data) == 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own():
    program = """
import os, warnings
import numpy as np
import gpubackprop as gb
warnings.simplefilter("ignore")
import gpubackprop.kernels.cpu.threads
gpubackprop.kernels.cpu.threads.available_threads = lambda: 2
run = gb.MLP([80, 90, 3]).step(64, gb.Adam()).compile()
assert run.threads == 2
run(2)
child = os.fork()
run(2)
if child:
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
