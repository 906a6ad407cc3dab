"""From a Python function to a kernel on the device: Numba -> PTX -> cubin -> disk -> ``cuda.core``.

Numba's own dispatcher costs tens of microseconds per launch; a kernel with raw pointers, launched by ``cuda.core``, half a
microsecond. Linking to a cubin needs no device and no driver, and a cubin runs on any driver of the same CUDA major version,
while PTX would need one as new as the toolkit.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import config

from gpubackprop.code_digest import Digest, fingerprint, thaw
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.storage import STORAGE
from gpubackprop.kernels.source import source_digest
from gpubackprop.machine import cache as disk

THREADS = 256
"""Threads per block."""
OCCUPANCY = 0.5
"""The least occupancy of a kernel, 50 %; it bounds the registers per thread."""
OCCUPANCY_FLOAT64 = OCCUPANCY / 2
"""The same for float64, whose numbers take two registers each: exp, log and erf would not fit in 64."""
MULTIPROCESSOR_THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12, 0): 1536, (12, 1): 1536}
"""Threads per multiprocessor, where it is not 2048. Source: CUDA C++ Programming Guide, "Compute Capabilities"."""


def occupancy_of(dtype: np.dtype[Any]) -> float:
    """Return :data:`OCCUPANCY` or :data:`OCCUPANCY_FLOAT64`."""
    return OCCUPANCY_FLOAT64 if dtype == np.float64 else OCCUPANCY


@dataclass(frozen=True, eq=False)
class Source:
    """A kernel before compilation.

    Parameters
    ----------
    name : str
        Its name in profilers.
    function : callable
        Plain Python over raw pointers; in the simulator over flat arrays.
    parameters : mapping
        The types of its parameters by name, as :func:`~gpubackprop.kernels.cuda.parameters.declared` returns them.
    threads : int
        Threads per block, at most.
    occupancy : float
        The least occupancy.
    """

    name: str
    function: Any
    parameters: Mapping[str, str]
    threads: int = THREADS
    occupancy: float = OCCUPANCY

    def arguments(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return arguments in the order of the parameters; all must be given, and no others."""
        if given.keys() == self.parameters.keys():
            return tuple(map(given.__getitem__, self.parameters))
        missing = [f"lacks {name}" for name in self.parameters if name not in given]
        unknown = [f"has no {name}" for name in given if name not in self.parameters]
        problems, names = ", ".join(missing + unknown), ", ".join(self.parameters)
        raise TypeError(f"a launch of {self.name} {problems}; its parameters are {names}")


def label(*parts: object) -> str:
    """Return the name of a kernel, as in ``bias_activation_backward_relu_f4_v4``."""
    return "_".join(str(part) for part in parts if part != "")


def resident(source: Source, capability: tuple[int, int]) -> int:
    """Return the least number of resident blocks per multiprocessor."""
    return max(1, int(MULTIPROCESSOR_THREADS.get(capability, 2048) * source.occupancy) // source.threads)


def _numba_type(name: str) -> Any:
    kind = numba.from_dtype(STORAGE[name.removesuffix("*")])
    return numba.types.CPointer(kind) if name.endswith("*") else kind


def compile_ptx(source: Source, capability: tuple[int, int]) -> str:
    """Return the PTX of a kernel for a compute capability, with the kernel's readable name as its entry."""
    signature = numba.void(*map(_numba_type, source.parameters.values()))
    thaw(source.function)
    # abi="numba" is the only one for kernels; with pointers and numbers it has one parameter per argument.
    bounds = (source.threads, resident(source, capability))
    ptx, _ = cuda.compile(source.function, signature, cc=capability, abi="numba", device=False, launch_bounds=bounds)
    entry = re.search(r"\.visible \.entry (\w+)\(", ptx)
    assert entry is not None
    return str(ptx).replace(entry[1], source.name)


def link(ptx: str, capability: tuple[int, int]) -> bytes:
    """Return the cubin of a kernel."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch="sm_{}{}".format(*capability))
    return bytes(Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin").code)


@cache
def _compiler() -> Digest:
    """Return a digest of the compiler and linker: of the packages, and of the libraries found, however installed."""
    from cuda import pathfinder
    from cuda.bindings import nvjitlink, nvvm

    names = ("numba", "llvmlite", "cuda_", "nvidia_", "numpy")
    packages = sorted(
        f"{found.name} {found.version}"
        for found in distributions()
        if found.name and found.name.lower().replace("-", "_").startswith(names)
    )
    libraries = []
    for name in ("nvvm", "nvJitLink"):
        path = Path(pathfinder.load_nvidia_dynamic_lib(name).abs_path or "")
        libraries.append((path.name, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None)
    settings = {name: repr(value) for name, value in vars(config).items() if name.isupper() and "CUDA" in name}
    return fingerprint(
        source_digest(),
        sys.version,
        packages,
        libraries,
        settings,
        nvvm.version(),
        nvvm.ir_version(),
        nvjitlink.version(),
    )


def cubin(source: Source, capability: tuple[int, int]) -> bytes:
    """Return the cubin of a kernel, from disk if it was compiled before."""
    digest = fingerprint(_compiler(), source, capability, resident(source, capability))
    name = "{}-sm_{}{}-{}.cubin".format(source.name, *capability, digest)
    content = disk.read(name) if digest.lasting else None
    if content is None:
        content = link(compile_ptx(source, capability), capability)
        if digest.lasting:
            disk.write(name, content)
    return content


@cache
def load(source: Source, capability: tuple[int, int]) -> Any:
    """Return a kernel that can be launched on any device of that compute capability."""
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(cubin(source, capability)).get_kernel(source.name)


@lru_cache(maxsize=4096)
def launch_config(grid: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """Return a launch configuration."""
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=block)
