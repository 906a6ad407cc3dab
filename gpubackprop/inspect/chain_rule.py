"""The chain rule of calculus, with numbers of a network: for numbers along one path, and for vectors through one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gpubackprop.definitions import Array
from gpubackprop.inspect.gradcheck import STEPS, forward_with, gradient_step
from gpubackprop.inspect.notation import Notation
from gpubackprop.inspect.page import Arrays, Formula, Page, Table, Words, number
from gpubackprop.inspect.walk import Walk

E = 1e-5
"""By how much a number is changed for finite differences, relative to it where it is larger than 1."""
MOST_INPUTS = 64
"""Columns of a Jacobian that are formed by finite differences."""


def relative(a: Array, b: Array) -> float:
    """Return the largest difference relative to the largest number."""
    scale = max(float(np.abs(a).max()), float(np.abs(b).max()))
    return float(np.abs(a - b).max()) / scale if scale else 0.0


@dataclass(frozen=True)
class Path:
    """One path of the network in one sample: from the weight p = W[i, j] through unit j to an output of the layer above.

    Without a hidden layer it ends at the unit, which is the output, and the loss takes the place of the output.
    """

    walk: Walk

    @property
    def layer(self) -> int:
        """The outermost hidden layer, or the output layer where there is none."""
        return max(self.walk.L, 1)

    @cached_property
    def name(self) -> str:
        """Of the layer's arrays."""
        return str(self.layer) if self.walk.L else "o"

    @cached_property
    def h_in(self) -> Array:
        """What comes into the layer, for all samples."""
        return self.walk.arrays[f"h_{self.layer - 1}" if self.layer > 1 else "X"]

    @cached_property
    def slope(self) -> Array:
        """phi'(z) of the layer, for all samples; 1 of an output layer."""
        w = self.walk
        shape = w.arrays["o" if w.L == 0 else f"z_{self.layer}"].shape
        return np.broadcast_to(w.activations[-1].dphi(w.arrays[f"z_{self.layer}"]) if w.L else 1.0, shape)

    @cached_property
    def last(self) -> Array:
        """ds/dr of each unit: the weights to the first output; or do where there is no hidden layer."""
        w = self.walk
        return np.broadcast_to(w.arrays["W_o"][:, 0], self.slope.shape) if w.L else w.arrays["do"]

    @cached_property
    def place(self) -> tuple[int, int, int]:
        """(sample, i, j): where the product of the three derivatives is largest, since a unit may be dead in a sample."""
        through = np.abs(self.slope * self.last)
        sample = int(through.max(axis=1).argmax())
        i, j = np.unravel_index(np.abs(np.outer(self.h_in[sample], through[sample])).argmax(), self.weights.shape)
        return sample, int(i), int(j)

    @property
    def weights(self) -> Array:
        """W of the layer."""
        return self.walk.arrays[f"W_{self.name}"]

    @property
    def e(self) -> float:
        """By how much p is changed for finite differences."""
        return E * max(1.0, abs(float(self.weights[self.place[1:]])))

    def difference(self) -> float:
        """Return ds/dp by finite differences, of forward phases with p + e and p - e."""
        w, (sample, i, j) = self.walk, self.place
        step, run = gradient_step(w.network, w.arrays["X"], w.arrays["y"])
        change = np.zeros_like(self.weights)
        change[i, j] = self.e
        ends = []
        for sign in (1, -1):
            forward_with(step, run, f"W_{self.name}", sign * change)
            ends.append(step.names.array("o")[sample, 0] if w.L else step.names.array("loss")[0])
        return float(ends[0] - ends[1]) / (2 * self.e)


