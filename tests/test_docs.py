"""The documentation's code prints what it says; its tables are the records'."""

import ast
import contextlib
import dataclasses
import io
import itertools
import json
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import (
    importance,
    permuted_mnist,
    split_cifar,
    split_mnist,
    sweep,
)
from experiments.benchmark import findings as benchmark
from experiments.benchmark import runs as benchmark_runs
from experiments.engine import command
from experiments.engine.choice import choose
from experiments.engine.record import Record
from experiments.engine.run import with_fields
from experiments.engine.tables import table
from experiments.finetune import config as finetune_config
from experiments.finetune import findings as finetune
from experiments.finetune import texts as finetune_texts
from experiments.finetune.methods import third as of_third
from experiments.scenarios import config as scenarios_config
from experiments.scenarios import findings as scenarios
from experiments.scenarios.config import SCENARIOS
from experiments.why import config as why_config
from experiments.why import findings as why
from experiments.why.config import CORRELATED
from si_jax.metrics import (
    average_accuracy,
    average_accuracy_so_far,
    forgetting,
    standard_error,
)

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for folder in (".", "docs", "docs/guides")
    for page in ROOT.glob(f"{folder}/*.md")
]
NOTEBOOK = (ROOT / "docs/learn.ipynb").read_text()
CELLS = "\n".join(
    "".join(cell["source"])
    for cell in json.loads(NOTEBOOK)["cells"]
    if cell["cell_type"] == "code"
)
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{i}")
    for page in PAGES
    if page.stem != "learn"  # the notebook's cells are its code
    for i, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    )
]
# All cells share their names; what is here already must not be installed.
EXAMPLES.append(pytest.param(CELLS.replace("%pip", "raise #"), id="notebook"))


@pytest.mark.parametrize("code", EXAMPLES)
def test_code_prints_what_it_says(code):
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        exec(compile(code, "example", "exec"), {})
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert printed.getvalue().splitlines() == expected


def test_the_notebook_is_made_of_the_page():
    notebook = runpy.run_path(str(ROOT / "docs/notebook.py"))["notebook"]
    made = notebook(ROOT / "docs/learn.md")
    assert made == NOTEBOOK, "python docs/notebook.py makes it anew"


def record(name):
    content = json.loads((ROOT / f"experiments/results/{name}.json").read_text())
    return content | {"runs": with_fields(content.get("runs", {}))}


def test_numbers_are_the_records():
    text = (ROOT / "docs/theory.md").read_text()
    assert importance.table(record("importance")["runs"]) in text
    text = (ROOT / "docs/experiments.md").read_text()
    assert benchmark.table(record("benchmark")["summary"]) in text
    quick = record("permuted_mnist_quick")["runs"]
    assert permuted_mnist.table(quick) in text
    seconds = sum(run["seconds"] for run in quick.values())
    assert f"takes {seconds:.0f} s on two" in text
    text = (ROOT / "docs/guides/precision.md").read_text()
    for name in ("permuted_mnist_quick", "permuted_mnist_quick_bfloat16"):
        found = record(name)["summary"]["si c=1"]["test"]["average_accuracy"]
        assert f"{found['mean']:.3f} ± {found['sem']:.3f}" in text
    accuracy, seconds = {}, {}
    for compute, name in (("float32", ""), ("bfloat16", "_bfloat16")):
        shown = record(f"split_cifar10_quick{name}")
        assert shown["config"]["compute"] == compute
        accuracy[compute] = shown["summary"]["si c=0.01"]["test"]["average_accuracy"]
        seconds[compute] = shown["runs"]["si c=0.01"]["seconds"]
    narrow, wide = (
        f"{accuracy[compute]['mean']:.3f} ± {accuracy[compute]['sem']:.3f}"
        for compute in ("bfloat16", "float32")
    )
    assert f"with SI is {narrow}, in float32 {wide}" in text
    assert (
        f"took {seconds['bfloat16']:.0f} s instead of {seconds['float32']:.0f} s"
        in text
    )


def test_split_mnist_is_the_records():
    text = (ROOT / "docs/experiments.md").read_text()
    shown = record("split_mnist")
    runs = shown["runs"]
    assert table(runs, "test", split_mnist.TITLES) in text
    assert table(runs, "train", split_mnist.TITLES) in text
    assert f"in {sum(run['seconds'] for run in runs.values()):.0f} s on" in text
    assert all(len(run["test"]) == 10 for run in runs.values())
    assert shown["config"]["data"] == "tfds"
    for split in ("test", "train"):
        mean = {
            method: summary[split]["average_accuracy"]["mean"]
            for method, summary in shown["summary"].items()
        }
        assert mean["si c=1"] >= 0.98
        assert 0.75 <= mean["fine-tuning"] <= 0.90

    kept = record("split_mnist_keep_count")
    assert kept["config"] == shown["config"] | {"keep_count": True}
    with_si, without = (
        kept["summary"][method]["train"]["average_accuracy"]
        for method in ("si c=1", "fine-tuning")
    )
    assert f"[{with_si['mean']:.4f} ± {with_si['sem']:.4f}]" in text
    assert f"with SI and {without['mean']:.4f} ± {without['sem']:.4f}" in text
    assert abs(with_si["mean"] - 0.989) < 0.005, "the authors' figure"

    few = record("split_mnist_mnist5k")["summary"]
    sgd, si = (few[k]["test"]["average_accuracy"]["mean"] for k in ("sgd", "si c=1"))
    assert f"it ends above SI:\n[{sgd:.3f} and {si:.3f}]" in text
    assert sgd > si


def test_sweeps_are_the_records():
    text = (ROOT / "docs/guides/hyperparameters.md").read_text()
    grid = record("sweep")
    accuracy = average_accuracy(np.array(grid["runs"]["grid"]["test"]))
    config = sweep.Config()
    shape = (config.seeds, len(config.strengths), len(config.dampings))
    assert sweep.grid_table(accuracy.reshape(shape).mean(0), config) in text
    (choice,) = set(grid["summary"]) - {"grid"}
    fresh = grid["summary"][choice]["test"]["average_accuracy"]
    assert f"{fresh['mean']:.4f} ± {fresh['sem']:.4f}" in text

    text = (ROOT / "docs/experiments.md").read_text()
    assert benchmark_runs.table(record("benchmark_sweep")["seconds"]) in text
    full = record("benchmark_sweep_mnist")["seconds"]
    (theirs,), (ours,) = full["PyTorch"]["2"], full["one after another"]["2"]
    assert f"take {theirs / ours:.1f} times as long in PyTorch" in text


