"""scikit-learn's estimators trained by gpubackprop: the network that scikit-learn trains, and everything around it."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb

pytest.importorskip("sklearn")

from scipy.sparse import csc_matrix, csr_matrix
from sklearn import neural_network as theirs
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from gpubackprop import sklearn as ours

IRIS = load_iris(return_X_y=True)
X, Y = IRIS[0] / 8, IRIS[1]
WEIGHT = np.random.default_rng(3).uniform(0.1, 2, len(X))
TWO = np.stack([Y > 0, Y > 1], axis=1)
SHORT: dict[str, Any] = {"hidden_layer_sizes": (12, 7), "max_iter": 12, "random_state": 1, "batch_size": 40}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

HAVE_WEIGHTS = "sample_weight" in inspect.signature(theirs.MLPClassifier.fit).parameters  # since scikit-learn 1.7
weights = pytest.mark.skipif(not HAVE_WEIGHTS, reason="this scikit-learn has no sample weights")


def both(kind: str, **parameters: Any) -> tuple[Any, Any]:
    """Return scikit-learn's estimator and ours, which never leaves a fit to scikit-learn."""
    return getattr(theirs, kind)(**parameters), getattr(ours, kind)(device="cpu", **parameters)


def assert_same(a: Any, b: Any, rtol: float = 1e-11) -> None:
    """Assert that two fitted estimators are the same but for rounding, which each step carries on."""
    assert vars(a).keys() ^ vars(b).keys() <= OURS
    assert (a.n_iter_, getattr(a, "t_", 0), a.n_outputs_, a.out_activation_) == (
        b.n_iter_, getattr(b, "t_", 0), b.n_outputs_, b.out_activation_,
    )  # fmt: skip
    for p, q in zip((*a.coefs_, *a.intercepts_), (*b.coefs_, *b.intercepts_), strict=True):
        assert p.dtype == q.dtype
        np.testing.assert_allclose(q, p, rtol=0, atol=rtol * np.abs(p).max())
    np.testing.assert_allclose(b.loss_, a.loss_, rtol=rtol)
    if a.solver != "lbfgs":
        np.testing.assert_allclose(b.loss_curve_, a.loss_curve_, rtol=rtol)
        assert a._no_improvement_count == b._no_improvement_count
        one, other = vars(a._optimizer), vars(b._optimizer)
        assert one.keys() == other.keys()
        np.testing.assert_allclose(other["learning_rate"], one["learning_rate"], rtol=1e-15)
        for name in {"ms", "vs", "velocities"} & one.keys():
            for p, q in zip(one[name], other[name], strict=True):
                np.testing.assert_allclose(q, p, rtol=0, atol=rtol * max(np.abs(p).max(), 1e-300))


OURS = {"device", "dtype", "dropout", "class_weight", "loss"}

STOCHASTIC = {
    "adam": {},
    "betas": {"beta_1": 0.4, "beta_2": 0.9, "epsilon": 1e-4},
    "alpha": {"alpha": 0.5, "activation": "tanh"},
    "clipped": {"batch_size": 1000, "activation": "logistic"},
    "in order": {"shuffle": False, "batch_size": 1},
    "identity": {"activation": "identity", "hidden_layer_sizes": 5},
    "sgd": {"solver": "sgd", "alpha": 0.1},
    "plain": {"solver": "sgd", "momentum": 0.0, "nesterovs_momentum": False},
    "invscaling": {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.3},
    "adaptive": {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.1, "n_iter_no_change": 2, "max_iter": 40},
    "early": {"early_stopping": True, "validation_fraction": 0.3, "n_iter_no_change": 3, "max_iter": 40},
}


@pytest.mark.filterwarnings("ignore:Got `batch_size`")
@pytest.mark.parametrize("options", STOCHASTIC.values(), ids=STOCHASTIC)
@pytest.mark.parametrize("weighted", [False, pytest.param(True, marks=weights)], ids=["", "weighted"])
def test_the_same_random_state_gives_the_network_of_scikit_learn(options: dict[str, Any], weighted: bool) -> None:
    a, b = both("MLPClassifier", **SHORT | options)
    weight = [WEIGHT] if weighted else []
    a.fit(X, Y, *weight)
    b.fit(X, Y, *weight)
    assert_same(a, b)
    np.testing.assert_array_equal(a.predict(X), b.predict(X))
    if a.early_stopping:
        assert a.validation_scores_ == b.validation_scores_


@pytest.mark.parametrize(
    ("kind", "y", "options"),
    [
        ("MLPClassifier", Y > 0, {}),
        ("MLPClassifier", TWO, {"alpha": 0.1}),
        ("MLPClassifier", np.array(["setosa", "versicolor", "virginica"])[Y], {}),
        ("MLPClassifier", np.zeros(len(X), int), {}),
        ("MLPRegressor", X[:, 0] * X[:, 1], {}),
        ("MLPRegressor", X[:, 1:], {"solver": "sgd", "early_stopping": True}),
        ("MLPRegressor", TWO.astype(float), {"loss": "poisson"}),
    ],
    ids=["binary", "multilabel", "text", "one class", "real", "several", "poisson"],
)
def test_every_kind_of_target(kind: str, y: np.ndarray, options: dict[str, Any]) -> None:
    if "loss" in options and "loss" not in theirs.MLPRegressor().get_params():
        pytest.skip("this scikit-learn has no Poisson loss")
    a, b = both(kind, **SHORT | options)
    assert_same(a.fit(X, y), b.fit(X, y))
    np.testing.assert_allclose(b.predict(X), a.predict(X)) if kind == "MLPRegressor" else None
    if kind == "MLPClassifier":
        np.testing.assert_array_equal(b.classes_, a.classes_)


