"""Networks for other programs: NumPy's arrays, and scikit-learn's estimators."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from gpubackprop.machine.files import write_whole
from gpubackprop.mlp import MLP

OF_SKLEARN = {"relu": "relu", "tanh": "tanh", "sigmoid": "logistic", "identity": "identity"}


def write(model: MLP, path: Path) -> str:
    """Write a network to a .safetensors, .npz or .pkl file; return what is in it, in words.

    Raises
    ------
    ValueError
        For another kind of file, or a network that scikit-learn cannot express.
    """
    if path.suffix == ".safetensors":
        model.save(path)
        return "parameters under torch's names, and the network's description, for gpubackprop.load"
    if path.suffix == ".npz":
        write_whole(path, _npz(model))
        return "W_1, b_1, ... with h W + b, and their description in JSON"
    if path.suffix == ".pkl":
        import pickle

        made = to_sklearn(model)
        write_whole(path, pickle.dumps(made))
        return f"scikit-learn's {type(made).__name__}; unpickle it with scikit-learn {_version()} only"
    raise ValueError(f"--to is {str(path)!r}; it must end with .safetensors, .npz or .pkl")


def to_sklearn(model: MLP) -> Any:
    """Return scikit-learn's own estimator with these parameters, after a scaler where the features are scaled.

    Two softmax outputs become scikit-learn's one logistic output: w = w_2 - w_1, b = b_2 - b_1.

    Raises
    ------
    ValueError
        scikit-learn has no such activation, loss or features.
    """
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline

    a, features = model.architecture, model.features
    names = {activation.name for activation in a.activations} or {"identity"}
    if len(names) > 1 or not names <= OF_SKLEARN.keys():
        raise ValueError(
            f"scikit-learn has one activation of {', '.join(OF_SKLEARN)}; the network has {', '.join(sorted(names))}"
        )
    if features is not None and (
        features.fill is not None or features.inputs != len(features.categories) or any(features.categories)
    ):
        raise ValueError(f"scikit-learn's estimator takes numbers without gaps; the network takes {features}")
    options: dict[str, Any] = {
        "hidden_layer_sizes": a.layer_sizes[1:-1],
        "activation": OF_SKLEARN[names.pop()],
        "max_iter": 1,
    }
    W, b = (
        [np.asarray(model.backend.to_numpy(x), np.float64) for x in xs]
        for xs in (model.parameters.W, model.parameters.b)
    )
    d, outputs, name = a.layer_sizes[0], a.layer_sizes[-1], a.loss.name
    if name in ("softmax_cross_entropy", "sigmoid_cross_entropy"):
        if name == "sigmoid_cross_entropy" and outputs > 1:
            labels = np.vstack([np.zeros(outputs, int), np.ones(outputs, int)])
        else:
            labels = np.array(a.classes if a.classes is not None else range(max(outputs, 2)))
        if name == "softmax_cross_entropy" and outputs == 2:
            W[-1], b[-1] = W[-1][:, 1:] - W[-1][:, :1], b[-1][1:] - b[-1][:1]
        made: Any = MLPClassifier(**options)
    elif name in ("mean_squared_error", "poisson"):
        made = MLPRegressor(**options) if name == "mean_squared_error" else MLPRegressor(loss="poisson", **options)
        labels = np.zeros((2, outputs)) if outputs > 1 else np.zeros(2)
    else:
        raise ValueError(f"scikit-learn has no {name}; it has softmax, sigmoid, squared error and Poisson")
    # one step on zeros makes all attributes that a fitted estimator has; then come the parameters
    of_classes = made.__class__ is MLPClassifier
    given = {"classes": np.unique(labels) if labels.ndim == 1 else np.arange(outputs)} if of_classes else {}
    made.partial_fit(np.zeros((len(labels), d)), labels, **given)
    made.coefs_, made.intercepts_ = W, b
    if of_classes and labels.ndim == 1 and list(made.classes_) != list(labels):  # scikit-learn sorts them
        made.coefs_[-1], made.intercepts_[-1] = _sorted(made.coefs_[-1], made.intercepts_[-1], np.argsort(labels))
    if features is None or (features.mean is None and features.scale == 1):
        return made
    return make_pipeline(_scaler(features), made)


def _sorted(W: np.ndarray, b: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the last parameters for classes in another order; with one output the second class is the other."""
    return (-W, -b) if W.shape[1] == 1 else (W[:, order], b[order])


def _scaler(features: Any) -> Any:
    """Return scikit-learn's scaler of these features."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(np.zeros((1, features.inputs)))
    scaler.mean_, scaler.scale_ = features.scaling()
    scaler.var_ = scaler.scale_**2
    return scaler


def _npz(model: MLP) -> bytes:
    host = model.backend.to_numpy
    arrays: dict[str, Any] = {
        f"{name}_{i + 1}": host(a)
        for name, xs in (("W", model.parameters.W), ("b", model.parameters.b))
        for i, a in enumerate(xs)
    }
    described = np.array(json.dumps(model.architecture.to_json()))
    buffer = io.BytesIO()
    np.savez(buffer, architecture=described, **arrays)
    return buffer.getvalue()


def _version() -> str:
    import sklearn

    return str(sklearn.__version__)
