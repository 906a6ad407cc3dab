"""Networks on disk: one safetensors file, with torch's names for the parameters and the network's description as metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from gpubackprop.backends.current import active
from gpubackprop.machine.files import write_whole
from gpubackprop.network import Network
from gpubackprop.optimizers import OPTIMIZERS, Optimizer
from gpubackprop.schedules import SCHEDULES, Schedule
from gpubackprop.step.layout import flat_size
from gpubackprop.training.history import History
from gpubackprop.training.model_file import FORMAT, STATE, TRAINING, ModelFile, digest, read_model

STATE_ARRAYS = ("states", "counters", "rate", "scalars")


def save(model: Network, path: str | Path, history: Mapping[str, list[float]] | None = None) -> None:
    """Write a network, and with a history also the state of its training: the whole file or nothing.

    Raises
    ------
    OSError
        The folder cannot be written to.
    """
    write_whole(Path(path), to_bytes(model, history))


def to_bytes(
    model: Network,
    history: Mapping[str, list[float]] | None = None,
    training: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """Return the content of a file: the same network, history and training have the same bytes.

    ``training`` and ``arrays`` describe a run: JSON values, and arrays.
    """
    from safetensors.numpy import save as serialized

    metadata = {"format": FORMAT, "mlp": json.dumps(model.architecture.to_json())}
    tensors = model.state_dict()
    state = model.optimizer_state
    if history is not None and state is not None:
        metadata["optimizer"] = json.dumps(describe(state.optimizer))
        metadata["history"] = json.dumps(history)
        for name in STATE_ARRAYS:
            tensors[STATE + name] = np.ascontiguousarray(model.backend.to_numpy(getattr(state, name)))
    if training is not None:
        own = {name: np.ascontiguousarray(a) for name, a in (arrays or {}).items()}
        metadata["training"] = json.dumps({**training, "tensors": _headers(own)}, sort_keys=True)
        tensors |= {TRAINING + name: a for name, a in own.items()}
    metadata["sha256"] = digest(tensors, metadata)
    return _in_order(serialized(tensors, metadata=metadata))


def _headers(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the shape and dtype of each tensor, as a safetensors file has them."""
    from safetensors.numpy import save as serialized

    content = serialized({name: a[:0] if a.ndim else a for name, a in tensors.items()})
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: [list(a.shape), header[name]["dtype"]] for name, a in tensors.items()}


def fingerprint(model: Network) -> str:
    """Return the SHA-256 of architecture and parameters, in hexadecimal digits: equal digests mean equal bits."""
    return digest(model.state_dict(), {"mlp": json.dumps(model.architecture.to_json())})


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted: the library writes them in another order each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the numbers aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def load_training(path: str | Path, device: str = "cpu") -> tuple[Network, History]:
    """Return the network in a file and the history of its training; ``fit`` with the same optimizer continues where it ended.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged, has another format, or names an activation, loss or initializer that is not registered. This is
        found before a network is made: see :mod:`gpubackprop.training.model_file`.
    """
    found = read_model(Path(path))
    return network_of(found, path, device), History(found.history)


def network_of(found: ModelFile, path: str | Path, device: str) -> Network:
    """Return the network of a file on a device, with its optimizer state if it has one."""
    a = found.architecture
    try:
        model = Network(a, device, np.zeros(flat_size(a.layer_sizes), a.real))  # replaced at once
        model.load_state_dict(found.parameters)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None
    if found.optimizer is not None:
        state = model.state_of(found.optimizer)
        with active(model.backend):
            for name, array in found.state.items():
                getattr(state, name)[...] = model.backend.asarray(array)
    return model


def describe(item: Optimizer | Schedule) -> dict[str, Any]:
    """Return the name and the values of an optimizer or a schedule."""
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    values = {k: describe(v) if isinstance(v, Schedule) else v for k, v in values.items()}
    registry: Any = OPTIMIZERS if isinstance(item, Optimizer) else SCHEDULES
    return {"name": next(name for name, kind in registry.items() if kind is type(item)), "values": values}
