"""Make the notebook of the introduction: ``python docs/notebook.py``.

``learn.md`` is the source, ``learn.ipynb`` the same text and code in cells; it needs no
file beside it. A test holds the two in step.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
INSTALL = """\
try:
    import si_jax
except ImportError:
    %pip install -q si_jax
"""


def notebook(page: Path) -> str:
    """Turn a page into a notebook: Python blocks into code cells, the rest into text.

    Args:
      page: Markdown with images. A line that names a notebook leads to this one, and is
        left out of it.

    Returns:
      JSON in nbformat 4.4, the images inside, no outputs.
    """

    def embed(image: re.Match[str]) -> str:
        content = base64.b64encode((page.parent / image["path"]).read_bytes()).decode()
        return f"![{image['alt']}](data:image/png;base64,{content})"

    text = re.sub(r"(?m)^.*\.ipynb.*\n\n", "", page.read_text())
    text = re.sub(r"!\[(?P<alt>.*)\]\((?P<path>.+\.png)\)", embed, text)
    prose, *rest = re.split(r"(?ms)^```python\n(.*?)^```\n", text)
    cells = [_code(INSTALL), _text(prose)]
    for code, prose in zip(rest[::2], rest[1::2], strict=True):
        cells += [_code(code), _text(prose)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    found = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    return json.dumps(found, ensure_ascii=False, indent=1) + "\n"


def _text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": _lines(source)}


def _code(source: str) -> dict[str, Any]:
    empty = {"execution_count": None, "metadata": {}, "outputs": []}
    return {"cell_type": "code", **empty, "source": _lines(source)}


def _lines(source: str) -> list[str]:
    return source.strip("\n").splitlines(keepends=True)


if __name__ == "__main__":
    (DOCS / "learn.ipynb").write_text(notebook(DOCS / "learn.md"))
