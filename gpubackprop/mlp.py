"""The multilayer perceptron as its users see it: passes for experiments, training, prediction, files."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpubackprop.activations import ACTIVATIONS, Activation, identity
from gpubackprop.architecture import architecture_of, build, takes_precision
from gpubackprop.backends import choose_device, get_backend
from gpubackprop.backends.base import Backend
from gpubackprop.backends.current import active
from gpubackprop.definitions import (
    DTYPES,
    Array,
    check_dtype,
    check_number,
    check_precision,
    check_seed,
    real_of,
    version_of,
)
from gpubackprop.initializers import INITIALIZERS, Initializer
from gpubackprop.intake import (
    check_count,
    check_features,
    check_layer_sizes,
    check_options,
    check_parameter,
    check_targets,
    check_weight,
)
from gpubackprop.interop import as_array, like
from gpubackprop.losses import LOSSES, Loss
from gpubackprop.memory import Tally, bytes_of, check_memory, data_bytes
from gpubackprop.network import Data, Network
from gpubackprop.optimizers import Optimizer
from gpubackprop.parameters import Parameters
from gpubackprop.predictor import Predictor
from gpubackprop.step import Names
from gpubackprop.workspace import Workspace, make_layers

EVALUATION_BATCH = 1024  # rows of a pass without an update: large enough for the products, small enough for the caches


@dataclass
class Trace:
    """Every intermediate of one forward and backward pass.

    Attributes
    ----------
    layers : list of LayerArrays
        ``layers[i]`` has h_in, z, h, dh, delta, dW and db; i = 0 is the first layer, the last is the output layer.
    X, o, do : array
    loss : array of shape ()
    """

    layers: list[Any]
    X: Array
    o: Array
    do: Array
    loss: Array


@dataclass
class TracedLayer:
    """One layer of a :class:`Trace`; the output layer has z = h = o and dh = delta = do."""

    h_in: Array
    z: Array
    h: Array
    dh: Array
    delta: Array
    dW: Array
    db: Array


class MLP(Network):
    """A multilayer perceptron h_l = phi_l(h_{l-1} W_l + b_l), o = h_L W_o + b_o, trained by backpropagation.

    Parameters
    ----------
    layer_sizes : sequence of int
        Inputs, hidden layers, outputs: ``[784, 256, 128, 10]``.
    activation : str, Activation or a sequence of them
        One for all hidden layers, or one per hidden layer.
    loss : str or Loss
    device : str
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"auto"`` or ``"reference"``.
    dtype : {"float32", "float64", "bfloat16", "float16"}
        With 16 bits: activations and products in 16 bits, sums and parameters in float32, and the loss scaled for float16.
    seed : int
        Of the initial weights, the order of the mini-batches and the dropout masks; the same on every device.
    initializer : str or callable
        ``"he_normal"`` and the others of :mod:`gpubackprop.initializers`; the gain is that of the activation.
    dropout : float
        The share of hidden units dropped in training, in [0, 1).
    matmul_precision : {"float32", "tf32"}
        How float32 matrices are multiplied on a GPU; TF32 is faster and keeps three decimal digits of each factor.

    Raises
    ------
    ValueError
        For an unknown name or a size out of range.
    DeviceUnavailableError
        The device cannot be used.

    Attributes
    ----------
    parameters, gradients : Parameters
        W_l, b_l and dW_l, db_l as views into one flat array each; the gradients are those of the last training step.

    What describes a network (sizes, dtype, device, layers, these arrays) cannot be replaced; arrays may be written into.
    """

    def __init__(
        self,
        layer_sizes: Sequence[int],
        activation: str | Activation | Sequence[str | Activation] = "relu",
        loss: str | Loss = "softmax_cross_entropy",
        device: str | Backend = "cpu",
        dtype: npt.DTypeLike = "float32",
        seed: int = 0,
        initializer: str | Initializer = "he_normal",
        dropout: float = 0.0,
        matmul_precision: str = "float32",
    ) -> None:
        self.loss: Loss = LOSSES.resolve(loss)
        self.layer_sizes = check_layer_sizes(layer_sizes, self.loss)
        self.dtype = check_dtype(dtype)
        self.activations = _per_hidden_layer(activation, len(self.layer_sizes) - 2)
        self.dropout = float(check_number("dropout", dropout, lambda x: 0 <= x < 1, "in [0, 1)"))
        self.seed = check_seed(seed)
        self.initializer: Initializer = INITIALIZERS.resolve(initializer)
        check_precision(matmul_precision)
        if isinstance(device, str) and device == "auto":
            device = choose_device(self.layer_sizes)
        self.backend: Backend = get_backend(device, **_options(device, matmul_precision))
        self.device = self.backend.device
        self._matmul_precision: str = getattr(self.backend, "matmul_precision", "float32")
        allowed = getattr(self.backend, "dtypes", DTYPES[:2])
        if self.dtype.name not in allowed:
            raise ValueError(f"device {self.device!r} computes in {', '.join(allowed)}; dtype is {self.dtype.name!r}")
        self._predictors: dict[int, tuple[Any, Predictor]] = {}  # by the samples of a call
        self._thread = _OfThread()
        self._target_shape: tuple[int, ...] | None = None
        super().__init__(self._initial_parameters())
        self._of_network = frozenset((*vars(self), "_of_network"))  # a subclass or a user may add attributes

    def __repr__(self) -> str:
        sizes, hidden = (
            "-".join(map(str, self.layer_sizes)),
            ", ".join(dict.fromkeys(a.label for a in self.activations)),
        )
        return f"MLP({sizes}, {hidden or 'no hidden layer'}, {self.loss.label}, {self.dtype}, device={self.device!r})"

    # ------------------------------------------------------------------ for experiments

    def forward(self, X: Any) -> Any:
        """Return the outputs o = h_L W_o + b_o, of the kind of array that X is.

        Shapes
        ------
        X : (n, d_0); returns (n, d_o)
        """
        X = as_array(X, "X")
        last, self._thread.last = self._thread.last, None
        if last is not None:
            self._give(last.key, last.workspace)
        self._check_room("forward", X)
        X_here = check_features(self.backend, X, self.layer_sizes[0], self.dtype, finite=False)
        key, ws = self._take("forward", len(X_here))
        ws.X[...] = X_here  # a copy, which backward reads after the caller may have filled X anew
        self.forward_pass(self._ops, ws)
        self._ops.bias_activation_forward(ws.o, ws.parameters[-1].b, identity, out=ws.o)
        o = like(self.backend, ws.o.astype(self.real), X)
        self._thread.last = _Last(key, ws, self._version)
        return o

    def backward(self, do: Any) -> Parameters:
        """Return the gradients dW_l, db_l given do = d loss / d o of one's own loss, for the last ``forward`` of this thread.

        Shapes
        ------
        do : (n, d_o)

        Raises
        ------
        ValueError
            ``forward`` has not been called in this thread, or for another number of samples, or there was a ``fit`` or a
            ``load_state_dict`` since.
        """
        last = self._thread.last
        if last is None:
            raise ValueError(
                "backward needs the intermediates of a forward pass; call forward(X) first, in this thread"
            )
        if last.version != self._version:
            raise ValueError("the parameters have changed since forward(X), by fit or load_state_dict; call it again")
        ws = last.workspace
        given = check_features(self.backend, do, self.layer_sizes[-1], self.dtype, finite=False)
        if len(given) != ws.n:
            raise ValueError(f"do has {len(given)} rows; the last forward(X) had {ws.n}")
        self._lend_gradients(last.key, ws)
        self._ops.bias_activation_backward(given, None, given, identity, out=ws.do, db=ws.parameters[-1].db)
        self.backward_pass(self._ops, ws)
        result = self._gradients_like(ws, do)
        self._give_gradients(last.key, ws)
        return result

    def loss_and_gradients(self, X: Any, y: Any, sample_weight: Any = None) -> tuple[Array, Parameters]:
        """Return the loss and d loss / d W_l, d loss / d b_l, without dropout.

        Returns
        -------
        loss : array of shape (), float64
            On the device: ``float(loss)`` waits for it.
        gradients : Parameters
            ``gradients.W[l]``, ``gradients.b[l]``, l = 0 the first layer; a copy, of the kind of array that X is.
        """
        with self._prepared(X, y, sample_weight) as ws:
            self._loss_and_gradients(ws)
            return ws.value[0].copy(), self._gradients_like(ws, X)

    def trace(self, X: Any, y: Any, sample_weight: Any = None) -> Trace:
        """Return every intermediate of a forward and a backward pass, as arrays of their own.

        The kernels are those of a step; only the memory is not shared.
        """
        with self._prepared(X, y, sample_weight, keep=True) as ws:
            self._loss_and_gradients(ws)
            layers = []
            for layer, a in zip(ws.parameters, ws.layers, strict=True):
                arrays = (a.h_in, a.z, a.h, a.dh if layer.name != "o" else a.delta, a.delta, layer.dW, layer.db)
                layers.append(TracedLayer(*(like(self.backend, array.copy(), X) for array in arrays)))
            last = layers[-1]
            return Trace(layers, layers[0].h_in, last.h, last.delta, ws.value[0].copy())

    @contextmanager
    def _prepared(self, X: Any, y: Any, sample_weight: Any = None, *, keep: bool = False) -> Iterator[Workspace]:
        """A workspace of this call alone that reads the data where they are, and forgets them afterwards."""
        X, y = as_array(X, "X"), as_array(y, "y")
        weight = None if sample_weight is None else as_array(sample_weight, "sample_weight")
        self._check_room("gradients", X, y, weight, keep=keep)
        X = check_features(self.backend, X, self.layer_sizes[0], self.dtype, finite=False)
        y = check_targets(self.backend, y, len(X), self.layer_sizes[-1], self.loss, self.real)
        weight = check_weight(self.backend, weight, len(X), self.real, self.loss)
        key, ws = self._take("gradients", len(X), y, weighted=weight is not None, keep=keep)
        ws.feed(X, y, weight)
        yield ws
        ws.feed(None)
        self._give(key, ws)

    # ------------------------------------------------------------------ training and use

    @property
    def matmul_precision(self) -> str:
        """How float32 matrices are multiplied on a GPU; kept by ``to``, ``save`` and ``load``, also by way of the CPU."""
        return self._matmul_precision

    @property
    def target_shape(self) -> tuple[int, ...] | None:
        """The shape of one sample's y in the last ``fit``, None before; kept by ``to``, ``save`` and ``load``."""
        return self._target_shape

    @target_shape.setter
    def target_shape(self, shape: Sequence[int] | None) -> None:
        self._target_shape = None if shape is None else tuple(check_count("target_shape", size) for size in shape)

    def fit(self, X: Any, y: Any, epochs: int = 10, batch_size: int | str = 128, **options: Any) -> Any:
        """Train; see :func:`gpubackprop.training.fit.fit` for all options. Returns the history.

        Raises
        ------
        RuntimeError
            Another ``fit`` trains this network, in another thread or around this callback. While it runs, callbacks may
            predict, evaluate, save and load parameters, other threads only what leaves the network as it is.
        """
        from gpubackprop.training.fit import fit

        check_options(fit, options)
        self._thread.last = None  # its intermediates are those of other parameters, and take memory
        with self.held():
            return fit(self, X, y, epochs=epochs, batch_size=batch_size, **options)

    def predict(self, X: Any) -> Any:
        """Return what the loss makes of the outputs: class indices (n,); 0 or 1; -1 or +1; the rate e^o; or o itself.

        Where y of the last ``fit`` was one number a sample, the shape is that of y: (n,) or (n, 1).
        """
        here, xp = self._outputs(X), self.backend.xp
        if self.loss.mean_function == "softmax":
            here = here.argmax(axis=1)
        elif self.loss.mean_function == "sigmoid":
            here = (here > 0).astype(np.int64)
        elif self.loss.targets == "signs":
            here = xp.where(here > 0, 1, -1)
        elif self.loss.mean_function == "exp":
            with np.errstate(over="ignore"):
                here = xp.exp(here)
        if self.target_shape in ((), (1,)):
            here = here.reshape(len(here), *self.target_shape)
        return like(self.backend, here, X)

    def predict_proba(self, X: Any) -> Any:
        """Return softmax(o), or sigmoid(o) for sigmoid_cross_entropy.

        Raises
        ------
        ValueError
            The loss gives no probabilities.
        """
        if self.loss.mean_function not in ("softmax", "sigmoid"):
            raise ValueError(f"{self.loss.name} gives no probabilities; predict(X) gives its predictions")
        o, xp = self._outputs(X), self.backend.xp
        if self.loss.mean_function == "softmax":
            e = xp.exp(o - o.max(axis=1, keepdims=True))
            return like(self.backend, e / e.sum(axis=1, keepdims=True), X)
        e = xp.exp(-xp.abs(o))
        return like(self.backend, xp.where(o < 0, e, xp.ones_like(e)) / (1 + e), X)

    def evaluate(self, X: Any, y: Any, sample_weight: Any = None) -> dict[str, float]:
        """Return the loss on a data set, and ``"accuracy"`` of a classification or ``"r2"`` of a regression."""
        from gpubackprop.training.evaluation import evaluate

        X = check_features(self.backend, X, self.layer_sizes[0], self.dtype)
        y = check_targets(self.backend, y, len(X), self.layer_sizes[-1], self.loss, self.real)
        return evaluate(self, X, y, check_weight(self.backend, sample_weight, len(X), self.real, self.loss))

    def predictor(self, batch_size: int = 1) -> Predictor:
        """Return the forward pass prepared for so many samples at a time: ``predictor(X)`` gives the outputs o.

        For one sample at a time with the least latency; :meth:`predict` is for whole data sets.
        """
        return Predictor(self, check_count("batch_size", batch_size))

    def outputs_in_batches(self, X: Array) -> Iterator[tuple[slice, Array]]:
        """Yield (rows, o) for consecutive batches of X, an array on the device."""
        X = check_features(self.backend, X, self.layer_sizes[0], self.dtype, finite=False)
        for rows, o in self._in_batches(X):
            yield rows, o.copy()

    def _in_batches(self, X: Array) -> Iterator[tuple[slice, Array]]:
        """As :meth:`outputs_in_batches`; o is overwritten by the next."""
        n = min(EVALUATION_BATCH, 1 << (len(X) - 1).bit_length())
        formulas = tuple(version_of(a, self.dtype) for a in self.activations)
        prepared = self._predictors.get(n)
        if prepared is None or prepared[0] != formulas:  # what an activation reads may have been edited since
            prepared = self._predictors[n] = formulas, Predictor(self, n)
        yield from prepared[1].in_batches(X)

    def warmup(self, batch_size: int = 128, optimizer: str | Optimizer = "adam", class_indices: bool = True) -> None:
        """Compile what ``fit``, ``predict`` and ``evaluate`` need, or load it from disk; this network does not change.

        Parameters
        ----------
        batch_size : int
        optimizer : str or Optimizer
        class_indices : bool
            y of a classification holds class indices, not rows of probabilities.
        """
        from gpubackprop.training.evaluation import evaluate

        n = check_count("batch_size", batch_size)
        twin = self.to(self.device)
        inputs = twin.inputs(n, class_indices and self.loss.targets == "classes", False)
        order = twin.backend.zeros((n,), np.int64)
        twin.step(n, optimizer, data=Data(inputs.X, inputs.y, None, order)).compile()()
        evaluate(twin, inputs.X, inputs.y)

    def _outputs(self, X: Any) -> Array:
        here = check_features(self.backend, X, self.layer_sizes[0], self.dtype)
        result = self.backend.zeros((len(here), self.layer_sizes[-1]), self.real)
        for rows, o in self._in_batches(here):
            result[rows] = o
        return result

    # ------------------------------------------------------------------ parameters, devices, files

    def to(self, device: str) -> MLP:
        """Return this network on another device: the same parameters, the state of the optimizer starts anew."""
        name = {"gpu": "cuda:0", "cuda": "cuda:0"}.get(device, device)
        other = build(architecture_of(self), self.backend if name == self.device else device)
        with active(other.backend):
            other.parameters.flat[...] = other.backend.asarray(self.backend.to_numpy(self.parameters.flat))
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, by ``pickle`` or ``copy.deepcopy``, is made of: no memory, but what is in it."""
        state, to_host = self.optimizer_state, self.backend.to_numpy
        arrays = None if state is None else [to_host(a).copy() for a in state.arrays]
        return {
            "architecture": architecture_of(self),
            "backend": self.backend,
            "parameters": to_host(self.parameters.flat).copy(),
            "optimizer": None if state is None else (state.optimizer, arrays),
            "own": {name: value for name, value in vars(self).items() if name not in self._of_network},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = state["backend"]
        made = build(state["architecture"], backend)
        made._matmul_precision = state["architecture"]["matmul_precision"]
        vars(self).update(vars(made))  # this is also an MLP's subclass, whose __init__ may be another
        vars(self).update(state["own"])
        with active(backend):
            self.parameters.flat[...] = backend.asarray(state["parameters"])
            if state["optimizer"] is not None:
                optimizer, arrays = state["optimizer"]
                for place, array in zip(self.state_of(optimizer).arrays, arrays, strict=True):
                    place[...] = backend.asarray(array)
            self.refresh()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies on the host under torch's names: ``layers.0.weight``, shape (d_out, d_in), and ``layers.0.bias``."""
        result = {}
        for i, (W, b) in enumerate(zip(self.parameters.W, self.parameters.b, strict=True)):
            result[f"layers.{i}.weight"] = np.ascontiguousarray(self.backend.to_numpy(W).T)
            result[f"layers.{i}.bias"] = self.backend.to_numpy(b).copy()
        return result

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over parameters under the names of :meth:`state_dict`; all of them or none.

        Raises
        ------
        ValueError
            A name is missing or too many, a shape differs, or a value is no real number that is finite in this network's dtype.
        RuntimeError
            A ``fit`` in another thread trains this network.
        """
        self.check_not_held("load_state_dict")
        shapes = {}
        for i, (W, b) in enumerate(zip(self.parameters.W, self.parameters.b, strict=True)):
            shapes[f"layers.{i}.weight"], shapes[f"layers.{i}.bias"] = W.shape[::-1], b.shape
        if not isinstance(state, Mapping) or set(state) != set(shapes):
            given = set(state) if isinstance(state, Mapping) else set()
            missing, extra = sorted(set(shapes) - given), sorted(given - set(shapes), key=str)
            raise ValueError(f"state_dict does not fit: missing {missing or 'none'}, not expected {extra or 'none'}")
        arrays = {
            name: check_parameter(self.backend, name, state[name], shape, self.real, self.dtype)
            for name, shape in shapes.items()
        }
        for i, (W, b) in enumerate(zip(self.parameters.W, self.parameters.b, strict=True)):
            W[...] = arrays[f"layers.{i}.weight"].T
            b[...] = arrays[f"layers.{i}.bias"]
        self._version += 1
        self.refresh()

    def save(self, path: Any) -> None:
        """Write the network to a safetensors file; see :mod:`gpubackprop.training.checkpoint`."""
        from gpubackprop.training.checkpoint import save

        save(self, path)

    def _initial_parameters(self) -> Parameters:
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        host = Parameters.zeros(get_backend("reference"), self.layer_sizes, real_of(self.dtype))
        gains = [a.gain for a in self.activations] + [1.0]
        for W, gain in zip(host.W, gains, strict=True):
            W[...] = self.initializer(rng, W.shape[0], W.shape[1], gain)
        return host

    def _key(self, purpose: str, n: int, y_shape: tuple[int, ...], weighted: bool, keep: bool) -> tuple[Any, ...]:
        """Return for what a workspace is, and for which queue of the device: nothing orders the work of two queues."""
        queue = getattr(self.backend, "queue", None)
        return purpose, n, y_shape, weighted, keep, None if queue is None else queue()

    def _take(
        self, purpose: str, n: int, y: Array | None = None, *, weighted: bool = False, keep: bool = False
    ) -> tuple[tuple[Any, ...], Workspace]:
        """Return the key and the workspace of an eager pass, for the caller alone; those of the last few passes are kept."""
        self.refresh()
        key = self._key(purpose, n, (n,) if y is None else y.shape, weighted, keep)
        ws = self._workspaces.take(key)
        if ws is None:
            self._check_memory(key)
            ws = self._new_workspace(self.backend, key)
        if purpose == "gradients":
            self._lend_gradients(key, ws)
        return key, ws

    def _lend_gradients(self, key: tuple[Any, ...], ws: Workspace) -> None:
        """Give a workspace memory for gradients, which those of all shapes take turns with."""
        lent = self._lent.take(key[-1:])
        if lent is None:
            gradients = Parameters.zeros(self.backend, self.layer_sizes, self.real)
            lent = gradients, make_layers(self.weights, gradients, [*self.activations, identity], Names())
        ws.gradients, ws.parameters = lent

    def _give(self, key: tuple[Any, ...], ws: Workspace) -> None:
        """Take a workspace back from its caller; not after an exception, since something may still write to it."""
        self._give_gradients(key, ws)
        self._workspaces.give(key, ws)

    def _give_gradients(self, key: tuple[Any, ...], ws: Workspace) -> None:
        if ws.gradients is not None:
            self._lent.give(key[-1:], (ws.gradients, ws.parameters))
            ws.gradients, ws.parameters = None, self.layers

    def _new_workspace(self, backend: Any, key: tuple[Any, ...]) -> Workspace:
        """Return a workspace without gradients; for gradients it has no memory for X and y either, and reads the caller's."""
        purpose, n, y_shape, weighted, keep, *_ = key
        inputs = self.inputs(n, len(y_shape) == 1, weighted, backend if purpose == "forward" else Tally())
        if weighted:
            inputs.normalized, inputs.total = backend.zeros((n,), self.real), backend.zeros((1,), np.dtype(np.float64))
        return Workspace(backend, self.layers, inputs, keep=keep)

    def _check_room(self, purpose: str, X: Array, y: Any = None, weight: Any = None, *, keep: bool = False) -> None:
        """Raise DeviceMemoryError if a pass, its data included, does not fit; for shapes met before nothing is asked."""
        if X.ndim:
            n = X.shape[0]
            shape = (n,) if y is None or self.takes_indices(y) else (n, self.layer_sizes[-1])
            key = self._key(purpose, n, shape, weight is not None, keep)
            if n and key not in self._workspaces:
                self._check_memory(key, data_bytes(self, X, y, weight))

    def _check_memory(self, key: tuple[Any, ...], data: int = 0) -> None:
        """Raise DeviceMemoryError if a new workspace does not fit beside so many bytes of data, even without the older ones."""
        purpose, n, (_, *rest), *flags, _ = key

        new = purpose == "gradients" and key[-1:] not in self._lent
        gradients = bytes_of(lambda backend: Parameters.zeros(backend, self.layer_sizes, self.real)) if new else 0

        def parts(k: int) -> dict[str, int]:
            workspace = bytes_of(lambda backend: self._new_workspace(backend, (purpose, k, (k, *rest), *flags)))
            return {"data": -(-data * k // n), "workspace": workspace, "gradients": gradients}

        self.make_room(sum(parts(n).values()))
        check_memory(self.backend, f"{purpose} over {n} samples", n, parts)

    def _gradients_like(self, ws: Workspace, given: Any) -> Parameters:
        assert ws.gradients is not None
        return Parameters(self.layer_sizes, like(self.backend, ws.gradients.flat.copy(), given))


class _Last(NamedTuple):
    """The last forward pass of a thread, and how often the parameters had been changed by then."""

    key: tuple[Any, ...]
    workspace: Workspace
    version: int


class _OfThread(threading.local):
    """What each thread has of a network for itself."""

    last: _Last | None = None


def _options(device: str | Backend, matmul_precision: str) -> dict[str, Any]:
    if matmul_precision == "float32":
        return {}
    if not takes_precision(device):
        raise ValueError(f"matmul_precision is {matmul_precision!r}, which needs device='cuda'; device is {device!r}")
    return {"matmul_precision": matmul_precision}


def _per_hidden_layer(activation: Any, n: int) -> tuple[Activation, ...]:
    if isinstance(activation, list | tuple):
        if len(activation) != n:
            raise ValueError(f"activation has {len(activation)} entries; there are {n} hidden layers: give one or {n}")
        return tuple(ACTIVATIONS.resolve(a) for a in activation)
    return (ACTIVATIONS.resolve(activation),) * n
