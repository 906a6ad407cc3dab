"""A run: a folder that holds a training, so that it can stop anywhere and resume with the bits of an uninterrupted one.

========================  ========================================================================================================
file                      what it holds
========================  ========================================================================================================
checkpoint.safetensors    between two steps: the network, the optimizer's state, the place in the data set, the state of the
                          callbacks, the history, the settings, digests of the data; and a digest of all this
previous.safetensors      the checkpoint before that one
model.safetensors         the network at the end, for :func:`gpubackprop.load`; not there while a training runs
history.json              the history, without times: strict JSON, where NaN and infinity are null; written last
timing.json               seconds of each epoch
run.lock                  locked while a process writes to the folder
========================  ========================================================================================================

With the same seed, data, settings and device the first four have the same bytes, however often the run was interrupted.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gpubackprop.backends.current import active
from gpubackprop.definitions import Array, check_count, shown
from gpubackprop.machine.files import check_folder, write_whole
from gpubackprop.training.callbacks import described, matching, restored
from gpubackprop.training.checkpoint import network_of, save, to_bytes
from gpubackprop.training.divergence import Divergence
from gpubackprop.training.history import History, Training
from gpubackprop.training.interrupts import Interrupts
from gpubackprop.training.model_file import ModelFile, read_model
from gpubackprop.training.snapshot import Position

if TYPE_CHECKING:
    from gpubackprop.network import Network

CHECKPOINT, PREVIOUS, MODEL = "checkpoint.safetensors", "previous.safetensors", "model.safetensors"
HISTORY, TIMING, LOCK = "history.json", "timing.json", "run.lock"
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
GOES_ON = ("", "epochs", "interrupted")  # how a run that can be resumed may have stopped


class RunError(ValueError):
    """A folder cannot be used for a run as requested; the message says what is there and what to do."""


class Every(NamedTuple):
    """How often a checkpoint is written; one of the three is a number."""

    seconds: float = math.inf
    steps: float = math.inf
    epochs: float = math.inf

    @classmethod
    def of(cls, given: Any) -> Every:
        """Return what ``"30s"``, ``"5 min"``, ``"2h"``, ``"2 epochs"``, ``"500 steps"`` or 500 (steps) says."""
        if not isinstance(given, str):
            return cls(steps=check_count("checkpoint_every", given, " of steps"))
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|steps?|epochs?)\s*", given)
        number = float(found[1]) if found else 0.0
        if found is None or not number or (found[2][0] in "se" and found[2] != "s" and not number.is_integer()):
            raise ValueError(
                f"checkpoint_every is {shown(given)}; give a time as in '30s', '5min' or '2h', or '500 steps', or '2 epochs'"
            )
        if found[2] in UNITS:
            return cls(seconds=number * UNITS[found[2]])
        return cls(steps=number) if found[2].startswith("step") else cls(epochs=number)


class Run:
    """A training in a folder.

    Parameters
    ----------
    folder : str or Path
    every : str or int
        See :meth:`Every.of`.
    overwrite : bool
        Replace an existing run.
    about : dict, optional
        What the caller wants to find again, as JSON values.

    Attributes
    ----------
    settings : dict
        Of ``fit``: epochs, batch size, digests of the data, ....
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: str | int = "30s",
        overwrite: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.every, self.overwrite = Path(folder), Every.of(every), overwrite
        self.about: dict[str, Any] = dict(about or {})
        self.settings: dict[str, Any] = {}
        self.network: Network | None = None  # of a resumed run
        self.history = History()
        self.position = Position()
        self._found: ModelFile | None = None
        self._callbacks: list[Any] = []
        self._interrupts = Interrupts()
        self._arrays: dict[str, Array] = {}
        self._written, self._steps = 0.0, 0.0
        self.ends_only = False  # no epoch is left, but the end is not written yet
        self.interrupted = False  # between two steps, after a checkpoint

    # ------------------------------------------------------------------ an existing run

    @classmethod
    def resumed(cls, folder: str | Path, device: str | None = None, *, previous: bool = False, **options: Any) -> Run:
        """Return the run in a folder, with its network and history, at its last checkpoint.

        Raises
        ------
        FileNotFoundError
            There is none.
        RunError
            The checkpoint is damaged; the message says whether the one before it is whole.
        """
        run = cls(folder, **options)
        path = run.folder / (PREVIOUS if previous else CHECKPOINT)
        if not path.exists() and not previous and (run.folder / PREVIOUS).exists():
            path = run.folder / PREVIOUS  # the power failed between the two renames
        run._found = found = run._read(path)
        training = found.training
        assert training is not None
        try:
            run.settings, run.about = dict(training["settings"]), dict(training["about"])
            epoch, steps, row = (check_count("position", x, least=0) for x in training["position"][:3])
            run.position = Position(epoch, steps, row, float(training["position"][3]))
            run.history = History(found.history)
            run.history.stopped = str(training["stopped"])
            run.history.skipped = [Divergence(**one) for one in training["skipped"]]
            run.network = network_of(found, path, device or str(run.settings["device"]))
        except (LookupError, TypeError) as error:
            raise RunError(f"{str(path)!r} has a damaged description: {type(error).__name__} {error}") from None
        run.history["seconds"] = run._seconds(len(run.history.get("loss", [])))
        return run

    def _read(self, path: Path) -> ModelFile:
        try:
            found = read_model(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no run in {str(self.folder)!r}: it has no {path.name}") from None
        except ValueError as error:
            advice = "there is none before it"
            if path.name == CHECKPOINT and (self.folder / PREVIOUS).exists():
                try:
                    epoch = self._read(self.folder / PREVIOUS).training["position"][0]  # type: ignore[index]
                    advice = f"the one before it, of epoch {epoch + 1}, is intact: resume it with previous=True or --previous"
                except (ValueError, LookupError, TypeError):
                    advice = f"{PREVIOUS} is damaged too"
            raise RunError(f"{error}; {advice}") from None
        if found.training is None or found.optimizer is None:
            raise RunError(f"{str(path)!r} holds a network, but no run; load it with gpubackprop.load")
        return found

    def _seconds(self, epochs: int) -> list[float]:
        """Return the times of the epochs, 0 where unknown; no result depends on them."""
        try:
            known = [float(x) for x in json.loads((self.folder / TIMING).read_text())["seconds"]]
        except (OSError, ValueError, LookupError, TypeError):
            known = []
        return (known + [0.0] * epochs)[:epochs]

    @property
    def is_resumed(self) -> bool:
        """Whether it resumes from a checkpoint."""
        return self._found is not None

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raise RunError unless a resuming fit has the data and settings of this run; it may have more epochs."""
        for name, value in settings.items():
            was = self.settings.get(name)
            if name == "epochs":
                self._check_epochs(was, value)
            elif name in ("data", "validation") and value != was:
                raise RunError(
                    f"the {name} differ from those of the run in {str(self.folder)!r}: their digest is {shown(value)[:14]}...', "
                    f"there it is {shown(was)[:14]}...'; resume with the same samples in the same order"
                )
            elif name != "device" and value != was:
                raise RunError(f"{name} is {shown(value)}; the run in {str(self.folder)!r} has {shown(was)}")

    def _check_epochs(self, was: Any, now: int) -> None:
        where, stopped = str(self.folder), self.history.stopped
        if now == was and self._lacks_its_end():
            return
        if stopped not in GOES_ON:
            why = "a callback stopped it" if stopped == "callback" else f"it {stopped}"  # converged, diverged
            raise RunError(f"the run in {where!r} has ended after {self.position.epoch} epochs: {why}")
        if now < was:
            raise RunError(f"epochs is {now}; the run in {where!r} has {was}: ask for at least as many")
        if stopped == "epochs" and self.position.epoch >= now:
            raise RunError(f"the run in {where!r} has {self.position.epoch} epochs already; ask for more")

    def _lacks_its_end(self) -> bool:
        """Return whether all its epochs are done, and the process ended before it had written the network and the history."""
        done = self.history.stopped not in ("", "interrupted")
        return self.is_resumed and done and not (self.folder / HISTORY).exists()  # the last file

    # ------------------------------------------------------------------ while it is trained

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for one training, with signals deferred; an existing run is left as it is.

        Raises
        ------
        RunError
            Another process trains in the folder, or it holds a run already.
        """
        from filelock import FileLock, Timeout

        check_folder("checkpoint", self.folder)
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"another training writes to {str(self.folder)!r}; name another folder, or wait") from None
        try:
            self._check_free()
            self._interrupts = Interrupts()
            with self._interrupts:
                yield
        finally:
            lock.release()

    def _check_free(self) -> None:
        if not (self.is_resumed or self.overwrite) and any(
            (self.folder / name).exists() for name in (CHECKPOINT, PREVIOUS)
        ):
            raise RunError(
                f"{str(self.folder)!r} holds a run; resume it (gpubackprop.resume, or --resume), name another folder, or replace "
                "it (overwrite=True, or --overwrite)"
            )

    def begin_fit(self, training: Training, settings: dict[str, Any]) -> None:
        """Bring a resumed training to the state of the run; it must have the run's settings, except for more epochs."""
        if self._found is not None:
            self.check_same(settings)
            self.ends_only = settings["epochs"] == self.settings["epochs"] and self._lacks_its_end()
            self.history.determined_by = training.history.determined_by
            training.history, training.position, training.epoch = self.history, self.position, self.position.epoch
        self.settings = self.settings | settings

    def begin(self, training: Training, arrays: Mapping[str, Array]) -> None:
        """Begin or resume: arrays that a checkpoint holds besides the network's are filled from it, or written first."""
        self._arrays = dict(arrays)
        # data and options are right, so that what is to be replaced may go: another run, or the end of this one before more epochs
        replaced = (HISTORY, MODEL) if self.is_resumed else (CHECKPOINT, PREVIOUS, HISTORY, MODEL, TIMING)
        for name in replaced:
            (self.folder / name).unlink(missing_ok=True)
        if self._found is not None:
            with active(training.model.backend):
                for name, array in arrays.items():
                    array[...] = training.model.backend.asarray(self._found.arrays[name])
        self.write(training)

    def begin_callbacks(self, callbacks: list[Any]) -> None:
        """Restore the state of the callbacks, after their training has begun."""
        self._callbacks = callbacks
        if self._found is not None and self._found.training is not None:
            restored(callbacks, self._found.training["callbacks"], self._found.arrays)

    def callbacks_of(self, given: Any) -> list[Any]:
        """Return the callbacks of a fit that resumes this run: those given, which must match the run's, or the run's own."""
        assert self._found is not None
        assert self._found.training is not None
        return matching(given, self._found.training["callbacks"])

    def steps_left(self) -> float:
        """Return how many steps may be taken before the next checkpoint is due."""
        return self.every.steps - self._steps

    def due(self, *, steps: int = 0, epochs: int = 0) -> bool:
        """Return whether a checkpoint is due after this many steps, or at the end of this many epochs."""
        self._steps += steps
        return (
            self._interrupts.noted is not None
            or time.monotonic() - self._written >= self.every.seconds
            or self._steps >= self.every.steps
            or (epochs > 0 and epochs % self.every.epochs == 0)
        )

    def write(self, training: Training) -> None:
        """Write a checkpoint of a training that is between two steps; then end it if a signal was recorded."""
        model, history = training.model, _without_times(training.history)
        descriptions, arrays = described(self._callbacks, model.backend.to_numpy)
        words = {
            "settings": self.settings, "about": self.about, "position": list(training.position),
            "stopped": training.history.stopped, "skipped": [one._asdict() for one in training.history.skipped],
            "callbacks": descriptions,
        }  # fmt: skip
        arrays |= {name: model.backend.to_numpy(a) for name, a in self._arrays.items()}
        content = to_bytes(model.network, history, words, arrays)
        write_whole(self.folder / CHECKPOINT, content, before=self.folder / PREVIOUS)
        times = {"seconds": training.history.get("seconds", []), "compile_seconds": training.history.compile_seconds}
        write_whole(self.folder / TIMING, (json.dumps(times) + "\n").encode())
        self._written, self._steps = time.monotonic(), 0.0
        if self._interrupts.noted is not None and not training.history.stopped:
            self.interrupted = self._interrupts.taken = True
            raise KeyboardInterrupt

    def finish(self, training: Training) -> None:
        """Write the trained network and its history."""
        save(training.model.network, self.folder / MODEL)
        write_whole(self.folder / HISTORY, strict_json(_without_times(training.history)))


def _without_times(history: History) -> dict[str, list[float]]:
    """Return the columns that are the same in each run."""
    return {name: column for name, column in history.items() if name != "seconds"}


def strict_json(columns: Mapping[str, list[float]]) -> bytes:
    """Return columns of numbers as strict JSON: NaN and infinity are null."""
    finite = {name: [x if math.isfinite(x) else None for x in column] for name, column in columns.items()}
    return (json.dumps(finite, indent=1, allow_nan=False) + "\n").encode()