def test_float32_stays_float32() -> None:
    a, b = both("MLPClassifier", **SHORT)
    assert_same(a.fit(X.astype(np.float32), Y), b.fit(X.astype(np.float32), Y), rtol=1e-5)
    assert b.coefs_[0].dtype == np.float32


@pytest.mark.parametrize("kind", [csr_matrix, csc_matrix])
@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_sparse_data(kind: Any, solver: str) -> None:
    a, b = both("MLPClassifier", **SHORT | {"solver": solver, "max_iter": 3})
    assert_same(a.fit(kind(X), Y), b.fit(kind(X), Y))


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0, "activation": "tanh"}])
def test_the_first_iterations_of_lbfgs(options: dict[str, Any]) -> None:
    a, b = both("MLPClassifier", **SHORT | {"solver": "lbfgs", "max_iter": 4} | options)
    assert_same(a.fit(X, Y), b.fit(X, Y))
    a, b = both("MLPRegressor", **SHORT | {"solver": "lbfgs", "max_iter": 4} | options)
    assert_same(a.fit(X, X[:, 1:]), b.fit(X, X[:, 1:]))


@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_partial_fit_goes_on_with_other_sizes_and_through_a_pickle(solver: str) -> None:
    a, b = both("MLPClassifier", **SHORT | {"solver": solver})
    for rows in (slice(0, 150, 3), slice(1, 150, 2), slice(0, 150, 3)):
        a.partial_fit(X[rows], Y[rows], classes=[0, 1, 2])
        b = pickle.loads(pickle.dumps(b)).partial_fit(X[rows], Y[rows], classes=[0, 1, 2])
        assert_same(a, b)
    # and a network of scikit-learn's goes on here, one of ours there
    a, b = b.to_sklearn(), ours.MLPClassifier.from_sklearn(a, device="cpu")
    assert_same(a.partial_fit(X, Y), b.partial_fit(X, Y))


def test_partial_fit_keeps_the_optimizer_of_its_first_call() -> None:
    a, b = both("MLPClassifier", **SHORT)
    for changed in ({}, {"solver": "sgd", "beta_1": 0.5, "learning_rate_init": 1.0}, {"alpha": 0.3}):
        a.set_params(**changed).partial_fit(X, Y, classes=[0, 1, 2])
        b.set_params(**changed).partial_fit(X, Y, classes=[0, 1, 2])
        assert_same(a, b)


def test_warm_start_and_what_changes_between_two_fits() -> None:
    a, b = both("MLPClassifier", **SHORT | {"warm_start": True})
    for changed in ({}, {"alpha": 0.3, "beta_1": 0.5}, {"solver": "sgd"}):
        a.set_params(**changed).fit(X, Y)
        b.set_params(**changed).fit(X, Y)
        assert_same(a, b)
    a.coefs_[0][...] = b.coefs_[0][...] = 0.25  # what a user sets is where the next fit begins
    assert_same(a.fit(X, Y), b.fit(X, Y))


def test_a_random_state_that_is_a_generator_is_drawn_from_as_often() -> None:
    a, b = both("MLPClassifier", **SHORT)
    one, other = np.random.RandomState(5), np.random.RandomState(5)
    assert_same(a.set_params(random_state=one).fit(X, Y), b.set_params(random_state=other).fit(X, Y))
    assert one.uniform() == other.uniform()


