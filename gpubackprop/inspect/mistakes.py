"""Mistakes that people make in backpropagation: each replaces an array by a function of the right one and its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubackprop.activations import ACTIVATIONS
from gpubackprop.definitions import Array
from gpubackprop.inspect.golden import BETA1, BETA2, EPS, MOMENTUM, RATE
from gpubackprop.inspect.rehearsal import At, Mistake

Wrong = Callable[[Array, At], Array]


def _layer(name: str, cause: str, kind: str, wrong: Wrong) -> Mistake:
    """Return a mistake that may be in all layers or in one."""
    return Mistake(name, cause, {kind: wrong}, per_layer=True)


def _everywhere(name: str, cause: str, **wrong: Wrong) -> Mistake:
    """Return a mistake that is in all layers, or in the loss."""
    return Mistake(name, cause, wrong)


def _wrong_output(name: str, cause: str, wrong: Wrong) -> list[Mistake]:
    """Return a mistake in h: phi' is then computed from z, from z without the bias, or from the wrong h."""
    slopes: list[dict[str, Wrong]] = [
        {},
        {"dphi": lambda d, a: a.activation.dphi(a.z - a.b) if a.layer else d},
        {"dphi": lambda d, a: _derivative_of_h(a)(a.h)},
    ]
    return [Mistake(name, cause, {"h": wrong} | slope, per_layer=True) for slope in slopes]


def _derivative_of_h(at: At) -> Callable[[Array], Array]:
    """Return phi' as a function of h alone, if textbooks have one."""
    formulas: dict[str, Callable[[Array], Array]] = {
        "tanh": lambda h: 1 - h * h,
        "sigmoid": lambda h: h * (1 - h),
        "softplus": lambda h: 1 - np.exp(-h),
    }
    return formulas.get(at.activation.name, lambda h: at.activation.dphi(h, h))


def _transposed(W: Array) -> Array:
    """Return W^T where it fits: a matrix that is not square cannot be transposed unnoticed."""
    return W.T if W.shape[0] == W.shape[1] else W


def _softmax(o: Array, axis: int = 1, shift: bool = True) -> Array:
    e = np.exp(o - o.max(axis=axis, keepdims=True)) if shift else np.exp(o)
    return e / e.sum(axis=axis, keepdims=True)


def _onehot(at: At) -> Array:
    return np.eye(at.o.shape[1])[at.y] if at.y.ndim == 1 else at.y


def _cross_entropy(at: At, p: Array) -> Array:
    return np.asarray(-(_onehot(at) * np.log(p)).sum() / at.n)


def _step(wrong: Callable[[Any, At], Any]) -> Wrong:
    """Return an update by eta times another step; it is given eta times the right one, over eta."""
    return lambda value, at: at.before - RATE * wrong((at.before - value) / RATE, at)


def _adam(wrong: Callable[[Any, Any, int], Any]) -> Wrong:
    """Return an update by another formula of Adam's averages m and v and of t."""
    return _step(lambda step, at: wrong(at.state(0), at.state(1), at.t))


def _other_layer(z: Array, at: At) -> Array:
    l = {1: 2, 2: 1}.get(at.l, at.l)
    return at.h_in @ at.run.of_layer("W", l) + at.run.of_layer("b", l)


FORWARD = [
    _layer("W transposed", "W is transposed in the forward phase: h W^T", "z", lambda z, a: a.h_in @ _transposed(a.W) + a.b),
    _layer("bias forgotten", "the bias is forgotten: z = h W", "z", lambda z, a: z - a.b),
    *_wrong_output("bias after phi", "the bias is added after the activation: h = phi(h W) + b",
                   lambda h, a: a.activation.phi(a.z - a.b) + a.b),
    _layer("bias sign", "the bias is subtracted", "z", lambda z, a: z - 2 * a.b),
    *_wrong_output("phi forgotten", "the activation is forgotten: h = z", lambda h, a: a.z),
    _everywhere("phi on output", "the activation is applied to the output layer too; o is linear",
                o=lambda o, a: a.activation.phi(o)),
    _everywhere("softmax as output", "o is the softmax already; o must be before it", o=lambda o, a: _softmax(o)),
    _everywhere("layer order", "the layers are used in the wrong order: W_2 before W_1", z=_other_layer),
]  # fmt: skip

