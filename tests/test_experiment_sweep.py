import numpy as np

from experiments import figures, split_mnist, sweep
from experiments.engine import command
from experiments.engine.choice import choose


def test_the_best_mean_is_chosen():
    accuracy = np.zeros((2, 3, 4))
    accuracy[:, 1, 2] = 0.8
    accuracy[0, 2, 3] = 1.0  # one lucky seed
    assert choose(accuracy) == (1, 2)
    accuracy[1, 1, 2] = np.nan  # a seed diverged
    accuracy[:, 0, 1] = 0.7
    assert choose(accuracy) == (0, 1)
    config = sweep.Config(strengths=(1, 2, 3), dampings=(1, 2, 3, 4))
    row = sweep.grid_table(accuracy.mean(0), config).splitlines()[2]
    assert row.split() == ["2", "0.0000", "0.0000", "diverged", "0.0000"]


def test_the_shipped_configuration_is_the_default():
    assert command.parse(sweep.Config, "sweep", []) == sweep.Config()


def test_the_choice_is_a_configuration_that_runs(tmp_path):
    config = sweep.Config(data="mnist5k", epochs=3, hidden=(8,))
    file = tmp_path / "chosen.toml"
    file.write_text(sweep.chosen_config(config, 0.3, 1e-4))
    chosen = command.parse(split_mnist.Config, "split_mnist", ["--config", str(file)])
    assert chosen == split_mnist.Config(
        data="mnist5k",
        seeds=5,
        epochs=3,
        hidden=(8,),
        strengths=(0.3, 0.0),
        damping=1e-4,
    )


def test_heat_map_writes_every_value_and_frames_the_choice():
    values = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    figure = figures.heat_map(
        values, [1, 10], [0.1, 1, 10], labels=("c", "ξ"), title="t", chosen=(1, 2)
    )
    axes = figure.axes[0]
    assert {t.get_text() for t in axes.texts} == {f"{x:.4f}" for x in values.ravel()}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["1", "10"]
    (frame,) = axes.patches
    assert frame.get_xy() == (1.5, 0.5)
