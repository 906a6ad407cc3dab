"""Pictures of trainings and networks: what is in them for images, classes and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

import gpubackprop as gb
from gpubackprop.datasets import DataSet, load_dataset
from gpubackprop.inspect import pictures
from gpubackprop.inspect.pictures import confusion_matrix, decision_boundary, draw_training, wrong_examples
from gpubackprop.training import curves

HISTORY = gb.History({"loss": [2.0, 1.0], "val_loss": [2.0, 1.5], "val_accuracy": [0.5, 0.75]})


def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, d: DataSet, predicted: np.ndarray) -> list[Any]:
    """Draw, and return the axes of the picture that was written."""
    made: list[Any] = []

    class Kept(curves.Picture):
        def __init__(self, width: float, height: float) -> None:
            super().__init__(width, height)
            made.append(self)

    monkeypatch.setattr(curves, "Picture", Kept)
    draw_training(tmp_path / "p.png", "title", HISTORY, d, predicted)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    return list(made[0].axes)


def saved(tmp_path: Path, X: np.ndarray, y: np.ndarray, **options: Any) -> DataSet:
    np.savez(tmp_path / "a.npz", X=X, y=y)
    return load_dataset(tmp_path / "a.npz", **options)


def numbers(ax: Any) -> dict[tuple[int, int], int]:
    """Return the numbers in a confusion matrix by (true, predicted)."""
    return {(int(text.get_position()[1]), int(text.get_position()[0])): int(text.get_text()) for text in ax.texts}


def test_digits_are_seen_with_right_and_wrong_predictions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    d = load_dataset("digits")
    predicted = d.y_test.copy()
    wrong = np.flatnonzero(d.y_test == 3)[:2]
    predicted[wrong] = 8
    axes = drawn(monkeypatch, tmp_path, d, predicted)
    images = [ax for ax in axes if ax.images and not ax.get_xlabel()]
    assert len(images) == 12
    assert [ax.get_title() for ax in images] == [*map(str, range(10)), "8, not 3", "8, not 3"]
    np.testing.assert_array_equal(images[-1].images[0].get_array(), d.X_test[wrong[1]].reshape(8, 8))
    confusion = next(ax for ax in axes if ax.get_xlabel() == "predicted class")
    assert numbers(confusion)[3, 8] == 2
    assert sum(numbers(confusion).values()) == len(predicted)
    assert [ax.get_xlabel() for ax in axes].count("epoch") == 2


def test_classes_without_images_are_a_confusion_matrix_with_their_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    d = saved(tmp_path, np.ones((30, 3)), np.array(["iris", "rose", "tulip"])[np.arange(30) % 3])
    axes = drawn(monkeypatch, tmp_path, d, np.zeros(6, int))
    assert len(axes) == 3
    assert [label.get_text() for label in axes[-1].get_yticklabels()] == ["iris", "rose", "tulip"]
    assert numbers(axes[-1]) == {(0, 0): 2, (1, 0): 2, (2, 0): 2}


@pytest.mark.parametrize("columns", [1, 2])
def test_numbers_are_predicted_against_true(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, columns: int) -> None:
    y = np.random.default_rng(0).normal(size=(20, columns))
    d = saved(tmp_path, np.ones((20, 3)), y, classification=False)
    axes = drawn(monkeypatch, tmp_path, d, d.y_test + 1)
    points = axes[-1].collections[0].get_offsets()
    np.testing.assert_allclose(points, np.column_stack([d.y_test.ravel(), d.y_test.ravel() + 1]))


def test_rows_of_probabilities_and_several_outputs_are_classes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    d = saved(tmp_path, np.ones((30, 3)), np.eye(3)[np.arange(30) % 3])
    assert numbers(drawn(monkeypatch, tmp_path, d, d.y_test.argmax(axis=1))[-1]) == {(i, i): 2 for i in range(3)}
    both = np.random.default_rng(0).integers(0, 2, (30, 2))
    d = saved(tmp_path, np.ones((30, 3)), both)
    assert sum(numbers(drawn(monkeypatch, tmp_path, d, d.y_test.copy())[-1]).values()) == 12


def test_the_best_error_is_the_least() -> None:
    from gpubackprop.training.curves import learning_curve

    picture = learning_curve({"loss": [3.0, 2.0, 1.0], "val_loss": [3.0, 2.0, 1.5], "val_mae": [2.0, 0.5, 1.0]})
    assert picture.axes[1].get_title() == "best 0.5000"


# ---------------------------------------------------------------------- networks


def trained(inputs: int, outputs: int, loss: str = "softmax_cross_entropy", **options: Any) -> Any:
    """Return a small network of random weights, which is as good for a picture as a trained one."""
    return gb.MLP([inputs, 8, outputs], "tanh", loss, device="reference", seed=1, **options)


def test_a_confusion_matrix_counts_predictions(rng: np.random.Generator) -> None:
    model, X, y = trained(4, 3), rng.normal(size=(60, 4)), rng.integers(0, 3, 60)
    (ax,) = confusion_matrix(model, X, y).axes
    said = model.predict(X)
    assert numbers(ax) == {
        (i, j): int(((y == i) & (said == j)).sum())
        for i in range(3)
        for j in range(3)
        if ((y == i) & (said == j)).any()
    }
    assert ax.get_title() == f"{(said == y).sum()} of 60 samples predicted right"


def test_wrong_examples_are_the_surest_mistakes(rng: np.random.Generator) -> None:
    model, X, y = trained(6, 3), rng.normal(size=(60, 6)), rng.integers(0, 3, 60)
    said, sure = model.predict(X), model.predict_proba(X).max(axis=1)
    wrong = np.flatnonzero(said != y)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")]
    picture = wrong_examples(model, X, y, (2, 3), most=7)
    shown = [ax for ax in picture.axes if ax.images]
    assert len(shown) == 7
    for ax, i in zip(shown, wrong, strict=False):
        np.testing.assert_array_equal(ax.images[0].get_array(), X[i].reshape(2, 3))
        assert ax.get_title() == f"{said[i]}, not {y[i]}\n{sure[i]:.0%} sure"
    assert picture.get_suptitle() == f"{len(wrong)} of 60 samples predicted wrong"
    right = wrong_examples(model, X, said, (2, 3))
    assert not [ax for ax in right.axes if ax.images]
    with pytest.raises(ValueError, match="shape is"):
        wrong_examples(model, X, y, (2, 2))


@pytest.mark.parametrize(("outputs", "loss"), [(3, "softmax_cross_entropy"), (1, "sigmoid_cross_entropy")])
def test_a_decision_boundary_has_the_color_of_the_predicted_class(
    rng: np.random.Generator, outputs: int, loss: str
) -> None:
    k = max(outputs, 2)
    model, X = trained(2, outputs, loss), rng.normal(size=(50, 2))
    y = np.ravel(model.predict(X)).copy()
    y[:5] = (y[:5] + 1) % k
    (ax,) = decision_boundary(model, X, y, resolution=11).axes
    image, (left, right, bottom, top) = ax.images[0].get_array(), ax.images[0].get_extent()
    assert image.shape == (11, 11, 3)
    grid = np.column_stack([a.ravel() for a in np.meshgrid(np.linspace(left, right, 11), np.linspace(bottom, top, 11))])
    colors = np.array([to_rgb(color) for color in pictures.CLASS_COLORS])[np.ravel(model.predict(grid)).astype(int)]
    drawn = (1 - image.reshape(-1, 3)) / (1 - colors)  # the strength: one number for the three channels
    np.testing.assert_allclose(drawn, drawn[:, :1].repeat(3, axis=1), rtol=1e-6)
    points = [c for c in ax.collections if len(c.get_offsets()) and len(c.get_facecolors()) == 1]
    assert sum(len(c.get_offsets()) for c in points) == 50
    edges = np.concatenate([c.get_edgecolors()[:, 0] for c in points])
    assert (edges == 0).sum() == 5  # black: predicted wrong
    assert ax.get_title() == "45 of 50 samples predicted right"


def test_a_decision_boundary_takes_columns_by_name_and_numbers(rng: np.random.Generator) -> None:
    import pandas as pd

    X = rng.normal(size=(40, 2)) * [1, 100]
    df, model = pd.DataFrame(X, columns=["a", "b"]), trained(2, 1, "mean_squared_error")
    model.fit(df, X[:, 0], epochs=1, standardize=True, progress=False)
    surface, bar = decision_boundary(model, df[["b", "a"]], X[:, 0], resolution=5).axes
    assert (surface.get_xlabel(), surface.get_ylabel()) == ("b", "a")
    points = next(c for c in surface.collections if len(c.get_offsets()) == 40)
    np.testing.assert_array_equal(points.get_offsets(), X[:, ::-1])
    np.testing.assert_array_equal(points.get_array(), X[:, 0])
    low, high = bar.get_ylim()
    assert low <= X[:, 0].min()
    assert X[:, 0].max() <= high


def test_what_a_picture_is_not_of_is_said(rng: np.random.Generator) -> None:
    X = rng.normal(size=(20, 3))
    with pytest.raises(ValueError, match="two columns of numbers"):
        decision_boundary(trained(3, 2), X, np.zeros(20, int))
    with pytest.raises(ValueError, match="mean_squared_error"):
        confusion_matrix(trained(3, 1, "mean_squared_error"), X, X[:, 0])
    with pytest.raises(ValueError, match="one class for each sample"):
        confusion_matrix(trained(3, 2, "sigmoid_cross_entropy"), X, np.zeros((20, 2)))
    with pytest.raises(ValueError, match="2 numbers"):
        decision_boundary(trained(2, 2, "mean_squared_error"), X[:, :2], X[:, :2])
    with pytest.raises(ValueError, match="no records"):
        gb.GradientFlow(X, X).plot()


def test_the_flow_of_gradients_is_drawn_for_each_layer(rng: np.random.Generator, tmp_path: Path) -> None:
    X, y = rng.normal(size=(40, 4)), rng.integers(0, 3, 40)
    flow, model = gb.GradientFlow(X, y), gb.MLP([4, *[8] * 7, 3], device="reference")
    model.fit(X, y, epochs=3, callbacks=flow, progress=False)
    norms, *histograms = flow.plot(tmp_path / "p.png").axes
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert [line.get_label() for line in norms.lines] == [f"layer {name}" for name in (*range(1, 8), "o")]
    np.testing.assert_array_equal([line.get_ydata() for line in norms.lines], flow.norms.T)
    titles = [ax.get_title() for ax in histograms]
    assert [title.split(",")[0] for title in titles] == [f"layer {name}" for name in (1, 2, 4, 5, 7, "o")]
    shares = histograms[-1].collections[0].get_array()
    np.testing.assert_allclose(shares.T.reshape(4, -1), flow.histograms[:, -1] / 24)


def test_a_diagnosis_is_drawn_for_each_layer(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(40, 4)), rng.integers(0, 3, 40)
    model = gb.MLP([4, 8, 8, 3], device="reference")
    model.parameters.b[1][:6] = -100
    found = model.diagnose(X, y)
    units, gradients, updates = found.plot().axes
    dead = [bar.get_width() for bar in units.containers[0]]
    assert dead == [100 * found.layers[0].dead, 75, 0]
    assert [sum(c[i].get_width() for c in units.containers) for i in range(3)] == [100, 100, 0]
    np.testing.assert_array_equal(gradients.lines[0].get_xdata(), [a.gradient_rms for a in found.layers])
    np.testing.assert_array_equal(updates.lines[0].get_xdata(), [a.update_ratio for a in found.layers])
