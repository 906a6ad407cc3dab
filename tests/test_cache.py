"""The cache on disk: whole, ours, closed to others, and never needed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from gpubackprop.inspect.info import info
from gpubackprop.machine import cache

posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are those of POSIX")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for entries, about which nothing was said yet."""
    path = tmp_path / "kernels"
    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(path))
    monkeypatch.setattr(cache, "_said", set())
    return path


def test_entries_are_written_whole_and_read_back(folder: Path) -> None:
    assert cache.read("entry") is None
    cache.write("entry", b"one")
    cache.write("entry", b"two")
    cache.write("empty", b"")
    assert (cache.read("entry"), cache.read("empty")) == (b"two", b"")
    assert sorted(p.name for p in folder.iterdir()) == ["empty", "entry"]


def test_an_entry_under_the_name_of_another_is_not_used(folder: Path) -> None:
    cache.write("one", b"content")
    (folder / "one").rename(folder / "two")
    assert cache.read("two") is None


def test_a_failed_write_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("entry", b"one")

    def full(self: Path, target: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cache.write("entry", b"two")
    assert cache.read("entry") == b"one"
    assert [p.name for p in folder.iterdir()] == ["entry"]


@posix
def test_the_folder_is_closed_to_others_whatever_the_umask(folder: Path) -> None:
    old = os.umask(0)
    try:
        cache.write("cpu/entry", b"content")
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((folder / "cpu").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "cpu" / "entry").stat().st_mode) == 0o600
    assert cache.read("cpu/entry") == b"content"


@posix
@pytest.mark.parametrize("where", [".", "cpu", ".."])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_in_is_not_used_and_said_once(where: str, mode: int, folder: Path) -> None:
    cache.write("cpu/entry", b"content")
    place = (folder / where).resolve()
    place.chmod(mode)
    try:
        with pytest.warns(RuntimeWarning, match=f"chmod go-w {place}$"):
            assert cache.read("cpu/entry") is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.write("cpu/entry", b"other")
        if where != "cpu":
            assert str(place) in info()["kernel cache"]
    finally:
        place.chmod(0o700)
    assert cache.read("cpu/entry") == b"content"


@posix
def test_a_file_that_others_can_write_is_not_used_but_replaced(folder: Path) -> None:
    cache.write("entry", b"one")
    (folder / "entry").chmod(0o666)
    assert cache.read("entry") is None
    cache.write("entry", b"two")
    assert cache.read("entry") == b"two"


@posix
def test_a_folder_or_a_file_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("entry", b"one")
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="belongs to another user; set GPUBACKPROP_CACHE_DIR"):
        assert cache.read("entry") is None
    monkeypatch.setattr(cache, "cache_problem", lambda part: None)  # the file alone
    assert cache.read("entry") is None


@posix
def test_a_link_to_a_folder_is_followed_and_judged_by_where_it_leads(folder: Path, tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    (open_to_all / "kernels").mkdir(parents=True)
    folder.symlink_to(open_to_all / "kernels")
    cache.write("entry", b"one")
    assert cache.read("entry") == b"one"
    open_to_all.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=f"chmod go-w {open_to_all}"):
        assert cache.read("entry") is None
    open_to_all.chmod(0o1777)  # sticky, as /tmp is
    assert cache.read("entry") == b"one"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder_is_no_error(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o500)
    cache.write("entry", b"content")
    assert cache.read("entry") is None


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUBACKPROP_CACHE_DIR", raising=False)
    assert "gpubackprop" in str(cache.cache_folder())


@posix
def test_without_a_home_there_is_no_cache(tmp_path: Path) -> None:
    """A user of a container: no HOME, and no entry in the password file."""
    code = """
import os, pwd
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
from gpubackprop.machine import cache
cache.write("entry", b"content")
print(cache.cache_folder(), cache.read("entry"), cache.cache_problem(), os.listdir("."))
"""
    names = {"HOME", "XDG_CACHE_HOME", "GPUBACKPROP_CACHE_DIR"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    problem = "there is no home folder; set GPUBACKPROP_CACHE_DIR to keep compiled kernels"
    assert done.stdout == f"None None {problem}; run: export GPUBACKPROP_CACHE_DIR=$(mktemp -d) []\n"


# ---------------------------------------------------------------------- many processes

COLLIDE = """
import sys
import numpy as np
from gpubackprop.kernels.cpu.compile import compiled, helper

def define(factor):
    namespace = {"factor": factor, "__name__": "user"}
    exec("def function(x):\\n    for _ in range(3):\\n        x = x * factor + x * x\\n    return x", namespace)
    function = helper(namespace["function"])
    def kernel(x, thread, threads):
        for i in range(x.size):
            x[i] = function(function(x[i]))
    return compiled(kernel)

for text in sys.argv[1:]:
    kernel, x = define(float(text)), np.array([0.25])
    y = x[0]
    for _ in range(6):
        y = y * float(text) + y * y
    kernel(x)
    print(bool(kernel.from_disk), x[0] == y)
"""


def test_kernels_that_other_processes_have_filed_are_told_apart(tmp_path: Path) -> None:
    """What one process calls "function" number 1 is other code in another; the number of Numba's names counts per process."""

    def run(*factors: float) -> list[str]:
        command = [sys.executable, "-c", COLLIDE, *map(str, factors)]
        environment = os.environ | {"GPUBACKPROP_CACHE_DIR": str(tmp_path / "kernels")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert run(0.5) == run(0.75) == ["False True"]
    assert run(0.5, 0.75) == ["True True"] * 2


MIXED = """
import sys
import numpy as np
import gpubackprop as gb
backend, rng = gb.get_backend("cpu"), np.random.default_rng(0)
for work in sys.argv[1:]:
    dtype, activation = work.split(":")
    if activation == "product":
        for _ in range(50):
            m, k, n = rng.integers(1, 70, 3)
            a, b = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(k, n)).astype(dtype)
            assert np.allclose(backend.matmul(a, b), a @ b, rtol=1e-4, atol=1e-4), work
    else:
        X, y, got = np.linspace(-1, 1, 60).reshape(20, 3), np.arange(20) % 2, []
        for device in ("cpu", "reference"):
            model = gb.MLP([3, 5, 2], activation=activation, dtype=dtype, device=device)
            model.fit(X, y, epochs=2, batch_size=10, optimizer=gb.Adam(0.1), progress=False)
            got.append(model.predict_proba(X))
        assert np.allclose(*got, rtol=1e-3, atol=1e-3), work
print("right")
"""


@pytest.mark.slow
def test_a_cache_that_many_processes_have_filled_is_right(tmp_path: Path) -> None:
    work = [f"{dtype}:{what}" for dtype in ("float32", "float64") for what in ("product", "tanh", "gelu")]
    environment = os.environ | {"GPUBACKPROP_CACHE_DIR": str(tmp_path / "kernels")}

    def start(*names: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MIXED, *names]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    fillers = [start(*work[k::3]) for k in range(3)]  # at the same time, each with another part, in its own order
    for process in (*fillers, start(*reversed(work)), start(*work)):
        output, errors = process.communicate(timeout=1200)
        assert (process.returncode, output) == (0, "right\n"), errors
