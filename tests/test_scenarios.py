"""The scenarios, the methods in them, and what is chosen, on made-up digits."""

import json
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import made_up
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.data.tasks import look_up, mask_logits
from experiments.engine import command
from experiments.engine.choice import GRID_SEEDS, choose
from experiments.engine.command import UserError
from experiments.engine.programs import Pieces
from experiments.engine.record import Record
from experiments.engine.run import Label, Run, with_fields
from experiments.networks.models import MLP
from experiments.scenarios import __main__ as scenarios
from experiments.scenarios import figures, findings, methods
from experiments.scenarios.config import SCENARIOS, Config, Name
from experiments.scenarios.problems import in_scenario, make_problems
from experiments.training.loop import Carry, Learner
from si_jax import importance

RESULTS = command.CONFIGS.parent / "experiments/results"


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    made_up.write(folder, "mnist", train=240, test=60)

    def make(out=None, **settings):
        small = {"epochs": 1, "hidden": (8,), "importance_examples": 10, "seeds": 2}
        names = ("l2", "si", "ewc", "kronecker", "mas")
        few = {f"{x}_strengths": (0.0, 10.0) for x in names}
        return Config(
            data_dir=folder, out=out, held_out=0.2, **(small | few | settings)
        )

    return make


def run(config):
    with jax.numpy_dtype_promotion("standard"):
        scenarios.run(config)
    return json.loads((config.out / "results.json").read_text())


@pytest.mark.slow
def test_a_scenario_is_run_and_more_can_be_added(make_config, tmp_path, capsys):
    first = run(make_config(tmp_path, scenario=("class",), methods=("joint",)))
    assert set(first["runs"]) == {"class: joint"}
    config = make_config(tmp_path, scenario=("class",), methods=("mas", "joint"))
    record = run(config)
    runs, summary = record["runs"], record["summary"]
    assert runs["class: joint"] == first["runs"]["class: joint"]
    (chosen,) = set(runs) - {"class: joint", "class: mas, grid"}
    assert chosen in ("class: mas c=0", "class: mas c=10")
    assert np.shape(runs[chosen]["test"]) == (2, 5, 5)
    assert np.shape(runs["class: joint"]["test"]) == (2, 1, 5)
    assert "forward_transfer" in summary[chosen]["test"]
    seeds = runs["class: mas, grid"]["points"]["seed"]
    assert min(seeds) >= GRID_SEEDS, "the seeds of the test are fresh"
    printed = capsys.readouterr().out
    for of in (findings.choice_table(config, runs), "Class-incremental, test"):
        assert of in printed
    assert (tmp_path / "scenarios.png").stat().st_size > 10_000
    assert "class: mas" in (tmp_path / "results.csv").read_text()
    assert run(config) == record
    assert "Finished before" in capsys.readouterr().out


def test_every_method_has_its_pieces(make_config):
    """Whose state keeps its structure through an epoch and a boundary."""
    config = make_config(reset_optimizer=True)
    _, problem = make_problems(config)
    task = jax.tree.map(lambda x: x[0], problem.stages)
    for name, arm in methods.arms(config).items():

        def through(key, strength, arm=arm):
            further = {k: jnp.float32(x) for k, x in arm.further.items()}
            learner = arm.make_learner(strength, jnp.float32(0.1), **further)
            carry = learner.init(key)
            after, _ = learner.epoch(carry, problem.train, task, key)
            return carry, learner.finish(after, problem.train, task, key)

        with jax.numpy_dtype_promotion("standard"):  # Adam's
            shapes = jax.eval_shape(through, jax.random.key(0), jnp.float32(1))
        assert shapes[0] == shapes[1], name
    assert set(methods.arms(config)) == set(get_args(Name))


