"""scikit-learn's MLPClassifier and MLPRegressor, trained by gpubackprop: the same network for the same ``random_state``.

    from gpubackprop.sklearn import MLPClassifier

Parameters, checks, labels, the split for early stopping, stopping itself, messages and attributes are those of the installed
scikit-learn, because its code runs: :func:`train` lets its loop over epochs run on a copy of the estimator whose ``_backprop``
takes a whole epoch of compiled steps (or, for L-BFGS, computes loss and gradient). The first weights and the order of the
mini-batches are scikit-learn's draws. Parameters agree within rounding, about 1e-14 in float64; with L-BFGS, whose line search
magnifies rounding, only in the first iterations. So it is with a ReLU that rounding switches, which float32 makes likelier.

:func:`left_alone` says, in one place, which fits are left to scikit-learn.
"""

from __future__ import annotations

import inspect
import math
import platform
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache as once
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from gpubackprop._version import __version__
from gpubackprop.code_digest import fingerprint
from gpubackprop.machine import cache
from gpubackprop.optimizers import Optimizer
from gpubackprop.step.state import STEPS
from gpubackprop.training.sklearn_steps import ACTIVATION_OF, Kind, Momentum, Trainer, UncorrectedAdam

try:
    import sklearn
except ImportError as error:
    raise ImportError("gpubackprop.sklearn needs scikit-learn: pip install 'gpubackprop[sklearn]'") from error
from scipy.sparse import issparse
from sklearn import neural_network
from sklearn.neural_network._multilayer_perceptron import BaseMultilayerPerceptron

__all__ = ["MLPClassifier", "MLPRegressor"]

# ------------------------------------------------------------------ what is left to scikit-learn

METHODS = ("_fit_stochastic", "_fit_lbfgs")
THEIRS: dict[str, Callable[..., Any]] = {name: getattr(BaseMultilayerPerceptron, name) for name in METHODS}
HOOKS = {name: getattr(BaseMultilayerPerceptron, name) for name in ("_backprop", "_forward_pass", "_compute_loss_grad")}
CALLED = ["activations", "deltas", "coef_grads", "intercept_grads"]
"""What ``_backprop`` takes after X, y and, since scikit-learn 1.7, sample_weight."""
KNOWN = [*inspect.signature(HOOKS["_backprop"]).parameters][-4:] == CALLED
DENSE_LIMIT = 2**30  # bytes that a sparse X may take as an array
LOADING, COMPILING = 1.0, 12.0  # seconds until a step's kernels are there, in which scikit-learn trains small networks

told: Counter[str] = Counter()
"""Fits of this process by where they were done: "" for ours, else the reason why they were left to scikit-learn."""
POLICY = SimpleNamespace(at_once=False)
"""Whether short fits are ours too while the kernels are not loaded."""
_warm: set[tuple[Any, ...]] = set()
_cold: Counter[tuple[Any, ...]] = Counter()  # seconds that scikit-learn has had for fits of a kind that was not warm
_seconds_to_start: dict[tuple[Any, ...], float] = {}


def left_alone(estimator: Any, X: Any, *, incremental: bool = False) -> str:
    """Return why a fit is left to scikit-learn, or "": THE list of reasons."""
    cls = type(estimator)
    if not KNOWN:
        return f"scikit-learn {sklearn.__version__} trains in a way that is not known here"
    own = [name for name, hook in HOOKS.items() if getattr(cls, name) is not hook]
    if own:
        return f"{cls.__name__} has a {own[0]} of its own"
    if estimator.activation not in ACTIVATION_OF:
        return f"activation {estimator.activation!r} is not known here"
    if issparse(X) and X.shape[0] * X.shape[1] * X.dtype.itemsize > DENSE_LIMIT:
        return f"a sparse X would take more than {DENSE_LIMIT >> 20:,} MiB as an array"
    asked = POLICY.at_once or getattr(estimator, "device", None) is not None
    return "" if asked else _too_short(estimator, X, incremental)


def _kernels(estimator: Any, X: Any) -> tuple[str, ...]:
    """Return what decides which kernels a fit needs."""
    return estimator.activation, estimator.out_activation_, X.dtype.name, estimator.solver


def _entry(kernels: tuple[str, ...]) -> str:
    """Return the name of the entry of the disk cache that says that these kernels were compiled on this machine."""
    made_by = fingerprint(__version__, np.__version__, version("numba"), platform.processor(), *kernels)
    return f"sklearn/{made_by}"


