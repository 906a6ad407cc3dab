"""Activations: phi and its derivative, each defined once, on scalars.

An entry is a function of ``real`` and ``m`` (see :mod:`gpubackprop.definitions`) that returns ``phi(z)`` and
``dphi(z, h)``. The derivative takes both the pre-activation z and the output h, and uses the one that the
decorator names: ``needs="h"`` lets the forward pass overwrite z.

Names, parameters and defaults are PyTorch's where PyTorch has the activation. At a kink the derivative is the
one from the left (0 for relu), as in PyTorch.

Both are accurate to a few units in the last place *of the result*, however small, also below the smallest normal number. So
no value near 0 is a difference of larger ones: a derivative is computed from z where h, rounded, nears a bound; e^z times a
large factor is e^(z/2) times it times e^(z/2), since e^z alone may have lost its digits. Two errors remain: near a zero within the
domain (phi' of gelu, gelu_tanh, silu, mish, and sin) that of the terms that cancel, and for e^x of a computed x that of x times a
rounding (gelu_tanh; celu and softplus with other parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from gpubackprop.definitions import NUMPY, Array, Definition, check_number, constant
from gpubackprop.registry import Registry

Phi = Callable[[Any], Any]
DPhi = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Activation(Definition):
    """An elementwise activation h = phi(z).

    Parameters
    ----------
    needs : {"h", "z"}
        What the derivative is computed from.
    known_gain : float or None
        PyTorch's recommended gain where it has one.
    """

    needs: Literal["h", "z"] = "z"
    known_gain: Callable[..., float] | float | None = None

    def phi(self, z: Array) -> Array:
        """Return phi(z), elementwise, in z's dtype."""
        with np.errstate(over="ignore", invalid="ignore"):  # a branch not taken may overflow
            return self._on_arrays(z)[0](z)

    def dphi(self, z: Array, h: Array | None = None) -> Array:
        """Return phi'(z), elementwise, in z's dtype."""
        phi, dphi = self._on_arrays(z)
        with np.errstate(over="ignore", invalid="ignore"):
            return dphi(z, phi(z) if h is None else h)

    def _on_arrays(self, z: Array) -> tuple[Phi, DPhi]:
        functions: tuple[Phi, DPhi] = self.scalars(np.dtype(z.dtype), NUMPY)
        return functions

    @property
    def gain(self) -> float:
        """The factor by which initial weights keep the scale of the signal.

        PyTorch's value where it has one (``torch.nn.init.calculate_gain``), else (E phi(z)^2)^(-1/2) for z ~ N(0, 1),
        by Gauss-Hermite quadrature: He et al. (2015), eq. 10, for any phi; it gives sqrt(2) for relu.
        """
        if callable(self.known_gain):
            return self.known_gain(**dict(self.parameters))
        if self.known_gain is not None:
            return self.known_gain
        z, weight = np.polynomial.hermite_e.hermegauss(101)
        return float(np.sqrt(weight.sum() / (weight @ self.phi(z) ** 2)))


ACTIVATIONS: Registry[Activation] = Registry("activation")


Define = Callable[..., tuple[Phi, DPhi]]


@overload
def activation(define: Define) -> Activation: ...


@overload
def activation(
    *, needs: Literal["h", "z"] = "z", gain: Callable[..., float] | float | None = None, aliases: Sequence[str] = ()
) -> Callable[[Define], Activation]: ...


