"""The parameters of a CUDA kernel are declared once, by their annotations."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed; make test-all installs it")

from gpubackprop.definitions import check_dtype
from gpubackprop.kernels.cuda.compile import Source
from gpubackprop.kernels.cuda.parameters import F8, I, P, R, S, Y, declared
from gpubackprop.kernels.cuda.unroll import numbered, unrolled

pytestmark = pytest.mark.compilers


def kernel(z: P[S], y: P[Y], partial: P[R], total: P[F8], scale: R, numbers: R, size: I) -> None:
    pass


@pytest.mark.parametrize(
    ("dtype", "stored", "real"),
    [("float32", "f4", "f4"), ("float64", "f8", "f8"), ("float16", "f2", "f4"), ("bfloat16", "bf16", "f4")],
)
def test_types_follow_from_annotations_and_the_dtype(dtype: str, stored: str, real: str) -> None:
    types = declared(kernel, check_dtype(dtype), Y="i8")
    values = [f"{stored}*", "i8*", f"{real}*", "f8*", real, real, "i8"]
    assert list(types.items()) == list(
        zip(("z", "y", "partial", "total", "scale", "numbers", "size"), values, strict=True)
    )


def test_a_parameter_that_stands_for_several_numbers_becomes_so_many() -> None:
    types = declared(partial(unrolled, numbers=2)(kernel), np.dtype(np.float32), Y="i8")
    assert list(types)[4:] == ["scale", "numbers_0", "numbers_1", "size"]
    assert types["numbers_1"] == "f4"
    assert numbered("numbers", (0.9, 0.99)) == {"numbers_0": 0.9, "numbers_1": 0.99}


def test_a_parameter_without_an_annotation_is_named() -> None:
    def bare(z: P[S], size) -> None:  # type: ignore[no-untyped-def]
        pass

    with pytest.raises(TypeError, match="the parameter size of a kernel has no annotation"):
        declared(bare, np.dtype(np.float32))


def test_arguments_are_given_by_name_all_and_no_others() -> None:
    def add(x: P[S], y: P[S], n: I) -> None:
        pass

    source = Source("add_f4", add, declared(add, np.dtype(np.float32)))
    given: dict[str, Any] = {"n": 3, "y": 2, "x": 1}
    assert source.arguments(given) == (1, 2, 3)
    with pytest.raises(TypeError, match=r"a launch of add_f4 lacks y, lacks n, has no m; its parameters are x, y, n$"):
        source.arguments({"x": 1, "m": 3})