LOSS = [
    _everywhere("loss: sum", "the loss is a sum over the samples: the mean (1/n) is forgotten", loss=lambda x, a: x * a.n),
    _everywhere("loss: sum of all", "the loss is a sum over samples and outputs: the mean is forgotten",
                loss=lambda x, a: x * a.o.size),
    _everywhere("loss: sum of outputs", "the loss is summed over the outputs of a sample; it is their mean",
                loss=lambda x, a: x * a.o.shape[1]),
    _everywhere("loss: half", "the loss has a factor 1/2, as in some textbooks; here (o - y)^2 has none", loss=lambda x, a: x / 2),
    _everywhere("loss: 1/n twice", "the loss is divided by n twice", loss=lambda x, a: x / a.n),
    _everywhere("loss: sign", "the loss has the wrong sign", loss=lambda x, a: -x),
    _everywhere("onehot + 1", "the classes are off by one: they count from 0 (yours is one too high)",
                y=lambda y, a: (y + 1) % a.classes),
    _everywhere("onehot - 1", "the classes are off by one: they count from 0 (yours is one too low)",
                y=lambda y, a: (y - 1) % a.classes),
    _everywhere("softmax axis", "softmax is taken over the samples, not over the outputs of one sample",
                loss=lambda x, a: _cross_entropy(a, _softmax(a.o, 0)), do=lambda do, a: (_softmax(a.o, 0) - _onehot(a)) / a.n),
    _everywhere("softmax overflow", "softmax without the shift by the largest output: e^o overflows; use e^(o - max o)",
                loss=lambda x, a: _cross_entropy(a, _softmax(a.o, shift=False)),
                do=lambda do, a: (_softmax(a.o, shift=False) - _onehot(a)) / a.n),
    _everywhere("do: sum", "the mean is forgotten in the gradient: do is not divided by n", do=lambda do, a: do * a.n),
    _everywhere("do: not / d", "do is divided by n, but the mean is also over the outputs: divide by n d",
                do=lambda do, a: do * a.o.shape[1]),
    _everywhere("do: not / (n d)", "the mean is forgotten in the gradient: do is not divided by n d",
                do=lambda do, a: do * a.o.size),
    _everywhere("do: 1/n twice", "the mean is taken twice: do is divided by n once too often", do=lambda do, a: do / a.n),
    _everywhere("do: factor 2", "the factor 2 of the squared error's derivative is forgotten", do=lambda do, a: do / 2),
    _everywhere("do: factor 2 twice", "a factor 2 too much in do", do=lambda do, a: do * 2),
    _everywhere("do: sign", "do has the wrong sign: y - o instead of o - y", do=lambda do, a: -do),
    _everywhere("do: no -y", "the -y is missing in the derivative: do = softmax(o) / n", do=lambda do, a: _softmax(a.o) / a.n),
    _everywhere("do: no softmax", "do = (o - onehot(y)) / n: the softmax is missing", do=lambda do, a: (a.o - _onehot(a)) / a.n),
    _everywhere("do: wrt p", "do is the derivative by the probabilities, -y / p, not by the outputs",
                do=lambda do, a: -_onehot(a) / _softmax(a.o) / a.n),
    _everywhere("do: p (1 - p)", "softmax's derivative is applied twice: softmax(o) - y has it already, p (1 - p) is too much",
                do=lambda do, a: do * _softmax(a.o) * (1 - _softmax(a.o))),
    _everywhere("do: * phi'", "do is multiplied by phi'(o), but the output layer is linear",
                do=lambda do, a: do * a.activation.dphi(a.o)),
]  # fmt: skip

