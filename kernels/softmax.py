"""The log softmax of a row and the gradient through it: one definition for the kernels of all devices.

For the outputs o of a row, the targets t and u = 1 / classes:

    top   = max_j o_j,  x_j = o_j - top,  s = sum_j e^x_j
    q_j   = x_j - log s                                  the log of the softmax
    loss  = sum_j ell(q_j, target(t_j, u))
    g_j   = dell(q_j, target(t_j, u))
    do_j  = g_j - p_j sum_k g_k,  p_j = e^q_j            the chain rule through log softmax

A kernel has loops over the elements, and the sums between them; the work on one element is here. A kernel that keeps the
terms e^x_j computes p_j sum_k g_k as e^x_j (sum_k g_k / s), without another exponential.

Infinite and missing numbers:

- The maximum begins at -inf, so a masked output of -inf has the term 0 and q = -inf; its p is 0. Its part of a loss is 0 where
  its target is 0: a loss's ell has no 0 * inf. The largest term is 1, so log s is finite.
- In a row with NaN or +inf, or with only -inf, each q is NaN: an error shows.
- A class index out of range matches no column: the targets of the row are 0, and nothing is read through the index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpubackprop.definitions import Math
from gpubackprop.losses import Loss


class LogSoftmax(NamedTuple):
    """The functions that loss kernels apply to one element; see the module."""

    lowest: Any
    """The initial value of a maximum."""
    shift: Any
    """shift(o, top) -> x"""
    term: Any
    """term(x) -> e^x; term(q) -> p"""
    log_probability: Any
    """log_probability(x, log_s) -> q"""
    one_hot: Any
    """one_hot(j, own_class) -> the target t of column j"""
    value: Any
    """value(q, t, u) -> the element's part of the loss"""
    slope: Any
    """slope(q, t, u) -> g"""
    gradient: Any
    """gradient(g, p, total) -> do, total = sum_k g_k; or with e^x for p, total = sum_k g_k / s"""


def define_log_softmax(
    loss: Loss, dtype: np.dtype[Any], m: Math, inlined: Callable[[Callable[..., Any]], Any]
) -> LogSoftmax:
    """Return the functions of a softmax loss for numbers of ``dtype``, with a device's mathematics and its inlining decorator."""
    target, ell, dell = map(inlined, loss.scalars(dtype, m))
    zero, one, exp, where = dtype.type(0), dtype.type(1), m.exp, m.where

    def shift(o: Any, top: Any) -> Any:
        return o - top

    def term(x: Any) -> Any:
        return exp(x)

    def log_probability(x: Any, log_s: Any) -> Any:
        return x - log_s

    def one_hot(j: Any, own_class: Any) -> Any:
        return where(j == own_class, one, zero)

    def value(q: Any, t: Any, u: Any) -> Any:
        return ell(q, target(t, u))

    def slope(q: Any, t: Any, u: Any) -> Any:
        return dell(q, target(t, u))

    def gradient(g: Any, p: Any, total: Any) -> Any:
        return g - p * total

    functions: tuple[Callable[..., Any], ...] = shift, term, log_probability, one_hot, value, slope, gradient
    return LogSoftmax(dtype.type(-np.inf), *map(inlined, functions))
