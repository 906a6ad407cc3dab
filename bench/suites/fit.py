"""Calls of ``fit`` as a user makes them, short and long, with one thread and all, beside a busy program; against JAX's best loop.

One network is fitted again and again with Adam by :meth:`gpubackprop.MLP.fit`. JAX's loop is one compiled scan over the
mini-batches of an epoch in a new random order, called once per epoch; it is compiled before. Each case is a fresh process.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from gpubackprop.bench.case import Case, Cases, Prepared, Settings
from gpubackprop.bench.devices import Device
from gpubackprop.bench.peers import make_problem
from gpubackprop.bench.sizes import StepSize, parse_step
from gpubackprop.bench.suites.epoch import prepare
from gpubackprop.machine.host import usable

LENGTHS = {"short": 1, "long": 8}  # by how much a fit has more epochs than its size says
ONE, ALL = "one core", "all cores"
LIBRARIES = ("jax",)  # the others take seconds for what takes JAX milliseconds


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield a short and, unless quick, a long fit of each size, with one thread and with all."""
    cores = {ALL: usable()} if device.on_gpu else {ONE: 1, ALL: usable()} if usable() > 1 else {ONE: 1}
    for text in settings.sizes["fit"]:
        size = parse_step(text)
        for which, threads in cores.items():
            for length, times in LENGTHS.items():
                if settings.quick and length != "short":
                    continue
                fit = replace(size, epochs=times * size.epochs)
                found = {
                    "layers": list(fit.layers), "batch": fit.batch, "samples": fit.samples, "epochs": fit.epochs,
                    "optimizer": "adam", "cores": which, "length": length,
                }  # fmt: skip
                yield Case(
                    "fit", f"{text.partition(', samples')[0]}, {which}, {length}", device.name, dtype,
                    partial(_prepare, device, dtype, fit, settings), found,
                    threads=threads, busy=(which, length) == (ALL, "short") and not device.on_gpu,
                )  # fmt: skip


def _prepare(device: Device, dtype: str, size: StepSize, settings: Settings) -> Prepared:
    problem = make_problem(
        size.layers, size.batch, device.name, dtype, "adam", settings.threads, size.samples or 16 * size.batch
    )
    libraries = tuple(name for name in LIBRARIES if name in settings.libraries)
    return prepare(device, problem, replace(settings, libraries=libraries), size.epochs)
