"""The passes of backpropagation and the update, in the order of the mathematics.

Each is a function of the buffers of a network and a tape, which collects operations: ``tape.matmul(a, b, out=c)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpubackprop.activations import identity
from gpubackprop.step import layout as buffers
from gpubackprop.step.buffers import Buffer
from gpubackprop.step.layout import Fixed, Inputs, Layout
from gpubackprop.step.operations import OPERATIONS, Operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpubackprop.architecture import Architecture
    from gpubackprop.optimizers import Optimizer


class Tape:
    """Collects operations; it has a method for each, with the operation's arguments."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.phase = ""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in OPERATIONS:
            raise AttributeError(f"there is no operation {name!r}; there are {', '.join(OPERATIONS)}")
        kind = OPERATIONS[name]

        def add(*arguments: Any, **named: Any) -> None:
            self.operations.append(kind(*arguments, **named, phase=self.phase))

        return add


def forward(layout: Layout, tape: Tape) -> None:
    """h_l = phi_l(h_{l-1} W_l + b_l) for l = 1 ... L, then h_L W_o; b_o is added where o is next read."""
    tape.phase = "forward"
    *hidden, output = layout.layers
    for layer in hidden:
        # z_l = h_{l-1} W_l
        tape.matmul(layer.h_in, layer.W, out=layer.z)
        # h_l = phi_l(z_l + b_l)
        tape.bias_activation_forward(layer.z, layer.b, layer.activation, out=layer.h)
        if layer.mask is not None:
            *mask, first_block = layer.mask
            tape.dropout(layer.h, *mask, out=layer.dropped, first_block=first_block)
    # o = h_L W_o
    tape.matmul(output.h_in, output.W, out=output.z)


def output_bias(layout: Layout, tape: Tape) -> None:
    """o <- o + b_o, where the outputs themselves are wanted."""
    output = layout.layers[-1]
    tape.bias_activation_forward(output.z, output.b, identity, out=output.z)


def loss(
    architecture: Architecture, layout: Layout, tape: Tape, *, scalars: Buffer | None = None, samples: int | None = None
) -> None:
    """loss = ell(o + b_o, y), do = d loss / d o and db_o = sum over rows of do, in one pass over the outputs.

    ``scalars`` hold the loss scale; ``samples`` is the size of the mini-batch where these rows are part of one.
    """
    tape.phase = "loss"
    given, output = layout.inputs, layout.layers[-1]
    weight, total = given.weight, None
    if weight is not None and architecture.loss.reduction == "mean":
        weight, total = given.normalized, given.total
        if samples is None:  # else part of a mini-batch, and the mean is over all of it
            tape.normalize_weights(given.weight, out=weight, total=total)
    tape.bias_loss(
        output.z, output.b, given.y, architecture.loss, weight, out=output.delta, db=output.db, value=layout.value,
        scalars=scalars, samples=samples, total=total,
    )  # fmt: skip


def backward(layout: Layout, tape: Tape) -> None:
    """dW_o, then for l = L ... 1: dh_l, delta_l, db_l, dW_l; do and db_o are computed already."""
    tape.phase = "backward"
    for below, layer in reversed(list(zip([None, *layout.layers], layout.layers, strict=False))):
        # dW_l = h_{l-1}^T delta_l        (delta_o = do)
        tape.matmul(layer.h_in.T, layer.delta, out=layer.dW)
        if below is None:
            return  # l = 1: terminate; dh_0 is not needed
        # dh_{l-1} = delta_l W_l^T
        tape.matmul(layer.delta, layer.W.T, out=below.ddropped)
        if below.mask is not None:
            *mask, first_block = below.mask
            tape.dropout(below.ddropped, *mask, out=below.dh, first_block=first_block)
        # delta_{l-1} = dh_{l-1} * phi'(z_{l-1}),  db_{l-1} = sum over rows of delta_{l-1}
        tape.bias_activation_backward(below.dh, below.z, below.h, below.activation, out=below.delta, db=below.db)


def update(architecture: Architecture, optimizer: Optimizer, n: int, tape: Tape) -> None:
    """theta <- theta - eta * gradient, and the other optimizers, over all parameters at once."""
    tape.phase = "update"
    a, scaling = buffers.fixed(architecture), architecture.loss_scaling
    states, rate = buffers.state(architecture, optimizer)
    clip_norm, _ = optimizer.clipping
    if clip_norm is not None or scaling:
        tape.clip(a.gradients, float("inf") if clip_norm is None else clip_norm, a.scalars, scaling)
    tape.advance(optimizer, rate, n, a.counters, a.scalars, scaling)
    tape.update(optimizer, a.parameters, a.gradients, states, a.scalars, a.weights if a.mixed else None)


def gather(given: Inputs, rows: int, a: Fixed, tape: Tape) -> None:
    """X, y and w are the next rows of a data set of ``rows`` samples, in its order."""
    tape.phase = "input"
    order = Buffer("order", (rows,), buffers.INT64)
    for to in (given.X, given.y, given.weight):
        if to is not None:
            tape.gather(Buffer(f"{to.name}_all", (rows, *to.shape[1:]), to.dtype), order, a.counters, out=to)
