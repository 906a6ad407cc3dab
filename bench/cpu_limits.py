"""Measure how near the CPU path comes to what the machine can do, beside single steps against the peers.

    python bench/cpu_limits.py                       # everything; writes bench/results/cpu_limits.json and cpu_scaling.png
    python bench/cpu_limits.py --only steps fit      # some of it
    python bench/cpu_limits.py --threads 1           # not also with two threads

- steps: a training step over its own matrix products alone (``numpy.matmul(..., out=)``), SGD and Adam
- fit: 8000 x 784 samples, 784-256-128-10, batch 128, Adam, 20 epochs, progress shown, against the same loop in PyTorch
- memory: the largest resident set during ``fit`` over that before it (after import and compiling), against the bytes of the
  data, parameters, gradients, optimizer state and workspace
- start: seconds until the first step is ready, in a new process with an empty cache of kernels and with a full one
- latency: one sample through a prepared predictor, 64-64-32-10
- scaling: seconds per FLOP of a step over batch sizes and widths, and of its products alone, as a picture

Each part runs in a process of its own. Contestants take turns, and ratios are medians of ratios within a turn. With one thread,
seconds of this process are counted, not those that other processes take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Steps = Callable[[int], object]  # does something so many times

RESULTS = Path(__file__).parent / "results"
CASES = [
    ((8, 16, 3), 16), ((64, 64, 32, 10), 32), ((784, 256, 128, 10), 32), ((784, 256, 128, 10), 128),
    ((784, 256, 128, 10), 1024), ((512, 1024, 1024, 10), 512),
]  # fmt: skip
SIZES, BATCH, SAMPLES, EPOCHS = (784, 256, 128, 10), 128, 8000, 20
ROUND = 0.05  # seconds of a contestant's turn
PAUSE = 0.2  # before it: the threads of OpenBLAS keep a core busy for some time after their last product


def main() -> None:
    """Run the parts asked for, each in a new process, print and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_limits.json")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.rounds)))
        return
    content = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    for part in arguments.only:
        for threads in arguments.threads if part in ("steps", "fit") else arguments.threads[:1]:
            found = in_new_process(part, threads, arguments.rounds)
            content[f"{part}, {threads} thread{'s' if threads > 1 else ''}"] = found
            print(f"{part}, {threads} thread(s): {json.dumps(found, indent=1)}", flush=True)
    content["environment"] = {
        "cpu": next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)[13:],
        "python": platform.python_version(),
        **{name: version(name) for name in ("gpubackprop", "numpy", "scipy", "numba", "torch") if find_spec(name)},
    }
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if "scaling" in arguments.only:
        draw(content[f"scaling, {arguments.threads[0]} thread"], RESULTS / "cpu_scaling.png")


