"""Products fused with the next operation, as cuBLASLt epilogues.

cuBLASLt can end a product with bias + activation, or with the activation's derivative and the bias gradient. That saves a
launch and a pass over memory. A rule decides which pairs are fused, never a measurement: the bits of a training depend
only on its shapes and its device.

========  ===============================================  =====================================================
epilogue  pair                                             used with
========  ===============================================  =====================================================
BIAS      product, identity                                "auto", "all": one sum more per element, NaN stays NaN
GELU      product, gelu_tanh; product, gelu_tanh backward  "all"
RELU      product, relu                                    "all"
========  ===============================================  =====================================================

GELU is not in "auto" because cuBLASLt was seen to take longer with it than a product and a separate kernel, in float32 and
bfloat16 (github.com/karpathy/llm.c/pull/338; llm.c has it off). RELU is not because it turns NaN into 0, which hides a
training that diverges: an output that should be NaN is a number. It would save a launch per hidden layer (of 784-256-128-10 two of
the twelve in the longest chain) and 8 bytes per element in float32; a check that finds the NaN reads what the saved pass reads.
Where cuBLASLt has no such product, or an address is not a multiple of 16, the two operations stay separate.
:attr:`gpubackprop.backends.cuda.backend.CudaBackend.epilogue_choices` says what was chosen and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from gpubackprop.backends.cuda.fusion import Fused
from gpubackprop.backends.cuda.products import (
    ALIGNMENT,
    Epilogue,
    Plan,
    Products,
    UnsupportedProductError,
    alignment_of,
    kind_of,
)
from gpubackprop.definitions import Array, address
from gpubackprop.step.operations import BiasActivationBackward, BiasActivationForward, Matmul, Operation

WHY_NOT = {
    Epilogue.GELU_AUX_BIAS: "cuBLASLt was seen to take longer than two kernels; epilogues='all' uses it",
    Epilogue.DGELU_BGRAD: "cuBLASLt was seen to take longer than two kernels; epilogues='all' uses it",
    Epilogue.RELU_BIAS: "it turns NaN into 0; epilogues='all' uses it",
}
"""Why "auto" omits an epilogue."""


@dataclass(frozen=True)
class Choice:
    """Whether a product is fused with the operation after it, and why."""

    pair: str
    fused: bool
    reason: str


def epilogue_of(first: Any, second: Any) -> tuple[Any, Array, Array | None] | None:
    """Return the epilogue for ``second`` after the product ``first``, its vector and its matrix, or None."""
    if not isinstance(first, Matmul) or not isinstance(second, BiasActivationForward | BiasActivationBackward):
        return None
    p, q, forward = first, cast(Any, second), isinstance(second, BiasActivationForward)
    activation = q.activation
    if activation.parameters or address(p.out) != address(q.z if forward else q.dh):
        return None
    in_place = address(q.out) == address(p.out)
    aligned = p.b.shape[1] % 8 == 0  # the leading dimension of the epilogue's matrix
    if forward and activation.name == "identity" and in_place:
        return Epilogue.BIAS, q.b, None
    if forward and activation.name == "relu" and in_place:
        return Epilogue.RELU_BIAS, q.b, None
    if forward and activation.name == "gelu_tanh" and aligned and not in_place:
        return Epilogue.GELU_AUX_BIAS, q.b, q.z
    if not forward and activation.name == "gelu_tanh" and aligned and in_place and q.db.dtype == q.out.dtype:
        return Epilogue.DGELU_BGRAD, q.db, q.z
    return None


@dataclass(frozen=True, eq=False)
class WithEpilogue(Fused):
    """A product and the operation after it, as cuBLASLt has planned them."""

    name: str
    parts: tuple[Operation, ...]
    plan: Plan
    a: Array
    b: Array
    out: Array


class Epilogues:
    """Chooses, for each pair of operations, between two launches and one product with an epilogue.

    Parameters
    ----------
    products : Products
    mode : {"auto", "all", "off"}
        The pairs of the rule above; every pair that cuBLASLt has; none.
    """

    def __init__(self, products: Products, mode: str) -> None:
        self.products, self.mode = products, mode
        self.choices: dict[str, Choice] = {}

    def fuse(self, operations: Sequence[Operation | Fused]) -> list[Operation | Fused]:
        """Return operations with the chosen pairs fused."""
        result: list[Operation | Fused] = []
        pending = list(operations)
        while pending:
            first = pending.pop(0)
            fused = self._fused(first, pending[0]) if pending and self.mode != "off" else None
            if fused is not None:
                pending.pop(0)
            result.append(fused or first)
        return result

    def _fused(self, first: Any, second: Any) -> WithEpilogue | None:
        """Return a product fused with ``second``, or None; record the choice."""
        found = epilogue_of(first, second)
        if found is None:
            return None
        epilogue, vector, matrix = found
        a, b, out = first.a, first.b, second.out
        (m, k), n = a.shape, b.shape[1]
        name = f"{epilogue.name.lower()} {m}x{n}x{k} {a.dtype.name}{' tf32' if self.products.tf32 else ''}"
        fused, reason = None, "" if self.mode == "all" else WHY_NOT.get(epilogue, "")
        if not reason and alignment_of(vector, *([] if matrix is None else [matrix])) < ALIGNMENT:
            name, reason = f"{name} not aligned", f"an address is not a multiple of {ALIGNMENT}"
        if not reason:
            try:
                plan = Plan(
                    self.products.handle, kind_of(a, b, out), tf32=self.products.tf32, epilogue=epilogue,
                    bias=address(vector), aux=0 if matrix is None else address(matrix), aux_ld=n,
                    alignment=alignment_of(a, b, out), workspace=self.products.most_workspace,
                )  # fmt: skip
                fused = WithEpilogue(name, (first, second), plan, a, b, out)
            except UnsupportedProductError as error:
                reason = str(error)
        self.choices[name] = Choice(name, fused is not None, reason or "it saves a launch and a pass over memory")
        return fused
