"""No operation takes arrays that its kernels would read or write outside of: the same errors on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.losses import LOSSES
from gpubackprop.network import Data
from gpubackprop.step.operations import OPERATIONS
from gpubackprop.step.state import CURSOR

HOST = ["reference", "cpu"]
RELU, CROSS_ENTROPY, MSE = ACTIVATIONS["relu"], LOSSES["softmax_cross_entropy"], LOSSES["mean_squared_error"]


def calls(n: int = 4, d: int = 3, dtype: str = "float32") -> dict[str, dict[str, Any]]:
    """Return arguments that fit, for each operation."""
    counters, scalars, rate = np.zeros(2, np.int64), np.zeros(8, dtype), np.full(1, 0.1)

    def new(*shape: int) -> np.ndarray:
        return np.ones(shape, dtype)

    return {
        "matmul": {"a": new(n, 5), "b": new(5, d), "out": new(n, d)},
        "bias_activation_forward": {"z": new(n, d), "b": new(d), "activation": RELU, "out": new(n, d)},
        "bias_activation_backward": {
            "dh": new(n, d), "z": None, "h": new(n, d), "activation": RELU, "out": new(n, d), "db": new(d)
        },
        "bias_loss": {
            "z": new(n, d), "b": new(d), "y": np.arange(n) % d, "loss": CROSS_ENTROPY, "weight": new(n),
            "out": new(n, d), "db": new(d), "value": np.zeros(2), "scalars": None, "samples": None,
        },
        "normalize_weights": {"weight": new(n), "out": new(n)},
        "dropout": {"x": new(n, d), "rate": 0.5, "seed": 1, "layer": 0, "counters": counters, "out": new(n, d)},
        "gather": {"source": new(9, d), "order": np.arange(9), "counters": counters, "out": new(n, d)},
        "accumulate": {"total": new(d), "term": new(d), "out": new(d)},
        "clip": {"gradients": new(d), "max_norm": 1.0, "scalars": scalars, "loss_scaling": False},
        "advance": {
            "optimizer": gb.Adam(), "rate": rate, "batch": n, "counters": counters, "scalars": scalars, "loss_scaling": False
        },
        "update": {
            "optimizer": gb.Adam(), "parameters": new(d), "gradients": new(d), "states": new(2, d), "scalars": scalars,
            "weights": None,
        },
    }  # fmt: skip


ARRAYS = [(name, key) for name, given in calls().items() for key, a in given.items() if isinstance(a, np.ndarray)]
WRITTEN = [
    ("matmul", "out"), ("bias_activation_forward", "z"), ("bias_activation_forward", "out"),
    ("bias_activation_backward", "out"), ("bias_activation_backward", "db"), ("bias_loss", "out"), ("bias_loss", "value"),
    ("normalize_weights", "out"), ("dropout", "out"), ("gather", "out"), ("accumulate", "out"), ("clip", "scalars"),
    ("advance", "counters"), ("update", "parameters"), ("update", "states"),
]  # fmt: skip


def refuse(device: str, name: str, given: dict[str, Any], match: str, error: type[Exception] = ValueError) -> None:
    """Both the eager call and the binding of a step refuse such arguments."""
    backend: Any = gb.get_backend(device)
    with pytest.raises(error, match=match):
        getattr(backend, name)(**given)
    with pytest.raises(error, match=match):
        backend.bind(OPERATIONS[name](**given))


@pytest.mark.parametrize("device", HOST)
@pytest.mark.parametrize("name", calls())
def test_what_fits_is_taken(name: str, device: str) -> None:
    backend: Any = gb.get_backend(device)
    getattr(backend, name)(**calls()[name])
    backend.bind(OPERATIONS[name](**calls()[name]))


@pytest.mark.parametrize("device", HOST)
@pytest.mark.parametrize(("name", "key"), ARRAYS)
def test_other_shapes_dtypes_and_orders_are_refused(name: str, key: str, device: str) -> None:
    a = calls()[name][key]
    bad = {
        "shape": np.ones((*a.shape, 2), a.dtype),
        "float|int64|computes": a.astype(np.float16 if device == "cpu" else np.int32),
        "byte order|int64|float": a.astype(a.dtype.newbyteorder(">")),
        "contiguous": np.ones((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)[..., ::2],
        "contiguous|shape": np.broadcast_to(a[:1], a.shape) if len(a) > 1 else a[:0],
        "empty|shape": a[:0],
        "begin": np.frombuffer(bytearray(a.nbytes + 1), np.uint8)[1:].view(a.dtype).reshape(a.shape),
    }
    for match, other in bad.items():
        if other.flags.c_contiguous and other.flags.aligned and other.dtype == a.dtype and other.shape == a.shape:
            continue  # one element is in any order
        refuse(device, name, calls()[name] | {key: other}, rf"{key} .*({match})|must be|has shape")
    for other in (a.tolist(), np.ma.masked_array(a), memoryview(a)):
        refuse(
            device, name, calls()[name] | {key: other}, rf"{key} is .* must be a numpy.ndarray on {device}", TypeError
        )


@pytest.mark.parametrize("device", HOST)
@pytest.mark.parametrize(("name", "key"), WRITTEN)
def test_outputs_must_be_writable_and_apart(name: str, key: str, device: str) -> None:
    given = calls()[name]
    read_only = given[key].copy()
    read_only.setflags(write=False)
    refuse(device, name, given | {key: read_only}, f"{key} is read-only")
    for other, a in given.items():
        if other != key and isinstance(a, np.ndarray) and a.dtype == given[key].dtype:
            block = np.ones(a.size + given[key].size, a.dtype)
            one, two = block[: a.size], block[a.size // 2 :][: given[key].size]  # a part of it, but not all
            if np.shares_memory(one, two) and a.size > 1:
                overlapping = {other: one.reshape(a.shape), key: two.reshape(given[key].shape)}
                refuse(device, name, given | overlapping, f"({key}|{other}) shares memory with ({key}|{other})")


@pytest.mark.parametrize("device", HOST)
def test_columns_and_rows_must_agree(device: str) -> None:
    fit = calls()
    refuse(
        device,
        "matmul",
        fit["matmul"] | {"b": np.ones((4, 3), np.float32)},
        r"b has shape \(4, 3\); it must be \(5, n\)",
    )
    refuse(device, "bias_loss", fit["bias_loss"] | {"weight": np.ones(3, np.float32)}, r"weight has shape \(3,\)")
    refuse(device, "gather", fit["gather"] | {"out": np.ones((4, 2), np.float32)}, r"out has shape")
    refuse(device, "update", fit["update"] | {"states": np.ones((1, 3), np.float32)}, r"must be \(2, 3\)")
    refuse(device, "matmul", fit["matmul"] | {"a": np.ones((4, 10), np.float32)[:, ::2]}, "a is not C-contiguous")
    mixed = {"a": np.ones((4, 5)), "b": np.ones((5, 3), np.float32)}
    refuse(device, "matmul", fit["matmul"] | mixed, "b is an array of float32; it must be one of float64")


@pytest.mark.parametrize("device", HOST)
@pytest.mark.parametrize("label", [-1, 3, 2**62])
def test_labels_out_of_range_are_refused(label: int, device: str) -> None:
    given = calls()["bias_loss"]
    given["y"][2] = label
    with pytest.raises(ValueError, match="y holds labels from"):
        gb.get_backend(device).bias_loss(**given)


@pytest.mark.parametrize("d", [0, 3])
@pytest.mark.parametrize("cursor", [-(2**63), -2, 0, 7, 9, 2**63 - 1])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [-(2**63), -1, 2, 8, 9, 99, 2**63 - 1, 1, 0]])
@pytest.mark.parametrize("device", HOST)
def test_gather_stays_inside(device: str, rows: list[int], cursor: int, d: int) -> None:
    backend, n = gb.get_backend(device), 4
    source = np.arange(9.0, dtype=np.float32)[:, None] + np.zeros((9, d), np.float32) if d else np.arange(9)
    expected = [min(max(rows[min(min(max(cursor, 0), 8) + i, 8)], 0), 8) for i in range(n)]  # what is outside is cut
    out = backend.zeros((n, d) if d else (n,), source.dtype)
    backend.gather(source, np.array(rows), np.array([0, cursor]), out=out)
    assert (out[:, 0] if d else out).tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_same_on_cuda(device: str) -> None:
    backend: Any = gb.get_backend(device)

    def there(given: dict[str, Any]) -> dict[str, Any]:
        return {key: backend.asarray(a) if isinstance(a, np.ndarray) else a for key, a in given.items()}

    for name, given in calls().items():
        fit = there(given)
        backend.bind(OPERATIONS[name](**fit))
        for key, a in given.items():
            if not isinstance(a, np.ndarray):
                continue
            refuse(
                device, name, fit | {key: a}, rf"{key} is numpy.ndarray; it must be a cupy.ndarray on cuda:0", TypeError
            )
            refuse(device, name, fit | {key: backend.zeros((*a.shape, 2), a.dtype)}, f"{key} has shape|must be")
            if a.size > 1:
                strided = backend.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)[..., ::2]
                refuse(device, name, fit | {key: strided}, f"{key} is not C-contiguous")
    z = backend.zeros((8, 3), np.float32)
    given = there(calls()["bias_activation_forward"]) | {"z": z[:4], "out": z[2:6]}
    refuse(device, "bias_activation_forward", given, "out shares memory with z")
    source, order, out = (
        backend.asarray(np.arange(9)),
        backend.asarray(np.arange(9)[::-1]),
        backend.zeros((4,), np.int64),
    )
    for cursor in (-(2**63), -3, 7, 2**63 - 1):
        backend.gather(source, order, backend.asarray(np.array([0, cursor])), out=out)
        expected = [8 - min(max(0, cursor) + i, 8) for i in range(4)]
        assert backend.to_numpy(out).tolist() == expected


@pytest.mark.parametrize("device", HOST)
def test_a_step_that_is_run_past_its_order_reads_the_last_rows_again(device: str) -> None:
    model = gb.MLP([3, 4, 2], device=device)
    data = Data(np.ones((9, 3), np.float32), np.zeros(9, np.int64), None, np.arange(9))
    data.X[8], data.y[8] = 5, 1
    step = model.step(4, "sgd", data=data)
    run = step.compile()
    run(50)
    assert model.optimizer_state is not None
    for cursor in (10**6, -(10**6)):
        model.optimizer_state.counters[CURSOR] = cursor
        run()
        assert (step.names.array("X") == (5 if cursor > 0 else 1)).any(axis=1).all()
    assert np.isfinite(model.parameters.flat).all()


# ------------------------------------------------------------------ what cannot be replaced


@pytest.mark.parametrize(
    "name",
    ["layer_sizes", "dtype", "device", "backend", "loss", "activations", "seed", "dropout", "initializer",
     "parameters", "gradients", "real", "optimizer_state"],
)  # fmt: skip
def test_what_describes_a_network_cannot_be_replaced(name: str) -> None:
    model = gb.MLP([3, 4, 2], device="reference")
    with pytest.raises(AttributeError, match=rf"MLP.{name} cannot be replaced; .+"):
        setattr(model, name, object())
    with pytest.raises(AttributeError, match="cannot be deleted"):
        delattr(model, name)


def test_every_public_attribute_of_a_network_is_kept() -> None:
    model = gb.MLP([3, 4, 2], device="reference")
    for name in [name for name in vars(model) if not name.startswith("_")]:
        with pytest.raises(AttributeError, match="cannot be replaced"):
            setattr(model, name, 3)
    model.note = "one's own"  # type: ignore[attr-defined]


def test_the_arrays_of_parameters_and_optimizers_are_written_into_not_replaced() -> None:
    model = gb.MLP([3, 4, 2], device="reference")
    model.step(4, "adam")
    state, (_, gradients) = model.optimizer_state, model.loss_and_gradients(np.eye(3), np.array([0, 1, 0]))
    for owner in (model.parameters, model.gradients, gradients):
        for name in ("W", "b", "flat", "layer_sizes"):
            with pytest.raises(AttributeError, match=r"cannot be replaced; .*W\[l\]\[...\] = value"):
                setattr(owner, name, ())
        with pytest.raises(TypeError, match=r"model.parameters.W\[1\]\[...\] = value"):
            owner.W[1] = owner.W[1].copy()
    for name in ("states", "counters", "rate", "scalars", "optimizer"):
        with pytest.raises(AttributeError, match=rf"{name}\[...\] = value"):
            setattr(state, name, np.zeros(0))


def test_parameters_can_be_changed_in_place() -> None:
    model = gb.MLP([3, 4, 2], device="reference")
    before = model.parameters.copy()
    model.parameters.W[0] += 1
    model.parameters.b[1][...] = 3
    model.parameters.flat *= 2
    np.testing.assert_array_equal(model.parameters.W[0], 2 * (before.W[0] + 1))
    assert (model.parameters.b[1] == 6).all()


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_outputs_that_no_call_allocates_and_bad_norms_are_named(device):
    backend = gb.get_backend(device)
    x = np.ones(5, np.float32)
    with pytest.raises(TypeError, match=r"out is builtins\.NoneType"):
        backend.accumulate(None, x, None)
    with pytest.raises(TypeError, match=r"out is builtins\.NoneType"):
        backend.gather(x, np.arange(5), np.zeros(2, np.int64))
    for norm in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"max_norm is .*; it must be a number > 0"):
            backend.clip(x, norm, np.ones(8, np.float32))
