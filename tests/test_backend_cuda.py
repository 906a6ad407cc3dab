"""The CUDA backend against the reference, every definition and ragged shapes; needs a device.

Tolerances are in units of eps, for elementwise results relative to the largest intermediate: the same formula is evaluated
with libdevice's functions instead of NumPy's (each within a few ulp) and with fused multiply-adds. 16 eps covers the longest
formula (mish') with a factor of two to spare; sums add the bound of :func:`tolerances.sum_tolerance`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tolerances import assert_within, eps, sum_tolerance

import gpubackprop as gb
from gpubackprop import schedules
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.backends import get_backend
from gpubackprop.backends.reference import ReferenceBackend
from gpubackprop.definitions import check_dtype, eps_of, real_of
from gpubackprop.losses import LOSSES
from gpubackprop.optimizers import LBFGS, OPTIMIZERS
from gpubackprop.step.state import CURSOR, FACTOR, GOOD, GROW_AFTER, NORM, SCALE, SKIP

try:
    import ledger  # counts launches and bytes where the device is simulated; absent elsewhere
except ImportError:
    ledger = None

pytestmark = pytest.mark.gpu
counted = pytest.mark.skipif(ledger is None or not ledger.available(), reason="no counts on this device")

REFERENCE = ReferenceBackend()
SHAPES = [(1, 1), (1, 7), (5, 1), (128, 10), (33, 257), (70, 64)]
REAL = ["float32", "float64"]
DTYPES = [*REAL, "bfloat16", "float16"]


@pytest.fixture(scope="module")
def cuda() -> Any:
    return get_backend("cuda")


def close(actual: Any, expected: np.ndarray, cuda: Any, extra: Any = 0.0) -> None:
    """Assert equality within 16 eps of the largest element, plus ``extra``."""
    finite = np.abs(expected[np.isfinite(expected)].astype(np.float64))
    scale = max(float(finite.max(initial=0.0)), 1e-30)
    assert_within(cuda.to_numpy(actual), expected, 16 * eps_of(expected.dtype) * scale + extra)


def same_numbers(a: np.ndarray, b: np.ndarray) -> None:
    """Assert equality, NaN included, which NumPy does not know of bfloat16."""
    np.testing.assert_array_equal(a.astype(np.float64), b.astype(np.float64))


def normal(rng: np.random.Generator, shape: Any, dtype: Any) -> np.ndarray:
    return (2 * rng.standard_normal(shape)).astype(check_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_passes_agree_with_the_reference(name: str, dtype: str, cuda: Any, rng: Any) -> None:
    activation, dtype = ACTIVATIONS[name], check_dtype(dtype)
    every = name in ("relu", "gelu")  # the others: whole rows of vectors in float32, lines of several rows else
    if dtype == "float16" and not every:
        pytest.skip("the formulas are those of bfloat16: both are computed in float32")
    for n, d in SHAPES if every else [(9, 64)] if dtype == "float32" else [(33, 257)]:
        z, b, dh = normal(rng, (n, d), dtype), normal(rng, d, dtype), normal(rng, (n, d), dtype)
        z[0, 0] = np.nan
        o = z.copy()
        h = REFERENCE.bias_activation_forward(o, b, activation)
        delta, db = REFERENCE.bias_activation_backward(dh, o, h, activation)

        z_kept, z_lost = cuda.asarray(z), cuda.asarray(z)
        h_kept = cuda.bias_activation_forward(z_kept, cuda.asarray(b), activation)
        h_lost = cuda.bias_activation_forward(z_lost, cuda.asarray(b), activation, out=z_lost)
        close(z_kept, o, cuda)
        close(h_kept, h, cuda)
        assert h_lost is z_lost
        same_numbers(cuda.to_numpy(h_lost), cuda.to_numpy(h_kept))
        assert np.isnan(cuda.to_numpy(h_kept)[0, 0])

        needed = {"z": None, "h": None, activation.needs: cuda.asarray(h if activation.needs == "h" else o)}
        delta_new, db_new = cuda.bias_activation_backward(cuda.asarray(dh), activation=activation, **needed)
        in_place = cuda.asarray(dh)
        delta_same, db_same = cuda.bias_activation_backward(in_place, activation=activation, **needed, out=in_place)
        close(delta_new, delta, cuda)
        close(db_new, db, cuda, sum_tolerance(delta, real_of(dtype), axis=0))
        assert delta_same is in_place
        same_numbers(cuda.to_numpy(delta_same), cuda.to_numpy(delta_new))
        np.testing.assert_array_equal(cuda.to_numpy(db_same), cuda.to_numpy(db_new))  # the same bits in each call


def targets(loss: Any, n: int, d: int, dtype: str, rng: np.random.Generator, indices: bool) -> np.ndarray:
    if indices:
        return rng.integers(0, d, n)
    if loss.family == "softmax":
        return rng.dirichlet(np.ones(d), n).astype(dtype)
    return {"signs": rng.choice([-1.0, 1.0], (n, d)), "counts": rng.poisson(2.0, (n, d))}.get(
        loss.targets, rng.random((n, d))
    ).astype(dtype)  # fmt: skip


def loss_cases() -> list[tuple[str, bool, bool]]:
    return [
        (name, indices, weighted)
        for name, loss in LOSSES.items()
        for indices in ((True, False) if loss.targets == "classes" else (False,))
        for weighted in (True, False)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "indices", "weighted"), loss_cases())
def test_losses_agree_with_the_reference(
    name: str, indices: bool, weighted: bool, dtype: str, cuda: Any, rng: Any
) -> None:
    loss = LOSSES[name](reduction="sum") if weighted and indices else LOSSES[name]
    if name == "softmax_cross_entropy":
        loss = loss(label_smoothing=0.1)
    dtype = check_dtype(dtype)
    real, softmax = real_of(dtype), name == "softmax_cross_entropy" and indices
    shapes = [(33, 10), (4, 304)] if loss.family == "softmax" else [(70, 64), (33, 257)]
    shapes = shapes if dtype == np.float32 or (softmax and not weighted) else shapes[:1]
    if softmax and not weighted and dtype == np.float32:
        shapes += [*SHAPES, (140, 260), (5, 1100), (3, 4100)]  # every width and cut of a row
    elif softmax and dtype != np.float16:
        shapes += [(3, 2051 if dtype == np.float64 else 8200)]  # longer than a block holds in its registers
    for n, d in shapes:
        z, b = normal(rng, (n, d), dtype), normal(rng, d, dtype)
        y = targets(loss, n, d, real, rng, indices)
        weight = rng.random(n).astype(real) if weighted else None
        scalars = np.full(8, 64, real) if dtype == np.float16 and weighted else None
        o = z.copy()
        value, do, db = REFERENCE.bias_loss(o, b, y, loss, weight, scalars=scalars)
        ell, _ = loss.per_sample(o.astype(real), y)
        on = {"y": y, "weight": weight, "scalars": scalars}
        on = {key: None if a is None else cuda.asarray(a) for key, a in on.items()}

        # with weights z becomes o; without, do takes its place
        z_new, value_new = cuda.asarray(z), cuda.zeros((2,), "float64")
        out = None if weighted else z_new
        _, do_new, db_new = cuda.bias_loss(z_new, cuda.asarray(b), loss=loss, **on, out=out, value=value_new)
        if weighted:
            close(z_new, o, cuda)
        long = d > (2048 if dtype == np.float64 else 8192)
        # a long row is read again as it was stored, and its column sums are of what was stored
        stored = eps_of(dtype) * float(np.abs(o.astype("f8")).max()) * long
        close(do_new, do, cuda, stored * np.abs(do.astype("f8")))
        of_stored = (stored + eps_of(dtype)) * np.abs(do.astype("f8")).sum(axis=0) * long
        close(db_new, db, cuda, sum_tolerance(do, real, axis=0) + of_stored)
        # every sample's loss is a sum over d outputs of numbers as large as 2 max|o|; their sum is taken in two levels
        scale = loss.scale(n, d, weighted) * float((np.ones(n) if weight is None else weight).sum())
        slack = stored + (32 + d) * eps(real) * (
            np.abs(ell).max() + np.abs(o).max() * (d if loss.family != "softmax" else 1)
        )
        growth = n if loss.reduction == "mean" else 1
        assert_within(cuda.to_numpy(value_new), value, np.array([1, growth]) * scale * slack)
        first, total = cuda.to_numpy(value_new)
        z_new = cuda.asarray(z)
        out = None if weighted else z_new
        _, do_two, db_two = cuda.bias_loss(z_new, cuda.asarray(b), loss=loss, **on, out=out, value=value_new)
        np.testing.assert_array_equal(cuda.to_numpy(do_two), cuda.to_numpy(do_new))  # the same bits in each call
        np.testing.assert_array_equal(cuda.to_numpy(db_two), cuda.to_numpy(db_new))
        np.testing.assert_array_equal(cuda.to_numpy(value_new), [first, 2 * total])


def test_sums_over_many_rows_keep_their_digits(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal terms round to the same side again and again: a device of one block stands for millions of rows.

    No thread adds up more than 32 terms in a row, each to half a unit of the sum so far: 2^-20 if all of them erred to one side.
    """
    monkeypatch.setattr(cuda._launches, "blocks", 1)
    n, d, tenth = 10_000, 10, float(np.float32(0.1))
    tenths, bias = cuda.asarray(np.full((n, d), tenth, np.float32)), cuda.asarray(np.zeros(d, np.float32))
    _, db = cuda.bias_activation_backward(tenths.copy(), None, tenths, ACTIVATIONS["relu"])
    np.testing.assert_allclose(cuda.to_numpy(db), n * tenth, rtol=2**-20)

    o = cuda.asarray(np.zeros((n, d), np.float32))
    value, _, db = cuda.bias_loss(o, bias, tenths, LOSSES["mean_squared_error"](reduction="sum"))
    np.testing.assert_allclose(float(value[0]), n * d * tenth**2, rtol=2**-20)
    np.testing.assert_allclose(cuda.to_numpy(db), -2 * n * tenth, rtol=2**-20)

    for d in (10, 160):  # a kernel of tiles, and one of rows
        row = np.linspace(0, 0.3, d, dtype=np.float32)
        o, y = cuda.asarray(np.tile(row, (n, 1))), cuda.asarray(np.zeros(n, np.int64))
        bias = cuda.asarray(np.zeros(d, np.float32))
        value, do, db = cuda.bias_loss(o, bias, y, LOSSES["softmax_cross_entropy"](reduction="sum"))
        wide = row.astype(np.float64)
        np.testing.assert_allclose(float(value[0]), n * (np.log(np.exp(wide).sum()) - wide[0]), rtol=2**-20)
        np.testing.assert_allclose(cuda.to_numpy(db), n * cuda.to_numpy(do)[0].astype(np.float64), rtol=2**-20)


