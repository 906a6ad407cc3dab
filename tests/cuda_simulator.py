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

sys.path.insert(0, str(Path(__file__).parent))

from tolerances import assert_within, eps, sum_tolerance

from gpubackprop import SGD, Adam, schedules
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.backends.reference import ReferenceBackend
from gpubackprop.definitions import check_dtype, eps_of, real_of
from gpubackprop.kernels.cuda import loss as cuda_loss
from gpubackprop.kernels.cuda import passes
from gpubackprop.kernels.cuda import softmax as cuda_softmax
from gpubackprop.kernels.cuda import softmax_rows as cuda_softmax_rows
from gpubackprop.kernels.cuda import training as cuda_training
from gpubackprop.kernels.cuda.access import STORAGE, access, compute_type
from gpubackprop.kernels.cuda.compile import Source
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.unroll import numbered
from gpubackprop.losses import LOSSES
from gpubackprop.philox import keep_threshold, split_seed
from gpubackprop.step.state import FACTOR, GOOD, GROW_AFTER, NORM, SCALE, SKIP

THREADS = 32
REFERENCE = ReferenceBackend()
RNG = np.random.default_rng(1)
F4, F8, F2, BF16 = (check_dtype(name) for name in ("float32", "float64", "float16", "bfloat16"))


def launch(kernel: Source, grid: tuple[int, int], block: tuple[int, int], /, **arguments: Any) -> dict[str, np.ndarray]:
    """Run a kernel on flat copies of the arrays, one copy for an array given twice; return all by name, as they became.

    A bfloat16 array goes in as whole numbers of 16 bits, as on a device.
    """
    given = {name: a for name, a in arguments.items() if isinstance(a, np.ndarray)}
    arrays = {id(a): a.ravel().copy() for a in given.values()}
    there = {key: cuda.to_device(a.view(np.uint16) if a.dtype == BF16 else a) for key, a in arrays.items()}
    cuda.jit(kernel.function)[grid, block](*[there.get(id(a), a) for a in kernel.arguments(arguments)])
    return {name: there[id(a)].copy_to_host().view(a.dtype) for name, a in given.items()}


def close(actual: np.ndarray, expected: np.ndarray, extra: Any = 0.0) -> None:
    """Assert equality within 16 eps of the largest element: the same formulas, on scalars instead of arrays."""
    finite = np.abs(expected[np.isfinite(expected)].astype(np.float64))
    assert_within(
        actual.reshape(expected.shape), expected, 16 * eps_of(expected.dtype) * finite.max(initial=1e-30) + extra
    )


def normal(shape: Any, dtype: np.dtype[Any]) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def mask_of(real: np.dtype[Any], counters: Any = None) -> dict[str, Any]:
    """Return the arguments by which kernels make a mask."""
    if counters is None:
        counters, numbers = np.zeros(2, np.int64), (0, real.type(1), 0, 0, 0, 0)
    else:
        numbers = keep_threshold(0.3), real.type(1 / 0.7), *split_seed(2**40 + 3), 1, 5
    return {
        "counters": counters,
        **dict(zip(("bound", "scale", "low", "high", "layer", "first"), numbers, strict=True)),
    }


