"""One epoch of training from data to trained weights: ``fit``, and the training loop of each peer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gpubackprop.bench.case import Cases, Prepared, Settings, admit
from gpubackprop.bench.devices import Device
from gpubackprop.bench.ours import TOLERANCE, model_of, optimizer_of
from gpubackprop.bench.peers import Peer, make_peers, make_problem
from gpubackprop.bench.peers.arrays import ArrayPeer
from gpubackprop.bench.sizes import StepSize
from gpubackprop.bench.suites import step_cases
from gpubackprop.bench.timing import Contestant
from gpubackprop.machine.crossover import step_flops


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield an epoch over each data set."""
    yield from step_cases("epoch", device, dtype, settings, _prepare)


def _prepare(device: Device, dtype: str, size: StepSize, settings: Settings) -> Prepared:
    """Check everybody's parameters after an epoch in the order of the rows, then time epochs in a random order."""
    problem = make_problem(
        size.layers,
        size.batch,
        device.name,
        dtype,
        settings.optimizer,
        settings.threads,
        size.samples or 16 * size.batch,
    )
    prepared = Prepared([])
    exact = ArrayPeer(replace(problem, dtype="float64", device="cpu"), np)
    exact.epoch(shuffle=False)
    expected, allowed = exact.probabilities(), TOLERANCE[dtype]
    with device.scope():
        model = model_of(problem, device.backend)
        real, optimizer = model.real, optimizer_of(problem)
        X: Any = device.backend.asarray(problem.X.astype(real))
        y: Any = device.backend.asarray(problem.y)

        def fit(*, shuffle: bool) -> None:
            model.fit(X, y, epochs=1, batch_size=size.batch, optimizer=optimizer, shuffle=shuffle, progress=False)

        def found() -> np.ndarray:
            fit(shuffle=False)
            return np.asarray(model.predict_proba(problem.of_batch()[0].astype(real)), np.float64)

        contestant = Contestant("gpubackprop", lambda: fit(shuffle=True), device.timer())
        admit(prepared, contestant, found, expected, allowed)
        for name, peer in make_peers(problem, settings.libraries, slow=not settings.quick):
            if isinstance(peer, str):
                prepared.left_out[name] = peer
            elif peer.units == 1 and "graph" not in name:  # else it differs from another in its step alone
                contestant = Contestant(name, partial(peer.epoch, shuffle=True), peer.timer)
                admit(prepared, contestant, partial(_after_an_epoch, peer), expected, allowed)
    prepared.flops = step_flops(size.layers, len(problem.X))
    return prepared


def _after_an_epoch(peer: Peer) -> np.ndarray:
    peer.epoch(shuffle=False)
    return peer.probabilities()
