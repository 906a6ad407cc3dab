"""The peers: the same network, trained from the same weights on the same mini-batch by other libraries, each at its best.

A peer is one class in one module, written as the library's own documentation recommends; ``PEERS`` names them all. One that
cannot run raises, and the report has the reason.
"""

from __future__ import annotations

import pkgutil
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop.bench.sizes import LIBRARIES
from gpubackprop.bench.timing import Timer, WallTimer
from gpubackprop.machine.crossover import step_flops

LEARNING_RATE = 1e-3
LONG_STEP = "a step is so long that a call of its own costs nothing"
LONG_CALL = {"cpu": 20_000_000, "cuda": 20_000_000_000}  # FLOP above which the call itself costs nothing
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of Adam; some libraries have other defaults


class CannotTakePartError(RuntimeError):
    """The peer is installed, but does not support this device or dtype; the message says why."""


@dataclass(frozen=True)
class Problem:
    """What every peer gets: data, a network with ReLU and softmax cross-entropy, its initial weights, an optimizer.

    Parameters
    ----------
    sizes : tuple of int
        Inputs, hidden layers, outputs.
    batch : int
    X, y : numpy.ndarray
        float32 (N, d_0) and class indices int64 (N,), N >= batch. A step takes the first ``batch`` rows.
    state : dict
        The initial weights, under PyTorch's names and in its layout.
    device : str
        ``"cpu"`` or ``"cuda:0"``.
    dtype : str
        ``"float32"``, ``"float64"``, ``"float16"``, ``"bfloat16"``, or ``"tf32"`` for float32 with TF32 products.
    optimizer : {"sgd", "adam"}
    threads : int
    """

    sizes: tuple[int, ...]
    batch: int
    X: np.ndarray
    y: np.ndarray
    state: dict[str, np.ndarray]
    device: str = "cpu"
    dtype: str = "float32"
    optimizer: str = "sgd"
    threads: int = 1

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def index(self) -> int:
        """The number of the GPU."""
        return int(self.device.partition(":")[2] or 0)

    @property
    def steps_per_call(self) -> int:
        """How many steps to take per call if there is a choice: fewer for longer steps, at most 16."""
        return max(1, min(16, LONG_CALL["cuda" if self.on_gpu else "cpu"] // step_flops(self.sizes, self.batch)))

    @property
    def storage(self) -> str:
        """The dtype of the arrays: float32 for TF32."""
        return "float32" if self.dtype == "tf32" else self.dtype

    def parameters(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return W_l as (d_in, d_out) and b_l of all layers."""
        layers = range(len(self.sizes) - 1)
        W = [np.ascontiguousarray(self.state[f"layers.{i}.weight"].T) for i in layers]
        return W, [self.state[f"layers.{i}.bias"] for i in layers]

    def of_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a step."""
        return self.X[: self.batch], self.y[: self.batch]


def make_problem(
    sizes: tuple[int, ...],
    batch: int,
    device: str = "cpu",
    dtype: str = "float32",
    optimizer: str = "sgd",
    threads: int = 1,
    samples: int | None = None,
) -> Problem:
    """Return a problem with inputs of noise around one pattern per class, and ours of seed 0 for initial weights."""
    rng = np.random.default_rng(0)
    n = samples or batch
    y = rng.integers(0, sizes[-1], n)
    patterns = rng.standard_normal((sizes[-1], sizes[0]), np.float32)
    X = patterns[y] + rng.standard_normal((n, sizes[0]), np.float32)
    state = gb.MLP(sizes, device="reference").state_dict()
    for array in (X, y, *state.values()):
        array.setflags(write=False)  # a peer training in these arrays would spoil them for the next
    return Problem(sizes, batch, X, y, state, device=device, dtype=dtype, optimizer=optimizer, threads=threads)


class Peer(ABC):
    """A library with the network of a problem.

    ``step`` queues ``units`` training steps on the mini-batch; ``loss`` waits for the loss of the last one, taken before its
    update. ``epoch`` trains once through all rows, a mini-batch at a time, and returns when the host need do no more.
    ``predict`` returns the outputs, or probabilities, for the mini-batch. ``timer`` waits for what they queue;
    ``setup_seconds`` is what making the peer took, compiling included. ``dtypes`` and ``devices`` are those it is written for.
    """

    dtypes: tuple[str, ...] = ("float32",)
    devices: tuple[str, ...] = ("cpu", "cuda")

    units = 1
    gives_probabilities = False
    setup_seconds: float | None = None
    timer: Timer = WallTimer(lambda: None)
    problem: Problem

    @abstractmethod
    def step(self) -> object:
        """Take ``units`` training steps."""

    @abstractmethod
    def loss(self) -> float:
        """Return the loss of the last step."""

    def predict(self) -> object:
        """Return the outputs for the mini-batch."""
        raise CannotTakePartError("its prediction is not measured")

    def epoch(self, *, shuffle: bool) -> object:
        """Train once through all rows."""
        raise CannotTakePartError("its epoch is not measured")

    def probabilities(self) -> np.ndarray:
        """Return the probabilities of the mini-batch on the host, in float64."""
        found: Any = self.predict()
        if hasattr(found, "cpu"):
            found = found.double().cpu().numpy()
        elif hasattr(found, "get"):
            found = found.get()
        o = np.asarray(found, np.float64)
        return o if self.gives_probabilities else softmax(o)


def softmax(o: np.ndarray) -> np.ndarray:
    """Return e^o over its sum, by rows."""
    e = np.exp(o - o.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Entry:
    """A possible peer.

    Parameters
    ----------
    library, module, target : str
        Its library, the name to import, and its class.
    slow : bool
        It takes minutes to compile.
    only_steps : bool
        It differs from another only in that it takes K steps per call.
    """

    library: str
    module: str
    target: str
    slow: bool = False
    only_steps: bool = False


def _entry(library: str, target: str, module: str | None = None, **more: bool) -> Entry:
    return Entry(library, module or library, f"gpubackprop.bench.peers.{target}", **more)


PEERS = {
    "numpy": _entry("numpy", "arrays:NumpyPeer"),
    "cupy": _entry("cupy", "arrays:CupyPeer"),
    "torch": _entry("torch", "pytorch:TorchPeer"),
    "torch compile": _entry("torch", "pytorch:CompiledTorchPeer", slow=True),
    "torch graph": _entry("torch", "pytorch:GraphedTorchPeer"),
    "torch compile+graph": _entry("torch", "pytorch:CompiledGraphedTorchPeer", slow=True),
    "torch compile+graph, K steps": _entry("torch", "pytorch:CompiledGraphedTorchLoopPeer", slow=True, only_steps=True),
    "jax": _entry("jax", "xla:JaxPeer"),
    "jax, K steps": _entry("jax", "xla:JaxLoopPeer", only_steps=True),
    "sklearn": _entry("sklearn", "scikit:ScikitPeer"),
    "thinc": _entry("thinc", "thinc_ops:ThincPeer"),
    "keras": _entry("keras", "keras3:KerasPeer"),
    "tinygrad": _entry("tinygrad", "tiny:TinygradPeer", slow=True),
}


def make_peers(
    problem: Problem, libraries: Collection[str] = LIBRARIES, *, slow: bool = True, only_steps: bool = True
) -> Iterator[tuple[str, Peer | str]]:
    """Yield the name of each peer of these libraries, and the peer, ready to take steps, or why it is left out.

    Parameters
    ----------
    slow : bool
        Whether to make those that compile for a minute.
    only_steps : bool
        Whether to make those that differ from others only in taking K steps per call.
    """
    for name, entry in PEERS.items():
        if entry.library in libraries and (only_steps or not entry.only_steps):
            yield name, make_peer(name, problem, slow=slow)


def make_peer(name: str, problem: Problem, *, slow: bool = True) -> Peer | str:
    """Return a peer, or why it is left out."""
    entry = PEERS[name]
    if find_spec(entry.module) is None:
        return "not installed"
    if entry.slow and not slow:
        return "takes long to compile: left out of a quick run"
    try:
        kind: type[Peer] = pkgutil.resolve_name(entry.target)
        if problem.device.partition(":")[0] not in kind.devices:
            return f"runs on {'a GPU' if problem.device == 'cpu' else 'the CPU'} only"
        if problem.dtype not in kind.dtypes:
            return f"written for {' and '.join(kind.dtypes)}, not {problem.dtype}"
        started = time.perf_counter()
        peer = kind(problem)  # type: ignore[call-arg]
        peer.setup_seconds = time.perf_counter() - started
    except Exception as error:  # whatever keeps a peer from running: it is listed with the reason
        return reason_of(error)
    return peer


def reason_of(error: BaseException) -> str:
    """Return an error on one line."""
    text = next(iter(str(error).splitlines()), "")[:200]
    return text if isinstance(error, CannotTakePartError) else f"{type(error).__name__}: {text}"
