"""The README's numbers are the records'."""

import json
from pathlib import Path

import numpy as np

from experiments import benchmark_sweep, permuted_mnist, split_cifar, sweep
from experiments.record import table
from experiments.split_mnist import TITLES
from si_jax.metrics import average_accuracy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def record(name):
    return json.loads((ROOT / f"experiments/results/{name}.json").read_text())


def test_numbers_are_the_records():
    runs = record("split_mnist")["runs"]
    assert table(runs, "test", TITLES) in README
    assert table(runs, "train", TITLES) in README
    assert f"in {sum(run['seconds'] for run in runs.values()):.0f} s on" in README

    kept = record("split_mnist_keep_count")
    assert kept["config"] == record("split_mnist")["config"] | {"keep_count": True}
    with_si, without = (
        kept["summary"][method]["train"]["average_accuracy"]
        for method in ("si c=1", "fine-tuning")
    )
    assert f"[{with_si['mean']:.4f} ± {with_si['sem']:.4f}]" in README
    assert f"with SI and {without['mean']:.4f} ± {without['sem']:.4f}" in README
    assert abs(with_si["mean"] - 0.989) < 0.005, "the authors' figure"

    few = record("split_mnist_mnist5k")["summary"]
    sgd, si = (few[k]["test"]["average_accuracy"]["mean"] for k in ("sgd", "si c=1"))
    assert f"it ends above SI:\n[{sgd:.3f} and {si:.3f}]" in README
    assert sgd > si

    grid = record("sweep")
    accuracy = average_accuracy(np.array(grid["runs"]["grid"]["test"]))
    config = sweep.Config()
    shape = (config.seeds, len(config.strengths), len(config.dampings))
    assert sweep.grid_table(accuracy.reshape(shape).mean(0), config) in README
    (choice,) = set(grid["summary"]) - {"grid"}
    fresh = grid["summary"][choice]["test"]["average_accuracy"]
    assert f"{fresh['mean']:.4f} ± {fresh['sem']:.4f}" in README

    assert benchmark_sweep.table(record("benchmark_sweep")["seconds"]) in README
    full = record("benchmark_sweep_mnist")["seconds"]
    (theirs,), (ours,) = full["PyTorch"]["2"], full["one after another"]["2"]
    assert f"take {theirs / ours:.1f} times as long in PyTorch" in README


def test_permuted_mnist_record_shows_what_it_must():
    shown = record("permuted_mnist")
    assert shown["config"]["epochs"] == 20
    assert shown["config"]["data"] == "tfds"
    theirs = permuted_mnist.published(permuted_mnist.Config())
    assert permuted_mnist.table(shown["runs"], theirs) in README
    mean = {
        method: summary["test"]["average_accuracy"]["mean"]
        for method, summary in shown["summary"].items()
    }
    ours = mean["si c=0.1"]
    assert ours > 0.96
    assert 0.45 < mean["fine-tuning"] < 0.65
    assert mean["ewc c=10000"] >= 0.94
    assert mean["joint"] >= 0.98
    assert mean["sgd"] < mean["sgd+dropout"] < mean["ewc c=10000"] < ours
    assert ours < mean["joint"]


def test_split_cifar_records_show_what_they_must():
    docs = (ROOT / "docs/experiments.md").read_text()
    titles = split_cifar.titles(split_cifar.Config())
    theirs = split_cifar.published(split_cifar.Config())
    si, without = {}, {}
    fresh, kept = (record(f"split_cifar{reset}") for reset in ("", "_keep_count"))
    assert kept["config"] == fresh["config"] | {"keep_count": True}
    for name, shown, text in (("fresh", fresh, docs), ("kept", kept, README)):
        assert shown["config"]["epochs"] == 60
        assert shown["config"]["examples"] == 0
        assert split_cifar.table(shown["runs"], "test", titles, theirs) in text
        si[name], without[name] = (
            shown["summary"][method]["test"]["average_accuracy"]["mean"]
            for method in ("si c=0.01", "fine-tuning")
        )
        assert abs(si[name] - 0.735) < 0.015, "the authors' data"
    assert without["fresh"] < si["fresh"] - 0.02
    assert abs(without["kept"] - 0.625) < 0.02, "the authors' data"
    ours, plain = (
        split_cifar.final(kept["runs"][method], method, "test")[0]
        for method in ("si c=0.01", "fine-tuning")
    )
    assert (ours[:-1] > plain[:-1]).all(), "no old task lost by it"
    assert (
        f"forgets less: {without['fresh']:.3f}, and SI has {si['fresh']:.3f}" in README
    )


def test_split_mnist_record_shows_what_it_must():
    shown = record("split_mnist")
    assert all(len(run["test"]) == 10 for run in shown["runs"].values())
    assert shown["config"]["data"] == "tfds"
    for split in ("test", "train"):
        mean = {
            method: summary[split]["average_accuracy"]["mean"]
            for method, summary in shown["summary"].items()
        }
        assert mean["si c=1"] >= 0.98
        assert 0.75 <= mean["fine-tuning"] <= 0.90
