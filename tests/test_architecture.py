"""What describes a network survives every way of making it again."""

from __future__ import annotations

import inspect
import json
import pickle
import tracemalloc
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.architecture import Architecture
from gpubackprop.inspect.gradcheck import gradient_step
from gpubackprop.machine.diagnosis import installed
from gpubackprop.network import Network
from gpubackprop.step.step import record

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(installed("nvmath-python") is None, reason="TF32 needs nvmath-python"),
]

UNUSUAL: dict[str, Any] = {
    "layer_sizes": (3, 5, 4, 2), "activation": ["tanh", gb.activations.ACTIVATIONS["leaky_relu"](negative_slope=0.3)],
    "loss": gb.losses.LOSSES["softmax_cross_entropy"](label_smoothing=0.2, reduction="sum"), "dtype": "float64", "seed": 7,
    "initializer": "glorot_uniform", "dropout": 0.25,
}  # fmt: skip


def test_an_architecture_holds_every_argument_of_a_network() -> None:
    arguments = set(inspect.signature(gb.MLP).parameters) - {"device"}
    model = gb.MLP(**UNUSUAL)
    named = {"activation" if f.name == "activations" else f.name for f in fields(model.architecture)}
    assert named == arguments | {"target_shape", "features", "classes"}
    assert set(UNUSUAL) | {"matmul_precision"} == arguments
    assert (
        Architecture(**{f.name: getattr(model.architecture, f.name) for f in fields(Architecture)})
        == model.architecture
    )


def test_it_goes_to_json_and_back() -> None:
    architecture = gb.MLP(**UNUSUAL).architecture
    text = json.dumps(architecture.to_json())
    assert Architecture.from_json(json.loads(text)) == architecture


def test_a_step_of_any_size_is_planned_without_memory_or_device() -> None:
    architecture = Architecture((784, 4096, 4096, 10))
    tracemalloc.start()
    step = record(architecture, 10**6, gb.Adam())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    weights = 784 * 4096 + 4096**2 + 4096 * 10
    assert step.flops > 2 * 3 * 10**6 * weights - 2 * 10**6 * 784 * 4096  # nobody needs dh_0
    assert sum(buffer.nbytes for buffer in step.roots) > 4 * 10**6 * (784 + 4 * 4096 + 10)
    assert "dW_1 = Xᵀ δ_1" in str(step)
    with pytest.raises(ValueError, match=r"this step has no memory; model\.step\(\.\.\.\) returns one with memory"):
        step.names.array("X")
    with pytest.raises(ValueError, match=r"this step has no array 'Z'; it has X, parameters, W_1, z_1, b_1, h_1"):
        step.names.buffer("Z")
    with pytest.raises(ValueError, match="this step has no device"):
        step.compile()
    assert pickle.loads(pickle.dumps(step)).flops == step.flops


def test_it_survives_to_save_load_and_the_copies_of_checks(tmp_path: Any, rng: np.random.Generator) -> None:
    model = gb.MLP(**UNUSUAL, device="reference")
    model.fit(rng.normal(size=(8, 3)), np.arange(8) % 2, epochs=1, progress=False)
    model.save(tmp_path / "model")
    for other in (model.to("reference"), model.to("cpu"), gb.load(tmp_path / "model")):
        assert other.architecture == model.architecture
        np.testing.assert_array_equal(other.parameters.flat, model.parameters.flat)
    assert model.to("reference").backend is model.backend
    step, _ = gradient_step(model.network, rng.normal(size=(8, 3)), np.arange(8) % 2)
    assert step.names.array("X").dtype == np.float64


def test_a_file_names_the_initializer_or_a_warning_says_that_it_cannot(tmp_path: Any) -> None:
    def ones(rng: Any, fan_in: int, fan_out: int, gain: float) -> np.ndarray:
        return np.ones((fan_in, fan_out))

    model = gb.MLP([3, 2], initializer=ones, device="reference")
    with pytest.warns(UserWarning, match="initializer is not registered"):
        model.save(tmp_path / "own")
    loaded = gb.load(tmp_path / "own", "reference")
    assert (loaded.parameters.W[0] == 1).all()
    gb.initializers.initializer(ones)
    try:
        model.save(tmp_path / "known")
        assert gb.load(tmp_path / "known", "reference").initializer is ones
    finally:
        del gb.initializers.INITIALIZERS["ones"]
    with pytest.raises(ValueError, match="unknown initializer 'ones'"):
        gb.load(tmp_path / "known", "reference")


def test_an_option_of_another_device_is_kept_by_way_of_this_one(tmp_path: Any) -> None:
    model = gb.MLP.of(Network(Architecture((3, 2), matmul_precision="tf32"), "cpu"))
    assert model.matmul_precision == "tf32"
    model.save(tmp_path / "model")
    assert gb.load(tmp_path / "model").matmul_precision == "tf32"
    assert model.to("reference").matmul_precision == "tf32"
    with pytest.raises(ValueError, match="needs device='cuda'"):
        gb.MLP([3, 2], matmul_precision="tf32")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_tf32_survives_and_comes_back(device: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpubackprop.backends.cuda import products as cublaslt

    if gb.get_backend(device)._launches.capability < (8, 0):  # type: ignore[attr-defined]
        pytest.skip("TF32 begins with compute capability 8.0")
    model = gb.MLP([128, 128], device=device, matmul_precision="tf32")
    assert model.to("cpu").matmul_precision == "tf32"
    model.save(tmp_path / "model")
    X = np.full((128, 128), 1 + 2.0**-12, np.float32)  # in TF32, 1
    for other in (model.to(device), model.to("cpu").to(device), gb.load(tmp_path / "model", device)):
        assert other.backend is model.backend
        other.parameters.W[0][...] = 1
        np.testing.assert_array_equal(other.forward(X), np.float32(128))
    assert gb.load(tmp_path / "model", "cpu").matmul_precision == "tf32"
    used = []
    multiply = cublaslt.Product.__call__
    monkeypatch.setattr(
        cublaslt.Product, "__call__", lambda self: (used.append(self.plan.description), multiply(self))[1]
    )
    model.warmup(16)
    gb.parity(model, X, np.arange(128), [device])
    assert used
    assert all("tf32" in one for one in used)
