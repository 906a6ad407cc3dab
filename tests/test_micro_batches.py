"""Micro-batches: the gradients of the whole mini-batch, for any reduction, weights, masks and size of the last one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tolerances import assert_within, eps

import gpubackprop as gb
from gpubackprop.losses import LOSSES

SIZES, N = [6, 8, 4, 3], 22


def problem(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rng.normal(size=(N, 6)), rng.integers(0, 3, N), rng.uniform(0.1, 2.0, N)


def run_step(device: str, m: int | None, optimizer: Any, rng: Any, weighted: bool, **options: Any) -> tuple[Any, float]:
    """Return a network and its loss after a step over one mini-batch."""
    X, y, w = problem(rng)
    model = gb.MLP(SIZES, device=device, **options)
    step = model.step(N, optimizer, weighted=weighted, micro_batch_size=m)
    step.names.array("X")[...] = model.backend.asarray(X, model.dtype)
    step.names.array("y")[...] = model.backend.asarray(y)
    if weighted:
        step.names.array("w")[...] = model.backend.asarray(w, model.real)
    step.compile()()
    return model, float(step.names.array("loss")[0])


def gradient(model: Any) -> np.ndarray:
    return np.asarray(model.backend.to_numpy(model.gradients.flat), np.float64)


def slack(model: Any, reduction: str, dtype: str = "") -> float:
    """Return what two orders of the sums can part a gradient by.

    A gradient is a sum over N samples, and each of its terms comes out of a chain of 2 L products with fan-in at most d; a
    term is at most N or 1 times the largest factors, which are below 10 here (|X|, |W|, |do| are of the order of 1).
    """
    d = sum(a + 2 for a, _ in pairwise(model.layer_sizes))
    return (N + 2 * d) * eps(dtype or model.real) * 10 * (N if reduction == "sum" else 1)


@pytest.mark.parametrize("m", [8, 20, 4])  # all with a short last part
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_and_loss_are_those_of_the_whole(m: int, reduction: str, weighted: bool, device: str) -> None:
    loss = LOSSES["softmax_cross_entropy"](reduction=reduction)
    options = {"loss": loss, "dropout": 0.25, "activation": "tanh"}
    whole, value = run_step(device, None, None, np.random.default_rng(0), weighted, **options)
    parts, value_of_parts = run_step(device, m, None, np.random.default_rng(0), weighted, **options)
    assert np.abs(gradient(whole)).max() > 0.01
    assert_within(gradient(parts), gradient(whole), slack(whole, reduction))
    assert value_of_parts == pytest.approx(value, abs=slack(whole, reduction))


def test_a_mean_over_elements_is_over_all_of_them(device: str) -> None:
    results = []
    for m in (None, 5):
        rng = np.random.default_rng(0)
        model = gb.MLP([6, 8, 3], "tanh", "mean_squared_error", device)
        step = model.step(N, micro_batch_size=m)
        step.names.array("X")[...] = model.backend.asarray(rng.normal(size=(N, 6)), np.float32)
        step.names.array("y")[...] = model.backend.asarray(rng.normal(size=(N, 3)), np.float32)
        step.compile()()
        results.append(gradient(model))
    assert_within(results[1], results[0], slack(model, "mean"))


def test_the_norm_that_is_clipped_is_that_of_the_whole_gradient(device: str) -> None:
    optimizer = gb.SGD(1.0, clip_norm=0.01)
    models = [run_step(device, m, optimizer, np.random.default_rng(0), False)[0] for m in (None, 8)]
    thetas = [m.backend.to_numpy(m.parameters.flat) for m in models]
    start = gb.MLP(SIZES, device="reference").parameters.flat
    assert np.linalg.norm(thetas[1] - start) == pytest.approx(0.01, rel=1e-3)
    assert_within(thetas[1], thetas[0], slack(models[0], "mean"))


def test_loss_scaling_sees_the_infinity_of_any_part() -> None:
    models = []
    for m in (None, 8):
        model = gb.MLP([6, 8, 3], device="reference", dtype="float16")
        step = model.step(N, gb.SGD(0.1), micro_batch_size=m)
        rng = np.random.default_rng(0)
        step.names.array("X")[...] = rng.normal(size=(N, 6))
        step.names.array("y")[...] = rng.integers(0, 3, N)
        step.names.array("X")[3] = np.inf  # in the first part; the later ones are finite
        before = model.parameters.flat.copy()
        with np.errstate(all="ignore"):
            step.compile()()
        assert np.array_equal(model.parameters.flat, before)
        models.append(model.optimizer_state.scalars.copy())
    assert np.array_equal(models[0], models[1], equal_nan=True)


@pytest.mark.parametrize("m", [8, 64])
def test_fit_in_parts_learns_the_same(m: int, device: str, rng: np.random.Generator) -> None:
    X, y, w = problem(rng)
    results, losses = [], []
    for size in (None, m):
        model = gb.MLP(SIZES, "tanh", device=device, dtype="float64", dropout=0.25)
        history = model.fit(
            X, y, epochs=2, batch_size=15, optimizer=gb.SGD(0.1), sample_weight=w, micro_batch_size=size, progress=False
        )
        results.append(model.backend.to_numpy(model.parameters.flat))
        losses.append(history["loss"])
    # four steps, each of which passes a difference of the parameters on, at most ten times as large
    assert_within(results[1], results[0], 1e4 * slack(model, "mean"))
    assert losses[1] == pytest.approx(losses[0], abs=1e4 * slack(model, "mean"))


def test_masks_need_parts_of_whole_blocks() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        gb.MLP([6, 5, 3], device="reference", dropout=0.5).step(22, micro_batch_size=7)
    with pytest.raises(ValueError, match="micro_batch_size is 0"):
        gb.MLP([6, 5, 3], device="reference").step(22, micro_batch_size=0)
