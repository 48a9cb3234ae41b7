"""The README's code runs and prints what it says; its numbers are the records'."""

import contextlib
import io
import json
import re
from pathlib import Path

import jax
import pytest

from experiments.record import table
from experiments.split_mnist import TITLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_prints_what_it_says(code):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "README.md", "exec"), {})
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert printed.getvalue().splitlines() == expected


def test_split_mnist_table_is_the_record():
    runs = json.loads((ROOT / "experiments/results/split_mnist.json").read_text())[
        "runs"
    ]
    assert table(runs, "test", TITLES) in README


def test_split_mnist_record_shows_what_it_must():
    record = json.loads((ROOT / "experiments/results/split_mnist.json").read_text())
    assert record["config"]["seeds"] == 10
    assert record["config"]["data"] == "tfds"
    for split in ("test", "train"):
        mean = {
            method: summary[split]["average_accuracy"]["mean"]
            for method, summary in record["summary"].items()
        }
        assert mean["si c=1"] >= 0.98
        assert 0.75 <= mean["fine-tuning"] <= 0.90


def test_links_lead_somewhere():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (ROOT / target).exists(), target
