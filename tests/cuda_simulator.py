"""Runs the CUDA kernels' Python source in Numba's simulator, block by block, against the reference: no device, no compiler.

Run by ``test_kernels_cuda_simulator.py`` in a process of its own, since Numba decides on import whether it simulates:
``NUMBA_ENABLE_CUDASIM=1 python cuda_simulator.py passes``. Blocks are small, since each thread is a thread of Python.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numba import cuda

sys.path.insert(0, str(Path(__file__).parent))

from tolerances import assert_within, eps, sum_tolerance

from gpubackprop import SGD, Adam, schedules
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.backends.base import FACTOR, NORM
from gpubackprop.backends.reference import ReferenceBackend
from gpubackprop.kernels import cuda as passes
from gpubackprop.kernels import cuda_loss, cuda_softmax, cuda_training
from gpubackprop.kernels.cuda_vector import STORAGE, access, compute_type
from gpubackprop.losses import LOSSES
from gpubackprop.philox import keep_threshold, split_seed

THREADS = 32
REFERENCE = ReferenceBackend()
RNG = np.random.default_rng(1)
F4, F8 = np.dtype(np.float32), np.dtype(np.float64)


def launch(source: Any, grid: tuple[int, int], block: tuple[int, int], *arguments: Any) -> list[np.ndarray]:
    """Run a kernel on flat copies of the arrays, one copy for an array given twice; return all of them, as they became."""
    arrays = {id(a): cuda.to_device(a.ravel().copy()) for a in arguments if isinstance(a, np.ndarray)}
    cuda.jit(source.function)[grid, block](*[arrays.get(id(a), a) for a in arguments])
    return [arrays[id(a)].copy_to_host() for a in arguments if isinstance(a, np.ndarray)]


def close(actual: np.ndarray, expected: np.ndarray, extra: Any = 0.0) -> None:
    """Assert equality within 16 eps of the largest element: the same formulas, on scalars instead of arrays."""
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
    assert_within(actual.reshape(expected.shape), expected, 16 * eps(expected.dtype) * scale + extra)


def normal(shape: Any, dtype: np.dtype[Any]) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def passes_of(name: str, dtype: np.dtype[Any], width: int, n: int, d: int) -> None:
    activation = ACTIVATIONS[name]
    z, b, dh = normal((n, d), dtype), normal(d, dtype), normal((n, d), dtype)
    z[0, 0] = np.nan
    o = z.copy()
    h = REFERENCE.bias_activation_forward(o, b, activation)
    delta, db = REFERENCE.bias_activation_backward(dh, o, h, activation)
    block = passes.block_shape(-(-d // width), threads=THREADS)
    grid = (-(-d // (block[0] * width)), 2)

    source = passes.bias_activation_forward(activation, dtype, width, True, THREADS)
    z_new, _, h_new = launch(source, grid, block, z, b, np.zeros_like(z), n, d)
    close(z_new, o)
    close(h_new, h)
    source = passes.bias_activation_forward(activation, dtype, width, False, THREADS)
    close(launch(source, grid, block, z, b, z, n, d)[2], h)

    partial = np.full((2, d), np.nan, dtype)
    source = passes.bias_activation_backward(activation, dtype, width, THREADS)
    out = launch(source, grid, block, dh, h if activation.needs == "h" else o, dh, partial, n, d)
    close(out[2], delta)
    bx, by = passes.block_shape(d, passes.SUM_COLUMNS, THREADS)
    source = passes.column_sum(dtype, THREADS)
    sums = launch(source, (-(-d // bx), 1), (bx, by), out[3], np.full(d, np.nan, dtype), 2, d)[1]
    close(sums, db, sum_tolerance(delta, dtype, axis=0))


def check_passes() -> None:
    passes_of("relu", F4, 4, 13, 24)
    passes_of("gelu", F4, 1, 9, 5)
    passes_of("tanh", F8, 2, 9, 6)
    passes_of("mish", F8, 1, 37, 1)


def loss_of(loss: Any, dtype: np.dtype[Any], n: int, d: int, indices: bool, weighted: bool, width: int = 1) -> None:
    z, b, weight = 2 * normal((n, d), dtype), normal(d, dtype), RNG.random(n).astype(dtype)
    y = RNG.integers(0, d, n) if indices else RNG.dirichlet(np.ones(d), n).astype(dtype)
    o = z.copy()
    value, do, db = REFERENCE.bias_loss(o, b, y, loss, weight if weighted else None)
    scale = loss.scale(n, d, weighted)
    for keep in (True, False):
        out = np.zeros_like(z) if keep else z
        inputs = (z, b, y, weight, out)
        if loss.family == "softmax" and d > 40:  # the limit is 256 on a device
            source = cuda_softmax.softmax_loss_block(loss, dtype, width, indices, weighted, keep, THREADS)
            losses = np.full(2, np.nan, dtype)
            results = launch(source, (2, 1), (THREADS, 1), *inputs, losses, dtype.type(scale), dtype.type(1 / d), n, d)
            losses, partial, rows = results[5], results[4], n
        else:
            partial, losses = np.full((2, d), np.nan, dtype), np.full(8, 0, dtype)
            if loss.family == "softmax":
                source = cuda_softmax.softmax_loss_warp(loss, dtype, d, indices, weighted, keep, THREADS)
                grid, block, more = (1, 2), cuda_softmax.warp_shape(d, THREADS), (dtype.type(1 / d),)
            else:
                source = cuda_loss.elementwise_loss(loss, dtype, width, weighted, keep, THREADS)
                block, more = passes.block_shape(-(-d // width), threads=THREADS), ()
                grid = (-(-d // (block[0] * width)), 2)
            results = launch(source, grid, block, *inputs, partial, losses, dtype.type(scale), *more, n, d)
            partial, losses, rows = results[5], results[6], 2
        close(results[4], do)
        if keep:
            close(results[0], o)
        bx, by = passes.block_shape(d, passes.SUM_COLUMNS, THREADS)
        total = np.array([0.0, 5.0])
        growth = float(n) if loss.reduction == "mean" else 1.0
        finished = launch(
            cuda_loss.finish_loss(dtype, THREADS), (-(-d // bx) + 1, 1), (bx, by),
            partial, np.full(d, np.nan, dtype), losses, total, scale, growth, rows, d, len(losses),
        )  # fmt: skip
        close(finished[1], db, sum_tolerance(do, dtype, axis=0))
        slack = 64 * eps(dtype) * np.abs(value[0]) + eps(dtype)
        assert_within(finished[3], [value[0], value[1] + 5.0], [slack, (1 + growth) * slack])


def check_losses() -> None:
    cross_entropy = LOSSES["softmax_cross_entropy"](label_smoothing=0.1)
    loss_of(LOSSES["mean_squared_error"], F4, 5, 8, False, True, width=4)
    loss_of(LOSSES["huber"](reduction="sum"), F8, 7, 3, False, False)
    loss_of(cross_entropy, F4, 5, 3, True, True)
    loss_of(LOSSES["kl_divergence"], F8, 3, 37, False, False)


def check_softmax_blocks() -> None:
    cross_entropy = LOSSES["softmax_cross_entropy"](reduction="sum")
    loss_of(cross_entropy, F4, 3, 64, True, False, width=4)
    loss_of(LOSSES["kl_divergence"], F8, 3, 45, False, True)


def check_training() -> None:
    for dtype, width, n in ((F4, 4, 43), (F8, 2, 40), (F8, 1, 1)):
        x, counters = normal(n, dtype), np.array([7, 2])
        expected = REFERENCE.dropout(x, 0.3, 2**40 + 3, 1, counters)
        numbers = (keep_threshold(0.3), dtype.type(1 / 0.7), *split_seed(2**40 + 3), 1, n, 0)
        source = cuda_training.dropout(dtype, width, THREADS)
        np.testing.assert_array_equal(launch(source, (2, 1), (8, 1), x, x, counters, *numbers)[1], expected)

        weight = RNG.random(n).astype(dtype)
        source = cuda_training.normalize_weights(dtype, THREADS)
        close(launch(source, (1, 1), (THREADS, 1), weight, weight, n)[1], REFERENCE.normalize_weights(weight))

        scalars = np.ones(8, dtype)
        REFERENCE.clip(x, 0.5, scalars)
        partial = launch(cuda_training.sum_of_squares(dtype, THREADS), (2, 1), (THREADS, 1), x, np.zeros(2, dtype), n)[
            1
        ]
        source = cuda_training.clip(dtype, THREADS)
        result = launch(source, (1, 1), (THREADS, 1), partial, np.ones(8, dtype), dtype.type(0.5), 2)[1]
        np.testing.assert_allclose(result[[NORM, FACTOR]], scalars[[NORM, FACTOR]], rtol=16 * eps(dtype))

    source, order, counters = normal((9, 8), F4), RNG.permutation(9), np.array([0, 3])
    kernel = cuda_training.gather("f4", 4)
    out = launch(kernel, (1, 2), (2, 4), source, order, counters, np.zeros((5, 8), F4), 9, 9, 5, 8)[3]
    np.testing.assert_array_equal(out.reshape(5, 8), source[order[3:8]])


def check_update() -> None:
    for optimizer, dtype, width, size in (
        (SGD(schedules.OneCycle(0.1, steps=4), momentum=0.9, clip_value=0.5), F4, 4, 39),
        (Adam(schedules.Cosine(0.1, steps=4), amsgrad=True), F8, 2, 40),
    ):
        p, states = normal(size, dtype), np.zeros((optimizer.n_states, size), dtype)
        rate, counters, scalars = np.array([0.1]), np.zeros(2, np.int64), np.ones(8, dtype)
        on = [p, states, counters, scalars]
        for _ in range(2):
            g = normal(size, dtype)
            _, on[2], on[3] = launch(cuda_training.advance(optimizer, dtype), (1, 1), (1, 1), rate, on[2], on[3], 5)
            source = cuda_training.update(optimizer, dtype, width)
            on[0], _, on[1], _ = launch(source, (2, 1), (8, 1), on[0], g, on[1], on[3], size)
            REFERENCE.advance(optimizer, rate, 5, counters, scalars)
            REFERENCE.update(optimizer, p, g, states, scalars)
        np.testing.assert_array_equal(on[2], counters)
        for result, expected in zip((on[0], on[1], on[3]), (p, states, scalars), strict=True):
            close(result, expected)


def check_storage() -> None:
    import ml_dtypes

    for storage, width in (("f4", 4), ("f8", 2), ("f2", 8), ("bf16", 8), ("i8", 1), ("bf16", 1)):
        load, store, load1, store1 = access(storage, width)
        x = np.array([0.0, -1.5, 3.14159, np.inf, 65280.0, 1e-6, -np.inf, 7.0]).astype(compute_type(storage))
        if storage == "i8":
            x = np.arange(8)
        stored = np.zeros(8, STORAGE[storage])
        for i in range(0, 8, width):
            store(stored, i, x, i)
        expected = x.astype(ml_dtypes.bfloat16).view(np.uint16) if storage == "bf16" else x.astype(STORAGE[storage])
        np.testing.assert_array_equal(stored, expected)
        buffer = np.zeros(width, x.dtype)
        load(buffer, 0, stored, 8 - width)
        assert buffer[-1] == load1(stored, 7) == x[7]
        store1(stored, 0, x.dtype.type(1))
        assert load1(stored, 0) == 1
        if storage != "i8":
            store1(stored, 0, x.dtype.type(np.nan))
            assert np.isnan(load1(stored, 0))


CHECKS = {
    function.__name__.removeprefix("check_"): function
    for function in (check_passes, check_losses, check_softmax_blocks, check_training, check_update, check_storage)
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the simulator's threads do not inherit np.errstate
    CHECKS[sys.argv[1]]()
