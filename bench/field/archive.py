"""The file of a report: always complete, and without personal data."""

from __future__ import annotations

import getpass
import io
import json
import platform
import re
import zipfile
from contextlib import suppress
from pathlib import Path

from gpubackprop.machine.files import write_whole

LEFT_OUT = (".html",)  # can be recreated from the rest: gpubackprop bench show --html


def pack(folder: Path, file: Path) -> None:
    """Write everything in a folder into a zip file, replacing an existing one."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in LEFT_OUT):
            name = f"{file.stem}/{path.relative_to(folder).as_posix()}"
            archive.writestr(name, impersonal(path.read_text(encoding="utf-8", errors="replace")))
    write_whole(file, content.getvalue())


def impersonal(text: str) -> str:
    """Return a text with ~ for the home folder, and without the names of user and host."""
    with suppress(RuntimeError, OSError):
        for home in (str(Path.home()), str(Path.home().resolve())):
            if len(home) > 1:
                for written in (home, json.dumps(home)[1:-1]):  # backslashes are doubled in JSON
                    text = re.sub(re.escape(written) + r"(?![\w-])", "~", text)
    text = re.sub(r"/(home|Users)/[\w.-]+", r"/\1/user", text)
    with suppress(KeyError, OSError, ImportError):  # the user has no name
        user = getpass.getuser()
        if user != "root":
            text = re.sub(rf"(?<=[/\\-]){re.escape(user)}(?![\w-])", "user", text)
    if host := platform.node():
        text = re.sub(rf'("host": )"{re.escape(host)}"', r'\1"host"', text)
        text = re.sub(rf"^{re.escape(host)}: ", "host: ", text, flags=re.MULTILINE)
    return text
