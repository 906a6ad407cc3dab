"""The cache key of compiled code: everything that the compiler reads, so that changed code is never taken for the old."""

from __future__ import annotations

import enum
import functools
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numba
import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import Activation
from gpubackprop.code_digest import Watch, fingerprint
from gpubackprop.definitions import NUMPY, Definition, per_definition
from gpubackprop.kernels import source
from gpubackprop.kernels.cpu import loss as cpu_loss
from gpubackprop.kernels.cpu import passes as cpu
from gpubackprop.kernels.softmax import define_log_softmax

F32 = np.dtype(np.float32)

SOURCE = """
import numpy as np
import other
from other import helper
K = 2.0
TABLE = np.array([1.0, 2.0])
LIST = [1.0, 2.0]
def local(x, factor=3.0, *, more=1.0):
    return x * factor * more
def define(real, m):
    def phi(z):
        return z * K + TABLE[1] + LIST[0] + other.C + other.inner.D + np.pi + local(z) + helper(z)
    return phi
"""
OTHER = """
C = 1.0
E = 4.0
def helper(x):
    return x + E
"""


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's module, with another that it imports."""
    other, inner, module = types.ModuleType("other"), types.ModuleType("other.inner"), types.ModuleType("user")
    inner.D = 5.0  # type: ignore[attr-defined]
    other.inner = inner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other", other)
    exec(OTHER, vars(other))
    exec(SOURCE, vars(module))
    return module


def _default(user: Any) -> None:
    user.local.__defaults__ = (4.0,)


def _keyword(user: Any) -> None:
    user.local.__kwdefaults__ = {"more": 2.0}


def _in_place(user: Any) -> None:
    user.TABLE[1] = 7.0


EDITS: dict[str, Callable[[Any], None]] = {
    "global": lambda user: setattr(user, "K", 3.0),
    "sign of zero": lambda user: setattr(user, "K", -0.0),
    "type of a number": lambda user: setattr(user, "K", np.float32(2.0)),
    "array in place": _in_place,
    "list in place": lambda user: user.LIST.__setitem__(0, 9.0),
    "default": _default,
    "keyword default": _keyword,
    "constant of a module": lambda user: setattr(user.other, "C", 2.0),
    "constant of a module in a module": lambda user: setattr(user.other.inner, "D", 2.0),
    "global of a function in another module": lambda user: setattr(user.other, "E", 2.0),
    "function in another module": lambda user: setattr(user, "helper", lambda x: x - 4.0),
    "code of a helper": lambda user: setattr(user.local, "__code__", (lambda x, factor=3.0, *, more=1.0: x).__code__),
}


@pytest.mark.parametrize("kind", EDITS)
def test_each_kind_of_edit_is_seen(kind: str, user: Any) -> None:
    phi = user.define(np.float64, None)
    before, watch = fingerprint(phi), Watch(phi, {})
    assert before.lasting
    assert fingerprint(user.define(np.float64, None)) == before
    EDITS[kind](user)
    assert fingerprint(phi) != before
    assert not watch.holds_for(phi)
    assert not watch.holds_for(user.define(np.float64, None))


