"""Networks on disk: one safetensors file, with torch's names for the parameters and the network's description as metadata."""

from __future__ import annotations

import json
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
from gpubackprop.training.model_file import FORMAT, STATE, digest, read_model

STATE_ARRAYS = ("states", "counters", "rate", "scalars")


def save(model: Network, path: str | Path, history: dict[str, list[float]] | None = None) -> None:
    """Write a network, and with a history also the state of its training: all of the file or nothing.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    from safetensors.numpy import save as to_bytes

    metadata = {"format": FORMAT, "mlp": json.dumps(model.architecture.to_json())}
    tensors = model.state_dict()
    state = model.optimizer_state
    if history is not None and state is not None:
        metadata["optimizer"] = json.dumps(_describe_dataclass(state.optimizer))
        metadata["history"] = json.dumps(history)
        for name in STATE_ARRAYS:
            tensors[STATE + name] = np.ascontiguousarray(model.backend.to_numpy(getattr(state, name)))
    metadata["sha256"] = digest(tensors, metadata)
    write_whole(Path(path), _in_order(to_bytes(tensors, metadata=metadata)))


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted: the library writes them in another order each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers stay aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def load_training(path: str | Path, device: str = "cpu") -> tuple[Network, History]:
    """Return the network in a file and the history of its training; ``fit`` with the same optimizer goes on where it ended.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged, of another format, or names an activation, loss or initializer that is not registered. That is
        found before a network is made: see :mod:`gpubackprop.training.model_file`.
    """
    found = read_model(Path(path))
    a = found.architecture
    try:
        model = Network(a, device, np.zeros(flat_size(a.layer_sizes), a.real))  # not drawn: they are replaced at once
        model.load_state_dict(found.parameters)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None
    if found.optimizer is not None:
        state = model.state_of(found.optimizer)
        with active(model.backend):
            for name, array in found.state.items():
                getattr(state, name)[...] = model.backend.asarray(array)
    return model, History(found.history)


def _describe_dataclass(item: Optimizer | Schedule) -> dict[str, Any]:
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    values = {k: _describe_dataclass(v) if isinstance(v, Schedule) else v for k, v in values.items()}
    registry: Any = OPTIMIZERS if isinstance(item, Optimizer) else SCHEDULES
    return {"name": next(name for name, kind in registry.items() if kind is type(item)), "values": values}
