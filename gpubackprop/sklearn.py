"""scikit-learn's MLPClassifier and MLPRegressor, trained by gpubackprop: the same network for the same ``random_state``.

    from gpubackprop.sklearn import MLPClassifier

Parameters, checks, labels, the split for early stopping, stopping itself, messages and attributes are those of the installed
scikit-learn, because its code runs: ``train`` lets its loop over epochs run on a copy of the estimator whose ``_backprop``
takes a whole epoch of compiled steps (or, for L-BFGS, computes loss and gradient). The first weights and the order of the
mini-batches are scikit-learn's draws. Parameters agree within rounding, about 1e-14 in float64; with L-BFGS, whose line search
magnifies rounding, only in the first iterations. So it is with a ReLU that rounding switches, which float32 makes likelier.

``left_alone`` says, in one place, which fits are left to scikit-learn; its checks of arrays, which for small ones take longer
than all the rest, are left out where they would find nothing: ``_passes``. Large predictions take the products of the CPU backend.
"""

from __future__ import annotations

import copy
import inspect
import math
import platform
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache as once
from importlib.metadata import version
from numbers import Real
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import sklearn
from scipy.sparse import issparse
from sklearn import neural_network
from sklearn.neural_network._base import ACTIVATIONS as OUTPUTS
from sklearn.neural_network._multilayer_perceptron import BaseMultilayerPerceptron
from sklearn.neural_network._stochastic_optimizers import BaseOptimizer
from sklearn.utils import compute_sample_weight
from sklearn.utils._param_validation import Interval, Options, StrOptions

from gpubackprop._version import __version__
from gpubackprop.activations import ACTIVATIONS, Activation, identity
from gpubackprop.backends import get_backend
from gpubackprop.code_digest import fingerprint
from gpubackprop.features import Features
from gpubackprop.losses import LOSSES, Loss
from gpubackprop.machine import cache
from gpubackprop.mlp import MLP
from gpubackprop.optimizers import LBFGS, OPTIMIZERS, Optimizer
from gpubackprop.step.operations import BiasActivationForward, Matmul
from gpubackprop.step.state import STEPS
from gpubackprop.targets import MEANS
from gpubackprop.training.sklearn_steps import ACTIVATION_OF, LOSS_OF, Kind, Momentum, Trainer, UncorrectedAdam

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # before scikit-learn 1.6

    def validate_data(estimator: Any, X: Any, **checks: Any) -> Any:
        """Check X."""
        return estimator._validate_data(X, **checks)


__all__ = ["MLPClassifier", "MLPRegressor"]

METHODS = ("_fit_stochastic", "_fit_lbfgs")
THEIRS: dict[str, Callable[..., Any]] = {name: getattr(BaseMultilayerPerceptron, name) for name in METHODS}
HOOKS = {name: getattr(BaseMultilayerPerceptron, name) for name in ("_backprop", "_forward_pass", "_compute_loss_grad")}
CALLED = ["activations", "deltas", "coef_grads", "intercept_grads"]
"""What ``_backprop`` takes after X, y and, since scikit-learn 1.7, sample_weight."""
KNOWN = [*inspect.signature(HOOKS["_backprop"]).parameters][-4:] == CALLED
FLOATS = np.dtype(np.float64), np.dtype(np.float32)
SOFTMAX: Any = MEANS["softmax"].probabilities
SOLVERS = "lbfgs", "sgd", "adam"
THEIR_LOSSES = "log_loss", "squared_error", "poisson"
READ = {
    "softmax": ("softmax", "classes"), "logistic": ("sigmoid", "binary"),
    "identity": ("identity", "real"), "exp": ("exp", "counts"),
}  # fmt: skip
"""By scikit-learn's output activation: how our losses call it, and the targets that they then take."""
DENSE_LIMIT = 2**30  # bytes that a sparse X may take as an array
LARGE = 4e6  # FLOP of a prediction from which on it takes our kernels: calling them costs some 50 microseconds
FUSED = 2**14  # numbers from which on its bias and activation do: 10 microseconds a call, in which NumPy takes so many
LOADING, COMPILING = 1.5, 16.0  # seconds until a step's kernels are there, in which scikit-learn trains small networks

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
    if issparse(X) and X.shape[0] * X.shape[1] * X.dtype.itemsize > DENSE_LIMIT:
        return f"a sparse X would take more than {DENSE_LIMIT >> 20:,} MiB as an array"
    asked = POLICY.at_once or getattr(estimator, "device", None) is not None
    ours = _only_ours(estimator) or _has_our_optimizer(estimator)
    return "" if asked or ours else _too_short(estimator, X, incremental)


