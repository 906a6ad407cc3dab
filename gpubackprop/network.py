"""A network on a device: its parameters, its optimizer's state, and its steps in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpubackprop.architecture import Architecture, Described
from gpubackprop.backends import choose_device, get_backend, takes_precision
from gpubackprop.backends.base import Backend
from gpubackprop.backends.current import OnDevice, active
from gpubackprop.backends.memory import (
    check_fixed,
    check_memory,
    choose_micro_batch,
    free_bytes,
    nbytes_of,
    not_allocated,
)
from gpubackprop.definitions import Array, check_count, check_flag, shown
from gpubackprop.eager import EagerPasses
from gpubackprop.features import Features
from gpubackprop.intake import check_parameter
from gpubackprop.labels import Label
from gpubackprop.optimizers import OPTIMIZERS, Optimizer
from gpubackprop.parameters import Parameters, SetOnce, initial_parameters
from gpubackprop.step import Step, layout
from gpubackprop.step.buffers import Memory
from gpubackprop.step.state import FACTOR, FIRST_SCALE, SCALE
from gpubackprop.step.step import record


@dataclass
class OptimizerState(SetOnce):
    """What training changes besides the parameters; all of it is on the device (see :mod:`gpubackprop.step.state`).

    The arrays may be written into, not replaced.
    """

    optimizer: Optimizer
    states: Array
    counters: Array
    rate: Array
    scalars: Array

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All of them."""
        return self.states, self.counters, self.rate, self.scalars


@dataclass
class Data:
    """A data set on the device, with the order in which ``gather`` takes its rows."""

    X: Array
    y: Array
    weight: Array | None
    order: Array


@dataclass
class Hold:
    """A fit that trains a network, by its process and thread."""

    pid: int
    thread: int
    has_state: bool = False
    """Whether it has chosen its optimizer state."""

    @property
    def is_mine(self) -> bool:
        """True for the thread that trains."""
        return (self.pid, self.thread) == (os.getpid(), threading.get_ident())


