"""JAX: a step under ``jax.jit`` with everything donated; K steps in one call; an epoch as one scan."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes most of a GPU's memory at once

import jax
import jax.numpy as jnp
import numpy as np

from gpubackprop.bench.peers import BETA1, BETA2, EPSILON, LEARNING_RATE, LONG_STEP, CannotTakePartError, Peer, Problem
from gpubackprop.bench.timing import WallTimer


class JaxPeer(Peer):
    """One call per step. JAX shows no stream to put events on: its times are those of the wall."""

    dtypes = ("float32", "tf32")

    def __init__(self, problem: Problem) -> None:
        # else every step is handed to another thread: one more than was given
        jax.config.update("jax_cpu_enable_async_dispatch", problem.threads > 1)
        self.problem, self.device = problem, _device(problem)
        # copies: XLA may take a host array as it is, and what is donated is overwritten
        given = [(jnp.array(W), jnp.array(b)) for W, b in zip(*problem.parameters(), strict=True)]
        theta = jax.device_put(given, self.device)
        zeros = [jax.tree.map(jnp.zeros_like, theta) for _ in range(2 if problem.optimizer == "adam" else 0)]
        self.carry = jax.device_put((theta, zeros, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)), self.device)
        self.all_X, self.all_y = jax.device_put((problem.X, problem.y), self.device)
        self.X, self.y = jax.device_put(problem.of_batch(), self.device)
        self.one = _step_of(problem.optimizer)
        self.precision = "tensorfloat32" if problem.dtype == "tf32" else "highest"
        with jax.default_matmul_precision(self.precision):
            self._step = jax.jit(self.steps, donate_argnums=0).lower(self.carry, self.X, self.y).compile()
            self._predict = jax.jit(outputs).lower(theta, self.X).compile()
        self._epoch: Any = None
        self._key: Any = None
        self._next_order: Any = None
        self.timer = WallTimer(lambda: jax.block_until_ready(self.carry))

    def steps(self, carry: Any, X: Any, y: Any) -> Any:
        """What is compiled."""
        return self.one(carry, X, y)

    def step(self) -> None:
        """Queue a step."""
        self.carry = self._step(self.carry, self.X, self.y)

    def loss(self) -> float:
        """Return the loss of the last step."""
        return float(self.carry[-1])

    def predict(self) -> Any:
        """Return the outputs."""
        return self._predict(self.carry[0], self.X).block_until_ready()

    def epoch(self, *, shuffle: bool) -> None:
        """Train on all rows in one call."""
        if self._epoch is None:
            self._epoch = self._compiled_epoch()
        self.carry = self._epoch(self.carry, self.all_X, self.all_y, self._order(shuffle))

    def _order(self, shuffle: bool) -> Any:
        """Return an order of the rows: on the CPU from NumPy, where JAX's takes longer than the steps of a small network."""
        n = len(self.problem.X)
        if shuffle and self.problem.on_gpu:
            self._key, order = self._next_order(self._key)
            return order
        return np.random.default_rng().permutation(n).astype(np.int32) if shuffle else np.arange(n, dtype=np.int32)

    def _compiled_epoch(self) -> Any:
        n, batch = self.all_X.shape[0], self.problem.batch

        def next_order(key: Any) -> Any:
            key, used = jax.random.split(key)
            return key, jax.random.permutation(used, n)

        def scan(carry: Any, X: Any, y: Any, order: Any) -> Any:
            batches = X[order].reshape(n // batch, batch, -1), y[order].reshape(n // batch, batch)
            return jax.lax.scan(lambda carry, rows: (self.one(carry, *rows), None), carry, batches)[0]

        self._key, self._next_order = jax.device_put(jax.random.key(0), self.device), jax.jit(next_order)
        order = jax.ShapeDtypeStruct((n,), np.int32)
        with jax.default_matmul_precision(self.precision):
            return jax.jit(scan, donate_argnums=0).lower(self.carry, self.all_X, self.all_y, order).compile()


class JaxLoopPeer(JaxPeer):
    """K steps in one call."""

    def __init__(self, problem: Problem) -> None:
        self.units = problem.steps_per_call
        if self.units == 1:
            raise CannotTakePartError(LONG_STEP)
        super().__init__(problem)

    def steps(self, carry: Any, X: Any, y: Any) -> Any:
        """What is compiled."""
        return jax.lax.fori_loop(0, self.units, lambda _, carry: self.one(carry, X, y), carry)


def outputs(theta: Any, X: Any) -> Any:
    """Return o."""
    h = X
    for W, b in theta[:-1]:
        h = jax.nn.relu(h @ W + b)
    return h @ theta[-1][0] + theta[-1][1]


def loss_of(theta: Any, X: Any, y: Any) -> Any:
    """Return the softmax cross-entropy."""
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs(theta, X)), y[:, None], axis=1).mean()


def _step_of(optimizer: str) -> Any:
    def sgd(carry: Any, X: Any, y: Any) -> Any:
        theta, _, t, _ = carry
        value, g = jax.value_and_grad(loss_of)(theta, X, y)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, theta, g), [], t, value

    def adam(carry: Any, X: Any, y: Any) -> Any:
        theta, (m, v), t, _ = carry
        value, g = jax.value_and_grad(loss_of)(theta, X, y)
        t = t + 1
        m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, g)
        v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v, g)
        c1, c2 = LEARNING_RATE / (1 - BETA1**t), 1 / jnp.sqrt(1 - BETA2**t)
        theta = jax.tree.map(lambda p, m, v: p - c1 * m / (jnp.sqrt(v) * c2 + EPSILON), theta, m, v)
        return theta, [m, v], t, value

    return sgd if optimizer == "sgd" else adam


def _device(problem: Problem) -> Any:
    if not problem.on_gpu:
        return jax.devices("cpu")[0]
    try:
        return jax.devices("gpu")[problem.index]
    except (RuntimeError, IndexError):
        raise CannotTakePartError(f"JAX {jax.__version__} finds no such GPU") from None
