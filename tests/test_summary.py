"""A network and a history, as text and in a notebook."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gpubackprop as gb


@pytest.fixture
def trained() -> tuple[gb.MLP, gb.History]:
    model = gb.MLP([4, 5, 3], ["tanh"], device="reference")
    X, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    return model, model.fit(X, y, epochs=4, validation_data=(X, y), progress=False)


def test_a_summary_counts_the_parameters_of_each_layer() -> None:
    model = gb.MLP([64, 64, 32, 10], ["swish", "relu"], device="reference")
    summary = model.summary()
    assert [layer.parameters for layer in summary.layers] == [4160, 2080, 330]
    assert summary.parameters == model.parameters.count == 6570
    assert summary.nbytes == 6570 * 4
    lines = str(summary).splitlines()
    assert lines[0] == repr(model)
    assert lines[3].split() == ["1", "silu", "(n,", "64)", "(64,", "64)", "(64,)", "4,160"]
    assert lines[-1].split() == ["total", "26,280", "bytes", "6,570"]
    assert gb.MLP([2, 2], dtype="float64", device="reference").summary().nbytes == 6 * 8


def test_a_network_and_a_history_are_tables_in_a_notebook(trained: tuple[gb.MLP, gb.History]) -> None:
    model, history = trained
    for shown, cells in ((model, ["tanh", "(4, 5)", "25"]), (history, ["val_accuracy", f"{min(history['loss']):.4g}"])):
        html = shown._repr_html_()
        assert html.count("<table>") == html.count("</table>") == 1
        assert "<script" not in html
        for cell in cells:
            assert f"<td>{cell}</td>" in html
    assert "&lt;b&gt;" in gb.History({"<b>": [1.0]})._repr_html_()


def test_a_history_is_short(trained: tuple[gb.MLP, gb.History]) -> None:
    history = trained[1]
    shown = f"loss {history['loss'][-1]:.4g}, val_loss {history['val_loss'][-1]:.4g}, val_accuracy"
    assert repr(history).startswith(f"History(4 epochs, {shown}")
    assert "seconds" not in repr(history)
    history.stopped = "interrupted"
    assert repr(history).endswith("stopped: interrupted)")
    assert repr(gb.History()) == "History(0 epochs)"


def test_a_history_plots_its_learning_curve(trained: tuple[gb.MLP, gb.History], tmp_path: Path) -> None:
    picture = trained[1].plot()
    losses, accuracy = picture.axes
    assert [line.get_label() for line in losses.lines] == ["training", "validation"]
    np.testing.assert_array_equal(losses.lines[1].get_ydata(), trained[1]["val_loss"])
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), trained[1]["val_accuracy"])
    assert picture._repr_png_()[:4] == b"\x89PNG"
    trained[1].plot(tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    assert gb.History().plot().axes[0].get_title() == "no epoch was finished"
