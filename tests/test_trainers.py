"""The guide's tables have what .ci/trainers runs, which takes a network and minutes."""

import json
import re
from pathlib import Path

import numpy as np
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


def test_guide_has_the_record_of_meal():
    record = json.loads((ROOT / "trainers/benchmark/meal.json").read_text())
    assert len(record["summary"]) == 8
    for arm, found in record["summary"].items():
        method, _, strength = arm.partition(" c=")
        curves = [
            run["curves"]  # [task, evaluation]
            for run in record["runs"]
            if run["method"] == method and strength in ("", f"{run['strength'] or 0:g}")
        ]
        last = np.mean([[curve[-1] for curve in tasks] for tasks in curves], axis=1)
        expected = [last.mean(), np.std(last, ddof=1) / len(last) ** 0.5, len(last)]
        np.testing.assert_allclose(found["average performance"], expected)
        cells = [
            f"{mean:.2f} ± {error:.2f}" + (f" (n = {n})" if n < len(last) else "")
            for mean, error, n in found.values()
        ]
        assert f" | {' | '.join(cells)} |" in PAGE, arm
