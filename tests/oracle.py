"""Backpropagation as the equations read: one sample at a time, one number at a time, in plain Python.

It shares nothing with the package: neither its activations and losses nor its arrays. Weights are W[l][i][j], from unit i of
layer l to unit j of layer l + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Vector = list[float]
Matrix = list[list[float]]


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


ACTIVATIONS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "identity": (lambda z: z, lambda z: 1.0),
    "relu": (lambda z: z if z > 0 else 0.0, lambda z: 1.0 if z > 0 else 0.0),
    "tanh": (math.tanh, lambda z: 1.0 / math.cosh(z) ** 2),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z)),
    "softplus": (lambda z: math.log(1.0 + math.exp(z)), _sigmoid),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) + z * _sigmoid(z) * _sigmoid(-z)),
    "gelu": (
        lambda z: 0.5 * z * math.erfc(-z / math.sqrt(2)),
        lambda z: 0.5 * math.erfc(-z / math.sqrt(2)) + z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi),
    ),
}


def squared_error(o: Vector, t: Vector) -> tuple[float, Vector]:
    """Return the mean over the outputs of (o - t)^2, and its gradient."""
    d = len(o)
    return sum((o[j] - t[j]) ** 2 for j in range(d)) / d, [2.0 * (o[j] - t[j]) / d for j in range(d)]


def cross_entropy(o: Vector, label: int) -> tuple[float, Vector]:
    """Return -log softmax(o)[label], and its gradient softmax(o) - onehot(label)."""
    e = [math.exp(x) for x in o]
    p = [x / sum(e) for x in e]
    return -math.log(p[label]), [p[j] - (1.0 if j == label else 0.0) for j in range(len(o))]


LOSSES: dict[str, Callable[..., tuple[float, Vector]]] = {
    "mean_squared_error": squared_error,
    "softmax_cross_entropy": cross_entropy,
}


@dataclass
class Pass:
    """The mean loss over the samples, its gradients, and for every sample z_l, h_l, delta_l of every layer."""

    loss: float
    dW: list[Matrix]
    db: list[Vector]
    z: list[list[Vector]] = field(default_factory=list)
    h: list[list[Vector]] = field(default_factory=list)
    delta: list[list[Vector]] = field(default_factory=list)


def backpropagate(
    W: Sequence[Matrix], b: Sequence[Vector], activations: Sequence[str], loss: str, X: Sequence[Vector], y: Sequence
) -> Pass:
    """Return loss and gradients, by the forward and the backward phase for one sample after the other.

    Parameters
    ----------
    W, b : one per layer, the output layer last
    activations : names, one per hidden layer
    """
    n, depth = len(X), len(W)
    dW = [[[0.0] * len(row) for row in w] for w in W]
    db = [[0.0] * len(v) for v in b]
    result = Pass(0.0, dW, db)
    for x, target in zip(X, y, strict=True):
        # forward: z_l = W_l^T h_{l-1} + b_l, h_l = phi(z_l); the output layer is linear
        h = [list(x)]
        z = []
        for layer in range(depth):
            w = W[layer]
            z.append([b[layer][j] + sum(w[i][j] * h[-1][i] for i in range(len(w))) for j in range(len(b[layer]))])
            last = layer == depth - 1
            h.append(z[-1] if last else [ACTIVATIONS[activations[layer]][0](value) for value in z[-1]])
        value, do = LOSSES[loss](h[-1], target)
        result.loss += value / n
        # backward: the gradients with respect to z, from the output to the input
        delta = [do]
        for layer in range(depth - 1, 0, -1):
            w = W[layer]
            dh = [sum(w[i][j] * delta[0][j] for j in range(len(delta[0]))) for i in range(len(w))]
            dphi = ACTIVATIONS[activations[layer - 1]][1]
            delta.insert(0, [dh[i] * dphi(z[layer - 1][i]) for i in range(len(dh))])
        for layer in range(depth):
            for j, delta_j in enumerate(delta[layer]):
                db[layer][j] += delta_j / n
                for i, h_i in enumerate(h[layer]):
                    dW[layer][i][j] += h_i * delta_j / n
        result.z.append(z)
        result.h.append(h)
        result.delta.append([[d / n for d in row] for row in delta])
    return result