def test_the_scenarios_differ_in_labels_and_outputs(make_config):
    _, problem = make_problems(make_config())
    found = {x: in_scenario(x, problem) for x in SCENARIOS}
    outputs = {
        name: [np.flatnonzero(row).tolist() for row in x.stages.classes]
        for name, x in found.items()
    }
    assert outputs["task"] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert outputs["domain"] == [[0, 1]] * 5
    assert outputs["class"] == [list(range(2 * n)) for n in (1, 2, 3, 4, 5)]
    for x in found.values():
        for number in range(5):
            task = jax.tree.map(lambda leaf, n=number: leaf[n], x.stages)
            rows = task.rows[: task.size]
            assert set(problem.train.labels[rows]) == {2 * number, 2 * number + 1}
            assert all(task.classes[x.train.labels[rows]])
    halves = found["domain"].test.labels
    np.testing.assert_array_equal(halves, problem.test.labels % 2)


def test_what_is_held_out_is_trained_on_in_no_task(make_config):
    choice, test = make_problems(make_config())
    rows = [r[:n] for r, n in zip(choice.stages.rows, choice.stages.size, strict=True)]
    used = {choice.train.images[row].tobytes() for row in np.concatenate(rows)}
    held = {image.tobytes() for image in choice.test.images}
    every = {image.tobytes() for image in test.train.images}
    assert len(held) == 48
    assert not used & held
    assert used | held == every
    shapes = [jax.tree.map(np.shape, x.stages) for x in (choice, test)]
    assert shapes[0] == shapes[1], "one compiled program"


def test_outputs_of_all_tasks_so_far_are_evaluated_where_the_problem_grows(make_config):
    _, problem = make_problems(make_config())

    def make():
        return Learner(
            init=lambda _: Carry(jnp.zeros(()), ()),
            epoch=None,
            finish=None,
            evaluate=lambda *arguments: arguments[-1].classes.sum(-1),
        )

    def active(scenario, stage):
        seen = in_scenario(scenario, problem)
        pieces = Pieces(Run(Label("si"), make, lambda: seen, [0], 1, {}))
        return pieces.evaluate(pieces.init(), "test", stage)[0].tolist()

    assert active("class", -1) == [2, 4, 6, 8, 10]
    assert active("class", 2) == [6, 6, 6, 8, 10]
    assert active("task", 2) == [2, 2, 2, 2, 2]


def test_the_methods_hold_what_they_say(make_config):
    config = make_config(importance_examples=48)  # all of the first task's
    _, problem = make_problems(config)
    task = jax.tree.map(lambda x: x[0], problem.stages)
    assert int(task.size) == 48
    images, _ = look_up(problem.train, task.rows[: task.size])
    model = MLP(config.hidden, 10)
    arms = methods.arms(config)

    @jax.jit
    def after_twice(which):
        further = {"importance": which}
        learner = arms["l2"].make_learner(jnp.float32(1), jnp.float32(1), **further)
        carry = learner.init(jax.random.key(0))
        for i in range(2):
            carry = learner.finish(carry, problem.train, task, jax.random.key(i))
        return carry.params, carry.opt_state[0].importance

    def held(method):
        return after_twice(jnp.float32(arms[method].further["importance"]))

    params, ones = held("l2")
    assert all((x == 2).all() for x in jax.tree.leaves(ones)), "1 a task"
    assert arms["fine-tuning"].further == arms["l2"].further

    def outputs(params, image):
        return model.apply(params, image[None])[0, :2]

    def logits(params, image):
        return mask_logits(model.apply(params, image[None]), task.classes)[0]

    def twice(found, expected, **tolerance):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, 2 * b, **tolerance),
            found,
            expected,
        )

    mas = importance.sensitivity(outputs, params, images)
    twice(held("mas")[1], mas, rtol=1e-4, atol=1e-6)
    sampled = held("online ewc")[1]["params"]["Dense_1"]["bias"]
    exact = importance.fisher(logits, params, images, exact=True)
    twice(sampled, exact["params"]["Dense_1"]["bias"], rtol=0.2, atol=1e-6)


def test_the_best_mean_is_chosen_and_starred(make_config):
    accuracy = np.array([[0.5, 0.9, 0.1], [0.5, 0.3, 0.1]])
    assert choose(accuracy) == (1,)
    test = accuracy[:, :2].reshape(4, 1, 1)
    grid = {"domain: si, grid": {"test": test}}
    lines = findings.choice_table(make_config(grid_seeds=2), grid).splitlines()
    assert [line.split() for line in lines] == [
        ["domain"],
        ["si", "c=0", "0.5000"],
        ["si", "c=10", "0.6000*"],
    ]


