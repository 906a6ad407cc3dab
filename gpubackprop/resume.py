"""Resume an interrupted training from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpubackprop.mlp import MLP
from gpubackprop.training.history import History
from gpubackprop.training.run import Run


class Resumed:
    """A run at its last checkpoint, as :func:`resume` returns it.

    Attributes
    ----------
    model : MLP
    history : History
        Of the finished epochs.
    settings : dict
        Of its ``fit``: epochs, batch size, digests of the data, ....
    """

    def __init__(self, run: Run) -> None:
        assert run.network is not None
        self._run, self.model, self.history = run, MLP.of(run.network), run.history

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its ``fit``."""
        return dict(self._run.settings)

    @property
    def about(self) -> dict[str, Any]:
        """What the caller of its ``fit`` stored in it."""
        return dict(self._run.about)

    def __repr__(self) -> str:
        done, epochs = self._run.position.epoch, self.settings.get("epochs")
        return f"Resumed({str(self._run.folder)!r}, {done} of {epochs} epochs, {self.model})"

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        validation_data: tuple[Any, ...] | None = None,
        sample_weight: Any = None,
        class_weight: Any = None,
        validation_split: float | None = None,
        callbacks: Any = None,
        epochs: int | None = None,
        progress: bool = True,
        stream_data: bool | None = None,
    ) -> History:
        """Continue to the end, with the bits of an uninterrupted training.

        Parameters
        ----------
        X, y, sample_weight, class_weight, validation_data, validation_split
            The same as in the first ``fit``, in the same order.
        callbacks : Callback or iterable of them, optional
            By default the run's own, if all are of this package; otherwise the same as in the first ``fit``, in order.
        epochs : int, optional
            As in the first ``fit``, or more: a schedule that has ended by then keeps its last rate.
        progress : bool
        stream_data : bool, optional
            See :func:`gpubackprop.training.fit.fit`; the bits do not depend on it.

        Returns
        -------
        History
            Of all epochs.

        Raises
        ------
        RunError
            Data or settings differ from those of the run, or it has ended.
        """
        settings, state = self.settings, self.model.optimizer_state
        assert state is not None
        return self.model.fit(  # type: ignore[no-any-return]
            X, y, epochs=settings["epochs"] if epochs is None else epochs, batch_size=settings["batch_size"],
            optimizer=state.optimizer, micro_batch_size=settings["micro_batch_size"], shuffle=settings["shuffle"],
            tol=settings["tol"], n_iter_no_change=settings["n_iter_no_change"], on_divergence=settings["on_divergence"],
            validation_data=validation_data, sample_weight=sample_weight, class_weight=class_weight,
            validation_split=validation_split, metrics=settings["metrics"],
            callbacks=callbacks, progress=progress, stream_data=stream_data, checkpoint=self._run,
        )  # fmt: skip


def resume(
    folder: str | Path, device: str | None = None, *, previous: bool = False, checkpoint_every: str | int = "30s"
) -> Resumed:
    """Return the training in a folder that ``fit(..., checkpoint=folder)`` wrote; its ``fit(X, y)`` continues to the end.

    Parameters
    ----------
    folder : str or Path
    device : str, optional
        By default that of the run; another device gives other bits.
    previous : bool
        Use the checkpoint before the last, in case the last is damaged.
    checkpoint_every : str or int
        See :func:`gpubackprop.training.fit.fit`.

    Raises
    ------
    FileNotFoundError
        The folder holds no run.
    RunError
        The checkpoint is damaged; the message says whether the one before it is whole.

    Examples
    --------
    >>> import tempfile, numpy as np, gpubackprop as gb
    >>> X, y, folder = np.eye(4, dtype=np.float32), np.arange(4) % 2, tempfile.mkdtemp()
    >>> history = gb.MLP([4, 8, 2], device="reference").fit(X, y, epochs=2, checkpoint=folder, progress=False)
    >>> run = gb.resume(folder)
    >>> len(run.fit(X, y, epochs=5, progress=False)["loss"])
    5
    """
    return Resumed(Run.resumed(folder, device, previous=previous, every=checkpoint_every))