@pytest.mark.parametrize("columns", [3, 40, 300])
def test_a_nan_output_makes_the_loss_and_its_own_row_nan(columns: int, cuda: Any, rng: Any) -> None:
    z = normal(rng, (5, columns), "float32")
    z[2, 1] = np.nan
    y = cuda.asarray(rng.integers(0, columns, 5))
    value, do, _ = cuda.bias_loss(cuda.asarray(z), cuda.zeros((columns,), "f4"), y, LOSSES["softmax_cross_entropy"])
    assert np.isnan(cuda.to_numpy(value)).all()
    np.testing.assert_array_equal(np.isnan(cuda.to_numpy(do)).any(axis=1), [False, False, True, False, False])


def optimizers() -> list[Any]:
    plain = [cls() for cls in OPTIMIZERS.values() if cls is not LBFGS]
    return [
        *plain,
        gb.SGD(schedules.StepDecay(0.1, step_size=2), momentum=0.9, nesterov=True, weight_decay=0.1, clip_value=0.5),
        gb.Adam(schedules.OneCycle(0.1, steps=5), amsgrad=True, weight_decay=0.1),
        gb.RMSprop(schedules.Cosine(0.1, steps=4), centered=True, momentum=0.9),
        gb.Adagrad(schedules.Exponential(0.1, gamma=0.9), lr_decay=0.1),
        gb.SGD(schedules.LinearWarmup(0.1, steps=3)),
    ]


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("optimizer", optimizers(), ids=lambda o: f"{type(o).__name__}-{o.n_states}")
def test_steps_of_the_optimizer_agree_with_the_reference(optimizer: Any, dtype: str, cuda: Any, rng: Any) -> None:
    for size in (1, 7, 1001, 1024):
        p = normal(rng, size, dtype)
        states = np.zeros((optimizer.n_states, size), dtype)
        rate, counters = np.array([optimizer.schedule.learning_rate]), np.zeros(2, np.int64)
        scalars = np.ones(8, dtype)
        on = [cuda.asarray(a.copy()) for a in (p, states, rate, counters, scalars)]
        for _ in range(3):
            g = normal(rng, size, dtype)
            REFERENCE.advance(optimizer, rate, 3, counters, scalars)
            REFERENCE.update(optimizer, p, g, states, scalars)
            cuda.advance(optimizer, on[2], 3, on[3], on[4])
            cuda.update(optimizer, on[0], cuda.asarray(g), on[1], on[4])
        np.testing.assert_array_equal(cuda.to_numpy(on[3]), counters)
        close(on[4], scalars, cuda)
        if dtype == "float32" and optimizer.n_states:  # 1 / sqrt(v) near v = 0 enlarges the rounding of v, not of p
            close(on[0], p, cuda, 64 * eps(dtype) * scalars[0])
        else:
            close(on[0], p, cuda)
        if optimizer.n_states:
            close(on[1], states, cuda)