PARAMETERS = [
    _layer("dW transposed", "dW is transposed: delta^T h instead of h^T delta (or W is kept as (out, in): transpose it for the "
           "file)", "dW", lambda dW, a: dW.T),
    _layer("dW / n", "dW is divided by n, but do has the 1/n already", "dW", lambda dW, a: dW / a.n),
    _layer("dW: one sample", "dW holds the last sample's gradient alone: it must be added up over the samples", "dW",
           lambda dW, a: np.outer(a.h_in[-1], a.delta[-1])),
    _layer("dW: z for h", "dW uses z_{l-1} instead of h_{l-1}", "dW", lambda dW, a: a.z_in.T @ a.delta),
    _layer("dW: wrong h", "dW uses the output h_l of its layer instead of its input h_{l-1}", "dW", lambda dW, a: a.h.T @ a.delta),
    _layer("dW: dh for delta", "dW uses dh_l instead of delta_l: phi' is missing", "dW", lambda dW, a: a.h_in.T @ a.dh),
    _everywhere("accumulated", "gradients are added to those of the last iteration instead of overwriting them",
                dW=lambda dW, a: a.added_up("dW", dW), db=lambda db, a: a.added_up("db", db)),
    _everywhere("dW accumulated", "weight gradients are added to those of the last iteration instead of overwriting them",
                dW=lambda dW, a: a.added_up("dW", dW)),
    _everywhere("db accumulated", "bias gradients are added to those of the last iteration instead of overwriting them",
                db=lambda db, a: a.added_up("db", db)),
    _layer("db: axis", "the bias gradient is summed over the wrong axis: sum over the samples (axis 0), one number per unit", "db",
           lambda db, a: a.delta.sum(axis=1)),
    _layer("db: mean", "the bias gradient is averaged; it is the sum over the samples (do has the 1/n)", "db",
           lambda db, a: db / a.n),
    _layer("db: no sum", "the bias gradient is not summed over the samples", "db", lambda db, a: a.delta),
    _layer("db: one sample", "db holds the last sample's gradient alone: it must be added up over the samples", "db",
           lambda db, a: a.delta[-1]),
    _layer("db: dh for delta", "db uses dh_l instead of delta_l: phi' is missing", "db", lambda db, a: a.dh.sum(axis=0)),
]  # fmt: skip

HIDDEN = [
    _layer("dh: W", "dh uses W instead of W^T", "dh", lambda dh, a: a.above.delta @ _transposed(a.above.W).T),
    _layer("dh: wrong layer", "dh_l uses W_l instead of W_{l+1}: the layer above", "dh", lambda dh, a: a.above.delta @ a.W.T),
    _layer("dh: updated W", "dh uses W after its update: compute all gradients first, then update", "dh",
           lambda dh, a: a.above.delta @ a.above.updated_W().T),
    _layer("dh: dh for delta", "dh_l is computed from dh_{l+1} instead of delta_{l+1}: phi' is left out on the way", "dh",
           lambda dh, a: a.above.dh @ a.above.W.T),
    _everywhere("dh: from do", "dh_l is computed from do in every layer, not from the layer above",
                dh=lambda dh, a: a.run.array("do") @ a.above.W.T),
    _layer("phi' forgotten", "phi' is forgotten: delta = dh", "delta", lambda delta, a: a.dh),
    _layer("phi for phi'", "phi instead of phi': delta = dh * phi(z)", "delta", lambda delta, a: a.dh * a.h),
    _layer("phi'(h)", "phi' is evaluated at h; its argument is z", "delta", lambda delta, a: a.dh * a.activation.dphi(a.h)),
    _layer("phi'(z) by h's formula", "the formula of phi' in terms of h (as 1 - h^2) is given z", "delta",
           lambda delta, a: a.dh * _derivative_of_h(a)(a.z)),
    _layer("phi' of wrong layer", "phi' is taken at z_{l-1}: the layer below", "delta",
           lambda delta, a: a.dh * a.activation.dphi(a.z_in)),
    _layer("phi'(dh)", "phi' is evaluated at dh", "delta", lambda delta, a: a.activation.dphi(a.dh)),
    _everywhere("phi' of sigmoid", "phi' is that of sigmoid, h (1 - h)", dphi=lambda d, a: a.h * (1 - a.h)),
    _everywhere("phi' of relu", "phi' is that of relu", dphi=lambda d, a: ACTIVATIONS["relu"].dphi(a.z)),
    _everywhere("phi' at the kink", "phi' at z = 0 is 1; at a kink it is the derivative from the left, 0 for relu (z > 0, not >=)",
                dphi=lambda d, a: np.where(a.z == 0, 1.0, d)),
    _everywhere("phi' of h twice", "phi' is squared: it is applied twice", dphi=lambda d, a: d**2),
]  # fmt: skip