def in_new_process(part: str, threads: int, rounds: int) -> Any:
    """Return what a part finds in a process that may use so many threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    command = [sys.executable, __file__, "--part", part, "--rounds", str(rounds)]
    done = subprocess.run(
        command, env=os.environ | dict.fromkeys(names, str(threads)), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def once(run: Steps, repeats: int) -> float:
    """Return the seconds of one of ``repeats`` runs: of this process alone on one thread, on the wall with more."""
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    started = clock()
    run(repeats)
    return (clock() - started) / repeats


def in_turns(contestants: dict[str, Steps], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of one repeat of each contestant, one value per round, in which they take turns."""
    repeats = {name: max(1, int(ROUND / max(once(run, 3), 1e-9))) for name, run in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            time.sleep(PAUSE)
            times[name].append(once(run, repeats[name]))
    return times


def median_ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Return the median over rounds of a over b."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def products(sizes: tuple[int, ...], n: int) -> Steps:
    """Return the matrix products of a step and nothing else, by NumPy without new memory."""
    import gpubackprop as gb
    from gpubackprop.step.operations import Matmul

    triples = [(o.a, o.b, o.out) for o in gb.MLP(sizes).step(n).bound() if isinstance(o, Matmul)]

    def run(times: int) -> None:
        for _ in range(times):
            for a, b, out in triples:
                np.matmul(a, b, out=out)

    return run


def step_of(sizes: tuple[int, ...], n: int, optimizer: Any) -> Steps:
    """Return our step on a mini-batch of noise, warm."""
    import gpubackprop as gb

    rng = np.random.default_rng(0)
    step = gb.MLP(sizes).step(n, optimizer)
    step.names.array("X")[...] = rng.standard_normal((n, sizes[0]))
    step.names.array("y")[...] = rng.integers(0, sizes[-1], n)
    run = step.compile()
    for _ in range(16):  # enough for the number of threads to be found
        run(1 + int(4e8 / step.flops))
    return run


def steps(rounds: int) -> list[dict[str, object]]:
    """Time steps and their products alone."""
    import gpubackprop as gb

    found = []
    for sizes, n in CASES:
        contestants = {
            "products": products(sizes, n),
            "SGD": step_of(sizes, n, gb.SGD(1e-3)),
            "Adam": step_of(sizes, n, gb.Adam(1e-3)),
        }
        times = in_turns(contestants, rounds)
        found.append(
            {
                "layers": "-".join(map(str, sizes)),
                "batch": n,
                "microseconds": {name: round(statistics.median(t) * 1e6, 2) for name, t in times.items()},
                "over products": {name: round(median_ratio(times, name, "products"), 3) for name in ("SGD", "Adam")},
            }
        )
    return found


def patterns(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return samples of ten noisy patterns, some of them hard to tell, in the shape of MNIST."""
    centers = np.random.default_rng(0).standard_normal((10, SIZES[0]), np.float32)
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 10, n)
    return 0.15 * centers[y] + rng.standard_normal((n, SIZES[0]), np.float32), y


def fit(rounds: int) -> dict[str, object]:
    """Time whole trainings, ours and PyTorch's, from the same weights on the same data."""
    import torch

    import gpubackprop as gb

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    (X, y), (X_test, y_test) = patterns(SAMPLES, 1), patterns(2000, 2)
    gb.MLP(SIZES).warmup(BATCH)
    seconds: dict[str, list[float]] = {"gpubackprop": [], "torch": []}
    accuracy: dict[str, float] = {}
    for _ in range(max(3, rounds // 5)):
        model = gb.MLP(SIZES)
        time.sleep(PAUSE)
        started = time.perf_counter()
        model.fit(X, y, epochs=EPOCHS, batch_size=BATCH, optimizer=gb.Adam(1e-3))
        seconds["gpubackprop"].append(time.perf_counter() - started)
        accuracy["gpubackprop"] = model.evaluate(X_test, y_test)["accuracy"]
        net = torch_network(gb.MLP(SIZES).state_dict())
        time.sleep(PAUSE)
        started = time.perf_counter()
        torch_fit(net, torch.from_numpy(X), torch.from_numpy(y))
        seconds["torch"].append(time.perf_counter() - started)
        with torch.no_grad():
            guess = net(torch.from_numpy(X_test)).argmax(1).numpy()
        accuracy["torch"] = float((guess == y_test).mean())
    return {
        "seconds": {name: round(statistics.median(t), 3) for name, t in seconds.items()},
        "ours over torch": round(median_ratio(seconds, "gpubackprop", "torch"), 3),
        "test accuracy": accuracy,
    }


def torch_network(state: dict[str, np.ndarray]) -> Any:
    """Return the network in PyTorch, with our initial weights."""
    import torch

    layers: list[Any] = []
    for i in range(len(SIZES) - 1):
        linear = torch.nn.Linear(SIZES[i], SIZES[i + 1])
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(state[f"layers.{i}.weight"]))
            linear.bias.copy_(torch.from_numpy(state[f"layers.{i}.bias"]))
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def torch_fit(net: Any, X: Any, y: Any) -> None:
    """Train as PyTorch's tutorials do, without the cost of a DataLoader, with its fastest optimizer."""
    import torch

    optimizer, loss_of = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True), torch.nn.CrossEntropyLoss()
    for epoch in range(EPOCHS):
        total = 0.0
        for rows in torch.randperm(len(X)).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(net(X[rows]), y[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        if epoch % 2:
            print(f"epoch {epoch + 1}  loss {total / len(X):.4f}")


def memory(rounds: int) -> dict[str, object]:
    """Measure the largest resident set of ``fit`` (VmHWM, set back before it: Linux only)."""
    import gpubackprop as gb

    def kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

    samples, options = SAMPLES, {"epochs": 2, "batch_size": BATCH, "progress": False}
    few, few_y = patterns(BATCH + samples % BATCH, 1)  # the same kernels and shapes, the last short batch included
    warm = gb.MLP(SIZES)  # kept, so that its memory is not used again
    warm.fit(few, few_y, **options)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((samples, SIZES[0]), np.float32), rng.integers(0, 10, samples)
    model = gb.MLP(SIZES)
    model.fit(X, y, **options)
    peak = kilobytes("VmHWM")
    parameters = model.parameters.flat.nbytes
    assert model.optimizer_state is not None
    states = model.optimizer_state.states.nbytes
    widths = BATCH + samples % BATCH  # of both batch sizes
    workspace = 4 * widths * (SIZES[0] + 2 * sum(SIZES[1:-1]) + SIZES[-1])
    parts = {
        "data": X.nbytes + y.nbytes, "order": 8 * samples, "parameters": parameters, "gradients": parameters,
        "states": states, "workspace": workspace,
    }  # fmt: skip
    needed = sum(parts.values())
    return {
        "bytes": parts,
        "increase of the resident set": (peak - before) * 1024,
        "over the bytes": round((peak - before) * 1024 / needed, 3),
    }


def start(rounds: int) -> dict[str, object]:
    """Time ``make demo``'s training in new processes: compiling and all, with an empty and a full cache of kernels."""
    program = (
        "import time; t = time.perf_counter()\n"
        "import gpubackprop as gb\n"
        "from gpubackprop.datasets import load_dataset\n"
        "imported = time.perf_counter() - t\n"
        "d = load_dataset('digits')\n"
        "h = gb.MLP([64, 64, 32, 10]).fit(\n"
        "    d.X, d.y, epochs=1, validation_data=(d.X_test, d.y_test), progress=False)\n"
        "print(imported, h.compile_seconds, time.perf_counter() - t)\n"
    )
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-c", program], env=os.environ | {"GPUBACKPROP_CACHE_DIR": folder},
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            values = map(float, done.stdout.split())
            keys = ("import", "compile", "all, with one epoch")
            found[name] = dict(zip(keys, (round(v, 3) for v in values), strict=True))
    return {"seconds": found}


def latency(rounds: int) -> dict[str, object]:
    """Time one sample through a prepared predictor, from Python."""
    import gpubackprop as gb

    predictor = gb.MLP([64, 64, 32, 10]).predictor()
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)

    def run(times: int) -> None:
        for _ in range(times):
            predictor(x)

    times = in_turns({"predictor": run}, rounds)["predictor"]
    return {"microseconds": {"median": round(statistics.median(times) * 1e6, 2), "least": round(min(times) * 1e6, 2)}}


def scaling(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time steps of 256-256-256-10 over batch sizes, and of w-w-w-10, batch 128, over widths w."""
    import gpubackprop as gb

    found = {}
    cases = {
        "batch size": [(2**k, (256, 256, 256, 10), 2**k) for k in range(14)],
        "width": [(2**k, (2**k, 2**k, 2**k, 10), 128) for k in range(3, 13)],
    }
    for axis, points in cases.items():
        rows: dict[str, list[float]] = {"at": [], "step": [], "products": []}
        for value, sizes, n in points:
            flops = gb.MLP(sizes).step(n, gb.SGD(1e-3)).flops
            contestants = {"step": step_of(sizes, n, gb.SGD(1e-3)), "products": products(sizes, n)}
            times = in_turns(contestants, max(3, rounds // 3))
            rows["at"].append(value)
            for name in ("step", "products"):
                rows[name].append(statistics.median(times[name]) / flops)
        found[axis] = rows
    return found


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw time per FLOP over batch size and width."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    titles = {"batch size": "256-256-256-10", "width": "w-w-w-10, batch 128"}
    for axis, (name, rows) in zip(axes, found.items(), strict=True):
        for contestant, style in (("products", "--"), ("step", "-")):
            picoseconds = [1e12 * seconds for seconds in rows[contestant]]
            axis.loglog(rows["at"], picoseconds, style, marker=".", label=contestant, base=2)
        axis.set(xlabel=name, title=titles[name])
        axis.set_yscale("log", base=10)
    axes[0].set_ylabel("picoseconds per FLOP of a step")
    axes[0].legend()
    figure.savefig(path, dpi=110)


PARTS = {"steps": steps, "fit": fit, "memory": memory, "start": start, "latency": latency, "scaling": scaling}

if __name__ == "__main__":
    main()
