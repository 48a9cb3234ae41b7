"""Split CIFAR's tasks, methods, table and figure, on made-up images."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import made_up
import numpy as np
import pytest

import si_jax
from experiments import figures, split_cifar
from experiments.engine import command
from experiments.engine.run import with_fields


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        made_up.write(
            folder, name, train=200, test=100, classes=classes, shape=(32, 32, 3)
        )

    def make(out, **settings):
        small = {"epochs": 1, "batch_size": 8, "micro_batch": 4}
        return split_cifar.Config(data_dir=folder, out=out, **(small | settings))

    return make


def test_tasks_are_cifar_10_and_half_of_cifar_100(config, tmp_path):
    problem = split_cifar.make_problem(config(tmp_path))
    assert problem.stages.size.tolist() == [200] + [20] * 5
    assert problem.test_tasks.size.tolist() == [100] + [10] * 5
    classes = np.asarray(problem.stages.classes)
    assert classes.shape == (6, 60)
    assert (classes.sum(0) == 1).all()
    for rows, size, own in zip(
        problem.stages.rows, problem.stages.size, classes, strict=True
    ):
        assert own[problem.train.labels[rows[:size]]].all()
    few = split_cifar.make_problem(config(tmp_path, examples=15))
    assert few.stages.size.tolist() == [15] * 6
    assert few.test_tasks.size.tolist() == [15] + [10] * 5
    assert few.stages.rows.shape == (6, 15), "no waste"
    two = split_cifar.make_problem(config(tmp_path, data="cifar10"))
    assert two.stages.size.tolist() == [100, 100]


@pytest.mark.slow
def test_every_method_runs(config, tmp_path, capsys):
    """The first task once; before any consolidation it is the same whatever c."""
    settings = config(tmp_path / "all", data="cifar10", strengths=(100.0,), examples=16)
    methods = ("fine-tuning",)
    alone = dataclasses.replace(settings, methods=methods, out=tmp_path / "alone")
    with jax.numpy_dtype_promotion("standard"):
        split_cifar.run(settings)
        printed = capsys.readouterr().out
        split_cifar.run(alone)
    runs, of_alone = (
        json.loads((tmp_path / folder / "results.json").read_text())["runs"]
        for folder in ("all", "alone")
    )
    assert list(runs) == ["si c=100", "fine-tuning", "from scratch"]
    for run in runs.values():
        assert np.shape(run["test"]) == (1, 2, 2)
    titles = split_cifar.titles(settings)
    assert split_cifar.table(runs, "test", titles) in printed
    assert (tmp_path / "all" / "split_cifar.png").stat().st_size > 10_000

    logged, logged_alone = (
        [
            json.loads(line)
            for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in ("all", "alone")
    )
    order = [(epoch["method"], epoch["position"]) for epoch in logged]
    assert order == [("first task", 0), *((method, 1) for method in runs)]
    assert [logged[0], logged[2]] == logged_alone, "losses, Σω, …"
    for split in ("initial", "test", "train"):
        assert runs["fine-tuning"][split] == of_alone["fine-tuning"][split]


@pytest.mark.slow
def test_bfloat16_trains_alike_with_float32_parameters_and_synapses(config, tmp_path):
    found = []
    for compute in ("float32", "bfloat16"):
        settings = config(tmp_path, data="cifar10", examples=16, compute=compute)
        problem = split_cifar.make_problem(settings)
        task = jax.tree.map(lambda x: x[0], problem.stages)
        examples = jax.tree.map(jnp.asarray, problem.train)
        pieces = split_cifar.make_learner(settings)(0.1, 1e-3)
        epoch, carry = jax.jit(pieces.epoch), jax.jit(pieces.init)(jax.random.key(0))
        with jax.numpy_dtype_promotion("standard"):
            carry, _ = epoch(carry, examples, task, jax.random.key(1))
        synapses = si_jax.synapses(carry.opt_state)
        kept = jax.tree.leaves((carry.params, synapses))
        assert {x.dtype for x in kept} == {jnp.dtype("float32")}
        omega = jax.tree.leaves(synapses.path_integral)
        found.append(np.concatenate([x.ravel() for x in omega]))
    assert (found[0] != found[1]).any(), "it is computed in bfloat16"
    assert np.corrcoef(*found)[0, 1] > 0.99
    np.testing.assert_allclose(*map(np.sum, found), rtol=0.03)


def test_table_says_what_is_gained_on_a_net_from_scratch():
    after = np.array([[[0.8, 0.1], [0.6, 0.7]], [[0.8, 0.1], [0.8, 0.7]]])
    alone = np.array([[[0.7, 0.1], [0.1, 0.5]]] * 2)
    runs = {"si c=1": {"test": after}, "from scratch": {"test": alone}}
    text = split_cifar.table(with_fields(runs), "test", ["one\ntwo", "three"])
    accuracies, gains = (x.splitlines() for x in text.split("\n\n"))
    assert accuracies[0].split() == ["si", "c=1", "from", "scratch"]
    assert [row[:7].strip() for row in accuracies[1:]] == ["one two", "three", "mean"]
    assert gains[0].split() == ["−", "from", "scratch", "si", "c=1"]
    assert [row[7:].strip() for row in gains[1:]] == [
        "+0.0000 ± 0.1000",
        "+0.2000 ± 0.0000",
        "+0.1000 ± 0.0500",
    ]
    runs["from scratch"] = {"test": alone[:1]}
    rows = split_cifar.table(with_fields(runs), "test", ["one", "two"]).splitlines()
    assert rows[-1].split() == ["mean", "+0.0500"], "of the seed that both have"


def test_figure_6_has_bars_deviations_and_chance():
    accuracy = np.array([[0.5, 0.7], [0.7, 0.7]])
    methods = {"a": accuracy, "b": accuracy[:1]}
    figure = figures.final_accuracy(
        {"Validation": methods, "Training": {"a": accuracy / 2}},
        ["one", "two"],
        chance=0.1,
    )
    panels = figure.axes
    assert [p.get_ylabel() for p in panels] == ["Validation", "Training"]
    heights = [bar.get_height() for bar in panels[0].containers[1]]
    np.testing.assert_allclose(heights, accuracy.mean(0))
    assert panels[0].lines[-1].get_ydata()[0] == 0.1
    assert panels[0].get_ylim() == panels[1].get_ylim()


def test_the_authors_data_stand_beside_a_run_of_their_length():
    theirs = split_cifar.published(split_cifar.Config())
    means = {method: round(np.mean(x), 3) for method, x in theirs.items()}
    assert means == {
        "si c=0.01": 0.735,
        "si c=0.1": 0.72,
        "fine-tuning": 0.625,
        "from scratch": 0.711,
    }
    for other in ({"epochs": 3}, {"examples": 9}, {"data": "cifar10"}):
        assert split_cifar.published(split_cifar.Config(**other)) == {}
    run = {"method": "fine-tuning", "test": np.full((1, 6, 6), 0.5)}
    titles = split_cifar.titles(split_cifar.Config())
    text = split_cifar.table({"fine-tuning": run}, "test", titles, theirs)
    ours, authors = (x.splitlines() for x in text.split("\n\n"))
    assert authors[0].split() == ["the", "authors'", "fine-tuning"]
    assert [x[1].split() for x in (ours, authors)] == [
        ["CIFAR-10", "0.5000"],
        ["CIFAR-10", "0.459"],
    ]
    assert [x[-1].split()[-1] for x in (ours, authors)] == ["0.5000", "0.625"]
    bars = {"Validation": {"fine-tuning": np.full((1, 6), 0.5)}}
    figure = figures.final_accuracy(bars, titles, chance=0.1, published=theirs)
    (diamonds,) = [x for x in figure.axes[0].lines if x.get_marker() == "D"]
    np.testing.assert_array_equal(diamonds.get_ydata(), theirs["fine-tuning"])


def test_shipped_configurations():
    parsed = command.parse(split_cifar.Config, "split_cifar", [])
    assert parsed == split_cifar.Config()
    found = {}
    for name in ("10", "10_choice", "_choice", "_quick"):
        path = str(command.CONFIGS / f"split_cifar{name}.toml")
        found[name] = command.parse(
            split_cifar.Config, "split_cifar", ["--config", path]
        )
    choice = dataclasses.replace(found["10_choice"], held_out=0, seeds=1)
    assert dataclasses.replace(choice, strengths=(0.1,)) == found["10"]
