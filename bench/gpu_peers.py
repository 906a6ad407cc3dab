"""The same step in PyTorch and JAX, each at its best; left out, with the reason, where it is missing or has no GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from gpu_steps import LEARNING_RATE, Maker, Problem, Trained
from timing import Clock, Run, Sample, Timer, WallTimer

TORCH_NAMES = ("torch eager", "torch compile", "torch graph", "torch compile + graph")
JAX_NAMES = ("jax jit", "jax jit, K steps per launch")
WARM_UP = 3  # steps before a capture


def peers(problem: Problem, units: int) -> Iterator[tuple[str, Maker | str]]:
    """Yield each peer's name with what makes it, or with why it is left out."""
    makers: tuple[tuple[tuple[str, ...], str | None, Callable[[str], Trained]], ...] = (
        (TORCH_NAMES, torch_problem(problem.dtype), lambda name: torch_step(problem, name)),
        (JAX_NAMES, jax_problem(problem.dtype), lambda name: jax_step(problem, name, units)),
    )
    for names, why, make in makers:
        for name in names:
            yield name, why if why is not None else (lambda name=name, make=make: make(name))  # type: ignore[misc]


def torch_problem(dtype: str) -> str | None:
    """Return why PyTorch takes no part, or None."""
    try:
        import torch
    except ImportError:
        return "not installed"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU"
    return "needs a GradScaler, which a graph cannot hold" if dtype == "float16" else None


class TorchTimer:
    """Time between two events of PyTorch's on its current stream, and on the wall."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        import torch

        self.clock, self.synchronize = clock, torch.cuda.synchronize
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Run, repeats: int) -> Sample:
        """Return the seconds of ``repeats`` runs."""
        self.synchronize()
        started = self.clock()
        self.begin.record()
        for _ in range(repeats):
            run()
        self.end.record()
        self.end.synchronize()
        wall = self.clock() - started
        return Sample(self.begin.elapsed_time(self.end) / 1e3, wall)


def torch_step(problem: Problem, name: str, device: str = "cuda", compiler: str = "inductor") -> Trained:
    """Return a step of PyTorch with its fused Adam; ``name`` says what is compiled and captured.

    Products are in float32 unless the dtype is tf32; bfloat16 is autocast with float32 parameters.
    """
    import torch

    torch.set_float32_matmul_precision("high" if problem.dtype == "tf32" else "highest")
    mixed = problem.dtype == "bfloat16"
    dtype = torch.float64 if problem.dtype == "float64" else torch.float32
    modules: list[torch.nn.Module] = []
    for d_in, d_out in zip(problem.sizes[:-1], problem.sizes[1:], strict=True):
        modules += [torch.nn.Linear(d_in, d_out), torch.nn.ReLU()]
    net = torch.nn.Sequential(*modules[:-1]).to(device, dtype)
    graphed = "graph" in name
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, fused=True, capturable=graphed)
    X, y = torch.from_numpy(problem.X).to(device, dtype), torch.from_numpy(problem.y).to(device)
    value = torch.zeros((), device=device, dtype=torch.float64)

    def loss_of(X: Any, y: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=mixed, cache_enabled=False):
            return torch.nn.functional.cross_entropy(net(X), y)

    if "compile" in name:
        loss_of = torch.compile(loss_of, backend=compiler)

    def one() -> None:
        optimizer.zero_grad(set_to_none=not graphed)
        loss = loss_of(X, y)
        loss.backward()
        optimizer.step()
        value.copy_(loss.detach())

    def reset() -> None:
        with torch.no_grad():
            for i, layer in enumerate(m for m in net if isinstance(m, torch.nn.Linear)):
                layer.weight.copy_(torch.from_numpy(problem.state[f"layers.{i}.weight"]))
                layer.bias.copy_(torch.from_numpy(problem.state[f"layers.{i}.bias"]))
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()

    reset()
    started = time.perf_counter()
    run: Callable[[], object] = one
    if graphed:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                one()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one()
        run = graph.replay
    else:
        one()
    timer: Timer = WallTimer(lambda: None) if device == "cpu" else TorchTimer()
    if device != "cpu":
        torch.cuda.synchronize()
    setup = time.perf_counter() - started
    reset()
    return Trained(name, run, 1, lambda: float(value), timer, setup)


def jax_problem(dtype: str) -> str | None:
    """Return why JAX takes no part, or None."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes most of the memory at once
    try:
        import jax
    except ImportError:
        return "not installed"
    try:
        jax.devices("gpu")
    except RuntimeError:
        return f"JAX {jax.__version__} finds no GPU"
    return None if dtype in ("float32", "tf32") else f"written for float32 and tf32, not {dtype}"


def jax_step(problem: Problem, name: str, units: int, platform: str = "gpu") -> Trained:
    """Return a step under ``jax.jit`` with everything donated; ``name`` says whether K of them are one launch.

    JAX shows no stream to put events on: its times are those of the wall.
    """
    import jax
    import jax.numpy as jnp

    units = units if "K steps" in name else 1
    device = jax.devices(platform)[0]
    layers = range(len(problem.sizes) - 1)
    theta = [(problem.state[f"layers.{i}.weight"].T, problem.state[f"layers.{i}.bias"]) for i in layers]
    theta = jax.device_put(jax.tree.map(jnp.asarray, theta), device)
    zeros = jax.tree.map(jnp.zeros_like, theta)
    X, y = jax.device_put(problem.X, device), jax.device_put(problem.y, device)
    precision = "tensorfloat32" if problem.dtype == "tf32" else "highest"

    def loss_of(theta: Any, X: Any, y: Any) -> Any:
        h = X
        for W, b in theta[:-1]:
            h = jax.nn.relu(h @ W + b)
        o = h @ theta[-1][0] + theta[-1][1]
        return -jnp.take_along_axis(jax.nn.log_softmax(o), y[:, None], axis=1).mean()

    def one(carry: Any, X: Any, y: Any) -> Any:
        theta, m, v, t, _ = carry
        value, g = jax.value_and_grad(loss_of)(theta, X, y)
        t = t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        c1, c2 = LEARNING_RATE / (1 - 0.9**t), 1 / jnp.sqrt(1 - 0.999**t)
        theta = jax.tree.map(lambda p, m, v: p - c1 * m / (jnp.sqrt(v) * c2 + 1e-8), theta, m, v)
        return theta, m, v, t, value

    def many(carry: Any, X: Any, y: Any) -> Any:
        return jax.lax.fori_loop(0, units, lambda _, carry: one(carry, X, y), carry)

    def scalar() -> Any:
        return jax.device_put(jnp.zeros((), jnp.float32), device)

    carry = (theta, zeros, jax.tree.map(jnp.copy, zeros), scalar(), scalar())
    started = time.perf_counter()
    with jax.default_matmul_precision(precision):
        step = jax.jit(one if units == 1 else many, donate_argnums=0).lower(carry, X, y).compile()
    setup = time.perf_counter() - started

    def run() -> None:
        nonlocal carry
        carry = step(carry, X, y)

    timer = WallTimer(lambda: jax.block_until_ready(carry))
    return Trained(name, run, units, lambda: float(carry[4]), timer, setup)
