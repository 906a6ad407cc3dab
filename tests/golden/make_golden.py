"""Write golden.json: activations, their derivatives and losses, to 50 digits, from formulas of its own.

    pip install mpmath && python tests/golden/make_golden.py

The arguments are exact in float32, so that one table serves both dtypes.
"""

from __future__ import annotations

import json
from pathlib import Path

import mpmath as mp

mp.mp.dps = 50

Z = [
    0.0, 2.0**-140, 2.0**-60, 2.0**-24, 2.0**-10, 0.125, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 2.9375, 2.999755859375, 3.0625, 3.5, 5.0,
    5.5, 6.3125, 8.0, 9.125, 10.0, 12.6875, 13.75, 14.125, 16.5, 18.4375, 19.5, 20.5, 21.0625, 30.0, 37.1875, 38.375, 43.5, 50.0,
    87.0, 88.625, 100.25, 103.0, 104.0, 355.5, 700.0, 706.375, 740.25, 744.5, 800.0, 4096.0, 2.0**40, 2.0**66, 2.0**100,
]  # fmt: skip


def normal_cdf(z):
    return mp.erfc(-z / mp.sqrt(2)) / 2


def tail(z, value, limit):
    """Return value(), or the limit where |z| is so large that it is the value to far more than 50 digits."""
    return limit if abs(z) > 10000 else value()


def sigmoid(z):
    return tail(z, lambda: 1 / (1 + mp.exp(-z)), mp.mpf(1 if z > 0 else 0))


def softplus(z):
    return tail(z, lambda: mp.log1p(mp.exp(z)), z if z > 0 else mp.mpf(0))


def tanh(z):
    return tail(z, lambda: mp.tanh(z), mp.sign(z))


def expm1(z):
    return tail(z, lambda: mp.expm1(z), mp.mpf(-1))


def exp(z):
    return tail(z, lambda: mp.exp(z), mp.mpf(0))


def density(z):
    return tail(z, lambda: mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi), mp.mpf(0))


def cdf(z):
    return tail(z, lambda: normal_cdf(z), mp.mpf(1 if z > 0 else 0))


SCALE = mp.mpf("1.0507009873554804934193349852946")
ALPHA = mp.mpf("1.6732632423543772848170429916717")
SLOPE = mp.mpf("0.01")
C = mp.mpf("0.044715")


def gelu_tanh(z):
    return z * sigmoid(2 * mp.sqrt(2 / mp.pi) * (z + C * z**3))


def gelu_tanh_derivative(z):
    u = mp.sqrt(2 / mp.pi) * (z + C * z**3)
    slope = 2 * mp.sqrt(2 / mp.pi) * (1 + 3 * C * z**2)
    return sigmoid(2 * u) * (1 + tail(u, lambda: z * slope * sigmoid(-2 * u), mp.mpf(0) if u > 0 else z * slope))


def mish_derivative(z):
    s = tail(z, lambda: mp.sech(softplus(z)) ** 2 * sigmoid(z), mp.mpf(1 if z < 0 else 0))
    return tanh(softplus(z)) + tail(z, lambda: z * s, mp.mpf(0))


ACTIVATIONS = {
    "identity": (lambda z: z, lambda z: mp.mpf(1)),
    "relu": (lambda z: max(z, mp.mpf(0)), lambda z: mp.mpf(z > 0)),
    "leaky_relu": (lambda z: z if z > 0 else SLOPE * z, lambda z: mp.mpf(1) if z > 0 else SLOPE),
    "elu": (lambda z: z if z > 0 else expm1(z), lambda z: mp.mpf(1) if z > 0 else exp(z)),
    "selu": (
        lambda z: SCALE * z if z > 0 else SCALE * ALPHA * expm1(z),
        lambda z: SCALE if z > 0 else SCALE * ALPHA * exp(z),
    ),
    "celu": (lambda z: z if z > 0 else expm1(z), lambda z: mp.mpf(1) if z > 0 else exp(z)),
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "tanh": (tanh, lambda z: tail(z, lambda: mp.sech(z) ** 2, mp.mpf(0))),
    "softplus": (softplus, sigmoid),
    "softsign": (lambda z: z / (1 + abs(z)), lambda z: 1 / (1 + abs(z)) ** 2),
    "gelu": (lambda z: z * cdf(z), lambda z: cdf(z) + z * density(z)),
    "gelu_tanh": (gelu_tanh, gelu_tanh_derivative),
    "silu": (lambda z: z * sigmoid(z), lambda z: sigmoid(z) * (1 + z * sigmoid(-z))),
    "mish": (lambda z: z * tanh(softplus(z)), mish_derivative),
    "hard_sigmoid": (
        lambda z: min(max(z / 6 + mp.mpf(1) / 2, mp.mpf(0)), mp.mpf(1)),
        lambda z: mp.mpf(1) / 6 if -3 < z < 3 else mp.mpf(0),
    ),
    "hard_swish": (
        lambda z: z * min(max(z / 6 + mp.mpf(1) / 2, mp.mpf(0)), mp.mpf(1)),
        lambda z: mp.mpf(0) if z <= -3 else mp.mpf(1) if z >= 3 else z / 3 + mp.mpf(1) / 2,
    ),
    "squareplus": (
        lambda z: (z + mp.sqrt(z * z + 4)) / 2 if z > 0 else 2 / (mp.sqrt(z * z + 4) - z),
        lambda z: (1 + z / mp.sqrt(z * z + 4)) / 2 if z > 0 else 2 / (z * z + 4 - z * mp.sqrt(z * z + 4)),
    ),
    "sin": (mp.sin, mp.cos),
}

