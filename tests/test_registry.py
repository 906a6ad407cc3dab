"""Names that people type: what they resolve to, and what is suggested."""

from __future__ import annotations

from typing import Any

import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.initializers import INITIALIZERS
from gpubackprop.losses import LOSSES
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.registry import Registry
from gpubackprop.schedules import SCHEDULES

ALL: list[Registry[Any]] = [ACTIVATIONS, INITIALIZERS, LOSSES, OPTIMIZERS, SCHEDULES]


@pytest.mark.parametrize(
    ("registry", "typed", "name"),
    [
        (LOSSES, "mse", "mean_squared_error"),
        (LOSSES, "MAE", "mean_absolute_error"),
        (LOSSES, "l1", "mean_absolute_error"),
        (LOSSES, "bce", "sigmoid_cross_entropy"),
        (LOSSES, "cross-entropy", "softmax_cross_entropy"),
        (LOSSES, "sparse_categorical_crossentropy", "softmax_cross_entropy"),
        (ACTIVATIONS, "logistic", "sigmoid"),
        (ACTIVATIONS, "swish", "silu"),
        (ACTIVATIONS, "linear", "identity"),
        (ACTIVATIONS, "Leaky ReLU", "leaky_relu"),
        (OPTIMIZERS, "L-BFGS", "lbfgs"),
        (SCHEDULES, "onecycle", "one_cycle"),
        (INITIALIZERS, "xavier_uniform", "glorot_uniform"),
    ],
)
def test_an_alias_is_the_same_definition(registry: Registry[Any], typed: str, name: str) -> None:
    assert registry.resolve(typed) is registry[name]
    assert registry.name_of(typed) == name


@pytest.mark.parametrize("registry", ALL, ids=lambda registry: registry.kind)
def test_aliases_lead_to_entries_and_hide_none(registry: Registry[Any]) -> None:
    assert set(registry.aliases.values()) <= set(registry)
    assert not set(registry.aliases) & set(registry)
    assert all(alias == alias.lower().replace("-", "_").replace(" ", "_") for alias in registry.aliases)


def test_files_keep_the_name_of_the_definition() -> None:
    model = gb.MLP([2, 3, 1], "swish", "mse", device="reference", initializer="kaiming_uniform")
    described = str(model.architecture.to_json() if hasattr(model.architecture, "to_json") else model)
    assert "silu" in described
    assert "mean_squared_error" in described
    assert "mse" not in described
    assert gb.fingerprint(model) == gb.fingerprint(
        gb.MLP([2, 3, 1], "silu", "mean_squared_error", device="reference", initializer="he_uniform")
    )


def test_what_means_something_else_is_only_suggested() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'nadam' \\(did you mean 'adam'\\?\\)"):
        OPTIMIZERS.resolve("nadam")
    with pytest.raises(
        ValueError, match="unknown activation 'swich' \\(did you mean 'swish'\\?\\); choose from identity"
    ):
        ACTIVATIONS.resolve("swich")
    with pytest.raises(ValueError, match="unknown loss 'nll'; choose from"):
        LOSSES.resolve("nll")
    assert LOSSES.resolve(3) == 3
