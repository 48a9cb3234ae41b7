"""The guide's tables have what .ci/trainers runs, which takes a network and minutes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/guides/trainers.md").read_text()
FILES = [x for x in (ROOT / "trainers").glob("*.py") if x.stem != "account"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_guide_has_each_trainer_as_it_is_pinned(file):
    pin = re.match(r"# pip install ([\w-]+)==(\S+)", file.read_text())
    package, version = pin.groups()
    assert f"](../../trainers/{file.name})" in PAGE
    rows = re.findall(rf"^\| {package}\b.*$", PAGE, re.MULTILINE)
    reported = re.findall(r'^report\("([\w-]+)"', file.read_text(), re.MULTILINE)
    assert len(rows) == len(reported) >= 1
    assert set(reported) == {package}
    for row in rows:
        cells = row.strip("| ").split(" | ")
        assert cells[1] == version
        assert float(cells[4]) < 1e-5, "the error of ω"
        assert float(cells[5]) < 0.7 * float(cells[6]), "forgotten"
        assert cells[-1] == "ok"
