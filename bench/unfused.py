"""What people write with NumPy or CuPy alone: the mathematics of each fused kernel, one array expression after another.

Each function takes an array module and the arrays of a case by name, and does what its operation does, in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpubackprop.backends.cases import CASES, Arrays
from gpubackprop.bench.peers.arrays import softmax_cross_entropy
from gpubackprop.step.state import C1, C2, FACTOR, NORM, RATE

Unfused = Callable[[Any, Arrays], None]

_GENERATOR = np.random.default_rng(0)
SQRT_HALF, DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
TANH_SCALE, TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715


def erf(xp: Any, z: Any) -> Any:
    """Return erf(z)."""
    if xp.__name__ == "cupy":
        from cupyx.scipy.special import erf
    else:
        from scipy.special import erf
    return erf(z)


def inner(z: Any) -> Any:
    """Return the argument of the tanh in gelu_tanh."""
    return TANH_SCALE * (z + TANH_CUBIC * z * z * z)


def dgelu_tanh(xp: Any, z: Any) -> Any:
    """Return the derivative of gelu_tanh."""
    t = xp.tanh(inner(z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * TANH_SCALE * (1 + 3 * TANH_CUBIC * z * z)


PHI: dict[str, Callable[[Any, Any, Any], object]] = {
    "relu": lambda xp, z, out: xp.maximum(z, 0, out=out),
    "tanh": lambda xp, z, out: xp.tanh(z, out=out),
    "gelu": lambda xp, z, out: xp.multiply(0.5 * z, 1 + erf(xp, SQRT_HALF * z), out=out),
    "gelu_tanh": lambda xp, z, out: xp.multiply(0.5 * z, 1 + xp.tanh(inner(z)), out=out),
}
DPHI: dict[str, Callable[[Any, Any, Any], Any]] = {  # of z or h, whichever is cheaper
    "relu": lambda xp, z, h: h > 0,
    "tanh": lambda xp, z, h: 1 - h * h,
    "gelu": lambda xp, z, h: 0.5 * (1 + erf(xp, SQRT_HALF * z)) + z * (DENSITY * xp.exp(-0.5 * z * z)),
    "gelu_tanh": lambda xp, z, h: dgelu_tanh(xp, z),
}


def forward(name: str) -> Unfused:
    """Return z += b; out = phi(z)."""

    def run(xp: Any, a: Arrays) -> None:
        a["z"] += a["b"]
        PHI[name](xp, a["z"], a["out"])

    return run


def backward(name: str) -> Unfused:
    """Return out = dh phi'; db = sum over rows of out."""

    def run(xp: Any, a: Arrays) -> None:
        xp.multiply(a["dh"], DPHI[name](xp, a.get("z"), a.get("h")), out=a["out"])
        xp.sum(a["out"], axis=0, dtype=a["db"].dtype, out=a["db"])

    return run


def mean_squared_error(xp: Any, o: Any, y: Any) -> tuple[Any, Any]:
    """Return the loss, and its gradient in a new array."""
    r = o - y
    return (r * r).mean(), (2 / o.size) * r


def sigmoid_cross_entropy(xp: Any, o: Any, y: Any) -> tuple[Any, Any]:
    """Return the loss, and its gradient in a new array."""
    e = xp.exp(-xp.abs(o))
    loss = (xp.maximum(o, 0) - o * y + xp.log1p(e)).mean()
    return loss, (xp.where(o < 0, e, xp.ones_like(e)) / (1 + e) - y) * (1 / o.size)


LOSSES = {f.__name__: f for f in (softmax_cross_entropy, mean_squared_error, sigmoid_cross_entropy)}


def bias_loss(name: str) -> Unfused:
    """Return o = z + b; value and do of the loss; db = sum over rows of do."""

    def run(xp: Any, a: Arrays) -> None:
        z, value = a["z"], a["value"]
        z += a["b"]
        loss, do = LOSSES[name](xp, z, a["y"])
        value[0] = loss
        value[1] += len(z) * value[0]
        a["out"][...] = do
        xp.sum(a["out"], axis=0, dtype=a["db"].dtype, out=a["db"])

    return run


def sgd_momentum(momentum: float) -> Unfused:
    """Return v = momentum v + g; p -= lr v."""

    def run(xp: Any, a: Arrays) -> None:
        v = a["states"][0]
        v *= momentum
        v += a["gradients"] * a["scalars"][FACTOR]
        a["parameters"] -= a["scalars"][RATE] * v
        _round(a)

    return run


def adam(betas: tuple[float, float], eps: float, decay: float = 0.0) -> Unfused:
    """Return Adam's update, with decoupled decay where it is given."""
    beta1, beta2 = betas

    def run(xp: Any, a: Arrays) -> None:
        p, (m, v), scalars = a["parameters"], a["states"], a["scalars"]
        g = a["gradients"] * scalars[FACTOR]
        if decay:
            p *= 1 - scalars[RATE] * decay
        m *= beta1
        m += (1 - beta1) * g
        v *= beta2
        v += (1 - beta2) * g * g
        p -= scalars[C1] * m / (xp.sqrt(v) * scalars[C2] + eps)
        _round(a)

    return run


def _round(a: Arrays) -> None:
    if "weights" in a:
        a["weights"][...] = a["parameters"]


def clip(max_norm: float) -> Unfused:
    """Return the norm of the gradient and the factor that limits it."""

    def run(xp: Any, a: Arrays) -> None:
        g, scalars = a["gradients"], a["scalars"]
        norm = xp.sqrt((g * g).sum())
        scalars[NORM] = norm
        scalars[FACTOR] = xp.minimum(1.0, max_norm / (norm + 1e-6))

    return run


def dropout(rate: float) -> Unfused:
    """Return inverted dropout with CuPy's random numbers."""

    def run(xp: Any, a: Arrays) -> None:
        keep = _random(xp, a["x"].shape) >= rate
        xp.multiply(a["x"], keep * a["x"].dtype.type(1 / (1 - rate)), out=a["out"])

    return run


def _random(xp: Any, shape: tuple[int, ...]) -> Any:
    if xp.__name__ == "cupy":
        return xp.random.random(shape, dtype=xp.float32)
    return _GENERATOR.random(shape, xp.float32)


def gather(xp: Any, a: Arrays) -> None:
    """Copy the rows of the source in the given order, from the cursor of the case on."""
    first = len(a["source"]) // 4
    options = {"mode": "clip"} if xp is np else {}  # else NumPy copies once more
    xp.take(a["source"], a["order"][first : first + len(a["out"])], axis=0, out=a["out"], **options)


def _unfused() -> dict[str, Unfused]:
    table: dict[str, Unfused] = {}
    for name in PHI:
        table |= {f"bias_activation_forward {name}": forward(name), f"bias_activation_backward {name}": backward(name)}
    table |= {f"bias_loss {name}": bias_loss(name) for name in LOSSES}
    for name in ("Adam", "AdamW"):
        o = CASES[f"update {name}"].numbers["optimizer"]
        table[f"update {name}"] = adam(o.betas, o.eps, o.weight_decay if o.decoupled else 0.0)
    table["update SGD momentum"] = sgd_momentum(CASES["update SGD momentum"].numbers["optimizer"].momentum)
    limit, rate = CASES["clip"].numbers["max_norm"], CASES["dropout"].numbers["rate"]
    return {**table, "clip": clip(limit), "dropout": dropout(rate), "gather": gather}


UNFUSED = _unfused()
"""By the name of the case."""
