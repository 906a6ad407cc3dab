"""Write digests.json: the SHA-256 of whole trainings on the CPU, which every machine repeats.

    python tests/golden/make_digests.py                # after a change that changes bits on purpose
    python tests/golden/make_digests.py --print        # what this machine has
    python tests/golden/make_digests.py --print cuda   # another device: its digests are this machine's, to compare before and after

The data and the first parameters are made of uniform random numbers, which NumPy makes by whole numbers alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gpubackprop as gb
from gpubackprop.losses import LOSSES

PATH = Path(__file__).with_name("digests.json")


class Training(NamedTuple):
    """A network, and how it is trained."""

    sizes: tuple[int, ...]
    activation: Any
    loss: Any
    optimizer: Callable[[], Any]
    samples: int
    batch: int
    dtype: str = "float32"
    dropout: float = 0.0
    weighted: bool = False
    micro: int | None = None


CLASSES = "softmax_cross_entropy"
TRAININGS = {
    "relu, SGD": Training((13, 37, 18, 5), "relu", CLASSES, lambda: gb.SGD(0.1), 130, 50),
    "tanh, momentum": Training(
        (13, 37, 5), "tanh", CLASSES, lambda: gb.SGD(gb.StepDecay(0.1, step_size=3), momentum=0.9, nesterov=True), 130, 50
    ),
    "gelu, Adam, clipped": Training((30, 65, 10), "gelu", CLASSES, lambda: gb.Adam(1e-2, clip_norm=0.5), 262, 131),
    "sigmoid, AdamW, dropout": Training(
        (9, 33, 40), "sigmoid", LOSSES[CLASSES](label_smoothing=0.1), lambda: gb.AdamW(gb.Cosine(1e-2, steps=7)), 96, 32,
        dropout=0.3,
    ),
    "softplus, RMSprop": Training(
        (7, 20, 3), "softplus", "mean_squared_error", lambda: gb.RMSprop(gb.Exponential(1e-2, gamma=0.9), centered=True), 70, 16
    ),
    "sin, Adagrad, weighted": Training((7, 20, 1), "sin", "huber", lambda: gb.Adagrad(0.1), 70, 16, weighted=True),
    "silu, Lion": Training((7, 20, 2), "silu", "sigmoid_cross_entropy", lambda: gb.Lion(gb.OneCycle(1e-2, steps=9)), 70, 16),
    "mish, float64": Training((11, 19, 4), "mish", CLASSES, lambda: gb.Adam(1e-2, clip_value=0.1), 90, 45, dtype="float64"),
    "elu, poisson, float64": Training((11, 19, 2), "elu", "poisson", lambda: gb.SGD(1e-3, momentum=0.5), 90, 40, dtype="float64"),
    "a large batch and depth": Training((700, 50, 34, 3), "relu", CLASSES, lambda: gb.SGD(0.05), 900, 450),
    "a depth of many parts": Training((3, 6, 2), "tanh", "mean_squared_error", lambda: gb.Adam(1e-2), 6000, 6000),
    "micro-batches": Training((13, 37, 5), "tanh", CLASSES, lambda: gb.Adam(1e-2), 130, 50, micro=20),
}  # fmt: skip


def bits(a: Any) -> bytes:
    """Return the bits of an array, one NaN for all."""
    a = np.asarray(a)
    return np.where(np.isnan(a), a.dtype.type(np.nan), a).tobytes()


def digest(t: Training, device: str = "cpu", epochs: int = 3) -> str:
    """Return a digest of the parameters, the optimizer's state and the losses."""
    rng = np.random.default_rng(7)
    model = gb.MLP(list(t.sizes), t.activation, t.loss, device, t.dtype, seed=1, dropout=t.dropout)
    for w, d in zip(model.parameters.W, t.sizes, strict=False):
        w[...] = model.backend.asarray((rng.random(w.shape) - 0.5) * (12 / d) ** 0.5, w.dtype)
    X = rng.random((t.samples, t.sizes[0])) * 2 - 1
    y = (
        rng.random((t.samples, t.sizes[-1]))
        if model.loss.family == "elementwise"
        else rng.integers(0, t.sizes[-1], t.samples)
    )
    options = {"sample_weight": rng.random(t.samples)} if t.weighted else {}
    if t.micro:
        options["micro_batch_size"] = t.micro
    history = model.fit(
        X.astype(t.dtype), y, epochs=epochs, batch_size=t.batch, optimizer=t.optimizer(), progress=False, **options
    )
    state = model.optimizer_state
    arrays = [model.backend.to_numpy(a) for a in (model.parameters.flat, state.states, state.scalars)]
    parts = [bits(a) for a in (*arrays, history["loss"])]
    return hashlib.sha256(b"".join(parts)).hexdigest()


if __name__ == "__main__":
    device = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "cpu")
    text = json.dumps({name: digest(t, device) for name, t in TRAININGS.items()}, indent=0) + "\n"
    if "--print" in sys.argv:
        print(text, end="")
    else:
        PATH.write_text(text, encoding="utf-8")
