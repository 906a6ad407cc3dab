"""The picture of a training: what is in it for images, classes and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.datasets import DataSet, load_dataset
from gpubackprop.inspect.pictures import draw_training
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
