"""Read and check the file of a network before anything is built from it.

A header can claim anything: a file of 400 bytes can describe a network of gigabytes. So the description is read first, and the
type of each value checked; then the names, shapes and dtypes of all tensors against the description; only then the tensors,
which are as large as the file; and last the digest, if there is one. Memory stays in proportion to the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpubackprop.architecture import Architecture
from gpubackprop.definitions import one_line, shown
from gpubackprop.optimizers import OPTIMIZERS, Optimizer
from gpubackprop.schedules import SCHEDULES
from gpubackprop.step import layout

FORMAT = "gpubackprop-mlp-1"
STATE = "optimizer."  # prefix of the arrays of an optimizer's state
METADATA = ("format", "mlp", "sha256", "optimizer", "history", "training")
TRAINING = "training."  # prefix of the arrays of a run: sums of losses, state of callbacks
DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}  # NumPy's name and that of safetensors


class ModelFile(NamedTuple):
    """A consistent file: parameters, under torch's names, and state match the architecture."""

    architecture: Architecture
    parameters: dict[str, np.ndarray]
    optimizer: Optimizer | None
    state: dict[str, np.ndarray]
    history: dict[str, list[float]]
    training: dict[str, Any] | None
    """Of a run; see :mod:`gpubackprop.training.run`."""
    arrays: dict[str, np.ndarray]
    """Of a run, too."""


def digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of all named tensors and all metadata but the digest itself, in hexadecimal digits."""
    found = hashlib.sha256()
    for name in sorted(metadata.keys() - {"sha256"}):
        found.update(f"{json.dumps([name, metadata[name]])}\n".encode())
    for name in sorted(tensors):
        a = tensors[name]
        found.update(f"{json.dumps([name, a.dtype.str, a.shape])}\n".encode())
        found.update(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def read_model(path: Path) -> ModelFile:
    """Return the content of a file whose header, sizes and digest agree.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged, has another format, or names something that is not registered; the message begins with its path.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"no file {str(path)!r}: it {what}")
    try:
        with safe_open(path, "numpy") as file:  # checks that the tensors fill the file, without a gap or an overlap
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is not a dict)
            found = {name: (tuple(a.get_shape()), str(a.get_dtype())) for name, a in slices.items()}
            architecture, optimizer, history, training = _described(metadata)
            _check_tensors(found, _expected(architecture, optimizer) | _expected_of_run(training))
            tensors = {name: file.get_tensor(name) for name in found}
        if "sha256" in metadata and metadata["sha256"] != digest(tensors, metadata):
            raise ValueError(
                "its digest does not match its content: the file was damaged or changed; use an intact copy"
            )
        state = {name.removeprefix(STATE): tensors.pop(name) for name in found if name.startswith(STATE)}
        arrays = {name.removeprefix(TRAINING): tensors.pop(name) for name in found if name.startswith(TRAINING)}
        _check_state(state)
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is not a complete safetensors file: {_one_line(error)}") from None
    except (LookupError, TypeError, AttributeError, RecursionError, OverflowError, json.JSONDecodeError) as error:
        reason = f"{type(error).__name__} {_one_line(error)}"
        raise ValueError(f"{str(path)!r} has a damaged description: {reason}") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None
    return ModelFile(architecture, tensors, optimizer, state, history, training, arrays)


def _described(
    metadata: Mapping[str, str],
) -> tuple[Architecture, Optimizer | None, dict[str, list[float]], dict[str, Any] | None]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"it holds format {shown(metadata.get('format'))}; this version reads {FORMAT!r}")
    for name in metadata:
        if name not in METADATA:
            raise ValueError(
                f"its metadata have the unknown entry {shown(name)}; this version reads {', '.join(METADATA)}"
            )
    architecture = Architecture.from_json(json.loads(metadata["mlp"]))
    optimizer = _optimizer(json.loads(metadata["optimizer"])) if "optimizer" in metadata else None
    history = json.loads(metadata.get("history", "{}"))
    columns = history.values() if isinstance(history, dict) else ["none"]
    if not all(isinstance(column, list) and all(type(x) in (int, float) for x in column) for column in columns):
        raise ValueError(f"its history is {shown(history)}; it must be a dictionary of lists of numbers")
    training = json.loads(metadata["training"]) if "training" in metadata else None
    if training is not None and not isinstance(training, dict):
        raise ValueError(f"its training is {shown(training)}; it must be a dictionary")
    return architecture, optimizer, history, training


def _optimizer(description: Any) -> Optimizer:
    """Return the optimizer of a description: a name and values, one of which may be a schedule described the same way."""
    values = dict(description["values"])
    rate = values["learning_rate"]
    if isinstance(rate, dict):
        values["learning_rate"] = SCHEDULES.resolve(str(rate["name"]))(**rate["values"])
    return OPTIMIZERS.resolve(str(description["name"]))(**values)


def _expected(architecture: Architecture, optimizer: Optimizer | None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of each tensor that the file must hold."""
    real = DTYPES[architecture.real.name]
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for i, (d_in, d) in enumerate(pairwise(architecture.layer_sizes)):
        found |= {f"layers.{i}.weight": ((d, d_in), real), f"layers.{i}.bias": ((d,), real)}
    if optimizer is not None:
        fixed = layout.fixed(architecture)
        for buffer in (*layout.state(architecture, optimizer), fixed.counters, fixed.scalars):
            found[STATE + buffer.name] = buffer.shape, DTYPES[buffer.dtype.name]
    return found


def _expected_of_run(training: Mapping[str, Any] | None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of the arrays that a run declares; none is larger than the file, which has no gaps."""
    named = {} if training is None else training["tensors"]
    return {TRAINING + name: (tuple(shape), dtype) for name, (shape, dtype) in named.items()}


def _check_tensors(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"its tensors do not fit: missing {shown(missing) if missing else 'none'}, "
            f"not expected {shown(extra) if extra else 'none'}"
        )
    for name, (shape, dtype) in expected.items():
        if found[name] != (shape, dtype):
            have, has = found[name]
            raise ValueError(f"{name} has shape {have} and dtype {has}; the description requires {shape} and {dtype}")


def _check_state(state: Mapping[str, np.ndarray]) -> None:
    """Check the numbers of the training's progress; those of an optimizer's formulas may be anything."""
    if state and (int(state["counters"].min()) < 0 or not 0 <= float(state["rate"][0]) < np.inf):
        raise ValueError("the state of its optimizer has a negative count of steps, or no learning rate >= 0")


def _one_line(error: BaseException) -> str:
    return one_line(str(error), 300)
