"""The reference backend: plain NumPy, nothing fused. It defines every operation, and is the oracle and the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from gpubackprop.backends.base import Call, Run
from gpubackprop.backends.checks import check_arrays
from gpubackprop.backends.host import HostBackend
from gpubackprop.definitions import NUMPY, Array, real_of
from gpubackprop.machine.host import blas
from gpubackprop.philox import keep_threshold, random_uint32
from gpubackprop.step import Step
from gpubackprop.step import operations as table
from gpubackprop.step.state import (
    C1,
    C2,
    CURSOR,
    FACTOR,
    GOOD,
    GROW,
    GROW_AFTER,
    LARGEST_SCALE,
    LEAST_SCALE,
    NORM,
    RATE,
    SCALE,
    SHRINK,
    SKIP,
    STEPS,
)  # fmt: skip

# infinity and NaN stay in the results, as on every device
quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")

PARTIAL_SUM = 4096  # terms of a product added in the arrays' dtype; these partial sums are added in float64


class ReferenceBackend(HostBackend):
    """See :class:`gpubackprop.backends.base.Backend`; a method ``do_NAME`` for each operation is its definition."""

    device = "reference"

    @cached_property
    def decides_bits(self) -> dict[str, str]:
        found = {b["internal_api"]: f"{b['version']} {b['architecture'] or ''}".strip() for b in blas()}
        return {"NumPy": np.__version__} | {f"NumPy's {name}": text for name, text in found.items() if name != "openmp"}

    def bind(self, operation: table.Operation) -> Call:
        check_arrays(self, operation, bound=True)
        return self.execute, (operation,)

    def compile(self, step: Step) -> Run:
        return loop([self.bind(operation) for operation in step.bound()])

    @quiet
    def execute(self, operation: table.Operation) -> None:
        getattr(self, f"do_{operation.name}")(operation)

    def do_matmul(self, o: table.Matmul) -> None:
        a, b, depth = _wide(o.a), _wide(o.b), o.a.shape[1]
        if depth <= PARTIAL_SUM and a is o.a and o.out.dtype == a.dtype:
            np.matmul(a, b, out=o.out)
            return
        total = np.zeros(o.out.shape) if depth > PARTIAL_SUM else 0
        for k in range(0, depth, PARTIAL_SUM):
            total = total + np.matmul(a[:, k : k + PARTIAL_SUM], b[k : k + PARTIAL_SUM])
        o.out[...] = total

    def do_bias_activation_forward(self, o: table.BiasActivationForward) -> None:
        wide = _wide(o.z) + _wide(o.b)
        o.z[...] = wide
        o.out[...] = o.activation.phi(wide)

    def do_bias_activation_backward(self, o: table.BiasActivationBackward) -> None:
        at = _wide(o.at)
        delta = _wide(o.dh) * o.activation.dphi(at, at)
        o.db[...] = delta.sum(axis=0, dtype=np.float64)
        o.out[...] = delta

    def do_bias_loss(self, o: table.BiasLoss) -> None:
        n, d = o.samples or len(o.z), o.z.shape[1]
        outputs = _wide(o.z) + _wide(o.b)
        o.z[...] = outputs
        ell, do = o.loss.per_sample(outputs, o.y)
        scale = o.loss.scale(n, d, o.weight is not None)
        if o.weight is not None:
            ell, do = ell * o.weight, do * o.weight[:, None]
        o.value[0] = scale * ell.sum(dtype=np.float64)
        terms = o.total[0] if o.total is not None else n if o.loss.reduction == "mean" else 1
        o.value[1] += o.value[0] * terms
        do = do * do.dtype.type(scale if o.scalars is None else scale * o.scalars[SCALE])
        o.db[...] = do.sum(axis=0, dtype=np.float64)
        o.out[...] = do

    def do_normalize_weights(self, o: table.NormalizeWeights) -> None:
        top = np.float64(o.weight.max()) or 1.0  # relative to the largest, no sum overflows or underflows
        share = o.weight / top
        shares = share.sum()
        if o.total is not None:
            o.total[0] = shares * top
        o.out[...] = share / (shares or 1.0)

    def do_dropout(self, o: table.Dropout) -> None:
        random = random_uint32(o.x.size, o.seed, int(o.counters[STEPS]), o.layer, o.first_block).reshape(o.x.shape)
        keep = random < keep_threshold(o.rate)
        scale = real_of(o.x.dtype).type(1 / (1 - o.rate))
        o.out[...] = np.where(keep, _wide(o.x) * scale, scale * 0)

    def do_gather(self, o: table.Gather) -> None:
        last = len(o.order) - 1
        places = np.arange(len(o.out)) + min(max(int(o.counters[CURSOR]), 0), last)
        np.take(o.source, o.order[np.minimum(places, last)], axis=0, out=o.out, mode="clip")

    def do_accumulate(self, o: table.Accumulate) -> None:
        o.out[...] = o.term if o.total is None else o.total + o.term

    def do_clip(self, o: table.Clip) -> None:
        g, scalars = o.gradients, o.scalars
        scale = np.float64(scalars[SCALE] if o.loss_scaling else 1.0)
        top = np.float64(np.maximum(np.max(np.abs(g)), 1))  # relative to it, no square overflows
        norm = np.sqrt(np.sum((g / top) ** 2)) if np.isfinite(top) else top
        scalars[SKIP] = o.loss_scaling and not np.isfinite(norm)
        scalars[NORM] = norm * (top / scale)
        most = o.max_norm / top
        factor = most * scale / (norm + 1e-6 / top * scale) if np.isfinite(top) else most
        scalars[FACTOR] = np.minimum(1.0, factor) / scale

    def do_advance(self, o: table.Advance) -> None:
        optimizer, counters, scalars = o.optimizer, o.counters, o.scalars
        if o.loss_scaling:
            grow = scalars[GOOD] + 1 >= GROW_AFTER
            scale = scalars[SCALE] * (SHRINK if scalars[SKIP] else GROW if grow else 1.0)
            scalars[SCALE] = min(max(scale, LEAST_SCALE), LARGEST_SCALE)
            scalars[GOOD] = 0 if scalars[SKIP] or grow else scalars[GOOD] + 1
            if scalars[SKIP]:
                counters[CURSOR] += o.batch
                return
        constants, _ = optimizer.define(np.float64, NUMPY)
        factor = optimizer.schedule.define(NUMPY)
        t = float(counters[STEPS])
        scalars[RATE], scalars[C1], scalars[C2] = constants(
            t + 1.0, o.rate[0] * factor(t, *optimizer.schedule.numbers), *optimizer.numbers
        )
        counters += (1, o.batch)

    def do_update(self, o: table.Update) -> None:
        if o.weights is not None and o.scalars[SKIP]:
            return
        optimizer, real = o.optimizer, o.parameters.dtype.type
        _, clip_value = optimizer.clipping
        _, update = optimizer.define(real, NUMPY)
        g = o.gradients * o.scalars[FACTOR]
        if clip_value is not None:
            g = np.clip(g, -clip_value, clip_value)
        states = [*o.states] if optimizer.n_states else []
        padded = [*states, *[real(0)] * (3 - len(states))]
        numbers = o.scalars[RATE], o.scalars[C1], o.scalars[C2], *map(real, optimizer.numbers)
        o.parameters[:], *new = update(o.parameters, g, *padded, *numbers)
        for state, values in zip(states, new, strict=False):
            state[:] = values
        if o.weights is not None:
            o.weights[:] = o.parameters


def loop(calls: Sequence[Call]) -> Run:
    """Return a function that makes the calls one after another."""

    def run(times: int = 1) -> None:
        for _ in range(times):
            for function, arguments in calls:
                function(*arguments)

    return run


def _wide(a: Array) -> Array:
    """Return an array in the dtype of its arithmetic."""
    return a.astype(real_of(a.dtype), copy=False)