def _only_ours(estimator: Any) -> list[str]:
    """Return the names of the parameters that scikit-learn's loop cannot do."""
    known = {
        "activation": _one_of(ACTIVATION_OF, estimator.activation),
        "solver": _one_of(SOLVERS, _solver(estimator)),
        "loss": _one_of(THEIR_LOSSES, estimator.loss),
        "dropout": not getattr(estimator, "dropout", 0),
    }
    return [name for name, is_known in known.items() if not is_known]


def _one_of(names: Any, given: Any) -> bool:
    return isinstance(given, str) and given in names


def _solver(estimator: Any) -> Any:
    """Return the solver that was asked for, also while :meth:`_Ours._fit` shows scikit-learn another."""
    return vars(estimator).get("_solver", estimator.solver)


def _optimizer(estimator: Any) -> Optimizer:
    """Return our optimizer that was asked for."""
    solver = _solver(estimator)
    made = OPTIMIZERS[solver](estimator.learning_rate_init) if isinstance(solver, str) else solver
    if isinstance(made, LBFGS):
        raise ValueError("solver is an LBFGS, which takes no mini-batches; write solver='lbfgs'")
    return made


def _loss(estimator: Any) -> Loss:
    """Return the loss of a fitted estimator: scikit-learn's, unless one of ours was asked for."""
    output = estimator.out_activation_
    if _one_of(THEIR_LOSSES, estimator.loss):
        return LOSS_OF[output]
    loss = LOSSES.resolve(estimator.loss)
    if (loss.mean_function, loss.targets) != READ[output] or loss.reduction != "mean":
        fit = [name for name, one in LOSSES.items() if (one.mean_function, one.targets) == READ[output]]
        raise ValueError(
            f"loss is {estimator.loss!r}; of ours these targets can have {', '.join(fit)}, with reduction='mean'"
        )
    return loss


def _batch_size(estimator: Any, n: int) -> int:
    """Return the samples of a mini-batch, as scikit-learn has them."""
    return int(min(200 if estimator.batch_size == "auto" else estimator.batch_size, n))


def _kernels(estimator: Any, X: Any) -> tuple[str, ...]:
    """Return what decides which kernels a fit needs."""
    return (
        str(estimator.activation),
        estimator.out_activation_,
        X.dtype.name,
        str(_solver(estimator)),
        str(estimator.loss),
    )


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
    rows = n if estimator.solver == "lbfgs" else _batch_size(estimator, n)
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
        if names := _only_ours(estimator):
            name, given = names[0], _solver(estimator) if names[0] == "solver" else getattr(estimator, names[0])
            raise ValueError(f"{name} is {given!r}, which scikit-learn has not, but this fit is left to it: {reason}")
        if getattr(estimator, "device", None) is not None:
            text = f"device is {estimator.device!r}, but this fit is left to scikit-learn: {reason}"
            warnings.warn(text, stacklevel=2)
        THEIRS[method](estimator, *arguments)
        return
    driver = object.__new__(type(estimator))
    vars(driver).update(vars(estimator))
    fit = Fit(estimator, driver, weighted, stochastic=method == "_fit_stochastic", incremental=incremental)
    driver._backprop = fit
    if fit.stochastic:
        n, given = X.shape[0], 0 if estimator.batch_size == "auto" else estimator.batch_size
        held_out = math.ceil(n * estimator.validation_fraction) if estimator.early_stopping else 0
        driver.batch_size, driver.shuffle = max(given, n - held_out), False
    try:
        THEIRS[method](driver, *arguments)
    finally:
        fit.end()
        del driver._backprop  # a cycle, in which the steps and the data would wait for the garbage collector
        same = {"batch_size", "shuffle"}
        vars(estimator).update({name: value for name, value in vars(driver).items() if name not in same})
        if not incremental:
            _trainers.pop(estimator, None)
    kernels = _kernels(estimator, X)
    if (getattr(estimator, "device", None) or "cpu") == "cpu" and kernels not in _warm:
        _warm.add(kernels)
        if cache.read(_entry(kernels)) is None:
            cache.write(_entry(kernels), b"")


