"""Unusual arrays: with any strides, dtype or memory, an array gives the right numbers or a clear error."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpubackprop as gb

PROPERTY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
TRUTH = gb.MLP([3, 4, 2], "tanh", device="reference", dtype="float64", seed=1)
MODELS = {device: gb.MLP([3, 4, 2], "tanh", device=device, seed=1) for device in ("reference", "cpu")}
for model in MODELS.values():
    model.load_state_dict(TRUTH.state_dict())
PREDICTORS = {device: model.predictor(4) for device, model in MODELS.items()}
ERRORS = (ValueError, TypeError)


def on_disk(a: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, a.dtype, "w+", shape=a.shape)
    mapped[...] = a
    return mapped


def unaligned(a: np.ndarray) -> np.ndarray:
    memory = np.zeros(a.nbytes + 1, np.uint8)
    result: np.ndarray = memory[1:].view(a.dtype).reshape(a.shape)
    result[...] = a
    return result


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.setflags(write=False)
    return a


# the same numbers in other memory
FORMS: dict[str, Any] = {
    "contiguous": lambda a: a,
    "fortran": np.asfortranarray,
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "columns backwards": lambda a: a[..., ::-1].copy()[..., ::-1],
    "part": lambda a: np.pad(a, 1)[(slice(1, -1),) * a.ndim],
    "read-only": read_only,
    "mapped": on_disk,
    "unaligned": unaligned,
    "big endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "little endian": lambda a: a.astype(a.dtype.newbyteorder("<")),
    "list": lambda a: a.tolist(),
    "tuple of rows": lambda a: tuple(a) if a.ndim else a,
    "matrix": lambda a: a.view(np.matrix) if a.ndim == 2 else a,
    "nothing masked": np.ma.masked_array,
    "record": lambda a: np.rec.fromarrays([a], names="x").x,
}
NUMBERS = ["float32", "float64", "float16", "longdouble", "int8", "int64", "uint8", "uint64", "bool"]


def close(a: Any, b: Any) -> bool:
    # float32 rounding of sums of at most 5 terms of values up to 2
    return np.shape(a) == np.shape(b) and bool(np.allclose(np.asarray(a, np.float64), b, rtol=1e-4, atol=1e-5))


@settings(PROPERTY)
@given(
    form=st.sampled_from(sorted(FORMS)),
    y_form=st.sampled_from(sorted(FORMS)),
    dtype=st.sampled_from(NUMBERS),
    y_dtype=st.sampled_from(["int64", "int8", "uint64", "float64", "bool"]),
    n=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("device", MODELS)
def test_any_memory_gives_the_numbers_of_the_reference(
    device: str, form: str, y_form: str, dtype: str, y_dtype: str, n: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    plain_X = rng.integers(0, 2, (n, 3)).astype(dtype)
    plain_y = rng.integers(0, 2, n).astype(y_dtype)
    X, y, w = FORMS[form](plain_X), FORMS[y_form](plain_y), FORMS[form](np.arange(1.0, n + 1))
    model, exact_X, exact_y = MODELS[device], plain_X.astype(np.float64), plain_y.astype(np.int64)
    assert close(model.forward(X), TRUTH.forward(exact_X))
    assert close(model.predict_proba(X), TRUTH.predict_proba(exact_X))
    assert close(
        list(model.evaluate(X, y, w).values()), list(TRUTH.evaluate(exact_X, exact_y, np.arange(1.0, n + 1)).values())
    )
    loss, gradients = model.loss_and_gradients(X, y, w)
    truth, expected = TRUTH.loss_and_gradients(exact_X, exact_y, np.arange(1.0, n + 1))
    assert close(loss, truth)
    assert close(gradients.flat, expected.flat)
    assert close(model.backward(model.forward(X)).flat, TRUTH.backward(TRUTH.forward(exact_X)).flat)
    if n == 4:
        assert close(PREDICTORS[device](X), TRUTH.forward(exact_X))


BAD: dict[str, Any] = {
    "complex": np.ones((4, 3), complex),
    "text": np.full((4, 3), "a"),
    "objects": np.full((4, 3), object()),
    "ragged": [[1.0, 2.0, 3.0], [1.0]],
    "dates": np.zeros((4, 3), "datetime64[s]"),
    "structured": np.zeros((4, 3), [("x", "f4")]),
    "bytes": b"123456789012",
    "number": 3.0,
    "none": None,
    "one dimension": np.ones(3),
    "three dimensions": np.ones((4, 3, 1)),
    "empty": np.ones((0, 3)),
    "no columns": np.ones((4, 0)),
    "too wide": np.ones((4, 5)),
    "masked": np.ma.masked_greater(np.arange(12.0).reshape(4, 3), 5),
    "dictionary": {"x": 1},
    "zero-dimensional": np.array(1.0),
}


@pytest.mark.parametrize("device", MODELS)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_matrix_of_numbers_is_refused(kind: str, device: str) -> None:
    model, bad, y = MODELS[device], BAD[kind], np.array([0, 1, 0, 1])
    before = model.parameters.flat.copy()
    calls = [
        lambda: model.forward(bad),
        lambda: model.predict(bad),
        lambda: model.evaluate(bad, y),
        lambda: model.loss_and_gradients(bad, y),
        lambda: model.trace(bad, y),
        lambda: model.fit(bad, y, epochs=1, progress=False),
        lambda: PREDICTORS[device](bad),
        lambda: list(model.outputs_in_batches(bad)),
        lambda: model.loss_and_gradients(np.ones((4, 3)), bad),
        lambda: model.loss_and_gradients(np.ones((4, 3)), y, np.ones((4, 3)) if bad is None else bad),
        lambda: (model.forward(np.ones((4, 3))), model.backward(bad)),
    ]
    for call in calls:
        with pytest.raises(ERRORS):
            call()
    np.testing.assert_array_equal(model.parameters.flat, before)


@settings(PROPERTY)
@given(shape=st.lists(st.integers(0, 5), max_size=3), form=st.sampled_from(["contiguous", "fortran", "backwards", "read-only"]),
       dtype=st.sampled_from([*NUMBERS, "complex64", "S3", "object"]), place=st.integers(0, 5))  # fmt: skip
def test_operations_agree_or_refuse_alike(shape: list[int], form: str, dtype: str, place: int) -> None:
    """One strange array among the arguments: the CPU does what the reference does, or both refuse."""
    outcomes = []
    for device in MODELS:
        backend: Any = gb.get_backend(device)
        arguments: list[Any] = [np.full((4, 3), 0.5, np.float32), np.ones(3, np.float32), np.zeros((4, 3), np.float32)]
        strange = FORMS[form](np.ones(shape, "f4").astype(dtype)) if shape else np.ones((), "f4").astype(dtype)
        arguments[place % 3] = strange
        z, b, out = arguments
        try:
            if place < 3:
                backend.bias_activation_forward(z, b, gb.activations.ACTIVATIONS["relu"], out=out)
                outcomes.append([np.array(out), np.array(z)])
            else:
                outcomes.append([backend.matmul(z, b.reshape(3, 1) if b.size == 3 and b.ndim == 1 else b)])
        except ERRORS as error:
            outcomes.append([type(error)])
    reference, cpu = outcomes
    assert len(reference) == len(cpu)
    for a, c in zip(reference, cpu, strict=True):
        assert a is c if isinstance(a, type) else (not isinstance(c, type) and np.allclose(a, c))
