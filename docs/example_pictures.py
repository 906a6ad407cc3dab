"""The pictures of the examples: sphinx-gallery takes those that a part of an example has written."""

import shutil
from pathlib import Path
from typing import Any

from sphinx_gallery.scrapers import figure_rst


def take(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Move the pictures to where the pages expect them, and return the text that shows them."""
    taken = []
    found = sorted(Path(block_vars["src_file"]).parent.glob("*.png"))
    for path, place in zip(found, block_vars["image_path_iterator"], strict=False):
        shutil.move(path, place)
        taken.append(place)
    return str(figure_rst(taken, gallery_conf["src_dir"]))
