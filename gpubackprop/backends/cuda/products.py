"""Matrix products by cuBLASLt: planned once per shape, outside any capture, then one call without decisions.

CuPy refuses cuBLAS while a stream is captured, so a step that becomes a CUDA graph takes its products from here. cuBLASLt
reads memory by columns; a row-major (r, c) array is a column-major (c, r) one. So the product out = a b is computed as
out^T = b^T a^T: its first operand is b, its second a, and the transpose of a row-major array is column-major already, so
nothing is ever copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import cupy
import numpy as np
from nvmath.bindings import cublasLt as lt  # noqa: N813  (its name is in camel case)

from gpubackprop.definitions import Array

ALIGNMENT = 16
"""Bytes: the widest access of a thread. An address may be aligned to more, but that depends on what was allocated
before, and so would the plan and its bits."""
PLANS = 4096  # plans kept, one for each shape, type and order

Scratch = Callable[[int, np.dtype[Any]], Array]

# cudaDataType_t and cublasComputeType_t
CUDA_TYPE = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
COMPUTE_F32, COMPUTE_TF32, COMPUTE_F64 = 68, 77, 70
NOT_SUPPORTED = 15  # CUBLAS_STATUS_NOT_SUPPORTED

Epilogue = lt.Epilogue


class UnsupportedProductError(RuntimeError):
    """cuBLASLt has no algorithm for this product; the message says which."""


def is_transposed(a: Array) -> bool:
    """Return whether a matrix is the transpose of a C-contiguous one; raise ValueError if it is neither."""
    if a.flags.c_contiguous:
        return False
    if a.flags.f_contiguous:
        return True
    raise ValueError(
        f"a matrix of shape {a.shape} with strides {a.strides} is neither C-contiguous nor the transpose of one"
    )


class Kind(NamedTuple):
    """The shapes, orders and types of a product out = a b.

    Parameters
    ----------
    m, n, k : int
        out is (m, n), a is (m, k), b is (k, n).
    a_transposed, b_transposed : bool
        The operand is the transpose of a C-contiguous array.
    dtype, out_dtype : str
        Dtypes of the operands and the result; products of 16-bit types are summed in float32.
    """

    m: int
    n: int
    k: int
    a_transposed: bool
    b_transposed: bool
    dtype: str
    out_dtype: str

    def __str__(self) -> str:
        a, b = "transposed " * self.a_transposed, "transposed " * self.b_transposed
        return f"{a}({self.m}x{self.k}) {b}({self.k}x{self.n}), {self.dtype} to {self.out_dtype}"


def kind_of(a: Array, b: Array, out: Array) -> Kind:
    """Return the kind of the product out = a b; raise ValueError if the arrays form none."""
    check_product(a, b, out)
    (m, n), k = out.shape, a.shape[1]
    return Kind(m, n, k, is_transposed(a), is_transposed(b), a.dtype.name, out.dtype.name)


class Plan:
    """A product of a kind, with an epilogue; arrays are passed by address.

    Parameters
    ----------
    handle : int
        The handle of cuBLASLt.
    kind : Kind
    tf32 : bool
        Round float32 operands to TF32 for the tensor cores.
    epilogue : Epilogue
        The operation fused to the result.
    bias, aux, aux_ld : int
        Addresses of the epilogue's vector and matrix, and the leading dimension of the latter.
    alignment : int
        Bytes, the smallest of all arrays; an algorithm may rely on it.
    workspace : int
        Bytes an algorithm may use.

    Attributes
    ----------
    workspace : int
        Bytes that the chosen algorithm uses.

    Raises
    ------
    UnsupportedProductError
        There is no algorithm.
    """

    def __init__(
        self,
        handle: int,
        kind: Kind,
        *,
        tf32: bool = False,
        epilogue: Any = Epilogue.DEFAULT,
        bias: int = 0,
        aux: int = 0,
        aux_ld: int = 0,
        alignment: int = 16,
        workspace: int = 0,
    ) -> None:
        m, n, k, a_transposed, b_transposed, dtype, out_dtype = kind
        scale = "float64" if dtype == "float64" else "float32"
        compute = COMPUTE_F64 if dtype == "float64" else COMPUTE_TF32 if tf32 and dtype == "float32" else COMPUTE_F32
        self.handle = handle
        self.description = (
            f"{kind}{' in tf32' * (compute == COMPUTE_TF32)}, {Epilogue(epilogue).name}, aligned to {alignment} bytes"
        )
        self.desc = lt.matmul_desc_create(compute, CUDA_TYPE[scale])
        attribute = lt.MatmulDescAttribute
        settings: list[tuple[Any, int, Any]] = [
            (attribute.TRANSA, int(b_transposed), np.int32),
            (attribute.TRANSB, int(a_transposed), np.int32),
            (attribute.EPILOGUE, int(epilogue), np.uint32),
        ]
        settings += [(attribute.BIAS_POINTER, bias, np.uint64)] if bias else []
        if aux:
            settings += [
                (attribute.EPILOGUE_AUX_POINTER, aux, np.uint64),
                (attribute.EPILOGUE_AUX_LD, aux_ld, np.int64),
            ]
        for name, value, integer in settings:
            buffer = np.array([value], integer)
            lt.matmul_desc_set_attribute(self.desc, name, buffer.ctypes.data, buffer.nbytes)
        type_, out_type = CUDA_TYPE[dtype], CUDA_TYPE[out_dtype]
        # first operand b, second a, each as stored, by columns
        self.b_layout = lt.matrix_layout_create(type_, *((k, n, k) if b_transposed else (n, k, n)))
        self.a_layout = lt.matrix_layout_create(type_, *((m, k, m) if a_transposed else (k, m, k)))
        self.out_layout = lt.matrix_layout_create(out_type, n, m, n)
        weakref.finalize(self, _destroy, self.desc, self.a_layout, self.b_layout, self.out_layout)
        self._one_and_zero = np.array([1, 0], scale)
        self.alpha = self._one_and_zero.ctypes.data
        self.beta = self.alpha + self._one_and_zero.itemsize
        self._choose(alignment, workspace)

    def _choose(self, alignment: int, workspace: int) -> None:
        """Take the first algorithm of cuBLASLt's heuristic, and keep it, so results keep their bits."""
        preference = lt.matmul_preference_create()
        names = lt.MatmulPreferenceAttribute
        limit, aligned = np.array([workspace], np.uint64), np.array([alignment], np.uint32)
        lt.matmul_preference_set_attribute(preference, names.MAX_WORKSPACE_BYTES, limit.ctypes.data, limit.nbytes)
        for which in "ABCD":  # the default, 256 bytes, would be wrong for views into the flat parameters
            name = getattr(names, f"MIN_ALIGNMENT_{which}_BYTES")
            lt.matmul_preference_set_attribute(preference, name, aligned.ctypes.data, aligned.nbytes)
        self._results = np.zeros(1, lt.matmul_heuristic_result_dtype)
        found = np.zeros(1, np.int32)
        layouts = (self.b_layout, self.a_layout, self.out_layout, self.out_layout)
        try:
            lt.matmul_algo_get_heuristic(
                self.handle, self.desc, *layouts, preference, 1, self._results.ctypes.data, found.ctypes.data
            )
        except lt.cuBLASLtError as error:
            if error.status != NOT_SUPPORTED:
                raise
        finally:
            lt.matmul_preference_destroy(preference)
        if not found[0]:
            raise UnsupportedProductError(f"cuBLASLt has no algorithm for {self.description}")
        self.algorithm = self._results["algo"].ctypes.data
        self.workspace = int(self._results["workspace_size"][0])

    def __call__(self, a: int, b: int, out: int, workspace: int, workspace_bytes: int, stream: int) -> None:
        """Queue the product on a stream; a, b, out and workspace are addresses."""
        lt.matmul(
            self.handle, self.desc, self.alpha, b, self.b_layout, a, self.a_layout, self.beta, out, self.out_layout,
            out, self.out_layout, self.algorithm, workspace, workspace_bytes, stream,
        )  # fmt: skip

    def bind(self, a: Array, b: Array, out: Array, scratch: Scratch) -> Product:
        """Return the product of these arrays, with a workspace of the size that the algorithm uses from ``scratch``."""
        workspace = scratch(self.workspace, np.dtype(np.uint8)) if self.workspace else None
        return Product(self, a.data.ptr, b.data.ptr, out.data.ptr, workspace)


