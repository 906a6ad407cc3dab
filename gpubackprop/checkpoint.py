"""Networks on disk: one safetensors file, with torch's names for the parameters and the network's description as metadata."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpubackprop.activations import ACTIVATIONS
from gpubackprop.definitions import Definition
from gpubackprop.losses import LOSSES

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP

FORMAT = "gpubackprop-mlp-1"


def save(model: MLP, path: str | Path) -> None:
    """Write a network: all of the file or nothing.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    from safetensors.numpy import save as to_bytes

    description = {
        "layer_sizes": model.layer_sizes,
        "activation": [_describe(a) for a in model.activations],
        "loss": _describe(model.loss) | {"reduction": model.loss.reduction},
        "dtype": model.dtype.name,
        "seed": model.seed,
        "dropout": model.dropout,
    }
    content = to_bytes(model.state_dict(), metadata={"format": FORMAT, "mlp": json.dumps(description)})
    write_whole(Path(path), content)


def load(path: str | Path, device: str = "cpu") -> MLP:
    """Return the network in a file that :meth:`MLP.save` wrote, on any device.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is truncated, of another format, or names an activation or loss that is not registered.
    """
    from safetensors import SafetensorError, safe_open

    from gpubackprop.mlp import MLP

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is not a dict)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} holds format {metadata.get('format')!r}; this version reads {FORMAT!r}")
    try:
        description = json.loads(metadata["mlp"])
        loss = description["loss"]
        model = MLP(
            description["layer_sizes"],
            [_definition(ACTIVATIONS, a) for a in description["activation"]],
            _definition(LOSSES, loss)(reduction=loss["reduction"]),
            device,
            description["dtype"],
            description["seed"],
            dropout=description["dropout"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} has a damaged description: {error}") from None
    model.load_state_dict(state)
    return model


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _describe(definition: Definition) -> dict[str, Any]:
    return {"name": definition.name, "parameters": dict(definition.parameters)}


def _definition(registry: Any, description: dict[str, Any]) -> Any:
    entry = registry.resolve(description["name"])
    return entry(**description["parameters"]) if description["parameters"] else entry
