"""What the stages ``check``, ``capture`` and ``timeline`` of a report do: a row of JSON for each network, as soon as it is done."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.bench.case import Row
from gpubackprop.bench.devices import Call, Device, device_of, in_turn, keeping
from gpubackprop.bench.field.stages import sizes_of
from gpubackprop.bench.ours import calls_of, captures, finish, step_of
from gpubackprop.bench.peers import make_problem, reason_of
from gpubackprop.bench.sizes import parse_step
from gpubackprop.bench.timing import Candidate, clock_of, measure, seconds_of, summary
from gpubackprop.inspect.check import check_device
from gpubackprop.inspect.explain import random_batch
from gpubackprop.intake import Samples
from gpubackprop.losses import LOSSES
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.step import Step

SIZES = (17, 33, 8, 5)
STEPS = 5
REPEATS = 20  # runs of an operation in a graph, so that its launch costs little
MOST_FAILURES = 3  # failures in a row: a device that has failed once often fails until the process ends

Rows = Iterator[tuple[str, Callable[[], Row]]]


@dataclass(frozen=True)
class Network:
    """A network to check, and how it is trained."""

    activation: str = "tanh"
    loss: str = "softmax_cross_entropy"
    dtype: str = "float32"
    optimizer: str = "sgd"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        plain = asdict(Network())
        different = {name: value for name, value in asdict(self).items() if value != plain[name]}
        options = [f"{name} {value}" for name, value in different.pop("options", {}).items()]
        return ", ".join([*different.values(), *options]) or "tanh"

    def on(self, device: str) -> gb.MLP:
        """Return it on a device."""
        dropout = self.options.get("dropout", 0.0)
        return gb.MLP(SIZES, self.activation, self.loss, device, self.dtype, dropout=dropout)


def check(device: str, *, quick: bool) -> Rows:
    """Yield whether each activation, loss and dtype computes correctly."""
    networks = [Network()]
    networks += [Network(activation=name) for name in ACTIVATIONS if not quick or name == "relu"]
    networks += [Network(loss=name) for name in LOSSES if not quick or name == "mean_squared_error"]
    others = [name for name in gb.get_backend(device).dtypes if name != "float32"]
    networks += [Network(dtype=name, activation=a) for name in others for a in ("relu", "gelu") if not quick]
    distinct = dict(zip(map(str, networks), networks, strict=True))  # tanh is tested already

    def row(network: Network) -> Row:
        found = check_device(network.on(device))
        worst = max(found.arrays.rows, key=lambda one: one.ulps)
        return {
            "ok": found.ok, "ulps": found.arrays.worst, "bound": found.bound, "array": worst.name,
            "gradient_error": found.gradients.worst, "gradient_tolerance": found.gradients.tolerance,
        }  # fmt: skip

    for name, network in distinct.items():
        yield name, partial(row, network)


def capture(device: str, *, quick: bool) -> Rows:
    """Yield whether a compiled step leaves the same bits as one operation at a time."""
    networks = [Network()]
    if not quick:
        networks += [Network(optimizer=name) for name in OPTIMIZERS if name not in ("sgd", "lbfgs")]
        networks += [Network(activation="relu", dtype=name) for name in gb.get_backend(device).dtypes]
        networks += [Network(loss="mean_squared_error"), Network(options={"dropout": 0.3})]
        networks += [Network(activation="identity"), Network(options={"micro_batch_size": 16})]

    def row(network: Network) -> Row:
        runs: Any = [_prepared(network, device) for _ in range(2)]
        (compiled, step), (eager, other) = runs
        run = step.compile()
        steps = STEPS + (0 if quick else getattr(run, "steps_per_launch", 0))  # in graphs of many and of one
        run(steps)
        for _ in range(steps):
            other.run_eagerly()
        bits = [
            [model.backend.to_numpy(a).tobytes() for a in (model.parameters.flat, which.names.array("loss"))]
            for model, which in ((compiled, step), (eager, other))
        ]
        return {"ok": bits[0] == bits[1], "steps": steps}

    for network in networks:
        yield str(network), partial(row, network)
    if device.startswith("cuda"):
        yield "two networks on two streams at once", partial(_two_streams, device)
        yield "the first launch of another thread", partial(_in_thread, device)


def _two_streams(device: str) -> Row:
    """Train two networks on two streams, one after the other and at once: they share nothing, so the bits are the same."""
    import cupy

    bits = []
    for at_once in (False, True):
        made = [_prepared(Network(activation=name, optimizer="adam"), device) for name in ("relu", "tanh")]
        runs = [(step.compile(), cupy.cuda.Stream(non_blocking=True)) for _, step in made]
        made[0][0].backend.synchronize()
        for _ in range(STEPS):
            for run, stream in runs:
                with stream:
                    run(STEPS)
                if not at_once:
                    stream.synchronize()
        for _, stream in runs:
            stream.synchronize()
        bits.append([model.backend.to_numpy(model.parameters.flat).tobytes() for model, _ in made])
    return {"ok": bits[0] == bits[1], "steps": STEPS * STEPS}


def _in_thread(device: str) -> Row:
    """Run a step here and in a thread that has not used the device before."""
    made = [_prepared(Network(), device) for _ in range(2)]
    made[0][1].run_eagerly()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(made[1][1].run_eagerly).result()
    made[0][0].backend.synchronize()
    bits = [model.backend.to_numpy(model.parameters.flat).tobytes() for model, _ in made]
    return {"ok": bits[0] == bits[1], "steps": 1}


def _prepared(network: Network, device: str) -> tuple[gb.MLP, Step]:
    """Return a network on a device, and a step with its mini-batch in place."""
    model, micro = network.on(device), network.options.get("micro_batch_size")
    X, y = random_batch(model, 48 if micro else 37, np.random.default_rng(0))
    step = model.step(len(X), network.optimizer, micro_batch_size=micro, class_indices=y.ndim == 1)
    Samples.given(X, y).on(model.backend, model.architecture).feed(step.names.array)
    return model, step


def timeline(name: str, *, quick: bool) -> Rows:
    """Yield the time of each operation of a step, alone and with its arrays in the cache, and of the whole step."""
    device = device_of(name, 1)
    for text in sizes_of(name, quick=quick)["step"]:
        yield text, partial(_timeline, device, text, quick)


def _timeline(device: Device, text: str, quick: bool) -> Row:
    size = parse_step(text)
    with device.scope():
        step = step_of(make_problem(size.layers, size.batch, device.name, optimizer="adam"), device.backend)
        calls = calls_of(step)
        in_turn(calls)()  # so that the operations see the numbers of a step
        device.synchronize()
        whole = Candidate("step", keeping(finish(step.compile()), step), device.timer())
        eager = Candidate("eager", keeping(in_turn(calls), step), device.timer())
        alone = [_alone(device, str(i), call) for i, call in enumerate(calls)]
        samples = measure([whole, eager, *alone], 3 if quick else 15, 0.0 if quick else 0.003)
    clock = clock_of(*samples.values())

    def seconds(name: str) -> Row:
        return summary(seconds_of(samples[name], clock))

    operations = [
        {
            "name": o.name, "phase": o.phase, "equation": o.equation, "flops": o.flops, "bytes": o.nbytes,
            "seconds": seconds(str(i)),
        }
        for i, o in enumerate(step.operations)
    ]  # fmt: skip
    return {"ok": True, "clock": clock, "step": seconds("step"), "eager": seconds("eager"), "operations": operations}


def _alone(device: Device, name: str, call: Call) -> Candidate:
    """Return one operation as a candidate: on a GPU in a graph of many, so that the launch does not count."""
    if device.on_gpu and captures(device):
        return device.queue(name, [call] * REPEATS, REPEATS)
    return Candidate(name, in_turn([call]), device.timer())


STAGES: dict[str, Callable[..., Rows]] = {"check": check, "capture": capture, "timeline": timeline}


def main() -> int:
    """Write the rows of a stage into a file, each as soon as it is known; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("device")
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    wrong, done, failures = [], 0, 0
    with given.out.open("w", encoding="utf-8") as file:
        for name, make in STAGES[given.stage](given.device, quick=given.quick):
            try:
                row = make()
                failures = 0
            except Exception as error:  # one failing network must not lose the others
                row = {"ok": False, "error": reason_of(error)}
                failures += 1
            file.write(json.dumps({"case": name, **row}) + "\n")
            file.flush()
            done += 1
            wrong += [] if row["ok"] else [name]
            print(f"{name}: {'ok' if row['ok'] else row.get('error', 'WRONG')}", flush=True)
            if failures == MOST_FAILURES:
                print(f"{failures} failures in a row, the last: {row['error']}", file=sys.stderr)
                return 1
    if wrong:
        print(f"{len(wrong)} of {done} are wrong: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