def test_an_attribute_of_a_library_is_seen(user: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    phi = user.define(np.float64, None)
    before = fingerprint(phi)
    monkeypatch.setattr(np, "pi", 3.0)
    assert fingerprint(phi) != before


class _Pair(NamedTuple):
    a: float
    b: float


class _Level(enum.Enum):
    LOW = 1
    HIGH = 2


class _Holder:
    factor: ClassVar[float] = 1.0

    def method(self, x: float) -> float:
        return x * self.factor


def _closing(value: Any) -> Callable[[], Any]:
    return lambda: value


def _scaled(factor: float) -> Callable[[float], float]:
    return lambda x: x * factor


def test_values_of_all_kinds_are_told_apart() -> None:
    values = [
        1, 1.0, True, "1", b"1", np.float32(1), np.float64(1), np.int64(1), np.ones(1), np.ones(1, np.float32), np.ones((1, 1)),
        (1,), [1], {1}, {"a": 1}, {"a": 2}, {"b": 1}, _Pair(1, 2), (1, 2), _Level.LOW, _Level.HIGH, 0.0, -0.0, float("nan"),
        np.dtype("f4"), np.dtype("f8"), numba.float32, numba.float64, range(3), range(4), None, ..., math_like, np.exp, np.log,
        functools.partial(_scaled, 1.0), functools.partial(_scaled, 2.0), _scaled(1.0), _scaled(2.0),
        numba.njit(_scaled(1.0)), numba.njit(_scaled(2.0)), numba.njit(_scaled(1.0), fastmath=True),
        type("A", (), {"k": 1}), type("A", (), {"k": 2}),
    ]  # fmt: skip
    digests = [fingerprint(_closing(value)) for value in values]
    assert len(set(digests)) == len(values)
    assert all(digest.lasting for digest in digests)
    assert digests == [fingerprint(_closing(value)) for value in values]


def math_like(x: float) -> float:
    """Return x."""
    return x


def test_what_cannot_be_looked_into_equals_nothing_not_even_itself() -> None:
    for opaque in (object(), threading_lock(), _Holder().method, np.random.default_rng(0), {object(): 1}):
        first, second = fingerprint(_closing(opaque)), fingerprint(_closing(opaque))
        assert not first.lasting
        assert first != second
        assert not fingerprint(1, first).lasting  # nor what is made of it


def threading_lock() -> Any:
    """Return an object of C."""
    import threading

    return threading.Lock()


def test_functions_that_refer_to_each_other_have_a_digest() -> None:
    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n != 0 and even(n - 1)

    assert fingerprint(even) != fingerprint(odd)
    assert fingerprint(even) == fingerprint(even)


# ---------------------------------------------------------------------- kernels

FACTOR = 2.0


def _definition(name: str = "times") -> Activation:
    def define(real: Any, m: Any) -> Any:
        factor = real(FACTOR)
        return (lambda z: factor * z), (lambda z, h: factor)

    return Activation(name, define, needs="h")


def test_a_global_that_changes_in_a_process_makes_another_kernel(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = _definition()
    for factor in (2.0, 3.0, 2.0):
        monkeypatch.setattr(sys.modules[__name__], "FACTOR", factor)
        z, b = backend.asarray(np.ones((2, 3), np.float32)), backend.asarray(np.ones(3, np.float32))
        assert (backend.to_numpy(backend.bias_activation_forward(z, b, entry, out=z)) == 2 * factor).all()


@numba.njit  # type: ignore[untyped-decorator]
def times_factor(x: float) -> float:
    """Return a multiple, by a helper that Numba compiles by itself, and keeps."""
    return x * FACTOR


def test_a_global_of_a_compiled_helper_is_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Activation("times", lambda real, m: ((lambda z: times_factor(z)), (lambda z, h: z)), needs="z")
    assert times_factor(1.0) == 2.0
    for factor in (3.0, 4.0):
        monkeypatch.setattr(sys.modules[__name__], "FACTOR", factor)
        z = np.ones((1, 2))
        assert (gb.get_backend("cpu").bias_activation_forward(z, np.zeros(2), entry, out=z) == factor).all()


def test_the_same_kernel_is_kept_for_what_is_the_same() -> None:
    one, two = (cpu.compile_bias_activation_forward(_definition(), F32, True) for _ in range(2))
    assert one is two


def test_every_file_of_the_kernels_is_in_the_name_of_a_compiled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(Path(source.__file__).parent, folder)
    monkeypatch.setattr(source, "__file__", str(folder / "source.py"))
    digests = {source.source_digest.__wrapped__()}
    files = sorted(folder.rglob("*.py"))
    assert {"softmax.py", "cpu/loss.py", "cuda/storage.py"} <= {path.relative_to(folder).as_posix() for path in files}
    for number, path in enumerate(files):
        path.write_text(path.read_text(encoding="utf-8") + "# an edit\n", encoding="utf-8")
        digests.add(source.source_digest.__wrapped__())
        assert len(digests) == number + 2


@pytest.mark.parametrize("short", [False, True])
def test_the_log_softmax_is_in_the_name_of_a_kernel_that_uses_it(short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, entry = cpu_loss.compile_bias_loss.__wrapped__, gb.losses.LOSSES["softmax_cross_entropy"]  # type: ignore[attr-defined]
    before, again = (make(entry, F32, True, False, False, short).digest for _ in range(2))
    assert before == again

    def other(loss: Any, dtype: Any, m: Any, inlined: Any) -> Any:
        return define_log_softmax(loss, dtype, m, inlined)._replace(gradient=inlined(lambda g, p, total: g))

    monkeypatch.setattr(cpu_loss, "define_log_softmax", other)
    assert make(entry, F32, True, False, False, short).digest != before


class Halving(gb.SGD):
    """SGD at a part of its rate."""

    part: ClassVar[float] = 0.5

    def define(self, real: Any, m: Any) -> Any:
        part = self.part

        def constants(t: float, lr: float) -> tuple[float, float, float]:
            return part * lr, 0.0, 0.0

        def update(p: Any, g: Any, s0: Any, s1: Any, s2: Any, lr: Any, c1: Any, c2: Any) -> Any:
            return p - lr * g, s0, s1, s2

        return constants, update


gb.optimizers.OPTIMIZERS.pop("halving")  # known here alone


def test_a_class_attribute_of_an_optimizer_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = np.ones((4, 2), np.float32), np.array([0, 1, 1, 1])
    moved = []
    for part in (0.5, 0.25):
        monkeypatch.setattr(Halving, "part", part)
        model = gb.MLP([2, 2], device=device, seed=1)
        before = np.array(model.backend.to_numpy(model.parameters.flat))
        model.fit(X, y, epochs=1, batch_size=4, optimizer=Halving(0.5), progress=False)
        moved.append(model.backend.to_numpy(model.parameters.flat) - before)
    np.testing.assert_allclose(moved[0], 2 * moved[1], rtol=1e-5, atol=1e-7)


ACROSS = """
import sys
import numpy as np
import gpubackprop as gb
from gpubackprop.activations import Activation
import settings
settings.K = float(sys.argv[2])
def define(real, m):
    return (lambda z: z * real(settings.K)), (lambda z, h: real(settings.K))
backend = gb.get_backend(sys.argv[1])
z = backend.asarray(np.ones((1, 2), np.float32))
print(backend.to_numpy(backend.bias_activation_forward(z, 0 * z[0], Activation("times", define), out=z))[0, 0])
"""


def test_another_process_does_not_find_the_kernel_of_other_constants(device: str, tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text("K = 1.0\n")
    environment = os.environ | {"GPUBACKPROP_CACHE_DIR": str(tmp_path / "kernels")}
    for factor in ("2.0", "3.0"):
        command = [sys.executable, "-c", ACROSS, device, factor]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == factor


MADE = """
import math, os
import numpy as np
SLOPE = 2.0
def scale(x, by=1.0):
    return math.fabs(x) * by * np.pi
def numbers(real, m):
    slope = real(scale(SLOPE))
    return lambda z: slope * z
def imports(real, m):
    from user_settings import SLOPE
    slope = real(SLOPE)
    return lambda z: slope * z
def environment(real, m):
    slope = real(os.environ["SLOPE"])
    return lambda z: slope * z
def file(real, m):
    slope = real(np.fromfile("slope")[0])
    return lambda z: slope * z
def named(real, m):
    slope = real(globals()["SLO" + "PE"])
    return lambda z: slope * z
calls = 0
def counts(real, m):
    global calls
    calls = calls + 1
    slope = real(calls)
    return lambda z: slope * z
"""


@pytest.mark.parametrize("name", ["imports", "environment", "file", "named", "counts"])
def test_what_a_function_returns_is_not_watched_where_it_depends_on_more(name: str) -> None:
    module = types.ModuleType("user")
    exec(MADE, vars(module))
    function = getattr(module, name)
    assert not Watch(function, {}, results=True).holds_for(function)


@pytest.mark.parametrize(
    "edit",
    [
        lambda user: setattr(user, "SLOPE", 3.0),
        lambda user: setattr(user.scale, "__defaults__", (2.0,)),
        lambda user: setattr(user.scale, "__code__", (lambda x, by=1.0: x).__code__),
        lambda user: setattr(user.scale, "__kwdefaults__", {"by": 1.0}),
        lambda user: setattr(user.numbers, "__code__", (lambda real, m: None).__code__),
        lambda user: setattr(user, "scale", float),
        lambda user: setattr(user, "np", user.math),
    ],
)
def test_what_a_function_returns_is_watched(edit: Callable[[Any], None]) -> None:
    module = types.ModuleType("user")
    exec(MADE, vars(module))
    watch = Watch(module.numbers, {}, results=True)
    assert watch.holds_for(module.numbers)
    edit(module)
    assert not watch.holds_for(module.numbers)


def test_a_definition_is_made_anew_only_where_something_it_reads_has_changed() -> None:
    module = types.ModuleType("user")
    exec(MADE, vars(module))
    kernel = per_definition(lambda dtype: NUMPY)(lambda definition, dtype: definition.scalars(dtype, NUMPY)(1.0))
    definition = Definition("user", module.numbers)
    f64 = np.dtype(np.float64)
    made = [kernel(definition, f64) for _ in range(3)]
    module.SLOPE = 3.0  # type: ignore[attr-defined]
    made += [kernel(definition, f64) for _ in range(2)]
    assert made == [2 * np.pi] * 3 + [3 * np.pi] * 2
