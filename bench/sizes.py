"""The default sizes, and sizes from a file, written like the names of the cases in a report."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

Sizes = dict[str, list[str]]

README = [
    "8-16-3, batch 16", "64-64-32-10, batch 32", "784-256-128-10, batch 32", "784-256-128-10, batch 128",
    "784-256-128-10, batch 1024", "512-1024-1024-10, batch 512",
]  # fmt: skip
SQUARE = "{0}-{0}-{0}-10, batch {1}".format
WIDTHS = [SQUARE(width, 128) for width in (64, 256, 1024)]

FITS = [  # some 50 ms on one core
    "8-16-3, batch 16, samples 16384, epochs 8", "24-8-2, batch 200, samples 20000, epochs 8",
    "64-64-32-10, batch 32, samples 8192, epochs 4", "784-256-128-10, batch 32, samples 2048, epochs 1",
    "784-256-128-10, batch 128, samples 2048, epochs 1", "784-256-128-10, batch 1024, samples 2048, epochs 1",
    "512-1024-1024-10, batch 512, samples 1024, epochs 1",
]  # fmt: skip

FULL: Sizes = {
    "transfer": ["4096", "1048576", "67108864"],
    "bandwidth": ["32768", "262144", "2097152", "16777216", "268435456"],
    "gemm": ["256x256x256", "1024x1024x1024", "128x784x256", "784x128x256", "4096x1024x1024"],
    "kernels": ["128x256", "1024x1024", "8192x10", "4096x2048"],
    "step": [*README, *WIDTHS],
    "products": README,
    "scaling": [SQUARE(256, 2**k) for k in range(14)] + [SQUARE(2**k, 128) for k in range(3, 13) if k != 8],
    "epoch": ["64-64-32-10, batch 32, samples 4096", "784-256-128-10, batch 128, samples 8192"],
    "fit": FITS,
    "latency": ["64-64-32-10, batch 1", "784-256-128-10, batch 1", "784-256-128-10, batch 8"],
    "memory": ["784-256-128-10, batch 128, samples 8192"],
    "coldstart": ["64-64-32-10, batch 32"],
    "sklearn": [
        f"{layers}, batch {n}, samples 1600" for layers in ("8-16-3", "64-64-10", "784-256-128-10") for n in (32, 200)
    ],
    "crossover": [SQUARE(w, n) for w in (32, 128, 512, 2048) for n in (32, 256)],
}
QUICK: Sizes = {
    "transfer": ["1048576"],
    "bandwidth": ["32768", "262144", "2097152", "67108864"],
    "gemm": ["128x784x256", "1024x1024x1024"],
    "kernels": ["1024x512"],
    "step": ["64-64-32-10, batch 32", "784-256-128-10, batch 128"],
    "products": ["784-256-128-10, batch 128"],
    "scaling": ["256-256-256-10, batch 16", "256-256-256-10, batch 128"],
    "epoch": ["64-64-32-10, batch 32, samples 1024"],
    "fit": ["64-64-32-10, batch 32, samples 1024, epochs 2"],
    "latency": ["784-256-128-10, batch 1"],
    "memory": ["784-256-128-10, batch 128, samples 8192"],
    "coldstart": ["64-64-32-10, batch 32"],
    "sklearn": ["64-64-10, batch 32, samples 160"],
    "crossover": ["32-32-32-10, batch 32", "512-512-512-10, batch 256"],
}
DRY: Sizes = {
    "transfer": ["4096"],
    "bandwidth": ["65536"],
    "gemm": ["24x16x20"],
    "kernels": ["40x24"],
    "step": ["12-16-8-3, batch 16"],
    "products": ["12-16-8-3, batch 16"],
    "scaling": ["12-12-3, batch 16", "12-12-3, batch 32"],
    "epoch": ["12-16-8-3, batch 16, samples 64"],
    "fit": ["12-16-8-3, batch 16, samples 64, epochs 2"],
    "latency": ["12-16-8-3, batch 1"],
    "memory": ["12-16-8-3, batch 16, samples 64"],
    "coldstart": ["12-16-3, batch 4"],
    "sklearn": ["12-16-8-3, batch 16, samples 64"],
    "crossover": ["12-16-8-3, batch 16"],
}
SUITES = tuple(FULL)
LIBRARIES = ("numpy", "cupy", "torch", "jax", "sklearn", "thinc", "keras", "tinygrad")


@dataclass(frozen=True)
class StepSize:
    """Layers, samples in a mini-batch and in the data set, epochs of a short fit."""

    layers: tuple[int, ...]
    batch: int
    samples: int | None = None
    epochs: int = 1


def parse_step(text: str) -> StepSize:
    """Return what ``784-256-128-10, batch 128, samples 8192, epochs 2`` says."""
    found = re.fullmatch(r"(\d+(?:-\d+)+), batch (\d+)(?:, samples (\d+)(?:, epochs (\d+))?)?", text)
    if found is None:
        raise ValueError(
            f"size is {text!r}; write it as '784-256-128-10, batch 128' or with ', samples 8192' or ', samples 8192, epochs 2'"
        )
    layers = tuple(int(part) for part in found[1].split("-"))
    samples = int(found[3]) if found[3] else None
    epochs = int(found[4] or 1)
    if min(*layers, int(found[2]), epochs) < 1 or (samples is not None and samples % int(found[2])):
        raise ValueError(f"size is {text!r}; sizes are at least 1, and samples a multiple of the batch")
    return StepSize(layers, int(found[2]), samples, epochs)


def parse_shape(text: str, dimensions: int) -> tuple[int, ...]:
    """Return the numbers of ``4096x1024``."""
    if not re.fullmatch(r"\d+" + r"x\d+" * (dimensions - 1), text) or 0 in map(int, text.split("x")):
        raise ValueError(f"size is {text!r}; write it as {'x'.join(['1024'] * dimensions)}")
    return tuple(int(part) for part in text.split("x"))


def read_sizes(path: Path) -> Sizes:
    """Return the sizes in a TOML file: ``step = ["64-10, batch 32"]``, a list per suite.

    Raises
    ------
    ValueError
        It has an unknown name, or a size that cannot be read.
    """
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    for suite, texts in content.items():
        if suite not in FULL or not isinstance(texts, list):
            raise ValueError(f"{path} has {suite!r}; it holds lists of sizes for {', '.join(SUITES)}")
        for text in texts:
            check_size(suite, text)
    return content


def check_size(suite: str, text: str) -> None:
    """Raise ValueError if a size cannot be read."""
    if suite in ("transfer", "bandwidth"):
        parse_shape(text, 1)
    elif suite in ("gemm", "kernels"):
        parse_shape(text, 3 if suite == "gemm" else 2)
    else:
        parse_step(text)