def test_permuted_mnist_is_the_record():
    shown = record("permuted_mnist")
    assert shown["config"]["epochs"] == 20
    assert shown["config"]["data"] == "tfds"
    theirs = permuted_mnist.published(permuted_mnist.Config())
    text = (ROOT / "docs/experiments.md").read_text()
    assert permuted_mnist.table(shown["runs"], theirs) in text
    text = " ".join(text.split())
    mean = {
        method: summary["test"]["average_accuracy"]["mean"]
        for method, summary in shown["summary"].items()
    }
    seeds = average_accuracy(shown["runs"]["si c=0.1"]["test"])
    ours = np.mean(seeds)
    assert {len(run["test"]) for run in shown["runs"].values()} == {5}
    assert "mean ± SEM of five seeds; c = 0.1 is the paper's" in text
    assert abs(ours - theirs["si c=0.1"][-1]) < standard_error(seeds)
    so_far = average_accuracy_so_far(np.array(shown["runs"]["si c=0.1"]["test"]))
    furthest = np.abs(so_far.mean(0) - np.array(theirs["si c=0.1"])).max()
    assert f"one run and is nowhere more than {furthest:.4f} from it" in text
    assert 0.45 < mean["fine-tuning"] < 0.65
    matrices = np.array(shown["runs"]["fine-tuning"]["test"])
    without = np.array(average_accuracy_so_far(matrices))
    off = without.mean(axis=0) - theirs["fine-tuning"]
    spread = np.ptp(without, axis=0)
    assert (
        f"differ by up to {spread.max():.2f} (in the average after eight tasks)" in text
    )
    assert spread.argmax() + 1 == 8
    low, high = (of(without, axis=0) for of in (np.min, np.max))
    one = np.array(theirs["fine-tuning"])
    assert list(np.flatnonzero((one < low) | (one > high)) + 1) == [3, 8, 10]
    deviation = np.abs(off) / without.std(axis=0, ddof=1)
    assert (
        "lies outside of ours three times: below after three tasks "
        f"({off[2]:.3f} from our mean, {deviation[2]:.1f} of our standard deviations), "
        f"above after eight ({-off[7]:.3f}, {deviation[7]:.1f}) and ten "
        f"({-off[9]:.3f}, {deviation[9]:.1f})" in text
    )
    sgd = average_accuracy(shown["runs"]["sgd"]["test"])
    assert f"SGD's seeds end between {sgd.min():.2f} and {sgd.max():.2f}" in text
    assert mean["ewc c=10000"] >= 0.94
    assert mean["joint"] >= 0.98
    assert mean["sgd"] < mean["sgd+dropout"] < mean["ewc c=10000"] < ours
    assert ours < mean["joint"]
    ewc = average_accuracy(shown["runs"]["ewc c=1e+06"]["test"])
    assert len(ewc) == len(seeds) == 5
    assert (
        f"ends above it, on average by {np.mean(ewc) - ours:.3f}, with each of its "
        f"seeds by {ewc.min() - seeds.max():.3f} or more over the best of SI's" in text
    )
    assert mean["ewc c=1e+06"] < mean["joint"]
    firsts = {k: [x[0][0] for x in run["test"]] for k, run in shown["runs"].items()}
    same = [method for method, x in firsts.items() if x == firsts["single"]]
    assert same == ["si c=0.1", "fine-tuning", "ewc c=10000", "ewc c=1e+06", "single"]
    assert "seed for seed they have the same accuracy on the first task" in text
    seconds = [run["seconds"] for run in shown["runs"].values()]
    assert f"beside other runs: up to {max(seconds):.0f} s a method" in text


def after_all_tasks(shown, split):
    """``(seeds, tasks)`` by method of a record of split CIFAR."""
    return {k: split_cifar.final(x, split) for k, x in shown["runs"].items()}