def activation(
    define: Define | None = None,
    *,
    needs: Literal["h", "z"] = "z",
    gain: Callable[..., float] | float | None = None,
    aliases: Sequence[str] = (),
) -> Activation | Callable[[Define], Activation]:
    """Register a definition under the name of its function; usable bare or with arguments.

    Parameters
    ----------
    define : callable
        ``define(real, m, **parameters) -> (phi, dphi)``.
    needs : {"h", "z"}
        The argument that ``dphi(z, h)`` uses.
    gain : float or callable, optional
        The gain for the initializers; a callable is given the parameters.
    aliases : sequence of str
        Other names of the same activation, in lower case with underscores.

    Raises
    ------
    ValueError
        ``needs`` is neither "h" nor "z".
    """
    if needs not in ("h", "z"):
        raise ValueError(f"needs is {needs!r}; choose 'h' (the output) or 'z' (the input)")

    def register(function: Define) -> Activation:
        entry = Activation(function.__name__, function, needs=needs, known_gain=gain)
        ACTIVATIONS.add(entry.name, entry, *aliases)
        return entry

    return register if define is None else register(define)


def _at_least_zero(**parameters: float) -> None:
    for name, value in parameters.items():
        check_number(name, value, lambda x: 0 <= x < np.inf, "a number >= 0")


def _positive(**parameters: float) -> None:
    for name, value in parameters.items():
        check_number(name, value, lambda x: 0 < x < np.inf, "a number > 0")