_trainers: WeakKeyDictionary[Any, Trainer] = WeakKeyDictionary()  # beside the estimators: a pickle is scikit-learn's
_idle: list[Trainer] = []  # of earlier fits: making one takes as long as some epochs of a small network
MOST_IDLE, IDLE_LIMIT = 4, 2**22  # bytes of each


def _idle_one(kind: Kind) -> Trainer | None:
    for trainer in [one for one in _idle if one.kind == kind]:
        with suppress(ValueError):  # another thread has taken it
            _idle.remove(trainer)
            return trainer
    return None


class Fit:
    """What a driver has for ``_backprop``: an epoch of our steps, or loss and gradients of all data for L-BFGS."""

    def __init__(self, estimator: Any, driver: Any, weighted: bool, *, stochastic: bool, incremental: bool) -> None:
        self.estimator, self.driver, self.weighted, self.stochastic = estimator, driver, weighted, stochastic
        self.incremental, self.interrupted = incremental, False  # after an interruption threads may still run
        # otherwise it goes on with that of an earlier call of partial_fit
        self.new_optimizer = stochastic and not (incremental and hasattr(estimator, "_optimizer"))
        self.trainer: Trainer | None = None
        self.order, self.lists = np.arange(0), list[Any]()

    def __call__(self, *given: Any) -> tuple[float, list[Any], list[Any]]:
        self.interrupted = True
        found = self._backprop(*given)
        self.interrupted = False
        return found

    def _backprop(self, X: Any, y: Any, *rest: Any) -> tuple[float, list[Any], list[Any]]:
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
        assert len(y) == len(self.order), "scikit-learn was to take all data for one mini-batch"
        factor = driver._optimizer.learning_rate if isinstance(trainer.kind.rule, Momentum) else 1.0
        loss = trainer.epoch(self.steps, self.order, weight, alpha, factor)
        trainer.take(self.lists[:2])  # early stopping predicts with them
        return loss, [], []

    def _begin(self, X: Any, y: Any, weight: Any) -> None:
        e, driver, n = self.estimator, self.driver, len(y)
        if self.new_optimizer and not _one_of(SOLVERS, _solver(e)):
            driver._optimizer = OurOptimizer(_optimizer(e), [*driver.coefs_, *driver.intercepts_])
        dtype = np.result_type(X.dtype, driver.coefs_[0].dtype)
        sizes = (X.shape[1], *(W.shape[1] for W in driver.coefs_))
        rule = self._rule() if self.stochastic else None
        device = getattr(e, "device", None) or "cpu"
        dropout = getattr(e, "dropout", 0.0)
        seed = int(driver._random_state.randint(2**31)) if dropout else 0  # scikit-learn has no such draw
        activations = _activations(e.activation)
        kind = Kind(sizes, activations, _loss(driver), dtype, device, rule, self.weighted, dropout, seed)
        driver.coefs_, driver.intercepts_ = [*driver.coefs_], [*driver.intercepts_]  # not the lists of a shallow copy
        lists = [driver.coefs_, driver.intercepts_, *(_moments(driver._optimizer) if self.stochastic else ())]
        trainer = _trainers.get(e) if self.incremental else _idle_one(kind)
        if trainer is None or trainer.kind != kind or not trainer.may_write(lists):
            trainer = Trainer(kind)
        if self.incremental:
            _trainers[e] = trainer
        batch_size = _batch_size(e, n) if self.stochastic else n
        steps = trainer.steps(n, batch_size)
        trainer.load(steps, X, y, weight)
        if self.stochastic:
            self.order, self.lists, optimizer = np.arange(n), lists, driver._optimizer
            trainer.load_parameters(lists, share=self.incremental)
            # of the masks of dropout there must be others in the next call of partial_fit
            trainer.state.counters[STEPS] = getattr(optimizer, "t", driver.t_)
            optimizer.update_params = _nothing
        self.trainer, self.steps = trainer, steps

    def _rule(self) -> Optimizer:
        o = self.driver._optimizer
        if isinstance(o, OurOptimizer):
            return o.rule
        if hasattr(o, "velocities"):
            return Momentum(momentum=float(o.momentum), nesterov=bool(o.nesterov))
        return UncorrectedAdam(float(o.learning_rate_init), float(o.beta_1), float(o.beta_2), float(o.epsilon))

    def end(self) -> None:
        """Leave scikit-learn's optimizer as if it had taken the steps."""
        trainer = self.trainer
        if trainer is None:
            return
        if self.stochastic:
            self._leave(trainer)
        if not self.incremental and not self.interrupted and trainer.nbytes <= IDLE_LIMIT:
            _idle.append(trainer)
            del _idle[:-MOST_IDLE]

    def _leave(self, trainer: Trainer) -> None:
        optimizer = self.driver._optimizer
        del optimizer.update_params
        trainer.take(self.lists)  # an epoch may have been interrupted
        if hasattr(optimizer, "t"):
            t = optimizer.t = int(trainer.state.counters[STEPS])
            if t and hasattr(optimizer, "ms"):
                root = np.sqrt(1 - optimizer.beta_2**t)
                optimizer.learning_rate = optimizer.learning_rate_init * root / (1 - optimizer.beta_1**t)