def test_split_cifar_is_the_records():
    page = (ROOT / "docs/experiments.md").read_text()
    text = " ".join(page.split())
    titles = split_cifar.titles(split_cifar.Config())
    theirs = split_cifar.published(split_cifar.Config())
    si, without = {}, {}
    fresh, kept = (record(f"split_cifar{reset}") for reset in ("", "_keep_count"))
    difference = {"keep_count": True, "micro_batch": 32}
    assert kept["config"] == fresh["config"] | difference
    for name, shown in (("fresh", fresh), ("kept", kept)):
        assert shown["config"]["epochs"] == 60
        assert shown["config"]["examples"] == 0
        assert split_cifar.table(shown["runs"], "test", titles, theirs) in page
        assert {len(run["test"]) for run in shown["runs"].values()} == {3}
        si[name], without[name] = (
            shown["summary"][method]["test"]["average_accuracy"]["mean"]
            for method in ("si c=0.01", "fine-tuning")
        )
        assert abs(si[name] - 0.735) < 0.015, "the authors' data"
    assert without["fresh"] < si["fresh"] - 0.02
    assert abs(without["kept"] - 0.625) < 0.02, "the authors' data"
    sem = kept["summary"]["si c=0.01"]["test"]["average_accuracy"]["sem"]
    assert ("Ours with SI is within a SEM of theirs" in text) == (
        abs(si["kept"] - 0.735) < sem
    )
    after = {split: after_all_tasks(kept, split) for split in ("test", "train")}
    ours, stronger, plain, scratch = (
        after["test"][method]
        for method in ("si c=0.01", "si c=0.1", "fine-tuning", "from scratch")
    )
    authors = np.array(theirs["si c=0.1"])
    assert abs(stronger.mean() - authors.mean()) < stronger.mean(1).std(ddof=1)
    assert f"they have {authors.mean():.3f}, within our SD" in text
    first, *_, last = stronger.mean(0) - ours.mean(0)
    assert last < 0 < first, "kept, not learned"
    assert (ours.mean(0) > plain.mean(0))[:-1].all(), "no old task lost by it"
    # SD of the authors' five seeds, not corrected for their number.
    spread = {
        "si c=0.01": [0.011, 0.019, 0.008, 0.006, 0.014, 0.004],
        "si c=0.1": [0.008, 0.012, 0.012, 0.007, 0.009, 0.011],
        "fine-tuning": [0.007, 0.017, 0.022, 0.016, 0.010, 0.004],
        "from scratch": [0.004, 0.015, 0.015, 0.005, 0.008, 0.018],
    }

    def errors(method, accuracy):
        """How many of the difference's standard errors it is from the authors' data."""
        error = np.hypot(
            standard_error(accuracy), np.array(spread[method]) / np.sqrt(4)
        )
        return (accuracy.mean(0) - theirs[method]) / error

    away = {method: errors(method, x) for method, x in after["test"].items()}
    beyond = away.pop("from scratch")
    assert np.abs([*away.values()]).max() < 2
    assert list(np.flatnonzero(beyond > 3)) == [1, 3]
    ahead = scratch.mean() - np.mean(theirs["from scratch"])
    assert f"one for each task, are {ahead:.3f} above theirs" in text
    repeated = after_all_tasks(fresh, "test")["from scratch"]
    ahead = repeated.mean() - np.mean(theirs["from scratch"])
    beyond = errors("from scratch", repeated)
    assert (
        f"they are {ahead:.3f} above, on classes 10–19 by {beyond[2]:.1f} standard "
        "errors, elsewhere by less than two." in text
    )
    assert np.delete(np.abs(beyond), 2).max() < 2
    apart = np.hypot(*(standard_error(x.mean(1)) for x in (scratch, repeated)))
    assert abs((scratch - repeated).mean()) < apart, "which no reset touches, agree"

    weak, strong = ours - scratch, stronger - scratch
    gain, error = weak.mean(0), standard_error(weak)
    assert list(np.flatnonzero(gain > 2 * error)) == [2, 5]
    assert list(np.flatnonzero(gain < -2 * error)) == [0]
    assert f"({gain[2]:.3f} on classes 10–19, {gain[5]:.3f} on 40–49)" in text
    assert abs(weak.mean()) <= standard_error(weak.mean(1))
    assert (strong.mean(0) < 2 * standard_error(strong)).all()
    behind = after["train"]["si c=0.01"] - after["train"]["from scratch"]
    assert (behind.mean(0) < 0).all()


def test_split_cifar_with_a_fresh_adam_is_the_record():
    text = " ".join((ROOT / "docs/experiments.md").read_text().split())
    assert "of three seeds ([record](../experiments/results/split_cifar.json))" in text
    fresh, kept = (record(f"split_cifar{reset}") for reset in ("", "_keep_count"))
    test, train = (after_all_tasks(fresh, split) for split in ("test", "train"))
    gain, strong = (test[f"si c={c}"] - test["from scratch"] for c in (0.01, 0.1))
    mean, error = gain.mean(0), standard_error(gain)
    of_all = f"{gain.mean():.3f} ± {standard_error(gain.mean(1)):.3f}"
    assert f"With c = 0.01 it gains {of_all} on networks" in text
    assert list(np.flatnonzero(mean > 2 * error)) == [2, 4, 5]
    assert list(np.flatnonzero(np.abs(mean) < error)) == [1, 3]
    some = np.sort(mean)
    assert f"{some[3]:.3f} to {some[5]:.3f} on three, nothing on two" in text
    assert f"on CIFAR-10 it loses {-mean[0]:.3f}." in text
    assert abs(strong.mean()) < standard_error(strong.mean(1))
    for method in ("si c=0.01", "si c=0.1"):
        behind = train[method] - train["from scratch"]
        assert (behind.mean(0) < 0).all()
    lead = (test["si c=0.01"] - test["fine-tuning"]).mean(0)
    assert (lead[:3] > 0).all(), "keeps the older"
    assert (lead[3:] < 0).all(), "pays with the newer"
    methods = "fine-tuning", "si c=0.01"
    (less, little), (much, same) = (
        [forgetting(np.array(shown["runs"][k]["test"])) for k in methods]
        for shown in (fresh, kept)
    )
    assert np.mean(less) < np.mean(much) - 0.05, "forgets less without SI"
    error = np.hypot(standard_error(little), standard_error(same))
    assert abs(np.mean(little) - np.mean(same)) < error, "about as much with it"
    took = max(run["seconds"] for run in fresh["runs"].values())
    assert f"beside other runs: up to {took:.0f} s a method" in text


def test_split_cifar10_is_the_records():
    page = (ROOT / "docs/experiments.md").read_text()
    text = " ".join(page.split())
    shown, choice = (record(f"split_cifar10{name}") for name in ("", "_choice"))
    names = split_cifar.titles(split_cifar.Config(data="cifar10"))
    runs = shown["runs"]
    assert split_cifar.table(runs, "test", names) in page
    assert {len(run["test"]) for run in runs.values()} == {10}
    assert "mean ± SEM of ten seeds ([record]" in text
    assert choice["config"] == shown["config"] | {"held_out": 0.2}
    si, plain = (np.array(runs[k]["test"])[:, -1] for k in ("si c=0.1", "fine-tuning"))
    assert si[:, 0].min() > plain[:, 0].max(), "keeps the first"
    assert si[:, 1].max() < plain[:, 1].min(), "pays with the second"
    took = max(run["seconds"] for run in runs.values())
    assert f"beside other runs: up to {took:.0f} s a method" in text
    found = {
        method.removeprefix("si c=").replace("fine-tuning", "0"): x["test"]
        for method, x in choice["summary"].items()
    }
    accuracy = {c: x["average_accuracy"] for c, x in found.items()}
    for c, x in accuracy.items():
        assert f"| {c} | {x['mean']:.3f} ± {x['sem']:.3f} |" in text
    without, *others = sorted(x["mean"] for x in accuracy.values())
    assert without == accuracy["0"]["mean"] < others[0] - 0.1, "tell all of them from 0"
    assert max(accuracy, key=lambda c: accuracy[c]["mean"]) == "0.1"
    ends = {k: average_accuracy(x["test"]) for k, x in choice["runs"].items()}
    for one, other in itertools.combinations(set(ends) - {"fine-tuning"}, 2):
        apart = ends[one] - ends[other]
        assert abs(apart.mean()) < 2 * standard_error(apart), "not from each other"


