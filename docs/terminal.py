"""Draw ``docs/terminal.svg``: the first code of README.md and what it prints, as a terminal."""

import io
import re
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.terminal_theme import MONOKAI

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"


def picture(readme: str) -> str:
    """Return the picture, made of the text's first block of Python and the block after it."""
    found = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, re.DOTALL)
    assert found, "README.md begins with a program and its output"
    code, output = found.groups()
    width = max(map(len, (code + output).splitlines()))
    console = Console(record=True, width=width, file=io.StringIO(), highlight=False)
    console.print(Syntax(code, "python", theme="monokai", background_color="default"))
    console.print(output, end="", markup=False)
    drawn = console.export_svg(title="python", theme=MONOKAI, unique_id="terminal")
    return re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # no fonts from the network


if __name__ == "__main__":
    (DOCS / "terminal.svg").write_text(picture(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {DOCS / 'terminal.svg'}")
