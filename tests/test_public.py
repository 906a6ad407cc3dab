"""The public names, which other programs import: none is lost, renamed or given other parameters."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb

NAMES = {
    "LBFGS", "MLP", "SGD", "Activation", "Adagrad", "Adam", "AdamW", "Callback", "Cosine", "DeviceMemoryError",
    "DeviceUnavailableError", "EarlyStopping", "Exponential", "History", "LinearWarmup", "Lion", "Loss", "OneCycle", "Optimizer",
    "RMSprop", "ReduceOnPlateau", "Schedule", "Step", "StepDecay", "activations", "available_devices", "check_gradients",
    "explain", "get_backend", "initializers", "load", "losses", "optimizers", "parity", "register_backend", "schedules",
    "score", "GradientFlow",
    "DivergenceError", "DivergenceWarning", "Resumed", "RunError", "fingerprint", "resume",
}  # fmt: skip

PARAMETERS = {
    gb.MLP: ["layer_sizes", "activation", "loss", "device", "dtype", "seed", "initializer", "dropout", "matmul_precision"],
    gb.MLP.forward: ["X"],
    gb.MLP.backward: ["do"],
    gb.MLP.loss_and_gradients: ["X", "y", "sample_weight"],
    gb.MLP.trace: ["X", "y", "sample_weight"],
    gb.MLP.diagnose: ["X", "y", "sample_weight", "optimizer"],
    gb.GradientFlow: ["X", "y", "sample_weight", "every"],
    gb.MLP.step: [
        "batch_size", "optimizer", "data", "class_indices", "weighted", "keep", "micro_batch_size", "memory",
    ],
    gb.MLP.predict: ["X"],
    gb.MLP.predict_proba: ["X"],
    gb.MLP.evaluate: ["X", "y", "sample_weight"],
    gb.MLP.predictor: ["batch_size"],
    gb.MLP.warmup: ["batch_size", "optimizer", "class_indices"],
    gb.MLP.to: ["device"],
    gb.MLP.state_dict: [],
    gb.MLP.load_state_dict: ["state"],
    gb.MLP.save: ["path"],
    gb.load: ["path", "device"],
    gb.fingerprint: ["model"],
    gb.resume: ["folder", "device", "previous", "checkpoint_every"],
    gb.Resumed.fit: [
        "X", "y", "validation_data", "sample_weight", "class_weight", "validation_split", "callbacks", "epochs", "progress",
        "stream_data",
    ],
    gb.check_gradients: ["model", "X", "y", "sample_weight", "tolerance", "seed"],
    gb.parity: ["model", "X", "y", "devices"],
    gb.explain: ["network", "X", "y", "activation", "loss", "batch_size", "seed", "tolerance"],
    gb.get_backend: ["device", "options"],
    gb.register_backend: ["name", "target"],
    gb.available_devices: [],
}  # fmt: skip
FIT = [
    "epochs", "batch_size", "optimizer", "validation_data", "sample_weight", "callbacks", "progress", "shuffle",
    "micro_batch_size", "stream_data", "tol", "n_iter_no_change", "on_divergence", "standardize", "missing", "scale",
    "classes", "class_weight", "validation_split", "metrics", "checkpoint", "checkpoint_every", "overwrite",
]  # fmt: skip
OPERATIONS = {
    "matmul": ["a", "b", "out"],
    "bias_activation_forward": ["z", "b", "activation", "out"],
    "bias_activation_backward": ["dh", "z", "h", "activation", "out", "db"],
    "bias_loss": ["z", "b", "y", "loss", "weight", "out", "db", "value", "scalars", "samples", "total"],
    "normalize_weights": ["weight", "out", "total"],
    "dropout": ["x", "rate", "seed", "layer", "counters", "out", "first_block"],
    "gather": ["source", "order", "counters", "out"],
    "accumulate": ["total", "term", "out"],
    "clip": ["gradients", "max_norm", "scalars", "loss_scaling"],
    "advance": ["optimizer", "rate", "batch", "counters", "scalars", "loss_scaling"],
    "update": ["optimizer", "parameters", "gradients", "states", "scalars", "weights"],
}


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_every_public_name_is_there():
    assert NAMES | {"__version__"} == set(gb.__all__)
    assert all(hasattr(gb, name) for name in gb.__all__)


@pytest.mark.parametrize("function", PARAMETERS, ids=lambda f: f.__qualname__)
def test_public_functions_take_the_parameters_they_have_had(function: Any):
    assert _parameters(function) == PARAMETERS[function]


def test_fit_takes_the_options_it_has_had():
    from gpubackprop.training.fit import fit

    assert [name for name in _parameters(fit) if name not in ("model", "X", "y")] == FIT


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_of_a_backend_take_their_parameters_by_place_and_by_name(operation: str, backend: Any):
    assert _parameters(getattr(backend, operation)) == OPERATIONS[operation]


def test_what_a_step_and_its_parts_are_called():
    model = gb.MLP([3, 4, 2], device="reference")
    step = model.step(5, gb.Adam(1e-3))
    assert isinstance(step, gb.Step)
    assert step.names.array("X").shape == (5, 3)
    assert "matmul" in [operation.name for operation in step.operations]
    step.compile()()
    assert {"device", "xp", "asarray", "to_numpy", "synchronize", "zeros"} <= set(dir(model.backend))
    trace = model.trace(np.zeros((2, 3), np.float32), np.zeros(2, int))
    assert all(hasattr(trace.layers[0], name) for name in ("h_in", "z", "h", "dh", "delta", "dW", "db"))
    assert all(hasattr(trace, name) for name in ("layers", "X", "o", "do", "loss"))


def test_modules_and_registries_that_other_programs_import():
    code = (
        "from gpubackprop.activations import ACTIVATIONS, activation\nfrom gpubackprop.losses import LOSSES, loss\n"
        "from gpubackprop.optimizers import OPTIMIZERS\nfrom gpubackprop.schedules import SCHEDULES\n"
        "from gpubackprop.initializers import INITIALIZERS\nfrom gpubackprop.datasets import load_dataset\n"
        "from gpubackprop.backends.base import Backend"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