def _too_short(estimator: Any, X: Any, incremental: bool) -> str:
    """Return "" if the kernels are loaded, or scikit-learn would take, or has taken, longer than that takes."""
    kind = _kernels(estimator, X)
    if kind in _warm:
        return ""
    n = X.shape[0]
    rows = n if estimator.solver == "lbfgs" else min(200 if estimator.batch_size == "auto" else estimator.batch_size, n)
    batches = (1 if incremental else estimator.max_iter) * math.ceil(n / rows)
    size = sum(W.size for W in estimator.coefs_)
    seconds = batches * (7e-5 * len(estimator.coefs_) + size * (7e-9 + 1.5e-10 * rows))  # of a core of 2020
    _cold[kind] += seconds
    if kind not in _seconds_to_start:
        _seconds_to_start[kind] = COMPILING if cache.read(_entry(kind)) is None else LOADING
    if _cold[kind] > _seconds_to_start[kind]:
        return ""
    what = "loaded" if _seconds_to_start[kind] == LOADING else "compiled on this machine (--at-once compiles them)"
    return f"short, and the kernels are not yet {what}"


# ------------------------------------------------------------------ the fit


def train(estimator: Any, method: str, arguments: tuple[Any, ...]) -> None:
    """Do what a method of scikit-learn's does, with our steps.

    Its own code runs on a copy, the driver, that takes the whole data set for one mini-batch, in order. So it calls ``_backprop``
    once an epoch; what that attribute of the driver does is of :class:`Fit`.
    """
    X, weighted = arguments[0], arguments[2] is not None and not isinstance(arguments[2], list)
    incremental = method == "_fit_stochastic" and arguments[-1]
    reason = left_alone(estimator, X, incremental=incremental)
    told[reason] += 1
    if reason:
        if getattr(estimator, "device", None) is not None:
            text = f"device is {estimator.device!r}, but this fit is left to scikit-learn: {reason}"
            warnings.warn(text, stacklevel=2)
        THEIRS[method](estimator, *arguments)
        return
    driver = object.__new__(type(estimator))
    vars(driver).update(vars(estimator))
    fit = Fit(estimator, driver, weighted, stochastic=method == "_fit_stochastic")
    driver._backprop = fit
    if fit.stochastic:
        size = 0 if estimator.batch_size == "auto" else estimator.batch_size
        driver.batch_size, driver.shuffle = max(size, X.shape[0] - fit.held_out(X.shape[0])), False
    try:
        THEIRS[method](driver, *arguments)
    finally:
        fit.end()
        same = {"_backprop", "batch_size", "shuffle"}
        vars(estimator).update({name: value for name, value in vars(driver).items() if name not in same})
        if not incremental:
            _trainers.pop(estimator, None)
    kernels = _kernels(estimator, X)
    if (getattr(estimator, "device", None) or "cpu") == "cpu" and kernels not in _warm:
        _warm.add(kernels)
        if cache.read(_entry(kernels)) is None:
            cache.write(_entry(kernels), b"")


_trainers: WeakKeyDictionary[Any, Trainer] = WeakKeyDictionary()  # beside the estimators: a pickle is scikit-learn's


