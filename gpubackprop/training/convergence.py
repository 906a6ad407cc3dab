"""The criterion of convergence: the loss has not fallen by ``tol`` for ``n_iter_no_change`` iterations."""

from __future__ import annotations


class Convergence:
    """Counts the losses in a row that are not lower than the lowest so far by at least ``tol``; NaN is never lower.

    Parameters
    ----------
    tol : float
    n_iter_no_change : int
    """

    def __init__(self, tol: float, n_iter_no_change: int) -> None:
        self.tol, self.n_iter_no_change = tol, n_iter_no_change
        self.lowest, self.idle = float("inf"), 0

    def reached(self, loss: float) -> bool:
        """Take the next loss, and return whether this is convergence."""
        self.idle = 0 if loss <= self.lowest - self.tol else self.idle + 1
        self.lowest = min(self.lowest, loss)
        return self.idle >= self.n_iter_no_change