def passes_of(name: str, dtype: np.dtype[Any], width: int, n: int, d: int) -> None:
    activation, real = ACTIVATIONS[name], real_of(dtype)
    z, b, dh = normal((n, d), dtype), normal(d, dtype), normal((n, d), dtype)
    z[0, 0] = np.nan
    o = z.copy()
    h = REFERENCE.bias_activation_forward(o, b, activation)
    delta, db = REFERENCE.bias_activation_backward(dh, o, h, activation)
    rows = passes.rows_of_line(width, d)
    line, size = d * rows, n * d
    block = passes.block_shape(-(-line // width), threads=THREADS)
    grid = (-(-line // (block[0] * width)), 2)
    cut = {"size": size, "line": line}
    plain = mask_of(real)

    source = passes.bias_activation_forward(activation, dtype, width, True, threads=THREADS)
    new = launch(source, grid, block, z=z, b=b, out=np.zeros_like(z), dropped=z, **plain, **cut, d=d)
    close(new["z"], o)
    close(new["out"], h)
    source = passes.bias_activation_forward(activation, dtype, width, False, threads=THREADS)
    close(launch(source, grid, block, z=z, b=b, out=z, dropped=z, **plain, **cut, d=d)["out"], h)

    partial, tickets = np.full((2, line), np.nan, real), np.zeros(grid[0], np.int64)
    s = h if activation.needs == "h" else o
    source = passes.bias_activation_backward(activation, dtype, width, threads=THREADS)
    sums = {"partial": partial, "db": np.zeros(line, real), "tickets": tickets}
    out = launch(source, grid, block, dh=dh, s=s, delta=dh, **sums, **plain, **cut)
    close(out["delta"], delta)
    bx, by = passes.block_shape(d, passes.SUM_COLUMNS, THREADS)
    source = passes.column_sum(real, THREADS)
    added = launch(source, (-(-d // bx), 1), (bx, by), a=out["partial"], out=np.full(d, np.nan, real), n=2 * rows, d=d)
    close(added["out"], db, sum_tolerance(delta, real, axis=0))

    # with dropout on the way, and the sums added up in the same launch
    counters = np.array([7, 2])
    dropped = REFERENCE.dropout(h, 0.3, 2**40 + 3, 1, counters, first_block=5)
    source = passes.bias_activation_forward(activation, dtype, width, True, True, False, threads=THREADS)
    mask = mask_of(real, counters)
    new = launch(source, grid, block, z=z, b=b, out=h, dropped=np.zeros_like(z), **mask, **cut, d=d)
    close(new["dropped"], dropped)
    ddropped = dh.copy()
    REFERENCE.dropout(dh, 0.3, 2**40 + 3, 1, counters, out=ddropped, first_block=5)
    delta, db = REFERENCE.bias_activation_backward(ddropped, o, h, activation)
    source = passes.bias_activation_backward(activation, dtype, width, True, True, threads=THREADS)
    out = launch(source, grid, block, dh=dh, s=s, delta=np.zeros_like(dh), **sums, **mask, **cut)
    close(out["delta"], delta)
    close(out["db"].reshape(rows, d).sum(axis=0), db, sum_tolerance(delta, real, axis=0))
    assert not out["tickets"].any()


def check_passes() -> None:
    passes_of("relu", F4, 4, 13, 24)
    passes_of("gelu", F4, 1, 9, 5)
    passes_of("tanh", F8, 2, 9, 6)
    passes_of("mish", F8, 1, 37, 1)


def check_short_lines() -> None:
    passes_of("gelu", F4, 4, 9, 5)
    passes_of("tanh", BF16, 8, 11, 10)
    passes_of("relu", F2, 8, 3, 1)
    passes_of("tanh", F8, 2, 7, 3)


def loss_of(
    loss: Any, dtype: np.dtype[Any], n: int, d: int, indices: bool, weighted: bool, width: int = 1, style: str = "tile"
) -> None:
    real = real_of(dtype)
    z, b, weight = (2 * normal((n, d), real)).astype(dtype), normal(d, dtype), RNG.random(n).astype(real)
    y = RNG.integers(0, d, n) if indices else RNG.dirichlet(np.ones(d), n).astype(real)
    scalars = np.full(8, 4, real)
    scaled = dtype == F2
    o = z.copy()
    value, do, db = REFERENCE.bias_loss(
        o, b, y, loss, weight if weighted else None, scalars=scalars if scaled else None
    )
    scale, largest = loss.scale(n, d, weighted), float(np.abs(o.astype("f8")).max())
    for keep in (True, False):
        variant = cuda_loss.Variant(indices, weighted, keep, scaled)
        rows = 1
        arguments: dict[str, Any] = {
            "z": z, "b": b, "y": y, "weight": weight, "out": np.zeros_like(z) if keep else z, "losses": np.zeros(8, real),
            "scalars": scalars, "scale": real.type(scale), "d": d,
        }  # fmt: skip
        if loss.family == "elementwise":
            rows = passes.rows_of_line(width, d)
            source = cuda_loss.elementwise_loss(loss, dtype, width, variant, THREADS)
            block = passes.block_shape(-(-d * rows // width), threads=THREADS)
            grid = (-(-d * rows // (block[0] * width)), 2)
            arguments |= {"size": n * d, "line": d * rows}
        elif style == "tile":
            source = cuda_softmax.softmax_loss_tile(loss, dtype, width, d, variant, THREADS)
            lanes = cuda_softmax.lanes_of(d)
            grid, block = (1, 2), (lanes, THREADS // lanes)
            arguments |= {"u": real.type(1 / d), "n": n, "rows": min(cuda_softmax.tile_rows(dtype, d, THREADS), 16)}
        else:
            arguments |= {"u": real.type(1 / d), "n": n}
            grid, block = (1, 2), (THREADS, 1)
            if style == "row":
                shape = (THREADS, -(-d // (THREADS * width)), 2)  # and an odd number of rows
                source = cuda_softmax_rows.softmax_loss_row(loss, dtype, width, shape, variant)
            else:
                source = cuda_softmax_rows.softmax_loss_long(loss, dtype, width, variant, THREADS)
        if style != "long":
            arguments["partial"] = np.full((grid[1], d * rows), np.nan, real)
        results = launch(source, grid, block, **arguments)
        close(results["out"], do)
        if keep:
            close(results["z"], o)
        losses = results["losses"]
        sums, count, type_ = (results["out"], n, dtype) if style == "long" else (results["partial"], 2 * rows, real)
        bx, by = passes.block_shape(d, passes.SUM_COLUMNS, THREADS)
        source = passes.column_sum(type_, THREADS)
        added = launch(source, (-(-d // bx), 1), (bx, by), a=sums, out=np.zeros(d, real), n=count, d=d)["out"]
        total = np.array([0.0, 5.0])
        growth = float(n) if loss.reduction == "mean" else 1.0
        finished = launch(
            cuda_loss.finish_loss(dtype, THREADS), (-(-d // bx) + 1, 1), (bx, by),
            partial=added, db=np.full(d, np.nan, real), losses=losses, value=total, weights=np.array([growth]),
            scale=scale, growth=growth * (n % 2), rows=1, d=d, count=len(losses),
        )  # fmt: skip
        # a sum of what was stored, where that is: every term may be off by its rounding, and that of the outputs
        close(
            finished["db"],
            db,
            sum_tolerance(do, real, axis=0) + eps_of(type_) * (1 + largest) * np.abs(do.astype("f8")).sum(axis=0),
        )
        slack = 64 * eps(real) * np.abs(value[0]) + eps(real)
        slack += eps_of(dtype) * largest * n if style == "long" else 0
        assert_within(finished["value"], [value[0], value[1] + 5.0], [slack, (1 + growth) * slack])


def check_losses() -> None:
    cross_entropy = LOSSES["softmax_cross_entropy"](label_smoothing=0.1)
    loss_of(LOSSES["mean_squared_error"], F4, 5, 8, False, True, width=4)
    loss_of(LOSSES["huber"](reduction="sum"), F8, 7, 3, False, False)
    loss_of(LOSSES["huber"], F2, 7, 3, False, False, width=8)
    loss_of(cross_entropy, F4, 5, 3, True, True, width=4)
    loss_of(cross_entropy, BF16, 9, 10, True, True, width=8)


def check_softmax() -> None:
    loss_of(LOSSES["kl_divergence"], F8, 3, 37, False, False, width=2)
    cross_entropy = LOSSES["softmax_cross_entropy"](reduction="sum")
    loss_of(cross_entropy, F4, 3, 64, True, False, width=4, style="row")
    loss_of(LOSSES["kl_divergence"], F8, 3, 45, False, True, style="row")
    loss_of(cross_entropy, F2, 3, 256, True, True, width=8, style="long")


def check_training() -> None:
    for dtype, width, n in ((F4, 4, 43), (F8, 2, 40), (F8, 1, 1), (BF16, 8, 21)):
        real = real_of(dtype)
        x, counters = normal((n, 1), dtype), np.array([7, 2])
        expected = REFERENCE.dropout(x, 0.3, 2**40 + 3, 1, counters, first_block=5)
        source = cuda_training.dropout(dtype, width, THREADS)
        result = launch(source, (2, 1), (8, 1), x=x, out=x, **mask_of(real, counters), size=n)["out"]
        np.testing.assert_array_equal(result.reshape(n, 1), expected)
        if dtype != real:
            continue
        x = x[:, 0]

        weight = RNG.random(n).astype(dtype)
        source = cuda_training.normalize_weights(dtype, THREADS)
        for unit in (1.0, 0.0, np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal * 64):
            scaled, total = weight * dtype.type(unit), np.zeros(1)
            normalized = launch(source, (1, 1), (THREADS, 1), weight=scaled, out=scaled, total=total, n=n)
            expected = np.zeros(1)
            close(normalized["out"], REFERENCE.normalize_weights(scaled, total=expected))
            np.testing.assert_allclose(normalized["total"], expected, rtol=1e-14)

        top = np.finfo(dtype).max / 64
        for scaling, scale in ((False, 1), (False, top), (True, 8), (True, top), (True, np.inf)):
            scalars = np.ones(8, dtype)
            scalars[SCALE] = 8
            g = x * dtype.type(scale)
            expected_scalars, on = scalars.copy(), scalars.copy()
            REFERENCE.clip(g, 0.5, expected_scalars, scaling)
            source = cuda_training.sum_of_squares(dtype, THREADS)
            partial = launch(source, (2, 1), (THREADS, 1), g=g, partial=np.zeros(4, dtype), size=n)["partial"]
            source = cuda_training.clip(dtype, scaling, THREADS)
            numbers = {"max_norm": dtype.type(0.5), "count": 2}
            result = launch(source, (1, 1), (THREADS, 1), partial=partial, scalars=on, **numbers)["scalars"]
            assert result[SKIP] == expected_scalars[SKIP]
            if scale != np.inf:
                both = [NORM, FACTOR]
                # the factor of a huge gradient is subnormal, and has only that many digits
                tiny = float(np.finfo(dtype).smallest_subnormal)
                np.testing.assert_allclose(result[both], expected_scalars[both], rtol=16 * eps(dtype), atol=tiny)

    source, order, counters = normal((9, 8), F4), RNG.permutation(9), np.array([0, 3])
    kernel = cuda_training.gather("f4", 4, 8)
    given = {"source": source, "order": order, "counters": counters, "out": np.zeros((5, 8), F4)}
    gathered = launch(kernel, (1, 2), (2, 4), **given, size=9, rows=9, n=5, d=8)["out"]
    np.testing.assert_array_equal(gathered.reshape(5, 8), source[order[3:8]])


def check_accumulate() -> None:
    for dtype, width, n in ((F4, 4, 43), (F8, 2, 1), (F8, 1, 40)):
        total, term = normal(n, dtype), normal(n, dtype)
        for first, expected in ((False, total + term), (True, term)):
            source = cuda_training.accumulate(dtype, width, first)
            out = launch(source, (2, 1), (4, 1), total=total, term=term, out=np.zeros(n, dtype), size=n)["out"]
            np.testing.assert_array_equal(out, expected)


def check_update() -> None:
    for optimizer, dtype, width, size, weights in (
        (SGD(schedules.OneCycle(0.1, steps=4), momentum=0.9, clip_value=0.5), F4, 4, 39, None),
        (Adam(schedules.Cosine(0.1, steps=4), amsgrad=True), F8, 1, 40, None),
        (SGD(0.1, momentum=0.9), F4, 4, 39, F2),
    ):
        p, states = normal(size, dtype), np.zeros((optimizer.n_states, size), dtype)
        rate, counters, scalars = np.array([0.1]), np.zeros(2, np.int64), np.ones(8, dtype)
        scalars[[SCALE, GOOD, SKIP]] = 1024, GROW_AFTER - 2, 0
        on = [p, states, counters, scalars]
        copy = None if weights is None else p.astype(weights)
        mixed = copy is not None
        for skip in (0, 0, 1, 0) if mixed else (0, 0):
            g = normal(size, dtype)
            scalars[SKIP] = on[3][SKIP] = skip
            source = cuda_training.advance(optimizer, dtype, mixed)
            numbers = numbered("numbers", optimizer.numbers) | numbered("of_schedule", optimizer.schedule.numbers)
            out = launch(source, (1, 1), (1, 1), rate=rate, counters=on[2], scalars=on[3], batch=5, **numbers)
            on[2:] = out["counters"], out["scalars"]
            source = cuda_training.update(optimizer, dtype, width, weights)
            real = np.dtype(dtype).type
            arguments = {"parameters": on[0], "gradients": g, "states": on[1], "scalars": on[3], "size": size}
            numbers = {"limit": real(optimizer.clipping[1] or 0)} | numbered(
                "numbers", [real(x) for x in optimizer.numbers]
            )
            out = launch(source, (2, 1), (8, 1), **arguments, copy=p if copy is None else copy, **numbers)
            on[:2] = out["parameters"], out["states"]
            REFERENCE.advance(optimizer, rate, 5, counters, scalars, mixed)
            REFERENCE.update(optimizer, p, g, states, scalars, copy)
            if mixed:
                close(out["copy"], copy)
        np.testing.assert_array_equal(on[2], counters)
        for result, expected in zip((on[0], on[1], on[3]), (p, states, scalars), strict=True):
            close(result, expected)


def check_storage() -> None:
    import ml_dtypes

    for storage, width in (("f4", 4), ("f8", 2), ("f2", 8), ("bf16", 8), ("i8", 1), ("bf16", 1)):
        load, store, load1, store1, rounded = access(storage, width)
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
            assert rounded(x[2]) == load1(stored, 2 if width > 2 else 0) or width <= 2


CHECKS = {
    function.__name__.removeprefix("check_"): function
    for function in (
        check_passes,
        check_short_lines,
        check_losses,
        check_softmax,
        check_training,
        check_accumulate,
        check_update,
        check_storage,
    )
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the simulator's threads do not inherit np.errstate
    CHECKS[sys.argv[1]]()
