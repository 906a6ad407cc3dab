"""Files of networks that were damaged or made to do harm: found before anything is built, in one line."""

from __future__ import annotations

import json
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gpubackprop as gb
from gpubackprop.inspect.explain import random_batch
from gpubackprop.training.checkpoint import load_training, save
from gpubackprop.training.model_file import read_model


@pytest.fixture
def trained(tmp_path: Path, rng: np.random.Generator) -> Path:
    """The file of a small network with the state of its training."""
    model = gb.MLP([4, 5, 3], "leaky_relu", seed=3)
    X, y = random_batch(model, 20, rng)
    history = model.fit(X, y, epochs=2, optimizer=gb.Adam(gb.Cosine(0.1, steps=9)), progress=False)
    save(model, tmp_path / "net.safetensors", history)
    return tmp_path / "net.safetensors"


def content(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors of a file and its metadata without the digest, as earlier versions wrote it."""
    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
    del metadata["sha256"]
    return load_file(path), metadata


def refused(path: Path, message: str = "net") -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_training(path)
    text = str(caught.value)
    assert text.startswith(repr(str(path)))
    assert "\n" not in text
    assert len(text) < 700


def test_every_flipped_bit_is_found(trained: Path) -> None:
    whole = bytearray(trained.read_bytes())
    places = range(0, 8 * len(whole), max(1, len(whole) // 80))  # some hundred of them, in the header as in the numbers
    for bit in places:
        damaged = whole.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        trained.write_bytes(damaged)
        refused(trained)
    trained.write_bytes(whole)
    load_training(trained)


def test_a_file_of_an_earlier_version_has_no_digest(trained: Path) -> None:
    tensors, metadata = content(trained)
    save_file(tensors, trained, metadata)
    assert len(load_training(trained)[1]["loss"]) == 2


@pytest.mark.parametrize("sizes", [[4, 20000, 20000, 2], [4, 10**18, 2], [4, 10**30, 2], [2**62, 2**62]])
def test_a_small_file_takes_little_memory(sizes: list[int], tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    named = [{"name": "relu", "parameters": {}}] * (len(sizes) - 2)
    loss = {"name": "softmax_cross_entropy", "parameters": {}, "reduction": "mean"}
    description = {
        "layer_sizes": sizes,
        "activation": named,
        "loss": loss,
        "dtype": "float32",
        "seed": 0,
        "dropout": 0.0,
    }
    save_file({"a": np.zeros(1)}, path, {"format": "gpubackprop-mlp-1", "mlp": json.dumps(description)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    refused(path, "missing .*layers.0.bias|layer_sizes is")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB: also what is not Python's


CHANGES: list[tuple[str, Any, str]] = [
    ("mlp", lambda d: d.update(layer_sizes=[4, True, 3]), r"layer_sizes is \[4, True, 3\]"),
    ("mlp", lambda d: d.update(layer_sizes=[4, 5.0, 3]), r"layer_sizes is \[4, 5.0, 3\]"),
    ("mlp", lambda d: d.update(layer_sizes=[]), r"layer_sizes is \[\]"),
    ("mlp", lambda d: d.update(layer_sizes="453"), "layer_sizes in the description is '453', which has the wrong type"),
    ("mlp", lambda d: d.update(activation=["relu"]), "activation is 'relu'; it must be a dictionary"),
    ("mlp", lambda d: d["activation"][0].update(parameters={"slope": 1}), "leaky_relu has no parameter 'slope'"),
    ("mlp", lambda d: d["activation"][0].update(parameters={"negative_slope": "1"}), "is '1'; it must be a number"),
    ("mlp", lambda d: d["activation"][0].update(parameters={"negative_slope": 10**400}), "negative_slope is .*too large"),
    ("mlp", lambda d: d["activation"][0].update(parameters={"negative_slope": float("nan")}), "negative_slope is nan"),
    ("mlp", lambda d: d["loss"].update(reduction="max"), "unknown reduction 'max'"),
    ("mlp", lambda d: d["loss"].update(name=["a"]), "name in loss is .*, which has the wrong type"),
    ("mlp", lambda d: d.update(dtype="int32"), "unknown dtype 'int32'"),
    ("mlp", lambda d: d.update(dtype="float64"), "has shape .* and dtype F32; the description requires .* and F64"),
    ("mlp", lambda d: d.update(seed=True), "seed in the description is True"),
    ("mlp", lambda d: d.update(seed=2**64), "seed is 18446744073709551616"),
    ("mlp", lambda d: d.update(dropout=float("nan")), "dropout is nan"),
    ("mlp", lambda d: d.update(initializer="none"), "unknown initializer 'none'"),
    ("mlp", lambda d: d.update(matmul_precision="tf64"), "unknown matmul_precision 'tf64'"),
    ("mlp", lambda d: d.update(target_shape=[-1]), "target_shape is -1"),
    ("optimizer", lambda d: d.update(name="adamm"), "unknown optimizer 'adamm'"),
    ("optimizer", lambda d: d.update(name=3), "unknown optimizer '3'"),
    ("optimizer", lambda d: d.update(values=[]), "has a damaged description: KeyError 'learning_rate'"),
    ("optimizer", lambda d: d["values"].update(speed=3), "has a damaged description: TypeError"),
    ("optimizer", lambda d: d["values"].update(eps="x"), "eps is 'x'"),
    ("optimizer", lambda d: d["values"].update(betas=3), "has a damaged description|betas is"),
    ("optimizer", lambda d: d["values"].update(amsgrad=True), r"optimizer.states has shape \(2, 128\)"),
    ("optimizer", lambda d: d["values"]["learning_rate"].update(name="cos"), "unknown schedule 'cos'"),
    ("optimizer", lambda d: d["values"]["learning_rate"]["values"].update(steps=-1), "steps is -1"),
    ("history", lambda d: d.update(loss=3), "its history is .*; it must be a dictionary of lists of numbers"),
    ("history", lambda d: d.update(loss=["a"]), "its history is"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "change", "message"), CHANGES)
def test_every_value_is_checked_by_its_kind(entry: str, change: Any, message: str, trained: Path) -> None:
    tensors, metadata = content(trained)
    description = json.loads(metadata[entry])
    change(description)
    save_file(tensors, trained, metadata | {entry: json.dumps(description)})
    refused(trained, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("optimizer.rate"), r"missing \['optimizer.rate'\]"),
        (lambda t: t.update({"layers.2.bias": np.zeros(3, "f4")}), r"not expected \['layers.2.bias'\]"),
        (lambda t: t.update({"optimizer.scalars": np.zeros(1, "f4")}), r"optimizer.scalars has shape \(1,\)"),
        (lambda t: t.update({"optimizer.counters": np.zeros(2)}), "optimizer.counters has shape .* and dtype F64"),
        (lambda t: t.update({"optimizer.counters": np.array([3, -9])}), "has a negative count of steps"),
        (lambda t: t.update({"optimizer.rate": np.array([np.nan])}), "no learning rate"),
        (lambda t: t.update({"layers.0.bias": np.full(5, np.inf, "f4")}), "layers.0.bias holds NaN or infinity"),
        (lambda t: t.update({"layers.0.bias": np.zeros((5, 1), "f4")}), r"layers.0.bias has shape \(5, 1\)"),
    ],
)
def test_the_tensors_are_those_of_the_description(change: Any, message: str, trained: Path) -> None:
    tensors, metadata = content(trained)
    change(tensors)
    save_file(tensors, trained, metadata)
    refused(trained, message)


def test_metadata_that_nobody_wrote_are_refused(trained: Path) -> None:
    tensors, metadata = content(trained)
    save_file(tensors, trained, metadata | {"sha257": "0" * 64})
    refused(trained, "its metadata have the unknown entry 'sha257'")
    save_file(tensors, trained, metadata | {"sha256": "0" * 64})
    refused(trained, "its digest does not match its content")


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(FileNotFoundError, match="is not a regular file"):
            read_model(path)