@pytest.mark.parametrize("dtype", REAL)
def test_clipping_agrees_with_the_reference(dtype: str, cuda: Any, rng: Any) -> None:
    for size in (1, 7, 1001, 40000):
        for max_norm in (0.5, 1e6):
            g, scalars = normal(rng, size, dtype), np.ones(8, dtype)
            on = cuda.asarray(scalars.copy())
            REFERENCE.clip(g, max_norm, scalars)
            cuda.clip(cuda.asarray(g), max_norm, on)
            result = cuda.to_numpy(on)
            # NumPy adds pairwise, the kernel in threads: sum g^2 within (log2 size + size / threads) eps, the root half of it
            np.testing.assert_allclose(result[[NORM, FACTOR]], scalars[[NORM, FACTOR]], rtol=40 * eps(dtype))
    on = cuda.asarray(np.ones(8, dtype))
    cuda.clip(cuda.asarray(np.array([1.0, np.nan], dtype)), 1.0, on)
    assert np.isnan(cuda.to_numpy(on)[[NORM, FACTOR]]).all()


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_loss_scaling_and_weights_in_16_bits_agree_with_the_reference(storage: str, cuda: Any, rng: Any) -> None:
    optimizer, size = gb.Adam(0.1), 1000
    p, states = normal(rng, size, "float32"), np.zeros((2, size), np.float32)
    weights = p.astype(check_dtype(storage))
    rate, counters, scalars = np.array([0.1]), np.zeros(2, np.int64), np.ones(8, np.float32)
    scalars[[SCALE, GOOD]] = 1024, GROW_AFTER - 2
    on = [cuda.asarray(a.copy()) for a in (p, states, rate, counters, scalars, weights)]
    history = []
    for factor in (1.0, 1.0, np.inf, np.nan, 1.0):
        g = normal(rng, size, "float32") * np.float32(factor)
        for backend, (p_, s_, rate_, counters_, scalars_, w_), g_ in (
            (REFERENCE, (p, states, rate, counters, scalars, weights), g),
            (cuda, on, cuda.asarray(g)),
        ):
            backend.clip(g_, 1.0, scalars_, True)
            backend.advance(optimizer, rate_, 3, counters_, scalars_, True)
            backend.update(optimizer, p_, g_, s_, scalars_, w_)
        np.testing.assert_array_equal(cuda.to_numpy(on[3]), counters)
        here = cuda.to_numpy(on[4])
        history.append(float(here[SCALE]))
        np.testing.assert_array_equal(here[[SCALE, GOOD, SKIP]], scalars[[SCALE, GOOD, SKIP]])
    assert history == [1024, 2048, 1024, 512, 512]
    close(on[0], p, cuda, 64 * eps("f4") * 0.1)
    close(on[1], states, cuda)
    np.testing.assert_array_equal(cuda.to_numpy(on[5]), cuda.to_numpy(on[0]).astype(weights.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_the_same_elements_on_every_device(dtype: str, cuda: Any, rng: Any) -> None:
    for size in (1, 2, 3, 4, 1003):
        for rate, seed, step in ((0.3, 2**63 + 5, 7), (0.0, 1, 0), (0.9, 3, 2**32 + 1)):
            x, counters = normal(rng, (size, 1), dtype), np.array([step, 0])
            expected = REFERENCE.dropout(x, rate, seed, 2, counters)
            on = cuda.asarray(x)
            result = cuda.dropout(on, rate, seed, 2, cuda.asarray(counters), out=on)
            np.testing.assert_array_equal(cuda.to_numpy(result), expected)  # one product: equal to the last bit


def test_weights_are_normalized(cuda: Any, rng: Any) -> None:
    for n in (1, 7, 1000):
        weight = rng.random(n)
        expected = REFERENCE.normalize_weights(weight)
        assert_within(cuda.to_numpy(cuda.normalize_weights(cuda.asarray(weight))), expected, 64 * eps("f8") * expected)


@pytest.mark.parametrize("columns", [(), (1,), (7,), (64,)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "float16"])
def test_gather_copies_the_rows_of_the_mini_batch(columns: tuple[int, ...], dtype: str, cuda: Any, rng: Any) -> None:
    source, order, counters = rng.integers(0, 99, (50, *columns)).astype(dtype), rng.permutation(50), np.array([0, 13])
    out = cuda.zeros((9, *columns), dtype)
    cuda.gather(cuda.asarray(source), cuda.asarray(order), cuda.asarray(counters), out)
    np.testing.assert_array_equal(cuda.to_numpy(out), source[order[counters[CURSOR] :][:9]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_take_transposed_views(dtype: str, cuda: Any, rng: Any) -> None:
    for m, k, n in ((1, 1, 1), (1, 7, 1), (5, 3, 4), (33, 65, 17)):
        a, b = normal(rng, (m, k), dtype), normal(rng, (k, n), dtype)
        exact = a.astype("f8") @ b.astype("f8")
        magnitude = np.abs(a.astype("f8")) @ np.abs(b.astype("f8"))
        tolerance = (k + 1) * eps_of(real_of(a.dtype)) * magnitude + eps_of(a.dtype) * np.abs(exact)
        views = [cuda.asarray(a.T.copy()).T, cuda.asarray(b.T.copy()).T]
        out = cuda.zeros((m, n), a.dtype)
        assert cuda.matmul(*views, out=out) is out
        assert_within(cuda.to_numpy(out), exact, tolerance)
        assert_within(cuda.to_numpy(cuda.matmul(cuda.asarray(a), cuda.asarray(b))), exact, tolerance)
        if a.dtype.itemsize == 2:  # as dW has it
            out = cuda.matmul(*views, out=cuda.zeros((m, n), "float32"))
            assert_within(cuda.to_numpy(out), exact, (k + 1) * 2.0**-23 * magnitude)


def test_unaligned_views_take_the_scalar_kernels(cuda: Any, rng: Any) -> None:
    room = cuda.zeros((4 * 8 + 1,), "float32")
    z = room[1:].reshape(4, 8)
    z[...] = cuda.asarray(normal(rng, (4, 8), "float32"))
    expected = np.tanh(cuda.to_numpy(z))
    close(cuda.bias_activation_forward(z, cuda.zeros((8,), "f4"), ACTIVATIONS["tanh"]), expected, cuda)


def test_kernels_are_not_handed_arrays_that_they_cannot_read(cuda: Any) -> None:
    z, b, relu = cuda.zeros((4, 8), "float32"), cuda.zeros((8,), "float32"), ACTIVATIONS["relu"]
    for bad, message in (
        (cuda.zeros((7,), "float32"), r"b has shape \(7,\); it must be \(8,\) in this bias_activation_forward"),
        (cuda.zeros((8,), "float64"), "b is an array of float64; it must be one of float32"),
        (cuda.zeros((16,), "float32")[::2], r"b is not C-contiguous \(strides \(8,\)\); it must be"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.bias_activation_forward(z, bad, relu)
    with pytest.raises(TypeError, match=r"b is numpy\.ndarray; it must be a cupy\.ndarray on cuda:0"):
        cuda.bias_activation_forward(z, np.zeros(8, "f4"), relu)
    with pytest.raises(ValueError, match="is empty"):
        cuda.bias_activation_forward(cuda.zeros((0, 8), "float32"), b, relu)
    with pytest.raises(ValueError, match="z is an array of int32; cuda:0 computes in"):
        cuda.bias_activation_forward(cuda.zeros((4, 8), "int32"), b, relu)


def test_work_goes_on_the_current_stream(cuda: Any, rng: Any) -> None:
    stream = cuda.xp.cuda.Stream(non_blocking=True)
    z = normal(rng, (64, 48), "float32")
    with stream:
        on = cuda.asarray(z)
        dh, db = cuda.bias_activation_backward(on, on, None, ACTIVATIONS["tanh"])
        result = cuda.to_numpy(dh), cuda.to_numpy(db)
    delta, sums = REFERENCE.bias_activation_backward(z, z, None, ACTIVATIONS["tanh"])
    close(cuda.asarray(result[0]), delta, cuda)
    close(cuda.asarray(result[1]), sums, cuda, sum_tolerance(delta, "f4", axis=0))


def arrays_of_a_step(cuda: Any, rng: Any, n: int, d: int) -> dict[str, Any]:
    names = ("z", "h", "dh", "delta", "do")
    arrays = {name: cuda.asarray(normal(rng, (n, d), "float32")) for name in names}
    arrays |= {"b": cuda.zeros((d,), "f4"), "db": cuda.zeros((d,), "f4"), "value": cuda.zeros((2,), "f8")}
    arrays |= {
        "y": cuda.asarray(rng.integers(0, d, n)),
        "counters": cuda.zeros((2,), "i8"),
        "rate": cuda.zeros((1,), "f8"),
    }
    arrays |= {
        "scalars": cuda.zeros((8,), "f4"),
        "p": cuda.zeros((n * d,), "f4"),
        "states": cuda.zeros((2, n * d), "f4"),
    }
    return arrays


def run_hot_methods(cuda: Any, a: dict[str, Any]) -> None:
    tanh, adam, g = ACTIVATIONS["tanh"], gb.Adam(), a["delta"].reshape(-1)
    cuda.bias_activation_forward(a["z"], a["b"], tanh, out=a["h"])
    cuda.dropout(a["h"], 0.5, 1, 0, a["counters"], out=a["h"])
    cuda.bias_loss(a["z"], a["b"], a["y"], LOSSES["softmax_cross_entropy"], out=a["do"], db=a["db"], value=a["value"])
    cuda.bias_activation_backward(a["dh"], a["z"], a["h"], tanh, out=a["delta"], db=a["db"])
    cuda.advance(adam, a["rate"], 1, a["counters"], a["scalars"])
    cuda.clip(g, 1.0, a["scalars"])
    cuda.update(adam, a["p"], g, a["states"], a["scalars"])


@pytest.mark.parametrize(("n", "d"), [(64, 40), (300, 264)])
def test_methods_with_all_outputs_given_allocate_nothing(
    n: int, d: int, cuda: Any, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cuda, "_launches", cuda._launches.for_step()
    )  # whose scratch stays; that of an eager call does not
    arrays = arrays_of_a_step(cuda, rng, n, d)
    run_hot_methods(cuda, arrays)  # compiles, and makes the scratch
    cuda.matmul(arrays["dh"].T, arrays["delta"], out=cuda_square(arrays, d))

    class Refuse(cuda.xp.cuda.MemoryHook):  # type: ignore[misc, name-defined]
        name = "refuse"

        def malloc_preprocess(self, **_: Any) -> None:
            raise AssertionError("an array was allocated")

    with Refuse():
        run_hot_methods(cuda, arrays)
        cuda.matmul(arrays["dh"].T, arrays["delta"], out=cuda_square(arrays, d))


def cuda_square(arrays: dict[str, Any], d: int) -> Any:
    return arrays["p"][: d * d].reshape(d, d)


@counted
def test_a_step_waits_for_nothing_and_copies_nothing(cuda: Any, rng: Any) -> None:
    arrays = arrays_of_a_step(cuda, rng, 64, 40)
    run_hot_methods(cuda, arrays)
    cuda.synchronize()  # what was queued before does not count
    with ledger.record(level=1) as r:
        run_hot_methods(cuda, arrays)
        cuda.synchronize()
    assert r.synchronizations == 1  # the one above
    assert r.allocations == r.copies_h2d == r.copies_d2h == r.copies_d2d == r.memsets == 0
    # forward 1, dropout 1, loss 2, backward 2 (64 rows need a column sum), advance 1, clip 2, update 1
    assert r.launches == 10


@counted
def test_the_backward_pass_moves_each_byte_once(cuda: Any, rng: Any) -> None:
    n, d = 1024, 512
    dh, z = (cuda.asarray(normal(rng, (n, d), "float32")) for _ in range(2))
    out, db = cuda.zeros((n, d), "f4"), cuda.zeros((d,), "f4")
    cuda.bias_activation_backward(dh, z, None, ACTIVATIONS["tanh"], out=out, db=db)
    cuda.synchronize()  # what was queued before does not count
    with ledger.record() as r:
        cuda.bias_activation_backward(dh, z, None, ACTIVATIONS["tanh"], out=out, db=db)
        cuda.synchronize()
    kernel = r.kernels["bias_activation_backward"]
    moved = sum(k.bytes_read + k.bytes_written for k in (kernel, r.kernels["column_sum"]))
    floor = dh.nbytes + z.nbytes + out.nbytes + db.nbytes
    assert moved <= 1.05 * floor
    assert kernel.reread == 1.0
    assert kernel.coalescing >= 0.95
    assert kernel.local_accesses == 0
    assert kernel.read_widths.keys() == {16}
