"""One training step: the products alone, our step in three ways, plain CuPy, and the peers.

All train the same network from the same weights on the same mini-batch, which lies on the device, with softmax cross-entropy
and Adam. Their losses after the same steps are compared before any time is taken.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cupy
import gpu_unfused as unfused
import numpy as np
from gpu_device import CudaTimer, capture
from timing import Contestant, Run, Timer, measure, ratio, summaries

import gpubackprop as gb

CASES = {
    "full": [((784, 256, 128, 10), 128), ((784, 256, 128, 10), 1024), ((1024, 4096, 4096, 1000), 1024)],
    "quick": [((784, 256, 128, 10), 128), ((784, 256, 128, 10), 1024)],
}
DRY_CASES = [((12, 16, 8, 3), 16)]
LEARNING_RATE = 1e-3
TOLERANCE = {"float64": 1e-6, "float32": 2e-3, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 5e-2}
"""How far losses may be apart after the compared steps, relative to the first loss: rounding of the products, over steps."""


class ComparisonError(RuntimeError):
    """There is nothing to compare the contestants by."""


@dataclass
class Problem:
    """What all contestants are given: host arrays, and the parameters under PyTorch's names."""

    sizes: tuple[int, ...]
    X: np.ndarray
    y: np.ndarray
    dtype: str
    state: dict[str, np.ndarray]

    @property
    def storage(self) -> str:
        """The dtype of the arrays: float32 for TF32."""
        return "float32" if self.dtype == "tf32" else self.dtype


@dataclass
class Trained:
    """A contestant that trains: ``run`` queues ``units`` steps, ``loss`` waits for the loss of the last one."""

    name: str
    run: Run
    units: int
    loss: Callable[[], float]
    timer: Timer
    setup_seconds: float | None = None

    def contestant(self) -> Contestant:
        """Return what is timed."""
        return Contestant(self.name, self.run, self.timer, self.units, self.setup_seconds)


Maker = Callable[[], Trained]


def make_problem(sizes: tuple[int, ...], batch: int, dtype: str) -> Problem:
    """Return inputs of noise around one pattern per class, and initial weights."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, sizes[-1], batch)
    patterns = rng.standard_normal((sizes[-1], sizes[0]), np.float32)
    X = patterns[y] + rng.standard_normal((batch, sizes[0]), np.float32)
    return Problem(sizes, X, y, dtype, gb.MLP(sizes).state_dict())


def time_step(
    backend: Any,
    problem: Problem,
    stream: Any,
    peers: Callable[[Problem, int], Iterator[tuple[str, Maker | str]]],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Make, check and time all contestants; ``peers`` yields names with what makes them or why they are left out."""
    left_out: dict[str, str] = {}
    with stream:
        floor, steps_per_launch = products(backend, problem, stream)
        trained = []
        makers: list[tuple[str, Maker | str]] = [*ours(backend, problem, stream), *peers(problem, steps_per_launch)]
        for name, make in makers:
            if isinstance(make, str):
                left_out[name] = make
                continue
            try:
                trained.append(make())
            except Exception as error:  # whatever keeps a peer from running: it is named, with the reason
                left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        agreed = compare(problem, stream, steps_per_launch, trained, left_out)
        contestants = [*floor, *(one.contestant() for one in trained if one.name not in left_out)]
        samples = measure(contestants, rounds, seconds)
    row: dict[str, Any] = {
        "layers": list(problem.sizes), "batch": len(problem.X), "dtype": problem.dtype, "optimizer": "adam",
        "steps_per_launch": steps_per_launch, **agreed, "left_out": left_out,
        "times": {name: summaries(found) for name, found in samples.items()},
        "setup_seconds": {one.name: one.setup_seconds for one in contestants},
    }  # fmt: skip
    least = floor[-1].name
    row["share_of_products"] = {name: ratio(samples[least], found) for name, found in samples.items()}
    best = next((name for name in ("K steps per launch", "captured", "eager") if name in samples), None)
    if best is not None:
        row["over_ours"] = {name: ratio(found, samples[best]) for name, found in samples.items()}
    del trained, contestants, floor, makers
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    return row