class OurOptimizer(BaseOptimizer):  # type: ignore[misc]
    """One of our optimizers with its states, where an estimator has scikit-learn's optimizer."""

    def __init__(self, rule: Optimizer, parameters: list[Any]) -> None:
        super().__init__(rule.schedule.learning_rate)
        self.rule, self.t = rule, 0
        self.moments = [[np.zeros_like(a) for a in parameters] for _ in range(rule.n_states)]


def _has_our_optimizer(estimator: Any) -> bool:
    """Return whether a fit was done with one of our optimizers, which partial_fit goes on with."""
    return isinstance(getattr(estimator, "_optimizer", None), OurOptimizer)


def _moments(optimizer: Any) -> list[Any]:
    if isinstance(optimizer, OurOptimizer):
        return optimizer.moments
    return [optimizer.velocities] if hasattr(optimizer, "velocities") else [optimizer.ms, optimizer.vs]


def _nothing(params: Any, grads: Any) -> None:
    """The steps have updated the parameters."""


def scikit_learn() -> tuple[Any, Any, Any]:
    """Return the base class whose methods are replaced, and scikit-learn's two estimators."""
    return BaseMultilayerPerceptron, neural_network.MLPClassifier, neural_network.MLPRegressor


@once
def replacement(method: str) -> Callable[..., None]:
    """Return the method that is ours instead of one of ``METHODS``."""

    def fit(self: Any, *arguments: Any) -> None:
        train(self, method, arguments)

    return fit


def _activations(given: Any) -> Any:
    """Return one of our activations, or one for each hidden layer, for scikit-learn's names and for ours."""
    if isinstance(given, str | Activation):
        return ACTIVATION_OF.get(given, given) if isinstance(given, str) else given
    return tuple(map(_activations, given))


