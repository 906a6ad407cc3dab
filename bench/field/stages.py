"""The stages of a report, the most valuable first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpubackprop.bench.sizes import DRY, Sizes

SIZES = "sizes.toml"
GPU: Sizes = {
    "step": ["784-256-128-10, batch 128", "8-16-3, batch 16", "512-1024-1024-10, batch 512"],
    "bandwidth": ["2097152", "268435456"],
    "gemm": ["128x784x256", "4096x1024x1024"],
    "kernels": ["1024x1024", "4096x2048"],
    "epoch": ["784-256-128-10, batch 128, samples 8192"],
}
CPU: Sizes = {
    "step": ["784-256-128-10, batch 128", "64-64-32-10, batch 32"],
    "bandwidth": ["2097152", "67108864"],
    "gemm": ["128x784x256", "1024x1024x1024"],
    "kernels": ["1024x512"],
    "epoch": ["64-64-32-10, batch 32, samples 1024"],
}


@dataclass(frozen=True)
class Stage:
    """A stage: a command, and its share of the time.

    Parameters
    ----------
    name : str
    arguments : tuple of str
        Of Python.
    share : float
        Of the time left for this stage and the later ones; they get what it does not use.
    title : str
        What it measures.
    """

    name: str
    arguments: tuple[str, ...]
    share: float
    title: str

    @property
    def command(self) -> list[str]:
        """The command."""
        return [sys.executable, *self.arguments]


def sizes_of(device: str, *, quick: bool) -> Sizes:
    """Return the sizes that are measured."""
    every = DRY if quick else CPU if device == "cpu" else GPU
    return {suite: every[suite] for suite in GPU}


def stages_of(device: str, folder: Path, *, all_devices: bool, quick: bool) -> Iterator[Stage]:
    """Yield the stages on a device, of which the first may look at all devices; they write into a folder."""
    short = ("--quick",) if quick else ()

    def measure(name: str) -> tuple[str, ...]:
        return ("-m", "gpubackprop.bench.field.measure", name, device, str(folder / f"{name}.jsonl"), *short)

    def bench(suite: str, peers: str) -> tuple[str, ...]:
        options = ("--dry",) if quick else ("--rounds", "15")
        return (
            "-m", "gpubackprop", "bench", "--device", device, "--suite", suite, "--sizes", str(folder / SIZES), "--peers", peers,
            "--optimizer", "adam", "--out", str(folder / f"bench-{suite}"), *options,
        )  # fmt: skip

    peers = "numpy" if quick else "numpy,torch,jax,sklearn" if device == "cpu" else "cupy,torch,jax"
    doctor = ("-m", "gpubackprop", "doctor", "--json", *(() if all_devices else ("--device", device)))
    yield Stage("doctor", doctor, 0.15, "is everything there")
    yield Stage("check", measure("check"), 0.2, "every activation and loss against the reference")
    yield Stage("capture", measure("capture"), 0.15, "a compiled step against one operation at a time, bit for bit")
    yield Stage("timeline", measure("timeline"), 0.15, "the time of each operation of a step")
    yield Stage("step", bench("step", peers), 0.45, "a step against other libraries")
    yield Stage("kernels", bench("kernels", peers), 0.5, "each kernel against the copy bandwidth")
    yield Stage("epoch", bench("epoch", peers), 1.0, "an epoch against other libraries")