ELEMENTWISE = {  # name: (ell, dell/do, targets)
    "mean_squared_error": (lambda o, t: (o - t) ** 2, lambda o, t: 2 * (o - t), [-2.0, 0.25]),
    "mean_absolute_error": (lambda o, t: abs(o - t), lambda o, t: mp.sign(o - t), [-2.0, 0.25]),
    "huber": (
        lambda o, t: (o - t) ** 2 / 2 if abs(o - t) <= 1 else abs(o - t) - mp.mpf(1) / 2,
        lambda o, t: max(min(o - t, mp.mpf(1)), mp.mpf(-1)),
        [-2.0, 0.25],
    ),
    "sigmoid_cross_entropy": (
        lambda o, t: -t * mp.log(sigmoid(o)) - (1 - t) * mp.log(sigmoid(-o)),
        lambda o, t: sigmoid(o) - t,
        [0.0, 0.25, 1.0],
    ),
    "poisson": (lambda o, t: mp.exp(o) - t * o, lambda o, t: mp.exp(o) - t, [0.0, 3.0]),
    "hinge": (
        lambda o, t: max(mp.mpf(0), 1 - t * o),
        lambda o, t: -t if 1 - t * o > 0 else mp.mpf(0),
        [-1.0, 1.0],
    ),
}
O = [-80.0, -20.5, -3.5, -1.0, -0.125, 0.0, 0.5, 1.0, 2.25, 12.0, 80.0]  # noqa: E741  (the outputs' symbol)

ROWS = [[0.5, -1.25, 2.0], [80.0, -80.0, 0.0], [1000.0, 999.0, 998.0], [-3.0, -3.0, -3.0]]
DISTRIBUTIONS = [[0.25, 0.25, 0.5], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]


def log_softmax(row):
    o = [mp.mpf(v) for v in row]
    return [v - mp.log(sum(mp.exp(w) for w in o)) for v in o]


def text(value):
    return mp.nstr(mp.mpf(value), 25)


def make():
    z = [s * v for v in map(mp.mpf, Z) for s in (1, -1)][1:]
    result = {"activations": {}, "elementwise": {}, "softmax": {}}
    for name, (phi, dphi) in ACTIVATIONS.items():
        table = [(v, phi(v), dphi(v)) for v in z]
        result["activations"][name] = [[text(x) for x in row] for row in table]
    for name, (ell, dell, targets) in ELEMENTWISE.items():
        table = [(o, t, ell(o, t), dell(o, t)) for o in map(mp.mpf, O) for t in map(mp.mpf, targets)]
        result["elementwise"][name] = [[text(x) for x in row] for row in table]
    for smoothing in (0, mp.mpf("0.125")):
        rows = []
        for o, t in zip(ROWS, DISTRIBUTIONS, strict=True):
            q = log_softmax(o)
            t = [(1 - smoothing) * v + smoothing / 3 for v in t]
            value = -sum(a * b for a, b in zip(t, q, strict=True))
            rows.append([text(value), [text(mp.exp(b) - a) for a, b in zip(t, q, strict=True)]])
        result["softmax"][f"softmax_cross_entropy {text(smoothing)}"] = rows
    rows = []
    for o, t in zip(ROWS, DISTRIBUTIONS, strict=True):
        q = log_softmax(o)
        value = sum(a * (mp.log(a) - b) for a, b in zip(t, q, strict=True) if a > 0)
        rows.append([text(value), [text(mp.exp(b) - a) for a, b in zip(t, q, strict=True)]])
    result["softmax"]["kl_divergence 0.0"] = rows
    return result


if __name__ == "__main__":
    path = Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(make(), indent=0) + "\n", encoding="utf-8")
