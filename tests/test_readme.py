"""The README's numbers are the records' and the authors'."""

import json
from pathlib import Path

import numpy as np

from experiments import permuted_mnist, split_cifar
from experiments.engine.measures import count
from experiments.engine.run import with_fields
from experiments.engine.tables import cell
from si_jax.metrics import average_accuracy

ROOT = Path(__file__).parent.parent
README = " ".join((ROOT / "README.md").read_text().split())
SPLIT_MNIST = "[Split MNIST](docs/experiments.md#split-mnist-fig-3), 5 tasks"
PERMUTED = "[Permuted MNIST](docs/experiments.md#permuted-mnist-figs-4-and-5), 10 tasks"
CIFAR = "[Split CIFAR-10/100](docs/experiments.md#split-cifar-10100-fig-6), 6 tasks"


def record(name):
    content = json.loads((ROOT / f"experiments/results/{name}.json").read_text())
    return content | {"runs": with_fields(content.get("runs", {}))}


def averages(name, split="test"):
    """By method ``(seeds,)``: accuracy averaged over the tasks, after all of them."""
    return {
        method: split_cifar.final(run, split).mean(1)
        if method == "from scratch"
        else np.asarray(average_accuracy(run[split]))
        for method, run in record(name)["runs"].items()
    }


def row(*cells):
    return " ".join(" ".join(f"| {x}" for x in (*cells, "")).split())


def ours(title, name, si):
    """A record's row of the table: SI, without, joint or from scratch, n."""
    found, runs = averages(name), record(name)["runs"]
    others = [method for method in ("joint", "from scratch") if method in found]
    shown = (si, "fine-tuning", *others)
    seeds = sorted({count(runs[method]) for method in shown})
    return row(
        title,
        cell(found[si]),
        cell(found["fine-tuning"]),
        ", ".join(f"{cell(found[method])} ({method})" for method in others),
        "–".join(map(str, seeds)),
    )


def test_the_table_is_the_records():
    permuted = permuted_mnist.published(permuted_mnist.Config())
    cifar = {
        method: f"{np.mean(values):.3f}"
        for method, values in split_cifar.published(split_cifar.Config()).items()
    }
    theirs, scratch = "*the authors*", f"{cifar['from scratch']} (from scratch)"
    rows = [
        ours(SPLIT_MNIST, "split_mnist_keep_count", "si c=1"),
        row(theirs, "0.989", "", "", 10),  # read off Fig. 3
        ours(PERMUTED, "permuted_mnist", "si c=0.1"),
        row(theirs, permuted["si c=0.1"][-1], permuted["fine-tuning"][-1], "", 1),
        ours(CIFAR, "split_cifar_keep_count", "si c=0.01"),
        row(theirs, cifar["si c=0.01"], cifar["fine-tuning"], scratch, 5),
    ]
    assert " ".join(rows) in README


def test_the_notes_are_the_records():
    fresh, kept = {}, {}
    for name in ("split_mnist", "split_cifar"):
        fresh[name], kept[name] = averages(name), averages(f"{name}_keep_count")
        other = record(f"{name}_keep_count")["config"]
        same = {k: v for k, v in other.items() if k == "micro_batch"}  # batches' cuts
        assert other == record(name)["config"] | {"keep_count": True} | same

    with_si, without = (
        cell(fresh["split_mnist"][method]) for method in ("si c=1", "fine-tuning")
    )
    assert f"ends at {with_si} with SI and at {without} without" in README
    leads = {}
    for reset, found in (("fresh", fresh), ("kept", kept)):
        si, plain = (found["split_cifar"][x] for x in ("si c=0.01", "fine-tuning"))
        leads[reset] = (si - plain).mean()
        if reset == "fresh":
            assert len(si) == len(plain) == 3
            shown = f"CIFAR at {cell(si)} and {cell(plain)}: there most of"
            assert shown in README
    assert leads["fresh"] < leads["kept"] / 2

    on_training_set = averages("split_mnist_keep_count", "train")["si c=1"]
    assert f"read off Fig. 3, where ours is {cell(on_training_set)}." in README

    permuted = averages("permuted_mnist")
    ewc, si = (permuted[method] for method in ("ewc c=1e+06", "si c=0.1"))
    assert f"EWC, its c chosen as SI's, ends higher, at {cell(ewc)}." in README
    assert len(ewc) == len(si) == 5
    assert ewc.min() > si.max()
    few = averages("split_mnist_mnist5k")
    sgd, si = (few[method].mean() for method in ("sgd", "si c=1"))
    assert f"above Adam with SI: it reaches {sgd:.3f}, SI {si:.3f}." in README
    assert sgd > si
    small = {k: x.mean() for k, x in averages("split_cifar_quick_keep_count").items()}
    scratch, si = small["from scratch"], max(small["si c=0.1"], small["si c=0.01"])
    assert f"can be better: {scratch:.3f}, and {si:.3f} with SI." in README
    assert scratch > si
