"""tinygrad: a step under ``TinyJit``."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np

from gpubackprop.bench.peers import BETA1, BETA2, EPSILON, LEARNING_RATE, Peer, Problem
from gpubackprop.bench.timing import WallTimer


class TinygradPeer(Peer):
    """Trains in float32; on the CPU it needs clang or libLLVM."""

    def __init__(self, problem: Problem) -> None:
        self.device = (f"CUDA:{problem.index}" if problem.on_gpu else "CPU").removesuffix(":0")
        os.environ.setdefault("DEV", self.device)  # else it looks for a device at once, and fails without
        from tinygrad import Context

        with Context(DEV=self.device):
            self._make(problem)

    def _make(self, problem: Problem) -> None:
        from tinygrad import Context, Device, Tensor, TinyJit
        from tinygrad.nn import Linear, optim

        self.problem, self.value = problem, Tensor([0.0])
        self.layers = [Linear(d_in, d_out) for d_in, d_out in itertools.pairwise(problem.sizes)]
        for i, layer in enumerate(self.layers):
            layer.weight.assign(Tensor(problem.state[f"layers.{i}.weight"])).realize()
            layer.bias.assign(Tensor(problem.state[f"layers.{i}.bias"])).realize()
        parameters = [p for layer in self.layers for p in (layer.weight, layer.bias)]
        if problem.optimizer == "sgd":
            optimizer = optim.SGD(parameters, LEARNING_RATE)
        else:
            optimizer = optim.Adam(parameters, LEARNING_RATE, BETA1, BETA2, EPSILON)
        self.all_X, self.all_y = Tensor(problem.X).realize(), Tensor(problem.y.astype("int32")).realize()
        self.X, self.y = (a[: problem.batch].clone().realize() for a in (self.all_X, self.all_y))

        def train(X: Any, y: Any) -> Any:
            with Context(TRAINING=1, DEV=self.device):
                optimizer.zero_grad()
                loss = self.outputs(X).sparse_categorical_crossentropy(y).backward()
                return loss.realize(*optimizer.schedule_step())

        self.train = TinyJit(train)
        self._predict = TinyJit(lambda X: self.outputs(X).realize())
        self.timer = WallTimer(Device[self.device].synchronize)

    def outputs(self, X: Any) -> Any:
        """Return o."""
        for layer in self.layers[:-1]:
            X = layer(X).relu()
        return self.layers[-1](X)

    def step(self) -> None:
        """Queue a step on the mini-batch."""
        self.value = self.train(self.X, self.y)

    def loss(self) -> float:
        """Return the loss of the last step."""
        return float(self.value.item())

    def predict(self) -> Any:
        """Return the outputs."""
        return self._predict(self.X).numpy()

    def epoch(self, *, shuffle: bool) -> None:
        """Train on all rows."""
        from tinygrad import Tensor

        n, batch = len(self.problem.X), self.problem.batch
        host = np.random.default_rng().permutation(n) if shuffle else np.arange(n)
        order = Tensor(host.astype(np.int32), device=self.device)
        X, y = self.all_X[order].realize(), self.all_y[order].realize()
        for first in range(0, n, batch):
            rows = slice(first, first + batch)
            self.value = self.train(X[rows].clone().realize(), y[rows].clone().realize())
