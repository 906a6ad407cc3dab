"""Products that do the next operation on their way to memory, where that was measured to be faster on this device.

cuBLASLt can end a product with bias + activation, or with the activation's derivative and the bias gradient. That saves a
pass over memory, but the fused products are sometimes slower than the plain ones by more than that. So each pair of
operations is timed both ways, once per shape, dtype and device; the winner is kept on disk, so that a step has the same
bits in the next process, and why it won is kept beside it.

Two pairs have an epilogue that means the same as our kernel: identity and gelu_tanh. The relu epilogues turn NaN into 0,
which hides a diverging training, so they are used only with ``epilogues="all"``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cupy

from gpubackprop import cache
from gpubackprop.backends.cublaslt import Epilogue, Plan, Products, UnsupportedProductError, layout
from gpubackprop.backends.nvtx import Ranged, plain
from gpubackprop.definitions import address, fingerprint
from gpubackprop.step import Operation

Call = tuple[Callable[..., Any], tuple[Any, ...]]
MODES = ("auto", "all", "off")
ROUNDS, REPEATS = 7, 5


@dataclass(frozen=True)
class Choice:
    """What was measured for one pair of operations, and which way won."""

    pair: str
    plain_us: float
    fused_us: float
    fused: bool
    reason: str


def fused_call(products: Products, first: Operation, second: Operation, mode: str) -> tuple[str, Call] | None:
    """Return (name, call) of a product that does ``second`` in its epilogue, or None where there is none."""
    if first.name != "matmul" or second.name not in ("bias_activation_forward", "bias_activation_backward"):
        return None
    p, q = first.arguments, second.arguments
    activation, forward = q["activation"], second.name == "bias_activation_forward"
    aligned = p["b"].shape[1] % 8 == 0  # the leading dimension of the epilogue's matrix
    if activation.parameters or q.get("dropout") or address(p["out"]) != address(q["z"] if forward else q["dh"]):
        return None
    epilogue, vector, matrix, out = None, None, None, q["out"]
    in_place = address(out) == address(p["out"])
    if forward and activation.name == "gelu_tanh" and aligned and not in_place:
        epilogue, vector, matrix = Epilogue.GELU_AUX_BIAS, q["b"], q["z"]
    elif forward and activation.name == "identity" and in_place:
        epilogue, vector = Epilogue.BIAS, q["b"]
    elif forward and activation.name == "relu" and in_place and mode == "all":
        epilogue, vector = Epilogue.RELU_BIAS, q["b"]
    elif not forward and activation.name == "gelu_tanh" and aligned and in_place and q["db"].dtype == out.dtype:
        epilogue, vector, matrix = Epilogue.DGELU_BGRAD, q["db"], q["z"]
    if epilogue is None or vector is None:
        return None
    a, b = p["a"], p["b"]
    (m, k), n = a.shape, b.shape[1]
    try:
        plan = Plan(
            products.handle, m, n, k, layout(a)[0], layout(b)[0], a.dtype.name, out.dtype.name, tf32=products.tf32,
            epilogue=epilogue, bias=address(vector), aux=address(matrix) if matrix is not None else 0, aux_ld=n,
            alignment=16, workspace=products.workspace.nbytes,
        )  # fmt: skip
    except UnsupportedProductError:
        return None
    arguments = (address(a), address(b), address(out), products.workspace.data.ptr, products.workspace.nbytes)

    def run() -> None:
        plan(*arguments, cupy.cuda.get_current_stream().ptr)

    name = f"{epilogue.name.lower()} {m}x{n}x{k} {a.dtype.name}{' tf32' if products.tf32 else ''}"
    return name, (run, ())


class Autotuner:
    """Chooses, for each pair of operations, between two kernels and one product with an epilogue.

    Parameters
    ----------
    products : Products
    mode : {"auto", "all", "off"}
        "all" also tries the relu epilogues; "off" keeps every operation apart.
    device_name : str
        Choices are kept on disk per device, driver and library version.
    ranged : callable
        See :mod:`gpubackprop.backends.nvtx`.
    """

    def __init__(self, products: Products, mode: str, device_name: str, ranged: Ranged[Any] = plain) -> None:
        if mode not in MODES:
            raise ValueError(f"epilogues is {mode!r}; choose from {', '.join(MODES)}")
        self.products, self.mode, self.ranged = products, mode, ranged
        self._file = f"epilogues-{fingerprint(device_name)}.json"
        stored = cache.read(self._file)
        self.choices: dict[str, Choice] = {}
        if stored is not None:
            try:
                self.choices = {name: Choice(**entry) for name, entry in json.loads(stored).items()}
            except (ValueError, TypeError):
                self.choices = {}

    def calls(self, operations: Sequence[Operation], bind: Callable[[Operation], Call]) -> list[Call]:
        """Return the calls of a step, with an epilogue wherever it won."""
        result: list[Call] = []
        pending = list(operations)
        while pending:
            first = pending.pop(0)
            pair = (
                None if self.mode == "off" or not pending else fused_call(self.products, first, pending[0], self.mode)
            )
            if pair is not None:
                plain = [bind(first), bind(pending[0])]
                name, fused = pair
                if self._choose(name, plain, fused).fused:
                    pending.pop(0)
                    result.append((self.ranged(name, fused[0]), fused[1]))
                    continue
            result.append(bind(first))
        return result

    def _choose(self, name: str, plain: list[Call], fused: Call) -> Choice:
        if name not in self.choices:
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(ROUNDS):  # in turn, so that a change of the clocks falls on both
                times[0].append(_microseconds(plain))
                times[1].append(_microseconds([fused]))
            a, b = min(times[0]), min(times[1])
            reason = f"{'fused' if b < a else 'plain'} took {min(a, b) / max(a, b):.2f} of the other's time"
            self.choices[name] = Choice(name, a, b, b < a, reason)
            content = {key: asdict(choice) for key, choice in self.choices.items()}
            cache.write(self._file, json.dumps(content, indent=1).encode())
        return self.choices[name]


def _microseconds(calls: Sequence[Call]) -> float:
    """Return the device time of the calls, the mean of a few: they only overwrite intermediates."""
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    stream = cupy.cuda.get_current_stream()
    begin.record(stream)
    for _ in range(REPEATS):
        for function, arguments in calls:
            function(*arguments)
    end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end)) * 1000 / REPEATS
