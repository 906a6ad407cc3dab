"""The step as one writes it with NumPy or CuPy alone: ``matmul`` and array expressions, and a loop over the parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubackprop.bench.peers import BETA1, BETA2, EPSILON, LEARNING_RATE, Peer, Problem


class ArrayPeer(Peer):
    """Trains with the functions of an array module."""

    dtypes = ("float32", "float64")

    def __init__(self, problem: Problem, xp: Any) -> None:
        self.problem, self.xp = problem, xp
        W, b = problem.parameters()
        self.W = [xp.array(w, problem.dtype) for w in W]
        self.b = [xp.array(v, problem.dtype) for v in b]
        self.m = [xp.zeros_like(p) for p in (*self.W, *self.b)]
        self.v = [xp.zeros_like(p) for p in (*self.W, *self.b)]
        self.t, self.value = 0, xp.zeros(())
        self.all_X, self.all_y = xp.asarray(problem.X, problem.dtype), xp.asarray(problem.y)
        self.X, self.y = self.all_X[: problem.batch], self.all_y[: problem.batch]

    def step(self) -> None:
        """Take a step on the mini-batch."""
        self.train(self.X, self.y)

    def loss(self) -> float:
        """Return the loss of the last step."""
        return float(self.value)

    def forward(self, X: Any) -> list[Any]:
        """Return h_0 = X, ..., h_L, o."""
        xp, h = self.xp, [X]
        for W, b in zip(self.W[:-1], self.b[:-1], strict=True):
            h.append(xp.maximum(h[-1] @ W + b, 0))
        h.append(h[-1] @ self.W[-1] + self.b[-1])
        return h

    def predict(self) -> Any:
        """Return the outputs."""
        return self.forward(self.X)[-1]

    def epoch(self, *, shuffle: bool) -> None:
        """Train on all rows, in a random order if requested."""
        n, batch = len(self.all_X), self.problem.batch
        order = self.xp.random.permutation(n) if shuffle else self.xp.arange(n)
        for first in range(0, n, batch):
            rows = order[first : first + batch]
            self.train(self.all_X[rows], self.all_y[rows])

    def train(self, X: Any, y: Any) -> None:
        """Take a step on these rows."""
        *h, o = self.forward(X)
        self.value, delta = softmax_cross_entropy(self.xp, o, y)
        gradients: list[Any] = [None] * (2 * len(self.W))
        for i in reversed(range(len(self.W))):
            gradients[i], gradients[len(self.W) + i] = h[i].T @ delta, delta.sum(axis=0)
            if i:
                delta = (delta @ self.W[i].T) * (h[i] > 0)
        if self.problem.optimizer == "sgd":
            for p, g in zip((*self.W, *self.b), gradients, strict=True):
                p -= LEARNING_RATE * g
        else:
            self._adam(gradients)

    def _adam(self, gradients: list[Any]) -> None:
        self.t += 1
        c1, c2 = LEARNING_RATE / (1 - BETA1**self.t), (1 - BETA2**self.t) ** -0.5
        for p, g, m, v in zip((*self.W, *self.b), gradients, self.m, self.v, strict=True):
            m *= BETA1
            m += (1 - BETA1) * g
            v *= BETA2
            v += (1 - BETA2) * g * g
            p -= c1 * m / (self.xp.sqrt(v) * c2 + EPSILON)


class NumpyPeer(ArrayPeer):
    """Plain NumPy."""

    devices = ("cpu",)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, np)


class CupyPeer(ArrayPeer):
    """Plain CuPy."""

    devices = ("cuda",)

    def __init__(self, problem: Problem) -> None:
        import cupy

        from gpubackprop.bench.devices import CudaTimer

        super().__init__(problem, cupy)
        self.timer = CudaTimer(cupy.cuda.get_current_stream())


def softmax_cross_entropy(xp: Any, o: Any, y: Any) -> tuple[Any, Any]:
    """Return the loss, and its gradient in a new array."""
    n = len(o)
    rows = xp.arange(n)
    shifted = o - o.max(axis=1, keepdims=True)
    e = xp.exp(shifted)
    total = e.sum(axis=1, keepdims=True)
    loss = (xp.log(total[:, 0]) - shifted[rows, y]).mean()
    do = e / total
    do[rows, y] -= 1
    do *= 1 / n
    return loss, do
