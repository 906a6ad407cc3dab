"""scikit-learn: ``MLPClassifier.partial_fit``, which takes a step per call where it is given one mini-batch."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier

from gpubackprop.bench.peers import BETA1, BETA2, EPSILON, LEARNING_RATE, CannotTakePartError, Peer, Problem


class ScikitPeer(Peer):
    """Trains in the dtype of X, without penalty and momentum."""

    gives_probabilities = True
    dtypes, devices = ("float32", "float64"), ("cpu",)

    def __init__(self, problem: Problem) -> None:
        if len(problem.sizes) < 3:
            raise CannotTakePartError("has at least one hidden layer")
        self.problem = problem
        self.all_X, self.y = problem.X.astype(problem.dtype), problem.y
        self.X, self.batch_y = self.all_X[: problem.batch], problem.y[: problem.batch]
        self.model = MLPClassifier(
            problem.sizes[1:-1], solver=problem.optimizer, alpha=0.0, batch_size=problem.batch, shuffle=False,
            learning_rate_init=LEARNING_RATE, momentum=0.0, nesterovs_momentum=False,
            beta_1=BETA1, beta_2=BETA2, epsilon=EPSILON, random_state=0,
        )  # fmt: skip
        # the first call makes the arrays and the optimizer, which keeps views of them: fill them, and restart it
        self.model.partial_fit(self.X, self.batch_y, classes=np.arange(problem.sizes[-1]))
        W, b = problem.parameters()
        for mine, given in zip((*self.model.coefs_, *self.model.intercepts_), (*W, *b), strict=True):
            mine[...] = given
        optimizer = self.model._optimizer
        if problem.optimizer == "adam":
            optimizer.t = 0
            for state in (*optimizer.ms, *optimizer.vs):
                state[...] = 0

    def step(self) -> None:
        """Take a step on the mini-batch."""
        self.model.partial_fit(self.X, self.batch_y)

    def loss(self) -> float:
        """Return the loss of the last step."""
        return float(self.model.loss_)

    def predict(self) -> Any:
        """Return the probabilities."""
        return self.model.predict_proba(self.X)

    def epoch(self, *, shuffle: bool) -> None:
        """Train on all rows."""
        self.model.shuffle = shuffle
        self.model.partial_fit(self.all_X, self.y)