def scalar_chain_rule(page: Page, walk: Walk, notation: Notation) -> bool:
    """Write the part on the chain rule for numbers; returns whether the derivative agrees with finite differences."""
    path = Path(walk)
    sample = path.place[0]
    if not walk.L:
        path = Path(_alone(walk, sample))
    factors, rows = _path_with_hidden(path, notation) if walk.L else _path_without_hidden(path)
    if walk.L:
        count, rule = "Three", "ds/dp = ds/dr dr/dq dq/dp"
        where = f"from a weight p through unit {path.place[2] + 1} of hidden layer {walk.L} to the output s."
    else:
        count, rule = "Two", "ds/dp = ds/dq dq/dp"
        where = f"from a weight p through output {path.place[2] + 1} to its loss s; there is no hidden layer."
    product, difference = float(np.prod(factors)), path.difference()
    error = relative(np.array(product), np.array(difference))
    page.part(
        "The chain rule of calculus",
        Words(f"{count} functions chained, along one path of the network in sample {sample + 1}: {where}"),
        Table([(left, right, number(value)) for left, right, value in rows], "<<>", (22, 44, 10), header=False),
        Formula(f"{rule} = {' · '.join(number(factor) for factor in factors)} = {number(product)}"),
        Formula(
            f"(s(p + e) − s(p − e)) / 2e, with e = {_power(path.e)}, gives {number(difference)}", walk.verdict(error)
        ),
        Words(
            "As simple as that. ✓ says that a derivative agrees with finite differences; the number is the relative error."
        ),
    )
    if not product:
        page.add(
            Words(
                "Every path of this batch is dead: φ′ is 0 in each unit of the outermost hidden layer, and so is its gradient."
            )
        )
    return error <= walk.tolerance


Rows = list[tuple[str, str, float]]


def _path_with_hidden(path: Path, notation: Notation) -> tuple[list[float], Rows]:
    """Return ds/dr, dr/dq, dq/dp, and the rows of the table."""
    walk, a, (sample, i, j) = path.walk, path.walk.arrays, path.place
    l, phi = path.layer, path.walk.activations[-1].label
    above, slope, h_in = path.last[sample, j], path.slope[sample, j], path.h_in[sample, i]
    head = f"{notation.x[l - 1]}[{i + 1}]"
    return [above, slope, h_in], [
        ("p", f"W_{l}[{i + 1},{j + 1}]", path.weights[i, j]),
        ("q = f(p)", f"z_{l}[{j + 1}] = {head} p + what p does not change", a[f"z_{l}"][sample, j]),
        ("r = g(q) = g(f(p))", f"h_{l}[{j + 1}] = {phi}(q)", a[f"h_{l}"][sample, j]),
        ("s = h(r) = h(g(f(p)))", f"o[1] = W_o[{j + 1},1] r + what r does not change", walk.arrays["o"][sample, 0]),
        ("dq/dp", head, h_in),
        ("dr/dq", f"{phi}′(q)", slope),
        ("ds/dr", f"W_o[{j + 1},1]", above),
    ]


def _path_without_hidden(path: Path) -> tuple[list[float], Rows]:
    """Return ds/dq, dq/dp, and the rows of the table."""
    walk, (sample, i, j) = path.walk, path.place
    above, h_in = path.last[sample, j], path.h_in[sample, i]
    return [above, h_in], [
        ("p", f"W_o[{i + 1},{j + 1}]", path.weights[i, j]),
        ("q = f(p)", f"o[{j + 1}] = x[{i + 1}] p + what p does not change", walk.arrays["o"][sample, j]),
        ("s = h(q) = h(f(p))", "ℓ(o,y) of this sample", walk.loss),
        ("dq/dp", f"x[{i + 1}]", h_in),
        ("ds/dq", f"∂ℓ/∂o[{j + 1}]", above),
    ]


def _alone(walk: Walk, sample: int) -> Walk:
    """Return the walk of one sample: a weight changes the outputs, and so the losses, of all others too."""
    X, y = (walk.arrays[name][sample : sample + 1] for name in ("X", "y"))
    step, run = gradient_step(walk.network, X, y)
    for operation in step.operations:
        run(operation)
    return replace(walk, arrays={name: step.names.array(name).copy() for name in step.buffers})