def _destroy(desc: int, *layouts: int) -> None:
    lt.matmul_desc_destroy(desc)
    for each in layouts:
        lt.matrix_layout_destroy(each)


class Product(NamedTuple):
    """A plan, its arrays by address, and its workspace; called, it queues the product on CuPy's current stream."""

    plan: Plan
    a: int
    b: int
    out: int
    workspace: Array | None

    def __call__(self) -> None:
        place, nbytes = (0, 0) if self.workspace is None else (self.workspace.data.ptr, self.workspace.nbytes)
        self.plan(self.a, self.b, self.out, place, nbytes, cupy.cuda.get_current_stream().ptr)


class Products:
    """The plans of one device."""

    def __init__(self, index: int, *, tf32: bool = False) -> None:
        self.index, self.tf32 = index, tf32
        with cupy.cuda.Device(index) as device:
            self.handle = lt.create()
            major = int(device.compute_capability[:-1])
        self.most_workspace = (32 if major >= 9 else 8) << 20
        weakref.finalize(self, lt.destroy, self.handle)
        self.plan = lru_cache(maxsize=PLANS)(self._plan)
        self._loaded: set[str] = set()

    def _plan(self, kind: Kind, alignment: int) -> Plan:
        def plan(alignment: int) -> Plan:
            return Plan(self.handle, kind, tf32=self.tf32, alignment=alignment, workspace=self.most_workspace)

        names = (kind.dtype, kind.out_dtype)
        least = min(np.dtype(np.float16 if name == "bfloat16" else name).itemsize for name in names)
        with cupy.cuda.Device(self.index):
            try:
                return plan(alignment)
            except UnsupportedProductError:
                if alignment <= least:
                    raise
                return plan(least)

    def plan_for(self, a: Array, b: Array, out: Array) -> Plan:
        """Return the plan of out = a b, from the arrays' shapes, types, orders and addresses.

        Raises
        ------
        ValueError
            The arrays do not form a product.
        UnsupportedProductError
            cuBLASLt has no algorithm for it.
        """
        plan: Plan = self.plan(kind_of(a, b, out), alignment_of(a, b, out))
        return plan

    def load(self, product: Product) -> None:
        """Run a product once, if none of its kind has run: loading its code during a capture is not allowed."""
        plan = product.plan
        if plan.description not in self._loaded:
            workspace = cupy.empty(plan.workspace, np.uint8) if plan.workspace else None  # not the step's
            product._replace(workspace=workspace)()
            self._loaded.add(plan.description)


def alignment_of(*arrays: Array) -> int:
    """Return the largest power of two, up to :data:`ALIGNMENT`, that all addresses are multiples of."""
    return min(ALIGNMENT, *(int(a.data.ptr) & -int(a.data.ptr) for a in arrays))


def check_product(a: Array, b: Array, out: Array) -> None:
    """Raise ValueError unless out = a b is a product of matrices of one type; 16-bit operands may have a float32 result."""
    shapes = a.ndim == b.ndim == out.ndim == 2 and (a.shape[0], b.shape[1]) == out.shape and a.shape[1] == b.shape[0]
    types = a.dtype == b.dtype and a.dtype.name in CUDA_TYPE
    types = types and (out.dtype == a.dtype or (a.dtype.itemsize == 2 and out.dtype == np.float32))
    if not shapes or not types or not out.flags.c_contiguous:
        raise ValueError(
            f"not a product: {a.shape} of {a.dtype} by {b.shape} of {b.dtype} into {out.shape} of {out.dtype}, strides "
            f"{out.strides}; it must be (m, k) by (k, n) of one floating dtype into (m, n), C-contiguous"
        )