def _passes(estimator: Any, X: Any) -> bool:
    """Return whether scikit-learn's checks would return X as it is, without a word: for small X they take longer than all the rest.

    Whatever is in doubt is left to them, so that results, messages and errors are theirs.
    """
    return _passes_if_finite(estimator, X) and _finite(X)


def _passes_if_finite(estimator: Any, X: Any) -> bool:
    return (
        type(X) is np.ndarray
        and X.dtype in FLOATS
        and X.ndim == 2
        and len(X) > 0
        and X.shape[1] == getattr(estimator, "n_features_in_", 0)
        and not hasattr(estimator, "feature_names_in_")
    )


def _predicts_with_kernels(estimator: Any, X: Any) -> bool:
    """Return whether a prediction takes our products, which are faster from a size on: where a fit has loaded the kernels."""
    device, W, activation = getattr(estimator, "device", None), estimator.coefs_, str(estimator.activation)
    return (
        2 * X.shape[0] * sum(w.size for w in W) >= LARGE
        and (device == "cpu" or (device is None and any(k[0] == activation and k[2] == X.dtype.name for k in _warm)))
        and type(X) is np.ndarray
        and X.flags.c_contiguous
        and all(w.dtype == X.dtype and w.flags.forc for w in W)
    )


class _ByNumPy:
    """The two operations of a layer, as scikit-learn computes them."""

    def product(self, h: Any, W: Any) -> Any:
        return h @ W

    def bias_activation(self, z: Any, b: Any, activation: Any) -> Any:
        z += b
        if _one_of(OUTPUTS, activation):
            OUTPUTS[activation](z)
            return z
        return ACTIVATIONS.resolve(activation).phi(z)


class _ByKernels(_ByNumPy):
    """The same on the CPU backend."""

    def __init__(self) -> None:
        self.execute = get_backend("cpu").execute

    def product(self, h: Any, W: Any) -> Any:
        z = np.empty((len(h), W.shape[1]), h.dtype)
        self.execute(Matmul(h, W, z))
        return z

    def bias_activation(self, z: Any, b: Any, activation: Any) -> Any:
        phi = ACTIVATIONS.resolve(_activations(activation))
        if phi is identity or z.size < FUSED:  # the first, of the output layer, has no kernel to load
            return super().bias_activation(z, b, activation)
        h = z if phi.needs == "h" else np.empty_like(z)  # in place where training has it so
        self.execute(BiasActivationForward(z, b, phi, h))
        return h


def _checked_product(estimator: Any, X: Any, h: Any, W: Any, by: _ByNumPy | _ByKernels) -> Any:
    """Return the first product, or scikit-learn's error if X, which is h as it was given, has NaN or infinity.

    Either is in each column of its row of the product, so that one column tells; to read all of X would take longer.
    """
    with np.errstate(all="ignore"):
        z = by.product(h, W)
    if _finite(z[:, 0]):
        return z
    validate_data(estimator, X, reset=False)
    return by.product(h, W)  # the weights or the sums are not finite: with NumPy's warnings


def _finite(X: np.ndarray) -> bool:
    with np.errstate(all="ignore"):
        return math.isfinite(X.sum())


