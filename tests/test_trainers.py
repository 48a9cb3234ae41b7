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


def fracast(name):
    return json.loads((ROOT / "trainers/benchmark/fracast.json").read_text())[name]


def growth(points, end, fraction):
    """Of the old loss, along a path of many small steps, where enough is learned."""
    new = [x["choice"][1] for x in points]
    level = new[0] - fraction * (new[0] - end)
    fine = np.linspace(0, len(new) - 1, 20_000 * (len(new) - 1) + 1)
    reached = np.interp(fine, range(len(new)), new) <= level
    old = np.interp(fine, range(len(new)), [x["test"][0] for x in points])
    return old[reached.argmax()] - old[0] if reached.any() else np.nan


def test_guide_has_the_record_of_fracast():
    page = (ROOT / "docs/guides/pretrained.md").read_text()
    runs = list(fracast("runs").values())
    assert len(runs) == 3
    for family, found in fracast("summary").items():
        values = {}
        for run in runs:
            start, *_, end = run["early stopping"]
            points = {"pretrained": [start], "fine-tuning": [end], **run}[family]
            best = min(points, key=lambda x: x["choice"][0] + x["choice"][1])
            row = dict(zip(("old", "new"), best["test"], strict=True))
            if family in run:
                for part in (0.5, 0.75, 0.9):
                    row[f"{part:.0%}"] = growth(points, end["choice"][1], part)
            for name, value in row.items():
                values.setdefault(name, []).append(value)
        assert set(found) == set(values)
        for name, of_seeds in values.items():
            expected = np.mean(of_seeds), np.std(of_seeds, ddof=1) / len(runs) ** 0.5
            np.testing.assert_allclose(found[name], [*expected, len(runs)], atol=1e-3)
        cells = [
            "{:.2f} ± {:.2f}".format(*found[name]) if name in found else ""
            for name in ("50%", "75%", "90%", "old", "new")
        ]
        assert f"| {family} | {' | '.join(cells)} |" in page
