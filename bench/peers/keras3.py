"""Keras 3, on JAX where it is installed, else on PyTorch: ``train_on_batch`` and ``fit`` of a compiled model."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "jax" if find_spec("jax") else "torch")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import keras

from gpubackprop.bench.peers import BETA1, BETA2, EPSILON, LEARNING_RATE, Peer, Problem


class KerasPeer(Peer):
    """Trains in float32, from arrays on the host; every call returns the loss to the host, so nothing is left to wait for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        with keras.device(f"gpu:{problem.index}" if problem.on_gpu else "cpu:0"):
            layers = [keras.layers.Dense(d, activation="relu") for d in problem.sizes[1:-1]]
            self.model = keras.Sequential(
                [keras.Input(problem.sizes[:1]), *layers, keras.layers.Dense(problem.sizes[-1])]
            )
        W, b = problem.parameters()
        self.model.set_weights([array for pair in zip(W, b, strict=True) for array in pair])
        if problem.optimizer == "sgd":
            optimizer = keras.optimizers.SGD(LEARNING_RATE)
        else:
            optimizer = keras.optimizers.Adam(LEARNING_RATE, BETA1, BETA2, EPSILON)
        self.model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        self.X, self.y = problem.of_batch()
        self.value: Any = 0.0

    def step(self) -> None:
        """Take a step on the mini-batch."""
        self.value = self.model.train_on_batch(self.X, self.y)

    def loss(self) -> float:
        """Return the loss of the last step."""
        return float(self.value)

    def predict(self) -> Any:
        """Return the outputs."""
        return self.model.predict_on_batch(self.X)

    def epoch(self, *, shuffle: bool) -> None:
        """Train on all rows; the loss is then the mean over the epoch."""
        history = self.model.fit(
            self.problem.X, self.problem.y, batch_size=self.problem.batch, epochs=1, shuffle=shuffle, verbose=0
        )
        self.value = np.mean(history.history["loss"])