@activation(needs="h", gain=1.0, aliases=("linear",))
def identity(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = z; phi' = 1."""
    one = real(1)

    def phi(z: Any) -> Any:
        return z

    def dphi(z: Any, h: Any) -> Any:
        return one

    return phi, dphi


@activation(needs="h", gain=2.0**0.5)
def relu(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = max(z, 0), NaN for NaN; phi' = 1 for h > 0, else 0. Source: Nair and Hinton (2010)."""
    zero, one, where = real(0), real(1), m.where

    def phi(z: Any) -> Any:
        return where(z < zero, zero, z)

    def dphi(z: Any, h: Any) -> Any:
        return where(h > zero, one, zero)

    return phi, dphi


@activation(
    needs="h",
    gain=lambda negative_slope=0.01: float((2 / (1 + negative_slope**2)) ** 0.5),
    aliases=("leakyrelu", "lrelu"),
)
def leaky_relu(real: Any, m: Any, negative_slope: float = 0.01) -> tuple[Phi, DPhi]:
    """phi(z) = z for z > 0, else negative_slope * z. Source: Maas et al. (2013)."""
    _at_least_zero(negative_slope=negative_slope)
    zero, one, where = real(0), real(1), m.where
    slope = constant(real, "negative_slope", negative_slope)

    def phi(z: Any) -> Any:
        return where(z > zero, z, slope * z)

    def dphi(z: Any, h: Any) -> Any:
        return where(h > zero, one, slope)

    return phi, dphi


@activation
def elu(real: Any, m: Any, alpha: float = 1.0) -> tuple[Phi, DPhi]:
    """phi(z) = z for z > 0, else alpha (e^z - 1); phi' = 1, else alpha e^z. Source: Clevert et al. (2016), eq. 15."""
    _at_least_zero(alpha=alpha)
    zero, one, alpha = real(0), real(1), constant(real, "alpha", alpha)
    exp, expm1, where = m.exp, m.expm1, m.where

    def phi(z: Any) -> Any:
        return where(z > zero, z, alpha * expm1(where(z > zero, zero, z)))

    def dphi(z: Any, h: Any) -> Any:
        return where(z > zero, one, alpha * exp(where(z > zero, zero, z)))

    return phi, dphi


@activation(gain=0.75)
def selu(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = scale * elu(z, alpha), scale = 1.0507..., alpha = 1.6732.... Source: Klambauer et al. (2017), eq. 2."""
    scale_alpha = real(1.0507009873554804934193349852946 * 1.6732632423543772848170429916717)
    zero, scale = real(0), real(1.0507009873554804934193349852946)
    exp, expm1, where = m.exp, m.expm1, m.where

    def phi(z: Any) -> Any:
        return where(z > zero, scale * z, scale_alpha * expm1(where(z > zero, zero, z)))

    def dphi(z: Any, h: Any) -> Any:
        return where(z > zero, scale, scale_alpha * exp(where(z > zero, zero, z)))

    return phi, dphi


@activation
def celu(real: Any, m: Any, alpha: float = 1.0) -> tuple[Phi, DPhi]:
    """phi(z) = z for z > 0, else alpha (e^(z/alpha) - 1); phi' = 1, else e^(z/alpha). Source: Barron (2017), eq. 2."""
    _positive(alpha=alpha)
    zero, one, alpha = real(0), real(1), constant(real, "alpha", alpha)
    exp, expm1, where = m.exp, m.expm1, m.where

    def phi(z: Any) -> Any:
        return where(z > zero, z, alpha * expm1(where(z > zero, zero, z) / alpha))

    def dphi(z: Any, h: Any) -> Any:
        return where(z > zero, one, exp(where(z > zero, zero, z) / alpha))

    return phi, dphi


@activation(gain=1.0, aliases=("logistic",))
def sigmoid(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = 1 / (1 + e^-z), written so that exp never overflows; phi' = e^-|z| / (1 + e^-|z|)^2."""
    zero, one = real(0), real(1)
    exp, fabs, where = m.exp, m.fabs, m.where

    def phi(z: Any) -> Any:
        e = exp(-fabs(z))
        return where(z < zero, e, one) / (one + e)

    def dphi(z: Any, h: Any) -> Any:
        e = exp(-fabs(z))
        return e / ((one + e) * (one + e))

    return phi, dphi


@activation(gain=5.0 / 3.0)
def tanh(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = tanh(z); phi' = 1 - tanh(z)^2 = 4 e^-2|z| / (1 + e^-2|z|)^2."""
    one, minus_two, four = real(1), real(-2), real(4)
    exp, fabs, tanh = m.exp, m.fabs, m.tanh

    def phi(z: Any) -> Any:
        return tanh(z)

    def dphi(z: Any, h: Any) -> Any:
        e = exp(minus_two * fabs(z))
        return four * e / ((one + e) * (one + e))

    return phi, dphi


@activation(needs="h")
def softplus(real: Any, m: Any, beta: float = 1.0) -> tuple[Phi, DPhi]:
    """phi(z) = log(1 + e^(beta z)) / beta; phi' = sigmoid(beta z) = 1 - e^(-beta h).

    Written as max(z, 0) + log1p(e^-|beta z|) / beta, exact for every z, where PyTorch returns z above a threshold of 20.
    Source: Dugas et al. (2001).
    """
    _positive(beta=beta)
    zero, inverse = real(0), constant(real, "1 / beta", 1 / beta)
    beta = constant(real, "beta", beta)
    exp, expm1, log1p, fabs, where = m.exp, m.expm1, m.log1p, m.fabs, m.where

    def phi(z: Any) -> Any:
        return where(z < zero, zero, z) + log1p(exp(-fabs(beta * z))) * inverse

    def dphi(z: Any, h: Any) -> Any:
        return -expm1(-beta * h)

    return phi, dphi


@activation
def softsign(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = z / (1 + |z|); phi' = 1 / (1 + |z|)^2. Source: Bergstra et al. (2009)."""
    one, fabs = real(1), m.fabs

    def phi(z: Any) -> Any:
        return z / (one + fabs(z))

    def dphi(z: Any, h: Any) -> Any:
        u = one / (one + fabs(z))
        return u * u

    return phi, dphi


@activation
def gelu(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = z P(Z <= z), Z ~ N(0, 1). Source: Hendrycks and Gimpel (2016), section 2.

    P(Z <= -t) = e^(-t^2/2) erfcx(t / sqrt 2) / 2 for t >= 0, and phi'(-t) = e^(-t^2/2) (erfcx(t / sqrt 2) / 2 - t / sqrt(2 pi)).
    With r = e^(-t^2/4); the rounding of t^2 is compensated, as in Dekker (1971): t^2 = s + rest. Beyond t = 80 r is 0 in
    either dtype.
    """
    zero, quarter, half, one, two, cut = real(0), real(0.25), real(0.5), real(1), real(2), real(80)
    inverse_sqrt_2, inverse_sqrt_2_pi = real(0.5**0.5), real((2 * np.pi) ** -0.5)
    splitter = real(2.0 ** ((np.finfo(real).nmant + 2) // 2) + 1)
    exp, erfcx, fabs, where = m.exp, m.erfcx, m.fabs, m.where

    def phi(z: Any) -> Any:
        t = where(fabs(z) > cut, cut, fabs(z))
        high = t * splitter - (t * splitter - t)
        low, s = t - high, t * t
        rest = ((high * high - s) + two * high * low) + low * low
        r = exp(-quarter * s)
        tail = half * erfcx(t * inverse_sqrt_2) * (one - half * rest)
        return where(z < zero, zero, z) + where(z < zero, z, -t) * tail * r * r

    def dphi(z: Any, h: Any) -> Any:
        t = where(fabs(z) > cut, cut, fabs(z))
        high = t * splitter - (t * splitter - t)
        low, s = t - high, t * t
        rest = ((high * high - s) + two * high * low) + low * low
        r = exp(-quarter * s)
        tail = (half * erfcx(t * inverse_sqrt_2) - t * inverse_sqrt_2_pi) * (one - half * rest) * r * r
        return where(z < zero, tail, one - tail)

    return phi, dphi


@activation
def gelu_tanh(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = z (1 + tanh u) / 2 = z sigmoid(2 u), u = sqrt(2/pi) (z + 0.044715 z^3). Source: Hendrycks and Gimpel (2016).

    With r = e^-|u| and e = r^2: sigmoid(2 u) is e / (1 + e) for z < 0, else 1 / (1 + e), and phi' = sigmoid(2 u) (1 + 2 u' z
    sigmoid(-2 u)). Beyond |z| = 30 r is 0 in either dtype, so z is cut there: z^3 would overflow.
    """
    zero, one, two, cut = real(0), real(1), real(2), real(30)
    k, c, c3 = real((2 / np.pi) ** 0.5), real(0.044715), real(3 * 0.044715)
    exp, fabs, where = m.exp, m.fabs, m.where

    def phi(z: Any) -> Any:
        x = fabs(z)
        x = where(x > cut, cut, x)
        r = exp(-(k * x * (one + c * x * x)))
        n = where(z < zero, r, one)
        return z * n * n / (one + r * r)

    def dphi(z: Any, h: Any) -> Any:
        x = fabs(z)
        x = where(x > cut, cut, x)
        r = exp(-(k * x * (one + c * x * x)))
        n = where(z < zero, r, one)
        w = one / (one + r * r)
        y = two * k * (one + c3 * x * x) * x
        return n * (one + where(z < zero, -y, y * r * r) * w) * n * w

    return phi, dphi


@activation(aliases=("swish",))
def silu(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = z s, s = sigmoid(z); phi' = s (1 + z (1 - s)). Source: Elfwing et al. (2018), eq. 3 and 4.

    With r = e^(-|z|/2): s is r^2 / (1 + r^2) for z < 0, else 1 / (1 + r^2).
    """
    zero, half, one = real(0), real(0.5), real(1)
    exp, fabs, where = m.exp, m.fabs, m.where

    def phi(z: Any) -> Any:
        r = exp(-half * fabs(z))
        n = where(z < zero, r, one)
        return z * n * n / (one + r * r)

    def dphi(z: Any, h: Any) -> Any:
        r = exp(-half * fabs(z))
        n = where(z < zero, r, one)
        w = one / (one + r * r)
        return n * (one + where(z < zero, z, z * r * r) * w) * n * w

    return phi, dphi


@activation
def mish(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = z t, t = tanh(softplus(z)); phi' = t + z (1 - t^2) sigmoid(z). Source: Misra (2019), eq. 1.

    With u = e^z and w = u (u + 2): t = w / (w + 2), 1 - t^2 = 4 (w + 1) / (w + 2)^2, w + 1 = (u + 1)^2. Above z = 20, t is 1 to
    the last bit of a float64, so z is cut there.
    """
    zero, half, one, two, four, cut = real(0), real(0.5), real(1), real(2), real(4), real(20)
    exp, where = m.exp, m.where

    def phi(z: Any) -> Any:
        r = exp(half * where(z > cut, cut, z))
        u = r * r
        n, rest = where(z < zero, r, one), where(z < zero, one, u)
        return z * n * (rest * (u + two) / (u * (u + two) + two)) * n

    def dphi(z: Any, h: Any) -> Any:
        x = where(z > cut, cut, z)
        r = exp(half * x)
        u = r * r
        inverse = one / (u * (u + two) + two)
        return (r * (u + two) + four * (r * x) * ((one + u) * inverse)) * inverse * r

    return phi, dphi


@activation(needs="h", aliases=("hardsigmoid",))
def hard_sigmoid(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = min(max((z + 3) / 6, 0), 1); phi' = 1/6 for 0 < h < 1, else 0 (PyTorch's; others have slope 1/5)."""
    zero, half, one, three, sixth = real(0), real(0.5), real(1), real(3), real(1 / 6)
    fabs, where = m.fabs, m.where

    def phi(z: Any) -> Any:
        h = (z + three) * sixth
        return where(h < zero, zero, where(h > one, one, h))

    def dphi(z: Any, h: Any) -> Any:
        return where(fabs(h - half) < half, sixth, zero)

    return phi, dphi


@activation(aliases=("hardswish", "hard_silu"))
def hard_swish(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = z hard_sigmoid(z); phi' = 0 for z <= -3, 1 for z >= 3, else (2 z + 3) / 6. Source: Howard et al. (2019)."""
    zero, one, three, three_halves = real(0), real(1), real(3), real(1.5)
    sixth, third, where = real(1 / 6), real(1 / 3), m.where

    def phi(z: Any) -> Any:
        h = (z + three) * sixth
        return z * where(h < zero, zero, where(h > one, one, h))

    def dphi(z: Any, h: Any) -> Any:
        return where(z <= -three, zero, where(z >= three, one, (z + three_halves) * third))

    return phi, dphi


@activation(needs="h")
def squareplus(real: Any, m: Any, b: float = 4.0) -> tuple[Phi, DPhi]:
    """phi(z) = (z + sqrt(z^2 + b)) / 2; phi' = h^2 / (h^2 + b/4). Source: Barron (2021), eq. 1; b = 4 as in JAX.

    For z < 0 the sum cancels, so phi is written b / (2 (sqrt(z^2 + b) - z)) there. Above ``cut`` phi(z) is z to the last bit,
    since b is at most 1e14, and z^2 might overflow.
    """
    check_number("b", b, lambda x: 0 < x <= 1e14, "in (0, 1e14]")
    quarter_b, b = constant(real, "b / 4", b / 4), constant(real, "b", b)
    zero, half, cut = real(0), real(0.5), real(1e15)
    sqrt, fabs, where = m.sqrt, m.fabs, m.where

    def phi(z: Any) -> Any:
        x = fabs(z)
        y = where(x > cut, cut, x)
        c = where(x > cut, x, half * (y + sqrt(y * y + b)))
        return where(z < zero, quarter_b / c, c)

    def dphi(z: Any, h: Any) -> Any:
        x = where(h > cut, cut, h)
        u = x * x
        return u / (u + quarter_b)

    return phi, dphi


@activation(aliases=("sine",))
def sin(real: Any, m: Any) -> tuple[Phi, DPhi]:
    """phi(z) = sin(z); phi' = cos(z). Source: Sitzmann et al. (2020), eq. 2, without the factor omega_0."""
    sin, cos = m.sin, m.cos

    def phi(z: Any) -> Any:
        return sin(z)

    def dphi(z: Any, h: Any) -> Any:
        return cos(z)

    return phi, dphi
