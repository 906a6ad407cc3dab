"""The multilayer perceptron as its users see it: passes for experiments, training, prediction, files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from gpubackprop.activations import Activation
from gpubackprop.architecture import Architecture, Described
from gpubackprop.backends import takes_precision
from gpubackprop.backends.base import Backend
from gpubackprop.backends.current import OnDevice, active
from gpubackprop.definitions import Array, check_count, eps_of, version_of
from gpubackprop.eager import Pass
from gpubackprop.features import Features
from gpubackprop.initializers import Initializer
from gpubackprop.intake import Samples, check_features, check_options
from gpubackprop.interop import as_array, like
from gpubackprop.labels import Label, labels_of
from gpubackprop.losses import Loss
from gpubackprop.network import Data, Network, OptimizerState, advice
from gpubackprop.optimizers import Optimizer
from gpubackprop.parameters import Parameters, SetOnce
from gpubackprop.predictor import Predictor
from gpubackprop.step import Step
from gpubackprop.step.buffers import Memory
from gpubackprop.training.checkpoint import fingerprint as fingerprint_of
from gpubackprop.training.checkpoint import load_training, save
from gpubackprop.training.evaluation import evaluate
from gpubackprop.training.fit import fit

if TYPE_CHECKING:
    from gpubackprop.inspect.diagnose import Diagnosis
    from gpubackprop.inspect.summary import Summary

FOLDED_ERROR = 1e-5  # relative: eps times the growth of rounding errors that folding may have
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


class MLP(Described, SetOnce, OnDevice):
    """A multilayer perceptron h_l = phi_l(h_{l-1} W_l + b_l), o = h_L W_o + b_o, trained by backpropagation.

    The attributes (sizes, dtype, device, layers, parameters, gradients) cannot be replaced; arrays may be written into.

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
        For the initial weights, the order of the mini-batches and the dropout masks; the same on every device.
    initializer : str or callable
        ``"he_normal"`` and the others of :mod:`gpubackprop.initializers`; the gain is that of the activation.
    dropout : float
        Fraction of hidden units dropped in training, in [0, 1).
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
        given: dict[str, Any] = {  # names and sequences, which an architecture resolves
            "layer_sizes": layer_sizes, "activations": activation, "loss": loss, "dtype": dtype, "seed": seed,
            "initializer": initializer, "dropout": dropout, "matmul_precision": matmul_precision,
        }  # fmt: skip
        architecture = Architecture(**given)
        if architecture.matmul_precision != "float32" and not takes_precision(device):
            raise ValueError(
                f"matmul_precision is {matmul_precision!r}, which needs device='cuda'; device is {device!r}"
            )
        self._begin(Network(architecture, device))

    @classmethod
    def of(cls, network: Network) -> Self:
        """Return an MLP over an existing network."""
        model = cls.__new__(cls)
        model._begin(network)
        return model

    def _begin(self, network: Network) -> None:
        self._network = network
        self._predictors: dict[int, tuple[Any, Predictor]] = {}  # by batch size
        self._lent: WeakSet[Predictor] = (
            WeakSet()
        )  # to callers of predictor(); they are told when the network gets features
        self._thread = _OfThread()
        self._of_class = frozenset((*vars(self), "_of_class"))  # a subclass or a user may add attributes

    # ------------------------------------------------------------------ what it is

    @property
    def network(self) -> Network:
        """The underlying network: memory, steps and the state of training."""
        return self._network

    @property
    def architecture(self) -> Architecture:
        """The description of the network; ``MLP.of(Network(replace(model.architecture, dtype="float64"), "cpu"))`` is a twin."""
        return self._network.architecture

    @property
    def device(self) -> str:
        """The device."""
        return self._network.device

    @property
    def backend(self) -> Backend:
        """The backend of the device."""
        return self._network.backend

    @property
    def parameters(self) -> Parameters:
        """W_l and b_l."""
        return self._network.parameters

    @property
    def gradients(self) -> Parameters:
        """dW_l and db_l of the last training step."""
        return self._network.gradients

    @property
    def optimizer_state(self) -> OptimizerState | None:
        """The arrays of the optimizer of the last ``fit`` or ``step``, or None before the first."""
        return self._network.optimizer_state

    def _advice(self, name: str) -> str:
        return advice(name)

    def __repr__(self) -> str:
        return f"MLP({self.architecture}, device={self.device!r})"

    def summary(self) -> Summary:
        """Return a table of layers, shapes, parameters and bytes; ``print`` shows it."""
        from gpubackprop.inspect.summary import Summary

        return Summary.of(self._network, repr(self))

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    # ------------------------------------------------------------------ for experiments

    def forward(self, X: Any) -> Any:
        """Return the outputs o = h_L W_o + b_o, as the same kind of array as X.

        Shapes
        ------
        X : (n, d_0); returns (n, d_o)
        """
        given, network = Samples.features(X, self.architecture), self._network
        last, self._thread.last = self._thread.last, None
        if last is not None:
            network.eager.give(last.run)
        self._check_memory("forward", given)
        here = given.on(self.backend, self.architecture, finite=False).X
        network.refresh()
        run = network.eager.take(network.eager.kind("forward", len(here)))
        output = run.layout.layers[-1].z
        run.array(run.layout.inputs.X)[...] = here  # a copy: the caller may overwrite X before backward reads it
        run.forward()
        o = like(self.backend, run.array(output).astype(self.real), given.X)
        self._thread.last = _Last(run, network.version)
        return o

    def backward(self, do: Any) -> Parameters:
        """Return the gradients dW_l, db_l given do = d loss / d o of any loss, for the last ``forward`` of this thread.

        Shapes
        ------
        do : (n, d_o)

        Raises
        ------
        ValueError
            ``forward`` has not been called in this thread, or for another number of samples, or ``fit`` or
            ``load_state_dict`` has run since.
        """
        last = self._thread.last
        if last is None:
            raise ValueError(
                "backward needs the intermediates of a forward pass; call forward(X) first, in this thread"
            )
        if last.version != self._network.version:
            raise ValueError("the parameters have changed since forward(X), by fit or load_state_dict; call it again")
        run, eager = last.run, self._network.eager
        given = as_array(do, "do")
        given = check_features(self.backend, given, self.layer_sizes[-1], self.dtype, finite=False, name="do")
        if len(given) != run.kind.n:
            raise ValueError(f"do has {len(given)} rows; the last forward(X) had {run.kind.n}")
        eager.lend_gradients(run)
        run.backward(do_given=given)
        result = self._gradients_like(run, do)
        eager.take_gradients(run)
        return result

    def loss_and_gradients(self, X: Any, y: Any, sample_weight: Any = None) -> tuple[Array, Parameters]:
        """Return the loss and d loss / d W_l, d loss / d b_l, without dropout.

        Returns
        -------
        loss : array of shape (), float64
            On the device: ``float(loss)`` waits for it.
        gradients : Parameters
            ``gradients.W[l]``, ``gradients.b[l]``, l = 0 the first layer; a copy, as the same kind of array as X.
        """
        given = Samples.given(X, y, sample_weight, by=self.architecture)
        with self._differentiated(given) as (run, _):
            return run.array(run.layout.value)[0].copy(), self._gradients_like(run, given.X)

    def trace(self, X: Any, y: Any, sample_weight: Any = None) -> Trace:
        """Return every intermediate of a forward and a backward pass, each in its own array.

        The kernels are those of a step; only the memory differs.
        """
        given = Samples.given(X, y, sample_weight, by=self.architecture)
        with self._differentiated(given, keep=True) as (run, here):
            layers = []
            for a in run.layout.layers:
                dh = a.delta if a.name == "o" else a.dh
                h_in = here if a.h_in.name == "X" else run.array(a.h_in)
                arrays = (h_in, *map(run.array, (a.z, a.h, dh, a.delta, a.dW, a.db)))
                layers.append(TracedLayer(*(like(self.backend, array.copy(), given.X) for array in arrays)))
            last = layers[-1]
            return Trace(layers, layers[0].h_in, last.h, last.delta, run.array(run.layout.value)[0].copy())

    def diagnose(
        self, X: Any, y: Any, sample_weight: Any = None, *, optimizer: str | Optimizer | None = None
    ) -> Diagnosis:
        """Return dead and saturated units, gradients and updates of each layer, and what is likely to be wrong.

        ``print`` shows it; see :func:`gpubackprop.inspect.diagnose.diagnose`.
        """
        from gpubackprop.inspect.diagnose import diagnose

        return diagnose(self, X, y, sample_weight, optimizer=optimizer)

    @contextmanager
    def _differentiated(self, given: Samples, *, keep: bool = False) -> Iterator[tuple[Pass, Array]]:
        """Yield a pass over this data that no other call uses, and X on its device."""
        self._check_memory("gradients", given, keep=keep)
        here, eager = given.on(self.backend, self.architecture, finite=False), self._network.eager
        indices, weighted = here.y.ndim == 1, here.weight is not None
        self._network.refresh()
        run = eager.take(eager.kind("gradients", len(here), class_indices=indices, weighted=weighted, keep=keep))
        arrays = {"X": here.X, "y": here.y} | ({"w": here.weight} if weighted else {})
        run.forward(**arrays)
        run.backward(**arrays)
        yield run, here.X
        eager.give(run)

    # ------------------------------------------------------------------ training and use

    @property
    def target_shape(self) -> tuple[int, ...] | None:
        """The shape of one sample's y in the last ``fit``, None before; kept by ``to``, ``save`` and ``load``."""
        return self._network.target_shape

    @target_shape.setter
    def target_shape(self, shape: Sequence[int] | None) -> None:
        self._network.target_shape = shape  # type: ignore[assignment]  # checked there

    def describe_data(self, features: Features | None, classes: Sequence[Label] | None) -> None:
        """Set what the inputs are made of and what the classes are called, as the first ``fit`` does by its data.

        Raises
        ------
        ValueError
            The layer sizes or the loss do not fit.
        """
        self._network.describe_data(features, classes)
        for predictor in self._lent:
            predictor.follow_features()

    def step(
        self,
        batch_size: int,
        optimizer: str | Optimizer | None = None,
        *,
        data: Data | None = None,
        class_indices: bool = True,
        weighted: bool = False,
        keep: bool = False,
        micro_batch_size: int | str | None = None,
        memory: Memory | None = None,
    ) -> Step:
        """Return one training step as data: the list of its operations, in its own memory.

        Parameters
        ----------
        batch_size : int
        optimizer : str or Optimizer, optional
            Without one, the step ends with the gradients.
        data : Data, optional
            A data set on the device; the step then begins by gathering its next mini-batch. Without one, the caller fills
            ``step.names.array("X")`` and ``("y")``.
        class_indices : bool
            Without ``data``: y of a classification holds class indices (n,), not rows of probabilities.
        weighted : bool
            Without ``data``: there are sample weights, in ``step.names.array("w")``.
        keep : bool
            Give every intermediate its own memory.
        micro_batch_size : int or "auto", optional
            Run the passes on this many samples at a time, and add up their gradients in order: the update is that of
            the whole mini-batch up to rounding, and the workspace is that of a micro-batch. "auto": the fewest micro-batches
            that fit into the free memory of the device.
        memory : Memory, optional
            Reuse the arrays found here and add new ones: steps of several sizes share the memory of the first, which
            must be the largest.

        Raises
        ------
        ValueError
            A size is not a whole number >= 1, or micro-batches would not have the dropout masks of the mini-batch.
        DeviceMemoryError
            The step does not fit; nothing has changed, so a smaller batch can be tried.
        """
        return self._network.step(
            batch_size, optimizer, data=data, class_indices=class_indices, weighted=weighted, keep=keep,
            micro_batch_size=micro_batch_size, memory=memory,
        )  # fmt: skip

    def state_of(self, optimizer: str | Optimizer) -> OptimizerState:
        """Return the optimizer's arrays: those of the last ``fit`` if it had an equal optimizer, else new ones."""
        return self._network.state_of(optimizer)

    def fit(self, X: Any, y: Any, epochs: int = 10, batch_size: int | str = 128, **options: Any) -> Any:
        """Train; see :func:`gpubackprop.training.fit.fit` for all options. Returns the history.

        Raises
        ------
        RuntimeError
            Another ``fit`` is training this network, in another thread or around this callback. While it runs, callbacks may
            predict, evaluate, save and load parameters; other threads may only do what leaves the network unchanged.
        """
        check_options(fit, options)
        self._thread.last = None  # its intermediates are stale, and take memory
        with self._network.held():
            return fit(self, X, y, epochs=epochs, batch_size=batch_size, **options)

    def predict(self, X: Any) -> Any:
        """Return the predictions that the loss defines: class indices (n,); 0 or 1; -1 or +1; the rate e^o; or o itself.

        Where the network has ``classes``, their labels instead of indices, as a NumPy array. If y of the last ``fit`` was one
        number per sample, the shape is that of y: (n,) or (n, 1).
        """
        shape = self.target_shape if self.target_shape in ((), (1,)) else None
        found = self._read(X, self.loss.kind.predict, shape)
        return found if self.classes is None else labels_of(found, self.classes)

    def folded(self) -> MLP:
        """Return this network with the scaling of its features folded into the first layer: predictions then scale nothing.

        W_1 / std and b_1 - (mean / std) W_1, computed in float64: the same outputs up to rounding.

        Raises
        ------
        ValueError
            A column's mean is so many standard deviations from 0 that this dtype would lose the digits.
        """
        features = self.features
        if features is None:
            return self.to(self.device)
        growth, column = features.growth_of_rounding()
        if growth * eps_of(self.real) > FOLDED_ERROR:
            raise ValueError(
                f"{column} has a mean of {growth - 1:.3g} standard deviations; folded into {self.real} weights, its scaling would "
                f"lose {np.log10(growth):.1f} digits: use dtype='float64', or the network as it is"
            )
        W, b = (self.backend.to_numpy(a[0]).astype(np.float64) for a in (self.parameters.W, self.parameters.b))
        plain, W, b = features.folded(W, b)
        model = self.twin(features=plain)
        state = model.state_dict() | {"layers.0.weight": W.T, "layers.0.bias": b}
        model.load_state_dict({name: a.astype(self.real) for name, a in state.items()})
        return model

    def predict_proba(self, X: Any) -> Any:
        """Return softmax(o), or sigmoid(o) for sigmoid_cross_entropy.

        Raises
        ------
        ValueError
            The loss gives no probabilities.
        """
        kind = self.loss.kind
        if kind.mean.probabilities is None:
            raise ValueError(f"{self.loss.name} gives no probabilities; predict(X) gives its predictions")
        return self._read(X, kind.mean.probabilities)

    def evaluate(self, X: Any, y: Any, sample_weight: Any = None) -> dict[str, float]:
        """Return the loss on a data set, and ``"accuracy"`` of a classification or ``"r2"`` of a regression."""
        given = Samples.given(X, y, sample_weight, by=self.architecture)
        samples = given.on(given.home(self.backend, self.architecture), self.architecture)
        return evaluate(self._network, self.in_batches(samples.X), samples)

    def predictor(self, batch_size: int = 1) -> Predictor:
        """Return a forward pass prepared for ``batch_size`` samples: ``predictor(X)`` returns the outputs o.

        It has the lowest latency for one sample at a time; :meth:`predict` is for whole data sets.
        """
        predictor = Predictor(self._network, check_count("batch_size", batch_size))
        self._lent.add(predictor)
        return predictor

    def outputs_in_batches(self, X: Array) -> Iterator[tuple[slice, Array]]:
        """Yield (rows, o) for consecutive batches of X, an array on the device, or on the host if it does not fit."""
        given = Samples.features(X, self.architecture)
        here = given.on(given.home(self.backend, self.architecture), self.architecture, finite=False)
        for rows, o in self.in_batches(here.X):
            yield rows, o.copy()

    def in_batches(self, X: Array) -> Iterator[tuple[slice, Array]]:
        """Like :meth:`outputs_in_batches`, but X is the checked inputs of the first layer, and the next batch overwrites o."""
        n = min(EVALUATION_BATCH, 1 << (len(X) - 1).bit_length())
        formulas = tuple(version_of(a, self.dtype) for a in self.activations)
        prepared = self._predictors.get(n)
        if prepared is None or prepared[0] != formulas:  # a value that an activation reads may have changed since
            prepared = self._predictors[n] = formulas, Predictor(self._network, n)
        yield from prepared[1].in_batches(X)

    def warmup(self, batch_size: int = 128, optimizer: str | Optimizer = "adam", class_indices: bool = True) -> None:
        """Compile the kernels of ``fit``, ``predict`` and ``evaluate``, or load them from disk; the network does not change.

        Parameters
        ----------
        batch_size : int
        optimizer : str or Optimizer
        class_indices : bool
            y of a classification holds class indices, not rows of probabilities.
        """
        n = check_count("batch_size", batch_size)
        twin = self.to(self.device)
        zeros, d, out = twin.backend.zeros, self.layer_sizes[0], self.layer_sizes[-1]
        indices = class_indices and self.loss.kind.takes_indices
        X, order = zeros((n, d), self.dtype), zeros((n,), np.int64)
        y = zeros((n,), np.int64) if indices else zeros((n, out), self.real)
        twin.step(n, optimizer, data=Data(X, y, None, order)).compile()()
        evaluate(twin.network, twin.in_batches(X), Samples(X, y))

    def _read(self, X: Any, read: Callable[[Array, Any], Array], shape: tuple[int, ...] | None = None) -> Any:
        """Return what ``read(o, xp)`` makes of the outputs, batch by batch on the device, as the same kind of array as X."""
        given = Samples.features(X, self.architecture)
        home = given.home(self.backend, self.architecture)
        here, result = given.on(home, self.architecture), None
        for rows, o in self.in_batches(here.X):
            part = read(o, self.backend.xp)
            if result is None:
                result = home.empty((len(here), *part.shape[1:]), part.dtype)
            result[rows] = part if home is self.backend else self.backend.to_numpy(part)
        assert result is not None  # there is a sample
        return like(home, result if shape is None else result.reshape(-1, *shape), X)

    # ------------------------------------------------------------------ parameters, devices, files

    def to(self, device: str) -> MLP:
        """Return this network on another device: with the same parameters and a fresh optimizer state."""
        return self.twin(device)

    def twin(self, device: str | None = None, **changes: Any) -> MLP:
        """Return a network with the same parameters, on another device or with another architecture.

        Parameters
        ----------
        device : str, optional
            This network's by default.
        **changes
            Fields of :class:`gpubackprop.architecture.Architecture`, as in ``twin("reference", dtype="float64", dropout=0.0)``.
        """
        return MLP.of(self._network.twin(device, **changes))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for ``pickle`` and ``copy.deepcopy``: the contents of memory, without addresses."""
        state, to_host = self.optimizer_state, self.backend.to_numpy
        arrays = None if state is None else [to_host(a).copy() for a in state.arrays]
        return {
            "architecture": self.architecture,
            "backend": self.backend,
            "parameters": to_host(self.parameters.flat).copy(),
            "optimizer": None if state is None else (state.optimizer, arrays),
            "own": {name: value for name, value in vars(self).items() if name not in self._of_class},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = state["backend"]
        self._begin(Network(state["architecture"], backend, state["parameters"]))
        vars(self).update(state["own"])
        if state["optimizer"] is not None:
            optimizer, arrays = state["optimizer"]
            with active(backend):
                for place, array in zip(self.state_of(optimizer).arrays, arrays, strict=True):
                    place[...] = backend.asarray(array)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies on the host under torch's names: ``layers.0.weight``, shape (d_out, d_in), and ``layers.0.bias``."""
        return self._network.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load parameters under the names of :meth:`state_dict`; all of them or none.

        Raises
        ------
        ValueError
            A name is missing or unexpected, a shape differs, or a value is not real and finite in this network's dtype.
        RuntimeError
            A ``fit`` in another thread is training this network.
        """
        self._network.load_state_dict(state)

    def save(self, path: Any) -> None:
        """Write the network to a safetensors file; see :mod:`gpubackprop.training.checkpoint`."""
        save(self._network, path)

    def _check_memory(self, purpose: str, given: Samples, *, keep: bool = False) -> None:
        """Raise DeviceMemoryError if a pass and its data do not fit; shapes seen before are not checked again."""
        if len(given):
            eager, indices, weighted = self._network.eager, given.indices(self.loss), given.weight is not None
            kind = eager.kind(purpose, len(given), class_indices=indices, weighted=weighted, keep=keep)
            if kind not in eager.kept:
                eager.check_memory_for(kind, given.nbytes(self.backend, self.architecture))

    def _gradients_like(self, run: Pass, given: Any) -> Parameters:
        assert run.gradients is not None
        return Parameters(self.layer_sizes, like(self.backend, run.gradients.flat.copy(), given))


class _Last(NamedTuple):
    """The last forward pass of a thread, and the version of the parameters it used."""

    run: Pass
    version: int


class _OfThread(threading.local):
    """What a network keeps per thread."""

    last: _Last | None = None


def fingerprint(model: MLP) -> str:
    """Return the SHA-256 of a network's architecture and parameters, in hexadecimal digits.

    Two trainings with the same seed, data, settings and ``history.determined_by`` end with the same fingerprint, for any
    number of threads and interruptions.
    """
    return fingerprint_of(model.network)


def load(path: Any, device: str = "cpu") -> MLP:
    """Load a network from a file that :meth:`MLP.save` wrote, onto any device.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is truncated, has another format, or names an activation, loss or initializer that is not registered.
    """
    return MLP.of(load_training(path, device)[0])
