"""scikit-learn's own MLPs in an unchanged script, trained by gpubackprop.

    python -m gpubackprop.accel script.py               python -m gpubackprop.accel -m module
    %load_ext gpubackprop.accel                         gpubackprop.accel.install()

Two private methods of scikit-learn's base class are exchanged, not its classes: what was imported earlier, isinstance, subclasses,
clones and pickles stay as they are, and a pickle is read without gpubackprop. What cannot be accelerated is left alone and said at
exit; see ``gpubackprop.sklearn.left_alone``.
"""

from __future__ import annotations

import atexit
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

USAGE = "usage: python -m gpubackprop.accel [--at-once] (SCRIPT | -m MODULE) [ARGUMENTS]"


def install(*, at_once: bool = False) -> None:
    """Exchange the methods; a second call changes nothing but ``at_once``.

    Parameters
    ----------
    at_once : bool
        Do not leave short fits to scikit-learn until the kernels are loaded: then the bits of a fit, which differ by rounding from
        scikit-learn's, do not depend on the fits before it.
    """
    from gpubackprop.sklearn import METHODS, POLICY, replacement, scikit_learn

    POLICY.at_once = at_once
    base, *classes = scikit_learn()
    for name in METHODS:
        setattr(base, name, replacement(name))
    with suppress(ImportError):  # a private place of joblib's; without it, its workers train as scikit-learn does
        from joblib.externals.loky.backend.reduction import register

        for cls in classes:
            register(cls, _reduce)  # for what joblib sends to its workers, not for anybody's pickles


def uninstall() -> None:
    """Put scikit-learn's methods back."""
    from gpubackprop.sklearn import THEIRS, scikit_learn

    for name, method in THEIRS.items():
        setattr(scikit_learn()[0], name, method)


def summary() -> str:
    """Return how many fits of this process were accelerated, and why others were not."""
    from gpubackprop.sklearn import told

    left = "".join(f"; {count} left to scikit-learn: {reason}" for reason, count in told.items() if reason)
    return f"gpubackprop: {told['']} fits accelerated in this process{left}"


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext gpubackprop.accel``."""
    install()


def unload_ipython_extension(ipython: Any) -> None:
    """``%unload_ext gpubackprop.accel``."""
    uninstall()


def _reduce(estimator: Any) -> Any:
    from gpubackprop.sklearn import POLICY

    return _in_worker, (type(estimator), estimator.__getstate__(), POLICY.at_once)


def _in_worker(cls: Any, state: Any, at_once: bool) -> Any:
    """Rebuild an estimator in a worker process of joblib, which has imported a scikit-learn of its own."""
    install(at_once=at_once)
    estimator = cls.__new__(cls)
    estimator.__setstate__(state)
    return estimator


def main() -> None:
    """Run a script or a module as Python would."""
    given = sys.argv[1:]
    at_once = given[:1] == ["--at-once"]
    if at_once:
        del given[0]
    as_module = given[:1] == ["-m"]
    if as_module:
        del given[0]
    if not given or given[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        raise SystemExit(0 if given[:1] in (["-h"], ["--help"]) else 2)
    if not as_module and not Path(given[0]).exists():
        print(f"gpubackprop.accel: there is no file {given[0]}", file=sys.stderr)
        raise SystemExit(2)
    install(at_once=at_once)
    atexit.register(lambda: print(summary(), file=sys.stderr))
    sys.argv[:] = given
    if as_module:
        runpy.run_module(given[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(given[0]).resolve().parent)
        runpy.run_path(given[0], run_name="__main__")


if __name__ == "__main__":
    from gpubackprop import accel  # under its own name, so that workers find the functions

    accel.main()