class _Ours:
    """What is other than in scikit-learn's estimators, over either of them."""

    _fit_stochastic, _fit_lbfgs = map(replacement, METHODS)

    def _fit(self: Any, X: Any, y: Any, sample_weight: Any = None, incremental: bool = False) -> Any:
        # before scikit-learn 1.7 it has no weights
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        self._solver = self.solver  # scikit-learn trains only with solvers whose names it knows
        try:
            if not _one_of(SOLVERS, self.solver):
                self.solver = "adam"
            return super()._fit(X, y, incremental=incremental, **weights)  # type: ignore[misc]
        finally:
            self.solver = vars(self).pop("_solver")

    def _check_solver(self: Any) -> bool:
        return not _one_of(SOLVERS, self.solver) or super()._check_solver()  # type: ignore[misc]

    def _validate_input(self: Any, X: Any, y: Any, incremental: bool, reset: bool) -> Any:
        found = None if reset else self._checked(X, y, incremental)
        X, y = super()._validate_input(X, y, incremental, reset) if found is None else found  # type: ignore[misc]
        return self._cast(X), y

    def _cast(self: Any, X: Any) -> Any:
        return X if self.dtype is None else X.astype(self.dtype, copy=False)

    def predict(self: Any, X: Any) -> Any:
        """Return the labels, or the values, of samples, as scikit-learn's estimator does."""
        if hasattr(self, "coefs_"):  # check_is_fitted takes as long as the prediction of a small network
            return self._predict(X)
        return super().predict(X)  # type: ignore[misc]

    def _forward_pass_fast(self: Any, X: Any, check_input: bool = True) -> Any:
        return self._read(self._outputs(X, check_input))

    def _read(self: Any, z: Any) -> Any:
        """Return the outputs after the output activation, with scikit-learn's bits."""
        if self.out_activation_ == "softmax":
            return SOFTMAX(z, np)
        OUTPUTS[self.out_activation_](z)
        return z

    def _outputs(self: Any, X: Any, check_input: bool) -> Any:
        """Return the outputs before the output activation."""
        unchecked = check_input and _passes_if_finite(self, X)
        if check_input and not unchecked:
            X = validate_data(self, X, accept_sparse=["csr", "csc"], reset=False)
        h = self._cast(X)
        given, n = self.activation, len(self.coefs_) - 1
        hidden = (given,) * n if isinstance(given, str | Activation) else given
        by = _ByKernels() if _predicts_with_kernels(self, h) else _ByNumPy()
        for activation, W, b in zip((*hidden, "identity"), self.coefs_, self.intercepts_, strict=True):
            z = _checked_product(self, X, h, W, by) if unchecked else by.product(h, W)
            unchecked, h = False, by.bias_activation(z, b, activation)
        return h

    @classmethod
    def _theirs(cls) -> Any:
        return next(c for c in cls.__mro__ if c in scikit_learn())

    @classmethod
    def from_sklearn(cls, fitted: Any, **parameters: Any) -> Any:
        """Return an estimator of ours with the parameters and all that one of scikit-learn's has learned; the arrays are copies."""
        if not isinstance(fitted, cls._theirs()):
            raise TypeError(f"fitted is a {type(fitted).__name__}; it must be scikit-learn's {cls._theirs().__name__}")
        made = cls(**parameters)
        vars(made).update(copy.deepcopy(vars(fitted)) | parameters)
        return made

    def to_sklearn(self: Any) -> Any:
        """Return scikit-learn's own estimator with its parameters and all that this one has learned; the arrays are copies.

        Raises
        ------
        ValueError
            It has an activation that scikit-learn has not.
        """
        names, made = _only_ours(self), self._theirs()()
        if "activation" in names:
            raise ValueError(f"activation is {self.activation!r}; scikit-learn has {', '.join(ACTIVATION_OF)}")
        lost = [name for name in names if name not in ("solver", "loss")]
        lost += [name for name in ("class_weight", "dtype") if getattr(self, name, None) is not None]
        lost += [f"{name} {getattr(self, name)!r}" for name in ("solver", "loss") if name in names]
        if lost:
            what = " and no ".join(lost)
            warnings.warn(f"scikit-learn has no {what}: another fit of the copy will be without", stacklevel=2)
        without = {*self._own, *names, *(["_optimizer"] if _has_our_optimizer(self) else [])}
        vars(made).update(copy.deepcopy({name: value for name, value in vars(self).items() if name not in without}))
        return made

    def to_mlp(self: Any, device: str = "cpu") -> MLP:
        """Return the fitted network as an ``MLP``, with the very same parameters, the names of its features and its labels."""
        activations, loss = _activations(self.activation), _loss(self)
        sizes = [self.coefs_[0].shape[0], *(W.shape[1] for W in self.coefs_)]
        if loss in LOSS_OF.values():  # the same outputs, and a value that is not summed over them
            loss = LOSSES[loss.name if loss.name in LOSSES else "poisson"]
        model = MLP(sizes, activations, loss, device, self.coefs_[0].dtype)
        layers = enumerate(zip(self.coefs_, self.intercepts_, strict=True))
        model.load_state_dict(
            {f"layers.{i}.{key}": a for i, (W, b) in layers for key, a in (("weight", W.T), ("bias", b))}
        )
        if sizes[-1] == 1:
            model.target_shape = ()
        names, labels = getattr(self, "feature_names_in_", None), list(getattr(self, "classes_", ()))
        one_each = sizes[-1] == (1 if len(labels) == 2 else len(labels)) and self.out_activation_ in (
            "softmax",
            "logistic",
        )
        model.describe_data(
            None if names is None else Features((None,) * sizes[0], tuple(names)),
            labels if labels != list(range(len(labels))) and one_each else None,
        )
        return model


