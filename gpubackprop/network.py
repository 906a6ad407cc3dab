"""A network on a device: its layers, and the passes of backpropagation over them, in the order of the mathematics.

The passes are written once, against the methods of a backend. ``ops`` is the backend itself, and then they compute, or a
:class:`gpubackprop.step.Recorder`, and then they leave the list of operations that a step compiles.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpubackprop.activations import Activation, identity
from gpubackprop.backends.base import FACTOR, FIRST_SCALE, SCALE, Backend
from gpubackprop.backends.checks import unchecked
from gpubackprop.backends.current import OnDevice
from gpubackprop.definitions import Array, real_of
from gpubackprop.intake import check_count
from gpubackprop.losses import Loss
from gpubackprop.memory import bytes_of, check_fixed, fit_into_memory, fits, step_parts
from gpubackprop.optimizers import OPTIMIZERS, Optimizer
from gpubackprop.parameters import Parameters, SetOnce
from gpubackprop.step import Names, Recorder, Step
from gpubackprop.workspace import Inputs, Layer, Pool, Workspace, make_layers


@dataclass
class OptimizerState(SetOnce):
    """What changes during training, beside the parameters; all of it on the device (see ``backends/base.py``).

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
    """It has chosen the state of its optimizer."""

    @property
    def is_mine(self) -> bool:
        """True for the thread that trains."""
        return (self.pid, self.thread) == (os.getpid(), threading.get_ident())


