"""A run stops anywhere and resumes with the bits of an uninterrupted one; a folder, file or data that do not fit are refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.cli.saved import open_saved
from gpubackprop.training import run as runs
from gpubackprop.training.run import CHECKPOINT, HISTORY, MODEL, PREVIOUS, Every, Run

gpu = pytest.param("cuda", marks=pytest.mark.gpu)
FILES = (MODEL, HISTORY, CHECKPOINT)


def data(n: int = 50) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.normal(size=(n, 6)).astype(np.float32), rng.integers(0, 3, n)


class Rising(gb.Callback):
    """A user's callback that remembers: a sum that decides the rate, an array, and when to stop."""

    def __init__(self) -> None:
        self.total, self.means = 0.0, np.zeros(0)

    def on_epoch_end(self, training: Any) -> None:
        self.total += training.history["loss"][-1]
        self.means = np.append(self.means, training.model.backend.to_numpy(training.model.parameters.flat).mean())
        training.learning_rate = 0.01 / (1 + self.total) + 1e-4 * abs(float(self.means.sum()))

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.means = state["total"], state["means"]


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": gb.SGD(0.1)},
    "dropout": {"optimizer": "adam", "dropout": 0.25, "micro_batch_size": 4},
    "schedule": {"optimizer": gb.AdamW(gb.OneCycle(0.05, steps=20), clip_norm=1.0), "shuffle": False},
    "patience": {
        "optimizer": gb.RMSprop(0.05),
        "callbacks": lambda: [gb.EarlyStopping(patience=2), gb.ReduceOnPlateau(patience=1)],
    },
    "weights": {"optimizer": "lion", "weighted": True, "callbacks": Rising},
    "skip": {"optimizer": gb.SGD(0.1), "on_divergence": "skip", "spoiled": True},
    "converges": {"optimizer": gb.SGD(0.1), "epochs": 30, "tol": 0.1, "n_iter_no_change": 2, "batch_size": 25},
    "lbfgs": {"optimizer": gb.LBFGS(), "callbacks": lambda: [gb.EarlyStopping(patience=3)]},
}


class Trained:
    """A fit with one of the settings, begun in a folder or resumed there."""

    def __init__(self, name: str, device: str, **more: Any) -> None:
        options = SETTINGS[name] | more
        self.callbacks = options.pop("callbacks", list)
        self.dropout = options.pop("dropout", 0.0)
        self.X, self.y = data()
        self.given: dict[str, Any] = {"validation_data": data(20), "progress": False}
        if options.pop("weighted", False):
            self.given["sample_weight"] = np.linspace(0.5, 2, len(self.X))
        if options.pop("spoiled", False):
            self.X[7] = 3e38  # no step on it is finite
        self.options, self.device = {"epochs": 4, "batch_size": 12} | options, device

    def begin(self, folder: Path, **options: Any) -> gb.History:
        model = gb.MLP([6, 8, 3], "tanh", device=self.device, dropout=self.dropout, seed=3)
        return model.fit(
            self.X, self.y, checkpoint=folder, callbacks=self.callbacks(), **self.given, **{**self.options, **options}
        )

    def resume(self, folder: Path, **options: Any) -> gb.History:
        mine = self.callbacks()
        given = mine if isinstance(mine, Rising) else None  # those of the package are made anew
        return gb.resume(folder).fit(self.X, self.y, callbacks=given, **self.given, **options)


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


