"""Make the notebook of the introduction: ``python docs/notebook.py``.

``learn.md`` is the source, ``learn.ipynb`` the same text and code in cells; it needs no
file beside it. A test holds the two in step.
"""

import base64
import re
from pathlib import Path

import jupytext
from nbformat.v4 import new_code_cell, new_notebook

DOCS = Path(__file__).parent
INSTALL = """\
try:
    import si_jax
except ImportError:  # before the first release, install it from a checkout
    %pip install -q si_jax"""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(page: Path) -> str:
    """Turn a page into a notebook: Python blocks into code cells, the rest into text.

    Args:
      page: Markdown with images. A paragraph that names a notebook leads to this one,
        and is left out of it.

    Returns:
      JSON in nbformat 4.4, the images inside, no outputs.
    """

    def embed(image: re.Match[str]) -> str:
        content = base64.b64encode((page.parent / image["path"]).read_bytes()).decode()
        return f"![{image['alt']}](data:image/png;base64,{content})"

    text = re.sub(r"(?m)^.*\.ipynb.*\n(.+\n)*\n", "", page.read_text())
    text = re.sub(r"!\[(?P<alt>.*)\]\((?P<path>.+\.png)\)", embed, text)
    cells = [new_code_cell(INSTALL), *jupytext.reads(text, fmt="md").cells]
    for cell in cells:
        del cell["id"]  # they are random; nbformat 4.4 has none
    made = new_notebook(
        cells=cells,
        metadata={"kernelspec": KERNEL, "language_info": {"name": "python"}},
        nbformat_minor=4,
    )
    return jupytext.writes(made, fmt="ipynb") + "\n"


if __name__ == "__main__":
    (DOCS / "learn.ipynb").write_text(notebook(DOCS / "learn.md"))