def test_messages_are_those_of_scikit_learn(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for estimator in both("MLPClassifier", **SHORT | {"verbose": True, "batch_size": 5000}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            estimator.fit(X, Y)
        said.append(([str(w.message) for w in caught], capsys.readouterr().out))
        assert ConvergenceWarning in [w.category for w in caught]
    assert said[0] == said[1]
    assert "Iteration 12, loss = " in said[1][1]


def test_numbers_that_are_not_finite_are_an_error_as_there() -> None:
    for estimator in both("MLPRegressor", **SHORT | {"solver": "sgd", "learning_rate_init": 1e6}):
        with np.errstate(all="ignore"), pytest.raises(ValueError, match="non-finite"):
            estimator.fit(X * 100, Y)


@weights
def test_a_mini_batch_without_weight_is_an_error_as_there() -> None:
    for estimator in both("MLPClassifier", **SHORT | {"shuffle": False}):
        with pytest.raises(ZeroDivisionError):
            estimator.fit(X, Y, sample_weight=np.arange(len(X)) >= 40)


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_a_fit_leaves_nothing_to_the_garbage_collector(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Noted(ours.Trainer):  # type: ignore[misc, name-defined]
        def __init__(self, kind: Any) -> None:
            super().__init__(kind)
            made.append(weakref.ref(self))

    monkeypatch.setattr(ours, "Trainer", Noted)
    monkeypatch.setattr(ours, "_idle", [])  # of earlier fits
    monkeypatch.setattr(ours, "IDLE_LIMIT", 0)  # and none is kept for another
    gc.collect()
    gc.disable()
    try:
        ours.MLPClassifier(device="cpu", **SHORT | {"solver": solver}).fit(X, Y)
        assert [trainer() for trainer in made] == [None]
    finally:
        gc.enable()


def test_ctrl_c_keeps_what_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = ours.Trainer.epoch

    def interrupted(self: Any, *arguments: Any) -> float:
        if self.state.counters[0] >= 8:
            raise KeyboardInterrupt
        return epoch(self, *arguments)

    monkeypatch.setattr(ours.Trainer, "epoch", interrupted)
    monkeypatch.setattr(ours, "_idle", [])
    a, b = both("MLPClassifier", **SHORT | {"max_iter": 2})
    with pytest.warns(UserWarning, match="interrupted"):
        b.set_params(max_iter=9).fit(X, Y)
    assert not ours._idle
    assert_same(a.fit(X, Y), b)
    assert "update_params" not in vars(b._optimizer)


@pytest.mark.parametrize("kind", [ours.MLPClassifier, ours.MLPRegressor])
def test_parameters_and_defaults_are_those_of_the_installed_scikit_learn(kind: Any) -> None:
    mine, installed = kind().get_params(), getattr(theirs, kind.__name__)().get_params()
    assert {name: mine[name] for name in installed} == installed
    assert {*mine} - {*installed} <= OURS
    assert isinstance(kind(), getattr(theirs, kind.__name__))
    with pytest.raises(TypeError, match="devise"):
        kind(devise="cpu")


def test_a_device_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown device 'cup'"):
        ours.MLPClassifier(device="cup").fit(X, Y)
    with pytest.raises(ValueError, match="device"):
        ours.MLPClassifier(device=3).fit(X, Y)


def test_the_reference_gives_the_same(device: str) -> None:
    a, _ = both("MLPClassifier", **SHORT | {"max_iter": 3})
    for options in ({}, {"solver": "sgd"}, {"solver": "lbfgs"}):
        for weight in [[], [WEIGHT]][: 1 + HAVE_WEIGHTS]:
            b = ours.MLPClassifier(device=device, **SHORT | {"max_iter": 3} | options)
            assert_same(clone(a).set_params(**options).fit(X, Y, *weight), b.fit(X, Y, *weight))


def test_clone_copy_and_pickle() -> None:
    _, b = both("MLPClassifier", **SHORT)
    b.fit(X, Y)
    assert clone(b).get_params() == b.get_params()
    for other in (copy.deepcopy(b), pickle.loads(pickle.dumps(b))):
        np.testing.assert_array_equal(other.predict_proba(X), b.predict_proba(X))


def test_predictions_of_many_classes_and_where_an_output_overflows() -> None:
    labels = np.arange(len(X)) % 40
    fitted = theirs.MLPClassifier(**SHORT | {"activation": "identity"}).fit(X, labels)
    for scale in (1.0, 1e200):  # the outputs are a product of three matrices
        fitted.coefs_ = [W * scale for W in fitted.coefs_]
        here = ours.MLPClassifier.from_sklearn(fitted)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(here.predict_proba(X), fitted.predict_proba(X))
            np.testing.assert_array_equal(here.predict(X), fitted.predict(X))
            assert np.isfinite(fitted.predict_proba(X)).all() == (scale == 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic", "identity", "gelu"])
@pytest.mark.parametrize("kind", ["MLPClassifier", "MLPRegressor"])
@pytest.mark.parametrize("fused", [0, ours.FUSED])
def test_large_predictions_are_those_of_small_ones(
    fused: int, kind: str, activation: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    product, used = ours._ByKernels.product, []
    monkeypatch.setattr(ours._ByKernels, "product", lambda by, h, W: used.append(1) or product(by, h, W))
    given = X.astype(dtype)
    fitted = getattr(ours, kind)(device="cpu", **SHORT | {"activation": activation}).fit(given, Y)
    small, call = fitted._forward_pass_fast(given), fitted.predict
    labels = call(given)
    assert not used
    monkeypatch.setattr(ours, "LARGE", 0)
    monkeypatch.setattr(ours, "FUSED", fused)
    large = fitted._forward_pass_fast(given)
    assert len(used) == len(fitted.coefs_)
    assert large.dtype == small.dtype
    np.testing.assert_allclose(large, small, rtol=0, atol=100 * np.finfo(dtype).eps * np.abs(small).max())
    np.testing.assert_array_equal(fitted._forward_pass_fast(given[:7]), large[:7])  # no row depends on the others
    np.testing.assert_allclose(call(given), labels, rtol=1e-4 if dtype is np.float32 else 1e-12)
    count = len(used)
    for other in (csr_matrix(given), np.asfortranarray(given), np.repeat(given, 2, axis=0)[::2]):
        np.testing.assert_allclose(call(other), labels, rtol=1e-4 if dtype is np.float32 else 1e-12)
    assert count <= len(used) <= count + 2 * len(fitted.coefs_)  # scikit-learn's checks may copy what has other strides


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("n", [1, 40])
def test_inputs_that_are_not_finite_are_an_error_as_there(
    n: int, large: bool, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "_predicts_with_kernels", lambda *_: large)
    given, said = X[:n].copy(), []
    given[-1, -1] = value
    for fitted in both("MLPClassifier", **SHORT):
        fitted.fit(X, Y)
        for W in (fitted.coefs_[0], np.zeros_like(fitted.coefs_[0])):  # 0 times infinity is NaN
            fitted.coefs_[0] = W
            with pytest.raises(ValueError, match="Input X contains") as error:
                fitted.predict(given)
            said.append(str(error.value))
    assert said[:2] == [text.replace("gpubackprop", "sklearn") for text in said[2:]]
    assert said[0] == said[1]


@pytest.mark.parametrize("large", [False, True])
def test_weights_that_are_not_finite_are_no_fault_of_the_inputs(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_predicts_with_kernels", lambda *_: large)
    for fitted in both("MLPRegressor", **SHORT):
        fitted.fit(X, Y)
        fitted.coefs_[0][0, 0] = np.nan
        with np.errstate(all="ignore"), pytest.raises(ValueError, match="contains NaN"):
            fitted.score(X, Y)


def test_a_prediction_loads_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours._ByKernels, "product", lambda *_: pytest.fail("they are not loaded"))
    monkeypatch.setattr(ours, "LARGE", 0)
    monkeypatch.setattr(ours, "_warm", set())
    ours.MLPClassifier.from_sklearn(theirs.MLPClassifier(**SHORT).fit(X, Y)).predict(X)


def test_a_subclass_with_outputs_of_its_own_predicts_by_them() -> None:
    class Own(ours.MLPClassifier):  # type: ignore[misc]
        def _forward_pass_fast(self, X: Any, check_input: bool = True) -> Any:
            return super()._forward_pass_fast(X, check_input)[:, ::-1]

    fitted = ours.MLPClassifier(device="cpu", **SHORT).fit(X, Y)
    np.testing.assert_array_equal(Own.from_sklearn(fitted).predict(X), 2 - fitted.predict(X))


@pytest.mark.parametrize("y", [Y, Y > 0, TWO], ids=["classes", "binary", "multilabel"])
def test_there_and_back_exactly(y: np.ndarray) -> None:
    fitted = theirs.MLPClassifier(**SHORT).fit(X, y)
    here = ours.MLPClassifier.from_sklearn(fitted, device="cpu")
    back = here.to_sklearn()
    assert (type(back), here.device) == (theirs.MLPClassifier, "cpu")
    assert vars(back).keys() == vars(fitted).keys()
    assert back.get_params() == fitted.get_params()
    for p, q in zip((*fitted.coefs_, *fitted.intercepts_), (*back.coefs_, *back.intercepts_), strict=True):
        np.testing.assert_array_equal(p, q)
        assert not np.shares_memory(p, q)
    assert_same(fitted.partial_fit(X, y), here.partial_fit(X, y))
    with pytest.raises(TypeError, match="must be scikit-learn's MLPRegressor"):
        ours.MLPRegressor.from_sklearn(fitted)


def test_a_fitted_estimator_as_a_network() -> None:
    for fitted in (
        ours.MLPClassifier(activation="tanh", **SHORT).fit(X, Y),
        ours.MLPClassifier(activation="gelu", **SHORT).fit(X, Y),
        ours.MLPRegressor(activation="logistic", **SHORT).fit(X, X[:, 1:]),
    ):
        model = fitted.to_mlp()
        np.testing.assert_array_equal(model.parameters.W[1], fitted.coefs_[1])
        there = fitted.predict_proba(X) if hasattr(fitted, "predict_proba") else fitted.predict(X)
        np.testing.assert_allclose(
            model.predict_proba(X) if hasattr(fitted, "classes_") else model.predict(X), there, rtol=1e-9
        )


@weights
def test_class_weight_is_what_a_sample_weighs() -> None:
    weighed = ours.MLPClassifier(device="cpu", class_weight={0: 3.0, 2: 0.5}, **SHORT).fit(X, Y, WEIGHT)
    a, _ = both("MLPClassifier", **SHORT)
    assert_same(a.fit(X, Y, WEIGHT * np.array([3.0, 1.0, 0.5])[Y]), weighed)
    with pytest.raises(ValueError, match="balanced"):
        ours.MLPClassifier(class_weight="balanced").partial_fit(X, Y, classes=[0, 1, 2])


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu"},
        {"activation": ["relu", "sigmoid"]},
        {"activation": gb.activations.ACTIVATIONS["mish"]},
        {"dropout": 0.3},
    ],
)
def test_what_scikit_learn_has_not(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = [ours.MLPClassifier(**SHORT | options | {"max_iter": 60}).fit(X, Y) for _ in range(2)]
    assert made[0].loss_curve_ == made[1].loss_curve_
    assert made[0].score(X, Y) > 0.6
    assert clone(made[0]).fit(X, Y).loss_ == made[0].loss_
    if "dropout" not in options:
        with pytest.raises(ValueError, match="scikit-learn has"):
            made[0].to_sklearn()
    monkeypatch.setattr(ours, "DENSE_LIMIT", 1000)
    with pytest.raises(ValueError, match="left to it"):
        made[0].fit(csr_matrix(X), Y)


def test_activations_per_layer_that_are_too_few() -> None:
    with pytest.raises(ValueError, match="there are 2 hidden layers"):
        ours.MLPClassifier(**SHORT | {"activation": ["relu"]}).fit(X, Y)


def test_a_pipeline_in_a_search_with_two_workers() -> None:
    found = []
    for mlp in both("MLPClassifier", **SHORT):
        search = GridSearchCV(
            make_pipeline(StandardScaler(), mlp), {f"{type(mlp).__name__.lower()}__alpha": [1e-4, 1.0]}, n_jobs=2, cv=2
        )
        search.fit(X, Y)
        found.append((search.best_params_, search.best_score_, search.predict(X).tolist()))
    assert found[0] == found[1]


def test_short_fits_are_left_to_scikit_learn_until_the_kernels_are_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ours, "_warm", set())
    monkeypatch.setattr(ours, "_cold", ours.Counter())
    monkeypatch.setattr(ours, "_seconds_to_start", {})
    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ours, "told", ours.Counter())
    short = ours.MLPClassifier(**SHORT).fit(X, Y)
    assert ours.told[""] == 0
    assert "not yet compiled" in next(iter(ours.told))
    ours.MLPClassifier(device="cpu", **SHORT).fit(X, Y)
    again = ours.MLPClassifier(**SHORT).fit(X, Y)
    assert ours.told[""] == 2
    assert_same(short, again)
    for name in ("_warm", "_seconds_to_start"):  # another process on this machine
        getattr(ours, name).clear()
    ours.MLPClassifier(**SHORT).fit(X, Y)
    assert any("not yet loaded" in reason for reason in ours.told)
    for _ in range(200):  # more work than loading them is
        ours.MLPClassifier(**SHORT).fit(X, Y)
        if ours._warm:
            break
    assert ours._warm


def test_a_subclass_with_passes_of_its_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(ours.MLPClassifier):  # type: ignore[misc]
        def _forward_pass(self, activations: Any) -> Any:
            return super()._forward_pass(activations)

    monkeypatch.setattr(ours, "told", ours.Counter())
    Own(**SHORT).fit(X, Y)
    assert dict(ours.told) == {"Own has a _forward_pass of its own": 1}
    monkeypatch.setattr(ours, "DENSE_LIMIT", 1000)
    with pytest.warns(UserWarning, match="device is 'cpu', but"):
        ours.MLPClassifier(device="cpu", **SHORT).fit(csr_matrix(X), Y)
    assert any("sparse" in reason for reason in ours.told)


def test_the_rules_are_not_known_by_name() -> None:
    assert not [name for name in gb.optimizers.OPTIMIZERS if name.startswith("_")]


@pytest.mark.slow
@parametrize_with_checks(
    [
        ours.MLPClassifier(device="cpu"),
        ours.MLPRegressor(device="cpu", solver="sgd", learning_rate_init=1e-3),
        ours.MLPClassifier(max_iter=20),
        ours.MLPRegressor(device="cpu", solver="lbfgs", early_stopping=True),
    ]
)
def test_the_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python away from the repository."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip


SCRIPT = """
import sys, numpy as np
from sklearn.neural_network import MLPClassifier
X = np.random.default_rng(0).normal(size=(200, 5)); y = (X[:, 0] > 0).astype(int)
m = MLPClassifier(random_state=0, max_iter=4).fit(X, y)
print(sys.argv[1:], __name__, type(m).__module__, sys.path[0] == sys.argv[1], m.loss_)
"""


def test_an_unchanged_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import warnings; warnings.simplefilter('ignore')" + SCRIPT)
    plain = run([str(script), str(tmp_path)], tmp_path)
    fast = run(["-m", "gpubackprop.accel", "--at-once", str(script), str(tmp_path)], tmp_path)
    module = run(["-m", "gpubackprop.accel", "-m", "script", str(tmp_path)], tmp_path)
    assert fast.stderr == "gpubackprop: 1 fits accelerated in this process\n"
    assert "0 fits accelerated" in module.stderr
    assert "1 left to scikit-learn: short" in module.stderr
    for done in (fast, module):
        *same, loss = plain.stdout.split()
        assert done.stdout.split()[:-1] == same
        np.testing.assert_allclose(float(done.stdout.split()[-1]), float(loss), rtol=1e-12)
    assert "True" in fast.stdout


def test_what_the_command_is_told_wrong(tmp_path: Path) -> None:
    for arguments in ([], ["--what"], ["missing.py"]):
        done = run(["-m", "gpubackprop.accel", *arguments], tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


def test_workers_of_joblib_are_accelerated_and_pickles_stay_those_of_scikit_learn(tmp_path: Path) -> None:
    code = """
import pickle, warnings
warnings.simplefilter("ignore")
from sklearn.neural_network import MLPClassifier
from gpubackprop import accel
accel.install(at_once=True)
from joblib import Parallel, delayed
from sklearn.datasets import load_iris
def fit(m):
    from sklearn.neural_network import MLPClassifier
    m.fit(*load_iris(return_X_y=True))
    return type(m)._fit_stochastic.__module__, type(m) is MLPClassifier
print(Parallel(n_jobs=2)(delayed(fit)(MLPClassifier(max_iter=2)) for _ in range(2)))
m = MLPClassifier(max_iter=2).fit(*load_iris(return_X_y=True))
print(b"gpubackprop" in pickle.dumps(m))
accel.uninstall()
print(MLPClassifier._fit_stochastic.__module__)
"""
    done = run(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    first, pickled, after = done.stdout.splitlines()
    assert eval(first) == [("gpubackprop.sklearn", True)] * 2
    assert (pickled, after) == ("False", "sklearn.neural_network._multilayer_perceptron")


@pytest.mark.slow
def test_the_tests_of_scikit_learn_pass_in_their_words(tmp_path: Path) -> None:
    """Its test_mlp.py as it is installed, unchanged, with its own classes accelerated."""
    code = (
        "import sys, pytest; from gpubackprop import accel; accel.install(at_once=True);"
        "status = pytest.main(['--pyargs', 'sklearn.neural_network.tests.test_mlp', '-q', '-p', 'no:cacheprovider']);"
        "print(accel.summary()); sys.exit(status)"
    )
    done = run(["-c", code], tmp_path, GPUBACKPROP_NVTX="")
    assert done.returncode == 0, done.stdout[-3000:]
    count = int(done.stdout.splitlines()[-1].split()[1])
    assert count > 500


@pytest.mark.slow
def test_digits_to_the_end() -> None:
    data, labels = load_digits(return_X_y=True)
    a, b = both("MLPClassifier", random_state=0, hidden_layer_sizes=(64, 32), early_stopping=True)
    assert a.fit(data / 16, labels).n_iter_ == b.fit(data / 16, labels).n_iter_
    np.testing.assert_allclose(b.loss_curve_, a.loss_curve_, rtol=1e-9)
    assert a.score(data / 16, labels) == b.score(data / 16, labels)


@weights
def test_weights_are_routed_and_outputs_are_set() -> None:
    from sklearn import config_context

    a, b = both("MLPClassifier", **SHORT)
    with config_context(enable_metadata_routing=True):
        for mlp in (a, b):
            scaler = StandardScaler().set_fit_request(sample_weight=False).set_output(transform="default")
            pipeline = make_pipeline(scaler, mlp.set_fit_request(sample_weight=True))
            pipeline.fit(X, Y, sample_weight=WEIGHT)
    assert_same(a, b)


@weights
def test_what_scikit_learn_has_not_is_named_when_it_is_lost() -> None:
    here = ours.MLPClassifier(device="cpu", dropout=0.2, class_weight="balanced", **SHORT).fit(X, Y)
    with pytest.warns(UserWarning, match="scikit-learn has no dropout and no class_weight: another fit of the copy"):
        there = here.to_sklearn()
    np.testing.assert_array_equal(there.predict_proba(X), here.predict_proba(X))


def test_checks_are_left_out_only_where_they_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = both("MLPClassifier", **SHORT)
    a.fit(X, Y), b.fit(X, Y)
    for given in (
        X,
        X[:1],
        np.asfortranarray(X),
        X[::3],
        X.astype(np.float32),
        X.tolist(),
        csr_matrix(X),
        (X * 100).astype(int),
    ):
        np.testing.assert_allclose(b.predict_proba(given), a.predict_proba(given), rtol=1e-5)
        np.testing.assert_array_equal(b.predict(given), a.predict(given))
        assert b.predict_proba(given).dtype == a.predict_proba(given).dtype
        assert b.predict(given).dtype == a.predict(given).dtype
    exact = ours.MLPClassifier.from_sklearn(a)
    np.testing.assert_array_equal(exact.predict_proba(X), a.predict_proba(X))
    bad = X.copy()
    bad[3, 1] = np.nan
    for given in (bad, X * np.inf, X[:0], X[:, :2], X[0], X + 1j, np.array([["a"] * 4])):
        for call in ("predict", "predict_proba"):
            said = []
            for mlp in (a, b):
                with pytest.raises(ValueError, match=r"\S") as caught, np.errstate(all="ignore"):
                    getattr(mlp, call)(given)
                said.append(str(caught.value))
            assert said[0] == said[1]
    checked: list[Any] = []
    check = ours.validate_data
    monkeypatch.setattr(ours, "validate_data", lambda *given, **more: checked.append(1) or check(*given, **more))
    b.predict(X)
    assert not checked
    b.predict(X.tolist())
    assert checked


LABELS = [
    Y,
    Y > 0,
    Y.astype(float),
    Y.astype(np.int8),
    np.array(["setosa", "versicolor", "virginica"])[Y],
    Y.tolist(),
    TWO,
]


@pytest.mark.parametrize("y", LABELS, ids=["int", "bool", "float", "int8", "text", "list", "multilabel"])
def test_partial_fit_with_every_kind_of_label(y: Any) -> None:
    a, b = both("MLPClassifier", **SHORT | {"batch_size": "auto"})
    classes = np.arange(2) if np.ndim(y) == 2 else np.unique(y)
    for _ in range(3):
        a.partial_fit(X, y, classes=classes)
        b.partial_fit(X, y, classes=classes)
    assert_same(a, b)
    np.testing.assert_array_equal(b.predict(X), a.predict(X))
    for n in (1, 3, 30):
        few = [y[i] for i in range(n)] if isinstance(y, list) else y[:n]
        assert_same(a.partial_fit(X[:n], few), b.partial_fit(X[:n], few))


def test_partial_fit_says_what_is_wrong_as_there() -> None:
    bad = X.copy()
    bad[7, 0] = np.inf
    wrong = (
        (X, Y + 1),
        (X, Y - 1),
        (bad, Y),
        (X[:, :3], Y),
        (X, Y[:9]),
        (X[:0], Y[:0]),
        (X, np.full(len(X), "setosa")),
    )
    a, b = both("MLPClassifier", **SHORT)
    a.partial_fit(X, Y, classes=[0, 1, 2]), b.partial_fit(X, Y, classes=[0, 1, 2])
    for given in wrong:
        said = []
        for mlp in (a, b):
            with pytest.raises((ValueError, TypeError)) as caught:
                mlp.partial_fit(*given)
            said.append(str(caught.value))
        assert said[0] == said[1]
    assert_same(a.partial_fit(X, Y), b.partial_fit(X, Y))
    a, b = both("MLPRegressor", **SHORT)
    for y in (X[:, 0], X[:, :1], X[:, 1].astype(np.float32), Y):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(a.partial_fit(X, y), b.partial_fit(X, y))
    for mlp in (a, b):
        with pytest.raises(ValueError, match="NaN"):
            mlp.partial_fit(X, X[:, 0] * np.nan)


def test_arrays_that_somebody_still_reads_are_not_written_into() -> None:
    _, b = both("MLPClassifier", **SHORT)
    b.partial_fit(X, Y, classes=[0, 1, 2])
    kept = b.coefs_[0]
    b.partial_fit(X, Y)
    assert b.coefs_[0] is kept  # in place, as in scikit-learn
    values = kept.copy()
    b.coefs_[0] = np.zeros_like(kept)
    b.partial_fit(X, Y)
    b.set_params(random_state=2).fit(X, Y)
    np.testing.assert_array_equal(kept, values)


def test_arrays_of_another_memory_are_copied_in_and_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a GPU: the arrays of the estimator and of the network are not the same."""
    load, solvers = ours.Trainer.load_parameters, ("adam", "sgd", "rmsprop")
    made = {}
    for name in ("here", "there"):
        for solver in solvers:
            mlp = made[name, solver] = ours.MLPClassifier(device="cpu", **SHORT | {"solver": solver}).fit(X, Y)
            kept = [W.copy() for W in mlp.coefs_]
            weights = mlp.partial_fit(X, Y).partial_fit(X[:90], Y[:90]).coefs_
            assert not np.array_equal(kept[0], weights[0])
            assert (weights[0] is ours._trainers[mlp].lists[0][0]) == (name == "here")
        monkeypatch.setattr(ours.Trainer, "load_parameters", lambda self, lists, share: load(self, lists, share=False))
    for solver in solvers:
        one, other = made["here", solver], made["there", solver]
        assert one.loss_curve_ == other.loss_curve_
        for a, b in zip(*([*mlp.coefs_, *chain(*ours._moments(mlp._optimizer))] for mlp in (one, other)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs", "rmsprop"])
def test_the_network_of_an_earlier_fit_is_used_again(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_idle", [])
    mlp = ours.MLPClassifier(device="cpu", **SHORT | {"solver": solver}).fit(X, Y)
    (idle,) = ours._idle
    assert not any(np.shares_memory(W, idle.network.parameters.flat) for W in (*mlp.coefs_, *mlp.intercepts_))
    other = clone(mlp).set_params(random_state=2).fit(X[20:], Y[20:])  # with what it has learned and taken
    again = clone(mlp).fit(X, Y)
    assert ours._idle == [idle]
    assert not np.array_equal(other.coefs_[0], mlp.coefs_[0])
    for a, b in zip((*mlp.coefs_, *mlp.intercepts_), (*again.coefs_, *again.intercepts_), strict=True):
        np.testing.assert_array_equal(a, b)
    assert mlp.loss_ == again.loss_
    for n in range(9):
        clone(mlp).set_params(hidden_layer_sizes=(n + 1,)).fit(X, Y)
    assert len(ours._idle) == ours.MOST_IDLE
    monkeypatch.setattr(ours, "IDLE_LIMIT", 1000)
    ours._idle.clear()
    clone(mlp).fit(X, Y)
    assert not ours._idle


OPTIMIZERS = ["adamw", "rmsprop", "adagrad", "lion", gb.AdamW(gb.StepDecay(0.01, step_size=3), weight_decay=0.1, clip_norm=1.0),
              gb.SGD(0.1, momentum=0.9, nesterov=True), gb.Adam(amsgrad=True), gb.RMSprop(centered=True)]  # fmt: skip


@pytest.mark.parametrize(
    "solver", OPTIMIZERS, ids=lambda solver: solver if isinstance(solver, str) else type(solver).__name__
)
def test_our_optimizers_train_as_in_our_networks(solver: Any) -> None:
    options = {**SHORT, "solver": solver, "max_iter": 4, "shuffle": False, "learning_rate_init": 0.01}
    mlp = ours.MLPClassifier(**options)
    start = theirs.MLPClassifier(**SHORT)  # weights before any step, drawn alike
    start.set_params(max_iter=1, solver="sgd", learning_rate_init=1e-300).fit(X, Y)
    model = ours.MLPClassifier.from_sklearn(start).to_mlp()
    rule = gb.optimizers.OPTIMIZERS[solver](0.01) if isinstance(solver, str) else solver
    model.fit(X, Y, epochs=4, batch_size=40, optimizer=rule, shuffle=False, progress=False)
    mlp.fit(X, Y)
    for W, V in zip(mlp.coefs_, model.parameters.W, strict=True):
        np.testing.assert_allclose(W, V, rtol=1e-9, atol=1e-12)
    # another fit of a copy is the same, and partial_fit goes on through a pickle
    assert clone(mlp).fit(X, Y).loss_curve_ == mlp.loss_curve_
    one, other = clone(mlp).partial_fit(X, Y, classes=[0, 1, 2]), clone(mlp).set_params(max_iter=2).fit(X, Y)
    one = pickle.loads(pickle.dumps(one)).partial_fit(X, Y)
    np.testing.assert_allclose(one.coefs_[0], other.coefs_[0], rtol=1e-12)
    with pytest.warns(UserWarning, match="scikit-learn has no solver "):
        there = mlp.to_sklearn()
    np.testing.assert_array_equal(there.predict_proba(X), mlp.predict_proba(X))
    assert there.partial_fit(X, Y).solver == "adam"


def test_partial_fit_keeps_our_optimizer_of_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_warm", set())  # so that short fits are left to scikit-learn
    one, other = (ours.MLPClassifier(solver="rmsprop", **SHORT) for _ in range(2))
    for mlp in (one, other):
        mlp.partial_fit(X, Y, classes=[0, 1, 2])
    other.set_params(solver="adam")
    other.partial_fit(X, Y)
    np.testing.assert_array_equal(one.partial_fit(X, Y).coefs_[0], other.coefs_[0])
    other.to_sklearn().partial_fit(X, Y)  # with an optimizer of scikit-learn's
    adam, kept = both("MLPClassifier", **SHORT)
    adam.partial_fit(X, Y, classes=[0, 1, 2]), kept.partial_fit(X, Y, classes=[0, 1, 2])
    assert_same(adam.partial_fit(X, Y), kept.set_params(solver="lion").partial_fit(X, Y).set_params(solver="adam"))


@pytest.mark.parametrize(
    "loss", ["huber", "mean_absolute_error", "mean_squared_error", gb.losses.huber(delta=0.05)], ids=str
)
def test_our_losses_are_those_of_our_networks(loss: Any) -> None:
    y = X[:, 1:] * 3
    options = {**SHORT, "shuffle": False, "alpha": 0.0, "solver": gb.SGD(0.1)}
    mlp = ours.MLPRegressor(loss=loss, **options).fit(X, y)
    start = theirs.MLPRegressor(**SHORT).set_params(max_iter=1, solver="sgd", learning_rate_init=1e-300).fit(X, y)
    there = ours.MLPRegressor.from_sklearn(start, loss=loss)
    model = there.to_mlp()
    assert model.loss == gb.losses.LOSSES.resolve(loss)
    model.fit(X, y, epochs=12, batch_size=40, optimizer=gb.SGD(0.1), shuffle=False, progress=False)
    np.testing.assert_allclose(mlp.predict(X), model.predict(X), rtol=1e-9)
    assert clone(mlp).fit(X, y).loss_curve_ == mlp.loss_curve_
    with pytest.warns(UserWarning, match="no loss "):
        assert there.to_sklearn().loss == "squared_error"
    found = clone(mlp).set_params(solver="lbfgs", max_iter=30).fit(X, y)
    assert found.loss_ < mlp.loss_


def test_a_classifier_with_smoothed_labels() -> None:
    smooth = gb.losses.softmax_cross_entropy(label_smoothing=0.2)
    mlp = ours.MLPClassifier(loss=smooth, **SHORT | {"max_iter": 100}).fit(X, Y)
    assert mlp.loss_ > ours.MLPClassifier(device="cpu", **SHORT | {"max_iter": 100}).fit(X, Y).loss_
    np.testing.assert_allclose(mlp.predict_proba(X).sum(axis=1), 1)
    with pytest.raises(ValueError, match=r"can have sigmoid_cross_entropy, with reduction='mean'"):
        clone(mlp).fit(X, Y > 0)
    with pytest.raises(ValueError, match="can have softmax_cross_entropy"):
        clone(mlp).set_params(loss=smooth(reduction="sum")).fit(X, Y)


def test_dtype_is_what_the_network_computes_in() -> None:
    for dtype in ("float32", np.float32):
        here = ours.MLPClassifier(device="cpu", dtype=dtype, **SHORT).fit(X, Y)
        assert_same(ours.MLPClassifier(device="cpu", **SHORT).fit(X.astype(np.float32), Y), here)
        for given in (X, X.tolist(), csr_matrix(X)):
            assert here.predict_proba(given).dtype == np.float32
        assert clone(here).partial_fit(X, Y, classes=[0, 1, 2]).coefs_[0].dtype == np.float32
    wide = ours.MLPClassifier(device="cpu", dtype="float64", **SHORT).fit(X.astype(np.float32), Y)
    assert wide.coefs_[0].dtype == np.float64
    with pytest.warns(UserWarning, match="no dtype: another fit"):
        here.to_sklearn()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"solver": "adamx"}, "'solver' parameter"),
        ({"solver": gb.AdamW}, "'solver' parameter"),
        ({"solver": gb.optimizers.LBFGS()}, "write solver='lbfgs'"),
        ({"loss": "huber"}, "'loss' parameter"),
        ({"loss": gb.losses.huber}, "softmax_cross_entropy"),
        ({"dtype": "float16"}, "'dtype' parameter"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_parameter_of_ours(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ours.MLPClassifier(**options).fit(X, Y)


def test_a_search_over_our_parameters_with_two_workers() -> None:
    grid = {"solver": ["adamw", gb.RMSprop(0.01)], "dtype": ["float32", None]}
    search = GridSearchCV(ours.MLPClassifier(**SHORT), grid, n_jobs=2, cv=2, error_score="raise").fit(X, Y)
    assert search.best_params_["solver"] == gb.RMSprop(0.01)


@pytest.mark.parametrize("labels", [["ant", "bee", "cow"], ["no", "yes"], [3, 7], [0, 1, 2]])
def test_an_mlp_has_the_labels_and_the_names_of_the_features(labels: list[Any]) -> None:
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(60, 3)), columns=["a", "b", "c"])
    classifier = ours.MLPClassifier((5,), max_iter=3, random_state=0)
    with pytest.warns(ConvergenceWarning):
        classifier.fit(frame, np.array(labels)[np.arange(60) % len(labels)])
    model = classifier.to_mlp()
    np.testing.assert_array_equal(model.predict(frame[["c", "a", "b"]]), classifier.predict(frame))
    multilabel = ours.MLPClassifier((5,), max_iter=3, random_state=0)
    with pytest.warns(ConvergenceWarning):
        multilabel.fit(frame.to_numpy(), np.eye(3, dtype=int)[np.arange(60) % 3])
    assert multilabel.to_mlp().classes is None
