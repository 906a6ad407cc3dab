"""explain, check_gradients and parity: what they report about a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.inspect.explain import random_batch
from gpubackprop.losses import LOSSES


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_explain_checks_every_gradient_of_every_loss(loss: str) -> None:
    explanation = gb.explain([4, 5, 3], activation="silu", loss=loss)
    assert explanation.ok
    checked = [check.name for e in explanation.operations for check in e.checks]
    assert checked == ["do", "db_o", "dW_o", "dh_1", "delta_1", "db_1", "dW_1"]


def test_the_fused_step_is_listed_operation_by_operation() -> None:
    text = gb.explain([4, 5, 3], batch_size=6).fused()
    for line in ("MLP 4-5-3 (relu; softmax_cross_entropy), 6 samples",
                 "FORWARD PHASE", "BACKWARD PHASE", "1. z_1 = X W_1",
                 "X 6×4,  W_1 4×5,  z_1 6×5", "dW_1 agrees with finite differences", "needs nothing computed before"):  # fmt: skip
        assert line in text
    assert "DIFFERS" not in text


def test_explain_takes_a_network_and_leaves_it_alone(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 5, 3], "tanh", "mean_squared_error", device)
    before = model.backend.to_numpy(model.parameters.flat).copy()
    explanation = gb.explain(model, *random_batch(model, 7, rng))
    assert explanation.ok
    assert "7 samples" in explanation.title
    assert np.array_equal(model.backend.to_numpy(model.parameters.flat), before)


def test_check_gradients_takes_a_network_of_any_device_and_dtype(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 5, 3], "tanh", device=device, dropout=0.5)
    report = gb.check_gradients(model, *random_batch(model, 7, rng))
    assert report.ok
    assert 0 < report.worst <= report.tolerance == 1e-6
    assert str(report).count("ok") == len(report.checks) == 7


def test_parity_of_the_reference_in_float64_is_exact(rng: np.random.Generator) -> None:
    model = gb.MLP([4, 5, 3], "tanh", dtype="float64")
    report = gb.parity(model, *random_batch(model, 7, rng), devices=["reference"])
    assert report.worst == 0
    assert [row.name for row in report.rows] == [
        f"{f}_{i}" for i in "1o" for f in ("z", "h", "dh", "delta", "dW", "db")
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parity_of_a_device_is_a_few_ulps(dtype: str, device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([8, 16, 3], "silu", dtype=dtype)
    report = gb.parity(model, *random_batch(model, 9, rng), devices=[device])
    # sums of at most 16 terms, three in a row, relative to the largest element: below 3 * 16 roundings and some of phi
    assert report.worst < 64
    if dtype == "float32":
        assert report.worst > 0
    assert f"ulps of {dtype}" in str(report)


def test_parity_sees_a_wrong_device(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    from gpubackprop.backends.reference import ReferenceBackend

    class Wrong(ReferenceBackend):
        def do_bias_activation_backward(self, o: Any) -> None:
            super().do_bias_activation_backward(o)
            o.db[...] *= 1.001

    model = gb.MLP([4, 5, 3], "tanh", dtype="float64")
    report = gb.parity(model, *random_batch(model, 7, rng), devices=[Wrong()])
    assert {row.name for row in report.rows if row.ulps > 64} == {"db_1"}
