"""The phases of a process from its start to its first training step; the suite ``coldstart`` runs this file.

    python -P coldstart.py WHO MODULE DEVICE OPTIMIZER LAYERS BATCH THREADS STARTED

prints the seconds of each phase as JSON; STARTED is the time at which the caller started it. What only this comparison needs,
the data and the peer's own module, counts in no phase; environment variables have set the threads.
"""

from __future__ import annotations

import time

BEGUN = time.time()

# imports from here on do not count as the interpreter's time
import json  # noqa: E402
import sys  # noqa: E402


def main(
    who: str, module: str, device: str, optimizer: str, layers: str, batch: str, threads: str, started: str
) -> None:
    """Take a step and print what each phase took."""
    phases = {"interpreter": BEGUN - float(started)}
    begun = time.time()
    __import__(module)
    phases["import"] = time.time() - begun

    from gpubackprop.bench.peers import make_problem

    sizes = tuple(int(size) for size in layers.split("-"))
    problem = make_problem(sizes, int(batch), device, optimizer=optimizer, threads=int(threads))
    loss = (_ours if module == "gpubackprop" else _peer)(who, problem, phases)
    print(json.dumps({"loss": loss, "phases": phases}))


def _ours(who: str, problem: object, phases: dict[str, float]) -> float:
    import gpubackprop as gb
    from gpubackprop.bench.ours import step_of

    begun = time.time()
    backend = gb.get_backend(problem.device)  # type: ignore[attr-defined]
    backend.zeros((1,), "float32")  # the context of a GPU
    backend.synchronize()
    phases["context"] = time.time() - begun
    begun = time.time()
    step = step_of(problem, backend)  # type: ignore[arg-type]
    run = step.compile()
    phases["compile"] = time.time() - begun
    begun = time.time()
    run()
    loss = float(step.names.array("loss")[0])
    phases["first step"] = time.time() - begun
    return loss


def _peer(who: str, problem: object, phases: dict[str, float]) -> float:
    from gpubackprop.bench.peers import make_peer

    phases["context"] = 0.0
    begun = time.time()
    peer = make_peer(who, problem)  # type: ignore[arg-type]
    if isinstance(peer, str):
        raise SystemExit(peer)
    phases["compile"] = time.time() - begun
    begun = time.time()
    peer.step()
    loss = peer.loss()
    phases["first step"] = time.time() - begun
    return loss


if __name__ == "__main__":
    main(*sys.argv[1:])