def compare(
    problem: Problem, stream: Any, units: int, trained: list[Trained], left_out: dict[str, str]
) -> dict[str, Any]:
    """Train plain CuPy in float32 until its loss has moved, the others as long, and leave out whoever is elsewhere."""
    yardstick = plain_cupy(problem, stream, np.dtype(np.float64 if problem.dtype == "float64" else np.float32))
    yardstick.run()
    first, steps = yardstick.loss(), 1
    allowed = TOLERANCE[problem.dtype] * max(1.0, abs(first))
    while steps % units or (abs(yardstick.loss() - first) < 4 * allowed and steps < 100 * units):
        yardstick.run()
        steps += 1
    expected = yardstick.loss()
    if abs(expected - first) < 4 * allowed:
        raise ComparisonError(f"the loss moves from {first} to {expected} in {steps} steps: too little to compare by")
    losses = {}
    for one in trained:
        for _ in range(steps // one.units):
            one.run()
        losses[one.name] = one.loss()
        if not abs(losses[one.name] - expected) <= allowed:
            left_out[one.name] = f"its loss after {steps} steps is {losses[one.name]:.6g}, not {expected:.6g}"
    return {"compared_steps": steps, "first_loss": first, "expected_loss": expected, "losses": losses}


def products(backend: Any, problem: Problem, stream: Any) -> tuple[list[Contestant], int]:
    """Return the products of a step and nothing else, in a graph of one step and in one of K, and K."""
    model, step, run = _our_step(backend, problem, optimizer=None)
    run()  # so that the products have the numbers of a step, not zeros, which take less power
    stream.synchronize()
    operations = [operation for operation in step.operations if operation.name == "matmul"]
    if not hasattr(run, "steps_per_launch"):  # without nvmath-python nothing can be captured
        calls = [backend.bind(operation) for operation in operations]

        def eager(keep: Any = model) -> None:
            for function, arguments in calls:
                function(*arguments)

        return [Contestant("products", eager, CudaTimer(stream))], 1
    calls = [backend.bind_product(operation) for operation in operations]
    units = _our_step(backend, problem)[2].steps_per_launch
    result = []
    for name, n in (("products", 1), ("products, K steps per launch", units)):
        started = time.perf_counter()
        graph = capture(stream, calls * n)

        def launch(graph: Any = graph, keep: Any = (model, step)) -> None:
            graph.launch()

        result.append(Contestant(name, launch, CudaTimer(stream), n, time.perf_counter() - started))
    return result, units


def ours(backend: Any, problem: Problem, stream: Any) -> Iterator[tuple[str, Maker | str]]:
    """Yield our step: one operation at a time, one launch per step, K steps per launch; and plain CuPy."""

    def make(name: str) -> Trained:
        started = time.perf_counter()
        _, step, run = _our_step(backend, problem)
        units, one = 1, run
        if name == "captured":
            run.graph(1)
        elif name == "K steps per launch":
            units = run.steps_per_launch
            run.graph(units)

            def one() -> None:
                run(units)

        elif hasattr(run, "eagerly"):
            one = run.eagerly
        setup, value = time.perf_counter() - started, step.names.array("loss")
        return Trained(name, one, units, lambda: float(value[0]), CudaTimer(stream), setup)

    captured = hasattr(backend, "bind_product") and getattr(backend, "_products", None) is not None
    for name in ("eager", "captured", "K steps per launch"):
        why = "nvmath-python is not installed"
        yield name, (lambda name=name: make(name)) if captured or name == "eager" else why
    if problem.dtype in ("float32", "float64"):
        yield "plain CuPy", lambda: plain_cupy(problem, stream, np.dtype(problem.dtype))
    else:
        yield "plain CuPy", f"written for float32 and float64, not {problem.dtype}"


def _our_step(backend: Any, problem: Problem, optimizer: Any = gb.Adam(LEARNING_RATE)) -> tuple[Any, Any, Any]:  # noqa: B008
    model = gb.MLP(problem.sizes, device=backend, dtype=problem.storage)
    model.load_state_dict(problem.state)
    step = model.step(len(problem.X), optimizer)
    X, y = step.names.array("X"), step.names.array("y")
    X[...] = backend.asarray(problem.X.astype(X.dtype))
    y[...] = backend.asarray(problem.y)
    return model, step, step.compile()


def plain_cupy(problem: Problem, stream: Any, dtype: np.dtype[Any]) -> Trained:
    """Return the step as one writes it with CuPy alone: ``matmul`` and array expressions, a loop over parameters."""
    layers = range(len(problem.sizes) - 1)
    W = [cupy.asarray(problem.state[f"layers.{i}.weight"].T, dtype, order="C") for i in layers]
    b = [cupy.asarray(problem.state[f"layers.{i}.bias"], dtype) for i in layers]
    theta = [*W, *b]
    m, v = [cupy.zeros_like(p) for p in theta], [cupy.zeros_like(p) for p in theta]
    X, y = cupy.asarray(problem.X, dtype), cupy.asarray(problem.y)
    t, value = 0, cupy.zeros(1)
    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def run() -> None:
        nonlocal t
        h = [X]
        for i in layers[:-1]:
            h.append(cupy.maximum(h[-1] @ W[i] + b[i], 0))
        loss, delta = unfused.softmax_cross_entropy(h[-1] @ W[-1] + b[-1], y)
        value[0] = loss
        dW, db = list(W), list(b)
        for i in reversed(layers):
            dW[i], db[i] = h[i].T @ delta, delta.sum(axis=0)
            if i:
                delta = (delta @ W[i].T) * (h[i] > 0)
        t += 1
        c1, c2 = LEARNING_RATE / (1 - beta1**t), (1 - beta2**t) ** -0.5
        for p, g, mean, square in zip(theta, [*dW, *db], m, v, strict=True):
            mean *= beta1
            mean += (1 - beta1) * g
            square *= beta2
            square += (1 - beta2) * g * g
            p -= c1 * mean / (cupy.sqrt(square) * c2 + eps)

    return Trained("plain CuPy", run, 1, lambda: float(value[0]), CudaTimer(stream))
