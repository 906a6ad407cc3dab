"""CPU kernels of the forward and backward pass: one pass over memory each, compiled by Numba from the definitions.

They know no activation, loss or optimizer by name. Loops run over rows, the inner one over columns, so that every array is
read in memory order and the inner loop is vectorized. Where an output may be an input there are two variants
(``in_place``): the compiler vectorizes only if it knows whether they are the same array.

The order of every sum is defined, and so the same on every machine. A column sum adds ROWS rows in their order, then
those sums in pairs, pairs of pairs and so on. A sum along a row is in order where the row is short, and otherwise in lanes
(:func:`gpubackprop.kernels.cpu.vector.define_sum`), as is the norm of the gradient. The losses of the rows are added in float64.

The last two arguments of each are ``piece`` and ``pieces``: pieces are rows, columns or elements, never parts of a sum, so that no
result depends on their number. The first piece alone does what is too small to share.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubackprop.activations import Activation
from gpubackprop.definitions import per_definition
from gpubackprop.kernels.cpu.compile import Kernel, compiled, inlined, share
from gpubackprop.kernels.cpu.math import vector_math
from gpubackprop.kernels.cpu.threads import is_last
from gpubackprop.kernels.cpu.vector import define_column_sums, shape_for

ROWS = 16  # rows in a share with its own sums; few enough that they lose no digits
SHORT = 32  # numbers in a row from which on a loop over it fills vectors; shorter rows are taken several at a time


def shares_of(n: int) -> int:
    """Return the number of shares of n rows, each with its own sums."""
    return -(-n // ROWS)


@inlined
def add_shares(sums, total):  # type: ignore[no-untyped-def]
    """Add the sums of all shares in pairs, pairs of pairs and so on; the shares' own sums are lost."""
    apart = 1
    while apart < sums.shape[0]:
        for k in range(0, sums.shape[0] - apart, 2 * apart):
            for j in range(sums.shape[1]):
                sums[k, j] += sums[k + apart, j]
        apart *= 2
    total[:] = sums[0]


@per_definition(vector_math)
def compile_bias_activation_forward(activation: Activation, dtype: np.dtype[Any], in_place: bool) -> Kernel:
    """Return kernel(z, b, h): z <- z + b, h = phi(z); in place, h is z: z <- phi(z + b)."""
    phi = inlined(activation.scalars(dtype, vector_math(dtype))[0])

    def forward(z, b, h, piece, pieces):  # type: ignore[no-untyped-def]
        first, last = share(z.shape[0], 1, piece, pieces)
        for i in range(first, last):
            for j in range(z.shape[1]):
                z_ij = z[i, j] + b[j]
                if in_place:
                    z[i, j] = phi(z_ij)
                else:
                    z[i, j] = z_ij
                    h[i, j] = phi(z_ij)

    return compiled(forward)


@per_definition(vector_math)
def compile_bias_activation_backward(activation: Activation, dtype: np.dtype[Any], in_place: bool) -> Kernel:
    """Return kernel(dh, s, delta, db, sums, arrived), s = h or z as phi' needs; in place, delta is dh.

    ``sums`` is memory for the column sums of each share, (shares_of(n), d), and ``arrived`` (1,) int64 is 0.
    """
    dphi = inlined(activation.scalars(dtype, vector_math(dtype))[1])
    zero, size, columns, column_sums = (
        dtype.type(0),
        dtype.itemsize,
        shape_for(dtype).columns,
        define_column_sums(dtype),
    )

    def backward(dh, s, delta, db, sums, arrived, piece, pieces):  # type: ignore[no-untyped-def]
        (n, d), (first, last) = dh.shape, share(sums.shape[0], 1, piece, pieces)
        flat_dh, flat_s, flat_delta = dh.reshape(-1), s.reshape(-1), delta.reshape(-1)
        for k in range(first, last):
            begin, end, sums_k = k * ROWS, min((k + 1) * ROWS, n), sums[k]
            if d < SHORT:
                dh_k, s_k, delta_k = (
                    flat_dh[begin * d : end * d],
                    flat_s[begin * d : end * d],
                    flat_delta[begin * d : end * d],
                )
                for e in range(dh_k.size):  # from 0, which the compiler vectorizes
                    delta_e = dh_k[e] * dphi(s_k[e], s_k[e])
                    if in_place:
                        dh_k[e] = delta_e
                    else:
                        delta_k[e] = delta_e
                for j in range(0, d, columns):
                    at = delta.ctypes.data + (begin * d + j) * size
                    column_sums(at, d, sums_k.ctypes.data + j * size, min(columns, d - j), end - begin)
                continue
            sums_k[:] = zero
            for i in range(begin, end):
                for j in range(d):
                    delta_ij = dh[i, j] * dphi(s[i, j], s[i, j])
                    if in_place:
                        dh[i, j] = delta_ij
                    else:
                        delta[i, j] = delta_ij
                    sums_k[j] += delta_ij
        if is_last(arrived, pieces):
            add_shares(sums, db)

    return compiled(backward)
