"""One epoch of training from data to trained weights: ``fit``, and the training loop of each peer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gpubackprop.bench.case import Cases, Prepared, Settings, admit
from gpubackprop.bench.devices import Device
from gpubackprop.bench.ours import TOLERANCE, model_of, optimizer_of, whole_peers
from gpubackprop.bench.peers import Peer, Problem
from gpubackprop.bench.peers.arrays import ArrayPeer
from gpubackprop.bench.suites import step_cases
from gpubackprop.bench.timing import Candidate
from gpubackprop.machine.crossover import step_flops


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield an epoch over each data set."""
    yield from step_cases("epoch", device, dtype, settings, prepare)


def prepare(device: Device, problem: Problem, settings: Settings, epochs: int = 1) -> Prepared:
    """Check all candidates' parameters after an epoch in the order of the rows, then time epochs in a random order."""
    prepared = Prepared([])
    exact = ArrayPeer(replace(problem, dtype="float64", device="cpu"), np)
    exact.epoch(shuffle=False)
    expected, allowed = exact.probabilities(), TOLERANCE[problem.dtype]
    with device.scope():
        model = model_of(problem, device.backend)
        real = model.real
        X: Any = device.backend.asarray(problem.X.astype(real))
        y: Any = device.backend.asarray(problem.y)

        def fit(*, epochs: int, shuffle: bool) -> None:
            optimizer, batch = optimizer_of(problem), problem.batch
            model.fit(X, y, epochs=epochs, batch_size=batch, optimizer=optimizer, shuffle=shuffle, progress=False)

        def found() -> np.ndarray:
            fit(epochs=1, shuffle=False)
            return np.asarray(model.predict_proba(problem.of_batch()[0].astype(real)), np.float64)

        run = partial(fit, epochs=epochs, shuffle=True)
        admit(prepared, Candidate("gpubackprop", run, device.timer(), trains=True), found, expected, allowed)
        for name, peer in whole_peers(problem, settings, prepared):
            candidate = Candidate(name, partial(_epochs, peer, epochs), peer.timer, trains=True)
            admit(prepared, candidate, partial(_after_an_epoch, peer), expected, allowed)
    prepared.flops = epochs * step_flops(problem.sizes, len(problem.X))
    return prepared


def _epochs(peer: Peer, epochs: int) -> None:
    for _ in range(epochs):
        peer.epoch(shuffle=True)


def _after_an_epoch(peer: Peer) -> np.ndarray:
    peer.epoch(shuffle=False)
    return peer.probabilities()
