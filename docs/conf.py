"""Sphinx: how the documentation is built, by ``make docs``."""

import re
import sys
from pathlib import Path
from typing import Any

import gpubackprop
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.inspect.explain import explain
from gpubackprop.losses import LOSSES

HERE = Path(__file__).parent
MADE = HERE / "_made"  # texts that are made at each build, and whole pages

sys.path.insert(0, str(HERE))  # for example_pictures.py

project = "gpubackprop"
release = version = gpubackprop.__version__
html_title = f"gpubackprop {release}"

extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery",
]  # fmt: skip
exclude_patterns = ["_made", "examples"]
suppress_warnings = ["ref.python"]  # a class has two names, where it is defined and where users import it from
nitpicky = True  # a reference that leads nowhere is a warning, and make docs makes it an error
# Python's own exceptions, and what docstrings call their parameters' types
nitpick_ignore_regex = [("py:exc", r"[A-Z]\w*(Error|Interrupt)")]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_extra_path = ["_made/pages"]
html_show_sphinx = html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "none"  # the docstrings have them, with shapes
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "no-value": True}
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style"), "Shapes"]


sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "image_scrapers": ("example_pictures.take",),
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 1e9,  # times of this machine say nothing to a reader
    "capture_repr": (),
    "abort_on_example_error": True,
    "reset_modules": (),
}


def whole_sentence(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Begin with an empty comment, so that napoleon takes no words before a colon for the type of an attribute."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def escaped(text: str, signs: str) -> str:
    """Return a text of a docstring in which some characters outside of literals are not markup."""
    parts = re.split("(``.*?``)", text)
    return "".join(part if part.startswith("``") else re.sub(f"([{signs}])", r"\\\1", part) for part in parts)


def plain_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape |, which is the sign of an absolute value in the docstrings."""
    lines[:] = [escaped(line, "|") for line in lines]


def entries(registry: Any) -> str:
    """Return the entries of a registry with their docstrings, as a list of definitions."""
    lines = []
    for name, entry in registry.items():
        aliases = ", ".join(f"``{alias}``" for alias, of in registry.aliases.items() if of == name)
        text = escaped(" ".join(entry.define.__doc__.split()), "|*_")
        lines += [f"``{name}``", f"    {text}" + (f" Also {aliases}." if aliases else ""), ""]
    return "\n".join(lines)


def setup(app: Any) -> None:
    """Write the pages that the package itself makes."""
    app.connect("autodoc-process-docstring", whole_sentence, priority=400)  # before napoleon's 500
    app.connect("autodoc-process-docstring", plain_bars)
    (MADE / "pages").mkdir(parents=True, exist_ok=True)
    (MADE / "activations.rst").write_text(entries(ACTIVATIONS), encoding="utf-8")
    (MADE / "losses.rst").write_text(entries(LOSSES), encoding="utf-8")
    report = explain([2, 2, 1], loss="mean_squared_error", activation="tanh")
    (MADE / "pages" / "explain.html").write_text(report.html(values=True), encoding="utf-8")
