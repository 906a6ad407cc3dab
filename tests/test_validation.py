"""Errors at the public edge: what was given, what is allowed, in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpubackprop as gb

X = np.arange(12.0).reshape(4, 3)
Y = np.array([0, 1, 1, 0])


def error(call: Any, message: str, kind: type[Exception] = ValueError) -> None:
    """Assert that a call fails with a message of one line."""
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([3],), {}, r"layer_sizes is \[3\]; give at least two whole numbers >= 1, inputs first"),
        (([3, 0, 2],), {}, r"layer_sizes is \[3, 0, 2\]"),
        (([3, 2.5],), {}, r"layer_sizes is \[3, 2\.5\]"),
        (([3, 1],), {}, "softmax_cross_entropy needs at least 2 outputs"),
        (([3, 4, 2], "rleu"), {}, r"unknown activation 'rleu' \(did you mean 'relu'\?\)"),
        (([3, 4, 2], ["relu", "tanh"]), {}, "activation has 2 entries; there are 1 hidden layers: give one or 1"),
        (([3, 2],), {"loss": "entropy"}, "unknown loss 'entropy'"),
        (([3, 2],), {"device": "gpx"}, "unknown device 'gpx'"),
        (([3, 2],), {"dtype": "float16"}, "float32, float64.*'float16'"),
        (([3, 2],), {"dtype": "number"}, "unknown dtype 'number'"),
        (([3, 2],), {"seed": -1}, r"seed is -1; it must be a whole number in \[0, 2\^64\)"),
        (([3, 2],), {"dropout": 1.0}, r"dropout is 1\.0; it must be in \[0, 1\)"),
        (([3, 2],), {"initializer": "he"}, "unknown initializer 'he'.*; choose from he_normal"),
    ],
)
def test_a_network_that_cannot_be(arguments: tuple, options: dict, message: str) -> None:
    error(lambda: gb.MLP(*arguments, **options), message)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((4, 2)), r"X has shape \(4, 2\); the network takes \(samples, 3\)"),
        (np.zeros(3), r"X has shape \(3,\); the network takes \(samples, 3\)"),
        (np.zeros((0, 3)), r"X has shape \(0, 3\): there are no samples"),
        (np.zeros((2, 2, 3)), r"X has shape \(2, 2, 3\)"),
        (np.array([["a", "b", "c"]]), "X is not an array of real numbers"),
        (np.zeros((4, 3), complex), "X is not an array of real numbers: complex128"),
        (None, "X is not an array of real numbers: NoneType"),
        (np.ma.masked_greater(X, 5), "X is a masked array with masked values"),
        (np.array([[None, 1, 2]], object), "X is not an array of real numbers: object"),
        ([[1, 2, 3], [4, 5]], "X is not an array of real numbers: list"),
    ],
)
def test_features_of_a_wrong_kind(X: Any, message: str, device: str) -> None:
    model = gb.MLP([3, 2], device=device)
    error(lambda: model.forward(X), message)
    error(lambda: model.predict(X), message)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_errors_where_a_network_is_trained_or_used(bad: float, device: str) -> None:
    model = gb.MLP([3, 2], device=device)
    Z = X.copy()
    Z[1, 2] = bad
    message = r"X holds NaN or infinity \(1 of 12 values\); remove or replace them"
    error(lambda: model.fit(Z, Y, progress=False), message)
    error(lambda: model.predict(Z), message)
    error(lambda: model.evaluate(Z, Y), message)


def test_numbers_whose_sum_overflows_are_not_infinite() -> None:
    model = gb.MLP([3, 2], dtype="float64")
    with np.errstate(over="ignore", invalid="ignore"):
        assert model.predict(np.full((4, 3), 1e308)).shape == (4,)


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        ("softmax_cross_entropy", [0, 1, 2, 0], "y holds labels from 0 to 2; with 2 outputs they must be 0 to 1"),
        ("softmax_cross_entropy", [0, -1, 1, 0], "y holds labels from -1 to 1"),
        ("softmax_cross_entropy", [0, 1e300, 1, 0], r"y holds labels from 0 to 1e\+300; with 2 outputs"),
        ("softmax_cross_entropy", [0, 0.5, 1, 0], "labels that are not whole numbers; class indices are 0, 1, 2"),
        (
            "softmax_cross_entropy",
            [0, 1, 1],
            r"y has shape \(3,\); softmax_cross_entropy with 2 outputs and 4 samples takes \(4, 2\) or class indices \(4,\)",
        ),
        ("softmax_cross_entropy", [[0.5, 0.6]] * 4, "the rows of y are not probabilities: they must sum to 1"),
        (
            "softmax_cross_entropy",
            [[-0.5, 1.5]] * 4,
            r"y holds values from -0\.5 to 1\.5; softmax_cross_entropy takes values in \[0, 1\]",
        ),
        ("softmax_cross_entropy", ["a", None, "a", "b"], "y of sample 2 is None, and others are text"),
        ("softmax_cross_entropy", [0, 1, np.nan, 0], "y holds NaN or infinity"),
        (
            "kl_divergence",
            [0, 1, 1, 0],
            r"y has shape \(4,\); kl_divergence with 2 outputs and 4 samples takes \(4, 2\)$",
        ),
        (
            "mean_squared_error",
            [0, 1, 1, 0],
            r"y has shape \(4,\); mean_squared_error with 2 outputs and 4 samples takes \(4, 2\)$",
        ),
        ("mean_squared_error", [[0, np.inf]] * 4, r"y holds NaN or infinity \(4 of 8 values\)"),
        (
            "sigmoid_cross_entropy",
            [[0, 2]] * 4,
            r"y holds values from 0 to 2; sigmoid_cross_entropy takes values in \[0, 1\]",
        ),
        ("hinge", [[0, 1]] * 4, r"y holds values from 0 to 1; hinge takes -1 and \+1"),
        ("poisson", [[0, -3]] * 4, "y holds -3; poisson takes counts >= 0"),
    ],
)
def test_targets_of_a_wrong_kind(loss: str, y: Any, message: str) -> None:
    model = gb.MLP([3, 2], loss=loss)
    error(lambda: model.fit(X, y, progress=False), message)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones(3), r"sample_weight has shape \(3,\); there are 4 samples: it must be \(4,\)"),
        (np.array([1, 1, -1, 1.0]), "sample_weight must be >= 0, and not all 0"),
        (np.zeros(4), "sample_weight must be >= 0, and not all 0"),
        (np.array([1, 1, np.nan, 1]), "sample_weight holds NaN or infinity"),
    ],
)
def test_weights_of_a_wrong_kind(weight: Any, message: str) -> None:
    model = gb.MLP([3, 2])
    error(lambda: model.fit(X, Y, sample_weight=weight, progress=False), message)
    error(lambda: model.loss_and_gradients(X, Y, weight), message)
    error(lambda: model.evaluate(X, Y, weight), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be a whole number >= 1"),
        ({"epochs": 1.5}, r"epochs is 1\.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"optimizer": "adam2"}, "unknown optimizer 'adam2'"),
        ({"optimizer": 0.1}, "optimizer is 0.1; give a name or an optimizer"),
        (
            {"validation_data": (X[:, :2], Y)},
            r"validation_data: X has shape \(4, 2\); the network takes \(samples, 3\)",
        ),
        ({"validation_data": (X, Y + 5)}, "validation_data: y holds labels from 5 to 6"),
        ({"validation_data": (X, Y, np.ones(3))}, r"validation_data: sample_weight has shape \(3,\)"),
        ({"validation_data": (X,)}, r"validation_data is a tuple of 1; give \(X, y\) or \(X, y, sample_weight\)"),
        ({"validation_data": X[:2]}, "validation_data is a ndarray; give"),
        ({"batch_size": "full"}, "batch_size is 'full'; it must be a whole number >= 1, or 'auto'"),
        ({"batch_size": np.nan}, "batch_size is nan"),
        ({"micro_batch_size": 2.0}, r"micro_batch_size is 2\.0"),
        ({"shuffle": "no"}, "shuffle is 'no'; it must be True or False"),
        ({"stream_data": 1}, "stream_data is 1; it must be True or False"),
        ({"sample_weight": np.ones((4, 1))}, r"sample_weight has shape \(4, 1\)"),
        (
            {"callbacks": gb.EarlyStopping},
            r"callbacks holds the class EarlyStopping; make one, as in EarlyStopping\(...\)",
        ),
        ({"callbacks": print}, "callback builtin_function_or_method has no method that fit calls"),
    ],
)
def test_options_of_fit_out_of_range(options: dict, message: str) -> None:
    model = gb.MLP([3, 2])
    before = model.parameters.flat.copy()
    error(lambda: model.fit(X, Y, progress=False, **options), message)
    assert np.array_equal(model.parameters.flat, before)


def test_an_array_whose_mask_is_empty_is_an_array() -> None:
    model = gb.MLP([3, 2])
    assert np.array_equal(model.predict(np.ma.masked_greater(X, 100)), model.predict(X))


def test_infinities_of_both_signs_are_named_without_a_warning() -> None:
    error(lambda: gb.MLP([3, 2]).predict(X * [[1, np.inf, -np.inf]]), "X holds NaN or infinity")


def test_validation_data_may_have_one_class() -> None:
    history = gb.MLP([3, 2]).fit(X, Y, epochs=1, validation_data=(X[:1], Y[:1]), progress=False)
    assert len(history["val_loss"]) == 1


def test_labels_in_a_column_or_as_floats_are_taken() -> None:
    model = gb.MLP([3, 2])
    expected = float(model.loss_and_gradients(X, Y)[0])
    for y in (Y[:, None], Y.astype(float), Y.astype(np.uint8), Y.astype(bool), Y.tolist()):
        assert float(model.loss_and_gradients(X, y)[0]) == expected


def test_targets_of_one_output_may_be_flat() -> None:
    model = gb.MLP([3, 1], loss="mean_squared_error")
    assert float(model.loss_and_gradients(X, Y)[0]) == float(model.loss_and_gradients(X, Y[:, None])[0])


def test_an_option_that_is_not_there_is_named() -> None:
    model = gb.MLP([3, 2])
    error(
        lambda: model.fit(X, Y, epoch=3),
        r"fit takes no option 'epoch' \(did you mean epochs\?\); it takes epochs, batch_size",
        TypeError,
    )
    error(lambda: model.fit(X, Y, callback=[]), r"no option 'callback' \(did you mean callbacks\?\)", TypeError)


def test_something_that_can_be_read_only_once_is_no_array() -> None:
    model = gb.MLP([3, 2])
    error(
        lambda: model.fit((row for row in X), Y, progress=False),
        "X is of type generator, which can be read only once; give an array",
    )
    error(lambda: model.fit(X, iter(Y), progress=False), "y is of type .*iterator, which can be read only once")
    error(lambda: model.predict(iter(X)), "X is of type .*iterator, which can be read only once")


@pytest.mark.parametrize(("rows", "y"), [(1, [1]), (4, [1, 1, 1, 1]), (4, [[0, 1]] * 4)])
def test_one_sample_or_one_class_is_enough_for_a_chunk_of_a_stream(rows: int, y: Any, device: str) -> None:
    model = gb.MLP([3, 2], device=device)
    before = float(model.loss_and_gradients(X[:rows], y)[0])
    history = model.fit(X[:rows], y, epochs=1, optimizer=gb.SGD(1e-3), progress=False)
    assert history["loss"][0] == pytest.approx(before, rel=1e-6)
    assert float(model.loss_and_gradients(X[:rows], y)[0]) < before


class Hostile:
    """Whatever it is asked for, it raises."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("mine")

    def __iter__(self) -> Any:
        raise ZeroDivisionError("mine")

    def __repr__(self) -> str:
        raise ZeroDivisionError("mine")


