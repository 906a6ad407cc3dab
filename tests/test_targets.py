"""Kinds of targets: each question is asked of one object, also by custom losses that combine kinds and readings freely."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.losses import LOSSES, Loss, mean_squared_error
from gpubackprop.targets import KINDS

OUTPUTS = np.array([[-1.0, 2.0], [0.5, 0.25], [0.0, -3.0]])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_random_targets_are_taken(name: str, rng: np.random.Generator) -> None:
    loss = LOSSES[name]
    y = loss.kind.random(rng, 50, 3)
    model = gb.MLP([2, 3], loss=loss, device="reference")
    model.evaluate(rng.normal(size=(50, 2)), y)
    assert loss.kind.are_indices(y.shape) is (y.ndim == 1)
    assert pickle.loads(pickle.dumps(loss)).kind == loss.kind


@pytest.mark.parametrize(
    ("mean_function", "prediction", "probabilities"),
    [
        (None, OUTPUTS, None),
        ("identity", OUTPUTS, None),
        ("exp", np.exp(OUTPUTS), None),
        ("sigmoid", (OUTPUTS > 0).astype(int), 1 / (1 + np.exp(-OUTPUTS))),
        ("softmax", [1, 0, 0], np.exp(OUTPUTS) / np.exp(OUTPUTS).sum(axis=1, keepdims=True)),
    ],
)
@pytest.mark.parametrize("targets", [kind for kind in KINDS if kind != "signs"])
def test_outputs_are_read_by_the_mean_function(
    targets: Any, mean_function: Any, prediction: Any, probabilities: Any
) -> None:
    kind = Loss("mine", mean_squared_error.define, targets=targets, mean_function=mean_function).kind
    np.testing.assert_array_equal(kind.predict(OUTPUTS, np), prediction)
    if probabilities is None:
        assert kind.mean.probabilities is None
    else:
        np.testing.assert_allclose(kind.mean.probabilities(OUTPUTS, np), probabilities, rtol=1e-15)


def test_signs_are_read_as_signs_unless_there_are_probabilities() -> None:
    for mean_function, prediction in (
        ("identity", np.where(OUTPUTS > 0, 1, -1)),
        ("sigmoid", (OUTPUTS > 0).astype(int)),
    ):
        kind = Loss("mine", mean_squared_error.define, targets="signs", mean_function=mean_function).kind  # type: ignore[arg-type]
        np.testing.assert_array_equal(kind.predict(OUTPUTS, np), prediction)


def test_rows_of_a_softmax_loss_sum_to_one_whatever_their_kind(rng: np.random.Generator) -> None:
    softmax = LOSSES["kl_divergence"].define
    model = gb.MLP([2, 3], loss=Loss("mine", softmax, family="softmax", mean_function="softmax"), device="reference")
    y = np.array([[1.5, -0.5, 0.0]])
    assert set(model.evaluate(np.ones((1, 2)), y)) == {"loss", "r2"}
    with pytest.raises(ValueError, match="the rows of y are not probabilities: they must sum to 1 for mine"):
        model.evaluate(np.ones((1, 2)), 2 * y)


def test_a_kind_that_there_is_not_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown targets 'sign'; choose from real, "):
        Loss("mine", mean_squared_error.define, targets="sign").kind  # type: ignore[arg-type]  # noqa: B018