def _with_our_parameters(cls: Any) -> Any:
    """Give an estimator the parameters of the installed scikit-learn's, and ours after them."""
    parent = cls.__mro__[2]
    of_parent = inspect.signature(parent.__init__)
    own = {"device": None, "dtype": None, "dropout": 0.0} | cls._own
    own = {name: value for name, value in own.items() if name not in of_parent.parameters}

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        given = {name: kwargs.pop(name, default) for name, default in own.items()}
        parent.__init__(self, *args, **kwargs)
        vars(self).update(given)

    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in own.items()]
    __init__.__signature__ = of_parent.replace(parameters=[*of_parent.parameters.values(), *ours])  # type: ignore[attr-defined]
    cls.__init__, cls._own = __init__, own
    losses = {name for name, one in LOSSES.items() if (one.mean_function, one.targets) in cls._losses}
    of_theirs = parent._parameter_constraints.get("loss", [StrOptions({cls._own.get("loss", "")})])
    allowed = parent._parameter_constraints | {
        "activation": [StrOptions({*ACTIVATION_OF, *ACTIVATIONS}), Activation, "array-like"],
        "solver": [StrOptions({*SOLVERS, *OPTIMIZERS}), Optimizer],
        "loss": [StrOptions(losses | of_theirs[0].options), Loss],
        "device": [str, None],
        "dtype": [StrOptions({dtype.name for dtype in FLOATS}), Options(type, {dtype.type for dtype in FLOATS}), None],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }
    cls._parameter_constraints = {name: c for name, c in allowed.items() if name in of_parent.parameters or name in own}
    return cls