TWO = np.array([[1.0, 2.0], [3.0, 4.0]])
LONG = 10**5000  # more digits than Python shows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: gb.MLP([3, 2], device=TWO), r"device is array\(\[\[1., 2.\], \[3., 4.\]\]\); give a name"),
        (lambda m: m.to(["cpu"]), r"device is \['cpu'\]; give a name"),
        (lambda m: m.twin(layer_sizes=[2, 3]), r"layer_sizes is \(2, 3\); a twin has the same parameters, and so \(3, 2\)"),
        (lambda m: gb.MLP([3, 4, 2], 3), "activation is 3; give a name, one of"),
        (lambda m: gb.MLP([3, 2], loss=Hostile()), "loss is <Hostile>; give a name"),
        (lambda m: gb.MLP([3, 2], initializer=0.1), "initializer is 0.1; give a name"),
        (lambda m: gb.MLP([3, 2], initializer=lambda *_: None), r"initializer returned array\(None, dtype=object\)"),
        (lambda m: gb.MLP([3, 2], initializer=lambda *_: 0.5), r"initializer returned array\(0.5\).* of shape \(3, 2\)"),
        (lambda m: gb.MLP([3, 2], initializer=lambda *_: np.full((3, 2), 1e300)), "must return finite numbers"),
        (lambda m: gb.MLP(3), "layer_sizes is 3; it must be a sequence of whole numbers"),
        (lambda m: gb.MLP([3, 2**63, 2]), r"layer_sizes is \[3, 9223372036854775808, 2\]"),
        (lambda m: gb.MLP([3, LONG]), "layer_sizes is <list>"),
        (lambda m: gb.MLP([3, 2], dtype=LONG), "unknown dtype <int>"),
        (lambda m: gb.MLP([3, 2], seed=LONG), "seed is <int>"),
        (lambda m: m.step(4, keep=TWO), r"keep is array\(.*\); it must be True or False"),
        (lambda m: m.step(4, weighted=1), "weighted is 1; it must be True or False"),
        (lambda m: m.step(10**30), r"batch_size is 1000000000000000000000000000000; it must be a whole number below 2\^63"),
        (lambda m: m.fit(X, Y, micro_batch_size=TWO), r"micro_batch_size is array"),
        (lambda m: m.fit(X, Y, batch_size=np.array(["auto", "auto"])), "batch_size is array"),
        (lambda m: m.fit(X, Y, optimizer=TWO), r"optimizer is array\(\[\[1., 2.\], \[3., 4.\]\]\); give"),
        (lambda m: m.fit(X, Y, on_divergence=TWO), "on_divergence is array.*; choose from"),
        (lambda m: m.fit(X, Y, optimizer=Hostile()), "optimizer is <Hostile>; give"),
        (lambda m: m.fit(X, Y, callbacks=TWO), "callback ndarray has no method that fit calls"),
        (lambda m: m.fit(X, Y, callbacks=Hostile()), "callbacks is <Hostile>; give a callback or a list of them"),
        (lambda m: m.forward(Hostile()), "X is not an array of real numbers: Hostile"),
        (lambda m: (m.forward(X), m.backward(X)), r"do has shape \(4, 3\)"),
        (lambda m: m.predictor(4)(np.zeros((4, 3, 1), np.float32)), r"X has shape \(4, 3, 1\); this predictor takes \(4, 3\)"),
        (lambda m: m.load_state_dict({Hostile(): X}), "not expected <list>"),
        (lambda m: setattr(m, "target_shape", 3), "target_shape is 3; it must be a sequence of whole numbers"),
        (lambda m: gb.parity(m, X, Y, devices="cpu"), "devices is 'cpu'; give a list of names"),
        (lambda m: gb.Adam(betas=3), "betas is 3; it must be two numbers"),
        (lambda m: gb.Adam(betas=range(10**12)), r"betas is range\(0, 1000000000000\)"),
        (lambda m: gb.LBFGS(history_size=2**62), "history_size is 4611686018427387904; it must be at most 10,000"),
        (lambda m: gb.SGD(momentum=10**400), "momentum is 1000.*, which is too large for float64"),
        (lambda m: gb.EarlyStopping(monitor=TWO), "monitor is array.*; it must be the name of a column"),
        (lambda m: m.loss(reduction=TWO), "unknown reduction array"),
    ],
)  # fmt: skip
def test_values_of_any_kind_are_named(call: Any, message: str) -> None:
    model = gb.MLP([3, 2], device="reference")
    before = model.parameters.flat.copy()
    error(lambda: call(model), message)
    assert np.array_equal(model.parameters.flat, before)