def test_a_strength_at_which_a_seed_diverged_is_not_chosen(make_config):
    accuracy = np.array([[0.5, 0.9], [0.5, np.nan]])
    assert choose(accuracy) == (0,)
    grid = {"domain: si, grid": {"test": accuracy.reshape(4, 1, 1)}}
    lines = findings.choice_table(make_config(grid_seeds=2), grid).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["0.5000*", "diverged"]
    with pytest.raises(UserError, match="domain: si, grid diverged in all"):
        choose(accuracy * np.nan, "domain: si, grid")


def test_seeds_are_counted_in_every_scenario(capsys):
    """Ten of one and three of the others, whose methods have the same names."""
    shown = []
    runs = {
        f"{scenario}: joint": {"test": np.ones((n, 1, 2)), "seconds": 1.0}
        for scenario, n in (("task", 10), ("domain", 3), ("class", 3))
    }
    record = SimpleNamespace(
        runs=with_fields(runs),
        folder="there",
        save=lambda _, figure: shown.append(figure),
    )
    findings.report(Config(), record)
    said = capsys.readouterr().out
    assert "test accuracy after all tasks, mean ± SEM, n = 3 to 10" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("n ")]
    assert rows == [["n", "10", "3", "3"]]
    assert "n = 3 to 10" in shown[0].get_suptitle()


def test_tables_have_a_row_a_method():
    matrix = np.array([[[1.0, 0.5], [0.5, 0.75]]])
    runs = {
        "si c=1": {"test": matrix, "initial": matrix[:, 0] / 2},
        "joint": {"test": np.array([[[1.0, 1.0]]])},
    }
    runs = with_fields(runs)
    lines = findings.measures_table(runs).splitlines()
    assert lines[1].split()[2:] == [
        *("0.6250", "0.8750", "0.5000", "-0.5000", "0.2500", "0.1250"),
    ]
    assert lines[2].split() == ["joint", "1.0000"]
    assert [line.split() for line in findings.table({"task": runs}).splitlines()] == [
        ["task"],
        ["si", "0.6250"],
        ["joint", "1.0000"],
    ]


def test_the_figure_has_a_panel_a_scenario():
    matrix = np.array([[[1.0, 0.5], [0.5, 0.75]], [[1.0, 0.5], [0.25, 0.75]]])
    panels = {"a": {"si": matrix, "joint": np.ones((2, 1, 2))}, "b": {"mas": matrix}}
    figure = figures.scenarios(panels)
    first, second = figure.axes
    np.testing.assert_allclose(first.lines[0].get_ydata(), [1.0, 0.5625])
    assert first.lines[1].get_linestyle() == "--"
    assert first.lines[0].get_color() != second.lines[0].get_color()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["si", "joint", "mas"]


def test_the_legend_of_all_methods_fits_the_figure():
    methods = dict.fromkeys(get_args(Name), np.ones((2, 2, 2)))
    figure = figures.scenarios(dict.fromkeys(SCENARIOS, methods))
    FigureCanvasAgg(figure).draw()
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("name", ["scenarios", "scenarios_quick"])
def test_methods_can_be_added_to_a_committed_record(name, tmp_path, monkeypatch):
    monkeypatch.chdir(command.CONFIGS.parent)
    file = f"configs/{name}.toml"
    arguments = ["--config", file, "--out", str(tmp_path), "--methods", "kronecker"]
    committed = json.loads((RESULTS / f"{name}.json").read_text())
    if name == "scenarios":  # what a record does not know has the default strengths
        del committed["config"]["kronecker_strengths"]
    (tmp_path / "results.json").write_text(json.dumps(committed))
    record = Record("scenarios", command.parse(Config, "scenarios", arguments))
    assert record.runs.keys() == committed["runs"].keys()


@pytest.mark.parametrize("path", sorted(command.CONFIGS.glob("scenarios*.toml")))
def test_shipped_configurations_are_valid(path):
    config = command.parse(Config, "scenarios", ["--config", str(path)])
    assert (config == Config()) == (path.stem == "scenarios")
