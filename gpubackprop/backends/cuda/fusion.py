"""Passes fused with the dropout after or before them, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpubackprop.definitions import address
from gpubackprop.step.operations import BiasActivationBackward, BiasActivationForward, Dropout, Operation


@dataclass(frozen=True, eq=False)
class WithDropout:
    """A pass and the dropout after it (forward) or before it (backward), in one launch with the same bits.

    ``output``: the activation before the dropout is written too.
    """

    operation: BiasActivationForward | BiasActivationBackward
    dropout: Dropout
    output: bool = True

    @property
    def name(self) -> str:
        """That of the pass."""
        return self.operation.name


def fuse_dropout(operations: Sequence[Operation]) -> list[Operation | WithDropout]:
    """Return operations with dropout fused into a neighbouring pass; activations that only dropout reads are not written."""
    pending = list(operations)
    result: list[Operation | WithDropout] = []
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
