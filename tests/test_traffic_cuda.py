"""What the CUDA kernels move: each input read once, each output written once, by whole sectors; counted, so on an emulated device.

Beside the arrays of the operation, a block reads its bias and writes sums of its own, which are read again: a few percent
where it has many rows. Below LARGE bytes (:mod:`gpubackprop.backends.cuda.launches`) many blocks are worth more than few bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.backends import get_backend
from gpubackprop.definitions import check_dtype, real_of
from gpubackprop.losses import LOSSES
from gpubackprop.step.operations import BiasActivationBackward, BiasActivationForward, Dropout
from gpubackprop.step.state import SKIP

try:
    import ledger  # counts launches and bytes where the device is simulated; absent elsewhere
except ImportError:
    ledger = None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ledger is None or not ledger.available(), reason="no counts on this device"),
]
LARGE = 1 << 20
COLUMNS = [10, 128, 1000, 4096]
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def cuda() -> Any:
    return get_backend("cuda")


class Arrays:
    """Arrays of a matrix with d columns and at least LARGE bytes; ``m`` is its size in bytes."""

    def __init__(self, cuda: Any, dtype: str, d: int, rows: int = 1) -> None:
        self.cuda, self.dtype, self.d = cuda, check_dtype(dtype), d
        self.real = real_of(self.dtype)
        self.n = max(rows, -(-LARGE // (d * self.dtype.itemsize)))
        self.m = self.n * d * self.dtype.itemsize
        self.rng = np.random.default_rng(d)

    def new(self, *shape: int, real: bool = False) -> Any:
        shape = shape or (self.n, self.d)
        dtype = self.real if real else self.dtype
        return self.cuda.asarray(self.rng.standard_normal(shape, np.float32).astype(dtype))


def count(cuda: Any, run: Callable[[], object]) -> Any:
    """Return the counts of a warm run."""
    run()
    cuda.synchronize()  # what was queued before does not count
    with ledger.record() as record:
        run()
        cuda.synchronize()
    return record


def check(cuda: Any, run: Callable[[], object], floor: float, most: float = 1.05, *, anywhere: bool = False) -> None:
    """Assert that the kernels move at most ``most`` times the floor, by whole sectors, and touch no local memory.

    ``anywhere``: what is read lies in rows anywhere, whose ends share sectors with other rows.
    """
    kernels = count(cuda, run).kernels.values()
    moved = sum(k.bytes_read + k.bytes_written for k in kernels)
    assert floor <= moved <= most * floor, f"{moved / floor:.3f} times the floor"
    largest = max(kernels, key=lambda k: k.bytes_read + k.bytes_written)
    assert (largest.coalescing_write if anywhere else largest.coalescing) >= 0.95
    assert largest.local_accesses == 0


@pytest.mark.parametrize("d", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
class TestPasses:
    def test_forward(self, dtype: str, d: int, cuda: Any) -> None:
        a = Arrays(cuda, dtype, d)
        z, b, out = a.new(), a.new(d), a.new()
        bias = b.nbytes
        check(cuda, lambda: cuda.bias_activation_forward(z, b, ACTIVATIONS["relu"], out=z), 2 * a.m + bias)
        check(cuda, lambda: cuda.bias_activation_forward(z, b, ACTIVATIONS["gelu"], out=out), 3 * a.m + bias)

    def test_backward(self, dtype: str, d: int, cuda: Any) -> None:
        a = Arrays(cuda, dtype, d)
        dh, h, out, db = a.new(), a.new(), a.new(), a.new(d, real=True)
        relu = ACTIVATIONS["relu"]
        check(cuda, lambda: cuda.bias_activation_backward(dh, None, h, relu, out=out, db=db), 3 * a.m + db.nbytes)

    def test_dropout_on_the_way(self, dtype: str, d: int, cuda: Any) -> None:
        a = Arrays(cuda, dtype, d)
        z, b, dropped, db = a.new(), a.new(d), a.new(), a.new(d, real=True)
        counters = cuda.zeros((2,), np.int64)
        relu, launches = ACTIVATIONS["relu"], cuda._launches
        after = Dropout(z, 0.3, 1, 0, counters, dropped)
        forward = launches.bias_activation_forward(BiasActivationForward(z, b, relu, z), after)
        check(cuda, lambda: cuda._run(forward), 3 * a.m + b.nbytes)
        before = Dropout(dropped, 0.3, 1, 0, counters, dropped)
        backward = launches.bias_activation_backward(
            BiasActivationBackward(dropped, None, z, relu, dropped, db), before
        )
        check(cuda, lambda: cuda._run(backward), 3 * a.m + db.nbytes)

    def test_dropout_and_gather(self, dtype: str, d: int, cuda: Any) -> None:
        a = Arrays(cuda, dtype, d)
        source, out, counters = a.new(), a.new(), cuda.zeros((2,), np.int64)
        order = cuda.asarray(a.rng.permutation(a.n))
        check(cuda, lambda: cuda.dropout(source, 0.3, 1, 0, counters, out=out), 2 * a.m)
        check(cuda, lambda: cuda.gather(source, order, counters, out), 2 * a.m + order.nbytes, anywhere=d == 10)

    @pytest.mark.parametrize("name", ["softmax_cross_entropy", "sigmoid_cross_entropy", "mean_squared_error"])
    def test_losses(self, name: str, dtype: str, d: int, cuda: Any, monkeypatch: Any) -> None:
        softmax = name == "softmax_cross_entropy"
        rows = 1
        if softmax and d > 256:
            # A block holds rows in registers and reads the bias and leaves sums for itself: 12 bytes a column, and a row
            # is 8 or 4. That is a few percent from 64 rows to a block on; here on a device of two multiprocessors.
            monkeypatch.setattr(cuda._launches, "blocks", 8)
            rows = 1024 if d == 1000 else 256
        a = Arrays(cuda, dtype, d, rows)
        z, b, db, value = a.new(), a.new(d), a.new(d, real=True), cuda.zeros((2,), np.float64)
        y = cuda.asarray(a.rng.integers(0, d, a.n)) if softmax else a.new(real=True)
        run = lambda: cuda.bias_loss(z, b, y, LOSSES[name], out=z, db=db, value=value)  # noqa: E731
        check(cuda, run, 2 * a.m + y.nbytes + b.nbytes + db.nbytes)


@pytest.mark.parametrize("weights", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", [gb.SGD(0.1), gb.SGD(0.1, momentum=0.9), gb.Adam(), gb.AdamW(), gb.RMSprop()])
def test_updates(optimizer: Any, weights: str | None, cuda: Any) -> None:
    size = LARGE // 4
    p, g, states = (cuda.zeros(shape, "f4") for shape in (size, size, (optimizer.n_states, size)))
    scalars = np.ones(8, np.float32)
    scalars[SKIP] = 0
    scalars = cuda.asarray(scalars)
    copy = None if weights is None else cuda.zeros((size,), check_dtype(weights))
    floor = 3 * p.nbytes + 2 * states.nbytes + (0 if copy is None else copy.nbytes)
    check(cuda, lambda: cuda.update(optimizer, p, g, states, scalars, copy), floor)


def test_norms_and_sums_over_the_flat_gradient(cuda: Any) -> None:
    g, total, scalars = cuda.zeros((LARGE // 4,), "f4"), cuda.zeros((LARGE // 4,), "f4"), cuda.zeros((8,), "f4")
    moved = sum(k.bytes_read for k in count(cuda, lambda: cuda.clip(g, 1.0, scalars)).kernels.values())
    assert g.nbytes <= moved <= 1.05 * g.nbytes
    check(cuda, lambda: cuda.accumulate(total, g, total), 3 * g.nbytes)
    check(cuda, lambda: cuda.accumulate(None, g, total), 2 * g.nbytes)


@pytest.mark.parametrize("d", [10, 128])
def test_a_warp_meets_each_bank_of_shared_memory_once(d: int, cuda: Any) -> None:
    a = Arrays(cuda, "bfloat16", d)
    z, b, db, value = a.new(), a.new(d), a.new(d, real=True), cuda.zeros((2,), np.float64)
    y = cuda.asarray(a.rng.integers(0, d, a.n))
    run = lambda: cuda.bias_loss(z, b, y, LOSSES["softmax_cross_entropy"], out=z, db=db, value=value)  # noqa: E731
    tile = count(cuda, run).kernels["_tile_"]
    assert tile.bank_conflicts <= 0.01 * tile.shared_wavefronts
