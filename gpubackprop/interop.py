"""Arrays from outside: what comes in is of any kind, what goes out is of the kind that came in."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Backend
from gpubackprop.definitions import Array


def kind_of(a: Any) -> str:
    """Return the library of an array: "numpy", "cupy", "torch", "jax"; anything else counts as "numpy"."""
    module = type(a).__module__.partition(".")[0]
    return {"jaxlib": "jax"}.get(module, module if module in ("cupy", "torch", "jax") else "numpy")


def as_array(a: Any) -> Any:
    """Return ``a`` if it has a dtype, else a NumPy array of it: what has only ``__dlpack__`` shares its memory."""
    if hasattr(a, "dtype") and hasattr(a, "shape"):
        return a
    if hasattr(a, "__cuda_array_interface__"):
        return sys.modules["cupy"].asarray(a) if "cupy" in sys.modules else a
    on_host = hasattr(a, "__dlpack__") and a.__dlpack_device__()[0] == 1
    return np.from_dlpack(a) if on_host else np.asarray(a)


def to_backend(backend: Backend, a: Any, dtype: npt.DTypeLike | None = None) -> Array:
    """Return ``a`` on the backend's device: without a copy where the device and dtype are already right."""
    here = "cupy" if backend.xp.__name__ == "cupy" else "numpy"
    kind = kind_of(a)
    if kind == "torch" and getattr(a, "requires_grad", False):
        a = a.detach()
    if kind == here:
        return backend.asarray(a, dtype)
    if here == "cupy":
        if hasattr(a, "__cuda_array_interface__"):
            return backend.asarray(a, dtype)
        on_gpu = hasattr(a, "__dlpack_device__") and a.__dlpack_device__()[0] == 2
        return backend.asarray(backend.xp.from_dlpack(a) if on_gpu else np.asarray(a), dtype)
    return backend.asarray(_to_host(a, kind), dtype)


def _to_host(a: Any, kind: str) -> Any:
    if kind == "cupy":
        return a.get()
    if kind == "torch":
        return a.cpu().numpy()
    return a


def like(backend: Backend, result: Array, given: Any) -> Any:
    """Return ``result``, an array of the backend, as the kind of array that ``given`` is, where ``given`` is."""
    here = "cupy" if backend.xp.__name__ == "cupy" else "numpy"
    kind = kind_of(given)
    if kind == here:
        return result
    if kind == "cupy":
        return sys.modules["cupy"].asarray(backend.to_numpy(result))
    if kind == "torch":
        torch = sys.modules["torch"]
        on_gpu = given.device.type == "cuda"
        return torch.from_dlpack(result if on_gpu and here == "cupy" else backend.to_numpy(result)).to(given.device)
    if kind == "jax":
        return sys.modules["jax"].numpy.asarray(backend.to_numpy(result))
    return backend.to_numpy(result)
