"""Matrix products: ours, as a step has them, NumPy's or CuPy's, and those of the peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from gpubackprop.bench.case import Case, Cases, Prepared, Settings
from gpubackprop.bench.devices import Device, Gpu, in_turn, keeping
from gpubackprop.bench.peers import reason_of
from gpubackprop.bench.sizes import parse_shape
from gpubackprop.bench.timing import Candidate, WallTimer
from gpubackprop.definitions import check_dtype, eps_of
from gpubackprop.step.operations import Matmul

CHECKED_ROWS = 64


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield a product of each size."""
    for text in settings.sizes["gemm"]:
        m, k, n = parse_shape(text, 3)
        prepare = partial(_prepare, device, dtype, (m, k, n), settings)
        yield Case("gemm", f"{m}x{k} by {k}x{n}", device.name, dtype, prepare, {"shape": [m, k, n]})


def _prepare(device: Device, dtype: str, shape: tuple[int, int, int], settings: Settings) -> Prepared:
    m, k, n = shape
    rng = np.random.default_rng(0)
    real = check_dtype("float32" if dtype == "tf32" else dtype)
    host_a, host_b = (rng.standard_normal(s, np.float32).astype(real) for s in ((m, k), (k, n)))
    prepared = Prepared([], flops=2 * m * n * k, bytes=(m * k + k * n + m * n) * real.itemsize)
    # any order of the sums, with factors rounded to 11 bits under TF32 (Higham (2002), eq. 3.13)
    rows = slice(0, min(m, CHECKED_ROWS))
    a, b = host_a[rows].astype(np.float64), host_b.astype(np.float64)
    expected, bound = a @ b, np.abs(a) @ np.abs(b)
    allowed = ((k + 1) * float(eps_of(np.dtype(np.float32) if real.itemsize == 2 else real))
               + (2.0**-9 if dtype == "tf32" else 2 * float(eps_of(real)))) * bound  # fmt: skip
    with device.scope():
        for name, make in _makers(device, dtype, host_a, host_b, settings):
            if isinstance(make, str):
                prepared.left_out[name] = make
                continue
            try:
                candidate, result = make()
                candidate.timer(candidate.run, 1)
                off = np.abs(np.asarray(result(), np.float64)[rows] - expected) - allowed
            except Exception as error:  # whatever keeps a peer from running: it is listed with the reason
                prepared.left_out[name] = reason_of(error)
                continue
            if not (off <= 0).all():
                prepared.wrong[name] = "differs by more than rounding explains"
            else:
                prepared.candidates.append(candidate)
    return prepared


Made = tuple[Candidate, Callable[[], Any]]


def _makers(
    device: Device, dtype: str, a: np.ndarray, b: np.ndarray, settings: Settings
) -> Iterator[tuple[str, Callable[[], Made] | str]]:
    """Yield names with what makes a candidate and its result, or why there is none."""
    yield "gpubackprop", lambda: _ours(device, dtype, a, b)
    plain = "cupy" if device.on_gpu else "numpy"
    if plain in settings.libraries:
        yield plain, (lambda: _array_module(device, a, b)) if dtype in ("float32", "float64") else f"not for {dtype}"
    for name, make in (("torch", _torch), ("jax", _jax)):
        if name in settings.libraries:
            yield name, partial(make, device, dtype, a, b, settings.threads) if find_spec(name) else "not installed"


def _ours(device: Device, dtype: str, host_a: np.ndarray, host_b: np.ndarray) -> Made:
    import gpubackprop as gb

    backend: Any = device.backend
    if dtype == "tf32":
        backend = gb.get_backend(device.name, matmul_precision="tf32")
    a, b = backend.asarray(host_a), backend.asarray(host_b)
    out = backend.zeros((len(a), b.shape[1]), a.dtype)
    product = Matmul(a, b, out)
    function, arguments = backend.bind(product)

    run = keeping(in_turn([(function, arguments)]), product)
    return Candidate("gpubackprop", run, device.timer()), lambda: backend.to_numpy(out)


def _array_module(device: Device, host_a: np.ndarray, host_b: np.ndarray) -> Made:
    xp = device.xp
    a, b = xp.asarray(host_a), xp.asarray(host_b)
    out = xp.empty((len(a), b.shape[1]), a.dtype)
    name = "cupy" if device.on_gpu else "numpy"
    return Candidate(name, lambda: xp.matmul(a, b, out=out), device.timer()), lambda: device.backend.to_numpy(out)


def _torch(device: Device, dtype: str, host_a: np.ndarray, host_b: np.ndarray, threads: int) -> Made:
    import torch

    from gpubackprop.bench.peers.pytorch import TorchTimer

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    kind = getattr(torch, "float32" if dtype == "tf32" else dtype)
    a, b = (torch.tensor(x.astype(np.float64)).to(device.name, kind) for x in (host_a, host_b))
    out = torch.empty((len(a), b.shape[1]), device=a.device, dtype=kind)
    timer = TorchTimer() if isinstance(device, Gpu) else WallTimer(lambda: None)
    return Candidate("torch", lambda: torch.mm(a, b, out=out), timer), lambda: out.double().cpu().numpy()


def _jax(device: Device, dtype: str, host_a: np.ndarray, host_b: np.ndarray, threads: int) -> Made:
    import jax

    if dtype not in ("float32", "tf32", "bfloat16"):
        raise TypeError(f"not for {dtype}")
    jax.config.update("jax_cpu_enable_async_dispatch", threads > 1)
    there = jax.devices("gpu" if device.on_gpu else "cpu")[0]
    a, b = jax.device_put((host_a, host_b), there)
    with jax.default_matmul_precision("tensorfloat32" if dtype == "tf32" else "highest"):
        product = jax.jit(lambda a, b: a @ b).lower(a, b).compile()
    last: list[Any] = [product(a, b)]

    def run() -> None:
        last[0] = product(a, b)

    return Candidate("jax", run, WallTimer(lambda: last[0].block_until_ready())), lambda: last[0]