def vector_chain_rule(page: Page, walk: Walk, notation: Notation) -> bool:
    """Write the part on the chain rule for vectors; returns whether the gradient agrees with finite differences."""
    path, a = Path(walk), walk.arrays
    sample, l, W = path.place[0], path.layer, path.weights
    x, (d_in, d) = notation.x[l - 1], W.shape
    hidden = walk.L > 0
    above = a[f"dh_{l}" if hidden else "do"][sample]  # ∇r
    jacobian = path.slope[sample][:, None] * W.T  # ∂r/∂p
    gradient = W @ a[f"delta_{l}" if hidden else "do"][sample]  # ∇p, for which nobody forms the Jacobian
    largest = np.argsort(-np.abs(gradient), kind="stable")[:MOST_INPUTS]
    scale = float(np.abs(path.h_in[sample]).max()) or 1.0
    error = min(relative(_columns(walk, path, largest, e * scale).T @ above, gradient[largest]) for e in STEPS)
    r = "r" if hidden else "q"
    k = int(largest[0])
    order = np.argsort(-np.abs(above * jacobian[:, k]), kind="stable")[:2]
    terms = " + ".join(f"({number(above[t], 4)})({number(jacobian[t, k], 4)})" for t in order)
    more = f" + {d - 2} smaller term{'s' * (d > 3)}" if d > 2 else ""
    of = "" if len(largest) == d_in else f", for the {MOST_INPUTS} largest entries"
    q = f"q = z_{path.name} and r = h_{path.name}" if hidden else "q = o"
    page.part(
        "The chain rule for vectors",
        Words(f"Now p = {x} in R^{d_in}, {q} in R^{d}, s = ℓ. A change of p_i reaches s through every {r}_j:"),
        Formula(f"∂s/∂p_i = Σ_j ∂s/∂{r}_j ∂{r}_j/∂p_i,   and all i at once:   ∇p = (∂{r}/∂p)ᵀ ∇{r}"),
        Formula(f"∂s/∂p_{k + 1} = {terms}{more} = {number(gradient[k])} in sample {sample + 1}"),
        Formula(f"(∂{r}/∂p)ᵀ ∇{r}, with ∂{r}/∂p by finite differences{of}", walk.verdict(error)),
        Arrays({f"(∂{r}/∂p)ᵀ": jacobian.T, f"∇{r}": above[:, None], "∇p": gradient[:, None]}),
        Words("Jacobian transposed times vector, a vector-Jacobian product, is all that backpropagation does; the Jacobian itself, "
              f"large and mostly zero, is never formed. For one sample in {f'layer {l}' if hidden else 'the output layer'}:"),
        Table([
            ("function", "Jacobian J", "numbers in J", "Jᵀ v", "multiplications"),
            *[(f"h = {phi}(z)", f"diag({phi}′(z))", f"{d}×{d}", f"{phi}′(z) ⊙ v", f"{d:,}") for phi in notation.phi[-1:] if phi],
            ("Wᵀp + b of p", "Wᵀ", f"{d}×{d_in}", "W v", f"{d_in * d:,}"),
            ("Wᵀp + b of W", "p in every row", f"{d}×{d_in * d}", "p vᵀ", f"{d_in * d:,}"),
            ("Wᵀp + b of b", "identity", f"{d}×{d}", "v", "0"),
        ], "<<><>", (16, 16, 14, 12, 18)),
    )  # fmt: skip
    return error <= walk.tolerance


def _columns(walk: Walk, path: Path, inputs: Array, e: float) -> Array:
    """Return those columns of dr/dp by finite differences: one pass through the layer, of a row for each changed input."""
    h_in, backend = path.h_in[path.place[0]], walk.network.backend
    ends = []
    for sign in (1, -1):
        rows = np.repeat(h_in[None], len(inputs), axis=0)
        rows[np.arange(len(inputs)), inputs] += sign * e
        z, b = backend.matmul(rows, path.weights), walk.arrays[f"b_{path.name}"]
        ends.append(backend.bias_activation_forward(z, b, walk.activations[-1]) if walk.L else z + b)
    return (ends[0] - ends[1]).T / (2 * e)


def _power(e: float) -> str:
    """Return a small number as 1e-5."""
    return f"{e:.0e}".replace("e-0", "e-")