class Network(Described, SetOnce, OnDevice):
    """An architecture on a device, with parameters, gradients and the state of training.

    Parameters
    ----------
    architecture : Architecture
    device : str or Backend
        A device without ``matmul_precision`` keeps the architecture's, for a later move to a GPU.
    parameters : array, shape (size,), optional
        The flat array of the parameters, on the host; by default from the architecture's initializer.

    Raises
    ------
    ValueError
        The device does not compute in the architecture's dtype.
    DeviceUnavailableError, DeviceMemoryError
    """

    def __init__(self, architecture: Architecture, device: str | Backend, parameters: np.ndarray | None = None) -> None:
        if isinstance(device, str) and device == "auto":
            device = choose_device(architecture.layer_sizes)
        asked = takes_precision(device) and architecture.matmul_precision != "float32"
        options = {"matmul_precision": architecture.matmul_precision} if asked else {}
        self.backend: Backend = get_backend(device, **options)
        if not isinstance(device, str) and len(self.backend.precisions) > 1:  # it has one of its own
            architecture = replace(architecture, matmul_precision=self.backend.matmul_precision)
        self.device = self.backend.device
        self._architecture = architecture
        if self.dtype.name not in self.backend.dtypes:
            allowed = ", ".join(self.backend.dtypes)
            raise ValueError(f"device {self.device!r} computes in {allowed}; dtype is {self.dtype.name!r}")
        self.buffers = layout.fixed(architecture)
        with active(self.backend):
            self._allocate(self._initial() if parameters is None else parameters)

    def _initial(self) -> np.ndarray:
        try:
            return initial_parameters(self._architecture)
        except MemoryError:
            needed = nbytes_of([self.buffers.parameters])
            what = f"the parameters of {'-'.join(map(str, self.layer_sizes))}"
            raise not_allocated(what, needed, "the host") from None

    def _allocate(self, host: np.ndarray) -> None:
        check_fixed(self.backend, f"a network {'-'.join(map(str, self.layer_sizes))}", {
            "parameters and gradients": nbytes_of(b for b in self.buffers if b.name not in ("counters", "scalars")),
        })  # fmt: skip
        arrays = Memory().allocate(self.buffers, self.backend.zeros).arrays
        self.parameters = Parameters(self.layer_sizes, arrays["parameters"])
        self.gradients = Parameters(self.layer_sizes, arrays["gradients"])
        mixed = self.buffers.mixed
        # what the products read: the parameters themselves, or a copy of them in 16 bits
        self.weights = Parameters(self.layer_sizes, arrays["parameters_16"]) if mixed else self.parameters
        self.fixed_arrays: Mapping[str, Array] = arrays
        self._sums = Memory()  # sums of gradients and losses over micro-batches
        self._optimizer_state: OptimizerState | None = None
        self._holds: dict[str, Hold] = {}  # the fit that is training this network
        self.kept: dict[str, Any] = {}  # what the next fit can use again
        self._version = 0  # counts changes of the parameters
        self.eager = EagerPasses(self._architecture, self.backend, arrays)
        self.parameters.flat[...] = self.backend.asarray(host)
        self.refresh()

    @property
    def architecture(self) -> Architecture:
        """What describes it."""
        return self._architecture

    @property
    def version(self) -> int:
        """Counts the fits and the loads of parameters."""
        return self._version

    @property
    def optimizer_state(self) -> OptimizerState | None:
        """The arrays of the optimizer of the last ``fit`` or ``step``, or None before the first."""
        return self._optimizer_state

    @property
    def target_shape(self) -> tuple[int, ...] | None:
        """The shape of one sample's y in the last ``fit``, None before."""
        return self._architecture.target_shape

    @target_shape.setter
    def target_shape(self, shape: tuple[int, ...] | None) -> None:
        self._architecture = replace(self._architecture, target_shape=shape)

    def describe_data(self, features: Features | None, classes: Sequence[Label] | None) -> None:
        """Set what the inputs are made of and what the classes are called."""
        a = self._architecture
        if a.features is features and a.classes is classes:
            return
        self._architecture = replace(self._architecture, features=features, classes=classes)  # type: ignore[arg-type]

    def _advice(self, name: str) -> str:
        return advice(name)

    def refresh(self) -> None:
        """Round the parameters to the 16-bit weights again, if there are any, after a change from outside."""
        if self.weights is not self.parameters:
            hold = self._hold
            if hold is None or hold.is_mine:  # a step rounds them itself, perhaps at this moment
                self.weights.flat[...] = self.parameters.flat

    def changed(self) -> None:
        """Note that the parameters have changed since earlier passes."""
        self._version += 1
        self.refresh()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Reserve this network for one fit.

        Raises
        ------
        RuntimeError
            Another fit is training it.
        """
        hold = Hold(os.getpid(), threading.get_ident())
        try:
            other = self._holds.setdefault("fit", hold)  # atomic: there may be other threads
            if other.pid != hold.pid:  # a fit of the parent process, which continues there
                self._holds["fit"] = other = hold
            if other is not hold:
                where = "this thread, from a callback" if other.is_mine else "another thread"
                raise RuntimeError(
                    f"the network is in a fit of {where}; wait until it ends, or train a copy: copy.deepcopy(model).fit(...)"
                )
            self._version += 1
            yield
        finally:
            if self._holds.get("fit") is hold:
                del self._holds["fit"]

    @property
    def _hold(self) -> Hold | None:
        hold = self._holds.get("fit")
        return hold if hold is not None and hold.pid == os.getpid() else None

    def check_not_held(self, what: str) -> None:
        """Raise RuntimeError if a fit in another thread is training this network."""
        hold = self._hold
        if hold is not None and not hold.is_mine:
            raise RuntimeError(
                f"{what} would change the network while another thread's fit is running; wait until it ends"
            )

    def twin(self, device: str | Backend | None = None, **changes: Any) -> Network:
        """Return a network with the same parameters, on another device or with other fields of the architecture."""
        if not isinstance(device, str | Backend | None):
            raise ValueError(f"device is {shown(device)}; give a name, as in 'cpu' or 'cuda:0'")
        if isinstance(device, str):
            device = {"gpu": "cuda:0", "cuda": "cuda:0"}.get(device, device)
        place = self.backend if device is None or device == self.device else device
        architecture = replace(self._architecture, **changes)
        if architecture.layer_sizes != self.layer_sizes:  # other sizes may have as many parameters
            raise ValueError(
                f"layer_sizes is {shown(architecture.layer_sizes)}; a twin has the same parameters, and so {self.layer_sizes}"
            )
        return Network(architecture, place, self.backend.to_numpy(self.parameters.flat))

    # ------------------------------------------------------------------ the step as data

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
        """Return one training step: see :meth:`gpubackprop.MLP.step`."""
        n, keep = check_count("batch_size", batch_size), check_flag("keep", keep)
        class_indices, weighted = check_flag("class_indices", class_indices), check_flag("weighted", weighted)
        self.check_not_held("step")  # it writes to the gradients
        indices = self.loss.kind.takes_indices and (data.y.ndim == 1 if data else class_indices)
        weighted = weighted if data is None else data.weight is not None
        optimizer = None if optimizer is None else optimizer_of(optimizer)

        def memory_plan(n: int, m: int) -> dict[str, int]:
            if memory is not None:  # the caller has chosen
                return {}
            return self.step_parts(n, m, indices=indices, weighted=weighted, optimizer=optimizer, keep=keep)

        m = self.fit_into_memory(f"a step with batch_size={n}", n, micro_batch_size, memory_plan)
        multiple = self._architecture.micro_batch_multiple
        if m < n and m % multiple:
            raise ValueError(
                f"micro_batch_size is {m}; with dropout it must be a multiple of 4, so that the masks are the mini-batch's"
            )
        self.refresh()
        rows = None if data is None else len(data.X)
        step = record(
            self._architecture,
            n,
            optimizer,
            class_indices=indices,
            weighted=weighted,
            keep=keep,
            micro_batch=m,
            rows=rows,
        )
        return step.on(self.backend, self._place(step, m < n, optimizer, data, Memory() if memory is None else memory))

    def _place(
        self, step: Step, in_parts: bool, optimizer: Optimizer | None, data: Data | None, memory: Memory
    ) -> Memory:
        """Return memory for all arrays of a step; arrays that only it uses are allocated in ``memory``."""
        arrays = dict(self.fixed_arrays)
        if data is not None:
            given = {"X_all": data.X, "y_all": data.y, "w_all": data.weight, "order": data.order}
            arrays |= {name: a for name, a in given.items() if a is not None}
        elsewhere = {*arrays, "states", "rate"}
        if in_parts:
            arrays |= self._sums.allocate(layout.sums(self._architecture), self.backend.zeros).arrays
            elsewhere |= {*arrays}
        memory.allocate((b for b in step.roots if b.name not in elsewhere), self.backend.zeros)
        if optimizer is not None:
            state = self.state_of(optimizer)  # last: it may forget an older state
            arrays |= {"states": state.states, "rate": state.rate}
        return Memory(memory.arrays | arrays)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies on the host under torch's names: ``layers.0.weight``, shape (d_out, d_in), and ``layers.0.bias``."""
        result = {}
        for i, (W, b) in enumerate(zip(self.parameters.W, self.parameters.b, strict=True)):
            result[f"layers.{i}.weight"] = np.ascontiguousarray(self.backend.to_numpy(W).T)
            result[f"layers.{i}.bias"] = self.backend.to_numpy(b).copy()
        return result

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load parameters under the names of :meth:`state_dict`; all of them or none.

        Raises
        ------
        ValueError
            A name is missing or unexpected, a shape differs, or a value is not real and finite in this network's dtype.
        RuntimeError
            A ``fit`` in another thread is training this network.
        """
        self.check_not_held("load_state_dict")
        shapes = {}
        for i, (W, b) in enumerate(zip(self.parameters.W, self.parameters.b, strict=True)):
            shapes[f"layers.{i}.weight"], shapes[f"layers.{i}.bias"] = W.shape[::-1], b.shape
        if not isinstance(state, Mapping) or set(state) != set(shapes):
            given = set(state) if isinstance(state, Mapping) else set()
            missing, extra = sorted(set(shapes) - given), sorted(given - set(shapes), key=shown)
            named = [shown(names) if names else "none" for names in (missing, extra)]
            raise ValueError(f"state_dict does not fit: missing {named[0]}, not expected {named[1]}")
        arrays = {
            name: check_parameter(self.backend, name, state[name], shape, self.real, self.dtype)
            for name, shape in shapes.items()
        }
        for i, (W, b) in enumerate(zip(self.parameters.W, self.parameters.b, strict=True)):
            W[...] = arrays[f"layers.{i}.weight"].T
            b[...] = arrays[f"layers.{i}.bias"]
        self.changed()

    # ------------------------------------------------------------------ memory

    def step_parts(
        self,
        n: int,
        m: int,
        *,
        indices: bool,
        weighted: bool,
        optimizer: Optimizer | None = None,
        keep: bool = False,
        buffers: int = 1,
    ) -> dict[str, int]:
        """Return the bytes that a step over n samples, m at a time, has yet to allocate; each of ``buffers`` holds a mini-batch."""
        a = self._architecture
        given = layout.inputs(a, n, class_indices=indices, weighted=weighted)
        part = layout.layout(a, given.rows(0, m), dropout=True, keep=keep)
        new_state = optimizer is not None and not self._has_state(optimizer)
        return {
            "optimizer state": nbytes_of(layout.state(a, optimizer)) if optimizer is not None and new_state else 0,
            "mini-batch": buffers * nbytes_of(given),
            "workspace": nbytes_of(part.workspace),
            "sums over micro-batches": nbytes_of(b for b in layout.sums(a) if m < n and b.name not in self._sums),
        }

    def fit_into_memory(
        self,
        what: str,
        n: int,
        micro_batch_size: int | str | None,
        memory_plan: Callable[[int, int], Mapping[str, int]],
    ) -> int:
        """Return the size of the micro-batches of n samples, ``memory_plan(n, m)`` being the bytes for n samples, m at a time.

        Raises
        ------
        ValueError
            ``micro_batch_size`` is neither "auto" nor a whole number >= 1.
        DeviceMemoryError
            They do not fit.
        """
        auto = isinstance(micro_batch_size, str) and micro_batch_size == "auto"
        m = n if micro_batch_size is None or auto else min(n, check_count("micro_batch_size", micro_batch_size))
        if free_bytes(self.backend) is None:  # no limit is known
            return m
        self.eager.free_for(sum(memory_plan(n, m).values()))
        if auto:
            multiple = self._architecture.micro_batch_multiple
            return choose_micro_batch(self.backend, what, n, lambda m: memory_plan(n, m), multiple)
        advice = ", or micro_batch_size='auto' to split the batch" if micro_batch_size is None else ""
        check_memory(self.backend, what, n, lambda k: memory_plan(k, min(k, m)), advice)
        return m

    # ------------------------------------------------------------------ the optimizer

    def _has_state(self, optimizer: Optimizer) -> bool:
        return self._optimizer_state is not None and self._optimizer_state.optimizer == optimizer

    def state_of(self, optimizer: str | Optimizer) -> OptimizerState:
        """Return the optimizer's arrays: those of the last ``fit`` if it had an equal optimizer, else new ones."""
        optimizer, hold = optimizer_of(optimizer), self._hold
        self.check_not_held("state_of")
        if not self._has_state(optimizer):
            if hold is not None and hold.has_state:
                raise RuntimeError("another optimizer would discard the state of the running fit; wait until it ends")
            # first, since the allocation may fail
            new = Memory().allocate(layout.state(self._architecture, optimizer), self.backend.zeros).arrays
            counters, scalars = self.fixed_arrays["counters"], self.fixed_arrays["scalars"]
            new["rate"][0] = optimizer.schedule.learning_rate
            counters[...] = 0
            scalars[...] = 0
            scalars[FACTOR] = 1
            scalars[SCALE] = FIRST_SCALE if self._architecture.loss_scaling else 1
            self._optimizer_state = OptimizerState(optimizer, new["states"], counters, new["rate"], scalars)
        if hold is not None:
            hold.has_state = True
        assert self._optimizer_state is not None
        return self._optimizer_state


def advice(name: str) -> str:
    """Return what to do instead of replacing an attribute of a network."""
    if name in ("parameters", "weights", "gradients"):
        return "write into the arrays: model.parameters.W[l][...] = value"
    if name in ("optimizer_state", "real"):
        return "it follows from the rest of the network; a step or a fit creates the optimizer state"
    if name in ("device", "backend"):
        return "model.to(device) returns the network on another device"
    return f"make another network with MLP(..., {name}=...)"


def optimizer_of(optimizer: str | Optimizer) -> Optimizer:
    """Return an optimizer; a name stands for one with its defaults."""
    if isinstance(optimizer, str):
        return OPTIMIZERS.resolve(optimizer)()
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer is {shown(optimizer)}; give a name or an optimizer, as in Adam(1e-3)")
    return optimizer
