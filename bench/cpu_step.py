"""Time one training step on the CPU against its matrix products alone and against the peers that are installed.

    python bench/cpu_step.py                 # prints a table, writes bench/results/cpu_step.json
    python bench/cpu_step.py --threads 2

Each round times the contestants one after the other; the table shows medians over rounds of the ratio within a round, so
that a slow moment of the machine falls on all of them. Before a time is printed, the losses of all contestants
after the same steps from the same weights are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

CASES = [
    ((8, 16, 3), 16),
    ((64, 64, 32, 10), 32),
    ((784, 256, 128, 10), 32),
    ((784, 256, 128, 10), 128),
    ((784, 256, 128, 10), 1024),
    ((512, 1024, 1024, 10), 512),
]
LEARNING_RATE = 1e-3

Steps = Callable[[int], object]  # takes some steps and returns the loss of the last


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print the table of a stored run and end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="indices of the cases")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_step.json")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.out.read_text(encoding="utf-8"))["results"]))
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(arguments.threads)
    if hasattr(os, "sched_setaffinity"):  # not every library keeps to the variables
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    if arguments.threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

    results = [measure(*CASES[i], arguments.rounds, arguments.threads) for i in arguments.cases]
    print_table(results)
    arguments.out.parent.mkdir(exist_ok=True)
    content = {"environment": environment(arguments.threads), "results": results}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(sizes: tuple[int, ...], n: int, rounds: int, threads: int) -> dict[str, object]:
    """Return the median time of each contestant, and of its ratio to the products and to gpubackprop."""
    import numpy as np

    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, sizes[0])).astype(np.float32)
    y = rng.integers(0, sizes[-1], n)
    contestants = {
        "products": products(sizes, n),
        "gpubackprop": ours(sizes, X, y, "cpu"),
    }
    losses = {}
    for name, make in (("numpy", lambda *a: ours(*a, "reference")), ("torch", torch_step), ("jax", jax_step)):
        try:
            contestants[name] = make(sizes, X, y)
        except ImportError:
            print(f"{name}: not installed, left out", file=sys.stderr)
    for name, step in contestants.items():
        loss = step(3)
        if name != "products":
            losses[name] = float(loss)  # type: ignore[arg-type]
    spread = max(losses.values()) - min(losses.values())
    if spread > 1e-3:
        raise SystemExit(f"the contestants disagree on the loss after 3 steps: {losses}")
    repeats = {name: max(1, int(0.02 / once(step, 3))) for name, step in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, step in contestants.items():
            time.sleep(0.2)  # the threads of OpenBLAS keep a core busy for some time after their last product
            times[name].append(once(step, repeats[name]))
    ratio = {
        name: statistics.median(a / b for a, b in zip(times[name], times["gpubackprop"], strict=True)) for name in times
    }
    to_products = [a / b for a, b in zip(times["gpubackprop"], times["products"], strict=True)]
    quartiles = statistics.quantiles(to_products, n=4)
    return {
        "layers": "-".join(map(str, sizes)), "batch": n, "threads": threads,
        "microseconds": {name: statistics.median(t) * 1e6 for name, t in times.items()},
        "gpubackprop_over_products": statistics.median(to_products),
        "interquartile_range": [quartiles[0], quartiles[2]],
        "peer_over_gpubackprop": {name: value for name, value in ratio.items() if name not in ("products", "gpubackprop")},
    }  # fmt: skip


def once(step: Steps, repeats: int) -> float:
    """Return the seconds of one step, as the mean of ``repeats``: of this process alone on one thread, on the wall with more."""
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    started = clock()
    step(repeats)
    return (clock() - started) / repeats


def repeated(one: Callable[[], object]) -> Steps:
    """Return a function that takes some steps, one call each, as a training loop in Python does."""

    def steps(times: int) -> object:
        for _ in range(times):
            result = one()
        return result

    return steps


def products(sizes: tuple[int, ...], n: int) -> Steps:
    """The floor: the matrix products of a step and nothing else, ``numpy.matmul(..., out=)``."""
    import numpy as np

    import gpubackprop as gb

    step = gb.MLP(sizes).step(n)
    calls = [op.arguments for op in step.operations if op.name == "matmul"]
    triples = [(a["a"], a["b"], a["out"]) for a in calls]

    def run() -> None:
        for a, b, out in triples:
            np.matmul(a, b, out=out)

    return repeated(run)


def ours(sizes: tuple[int, ...], X: object, y: object, device: str) -> Steps:
    """Forward, softmax cross-entropy, backward and SGD, many steps in one call."""
    import gpubackprop as gb

    step = gb.MLP(sizes, device=device).step(len(X), gb.SGD(LEARNING_RATE))  # type: ignore[arg-type]
    step.names.array("X")[...] = X
    step.names.array("y")[...] = y
    run, value = step.compile(), step.names.array("loss")

    def steps(times: int) -> object:
        run(times)
        return value[0]

    return steps


def torch_step(sizes: tuple[int, ...], X: object, y: object) -> Steps:
    """The same step in eager PyTorch."""
    import torch

    import gpubackprop as gb

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    layers: list[torch.nn.Module] = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(d_in, d_out), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers[:-1])
    state = gb.MLP(sizes).state_dict()
    with torch.no_grad():
        for i, layer in enumerate(m for m in net if isinstance(m, torch.nn.Linear)):
            layer.weight.copy_(torch.from_numpy(state[f"layers.{i}.weight"]))
            layer.bias.copy_(torch.from_numpy(state[f"layers.{i}.bias"]))
    optimizer, loss = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE), torch.nn.CrossEntropyLoss()
    X_t, y_t = torch.from_numpy(X), torch.from_numpy(y)

    def one() -> object:
        optimizer.zero_grad(set_to_none=True)
        value = loss(net(X_t), y_t)
        value.backward()
        optimizer.step()
        return value.detach()

    return repeated(one)


def jax_step(sizes: tuple[int, ...], X: object, y: object) -> Steps:
    """The same step under ``jax.jit``, parameters donated."""
    import jax
    import jax.numpy as jnp

    import gpubackprop as gb

    parameters = gb.MLP(sizes).parameters
    theta = [(jnp.array(W), jnp.array(b)) for W, b in zip(parameters.W, parameters.b, strict=True)]
    X_j, y_j = jnp.array(X), jnp.array(y)

    def loss(theta: object, X: object, y: object) -> object:
        h = X
        for W, b in theta[:-1]:
            h = jax.nn.relu(h @ W + b)
        o = h @ theta[-1][0] + theta[-1][1]
        return -jnp.take_along_axis(jax.nn.log_softmax(o), y[:, None], axis=1).mean()

    def update(theta: object, X: object, y: object) -> object:
        value, gradient = jax.value_and_grad(loss)(theta, X, y)
        return value, jax.tree.map(lambda p, g: p - LEARNING_RATE * g, theta, gradient)

    step = jax.jit(update, donate_argnums=0)

    def one() -> object:
        nonlocal theta
        value, theta = step(theta, X_j, y_j)
        jax.block_until_ready(theta)
        return value

    return repeated(one)


def markdown(results: list[dict[str, object]]) -> str:
    """Return the table of the README."""
    peers = list(results[0]["peer_over_gpubackprop"])
    lines = [
        f"| layers | batch | over the products alone | {' | '.join(f'{p} / ours' for p in peers)} |",
        "|---|---|---|" + "---|" * len(peers),
    ]
    for r in results:
        ratios = " | ".join(f"{r['peer_over_gpubackprop'][p]:.2f}x" for p in peers)
        lines.append(f"| {r['layers']} | {r['batch']} | {r['gpubackprop_over_products']:.2f}x | {ratios} |")
    return "\n".join(lines)


def environment(threads: int) -> dict[str, object]:
    """What the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    def number(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    ) if Path("/proc/cpuinfo").exists() else platform.processor()  # fmt: skip
    packages = {name: number(name) for name in ("gpubackprop", "numpy", "numba", "torch", "jax")}
    return {"cpu": cpu, "threads": threads, "python": platform.python_version(), **packages}


def print_table(results: list[dict[str, object]]) -> None:
    """Print times in microseconds and ratios."""
    print(
        f"{'layers':18s} {'batch':>5s} {'products':>10s} {'gpubackprop':>12s} {'over products':>14s}   peer / gpubackprop"
    )
    for r in results:
        us = r["microseconds"]
        peers = "  ".join(f"{name} {value:.2f}x" for name, value in r["peer_over_gpubackprop"].items())
        print(
            f"{r['layers']:18s} {r['batch']:5d} {us['products']:10.1f} {us['gpubackprop']:12.1f} "
            f"{r['gpubackprop_over_products']:13.2f}x   {peers}"
        )


if __name__ == "__main__":
    main()
