"""Backpropagation through multilayer perceptrons, on the CPU (NumPy + Numba) and on CUDA GPUs (CuPy + Numba-CUDA).

    import gpubackprop as gb

    model = gb.MLP([784, 256, 128, 10], device="cpu")          # or "cuda", "cuda:1", "auto"
    history = model.fit(X, y, epochs=20, optimizer=gb.Adam(1e-3))
    labels = model.predict(X)

docs/mathematics.md says where each equation of backpropagation lives in the code.
"""

from pathlib import Path as _Path

if (_root := _Path(__file__).parents[1]).joinpath("kernels", "cpu", "__init__.py").is_file():
    # Python was started in a clone: kernels/ and bench/, parts of this package once installed, are next to it.
    __path__.append(str(_root))

from gpubackprop import activations, initializers, losses, optimizers, schedules
from gpubackprop._version import __version__
from gpubackprop.activations import Activation
from gpubackprop.backends import DeviceUnavailableError, available_devices, get_backend, register_backend
from gpubackprop.backends.memory import DeviceMemoryError
from gpubackprop.inspect.explain import explain
from gpubackprop.inspect.gradcheck import check_gradients
from gpubackprop.inspect.gradient_flow import GradientFlow
from gpubackprop.inspect.parity import parity
from gpubackprop.losses import Loss
from gpubackprop.mlp import MLP, fingerprint, load
from gpubackprop.optimizers import LBFGS, SGD, Adagrad, Adam, AdamW, Lion, Optimizer, RMSprop
from gpubackprop.resume import Resumed, resume
from gpubackprop.schedules import Cosine, Exponential, LinearWarmup, OneCycle, Schedule, StepDecay
from gpubackprop.step import Step
from gpubackprop.training.callbacks import Callback, EarlyStopping, ReduceOnPlateau
from gpubackprop.training.divergence import DivergenceError, DivergenceWarning
from gpubackprop.training.history import History
from gpubackprop.training.run import RunError
from gpubackprop.training.scores import score

__all__ = [
    "LBFGS", "MLP", "SGD", "Activation", "Adagrad", "Adam", "AdamW", "Callback", "Cosine", "DeviceMemoryError",
    "DeviceUnavailableError", "DivergenceError", "DivergenceWarning", "EarlyStopping", "Exponential", "GradientFlow", "History",
    "LinearWarmup", "Lion", "Loss", "OneCycle", "Optimizer", "RMSprop", "ReduceOnPlateau", "Resumed", "RunError",
    "Schedule", "Step", "StepDecay", "__version__", "activations", "available_devices", "check_gradients", "explain", "fingerprint",
    "get_backend", "initializers", "load", "losses", "optimizers", "parity", "register_backend", "resume",
    "schedules", "score",
]  # fmt: skip
