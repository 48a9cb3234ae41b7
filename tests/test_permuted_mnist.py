"""The experiment's methods, tables and figures, on made-up digits."""

import json

import jax
import made_up
import numpy as np
import pytest
from matplotlib.figure import Figure

import si_jax
from experiments import figures, permuted_mnist
from experiments.engine import command

METHODS = {
    "si c=0.1",
    "fine-tuning",
    "ewc c=1e+06",
    "ewc merged c=1e+06",
    "kronecker c=3",
    "single",
    "joint",
    "sgd",
    "sgd+dropout",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    made_up.write(folder, "mnist", train=600, test=100)

    def make(out, **settings):
        small = {"tasks": 3, "epochs": 1, "hidden": (8, 8), "fisher_examples": 20}
        return permuted_mnist.Config(
            data_dir=folder, out=out, **(small | {"seeds": 2} | settings)
        )

    return make


def run(config):
    with jax.numpy_dtype_promotion("standard"):
        permuted_mnist.run(config)
    return json.loads((config.out / "results.json").read_text())


@pytest.mark.slow
def test_every_method_runs_and_more_can_be_added(config, tmp_path, capsys, monkeypatch):
    drawn = []

    def figure(_runs, name, _published):
        drawn.append(name)
        return Figure()

    with monkeypatch.context() as patched:
        patched.setattr(permuted_mnist, "figure", figure)
        first = run(config(tmp_path, methods=("si",)))
    assert drawn == ["MNIST"], "the figure names its data"
    assert set(first["runs"]) == {"si c=0.1"}
    every = (*permuted_mnist.Config.methods, "ewc merged", "kronecker")
    record = run(config(tmp_path, methods=every))
    assert record["runs"]["si c=0.1"] == first["runs"]["si c=0.1"]
    runs, summary = record["runs"], record["summary"]
    assert set(runs) == METHODS
    for method, result in runs.items():
        stages = {"single": 1, "joint": 1}.get(method, 3)
        assert np.shape(result["test"]) == (2, stages, 1 if method == "single" else 3)
        correlated = method in ("si c=0.1", "fine-tuning")
        assert ("correlations" in result) == correlated
        named = "correlation_with_earlier_tasks" in summary[method]
        assert named == correlated
    np.testing.assert_allclose(  # the same until the second task
        runs["single"]["test"], np.array(runs["fine-tuning"]["test"])[:, :1, :1]
    )
    for name in ("permuted_mnist", "permuted_mnist_correlations"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert permuted_mnist.table(runs) in printed
    again = run(config(tmp_path))
    assert again == record
    assert "Finished before" in capsys.readouterr().out


def test_the_state_is_as_narrow_as_it_is_asked_to_be(config, tmp_path):
    narrow = config(tmp_path, methods=("si",), state_dtype="bfloat16")
    (run,) = permuted_mnist.runs(narrow)
    carry = jax.eval_shape(run.make_learner(0.1, 0.1).init, jax.random.key(0))
    _, *held = si_jax.synapses(carry.opt_state)
    assert {str(x.dtype) for x in jax.tree.leaves(held)} == {"bfloat16"}


def test_choosing_leaves_the_test_set_alone(config, tmp_path):
    whole = permuted_mnist.make_problem(config(tmp_path))
    held = permuted_mnist.make_problem(config(tmp_path, held_out=0.25))
    assert held.stages.size.tolist() == [450] * 3
    assert held.test_tasks.size.tolist() == [150] * 3
    rows = {image.tobytes() for image in held.test.images}
    assert rows <= {image.tobytes() for image in whole.train.images}


def test_shipped_configuration_is_the_default():
    parsed = command.parse(permuted_mnist.Config, "permuted_mnist", [])
    assert parsed == permuted_mnist.Config()


@pytest.mark.parametrize(
    "name",
    [path.stem for path in sorted(command.CONFIGS.glob("permuted_mnist_*.toml"))],
)
def test_shipped_configurations_parse(name):
    path = str(command.CONFIGS / f"{name}.toml")
    config = command.parse(permuted_mnist.Config, "permuted_mnist", ["--config", path])
    assert config != permuted_mnist.Config()


def test_table_puts_the_controls_where_they_belong():
    matrix = np.array([[[0.9, 0.1], [0.5, 0.7]]])
    runs = {
        "sgd": {"test": matrix},
        "joint": {"test": matrix[:, 1:]},
        "single": {"test": matrix[:, :1, :1]},
    }
    assert permuted_mnist.table(runs).splitlines() == [
        "tasks     sgd   joint  single",
        "1      0.9000          0.9000",
        "2      0.6000  0.6000",
    ]


def test_the_authors_data_stand_beside_a_run_of_their_length():
    theirs = permuted_mnist.published(permuted_mnist.Config())
    assert len(theirs["si c=0.1"]) == len(theirs["fine-tuning"]) == 10
    for other in ({"epochs": 3}, {"tasks": 5}, {"data": "mnist5k"}, {"held_out": 0.1}):
        assert permuted_mnist.published(permuted_mnist.Config(**other)) == {}
    run = {"test": np.full((1, 10, 10), 0.5)}
    table = permuted_mnist.table(
        {"fine-tuning": run, "sgd": {"test": np.full((2, 10, 10), 0.5)}}, theirs
    )
    ours, authors = (x.splitlines() for x in table.split("\n\n"))
    assert ours[0].split() == ["tasks", "fine-tuning", "sgd"]
    assert ours[-1].split() == ["n", "1", "2"]
    assert authors[0].split() == ["the", "authors'", "fine-tuning"]
    assert authors[-1].split() == ["10", f"{theirs['fine-tuning'][-1]:.4f}"]
    curves = {"si c=0.1": np.full((2, 10), 0.9)}
    figure = figures.average_accuracy(curves, published=theirs)
    crosses = [line for line in figure.axes[1].lines if line.get_marker() == "x"]
    np.testing.assert_array_equal(crosses[0].get_ydata(), theirs["si c=0.1"])


def test_correlation_with_the_earlier_tasks():
    matrix = np.array([[[1, 0.1, 0.2], [0.1, 1, 0.4], [0.2, 0.4, 1]]])
    np.testing.assert_allclose(permuted_mnist.with_earlier(matrix), [0.1, 0.3])
    np.testing.assert_allclose(permuted_mnist.with_last(matrix), [0.1, 0.4])


def test_figure_4_draws_curves_bands_and_controls():
    curves = {"si": np.array([[0.98, 0.96], [0.99, 0.97]])}
    figure = figures.average_accuracy(curves, single=[0.98], joint=[0.99])
    zoom, whole = figure.axes
    np.testing.assert_allclose(whole.lines[0].get_ydata(), [0.985, 0.965])
    assert len(whole.collections) == 1
    assert [line.get_ydata()[0] for line in whole.lines[1:]] == [0.99, 0.98]
    low, high = zoom.get_ylim()
    assert 0.9 < low < 0.96
    assert 0.99 < high < 1


def test_figure_5_has_a_row_a_method_and_a_column_a_layer():
    matrix = np.array([[1, 0.3], [0.3, 1]])
    layers = {"layer 1": matrix, "layer 2": matrix / 2}
    figure = figures.correlations({"si": layers, "fine-tuning": layers})
    panels = figure.axes[:4]
    assert [p.get_title() for p in panels] == ["layer 1", "layer 2", "", ""]
    np.testing.assert_array_equal(panels[3].images[0].get_array(), matrix / 2)
    assert panels[2].get_ylabel() == "fine-tuning\nTask"