@pytest.mark.parametrize(
    ("experiment", "name", "arguments"),
    [
        (permuted_mnist, "permuted_mnist", "--seeds 5 --ewc-strengths 1e4 1e6"),
        (split_cifar, "split_cifar", "--seeds 3 --micro-batch 0"),
        (split_cifar, "split_cifar_keep_count", "--seeds 3 --keep-count"),
        (
            split_cifar,
            "split_cifar10",
            "--config configs/split_cifar10.toml --seeds 10 --micro-batch 0",
        ),
        (
            split_cifar,
            "split_cifar10_choice",
            "--config configs/split_cifar10_choice.toml --micro-batch 0",
        ),
    ],
)
def test_a_record_is_what_its_command_makes(
    experiment, name, arguments, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    module = experiment.__name__.removeprefix("experiments.")
    config = command.parse(experiment.Config, module, arguments.split())
    config = dataclasses.replace(config, out=tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(record(name)))
    kept = Record(module, config)
    methods = [run.name for run in experiment.runs(config)]
    assert set(methods) == set(kept.runs)
    assert not any(kept.missing(method, config.seeds) for method in methods)


def test_the_benchmark_shows_what_the_documentation_says():
    shown = record("benchmark")["summary"]
    text = " ".join((ROOT / "docs/experiments.md").read_text().split())
    nets = [shown["split MNIST"], shown["permuted MNIST"]]
    steps = [shown["split MNIST, step by step"], shown["permuted MNIST, step by step"]]

    def both(of, method, ratio="to_plain", digits=2):
        return " and ".join(f"{net[method][ratio]:.{digits}f}" for net in of)

    for net in nets:
        assert 1 + 1 / 6 < net["wrapper"]["to_plain"] < 1 + 1 / 4
        assert 1 + 1 / 4 < net["torch SI, careful"]["to_plain"] < 1 + 1 / 1.8
        assert round(net["link"]["copies"]) == 5
        assert net["wrapper"]["copies"] == net["link, region analysis"]["copies"] == 1
    usual = [f"{net['torch SI']['to_wrapper']:.1f}" for net in nets]
    assert (
        f"{usual[0]} times as long on split MNIST and {usual[1]} times on permuted"
        in text
    )
    careful = both(nets, "torch SI, careful", "to_wrapper", 1)
    assert f"in closed form, {careful} times" in text
    assert f"costs {both(nets, 'link')} times Adam's step" in text
    assert f"and costs {both(nets, 'link, region analysis')} times" in text
    assert f"the wrapper costs {both(steps, 'wrapper')} times" in text
    assert f"that link {both(steps, 'link, region analysis')} times" in text
    cifar = shown["split CIFAR"]
    assert cifar["wrapper"]["to_plain"] < 1.02
    assert cifar["adam"]["ms"] <= cifar["torch adam"]["ms"]


def test_the_small_permuted_mnist_shows_figures_4_and_5():
    shown = record("permuted_mnist_quick")["summary"]
    mean = {k: v["test"]["average_accuracy"]["mean"] for k, v in shown.items()}
    assert mean["fine-tuning"] < mean["sgd"] < mean["si c=1"] - 0.05
    assert mean["sgd+dropout"] < mean["si c=1"] < mean["ewc c=100"] < mean["joint"]
    correlation = {
        k: shown[k]["correlation_with_earlier_tasks"]
        for k in shown
        if k in ("si c=1", "fine-tuning")
    }
    text = (ROOT / "docs/experiments.md").read_text()
    for layers in correlation.values():
        second, *later = layers["layer 1"]
        assert f"it is −{-second:.2f} in the second" in text
        assert max(map(abs, later)) < 0.05
    without = correlation["fine-tuning"]["layer 2"]
    with_si = correlation["si c=1"]["layer 2"]
    assert f"from {without[0]:.2f} to {without[-1]:.2f} without" in text
    assert f"from {with_si[0]:.2f} to {with_si[-1]:.2f} with it" in text


def test_permuted_mnist_shows_figure_5():
    text = " ".join((ROOT / "docs/experiments.md").read_text().split())
    last, earlier = (
        {
            method: measure(permuted_mnist.hidden_layers(run)["layer 2"])
            for method, run in record("permuted_mnist")["runs"].items()
            if "correlations" in run
        }
        for measure in (permuted_mnist.with_last, permuted_mnist.with_earlier)
    )
    words = {key: f"from {x[0]:.2f} to {x[-1]:.2f}" for key, x in last.items()}
    assert f"without consolidation, {words['fine-tuning']};" in text
    assert f"with it, {words['si c=0.1']}." in text
    words = {key: f"from {x[0]:.2f} to {x[-1]:.2f}" for key, x in earlier.items()}
    without, with_it = words["fine-tuning"], words["si c=0.1"]
    assert f"{without} without and {with_it} with it" in text
    assert last["fine-tuning"][-1] > last["si c=0.1"].max() + 0.1


def test_the_choice_of_c_is_the_records():
    text = (ROOT / "docs/guides/hyperparameters.md").read_text()
    full, quick = (record(f"permuted_mnist_choice{x}") for x in ("", "_quick"))
    accuracy = [
        {
            method: found["test"]["average_accuracy"]["mean"]
            for method, found in shown["summary"].items()
        }
        for shown in (full, quick)
    ]
    for method in set().union(*accuracy):
        name, c = method.split(" c=")
        label = {"si": "SI", "ewc": "EWC, c = λ/2"}[name]
        cells = (f" {x[method]:.3f}" if method in x else "" for x in accuracy)
        assert f"| {label} | {float(c):g} |{' |'.join(cells)} |" in text

    config = permuted_mnist.Config()
    shown = record("permuted_mnist")
    assert full["config"] == shown["config"] | {"held_out": 0.1}
    assert quick["config"]["held_out"] == 0.1
    of_si = {c: full["summary"][f"si c={c}"] for c in (0.03, 0.1, 0.3, 1, 3)}
    found = {c: x["test"]["average_accuracy"]["mean"] for c, x in of_si.items()}
    assert (max(found, key=found.get),) == config.strengths
    seeds = average_accuracy(shown["runs"]["si c=0.1"]["test"])
    guide = " ".join(text.split())
    cost, apart = found[0.1] - found[1], np.ptp(seeds)
    assert f"costs little, {cost:.3f}, but that is more than five" in guide
    assert len(seeds) == 5
    assert apart < cost < 0.005
    best = [max((x for x in of if x.startswith("ewc")), key=of.get) for of in accuracy]
    assert best == [f"ewc c={c:g}" for c in (*config.ewc_strengths, 1e4)]
    behind = {c: found[0.1] - accuracy[0][f"ewc c={c:g}"] for c in (1e4, 1e5, 1e6)}
    assert behind[1e4] > 2 * np.ptp(seeds), "too little"
    ahead = np.mean(average_accuracy(shown["runs"]["ewc c=1e+06"]["test"]) - seeds)
    assert (
        f"with 100,000 it is {behind[1e5]:.3f} below SI, with 1,000,000 "
        f"{-behind[1e6]:.3f} above, and on the test set, with five seeds of each, "
        f"{ahead:.3f} above again." in guide
    )
    page = " ".join((ROOT / "docs/experiments.md").read_text().split())
    assert f"was ahead there, too, by {-behind[1e6]:.3f}, with one seed;" in page

    for shown, name in ((full, ""), (quick, "_quick")):
        header = (ROOT / f"configs/permuted_mnist_choice{name}.toml").read_text()
        seconds = [run["seconds"] for run in shown["runs"].values()]
        took = f"{sum(seconds):.0f} s on two CPU cores"
        if not name:
            took = f"{np.mean(seconds) / 60:.0f} minutes a strength on two CPU cores"
        assert took in header


def test_the_small_split_cifar_shows_figure_6():
    text = (ROOT / "docs/experiments.md").read_text()
    quick, choice = (record(f"split_cifar_{name}") for name in ("quick", "choice"))
    runs = quick["runs"]
    (ours,) = set(runs) - {"fine-tuning"}
    titles = split_cifar.titles(split_cifar.Config())
    assert split_cifar.table(runs, "test", titles) in text
    with_si, without = (
        f"{runs[method]['seconds']:.0f} s" for method in (ours, "fine-tuning")
    )
    assert f"takes {with_si} with SI and {without} without" in text
    with_si, without = (
        split_cifar.final(runs[method], "test").mean(0)
        for method in (ours, "fine-tuning")
    )
    assert with_si.mean() > without.mean() + 0.04
    assert (with_si[:-1] > without[:-1]).all(), "no old task lost by it"
    kept = record("split_cifar_quick_keep_count")
    assert kept["config"] == quick["config"] | {"keep_count": True}
    assert split_cifar.table(kept["runs"], "test", titles) in text
    kept_si, kept_without = (
        split_cifar.final(kept["runs"][method], "test").mean(0)
        for method in (ours, "fine-tuning")
    )
    assert kept_si.mean() > kept_without.mean() + 0.1
    assert (kept_si[:-1] > kept_without[:-1]).all(), "no old task lost by it"
    gap, wider = (
        f"{100 * (x - y).mean():.0f}"
        for x, y in ((with_si, without), (kept_si, kept_without))
    )
    assert f"gap widens from {gap} to {wider} points" in text
    accuracy = {
        method: found["test"]["average_accuracy"]
        for method, found in choice["summary"].items()
    }
    assert max(accuracy, key=lambda method: accuracy[method]["mean"]) == ours
    seeds = {
        method: np.asarray(average_accuracy(run["test"]))
        for method, run in choice["runs"].items()
    }
    for method in set(seeds) - {ours}:
        lead = seeds[ours] - seeds[method]
        told = lead.mean() > 2 * float(standard_error(lead))
        assert told == (method == "fine-tuning")
    for method, found in accuracy.items():
        c = 0 if method == "fine-tuning" else float(method.split("=")[1])
        assert f"| {c:g} | {found['mean']:.3f} ± {found['sem']:.3f} |" in text
        assert found["n"] == 3


def test_the_scenarios_show_where_si_fails():
    text = (ROOT / "docs/experiments.md").read_text()
    shown = record("scenarios")
    runs = shown["runs"]
    config = scenarios_config.Config()
    assert scenarios.choice_table(config, runs) in text
    found = {x: scenarios.of_scenario(runs, x) for x in SCENARIOS}
    assert scenarios.table(found) in text
    assert f"mean ± SEM of {config.seeds} seeds" in text
    domain = best_of(shown, "domain")
    assert domain["fine-tuning"] + 0.2 < domain["si"] < domain["joint"] - 0.15
    assert abs(domain["si"] - domain["l2"]) < 0.02
    added = best_of(shown, "class")
    assert round(added["l2"] - added["fine-tuning"], 2) == 0.08
    for method in ("si", "ewc", "online ewc", "mas"):
        assert added[method] < added["fine-tuning"] + 0.01


def best_of(shown, scenario):
    """Mean test accuracy of each method in a scenario."""
    return {
        name.removeprefix(f"{scenario}: ").split(" c=")[0]: entry["test"][
            "average_accuracy"
        ]["mean"]
        for name, entry in shown["summary"].items()
        if name.startswith(scenario) and "grid" not in name
    }


@pytest.mark.parametrize("name", ["scenarios", "scenarios_quick"])
def test_in_every_record_si_solves_task_but_not_class_incremental(name):
    task, domain, added = (best_of(record(name), x) for x in SCENARIOS)
    for method in ("l2", "si", "ewc", "mas"):
        least = added["fine-tuning"]
        assert added[method] < least + 0.1 < added["joint"] - 0.5
    if name == "scenarios_quick":
        for method in ("si", "mas"):
            assert round(added[method] - added["fine-tuning"], 2) == 0.06
    assert task["si"] > task["joint"] - 0.02
    assert domain["fine-tuning"] + 0.1 < domain["si"] < domain["joint"] - 0.05


def test_fine_tuning_is_the_record():
    text, shown = (ROOT / "docs/experiments.md").read_text(), record("finetune")
    config, runs = command.parse(finetune_config.Config, "finetune", []), shown["runs"]
    ((name, layers),) = shown["held"].items()
    minutes = sum(run["seconds"] for run in runs.values()) / 60
    for made in (
        finetune.equal_table(config, runs),
        finetune.best_table(config, runs),
        f"What {name} holds, after the code.",
        finetune.held_table(layers),
        finetune.cost_table(shown["cost"]),
        f"{minutes:.0f} minutes on two cores",
    ):
        assert made in text
    samples = text.split("There are two types of")[1].split("```")[1].strip()
    for line in samples.splitlines():
        method, written = re.split("  +", line, maxsplit=1)
        assert " ".join(shown["samples"][method][0].split()).startswith(written)

    grew = finetune.at_equal_loss(config, runs, (0.5, 0.75, 0.9))
    half, much, most = np.transpose([grew[k].mean(0) for k in grew])
    half, much, most = (dict(zip(grew, x, strict=True)) for x in (half, much, most))
    penalties = ("l2", "ewc", "mas", "si", "si fisher")
    for at in (much, most):
        assert at["slow"] + 0.1 < min(at[k] for k in penalties)
    for method in ("ewc", "mas", "si", "si fisher"):
        assert abs(half["slow"] - half[method]) < 0.01
    start = np.mean(runs["pretraining"]["test"], axis=0)[-1, 0]
    steps = np.mean(runs["fine-tuning"]["test"], axis=0)[:, 0] - start
    assert finetune_texts.stops(config.steps, config)[0] == 8
    assert 0.9 < steps[0] / steps[-1] < 1
    for at in (half, much, most):
        for method in ("slow si", "slow si fisher"):
            assert at[method] < at["slow"] - 0.03
    quick = command.CONFIGS / "finetune_quick.toml"
    quick = command.parse(finetune_config.Config, "finetune", ["--config", str(quick)])
    small = finetune.at_equal_loss(quick, record("finetune_quick")["runs"], (0.5,))
    small = {name: f"{values.mean():.3f}" for name, values in small.items()}
    assert f"(at 50%, {small['slow']} and {small['si']})" in text
    both = (
        f"({small['slow si']}, with the Fisher information {small['slow si fisher']})"
    )
    assert both in text

    assert half["fine-tuning"] > most["fine-tuning"] > 0.75
    assert max(much["si"], much["mas"]) - min(much["si"], much["mas"]) < 0.03
    assert much["si"] < much["l2"] - 0.1
    assert most["ewc"] < most["si"] - 0.05
    assert much["lora si"] < much["si"] < much["lora"]
    assert half["si"] < half["lora si"] < half["lora"]
    assert np.isnan([most["lora"], most["lora si"]]).all()

    third = {
        name: np.array(runs[str(of_third(arm))]["test"])[:, -1].mean(0)
        for name, (arm, _) in finetune.choose(config, runs).items()
    }
    mean = {name: losses.mean() for name, losses in third.items()}
    order = ["mixed", "slow si fisher", "slow si", "mas"]
    assert sorted(mean, key=mean.get)[:4] == order
    assert mean["mas"] < mean["slow si fisher"] + 0.06
    known = np.mean(runs["slow c=0.1"]["test"], axis=0)[-1]
    unknown = np.mean(runs["pretraining"]["test"], axis=0)[-1]
    assert third["slow"][0] > known[0] + 1
    assert third["slow"][1] > (known[1] + unknown[1]) / 2
    assert third["si fisher"][2] > third["si"][2] + 1.5


def test_every_deviation_has_a_test_that_exists():
    table, _ = (ROOT / "docs/deviations.md").read_text().split("| | read in |")
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    assert len(rows) > 10
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert tests, row
        for file, name in tests:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            assert name in {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}


def anchors(page):
    """What GitHub calls the headings of a page."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x).lower().replace(" ", "-") for x in headings}


def test_links_and_images_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target, anchor in re.findall(
            r"\]\((?!https?:|#)([^)#]+)#?([^)]*)\)", prose
        ):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            if anchor and page.name == "README.md":  # of the others Sphinx says so
                assert anchor in anchors(ROOT / target), anchor


def test_records_that_configurations_name_exist():
    for config in (ROOT / "configs").glob("*.toml"):
        text = " ".join(line.strip("# ") for line in config.read_text().splitlines())
        for target in re.findall(r"experiments/results/\S+?\.json", text):
            assert (ROOT / target).exists(), f"{config.name}: {target}"


def test_commands_exist():
    for page in PAGES:
        for name in re.findall(r"python -m experiments\.(\w+)", page.read_text()):
            files = (f"{name}.py", f"{name}/__main__.py")
            assert any((ROOT / "experiments" / x).exists() for x in files), name
            assert (ROOT / "configs" / f"{name}.toml").exists(), name


def importance_ranks(measured, name):
    """Rank correlations with all: ``(batch sizes, layers, names)``, to two digits."""
    row = CORRELATED.index(name)
    return np.array(
        [
            [np.mean(layer["rank"], axis=0)[row] for layer in found["layers"].values()]
            for found in measured.values()
        ]
    ).round(2)


class Importances:
    """What the page on why SI works quotes of a record, and how it writes it."""

    def __init__(self, name):
        self.runs = record(name)["runs"]
        self.measured = why.measured(self.runs)
        self.tested = dict(why.tested(self.runs))
        self.accuracy = {k: average_accuracy(x["test"]) for k, x in self.tested.items()}
        self.noise, self.bias = {}, {}
        for size, found in self.measured.items():
            shares = {k: x.mean() for k, x in why.shares(found["ω"]).items()}
            self.noise[size], self.bias[size] = shares["noise"], sum(shares.values())

    def lead(self, size, one, other):
        """How much better one importance is than another, of the same seeds."""
        return self.accuracy[size, one] - self.accuracy[size, other]

    def loss(self, name, small, large):
        """How much an importance loses by larger batches."""
        return self.accuracy[small, name] - self.accuracy[large, name]


def clear(values):
    """Of one sign by more than twice the error."""
    return abs(np.mean(values)) > 2 * standard_error(values)


def why_text():
    return " ".join((ROOT / "docs/why.md").read_text().split())


def test_why_si_works_is_the_record():
    page, text = (ROOT / "docs/why.md").read_text(), why_text()
    path = command.CONFIGS / "why_quick.toml"
    config = command.parse(why_config.Config, "why", ["--config", str(path)])
    found = Importances("why_quick")
    for made in (
        why.bias_table(found.runs),
        why.correlation_table(found.runs, "si"),
        why.choice_table(config, found.runs),
        why.accuracy_table(found.runs),
    ):
        assert made in page
    noise, bias, lead = found.noise, found.bias, found.lead
    assert noise[8] > 0.5 > noise[32] > 0.1 > noise[128]
    assert bias[8] > bias[32] > bias[128]
    assert f"where {100 * bias[128]:.0f} % of Σω is bias" in text
    worse = [finetune.cells(lead(size, "si", "unbiased")) for size in (8, 32, 128)]
    assert f"is worse, by {worse[0]} and {worse[1]}, though" in text
    assert f"it is as good ({worse[2]})" in text
    assert lead(8, "unbiased", "fine-tuning").mean() > 0.05
    assert f"batches of 8 ({finetune.cells(lead(8, 'si', 'bias'))} below it)" in text
    assert f"worse by {finetune.cells(lead(128, 'si', 'bias'))} with 128" in text
    lost = finetune.cells(found.loss("si", 8, 128))
    assert f"from large batches**, by {lost} from 8 to 128" in text
    few, many = (found.tested[size, "si"]["test"] for size in (8, 128))
    assert np.mean(forgetting(many)) < np.mean(forgetting(few)) < 0.0061
    assert not clear(found.loss("mas", 8, 128) - found.loss("si", 8, 128))
    for size, name in found.tested:
        if name != "si":
            assert lead(size, name, "si").mean() < 0.003
    below = [lead(size, "si", "l2").mean() for size in (8, 32, 128)]
    assert f"L2 is {min(below):.3f} to {max(below):.3f} below it" in text


def test_why_si_works_on_all_of_mnist_is_the_record():
    page, text = (ROOT / "docs/why.md").read_text(), why_text()
    found = Importances("why")
    runs, noise, bias, lead = found.runs, found.noise, found.bias, found.lead
    assert why.bias_table(runs) in page
    assert why.accuracy_table(runs) in page
    minutes = sum(run.get("seconds", 0) for run in runs.values()) / 60
    assert f"{minutes:.0f} minutes of training" in text
    assert f"{minutes:.0f} minutes" in (ROOT / "configs/why.toml").read_text()
    assert list(found.measured) == [32, 256, 2048]
    low, high, most = (100 * x for x in (noise[256], bias[256], bias[2048]))
    assert f"about {100 * bias[32]:.0f} % of Σω with batches of 32" in text
    assert abs(noise[32] - bias[32]) < 0.02
    assert f"{low:.0f} to {high:.0f} % with 256, at most {most:.0f} % with" in text
    assert noise[2048] < 0

    worse = [finetune.cells(lead(size, "si", "unbiased")) for size in found.measured]
    assert f"is worse, by {worse[0]} and {worse[1]} (with 256" in text
    assert f"it is worse by {worse[2]} still" in text
    for size in (32, 256):
        assert abs(lead(size, "bias", "si").mean()) < 0.001
        assert not clear(lead(size, "l2", "si"))
    better = finetune.cells(lead(2048, "bias", "si"))
    assert f"the bias alone is better than SI by {better}:" in text
    lost = {name: found.loss(name, 32, 2048) for size, name in found.tested}
    assert f"large batch**, by {finetune.cells(lost['si'])} from 32" in text
    assert (
        f"lose {finetune.cells(lost['l2'])} and {finetune.cells(lost['mas'])};" in text
    )
    others = [
        lost[name].mean() for name in ("root fisher", "fisher", "absolute", "squared")
    ]
    assert f"lose {min(others):.3f} to {max(others):.3f}." in text
    better = finetune.cells(lead(32, "root fisher", "si"))
    assert f"√Fisher is better than SI by {better} with batches of 32" in text
    for name in ("root fisher", "fisher", "squared"):
        assert clear(lead(2048, name, "si"))
        assert lead(2048, name, "si").mean().round(3) in (0.016, 0.017)

    ends = []
    for name in why_config.Config().importances:
        if grid := runs.get(str(why.grid(2048, name))):
            accuracy = np.reshape(average_accuracy(grid["test"]), (1, -1))
            ends.append(choose(accuracy) == (0,))
            if name in ("si", "l2"):
                title = {"si": "SI", "l2": "L2"}[name]
                of_choice = np.mean(forgetting(grid["test"][0]))
                of_tests = np.mean(forgetting(found.tested[2048, name]["test"]))
                assert f"{title} {of_tests:.3f} and {of_choice:.3f}" in text
    assert (sum(ends), len(ends)) == (7, 9)
    accuracy = average_accuracy(runs[str(why.grid(256, "unbiased"))]["test"])
    assert np.argmax(accuracy) == len(why_config.Config().pulls) - 1

    rank = importance_ranks(found.measured, "si")
    names = ("root fisher", "absolute", "squared", "bias")
    root, *gradients, bias_of = map(CORRELATED.index, names)
    assert rank[1:, :, gradients].min() >= 0.88
    first, *later = rank[0][:, gradients]
    assert (first == 0.91).all()
    assert [np.min(later), np.max(later)] == [0.74, 0.83]
    assert rank[0, :2, bias_of].min() == 0.94
    assert [rank[..., root].min(), rank[..., root].max()] == [0.24, 0.75]
    assert (rank[0, :, root] <= rank[2, :, root]).all()


def test_why_si_works_on_permuted_digits_is_the_record():
    page, text = (ROOT / "docs/why.md").read_text(), why_text()
    found = Importances("why_permuted_quick")
    assert why.bias_table(found.runs) in page
    assert why.accuracy_table(found.runs) in page
    lead = found.lead
    of_all = lead(32, "si", "l2").mean()
    assert 0 < lead(32, "unbiased", "l2").mean() < of_all / 2
    assert abs(lead(32, "bias", "si").mean()) < 0.002
    assert f"where {100 * found.bias[256]:.0f} % is bias" in text
    worse = lead(256, "si", "unbiased")
    assert f"worse by {finetune.cells(worse)}, a third of SI's lead" in text
    assert abs(worse.mean() / lead(256, "si", "l2").mean() - 1 / 3) < 0.02
    for size in (32, 256):
        for other in ("fisher", "mas", "squared"):
            assert 0 < lead(size, other, "si").mean() < 0.006
    si, mas, l2 = (
        finetune.cells(found.loss(name, 32, 256)) for name in ("si", "mas", "l2")
    )
    assert f"SI loses {si}; so does MAS ({mas}), L2 {l2}." in text

    few = {32: found.measured[32]}
    (rank,) = importance_ranks(few, "root fisher")
    for name in ("si", "bias"):
        at = rank[:, CORRELATED.index(name)]
        assert at.tolist() == [0.86, 0.76, 0.76], name
    at = rank[:, CORRELATED.index("unbiased")]
    assert at.tolist() == [0.27, 0.08, -0.05]
    si, root, fisher = map(CORRELATED.index, ("si", "root fisher", "fisher"))
    linear = [np.mean(x["linear"], 0)[si] for x in few[32]["layers"].values()]
    assert np.round(linear, 2)[:, root].tolist() == [0.76, 0.74, 0.73]
    assert np.round(linear, 2)[:, fisher].tolist() == [0.60, 0.63, 0.61]
    (rank,) = importance_ranks(few, "si")
    assert rank[:, CORRELATED.index("absolute")].min() >= 0.97


def test_the_claims_about_si_hold_where_the_page_says():
    text = why_text()
    learned = [Importances(name) for name in ("why_quick", "why", "why_permuted_quick")]
    noisy = [(x, size) for x in learned for size in x.noise if x.noise[size] > 0.105]
    worse = [x.lead(size, "si", "unbiased").mean() for x, size in noisy]
    assert len(worse) == 6
    assert f"11 % of Σω or more, by {min(worse):.3f} to {max(worse):.3f}" in text
    alone = {(x, s): x.lead(s, "bias", "si") for x in learned for s in x.noise}
    for (x, size), lead in alone.items():
        assert (abs(lead.mean()) < 0.002) == (x.noise[size] >= 0.15)
    clearly = [np.sign(x.mean()) for x in alone.values() if clear(x)]
    assert sorted(clearly) == [-1, 1], "worse, or better"
    lost = {
        name: np.array(
            [x.loss(name, min(x.noise), max(x.noise)).mean() for x in learned]
        )
        for name in ("si", "l2", "mas")
    }
    si = lost["si"]
    assert f"smallest to the largest by {min(si):.3f} to {max(si):.3f}." in text
    assert (lost["mas"] > si).all()
    assert (lost["l2"] > si).tolist() == [False, True, False]

    names = ("root fisher", "absolute", "squared", "mas", "bias", "unbiased")
    root, *gradients, mas, bias, unbiased = map(CORRELATED.index, names)
    of_mas = {}
    for name in ("why", "why_quick", "why_permuted", "why_permuted_quick"):
        measured = why.measured(record(name)["runs"])
        si = importance_ranks(measured, "si")
        assert (si[..., gradients] > si[..., root, None]).all()
        of_root = importance_ranks(measured, "root fisher")
        assert (of_root[:, :2, bias] > of_root[:, :2, unbiased]).all()
        if name == "why_quick":
            assert (of_root[:, 2, bias] < of_root[:, 2, unbiased]).all()
            assert (of_root[..., mas] <= si[..., root] + 0.005).all()
        kind = "permuted" if "permuted" in name else "split"
        of_mas.setdefault(kind, []).append(of_root[..., mas].ravel())
        near = f"{si[..., root].min():.2f} to {si[..., root].max():.2f}"
        if name == "why":
            assert f"split MNIST {near}" in text
        elif name == "why_permuted_quick":
            assert f"correlate at {near}" in text
        elif name == "why_quick":
            assert near == "0.35 to 0.72"
    for kind, ranks in of_mas.items():
        low, high = (f(np.concatenate(ranks)) for f in (np.min, np.max))
        ends = f"at {low:.2f} to {high:.2f} on {kind}".replace("-", "−")
        assert ends in text


def test_why_si_works_in_the_network_of_figure_4_is_the_record():
    text = (ROOT / "docs/why.md").read_text()
    measured = why.measured(record("why_permuted")["runs"])
    assert why.bias_table(record("why_permuted")["runs"]) in text
    assert why.correlation_table(record("why_permuted")["runs"], "si") in text
    for found in measured.values():
        assert max(found["ω"]["unbiased"]) < 0 < 2 < min(found["ω"]["loss drop"])
    few, many = (measured[size]["ω"] for size in (256, 2048))
    noise = [why.shares(omega)["noise"] for omega in (few, many)]
    assert noise[0].min() > 0.5 > 0.2 > noise[1].max()
    assert why.shares(many)["long steps"].min() > 0.8
    for omega, times in ((few, 10), (many, 2.5)):
        drops = np.divide(omega["sum"], omega["loss drop"])
        np.testing.assert_allclose(drops.mean(), times, rtol=0.04)
    names = ("root fisher", "mas", "absolute", "bias")
    root, mas, absolute, bias = map(CORRELATED.index, names)
    rank = importance_ranks(measured, "si")
    assert rank[..., absolute].min() > 0.89
    assert rank[0, :, bias].min() > 0.85
    assert rank[..., bias].min() > 0.75
    near = rank[..., root]
    assert f"at {near.min():.2f} to {near.max():.2f}" in text
    assert (rank[..., mas] > near).sum() == 5
