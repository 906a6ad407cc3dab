"""Grade an implementation of backpropagation against a golden file: the first wrong array, and the likely cause.

Each known mistake is put into the step of the golden file, and the whole run with it is compared with the given arrays. So any
subset of the arrays will do, and whether a mistake explains all wrong arrays is computed, not guessed. Mistakes add up: the next
one is searched on top of those found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from gpubackprop.definitions import Array
from gpubackprop.inspect.golden import Problem, equation_of, kind_of
from gpubackprop.inspect.mistakes import MISTAKES
from gpubackprop.inspect.rehearsal import Made, Rehearsal

RTOL, RTOL_SINGLE, ATOL = 1e-9, 1e-4, 1e-13
"""Relative to the largest number of an array. The gradients of a softmax add up to 0, so rounding may leave 1e-17."""
MOST_MISTAKES = 6


@dataclass(frozen=True)
class Grade:
    """What :func:`grade` returns; ``print`` it.

    Attributes
    ----------
    first : str or None
        The first wrong array, in the order in which they are computed.
    equation : str
        What it should be.
    causes : list of str
        One for each mistake found; "a; or: b" where several explain the same arrays.
    names : list of list of str
        Of these mistakes: the alternatives for each.
    given, wrong, unexplained : int
        Arrays.
    notes : list of str
        What was done to the arrays before the comparison.
    single : bool
        They were computed or saved in single precision.
    """

    first: str | None
    equation: str
    causes: list[str]
    names: list[list[str]]
    given: int
    wrong: int
    unexplained: int
    notes: list[str]
    single: bool = False

    @property
    def ok(self) -> bool:
        """True if nothing is wrong, and in double precision."""
        return self.first is None and not self.single

    def __str__(self) -> str:
        lines = [f"{self.given} arrays given, {self.given - self.wrong} right, {self.wrong} wrong", *self.notes]
        if self.first:
            lines.append(f"first wrong: {self.first:15s} {self.equation}")
            lines += [f"likely cause: {cause}" for cause in self.causes]
            if self.names:
                lines.append(f"explains {self.wrong - self.unexplained} of {self.wrong} wrong arrays")
        return "\n".join(lines)


def fits(a: Array, g: Array, rtol: float = RTOL) -> bool:
    """Return whether a equals g, relative to the largest number of g; NaN and infinity need only be in the same rows."""
    if a.shape != g.shape or a.dtype.kind not in "fiu":
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.abs(a - g).max(initial=0)
    if np.isfinite(difference):
        return bool(difference <= rtol * np.abs(g).max(initial=0) + ATOL)
    finite, expected = (np.isfinite(x).reshape(len(x) if x.ndim else 1, -1).all(axis=1) for x in (a, g))
    if not np.array_equal(finite, expected):
        return False
    a, g = np.atleast_1d(a)[finite], np.atleast_1d(g)[finite]
    return bool(np.abs(a - g).max(initial=0) <= rtol * np.abs(g).max(initial=0) + ATOL)


def grade(mine: Mapping[str, Any], problem: Problem, given: Mapping[str, Array] | None = None) -> Grade:
    """Compare arrays with those of a golden file, and look for the mistakes that explain the difference.

    Parameters
    ----------
    mine : mapping of str to array
        Any of the file's arrays, by its keys; ``.1`` may be omitted.
    problem : Problem
    given : mapping of str to array, optional
        Inputs, targets and parameters of the file; by default those of the problem.

    Raises
    ------
    ValueError
        None of the keys is known, or most arrays have other shapes than in the file.
    """
    made = problem.given()
    rehearsal = Rehearsal(problem, made if given is None else {key: given[key] for key in made})
    golden = {key: array.copy() for key, array in rehearsal.run().items()}
    arrays, notes = _read(mine, golden)
    keys = [key for key in golden if key in arrays]
    single = _in_single_precision(arrays, golden)
    if single:
        notes.append("your numbers have 24 bits, those of single precision: compute and save in double precision")
    rtol = RTOL_SINGLE if single else RTOL
    wrong = [key for key in keys if not fits(arrays[key], golden[key], rtol)]
    graded = partial(Grade, given=len(keys), wrong=len(wrong), notes=notes, single=single)
    if not wrong:
        return graded(None, "", [], [], unexplained=0)
    if wrong[0] in made:
        causes = [f"{', '.join(key for key in wrong if key in made)}: begin with the arrays of the golden file"]
        return graded(wrong[0], equation_of(wrong[0], problem), causes, [], unexplained=len(wrong))
    search = _Search(rehearsal, golden, arrays, rtol, strict=True)
    if search.left:
        other = _Search(rehearsal, golden, arrays, rtol, strict=False)
        search = search if other.left else other
    causes, names = search.causes(), search.names()
    return graded(wrong[0], equation_of(wrong[0], problem), causes, names, unexplained=len(search.left))


@dataclass
class _Search:
    """Searches for the mistakes in given arrays, one after another."""

    rehearsal: Rehearsal
    golden: Mapping[str, Array]
    arrays: Mapping[str, Array]
    rtol: float
    strict: bool
    """A mistake must not spoil arrays that are right without it; two may, if the second compensates the first."""

    def __post_init__(self) -> None:
        self.keys = [key for key in self.golden if key in self.arrays]
        self.best, self.left = self.golden, self._left(self.golden)
        self.found: list[Made] = []
        self.alternatives: list[list[tuple[Made, ...]]] = []
        while self.left and len(self.alternatives) < MOST_MISTAKES:
            candidates = self._candidates(self.left[0])
            if not candidates:
                break
            self.alternatives.append(candidates)
            self.found += candidates[0]
            self.best = self.rehearsal.run(self.found)
            self.left = self._left(self.best)

    def _fits(self, key: str, run: Mapping[str, Array]) -> bool:
        return key in run and fits(self.arrays[key], run[key], self.rtol)

    def _left(self, run: Mapping[str, Array]) -> list[str]:
        return [key for key in self.keys if not self._fits(key, run)]

    def _candidates(self, first: str) -> list[tuple[Made, ...]]:
        """Return the mistakes that reproduce the given array ``first``, among those that explain most."""
        mistakes = [(m, layer) for m in MISTAKES for layer in (None, *(self.rehearsal.names if m.per_layer else ()))]
        best = self._best([(made,) for made in mistakes], first)
        if not best:  # two mistakes in one array
            everywhere = [made for made in mistakes if made[1] is None]
            pairs: list[tuple[Made, ...]] = [
                (a, b) for a, b in combinations(everywhere, 2) if a[0].wrong.keys() == b[0].wrong.keys()
            ]
            best = self._best(pairs, first)
        return [made for made in best if made[0][1] is None] or best

    def _best(self, candidates: list[tuple[Made, ...]], first: str) -> list[tuple[Made, ...]]:
        scored = [(self._score(made, first), made) for made in candidates]
        top = max(points for points, _ in scored)
        return [made for points, made in scored if points == top > 0]

    def _score(self, made: tuple[Made, ...], first: str) -> int:
        """Return how many arrays are explained, or 0."""
        upto = frozenset(self.keys[: self.keys.index(first) + 1]) if self.strict else {first}
        run = self.rehearsal.run(
            [*self.found, *made], lambda key, value: key not in upto or fits(self.arrays[key], value, self.rtol)
        )
        right = len(self.keys) - len(self._left(run))
        before = 0 if self.strict else len(self.keys) - len(self.left)
        return right if all(self._fits(key, run) for key in upto) and right >= before else 0

    def causes(self) -> list[str]:
        """Return the causes found, and how the first unexplained array differs."""
        found = ["; or: ".join(list(dict.fromkeys(map(_cause, each)))[:3]) for each in self.alternatives]
        if self.left:
            first = self.left[0]
            what = f"a further mistake in {first}" if found else "no known one"
            found.append(f"{what}: {_difference(self.arrays[first], self.best.get(first, self.golden[first]))}")
        return found

    def names(self) -> list[list[str]]:
        """Return the names of the mistakes found, with their alternatives."""
        return [list(dict.fromkeys(" + ".join(m.name for m, _ in made) for made in each)) for each in self.alternatives]


def _cause(made: tuple[Made, ...]) -> str:
    return "; and ".join(mistake.cause + (f" (in layer {layer})" if layer else "") for mistake, layer in made)


def _read(mine: Mapping[str, Any], golden: Mapping[str, Array]) -> tuple[dict[str, Array], list[str]]:
    """Return the arrays under the keys of the golden file, samples as rows, and the changes made to them."""
    full = {(key if key in golden else f"{key}.1"): np.asarray(array) for key, array in mine.items()}
    unknown = [key.removesuffix(".1") for key in full if key not in golden]
    arrays = {key: array for key, array in full.items() if key in golden}
    if not arrays:
        have = ", ".join(list(golden)[:12])
        raise ValueError(
            f"none of the arrays has a name of the golden file ({have}, ...); given: {', '.join(unknown) or 'none'}"
        )
    strange = [key for key, array in arrays.items() if sorted(array.shape) != sorted(golden[key].shape)]
    if 2 * len(strange) > len(arrays):
        shapes = f"{strange[0]} has {arrays[strange[0]].shape}, there {golden[strange[0]].shape}"
        raise ValueError(
            f"{len(strange)} of {len(arrays)} arrays differ in shape from the golden file's: {shapes}; give the golden file that "
            "your network was made from"
        )
    notes = [f"ignored, since the golden file does not have them: {', '.join(unknown)}"] if unknown else []
    samples = [key for key in arrays if golden[key].ndim == 2 and key[0] != "W" and kind_of(key) != "dW"]
    if samples and all(arrays[key].shape == golden[key].shape[::-1] != golden[key].shape for key in samples):
        notes.append("samples are columns in your arrays, as in the text: read transposed")
        arrays |= {key: arrays[key].T for key in samples}
    return arrays, notes


def _in_single_precision(arrays: Mapping[str, Array], golden: Mapping[str, Array]) -> bool:
    """Return whether most numbers that should have 53 bits have only 24."""

    def short(x: Array) -> bool:
        with np.errstate(over="ignore"):
            return np.array_equal(x, x.astype(np.float32), equal_nan=True)

    real = [key for key, a in arrays.items() if a.dtype.kind == "f" and a.size > 1 and not short(golden[key])]
    return 2 * sum(short(arrays[key]) for key in real) > len(real)


def _difference(a: Array, g: Array) -> str:
    """Say how two arrays differ if no known mistake explains it."""
    if a.dtype.kind not in "fiu":
        return "it does not hold real numbers"
    if a.shape != g.shape:
        return f"its shape is {a.shape}, not {g.shape}" + (": transposed" if a.shape == g.shape[::-1] else "")
    if not np.isfinite(a).all():
        return "it holds NaN or infinity"
    if a.ndim == 2 and a.shape[0] == a.shape[1] and fits(a.T, g):
        return "it is the transpose"
    size = float((g * g).sum())
    ratio = float((a * g).sum() / size) if size else 0.0
    if ratio and fits(a, ratio * g):
        return f"it is {ratio:.6g} times the right one" + (": the wrong sign" if ratio < 0 else "")
    for axis in range(a.ndim):
        bad = [i + 1 for i in range(g.shape[axis]) if not fits(a.take(i, axis), g.take(i, axis))]
        if len(bad) < g.shape[axis]:
            word = "rows" if axis == 0 and a.ndim == 2 else "entries" if a.ndim == 1 else "columns"
            return f"{word} {', '.join(map(str, bad))} are wrong, the others right"
    if fits(np.sort(a, axis=None), np.sort(g, axis=None)):
        return "the right numbers in another order"
    if fits(a, g, RTOL_SINGLE):
        return "right to about four digits: finite differences, or constants that were rounded?"
    return f"the largest difference is {np.abs(a - g).max():.3g}, of numbers up to {np.abs(g).max():.3g}"