@pytest.mark.filterwarnings("ignore::gpubackprop.DivergenceWarning")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("device", ["cpu", "reference", gpu])
def test_a_training_killed_after_any_checkpoint_ends_with_the_same_bytes(
    name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, write = Trained(name, device), Run.write
    if device == "cuda" and name == "skip":
        trained.given["stream_data"] = True

    def copy(run: Run, training: Any) -> None:
        write(run, training)
        if run.folder == tmp_path / "whole":
            shutil.copytree(run.folder, tmp_path / f"killed {len(list(tmp_path.iterdir())):03d}")

    monkeypatch.setattr(Run, "write", copy)
    history = trained.begin(tmp_path / "whole", checkpoint_every="1 step" if name != "lbfgs" else "1 epoch")
    whole = contents(tmp_path / "whole")
    killed = sorted(tmp_path.glob("killed *"))
    assert len(killed) >= len(history["loss"]) + 1
    for folder in killed[:: -1 if device == "cpu" else -5]:
        trained.resume(folder)
        assert contents(folder) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_training_between_two_steps(number: signal.Signals, tmp_path: Path) -> None:
    trained = Trained("patience", "cpu", epochs=6)
    trained.begin(tmp_path / "whole")
    ended: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda *_: ended.append(1))

    class Send(gb.EarlyStopping):  # in the middle of the callbacks of an epoch
        def on_epoch_end(self, training: Any) -> None:
            if training.epoch == 2:
                signal.raise_signal(number)

    try:
        model = gb.MLP([6, 8, 3], "tanh", seed=3)
        callbacks = [*trained.callbacks(), Send()]
        history = model.fit(
            trained.X, trained.y, checkpoint=tmp_path / "cut", callbacks=callbacks, **trained.given, **trained.options
        )
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert history.interrupted
    assert len(history["loss"]) == 3
    assert ended == [1] * (number == signal.SIGTERM)  # the process would have ended
    run = gb.resume(tmp_path / "cut")
    assert run.history["loss"] == history["loss"]
    assert "3 of 6 epochs" in repr(run)
    run.fit(trained.X, trained.y, callbacks=[*trained.callbacks(), Send()], **trained.given)
    assert (tmp_path / "cut" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    class Twice(gb.Callback):
        def on_epoch_end(self, training: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    X, y = data()
    model = gb.MLP([6, 8, 3])
    assert model.fit(X, y, epochs=3, checkpoint=tmp_path, callbacks=Twice(), progress=False).interrupted
    assert not (tmp_path / MODEL).exists()  # nobody knows where it was
    assert gb.resume(tmp_path).history.get("loss", []) == []


def test_an_error_in_a_callback_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    class Fails(gb.Callback):
        broken = True

        def on_epoch_end(self, training: Any) -> None:
            if self.broken and training.epoch == 2:
                raise OSError("no space left on device")

    X, y = data()
    fit = {"epochs": 4, "batch_size": 12, "progress": False, "checkpoint_every": "5 steps"}
    with pytest.raises(OSError, match="no space"):
        gb.MLP([6, 8, 3], seed=1).fit(X, y, callbacks=Fails(), checkpoint=tmp_path / "a", **fit)
    mended = Fails()
    mended.broken = False
    gb.resume(tmp_path / "a").fit(X, y, callbacks=mended, progress=False)
    gb.MLP([6, 8, 3], seed=1).fit(X, y, callbacks=mended, checkpoint=tmp_path / "b", **fit)
    assert (tmp_path / "a" / MODEL).read_bytes() == (tmp_path / "b" / MODEL).read_bytes()


def test_a_full_disk_is_an_error_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, count, real = Trained("sgd", "cpu"), [0], runs.write_whole

    def full(path: Path, content: bytes, **named: Any) -> None:
        count[0] += 1
        if count[0] > 8:
            raise OSError(28, "No space left on device")
        real(path, content, **named)

    trained.begin(tmp_path / "whole")
    monkeypatch.setattr(runs, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        trained.begin(tmp_path / "full", checkpoint_every=3)
    monkeypatch.undo()
    trained.resume(tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_more_epochs_are_those_of_a_longer_training(tmp_path: Path) -> None:
    trained = Trained("patience", "cpu")
    trained.begin(tmp_path / "long", epochs=6)
    trained.begin(tmp_path / "short", epochs=3)
    history = trained.resume(tmp_path / "short", epochs=6)
    assert len(history["loss"]) == len(history["seconds"]) > 3
    assert contents(tmp_path / "short") == contents(tmp_path / "long")


@pytest.mark.parametrize("lost", [(MODEL, HISTORY), (HISTORY,)])
def test_a_training_killed_while_it_writes_its_end_writes_it_when_resumed(
    lost: tuple[str, ...], tmp_path: Path
) -> None:
    trained = Trained("patience", "cpu")
    trained.begin(tmp_path)
    whole = contents(tmp_path)
    for name in lost:
        (tmp_path / name).unlink()
    trained.resume(tmp_path)
    assert contents(tmp_path) == whole


def test_more_epochs_replace_the_end_of_the_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained("patience", "cpu")
    trained.begin(tmp_path / "long", epochs=6)
    trained.begin(tmp_path / "short", epochs=3)

    def killed(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as context:
        context.setattr(Run, "finish", killed)
        with pytest.raises(SystemExit):
            trained.resume(tmp_path / "short", epochs=6)
    saved = open_saved(tmp_path / "short", "cpu")  # not the network of 3 epochs with the history of 6
    assert not saved.finished
    assert saved.history is not None
    assert len(saved.history["loss"]) > 3
    trained.resume(tmp_path / "short", epochs=6)
    assert contents(tmp_path / "short") == contents(tmp_path / "long")


def test_what_contradicts_a_run_is_refused(tmp_path: Path) -> None:
    X, y = data()
    options = {"epochs": 3, "batch_size": 10, "progress": False}
    gb.MLP([6, 8, 3]).fit(X, y, checkpoint=tmp_path, validation_data=(X, y), callbacks=gb.EarlyStopping(), **options)
    before = contents(tmp_path)
    with pytest.raises(gb.RunError, match=r"holds a run; resume it .*, name another folder, or replace"):
        gb.MLP([6, 8, 3]).fit(X, y, checkpoint=tmp_path, **options)
    assert contents(tmp_path) == before
    for change, message in (
        ({"epochs": 3}, "has 3 epochs already; ask for more"),
        ({"epochs": 2}, "epochs is 2; the run in .* has 3: ask for at least as many"),
        ({"X": X + 1}, "the data differ from those of the run .*resume with the same samples in the same order"),
        ({"y": y[::-1]}, "the data differ"),
        ({"sample_weight": np.ones(len(X))}, "the data differ"),
        ({"validation_data": None}, "the validation differ"),
        ({"validation_data": (X[1:], y[1:])}, "the validation differ"),
        ({"callbacks": []}, "callbacks are none; the run has EarlyStopping"),
        ({"callbacks": gb.EarlyStopping(patience=4)}, "EarlyStopping has .*'patience': 4.*; in the run it has .*'patience': 10"),
    ):  # fmt: skip
        given = {"X": X, "y": y, "validation_data": (X, y), "epochs": 5, "progress": False} | change
        with pytest.raises(ValueError, match=message):
            gb.resume(tmp_path).fit(**given)
    with pytest.raises(ValueError, match="X has shape"):
        gb.MLP([6, 8, 3]).fit(X[:, :5], y, checkpoint=tmp_path, overwrite=True, **options)
    assert contents(tmp_path) == before  # what is wrong is found before anything is replaced
    gb.MLP([6, 8, 3]).fit(X, y, checkpoint=tmp_path, overwrite=True, **options)
    assert not gb.resume(tmp_path).settings["validation"]


def test_a_callback_of_the_users_must_be_given_again(tmp_path: Path) -> None:
    X, y = data()
    model = gb.MLP([6, 8, 3])
    model.fit(X, y, epochs=1, checkpoint=tmp_path, callbacks=Rising(), progress=False)
    with pytest.raises(ValueError, match="custom callbacks, Rising: give callbacks"):
        gb.resume(tmp_path).fit(X, y, epochs=2, progress=False)

    class Odd(gb.Callback):
        def on_epoch_end(self, training: Any) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"seen": {1, 2}}

    with pytest.raises(ValueError, match="state_dict of callback Odd has 'seen', a set"):
        model.fit(X, y, epochs=1, checkpoint=tmp_path / "odd", callbacks=Odd(), progress=False)


def test_a_run_that_a_callback_stopped_has_ended(tmp_path: Path) -> None:
    class Stop(gb.Callback):
        def on_epoch_end(self, training: Any) -> None:
            training.stop = training.epoch == 1

    X, y = data()
    history = gb.MLP([6, 8, 3]).fit(X, y, epochs=9, checkpoint=tmp_path, callbacks=Stop(), progress=False)
    assert history.stopped == "callback"
    with pytest.raises(gb.RunError, match="has ended after 2 epochs: a callback stopped it"):
        gb.resume(tmp_path).fit(X, y, epochs=20, callbacks=Stop(), progress=False)


def test_a_training_ends_where_it_has_converged(tmp_path: Path) -> None:
    X, y = data()
    options = {"epochs": 200, "batch_size": 25, "optimizer": gb.SGD(0.1), "progress": False}
    history = gb.MLP([6, 8, 3], seed=3).fit(X, y, tol=0.01, n_iter_no_change=3, **options)
    loss = history["loss"]
    assert history.stopped == "converged"
    assert 3 < len(loss) < 200
    lowest = np.minimum.accumulate([np.inf, *loss[:-1]])
    falls = [now <= before - 0.01 for now, before in zip(loss, lowest, strict=True)]
    assert falls[-3:] == [False] * 3
    assert all(any(falls[i : i + 3]) for i in range(len(falls) - 3))
    assert gb.MLP([6, 8, 3]).fit(X, y, **options | {"epochs": 2}).stopped == "epochs"
    with pytest.raises(ValueError, match="tol is -1"):
        gb.MLP([6, 8, 3]).fit(X, y, tol=-1)


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    X, y = data()

    class Second(gb.Callback):
        def on_epoch_end(self, training: Any) -> None:
            with pytest.raises(gb.RunError, match="another training writes to"):
                gb.MLP([6, 3]).fit(X, y, epochs=1, checkpoint=tmp_path, progress=False)

    gb.MLP([6, 3]).fit(X, y, epochs=1, checkpoint=tmp_path, callbacks=Second(), progress=False)


def test_in_another_thread_a_run_is_written_too(tmp_path: Path) -> None:
    trained = Trained("sgd", "cpu")
    trained.begin(tmp_path / "a")
    thread = threading.Thread(target=trained.begin, args=(tmp_path / "b",))
    thread.start()
    thread.join()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("damaged")
    Trained("patience", "cpu").begin(folder, checkpoint_every="1 epoch")
    return folder


def flips(folder: Path, count: int, seed: int) -> None:
    path, numbers = folder / CHECKPOINT, random.Random(seed)
    whole = path.read_bytes()
    try:
        for _ in range(count):
            content = bytearray(whole)
            content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
            path.write_bytes(content)
            with pytest.raises(
                gb.RunError, match=r"the one before it, of epoch \d, is intact: resume it with previous=True"
            ) as error:
                gb.resume(folder)
            assert "\n" not in str(error.value)
    finally:
        path.write_bytes(whole)


def test_a_flipped_bit_is_found_and_the_older_checkpoint_offered(damaged: Path) -> None:
    flips(damaged, 60, seed=0)


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_found(damaged: Path) -> None:
    flips(damaged, 1000, seed=1)


def test_the_older_checkpoint_gives_the_same_bytes(damaged: Path, tmp_path: Path) -> None:
    trained, folder = Trained("patience", "cpu"), tmp_path / "copy"
    shutil.copytree(damaged, folder)
    whole = contents(folder)
    (folder / CHECKPOINT).write_bytes(b"")
    with pytest.raises(gb.RunError, match=r"is not a complete safetensors file.*previous=True or --previous"):
        gb.resume(folder)
    gb.resume(folder, previous=True).fit(trained.X, trained.y, **trained.given)
    assert contents(folder) == whole
    (folder / CHECKPOINT).unlink()  # the power failed between the two names
    gb.resume(folder).fit(trained.X, trained.y, **trained.given)
    assert contents(folder) == whole
    for name in (CHECKPOINT, PREVIOUS):
        (folder / name).write_bytes(b"x" * 100)
    with pytest.raises(gb.RunError, match=r"previous\.safetensors is damaged too"):
        gb.resume(folder)
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        gb.resume(tmp_path / "nowhere")
    (folder / CHECKPOINT).write_bytes((folder / MODEL).read_bytes())
    with pytest.raises(gb.RunError, match="holds a network, but no run"):
        gb.resume(folder)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("30s", Every(seconds=30)), ("1.5 min", Every(seconds=90)), ("2h", Every(seconds=7200)), (7, Every(steps=7)),
     ("500 steps", Every(steps=500)), ("1 epoch", Every(epochs=1))],
)  # fmt: skip
def test_how_often(given: Any, expected: Every) -> None:
    assert Every.of(given) == expected


@pytest.mark.parametrize("given", ["", "30", "0s", "-1s", "1.5 epochs", "2 weeks", 0, 1.5, None])
def test_how_often_must_be_understood(given: Any) -> None:
    with pytest.raises(ValueError, match="checkpoint_every is"):
        gb.MLP([6, 3]).fit(*data(), checkpoint="nowhere", checkpoint_every=given)


def test_a_history_with_nan_is_strict_json(tmp_path: Path) -> None:
    class Spoil(gb.Callback):
        def on_epoch_end(self, training: Any) -> None:
            training.history["own"] = [float("nan"), float("inf")]

    X, y = data()
    gb.MLP([6, 3]).fit(X, y, epochs=1, checkpoint=tmp_path, callbacks=Spoil(), progress=False)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads((tmp_path / HISTORY).read_text(), parse_constant=refuse)
    assert found["own"] == [None, None]
    assert "seconds" not in found  # which differ each time


def test_a_forked_child_neither_holds_the_lock_nor_takes_the_signals(tmp_path: Path) -> None:
    class Fork(gb.Callback):
        def on_epoch_end(self, training: Any) -> None:
            child = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
            child.start()
            child.join()

    X, y = data()
    gb.MLP([6, 3]).fit(X, y, epochs=2, checkpoint=tmp_path, callbacks=Fork(), progress=False)
    assert not gb.resume(tmp_path).history.interrupted


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_file_and_folder_are_on_the_disk_before_and_after_the_name(tmp_path: Path) -> None:
    code = "import gpubackprop as gb, sys; gb.MLP([4, 3], device='reference').save(sys.argv[1])"
    traced = ["strace", "-f", "-e", "trace=fsync,rename", sys.executable, "-c", code, str(tmp_path / "net")]
    done = subprocess.run(traced, capture_output=True, text=True, check=True)
    calls = [
        line.split("(")[0].split()[-1] for line in done.stderr.splitlines() if "sync(" in line or "rename(" in line
    ]
    assert calls[-3:] == ["fsync", "rename", "fsync"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_random_instants_of_interruption() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "interruptions.py"), "18"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 of 18 trainings ended with the same bytes" in done.stdout


def test_a_fingerprint_is_that_of_the_bits() -> None:
    trained = Trained("dropout", "cpu")
    models = [gb.MLP([6, 8, 3], dropout=0.25, seed=s) for s in (3, 3, 4)]
    histories = [m.fit(trained.X, trained.y, epochs=2, progress=False) for m in models]
    first, same, other = map(gb.fingerprint, models)
    assert first == same != other
    assert len(first) == 64
    models[1].parameters.W[0][0, 0] += 1
    assert gb.fingerprint(models[1]) != first
    assert histories[0].determined_by == histories[1].determined_by
    assert {"gpubackprop", "seed", "device", "dtype", "processor"} <= histories[0].determined_by.keys()
    assert not any("thread" in name for name in histories[0].determined_by)