class Network(SetOnce, OnDevice):
    """Parameters, gradients and layers on a backend; what :class:`gpubackprop.mlp.MLP` gives a public face."""

    layer_sizes: tuple[int, ...]
    activations: tuple[Activation, ...]
    loss: Loss
    backend: Backend
    dtype: np.dtype[Any]
    seed: int
    dropout: float

    def __init__(self, host: Parameters) -> None:
        """Put the parameters on the device, and make the layers, which are views."""
        zeros = self.backend.zeros
        self._ops = unchecked(self.backend)  # for workspaces, whose arrays fit
        self.real = real_of(self.dtype)
        self.loss_scaling = self.dtype.name == "float16"
        self._workspaces = Pool(6)  # of eager passes
        self._lent = Pool(6)  # gradients with their layers, for those
        self._holds: dict[str, Hold] = {}  # a fit that trains this network
        self._version = 0  # counts what changed the parameters
        self._sums: tuple[Array, Array] | None = None  # of gradients and losses over micro-batches
        # what the products read: the parameters themselves, or a copy of them in 16 bits
        mixed = self.dtype != self.real
        dtypes = [self.real, self.real, self.dtype] if mixed else [self.real, self.real]

        def allocate(backend: Any) -> list[Parameters]:
            return [Parameters.zeros(backend, self.layer_sizes, dtype) for dtype in dtypes]

        sizes = "-".join(map(str, self.layer_sizes))
        check_fixed(self.backend, f"a network {sizes}", {"parameters and gradients": bytes_of(allocate)})
        self.parameters, self.gradients, *copy = allocate(self.backend)
        self.weights = copy[0] if mixed else self.parameters
        self.parameters.flat[...] = self.backend.asarray(host.flat)
        self._names = names = Names()
        self._named_parameters = names("θ", self.parameters.flat)
        self._named_weights = names("θ16", self.weights.flat) if mixed else None
        self._named_gradients = names("∇", self.gradients.flat)
        self._counters = names("t", zeros((2,), np.dtype(np.int64)))
        self.layers: tuple[Layer, ...] = make_layers(self.weights, self.gradients, [*self.activations, identity], names)
        self._optimizer_state: OptimizerState | None = None
        self._scalars = names("η", zeros((8,), self.real))
        self.refresh()

    @property
    def optimizer_state(self) -> OptimizerState | None:
        """The arrays of the optimizer of the last ``fit`` or ``step``, or None before the first."""
        return self._optimizer_state

    def _advice(self, name: str) -> str:
        if name in ("parameters", "weights", "gradients", "layers"):
            return "write into the arrays: model.parameters.W[l][...] = value"
        if name in ("optimizer_state", "loss_scaling", "real"):
            return "it is given by the rest of the network; a step or a fit makes the state of an optimizer"
        if name in ("device", "backend"):
            return "model.to(device) returns the network on another device"
        return f"make another network with MLP(..., {name}=...)"

    def refresh(self) -> None:
        """Round the parameters to the 16-bit weights again, where there are such, after they were changed from outside."""
        if self.weights is not self.parameters:
            hold = self._hold
            if hold is None or hold.is_mine:  # a step rounds them itself, perhaps at this moment
                self.weights.flat[...] = self.parameters.flat

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep this network for one fit.

        Raises
        ------
        RuntimeError
            Another fit trains it.
        """
        hold = Hold(os.getpid(), threading.get_ident())
        try:
            other = self._holds.setdefault("fit", hold)  # in one: there may be threads
            if other.pid != hold.pid:  # of the process that this one was forked from, where its fit goes on
                self._holds["fit"] = other = hold
            if other is not hold:
                where = "this thread, from a callback" if other.is_mine else "another thread"
                raise RuntimeError(
                    f"the network is in a fit of {where}; wait until that is over, or train a copy: copy.deepcopy(model).fit(...)"
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
        """Raise RuntimeError if a fit in another thread trains this network."""
        hold = self._hold
        if hold is not None and not hold.is_mine:
            raise RuntimeError(
                f"{what} would change the network under a fit of another thread; wait until that is over"
            )

    # ------------------------------------------------------------------ the passes

    def forward_pass(self, ops: Any, ws: Workspace, *, training: bool = False) -> None:
        """h_l = phi_l(h_{l-1} W_l + b_l) for l = 1 ... L, then h_L W_o; b_o is added where o is next read."""
        *hidden, output = ws.parameters
        for number, (layer, a) in enumerate(zip(hidden, ws.layers, strict=False)):
            # z_l = h_{l-1} W_l
            ops.matmul(a.h_in, layer.W, out=a.z)
            # h_l = phi_l(z_l + b_l)
            ops.bias_activation_forward(a.z, layer.b, layer.activation, out=a.h)
            if training and self.dropout:
                ops.dropout(
                    a.h, self.dropout, self.seed, number, self._counters, out=a.dropped,
                    first_block=ws.first * a.h.shape[1] // 4,
                )  # fmt: skip
        # o = h_L W_o
        ops.matmul(ws.layers[-1].h_in, output.W, out=ws.o)

    def loss_pass(self, ops: Any, ws: Workspace, *, training: bool = False) -> None:
        """loss = ell(o + b_o, y), do = d loss / d o and db_o = sum over rows of do, in one pass over the outputs."""
        weight, total = ws.weight, None
        if weight is not None and self.loss.reduction == "mean":
            weight, total = ws.normalized, ws.total
            if ws.samples is None:  # else it is one part of a mini-batch, and the mean is over all of it
                ops.normalize_weights(ws.weight, out=weight, total=total)
        output = ws.parameters[-1]
        scalars = self._scalars if training and self.loss_scaling else None  # do in float16 is scaled against underflow
        ops.bias_loss(
            ws.o, output.b, ws.y, self.loss, weight, out=ws.do, db=output.db, value=ws.value, scalars=scalars,
            samples=ws.samples, total=total,
        )  # fmt: skip

    def backward_pass(self, ops: Any, ws: Workspace, *, training: bool = False) -> None:
        """dW_o, then for l = L ... 1: dh_l, delta_l, db_l, dW_l; do and db_o are there already."""
        for i in reversed(range(len(ws.layers))):
            layer, a = ws.parameters[i], ws.layers[i]
            # dW_l = h_{l-1}^T delta_l        (delta_o = do)
            ops.matmul(a.h_in_T, a.delta, out=layer.dW)
            if i == 0:
                return  # l = 1: terminate; nobody needs dh_0
            below, b = ws.parameters[i - 1], ws.layers[i - 1]
            # dh_{l-1} = delta_l W_l^T
            ops.matmul(a.delta, layer.W_T, out=b.ddropped)
            if training and self.dropout:
                ops.dropout(
                    b.ddropped, self.dropout, self.seed, i - 1, self._counters, out=b.dh,
                    first_block=ws.first * b.dh.shape[1] // 4,
                )  # fmt: skip
            # delta_{l-1} = dh_{l-1} * phi'(z_{l-1}),  db_{l-1} = sum over rows of delta_{l-1}
            ops.bias_activation_backward(b.dh, b.z, b.h, below.activation, out=b.delta, db=below.db)

    def update_pass(self, ops: Any, n: int, state: OptimizerState) -> None:
        """theta <- theta - eta * gradient, and the other optimizers, over all parameters at once."""
        clip_norm, _ = state.optimizer.clipping
        theta, gradient, scaling = self._named_parameters, self._named_gradients, self.loss_scaling
        if clip_norm is not None or scaling:
            ops.clip(gradient, float("inf") if clip_norm is None else clip_norm, state.scalars, scaling)
        ops.advance(state.optimizer, state.rate, n, state.counters, state.scalars, scaling)
        ops.update(state.optimizer, theta, gradient, state.states, state.scalars, self._named_weights)

    def _loss_and_gradients(self, ws: Workspace) -> None:
        self.forward_pass(self._ops, ws)
        self.loss_pass(self._ops, ws)
        self.backward_pass(self._ops, ws)

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
        inputs: Inputs | None = None,
        workspace: Workspace | None = None,
    ) -> Step:
        """Return one training step as data: the list of its operations.

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
            Give every intermediate memory of its own.
        micro_batch_size : int or "auto", optional
            Go through the passes with so many samples at a time, and add up their gradients in order: the update is that of
            the whole mini-batch up to rounding, and the workspace is that of a micro-batch. "auto": the fewest micro-batches
            that fit into the free memory of the device.
        inputs : Inputs, optional
            Where the caller puts the mini-batch.
        workspace : Workspace, optional
            Use the memory of one that is as large or larger.

        Raises
        ------
        ValueError
            A size is no whole number >= 1, or micro-batches would not have the dropout masks of the mini-batch.
        DeviceMemoryError
            The step does not fit; nothing has changed, and a smaller batch may be tried.
        """
        n = check_count("batch_size", batch_size)
        self.check_not_held("step")  # it writes to the gradients
        indices = self.loss.targets == "classes" and (data.y.ndim == 1 if data else class_indices)
        weighted = weighted if data is None else data.weight is not None
        optimizer = None if optimizer is None else optimizer_of(optimizer)
        placed = inputs is not None or workspace is not None  # by a caller that has seen to the memory

        def parts(n: int, m: int) -> dict[str, int]:
            if placed:
                return {}
            return step_parts(self, n, m, indices=indices, weighted=weighted, optimizer=optimizer, keep=keep)

        m = fit_into_memory(self, f"a step with batch_size={n}", n, micro_batch_size, parts)
        if m < n and m % self.micro_batch_multiple:
            raise ValueError(
                f"micro_batch_size is {m}; with dropout it must be a multiple of 4, so that the masks are the mini-batch's"
            )
        self.refresh()
        inputs = self.inputs(n, indices, weighted) if inputs is None else inputs
        ws = self.workspace(inputs.rows(0, m), keep=keep) if workspace is None else workspace.part(inputs.rows(0, m))
        if m < n:
            self._sums = self._sums or self.new_sums(self.backend)
        state = None if optimizer is None else self.state_of(optimizer)  # last: it may forget an older state
        names = Names()
        names.update(self._names)
        names.update(inputs.names)
        recorder = Recorder(names)
        recorder.phase = "input"
        if data is not None:
            assert state is not None
            order = names("order", data.order)
            recorder.gather(names("X_all", data.X), order, self._counters, out=inputs.X)
            recorder.gather(names("y_all", data.y), order, self._counters, out=inputs.y)
            if data.weight is not None:
                recorder.gather(names("w_all", data.weight), order, self._counters, out=inputs.weight)
        if m == n:
            names.update(ws.names)
            self._record(recorder, ws, state)
        else:
            self._record_in_parts(recorder, ws, inputs, m, state)
        if state is not None:
            recorder.phase = "update"
            named = replace(state, states=names("states", state.states), rate=names("η_0", state.rate))
            self.update_pass(recorder, n, named)
        return Step(self.backend, recorder.operations, names, keep)

    def forward_step(self, ws: Workspace) -> Step:
        """Return the forward pass over a workspace's X as data; it ends with o, bias included."""
        names = Names()
        for some in (self._names, ws.names):
            names.update(some)
        recorder = Recorder(names)
        self.forward_pass(recorder, ws)
        recorder.bias_activation_forward(ws.o, ws.parameters[-1].b, identity, out=ws.o)
        return Step(self.backend, recorder.operations, names)

    def _record(self, recorder: Recorder, ws: Workspace, state: OptimizerState | None) -> None:
        recorder.phase = "forward"
        self.forward_pass(recorder, ws, training=True)
        recorder.phase = "loss"
        self.loss_pass(recorder, ws, training=state is not None)
        recorder.phase = "backward"
        self.backward_pass(recorder, ws, training=True)

    def _record_in_parts(
        self, recorder: Recorder, ws: Workspace, inputs: Inputs, m: int, state: OptimizerState | None
    ) -> None:
        """Record the passes over m samples at a time; loss and gradients are added up in this order."""
        n, names = inputs.n, recorder.names
        if inputs.weight is not None and self.loss.reduction == "mean":
            recorder.normalize_weights(inputs.weight, out=inputs.normalized, total=inputs.total)
        loss, gradient = names("loss[0]", ws.value[:1]), self._named_gradients
        assert self._sums is not None
        sums = names("Σ∇", self._sums[0]), names("Σloss", self._sums[1])
        for first in range(0, n, m):
            part = ws.part(inputs.rows(first, min(m, n - first)), n, first)
            names.update(part.names)
            self._record(recorder, part, state)
            for total, term in zip(sums, (gradient, loss), strict=True):
                recorder.accumulate(None if first == 0 else total, term, out=term if first + m >= n else total)

    @property
    def micro_batch_multiple(self) -> int:
        """A micro-batch that is a multiple of it begins where a block of four random numbers does, in every hidden layer."""
        hidden = self.layer_sizes[1:-1] if self.dropout else ()
        return next(k for k in (1, 2, 4) if all(k * d % 4 == 0 for d in hidden))

    def takes_indices(self, y: Array) -> bool:
        """Return whether targets are class indices, not a row of numbers per sample."""
        return self.loss.targets == "classes" and (y.ndim == 1 or (y.ndim == 2 and y.shape[1] == 1))

    def make_room(self, wanted: int) -> None:
        """Let go of the workspaces of eager passes, the oldest first, until so many bytes may be allocated."""
        while self._workspaces and not fits(self.backend, wanted):
            self._workspaces.forget_oldest()
            self._lent.forget_oldest()

    # Each of these allocates from the network's backend, or, to be counted, from another.

    def inputs(self, n: int, class_indices: bool, weighted: bool, backend: Any = None) -> Inputs:
        """Return memory for a mini-batch of n samples."""
        y = ((n,), np.dtype(np.int64)) if class_indices else ((n, self.layer_sizes[-1]), self.real)
        X = ((n, self.layer_sizes[0]), self.dtype)
        return Inputs(backend or self.backend, X, y, self.real, weighted=weighted)

    def workspace(self, inputs: Inputs, *, keep: bool = False, backend: Any = None) -> Workspace:
        """Return the memory of a training step that reads ``inputs``."""
        return Workspace(backend or self.backend, self.layers, inputs, dropout=self.dropout, keep=keep)

    def new_sums(self, backend: Any) -> tuple[Array, Array] | None:
        """Return memory for the sums of gradients and losses over micro-batches, or None if it is there."""
        if self._sums is not None:
            return None
        return backend.zeros(self.gradients.flat.shape, self.real), backend.zeros((1,), np.dtype(np.float64))

    def new_state(self, optimizer: Optimizer, backend: Any) -> tuple[Array, Array] | None:
        """Return memory for an optimizer's states and learning rate, or None if they are there."""
        if self._optimizer_state is not None and self._optimizer_state.optimizer == optimizer:
            return None
        states = backend.zeros((optimizer.n_states, self.parameters.flat.size), self.real)
        return states, backend.zeros((1,), np.dtype(np.float64))

    def state_of(self, optimizer: str | Optimizer) -> OptimizerState:
        """Return the optimizer's arrays: those of the last ``fit`` if it had an equal optimizer, else new ones."""
        optimizer, hold = optimizer_of(optimizer), self._hold
        self.check_not_held("state_of")
        new = self.new_state(optimizer, self.backend)  # first, since there may be no memory for it
        if new is not None:
            if hold is not None and hold.has_state:
                raise RuntimeError(
                    "another optimizer would forget the state of the fit that runs; wait until that is over"
                )
            states, rate = new
            rate[0] = optimizer.schedule.learning_rate
            self._counters[...] = 0
            scalars = self._scalars
            scalars[...] = 0
            scalars[FACTOR] = 1
            scalars[SCALE] = FIRST_SCALE if self.loss_scaling else 1
            self._optimizer_state = OptimizerState(optimizer, states, self._counters, rate, scalars)
        if hold is not None:
            hold.has_state = True
        assert self._optimizer_state is not None
        return self._optimizer_state


def optimizer_of(optimizer: str | Optimizer) -> Optimizer:
    """Return an optimizer, or the one of a name with its own defaults."""
    if isinstance(optimizer, str):
        return OPTIMIZERS.resolve(optimizer)()
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer is {optimizer!r}; give a name or an optimizer, as in Adam(1e-3)")
    return optimizer
