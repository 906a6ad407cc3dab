"""Operations that one launch does: gathers of the same rows, passes with dropout, and a backward pass with the product before it.

A narrow product has sums of at most :data:`~gpubackprop.kernels.cuda.passes.NARROW` terms: mostly dh_L = do W_oᵀ of a network with
few outputs, which is too little work for a launch. Our own kernel always computes it, in one order of summation, so that a step
has the bits of its operations; in float32, also under ``matmul_precision="tf32"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from gpubackprop.definitions import Array, address
from gpubackprop.kernels.cuda.passes import NARROW
from gpubackprop.kernels.cuda.storage import VECTOR_BYTES
from gpubackprop.step.operations import (
    BiasActivationBackward,
    BiasActivationForward,
    Dropout,
    Gather,
    Matmul,
    Operation,
)

MOST_GATHERS = 3
"""X, y and sample weights."""


class Fused:
    """Operations that one launch does, with the bits of one after another."""

    parts: tuple[Operation, ...]
    name: str

    @property
    def read(self) -> list[Array]:
        """The arrays that they read."""
        return [a for operation in self.parts for a in operation.read]

    @property
    def written(self) -> list[Array]:
        """The arrays that they write, at most."""
        return [a for operation in self.parts for a in operation.written]


@dataclass(frozen=True, eq=False)
class WithDropout(Fused):
    """A pass and the dropout after it (forward) or before it (backward).

    ``output``: the activation before the dropout is written too.
    """

    operation: BiasActivationForward | BiasActivationBackward
    dropout: Dropout
    output: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the pass."""
        return self.operation.name

    @property
    def parts(self) -> tuple[Operation, ...]:  # type: ignore[override]
        """Both."""
        return self.operation, self.dropout


@dataclass(frozen=True, eq=False)
class Gathers(Fused):
    """Gathers of the same rows from several arrays."""

    parts: tuple[Gather, ...]
    name = "gather"


@dataclass(frozen=True, eq=False)
class WithProduct(Fused):
    """A backward pass, perhaps with dropout, and the product before it, which is its dh."""

    product: Matmul
    operation: BiasActivationBackward
    dropout: Dropout | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the pass."""
        return self.operation.name

    @property
    def parts(self) -> tuple[Operation, ...]:  # type: ignore[override]
        """All of them."""
        return (self.product, self.operation, *(() if self.dropout is None else (self.dropout,)))


def is_narrow(o: Matmul) -> bool:
    """Return whether a product is one of :func:`~gpubackprop.kernels.cuda.passes.narrow_product`, by its shape."""
    return bool(
        o.a.shape[1] <= NARROW and o.a.flags.c_contiguous and o.b.flags.f_contiguous and o.out.dtype == o.a.dtype
    )


def is_planned(item: Operation | Fused) -> TypeGuard[Matmul]:
    """Return whether an operation is a product of cuBLASLt or cuBLAS, which has no launches of ours."""
    return isinstance(item, Matmul) and not is_narrow(item)


def fuse_products(operations: Sequence[Operation | Fused]) -> list[Operation | Fused]:
    """Return operations with narrow products fused into the backward pass that overwrites their result."""
    result: list[Operation | Fused] = []
    for operation in operations:
        before = result[-1] if result else None
        dropout = operation.dropout if isinstance(operation, WithDropout) else None
        second = operation.operation if isinstance(operation, WithDropout) else operation
        if isinstance(before, Matmul) and isinstance(second, BiasActivationBackward) and is_narrow(before):
            dh, out = second.dh if dropout is None else dropout.x, second.out
            # a line of the kernel is one row then, without the product too: the order of the sums is the same
            one_row = out.nbytes // len(out) % VECTOR_BYTES == 0
            if one_row and address(before.out) == address(dh) == address(out):
                result[-1] = WithProduct(before, second, dropout)
                continue
        result.append(operation)
    return result


def fuse_gathers(operations: Sequence[Operation]) -> list[Operation | Fused]:
    """Return operations with neighbouring gathers of the same rows fused."""
    result: list[Operation | Fused] = []
    for operation in operations:
        before = result[-1] if result else None
        if isinstance(operation, Gather) and isinstance(before, Gather | Gathers):
            parts = before.parts if isinstance(before, Gathers) else (before,)
            if len(parts) < MOST_GATHERS and _rows(parts[0]) == _rows(operation):
                result[-1] = Gathers((*parts, operation))
                continue
        result.append(operation)
    return result


def _rows(o: Gather) -> tuple[int, ...]:
    """Return what says which rows a gather takes, and from how many."""
    return address(o.order), len(o.order), address(o.counters), len(o.source), len(o.out)


def fuse_dropout(operations: Sequence[Operation | Fused]) -> list[Operation | Fused]:
    """Return operations with dropout fused into a neighbouring pass; activations that only dropout reads are not written."""
    pending = list(operations)
    result: list[Operation | Fused] = []
    while pending:
        first = pending.pop(0)
        second = pending[0] if pending else None
        if isinstance(first, BiasActivationForward) and isinstance(second, Dropout):
            in_place = address(first.out) in (address(first.z), address(second.out))
            result.append(WithDropout(first, second, first.activation.needs == "h" or in_place))
            pending.pop(0)
        elif isinstance(first, Dropout) and isinstance(second, BiasActivationBackward):
            result.append(WithDropout(second, first))
            pending.pop(0)
        else:
            result.append(first)
    return result
