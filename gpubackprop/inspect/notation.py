"""The equations of a network in two notations side by side: the text's, samples as columns, and ours, samples as rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gpubackprop.activations import Activation
from gpubackprop.inspect.walk import Walk
from gpubackprop.losses import Loss

DERIVATIVES = {  # phi' in words, of activations with default parameters
    "identity": "1",
    "relu": "1 where z > 0, else 0",
    "leaky_relu": "1 where z > 0, else 0.01",
    "elu": "1 where z > 0, else h + 1",
    "sigmoid": "h (1 − h)",
    "tanh": "1 − h²",
    "softplus": "1 − e^(−h)",
    "softsign": "1 / (1 + |z|)²",
    "sin": "cos(z)",
}
ELEMENTWISE = {  # ell and its derivative with respect to one output
    "mean_squared_error": ("(o − y)²", "2 (o − y)"),
    "mean_absolute_error": ("|o − y|", "sign(o − y)"),
    "huber": ("huber(o − y)", "clip(o − y, ±δ)"),
    "sigmoid_cross_entropy": ("log(1 + e^o) − o y", "(sigmoid(o) − y)"),
    "poisson": ("e^o − o y", "(e^o − y)"),
    "hinge": ("max(0, 1 − o y)", "(−y where o y < 1, else 0)"),
}


class Equation(NamedTuple):
    """A gradient: the text's equation, ours, the shapes in ours, and its FLOP."""

    text: str
    ours: str
    shapes: str
    flops: int


class Notation:
    """Symbols and equations of a network; layers count from 1, and the output layer is L + 1.

    Attributes
    ----------
    layer : list of str
        "1", ..., "o"; the input layer, which has no parameters, is "".
    x, X : list of str
        What comes out of each layer, for one sample and for all: x, h_1, ..., o.
    delta : list of str
        Gradients with respect to z_l; of the output layer do.
    phi : list of str
        "φ" where all hidden layers have the same, else "φ_l".
    """

    def __init__(self, walk: Walk) -> None:
        self.n, self.sizes, L = walk.n, walk.sizes, walk.L
        hidden = [str(l) for l in range(1, L + 1)]
        self.layer = ["", *hidden, "o"]
        self.x = ["x", *(f"h_{l}" for l in hidden), "o"]
        self.X = ["X", *self.x[1:]]
        self.delta = ["", *(f"δ_{l}" for l in hidden), "do"]
        same = len(set(walk.activations)) == 1
        self.phi = ["", *("φ" if same else f"φ_{l}" for l in hidden)]
        self.loss, self.dloss = loss_in_words(walk.network.loss, walk.arrays["y"])
        self.equations = {"do": Equation("∇o = ∂ℓ(o,y)/∂o", f"do = {self.dloss}", self._rows(L + 1), self._size(L + 1))}
        for l in range(L + 1, 0, -1):
            self.equations |= self._of_layer(l)

    def _rows(self, l: int) -> str:
        return f"{self.n}×{self.sizes[l]}"

    def _size(self, l: int) -> int:
        return self.n * self.sizes[l]

    def _of_layer(self, l: int) -> dict[str, Equation]:
        """Return the gradients of the parameters of layer l, and of its input if that is a hidden layer's output."""
        n, d_in, d, m, x, delta = self.n, self.sizes[l - 1], self.sizes[l], self.layer[l], self.x[l], self.delta[l]
        rows, below, k = self._rows(l), self._rows(l - 1), self.layer[l - 1]
        found = {
            f"dW_{m}": Equation(f"∇W_{m} = (∂{x}/∂W_{m})ᵀ ∇{x}", f"dW_{m} = {self.X[l - 1]}ᵀ {delta}",
                                f"{d_in}×{d} = {d_in}×{n} · {rows}", 2 * n * d_in * d),
            f"db_{m}": Equation(f"∇b_{m} = (∂{x}/∂b_{m})ᵀ ∇{x}", f"db_{m} = Σ_rows {delta}", f"{d} = Σ {rows}", n * d),
        }  # fmt: skip
        if l > 1:
            found[f"dh_{k}"] = Equation(
                f"∇h_{k} = (∂{x}/∂h_{k})ᵀ ∇{x}",
                f"dh_{k} = {delta} W_{m}ᵀ",
                f"{below} = {rows} · {d}×{d_in}",
                2 * n * d_in * d,
            )
            found[f"delta_{k}"] = Equation(
                f"∇z_{k} = (∂h_{k}/∂z_{k})ᵀ ∇h_{k}", f"δ_{k} = dh_{k} ⊙ {self.phi[l - 1]}′(z_{k})", f"{below} = {below} ⊙ {below}",
                2 * n * d_in,
            )  # fmt: skip
        return found

    def output(self, l: int) -> tuple[str, str]:
        """Return the equation of what comes out of layer l."""
        x, X, m, last = self.x[l - 1], self.X[l - 1], self.layer[l], len(self.sizes) - 1
        if l == last:
            return f"o = W_oᵀ {x} + b_o", f"o = {X} W_o + b_o"
        phi = self.phi[l]
        return f"h_{m} = {phi}(W_{m}ᵀ {x} + b_{m})", f"z_{m} = {X} W_{m} + b_{m},  h_{m} = {phi}(z_{m})"

    def output_flops(self, l: int) -> int:
        """Return the FLOP of a layer's forward step: product, bias, activation."""
        return self._size(l) * (2 * self.sizes[l - 1] + 1 + (l < len(self.sizes) - 1))

    @property
    def loss_flops(self) -> int:
        """FLOP of the loss."""
        return 2 * self._size(-1)

    @property
    def forward_flops(self) -> int:
        """FLOP of the forward phase."""
        return sum(self.output_flops(l) for l in range(1, len(self.sizes))) + self.loss_flops

    @property
    def backward_flops(self) -> int:
        """FLOP of the backward phase."""
        return sum(equation.flops for equation in self.equations.values())


def derivative_in_words(activation: Activation) -> str:
    """Return phi' as a formula of z or h, or nothing if there is no short one."""
    return "" if activation.parameters else DERIVATIVES.get(activation.name, "")


def loss_in_words(loss: Loss, y: np.ndarray) -> tuple[str, str]:
    """Return the loss and its gradient with respect to the outputs."""
    joined, over_samples = ("mean", " / n") if loss.reduction == "mean" else ("sum", "")
    if loss.family == "elementwise":
        ell, dell = ELEMENTWISE.get(loss.name, (loss.name, f"{loss.name}′(o, y)"))
        return f"{joined} of {ell}", dell + (" / (n d_o)" if over_samples else "")
    if loss.parameters or loss.name not in ("softmax_cross_entropy", "kl_divergence"):
        return f"{joined} of {loss.label}", "∂ℓ/∂o of each sample" + over_samples
    target = "onehot(y)" if y.ndim == 1 else "y"
    ell = "−log softmax(o)_y" if y.ndim == 1 else "Σ_j y_j log(y_j / softmax(o)_j)"
    if loss.name == "softmax_cross_entropy" and y.ndim == 2:
        ell = "−Σ_j y_j log softmax(o)_j"
    return f"{joined} of {ell}", f"(softmax(o) − {target})" + over_samples


def times(shape: tuple[int, ...]) -> str:
    """Return a shape in words."""
    return "×".join(map(str, shape))
