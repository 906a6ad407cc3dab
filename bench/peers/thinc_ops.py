"""Thinc: a chain of layers, ``begin_update``, ``backprop``, ``finish_update``."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from thinc.api import SGD, Adam, CategoricalCrossentropy, CupyOps, NumpyOps, Relu, Softmax, chain, use_ops

from gpubackprop.bench.peers import BETA1, BETA2, EPSILON, LEARNING_RATE, Peer, Problem
from gpubackprop.bench.timing import WallTimer


class ThincPeer(Peer):
    """Trains on float32 arrays of NumPy or CuPy; its products are BLIS or cuBLAS."""

    gives_probabilities = True

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        with use_ops("cupy" if problem.on_gpu else "numpy"):
            layers = [Relu(d_out, d_in) for d_in, d_out in itertools.pairwise(problem.sizes[:-1])]
            self.model = chain(*layers, Softmax(problem.sizes[-1], problem.sizes[-2]))
            self.model.initialize()
        self.ops = CupyOps() if problem.on_gpu else NumpyOps()
        for i, layer in enumerate(self.model.layers):
            layer.set_param("W", self.ops.asarray2f(problem.state[f"layers.{i}.weight"].copy()))
            layer.set_param("b", self.ops.asarray1f(problem.state[f"layers.{i}.bias"].copy()))
        options = {"L2": 0.0, "grad_clip": 0.0, "use_averages": False}
        if problem.optimizer == "sgd":
            self.optimizer = SGD(LEARNING_RATE, **options)
        else:
            self.optimizer = Adam(LEARNING_RATE, beta1=BETA1, beta2=BETA2, eps=EPSILON, **options)
        self.criterion = CategoricalCrossentropy(normalize=True)
        self.all_X, self.all_y = self.ops.asarray2f(problem.X), self.ops.asarray1i(problem.y)
        self.X, self.y = self.all_X[: problem.batch], self.all_y[: problem.batch]
        self.guesses: Any = None
        if problem.on_gpu:
            self.timer = WallTimer(self.ops.xp.cuda.Device(problem.index).synchronize)

    def step(self) -> None:
        """Take a step on the mini-batch."""
        self.train(self.X, self.y)

    def train(self, X: Any, y: Any) -> None:
        """Take a step on these rows."""
        self.guesses, backprop = self.model.begin_update(X)
        backprop(self.criterion.get_grad(self.guesses, y))
        self.model.finish_update(self.optimizer)

    def loss(self) -> float:
        """Return the cross-entropy of the last step on the mini-batch; Thinc's own ``get_loss`` is a sum of squares."""
        guesses, y = self.ops.to_numpy(self.guesses), self.ops.to_numpy(self.y)
        return float(-np.log(guesses[np.arange(len(y)), y].astype(np.float64)).mean())

    def predict(self) -> Any:
        """Return the probabilities."""
        return self.model.predict(self.X)

    def epoch(self, *, shuffle: bool) -> None:
        """Train on all rows."""
        for X, y in self.ops.multibatch(self.problem.batch, self.all_X, self.all_y, shuffle=shuffle):
            self.train(X, y)