UPDATE = [
    _everywhere("ascent", "the update has the wrong sign: W + eta dW goes uphill", update=_step(lambda step, a: -step)),
    _everywhere("no rate", "the learning rate is forgotten: the step is dW itself", update=_step(lambda step, a: step / RATE)),
    _everywhere("rate / n", "the update divides by n again", update=_step(lambda step, a: step / a.n)),
    _everywhere("bias not updated", "the biases are not updated", update=lambda value, a: a.before if a.name[0] == "b" else value),
    _everywhere("no momentum", "the velocity is not kept from one iteration to the next: plain gradient descent",
                update=_step(lambda step, a: a.gradient)),
    _everywhere("dampened momentum", "the velocity takes (1 - momentum) g; here it takes g",
                update=_step(lambda step, a: step * (1 - MOMENTUM))),
    _everywhere("nesterov", "this is Nesterov's momentum: g + momentum v",
                update=_step(lambda step, a: a.gradient + MOMENTUM * a.state(0))),
    _everywhere("adam: no correction", "Adam's bias corrections 1 - beta^t are missing",
                update=_adam(lambda m, v, t: m / (np.sqrt(v) + EPS))),
    _everywhere("adam: m corrected only", "Adam's bias correction of v is missing",
                update=_adam(lambda m, v, t: m / (1 - BETA1**t) / (np.sqrt(v) + EPS))),
    _everywhere("adam: v corrected only", "Adam's bias correction of m is missing",
                update=_adam(lambda m, v, t: m / (np.sqrt(v / (1 - BETA2**t)) + EPS))),
    _everywhere("adam: eps in root", "eps stands inside the root: sqrt(v + eps); it belongs outside",
                update=_adam(lambda m, v, t: m / (1 - BETA1**t) / np.sqrt(v / (1 - BETA2**t) + EPS))),
    _everywhere("adam: eps before", "eps is added to sqrt(v) before the bias correction",
                update=_adam(lambda m, v, t: m / (1 - BETA1**t) / (np.sqrt(v) + EPS) * np.sqrt(1 - BETA2**t))),
    _everywhere("adam: no root", "the root of v is missing",
                update=_adam(lambda m, v, t: m / (1 - BETA1**t) / (v / (1 - BETA2**t) + EPS))),
    _everywhere("adam: t + 1", "Adam's t starts at 2: it is 1 in the first iteration",
                update=_adam(lambda m, v, t: m / (1 - BETA1 ** (t + 1)) / (np.sqrt(v / (1 - BETA2 ** (t + 1))) + EPS))),
    _everywhere("adam: t stands", "Adam's t is not counted up: it stays 1",
                update=_adam(lambda m, v, t: m / (1 - BETA1) / (np.sqrt(v / (1 - BETA2)) + EPS))),
]  # fmt: skip

MISTAKES = [*FORWARD, *LOSS, *PARAMETERS, *HIDDEN, *UPDATE]
