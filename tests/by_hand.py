"""Backpropagation by hand, with Python's loops and lists, one sample at a time: a network whose methods a mistake may replace.

It shares no line with the package. Its arrays have the names of a golden file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

PHI: dict[str, Callable[[float], float]] = {
    "tanh": math.tanh,
    "relu": lambda z: z if z > 0 else 0.0,
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
}
ETA, MU, BETA1, BETA2, EPS = 0.1, 0.9, 0.9, 0.99, 1e-3


class ByHand:
    """A network that begins with the arrays ``given`` in a golden file; :meth:`run` returns two iterations."""

    def __init__(self, activation: str, loss: str, optimizer: str, given: Mapping[str, Any]) -> None:
        self.activation, self.loss, self.optimizer, self.given = activation, loss, optimizer, given
        self.names = [key[2:-2] for key in given if key.startswith("W_")]
        self.W = {m: given[f"W_{m}.1"].tolist() for m in self.names}
        self.b = {m: given[f"b_{m}.1"].tolist() for m in self.names}
        self.X, self.y = given["X"].tolist(), given["y"].tolist()
        self.memory: dict[Any, Any] = {}
        self.out: dict[str, Any] = {}
        self.t = 1

    # ------------------------------------------------------------------ what a mistake may replace

    def phi(self, z: float) -> float:
        return PHI[self.activation](z)

    def dphi(self, z: float, h: float) -> float:
        return {"tanh": 1 - h * h, "relu": 1.0 if z > 0 else 0.0, "sigmoid": h * (1 - h)}[self.activation]

    def affine(self, m: str, h: list[float]) -> list[float]:
        W, b = self.W[m], self.b[m]
        return [sum(W[i][j] * h[i] for i in range(len(h))) + b[j] for j in range(len(b))]

    def hidden(self, m: str, z: list[float]) -> list[float]:
        return [self.phi(v) for v in z]

    def output(self, z: list[float]) -> list[float]:
        return z

    def softmax(self, o: list[float]) -> list[float]:
        e = [math.exp(v - max(o)) for v in o]
        return [v / sum(e) for v in e]

    def sample_loss(self, o: list[float], y: Any, n: int) -> float:
        if self.loss == "softmax_cross_entropy":
            top = max(o)
            return (top + math.log(sum(math.exp(v - top) for v in o)) - o[y]) / n
        return sum((a - b) ** 2 for a, b in zip(o, y, strict=True)) / len(o) / n

    def dloss(self, o: list[float], y: Any, n: int) -> list[float]:
        if self.loss == "softmax_cross_entropy":
            return [(p - (j == y)) / n for j, p in enumerate(self.softmax(o))]
        return [2 * (a - b) / len(o) / n for a, b in zip(o, y, strict=True)]

    def left(self, h: list[Any], z: list[Any], k: int) -> list[float]:
        """The vector on the left of dW's outer product."""
        return h[k]

    def right(self, d: list[float], dh: list[float]) -> list[float]:
        """The vector on its right."""
        return d

    def db(self, d: list[float], dh: list[float]) -> list[float]:
        return d

    def add(self, total: Any, term: Any) -> Any:
        return term if total is None else (np.array(total) + np.array(term)).tolist()

    def through(self, m: str, below: str, d: list[float], dh: list[float]) -> list[float]:
        """The gradient of what comes into layer m."""
        return [sum(row[j] * d[j] for j in range(len(d))) for row in self.W[m]]

    def local(self, m: str, dh: list[float], z: list[float], h: list[float], z_below: list[float]) -> list[float]:
        return [g * self.dphi(a, c) for g, a, c in zip(dh, z, h, strict=True)]

    def finish(self, name: str, g: Any) -> Any:
        """A whole gradient."""
        return g

    def step(self, p: Any, v: float, g: float) -> float:
        if self.optimizer == "sgd":
            return v - ETA * g
        if self.optimizer == "momentum":
            self.memory[p] = MU * self.memory.get(p, 0.0) + g
            return v - ETA * self.memory[p]
        m, s = self.memory.get(p, (0.0, 0.0))
        m, s = self.memory[p] = BETA1 * m + (1 - BETA1) * g, BETA2 * s + (1 - BETA2) * g * g
        return v - ETA * self.adam(m, s, self.t)

    def adam(self, m: float, s: float, t: int) -> float:
        return m / (1 - BETA1**t) / (math.sqrt(s / (1 - BETA2**t)) + EPS)

    # ------------------------------------------------------------------ the passes

    def run(self) -> dict[str, np.ndarray]:
        z, o, y = (self.given[f"probe_{name}"].tolist() for name in "zoy")
        self.out["probe_phi"] = np.array([self.phi(v) for v in z])
        self.out["probe_dphi"] = np.array([self.dphi(v, self.phi(v)) for v in z])
        rows = []
        for o_i, y_i in zip(o, y, strict=True):
            try:
                rows.append(self.dloss(o_i, y_i, len(o)))
            except OverflowError:
                rows.append([math.nan] * len(o_i))
        self.out["probe_do"] = np.array(rows)
        for self.t in (1, 2):
            self.iterate(len(self.X))
        return self.out

    def iterate(self, n: int) -> None:
        of: dict[str, Any] = {}
        total, outputs, dos = 0.0, [], []
        for x, y in zip(self.X, self.y, strict=True):
            h, z = [x], []
            for m in self.names:
                z.append(self.affine(m, h[-1]))
                h.append(self.output(z[-1]) if m == "o" else self.hidden(m, z[-1]))
            outputs.append(h[-1])
            total += self.sample_loss(h[-1], y, n)
            d = dh = self.dloss(h[-1], y, n)
            dos.append(d)
            for k in range(len(self.names) - 1, -1, -1):
                m = self.names[k]
                if m != "o":
                    for name, v in ((f"z_{m}", z[k]), (f"h_{m}", h[k + 1]), (f"dh_{m}", dh), (f"delta_{m}", d)):
                        of.setdefault(name, []).append(v)
                outer = [[a * b for b in self.right(d, dh)] for a in self.left(h, z, k)]
                of[f"dW_{m}"] = self.add(of.get(f"dW_{m}"), outer)
                of[f"db_{m}"] = self.add(of.get(f"db_{m}"), self.db(d, dh))
                if k:
                    below = self.through(m, self.names[k - 1], d, dh)
                    d = self.local(self.names[k - 1], below, z[k - 1], h[k], z[k - 2] if k > 1 else x)
                    dh = below
        of |= {"o": outputs, "loss": total, "do": dos}
        for name, value in of.items():
            gradient = name[:3] in ("dW_", "db_")
            array = np.array(value, float)
            self.out[f"{name}.{self.t}"] = self.finish(name, array) if gradient else array
        self.update()

    def update(self) -> None:
        for m in self.names:
            for name, p in (("W", self.W), ("b", self.b)):
                g = self.out[f"d{name}_{m}.{self.t}"]
                each = enumerate(zip(np.ravel(p[m]).tolist(), g.ravel().tolist(), strict=True))
                p[m] = np.reshape([self.step((name, m, i), v, w) for i, (v, w) in each], g.shape).tolist()
                self.out[f"{name}_{m}.{self.t + 1}"] = np.array(p[m])