class Fit:
    """What a driver has for ``_backprop``: an epoch of our steps, or loss and gradients of all data for L-BFGS."""

    def __init__(self, estimator: Any, driver: Any, weighted: bool, *, stochastic: bool) -> None:
        self.estimator, self.driver, self.weighted, self.stochastic = estimator, driver, weighted, stochastic
        self.trainer: Trainer | None = None
        self.order, self.lists = np.arange(0), list[Any]()

    def held_out(self, n: int) -> int:
        """Return how many samples scikit-learn keeps for validation."""
        e = self.estimator
        return math.ceil(n * e.validation_fraction) if e.early_stopping else 0

    def __call__(self, X: Any, y: Any, *rest: Any) -> tuple[float, list[Any], list[Any]]:
        driver, weight = self.driver, rest[0] if self.weighted else None
        if self.trainer is None:
            self._begin(X, y, weight)
        trainer = self.trainer
        assert trainer is not None
        alpha = float(driver.alpha)
        if not self.stochastic:
            trainer.put(trainer.parameters, (*driver.coefs_, *driver.intercepts_))
            return trainer.loss_and_gradients(self.steps, len(y) if weight is None else float(weight.sum()), alpha)
        if self.estimator.shuffle:  # the draws of sklearn.utils.shuffle
            permutation = np.arange(len(y))
            driver._random_state.shuffle(permutation)
            self.order = self.order[permutation]
        factor = 1.0 if driver.solver == "adam" else driver._optimizer.learning_rate
        loss = trainer.epoch(self.steps, self.order, weight, alpha, factor)
        trainer.take(trainer.parameters, self.lists)
        return loss, [], []

    def _begin(self, X: Any, y: Any, weight: Any) -> None:
        e, driver, n = self.estimator, self.driver, len(y)
        dtype = np.result_type(X.dtype, driver.coefs_[0].dtype)
        sizes = (X.shape[1], *(W.shape[1] for W in driver.coefs_))
        rule = self._rule() if self.stochastic else None
        device = getattr(e, "device", None) or "cpu"
        kind = Kind(sizes, e.activation, driver.out_activation_, dtype, device, rule, self.weighted)
        trainer = _trainers.get(e)
        if trainer is None or trainer.kind != kind:
            trainer = _trainers[e] = Trainer(kind)
        batch_size = n if not self.stochastic else min(200 if e.batch_size == "auto" else e.batch_size, n)
        self.trainer, self.steps = trainer, trainer.steps(n, batch_size)
        trainer.load(self.steps, X, y, weight)
        if not self.stochastic:
            return
        self.order, self.lists, optimizer = np.arange(n), [*driver.coefs_, *driver.intercepts_], driver._optimizer
        trainer.put(trainer.parameters, self.lists)
        for here, there in zip(trainer.moments, self._moments(optimizer), strict=True):
            trainer.put(here, there)
        trainer.state.counters[STEPS] = getattr(optimizer, "t", 0)
        optimizer.update_params = _nothing

    def _rule(self) -> Optimizer:
        e = self.driver
        if e.solver == "sgd":
            return Momentum(momentum=float(e.momentum), nesterov=bool(e.nesterovs_momentum))
        o = e._optimizer  # of an earlier call of partial_fit, or of this fit
        return UncorrectedAdam(float(o.learning_rate_init), float(o.beta_1), float(o.beta_2), float(o.epsilon))

    def _moments(self, optimizer: Any) -> list[Any]:
        return [optimizer.velocities] if self.driver.solver == "sgd" else [optimizer.ms, optimizer.vs]

    def end(self) -> None:
        """Leave scikit-learn's optimizer as if it had taken the steps."""
        trainer = self.trainer
        if trainer is None or not self.stochastic:
            return
        optimizer = self.driver._optimizer
        del optimizer.update_params
        trainer.take(trainer.parameters, self.lists)  # an epoch may have been interrupted
        for here, there in zip(trainer.moments, self._moments(optimizer), strict=True):
            trainer.take(here, there)
        if self.driver.solver == "adam":
            t = optimizer.t = int(trainer.state.counters[STEPS])
            if t:
                root = np.sqrt(1 - optimizer.beta_2**t)
                optimizer.learning_rate = optimizer.learning_rate_init * root / (1 - optimizer.beta_1**t)


def _nothing(params: Any, grads: Any) -> None:
    """The steps have updated the parameters."""


# ------------------------------------------------------------------ the estimators


def scikit_learn() -> tuple[Any, Any, Any]:
    """Return the base class whose methods are replaced, and scikit-learn's two estimators."""
    return BaseMultilayerPerceptron, neural_network.MLPClassifier, neural_network.MLPRegressor


@once
def replacement(method: str) -> Callable[..., None]:
    """Return the method that is ours instead of one of ``METHODS``."""

    def fit(self: Any, *arguments: Any) -> None:
        train(self, method, arguments)

    return fit


class _Ours:
    """The methods of scikit-learn's that are replaced, over either of its estimators."""

    _fit_stochastic, _fit_lbfgs = map(replacement, METHODS)


def _with_our_parameters(cls: Any) -> Any:
    """Give an estimator the parameters of the installed scikit-learn's, and ours after them."""
    parent = cls.__mro__[2]

    def __init__(self: Any, *args: Any, device: str | None = None, **kwargs: Any) -> None:  # noqa: N807
        parent.__init__(self, *args, **kwargs)
        self.device = device

    of_parent = inspect.signature(parent.__init__)
    ours = [inspect.Parameter("device", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None")]
    __init__.__signature__ = of_parent.replace(parameters=[*of_parent.parameters.values(), *ours])  # type: ignore[attr-defined]
    cls.__init__ = __init__
    cls._parameter_constraints = parent._parameter_constraints | {"device": [str, None]}
    return cls


@_with_our_parameters
class MLPClassifier(_Ours, neural_network.MLPClassifier):  # type: ignore[misc]
    """scikit-learn's MLPClassifier, trained by gpubackprop.

    Parameters
    ----------
    hidden_layer_sizes, activation, ...
        As scikit-learn's, with its defaults.
    device : str, optional
        ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"reference"``. None, the default, is the CPU, but leaves short fits to scikit-learn
        until the kernels are loaded, so that none is slower; the two agree within rounding.
    """


@_with_our_parameters
class MLPRegressor(_Ours, neural_network.MLPRegressor):  # type: ignore[misc]
    """scikit-learn's MLPRegressor, trained by gpubackprop.

    Parameters
    ----------
    loss, hidden_layer_sizes, activation, ...
        As scikit-learn's, with its defaults.
    device : str, optional
        See :class:`MLPClassifier`.
    """