@_with_our_parameters
class MLPClassifier(_Ours, neural_network.MLPClassifier):  # type: ignore[misc]
    """scikit-learn's MLPClassifier, trained by gpubackprop.

    Parameters
    ----------
    hidden_layer_sizes, alpha, ...
        As scikit-learn's, with its defaults.
    activation : str, Activation or a sequence of them
        Scikit-learn's or one of ours (``"gelu"``, an ``Activation``), or one for each hidden layer.
    solver : str or Optimizer
        Scikit-learn's or one of our optimizers: its name (``"adamw"``, ``"rmsprop"``, ``"adagrad"``, ``"lion"``) for its defaults
        with ``learning_rate_init``, or an instance with all its numbers, as in ``gb.AdamW(1e-3, weight_decay=0.1)``. Of the other
        parameters of training it reads none: ``weight_decay`` is its penalty, not ``alpha``.
    device : str, optional
        ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"reference"``. None, the default, is the CPU, but leaves short fits to scikit-learn
        until the kernels are loaded, so that none is slower; the two agree within rounding.
    dtype : {"float32", "float64"}, optional
        What the network computes in. None, the default, is the dtype of X, as in scikit-learn. ``solver="lbfgs"`` makes the
        weights float64, as there.
    dropout : float
        The share of hidden units dropped in training, in [0, 1).
    loss : str or Loss
        ``"log_loss"``, or one of ours, as in ``softmax_cross_entropy(label_smoothing=0.1)``: its mean over several outputs.
    class_weight : dict or "balanced", optional
        What the samples of a class weigh, times their ``sample_weight``. Needs scikit-learn 1.7.
    """

    _own: ClassVar[dict[str, Any]] = {"loss": "log_loss", "class_weight": None}
    _losses = READ["softmax"], READ["logistic"]

    def _classes(self) -> np.ndarray | None:
        """Return the classes, if the outputs stand for one of them."""
        binarizer = self._label_binarizer
        one = binarizer.y_type_ in ("binary", "multiclass") and not binarizer.sparse_input_
        return binarizer.classes_ if one and len(binarizer.classes_) > 1 else None

    def _checked(self, X: Any, y: Any, incremental: bool) -> Any:
        """Return what scikit-learn's checks return of plain labels for partial_fit; None leaves them to scikit-learn."""
        if not incremental or self.warm_start or type(y) is not np.ndarray or y.shape != X.shape[:1]:
            return None
        classes = self._classes()
        if classes is None or y.dtype.kind != classes.dtype.kind or y.dtype.kind not in "biuU":
            return None
        if 20 < len(y) < 2 * len(classes) or not _passes(self, X):  # for so few samples it may have a warning
            return None
        at = np.minimum(np.searchsorted(classes, y), len(classes) - 1)
        columns = np.arange(len(classes))[len(classes) == 2 :]
        return (X, at[:, None] == columns) if (classes[at] == y).all() else None

    def _predict(self, X: Any, check_input: bool = True) -> Any:
        classes = self._classes()
        if classes is None or type(self)._forward_pass_fast is not _Ours._forward_pass_fast:
            return super()._predict(X, check_input)
        if len(classes) == 2:
            return classes[(self._forward_pass_fast(X, check_input).ravel() > 0.5).astype(int)]
        z = self._outputs(X, check_input)
        return classes[(z if _finite(z) else self._read(z)).argmax(axis=1)]  # the softmax makes a row NaN

    def _score(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        if y.ndim == 1:  # scikit-learn's accuracy_score, without its checks
            return float(np.average(self._predict(X, check_input=False) == y, weights=sample_weight))
        return super()._score(X, y, **({} if sample_weight is None else {"sample_weight": sample_weight}))

    def _fit(self, X: Any, y: Any, sample_weight: Any = None, incremental: bool = False) -> Any:
        if self.class_weight is not None:
            if incremental and self.class_weight == "balanced":
                raise ValueError("class_weight is 'balanced', which needs all data at once; give partial_fit a dict")
            weight = compute_sample_weight(self.class_weight, y)
            sample_weight = weight if sample_weight is None else weight * sample_weight
        return super()._fit(X, y, sample_weight, incremental)


@_with_our_parameters
class MLPRegressor(_Ours, neural_network.MLPRegressor):  # type: ignore[misc]
    """scikit-learn's MLPRegressor, trained by gpubackprop.

    Parameters
    ----------
    loss : str or Loss
        As scikit-learn's, or one of ours (``"huber"``, ``"mean_absolute_error"``, ``huber(delta=0.1)``): its mean over the outputs.
    hidden_layer_sizes, activation, ...
        As scikit-learn's, with its defaults.
    device, dtype, dropout
        As those of :class:`MLPClassifier`, as are more activations and solvers.
    """

    _own: ClassVar[dict[str, Any]] = {"loss": "squared_error"}
    _losses = (READ["identity"],)

    def _checked(self, X: Any, y: Any, incremental: bool) -> Any:
        plain = type(y) is np.ndarray and y.dtype in FLOATS and y.shape == X.shape[:1]
        return (X, y) if plain and _passes(self, X) and _finite(y) else None
