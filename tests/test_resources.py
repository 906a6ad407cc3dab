"""Thousands of fits in one process neither leak nor slow down; without memory there is an error, and the model stays usable."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import gpubackprop as gb


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def some_fits(count: int, device: str, folder: Path | None = None) -> list[float]:
    """Fit new networks of several shapes, one after another; return the seconds that each took."""
    rng, seconds = np.random.default_rng(0), []
    X, y = rng.normal(size=(64, 6)).astype(np.float32), rng.integers(0, 3, 64)
    for i in range(count):
        started = time.perf_counter()
        model = gb.MLP([6, 5 + i % 4, 3], "tanh", device=device, seed=i)
        keep = {} if folder is None else {"checkpoint": folder, "overwrite": True}
        model.fit(X, y, epochs=2, batch_size=16 + i % 3, optimizer=("sgd", "adam")[i % 2], progress=False, **keep)
        model.predict(X)
        model.evaluate(X, y)
        model.loss_and_gradients(X, y)
        seconds.append(time.perf_counter() - started)
    return seconds


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("device", "count", "bound"),  # bytes a fit: its parameters take 400, its step some 10,000
    [("cpu", 400, 10_000), ("reference", 60, 10_000), pytest.param("cuda", 24, 100_000, marks=pytest.mark.gpu)],
)
def test_many_fits_neither_leak_nor_slow_down(device: str, count: int, bound: int) -> None:
    some_fits(max(12, count // 4), device)  # compiles, and fills what is kept; there are twelve kinds
    gc.collect()
    before, threads, files = resident(), threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    seconds = some_fits(count, device)
    gc.collect()
    assert (resident() - before) / count < bound
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) <= files
    quarter = count // 4  # the least of each: what slows down does so at every call, other programs only at some
    assert min(seconds[-quarter:]) < 2 * min(seconds[:quarter])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_thousands_of_fits_with_checkpoints_neither_leak_nor_slow_down(tmp_path: Path) -> None:
    some_fits(300, "cpu", tmp_path)
    gc.collect()
    before, files = resident(), len(list(Path("/proc/self/fd").iterdir()))
    seconds = some_fits(4000, "cpu", tmp_path)
    gc.collect()
    assert (resident() - before) / 4000 < 2_000
    assert len(list(Path("/proc/self/fd").iterdir())) <= files
    assert np.median(seconds[-1000:]) < 1.5 * np.median(seconds[:1000])


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_host_without_memory_is_an_error_that_leaves_the_model_usable() -> None:
    code = """
import resource, numpy as np, gpubackprop as gb
model = gb.MLP([400, 8, 3])
X, y = np.ones((50, 400), np.float32), np.arange(50) % 3
model.fit(X, y, epochs=1, progress=False)
before, expected = model.parameters.flat.copy(), model.predict_proba(X)
large = np.ones((200_000, 1), np.uint8) * np.ones((1, 400), np.uint8)  # 80 MB, 320 MB as float32
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, -1))
for call in (
    lambda: model.fit(large, np.zeros(len(large), int), epochs=1, progress=False),
    lambda: model.predict(large),
    lambda: model.evaluate(large, np.zeros(len(large), int)),
    lambda: model.forward(large),
    lambda: model.step(10**6),
    lambda: gb.MLP([10**5, 10**4, 3]),
):
    try:
        call()
    except MemoryError as error:
        print(" ".join(str(error).split()))
assert np.array_equal(model.parameters.flat, before) and np.array_equal(model.predict_proba(X), expected)
model.fit(X, y, epochs=1, progress=False)
print("usable")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.splitlines()
    assert last == "usable"
    assert len(errors) == 6
    for error, what in zip(errors, ["X as float32"] * 4 + ["an array of shape", "the parameters"], strict=True):
        assert f"bytes for {what}" in error
        assert "cannot be allocated on" in error
