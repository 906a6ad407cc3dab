"""Arrays of other libraries: inputs may be of any kind, results are of the kind that came in.

On a GPU arrays are used in place, and work is put on CuPy's current stream after their producer's queued work. Where
an array tells its producer's stream (``__dlpack__``, or the ``stream`` of ``__cuda_array_interface__``), an event orders them
and the host does not wait. A CuPy array tells no stream: if it was made on another stream, its owner must order it, by an
event or by ``synchronize()``, as everywhere in CuPy. The same holds after a call: queued work may still read the array, so
another stream must not write to it before that is done.
"""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpubackprop.definitions import Array, check_dtype

if TYPE_CHECKING:
    from gpubackprop.backends.base import Backend

ON_GPU = (2, 13)  # kDLCUDA, kDLCUDAManaged


def kind_of(a: Any) -> str:
    """Return the library of an array: "numpy", "cupy", "torch", "jax"; "cupy" for others on a GPU, "numpy" for the rest."""
    module = type(a).__module__.partition(".")[0]
    module = {"jaxlib": "jax"}.get(module, module)
    if module in ("numpy", "cupy", "torch", "jax"):
        return module
    return "cupy" if on_gpu(a) else "numpy"


def on_gpu(a: Any) -> bool:
    """Return whether an array is on a CUDA device."""
    # asked first: torch's __cuda_array_interface__ raises where a gradient is required
    if hasattr(a, "__dlpack_device__"):
        return bool(a.__dlpack_device__()[0] in ON_GPU)
    return hasattr(a, "__cuda_array_interface__")


def as_array(a: Any, name: str = "a") -> Any:
    """Return ``a`` if its library is known, else a CuPy or NumPy array of it, in the same memory where it has an interface.

    Raises
    ------
    ValueError
        It is not an array; the message has its name.
    """
    try:
        return _as_array(a, name)
    except MemoryError as error:
        raise MemoryError(f"{name} is too large for the memory: {error or type(a).__name__}") from error
    except ValueError:
        raise
    except Exception as error:  # converting an object may raise anything
        raise ValueError(f"{name} is not an array of real numbers: {type(a).__name__}") from error


def _as_array(a: Any, name: str) -> Any:
    known = type(a).__module__.partition(".")[0] in ("numpy", "cupy", "torch", "jax", "jaxlib")
    if not known:
        if on_gpu(a):
            return as_cupy(a)
        if not hasattr(a, "dtype") and hasattr(a, "__dlpack__"):
            return np.from_dlpack(a)
    if isinstance(a, np.ma.MaskedArray):
        if np.ma.is_masked(a):
            raise ValueError(f"{name} is a masked array with masked values; fill them in, or leave their samples out")
        return a.data
    if hasattr(a, "dtype") and hasattr(a, "shape") and (known or hasattr(a, "__array__")):
        return a
    if hasattr(a, "__next__"):
        raise ValueError(f"{name} is of type {type(a).__name__}, which can be read only once; give an array")
    try:
        result = np.asarray(a)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} is not an array of real numbers: {type(a).__name__}") from error
    if result.dtype == object:
        raise ValueError(f"{name} is not an array of real numbers: {type(a).__name__}")
    return result


class _Unsynchronized:
    """An array's interface without its stream, for whose work CuPy would let the host wait; keeps the array."""

    def __init__(self, a: Any, interface: dict[str, Any]) -> None:
        self.array, self.__cuda_array_interface__ = a, interface


def as_cupy(a: Any) -> Any:
    """Return a CuPy array in the memory of an array on a GPU; CuPy's current stream then comes after its producer's work."""
    import cupy

    if isinstance(a, cupy.ndarray):
        return a
    if getattr(a, "requires_grad", False):  # torch
        a = a.detach()
    if hasattr(a, "__dlpack__"):
        return cupy.from_dlpack(a)  # the producer lets our stream wait
    interface = dict(a.__cuda_array_interface__)
    pointer, producer = interface["data"][0], interface.pop("stream", None)
    with cupy.cuda.Device(cupy.cuda.runtime.pointerGetAttributes(pointer).device if pointer else None):
        consumer = cupy.cuda.get_current_stream()
        if producer is not None and producer != (consumer.ptr or 1):  # 1 is what the interface calls the legacy stream
            event = cupy.cuda.Event(disable_timing=True)
            cupy.cuda.runtime.eventRecord(event.ptr, producer)
            consumer.wait_event(event)
        return cupy.asarray(_Unsynchronized(a, interface))


def to_backend(backend: Backend, a: Any, dtype: npt.DTypeLike | None = None) -> Array:
    """Return ``a`` on the backend's device: without a copy where the device and dtype are already right."""
    stays = backend.xp.__name__ == "cupy" and on_gpu(a)
    return backend.asarray(as_cupy(a) if stays else on_host(a), dtype)


def on_host(a: Any) -> Any:
    """Return a NumPy array of an array anywhere."""
    kind = kind_of(a)
    if kind == "cupy":
        return as_cupy(a).get()
    if kind != "torch":
        return np.asarray(a)
    a = a.detach().cpu()
    if str(a.dtype) == "torch.bfloat16":  # which NumPy does not know
        return a.view(sys.modules["torch"].int16).numpy().view(check_dtype("bfloat16"))
    return a.numpy()


def rows_of(a: Any, rows: np.ndarray) -> Any:
    """Return some rows of an array anywhere, as an array of the same kind."""
    return a[sys.modules["cupy"].asarray(rows) if kind_of(a) == "cupy" else rows]


def bytes_to_copy(backend: Backend, a: Any, dtype: npt.DTypeLike) -> int:
    """Return the bytes that :func:`to_backend` allocates for an array: none if it is on the device in this dtype."""
    dtype = np.dtype(dtype)
    there = on_gpu(a) if backend.xp.__name__ == "cupy" else not on_gpu(a)
    contiguous = getattr(getattr(a, "flags", None), "c_contiguous", True)
    if there and contiguous and str(a.dtype).removeprefix("torch.") == dtype.name:
        return 0
    return int(math.prod(a.shape)) * dtype.itemsize


def like(backend: Backend, result: Array, given: Any) -> Any:
    """Return ``result``, an array of the backend, as the kind of array that ``given`` is, where ``given`` is."""
    here = "cupy" if backend.xp.__name__ == "cupy" else "numpy"
    kind = kind_of(given)
    if kind == here:
        return result
    if kind == "cupy":
        with device_of(as_cupy(given)):
            return sys.modules["cupy"].asarray(backend.to_numpy(result))
    stays = here == "cupy" and on_gpu(given)
    if kind == "torch":
        return sys.modules["torch"].from_dlpack(result if stays else backend.to_numpy(result)).to(given.device)
    if kind == "jax":
        jnp = sys.modules["jax"].numpy
        return jnp.from_dlpack(result) if stays else jnp.asarray(backend.to_numpy(result))
    return backend.to_numpy(result)


def device_of(a: Any) -> AbstractContextManager[Any]:
    """Return a context in which the device of an array is the current one."""
    return a.device if type(a).__module__.partition(".")[0] == "cupy" else nullcontext()
