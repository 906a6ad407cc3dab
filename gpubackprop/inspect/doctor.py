"""Whether this machine computes correctly: a list of findings, each with the command that fixes it."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from gpubackprop._version import __version__
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.architecture import Architecture
from gpubackprop.backends import get_backend
from gpubackprop.definitions import DTYPES, eps_of
from gpubackprop.inspect.check import SAMPLES, bound_of
from gpubackprop.inspect.explain import random_batch
from gpubackprop.intake import Samples
from gpubackprop.machine import cuinit
from gpubackprop.machine.cache import cache_finding
from gpubackprop.machine.diagnosis import (
    compute_capability,
    cuda_device_count,
    cuda_findings,
    cuda_problem,
    installed,
    missing_dtypes,
    unmet,
)
from gpubackprop.machine.finding import Finding
from gpubackprop.machine.host import threads_finding
from gpubackprop.network import Network
from gpubackprop.optimizers import SGD

PACKAGES = ("numpy", "scipy", "numba", "llvmlite")
LIMIT_S = 120.0  # for a process that compiles a few kernels
SIZES = (17, 33, 8, 5)


def diagnose(device: str | None = None) -> Iterator[Finding]:
    """Check this machine, and yield each finding as soon as it is known.

    Parameters
    ----------
    device : str, optional
        ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or another backend's name. By default the CPU, and CUDA where there is a card: a
        machine without one has nothing wrong.

    Raises
    ------
    ValueError
        There is no device of that name.
    """
    name, _, number = (device or "").partition(":")
    name = "cuda" if name == "gpu" else name
    if name not in ("", "cuda"):
        get_backend(str(device))  # it knows all names
    elif number and not number.isdecimal():
        raise ValueError(f"unknown device {device!r}; after the colon comes a number, as in 'cuda:0'")
    yield from _host()
    if name not in ("", "cuda"):
        yield from _works(name)
        return
    if not name:
        yield from _works("cpu")
    if number:
        yield from _cuda(int(number), asked=True)
    else:
        yield from _cuda(0, asked=bool(name))
        for index in range(1, cuda_device_count()):
            yield from _cuda(index, asked=True)


def _host() -> Iterator[Finding]:
    python = f"{platform.python_version()} on {platform.platform()}"
    yield Finding("gpubackprop", "ok", f"{__version__}, Python {python}")
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    yield unmet() or Finding("packages", "ok", versions)
    yield threads_finding()
    yield cache_finding()


def _cuda(index: int, *, asked: bool) -> Iterator[Finding]:
    """Yield what there is for a CUDA device, and whether it works; of a later one, only what is its own."""
    for found in cuda_findings(index):
        if found.name == "driver" and found.state == "missing" and not asked and not _has_card():
            yield replace(found, name="cuda", state="skipped", text=f"not here: {found.text}")
        elif index == 0 or found.fails or found.name == f"cuda:{index}":
            yield replace(found, name="CUDA packages") if found.name == "packages" else found
    if cuda_problem(index) is None:
        missing = missing_dtypes(compute_capability(index))
        dtypes = ", ".join(f"no {d} ({missing[d]})" if d in missing else d for d in DTYPES)
        yield Finding(f"cuda:{index} dtypes", "ok", dtypes)
        yield from _works(f"cuda:{index}")


def _has_card() -> bool:
    """Return whether there is a card that the driver should show: one that CUDA_VISIBLE_DEVICES does not hide."""
    return bool(cuinit.cards()) and os.environ.get("CUDA_VISIBLE_DEVICES") is None


# ---------------------------------------------------------------------- does it compute


def _works(device: str) -> Iterator[Finding]:
    """Yield whether a device computes, in a process of its own: a device that ends the process takes nothing with it."""
    code = f"from gpubackprop.inspect.doctor import report; report({device!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )  # fmt: skip
        lines, failure = done.stdout.splitlines(), ended(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as late:
        lines = (late.stdout or b"").decode().splitlines() if isinstance(late.stdout, bytes) else []
        failure = f"it took more than {LIMIT_S:.0f} s"
    yield from (Finding(**json.loads(line)) for line in lines if line.startswith('{"name"'))
    if failure:
        yield Finding(device, "wrong", f"the process that computed on {device} failed: {failure}")


def ended(status: int, stderr: str) -> str:
    """Return how a process failed: its signal, or the last line it printed; "" if it did not fail."""
    if status == 0:
        return ""
    said = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")
    try:
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
    except ValueError:
        how = f"signal {-status}"
    return ": ".join(part for part in (how, said[-300:]) if part)


def report(device: str) -> None:
    """Print what a device computes, a finding in JSON each."""
    for check in (_kernel, _training_step):
        print(json.dumps(asdict(check(device))), flush=True)


def _kernel(device: str) -> Finding:
    """Compile a kernel and run it: bias and relu, of which every bit is known."""
    backend, host = get_backend(device), get_backend("reference")
    rng, relu = np.random.default_rng(0), ACTIVATIONS["relu"]
    z, b = rng.normal(size=(64, 40)).astype(np.float32), rng.normal(size=40).astype(np.float32)
    started = time.perf_counter()
    h: Any = backend.bias_activation_forward(backend.asarray(z.copy()), backend.asarray(b), relu)
    found = backend.to_numpy(h)
    seconds = time.perf_counter() - started
    if not np.array_equal(found, host.bias_activation_forward(z, b, relu)):
        return Finding(f"{device} kernel", "wrong", "relu(z + b) is not what it should be")
    return Finding(f"{device} kernel", "ok", f"compiled, or taken from the cache, and run in {seconds:.2f} s")


def _training_step(device: str) -> Finding:
    """Run a compiled training step, and compare its parameters with the reference in float64."""
    network = Network(Architecture(SIZES, "tanh"), device)  # type: ignore[arg-type]
    twin = network.twin("reference", dtype="float64")
    X, y = random_batch(network.architecture, SAMPLES, np.random.default_rng(0))
    results = []
    for each in (network, twin):
        step = each.step(SAMPLES, SGD(1.0))
        Samples.given(X, y).on(each.backend, each.architecture).feed(step.names.array)
        step.compile()()
        results.append(each.backend.to_numpy(each.parameters.flat).astype(np.float64))
    computed, expected = results
    ulps = float(np.abs(computed - expected).max() / np.abs(expected).max() / eps_of(network.dtype))
    bound = bound_of(SIZES, SAMPLES)
    text = f"parameters are {ulps:.1f} ulps of {network.dtype.name} from the reference, bound {bound:.0f}"
    return Finding(f"{device} step", "ok" if ulps <= bound else "wrong", text)  # NaN is wrong
