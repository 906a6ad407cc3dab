"""The text on backpropagation as `explain` speaks it: its words, its order, its numbers, and that a wrong derivative is seen."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS, activation
from gpubackprop.architecture import Architecture
from gpubackprop.inspect.explain import random_batch
from gpubackprop.inspect.notation import DERIVATIVES, Notation
from gpubackprop.inspect.text import arrows
from gpubackprop.inspect.walk import N_ITER_NO_CHANGE, TOL, Walk, walk
from gpubackprop.losses import LOSSES
from gpubackprop.network import Network

PARTS = [
    "The chain rule of calculus", "The chain rule for vectors", "Gradient-based optimization", "Forward propagation",
    "The gradients of the outputs", "The gradients of the parameters", "What needs what", "The forward propagation phase",
    "The backward propagation phase",
]  # fmt: skip


def walked(sizes: tuple[int, ...], activation: Any = "tanh", loss: str = "mean_squared_error", n: int = 5) -> Walk:
    rng = np.random.default_rng(3)
    network = Network(Architecture(sizes, activation, loss, "float64"), "reference")  # type: ignore[arg-type]
    for b in network.parameters.b:
        b[...] = rng.normal(size=b.shape) / 10
    return walk(network, *random_batch(network.architecture, n, rng), rng, 1e-6)


@pytest.mark.parametrize("sizes", [[3, 2], [2, 2, 1], [4, 8, 8, 3], [5, 4, 6, 3, 2, 4]])
@pytest.mark.parametrize("loss", ["mean_squared_error", "softmax_cross_entropy"])
def test_the_parts_of_the_text_come_in_its_order_and_every_derivative_agrees(sizes: list[int], loss: str) -> None:
    if sizes[-1] == 1 and loss == "softmax_cross_entropy":
        sizes = [*sizes[:-1], 2]
    explanation = gb.explain(sizes, activation="tanh", loss=loss)
    text = str(explanation)
    assert [part.title for part in explanation.page.parts] == PARTS
    places = [text.index(f"{number}  {title.upper()}") for number, title in enumerate(PARTS, 1)]
    assert places == sorted(places)
    assert explanation.ok
    assert "✗" not in text
    assert text.count("✓") == 3 + len(explanation.step.gradients)  # two chain rules, the sentence that explains it
    assert max(map(len, explanation.text(values=True).splitlines())) <= 100


def test_the_words_of_the_text_are_spoken() -> None:
    text = str(gb.explain([4, 8, 8, 3]))
    for words in (
        "ds/dp = ds/dr dr/dq dq/dp", "∇p = (∂r/∂p)ᵀ ∇r", "till convergence is achieved in the loss", "converged at iteration",
        "∇W_o ⇐ ∇o", "∇h_1 ⇐ ∇h_2", "store it for use in steps 4 and 5", "l = 1: terminate.", "As simple as that.", "Phew!",
        "h_2 = φ(W_2ᵀ h_1 + b_2)", "z_2 = h_1 W_2 + b_2,  h_2 = φ(z_2)", "The forward pass is now complete",
    ):  # fmt: skip
        assert words in text


def test_without_and_with_one_hidden_layer_the_loop_ends_where_the_text_would_go_on() -> None:
    none, one = str(gb.explain([3, 2])), str(gb.explain([3, 4, 2]))
    assert "L = 0: there is no hidden layer, terminate." in none
    assert "ds/dp = ds/dq dq/dp" in none
    assert "δ" not in none
    assert "l = L − 1 = 0 is the input, which has no parameters: nothing to compute." in one
    assert "l = 1: terminate." in one


@pytest.mark.parametrize("sizes", [(3, 2), (2, 2, 1), (4, 8, 8, 3), (5, 4, 6, 3, 2, 4)])
def test_the_flops_of_the_texts_steps_are_those_of_the_program(sizes: tuple[int, ...]) -> None:
    w = walked(sizes)
    notation = Notation(w)
    assert notation.forward_flops + notation.backward_flops == w.step.flops
    assert set(notation.equations) == set(w.checks)


def test_what_needs_what_is_the_texts_and_comes_in_an_order_that_gives_it() -> None:
    w = walked((4, 8, 8, 3))
    expected = {
        "dW_o": "do",
        "db_o": "do",
        "dh_2": "do",
        "dW_2": "dh_2",
        "db_2": "dh_2",
        "dh_1": "dh_2",
        "dW_1": "dh_1",
        "db_1": "dh_1",
    }
    assert arrows(w) == expected
    order = list(w.checks)
    assert all(name == "db_o" or order.index(source) < order.index(name) for name, source in expected.items())


def test_the_numbers_are_those_of_the_users_network(rng: np.random.Generator) -> None:
    model = gb.MLP([3, 4, 2], "tanh", "mean_squared_error", "reference", "float64")
    X, y = random_batch(model, 4, rng)
    loss, gradients = model.loss_and_gradients(X, y)
    page = gb.explain(model, X, y)
    arrays = {
        name: a for part in page.page.parts for block in part.blocks for name, a in getattr(block, "arrays", {}).items()
    }
    for name, given in {"dW_1": gradients.W[0], "db_1": gradients.b[0], "dW_o": gradients.W[1], "X": X, "y": y}.items():
        np.testing.assert_allclose(arrays[name], given, rtol=1e-12)
    assert f"ℓ(o,y) = {float(loss):.6f}" in str(page)
    np.testing.assert_allclose(
        arrays["W_1"], model.parameters.W[0] - 0.1 * gradients.W[0], rtol=1e-12
    )  # after the update


def test_a_wrong_derivative_is_seen_and_named() -> None:
    @activation
    def bent(real: Any, m: Any) -> Any:
        """phi(z) = tanh(z), and a wrong derivative."""
        one = real(1)
        return (lambda z: m.tanh(z)), (lambda z, h: one - h)

    try:
        explanation = gb.explain([3, 4, 2], activation="bent")
    finally:
        ACTIVATIONS.pop("bent")
    assert not explanation.ok
    text = str(explanation)
    assert re.search(r"δ_1 = dh_1 ⊙ φ′\(z_1\)\n.*✗ .* DIFFERS", text)
    assert re.search(r"dW_o = h_1ᵀ do\n.*✓", text)
    assert text.count("✗") == 5  # along the path, the Jacobian, and what comes after φ′: δ_1, dW_1, db_1


@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_in_words_is_that_of_the_definition(name: str) -> None:
    z = np.linspace(-2, 2, 9) + 0.01
    definition, words = ACTIVATIONS[name], DERIVATIVES[name]
    value, _, condition = words.partition(" where ")
    condition, _, otherwise = condition.partition(", else ")

    def number(formula: str) -> Any:
        formula = (
            formula.replace("−", "-")
            .replace("²", "**2")
            .replace("|z|", "abs(z)")
            .replace("e^", "e**")
            .replace("h (", "h * (")
        )
        return eval(formula, {"z": z, "h": definition.phi(z), "e": np.e, "cos": np.cos, "abs": np.abs})

    expected = np.where(number(condition), number(value), number(otherwise)) if condition else number(value) + 0 * z
    np.testing.assert_allclose(expected, definition.dphi(z), rtol=1e-10)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_is_put_in_words(loss: str) -> None:
    notation = Notation(walked((3, 4, 2), loss=loss))
    assert notation.loss.startswith("mean of ")
    assert loss == "huber" or loss not in notation.loss + notation.dloss


def test_the_descent_ends_by_the_criterion_that_the_page_names() -> None:
    descent = walked((2, 2, 1)).descent
    lowest = np.minimum.accumulate(descent.losses)
    fell = [True, *(descent.losses[i] <= lowest[i - 1] - TOL for i in range(1, len(lowest)))]
    assert not any(fell[-N_ITER_NO_CHANGE:])
    assert all(any(fell[i : i + N_ITER_NO_CHANGE]) for i in range(len(fell) - N_ITER_NO_CHANGE))
    assert descent.stopped == f"converged at iteration {len(descent.losses) - 1:,}"


def test_a_descent_that_goes_up_or_overflows_says_so() -> None:
    rng = np.random.default_rng(0)
    network = Network(Architecture((3, 2), "tanh", "mean_squared_error", "float64"), "reference")  # type: ignore[arg-type]
    w = walk(network, 100 * rng.normal(size=(5, 3)), rng.normal(size=(5, 2)), rng, 1e-6)
    assert "η is too large here" in w.descent.stopped


def test_dropout_is_left_out_and_said(rng: np.random.Generator) -> None:
    model = gb.MLP([3, 4, 2], dropout=0.5, device="reference")
    assert "dropout left out" in str(gb.explain(model, *random_batch(model, 4, rng)))
    assert "seed 7" in " ".join(str(gb.explain([3, 4, 2], seed=7)).split())


@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_numbers_of_any_size_fit_on_the_page(scale: float, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 3, 2], "softsign", "mean_squared_error", "reference", "float64")
    X, y = random_batch(model, 6, rng)
    explanation = gb.explain(model, scale * X, scale * y)
    assert explanation.ok or scale > 1  # there phi' is 1e-12, which the rounding of differences hides
    assert max(map(len, explanation.text(values=True).splitlines())) <= 100


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_explained(name: str) -> None:
    assert gb.explain([4, 6, 5, 3], activation=name).ok


def test_units_that_are_all_dead_are_said_to_be(rng: np.random.Generator) -> None:
    model = gb.MLP([4, 8, 3], device="reference")
    model.parameters.b[0][...] = -100
    explanation = gb.explain(model, *random_batch(model, 6, rng))
    assert explanation.ok
    assert "Every path of this batch is dead" in str(explanation)


def test_a_network_with_nan_is_not_ok(rng: np.random.Generator) -> None:
    model = gb.MLP([4, 8, 3], device="reference")
    model.parameters.W[0][0, 0] = np.nan
    explanation = gb.explain(model, *random_batch(model, 6, rng))
    assert not explanation.ok
    assert "✗ nan DIFFERS" in str(explanation)
