"""What is to be cited is this version, and the paper that the README names."""

import re
from pathlib import Path

import si_jax

ROOT = Path(__file__).parent.parent


def test_the_citation_agrees_with_the_package_and_the_readme():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {si_jax.__version__}\n" in citation
    (title,) = re.findall(r"\btitle *= *{(.+)}", (ROOT / "README.md").read_text())
    assert f"\n  title: {title}\n" in citation
