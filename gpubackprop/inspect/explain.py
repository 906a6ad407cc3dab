"""Backpropagation in a given network: the text with its numbers, and the step as it runs, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.architecture import Architecture
from gpubackprop.definitions import check_count, check_seed
from gpubackprop.inspect.gradcheck import GradientCheck, gradients_of
from gpubackprop.losses import Loss
from gpubackprop.network import Network
from gpubackprop.step import Step
from gpubackprop.step.operations import Operation

if TYPE_CHECKING:
    from gpubackprop.inspect.page import Page
    from gpubackprop.inspect.walk import Walk
    from gpubackprop.mlp import MLP

PHASES = {
    "input": "INPUT",
    "forward": "FORWARD PHASE: from the input to the output; b_o is added where o is next read",
    "loss": "LOSS, its gradient with respect to the output, and that of b_o",
    "backward": "BACKWARD PHASE: from the output to the input",
    "update": "UPDATE",
}


@dataclass(frozen=True)
class ExplainedOperation:
    """One operation of the step, with the checks of the gradients it computes."""

    number: int
    operation: Operation
    shapes: tuple[str, ...]
    needs: tuple[str, ...]
    checks: tuple[GradientCheck, ...]


@dataclass(frozen=True)
class Explanation:
    """What :func:`gpubackprop.explain` returns: ``print`` it, or ``print(explanation.fused())``.

    Attributes
    ----------
    title : str
    page : Page
        The text on backpropagation, with the equations and numbers of the network.
    operations : list of ExplainedOperation
        Those of the fused step.
    step : Step
    tolerance : float
    ok : bool
        Every derivative agrees with finite differences.
    """

    title: str
    page: Page
    operations: list[ExplainedOperation]
    step: Step
    tolerance: float
    ok: bool

    def __str__(self) -> str:
        return self.text()

    def text(self, *, values: bool = False) -> str:
        """Return the page as plain text, with ``values`` also the arrays."""
        return self.page.plain(values=values)

    def html(self, *, values: bool = False) -> str:
        """Return the page as one HTML file without scripts; the arrays can be unfolded."""
        from gpubackprop.inspect.html import html

        return html(self.page, values=values)

    def latex(self, *, values: bool = False) -> str:
        """Return the page as a LaTeX document."""
        from gpubackprop.inspect.latex import document

        return document(self.page, values=values)

    def fused(self) -> str:
        """Return the operations of the step as it runs: what is fused, its shapes, FLOP, what it needs, and the checks."""
        lines = [self.title]
        phase = ""
        for e in self.operations:
            if e.operation.phase != phase:
                phase = e.operation.phase
                lines += ["", PHASES[phase]]
            first, *rest = e.operation.equation.split(";  ")
            lines.append(f"{e.number:3d}. {first}")
            lines += [f"     {equation}" for equation in rest]
            lines.append(f"       {',  '.join(e.shapes)}")
            lines.append(f"       {e.operation.flops:,} FLOP;  needs {', '.join(e.needs) or 'nothing computed before'}")
            for check in e.checks:
                verdict = "agrees with" if check.error <= self.tolerance else "DIFFERS FROM"
                lines.append(
                    f"       {self.step.buffers[check.name]} {verdict} finite differences: relative error {check.error:.1e}"
                )
        lines += [
            "",
            f"one step: {self.step.flops:,} FLOP, {self.step.bytes:,} bytes, {len(self.operations)} operations",
        ]
        return "\n".join(lines)


def explain(
    network: MLP | Sequence[int],
    X: Any = None,
    y: Any = None,
    *,
    activation: str = "relu",
    loss: str | Loss = "softmax_cross_entropy",
    batch_size: int = 5,
    seed: int = 0,
    tolerance: float = 1e-6,
) -> Explanation:
    """Follow the text on backpropagation through a network: one forward and one backward phase, each derivative checked on the way.

    Parameters
    ----------
    network : MLP or sequence of int
        A network, or layer sizes for a new one with ``activation`` and ``loss``.
    X, y : array, optional
        A mini-batch; random by default, of ``batch_size`` samples.
    tolerance : float
        Largest relative error of a gradient.

    Returns
    -------
    Explanation
        In float64, on the reference backend, for a network on any device.
    """
    from threadpoolctl import threadpool_limits  # not needed by `import gpubackprop`

    from gpubackprop.inspect.text import speak
    from gpubackprop.inspect.walk import walk

    rng = np.random.default_rng(check_seed(seed))
    batch_size = check_count("batch_size", batch_size)
    if isinstance(network, Sequence):
        architecture = Architecture(tuple(network), activation, loss, "float64", seed)  # type: ignore[arg-type]
        model = Network(architecture, "reference")
        for b in model.parameters.b:
            b[...] = rng.normal(size=b.shape) / 10  # zero biases would sit on the kink of relu
    else:
        model = network.network
    remarks = "dropout left out" if model.architecture.dropout else ""
    if X is None or y is None:
        X, y = random_batch(model.architecture, batch_size, rng)
        remarks = ", ".join(filter(None, (f"seed {seed}", remarks)))
    with threadpool_limits(limits=1):  # many small products: threads would only wait for each other
        walked = walk(model, X, y, rng, tolerance)
        page, ok = speak(walked, remarks)
    sizes = "-".join(map(str, model.layer_sizes))
    hidden = ", ".join(dict.fromkeys(a.label for a in model.architecture.activations)) or "no hidden layer"
    title = f"MLP {sizes} ({hidden}; {model.loss.label}), {walked.n} samples: rows are samples"
    return Explanation(title, page, _operations(walked), walked.step, tolerance, ok)


def _operations(walked: Walk) -> list[ExplainedOperation]:
    from gpubackprop.inspect.notation import times

    step, explained = walked.step, []
    for number, operation in enumerate(step.operations, 1):
        arrays = {
            str(buffer): buffer.shape for buffer in (*operation.read, *operation.written) if buffer.name != "loss"
        }
        shapes = tuple(f"{symbol} {times(shape)}" for symbol, shape in arrays.items())
        checks = tuple(walked.checks[name] for name in gradients_of(step, operation))
        needs = tuple(str(step.buffers[name]) for name in step.needs(operation))
        explained.append(ExplainedOperation(number, operation, shapes, needs, checks))
    return explained


def random_batch(model: MLP | Architecture, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return random inputs and targets that fit a network and its loss."""
    X = rng.normal(size=(n, model.layer_sizes[0]))
    return X, model.loss.kind.random(rng, n, model.layer_sizes[-1])
