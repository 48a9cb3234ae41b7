"""The experiments about the theory: what they show, and that their commands work."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quadratic, surrogate
from experiments.engine import command


def run(experiment, config):
    with jax.numpy_dtype_promotion("standard"):
        experiment.run(config)
    return json.loads((config.out / "results.json").read_text())["runs"]


# --- Figures 1 and 2 ------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    config = surrogate.Config(out=tmp_path_factory.mktemp("surrogate"))
    return run(surrogate, config), config


def test_the_surrogate_loss_matches_the_descent(drawn):
    """The three conditions of Fig. 2, and that the Hessian's quadratic does not."""
    runs, config = drawn
    one = runs["one task"]
    (start, loss, surrogate_loss), (end, least, lowest) = one["start"], one["end"]
    np.testing.assert_allclose(surrogate_loss - lowest, loss - least, rtol=5e-3)
    descent = surrogate.descend((surrogate.bump,), jnp.float32(start), 1.0, config)
    importance = descent.opt_state.synapses.importance

    def quadratic_loss(theta):
        return importance * jnp.square(theta - end)

    # Descent on the surrogate covers the same distance, to the same minimum.
    again = surrogate.descend(
        (quadratic_loss,), jnp.float32(start), 1.0, surrogate.Config(steps=20_000)
    )
    np.testing.assert_allclose(again.path[-1, -1], end, atol=1e-3)
    np.testing.assert_allclose(jax.grad(quadratic_loss)(jnp.float32(end)), 0, atol=1e-6)
    assert importance > 0
    curvature = jax.grad(jax.grad(surrogate.bump))(jnp.float32(end)) / 2
    assert curvature > 3 * importance, "the Hessian knows only the bottom"


def test_figure_1_shows_forgetting_and_its_remedy(drawn):
    runs, config = drawn
    two = runs["two tasks"]
    assert two["fine-tuning"]["losses"][0] > 3
    assert sum(two["SI"]["losses"]) < 0.5
    first = {name: np.array(found["path"])[0] for name, found in two.items()}
    np.testing.assert_allclose(first["SI"], first["fine-tuning"])
    moved = {k: np.ptp(np.array(v["path"])[1], axis=0) for k, v in two.items()}
    assert moved["SI"][1] < moved["fine-tuning"][1] / 2, "θ₂ remembers"
    for name in ("figure_1", "figure_2"):
        assert (config.out / f"{name}.pdf").exists()


# --- Quadratic losses -----------------------------------------------------------------


@pytest.mark.slow
def test_error_falls_with_the_learning_rate_and_averages_are_half_the_hessian(tmp_path):
    config = quadratic.Config(
        out=tmp_path,
        learning_rates=(0.05, 0.02, 0.01),
        starts=300,
        batch_sizes=(16, 512),
        noisy_learning_rates=(0.05, 0.02),
        epochs=50,
        seeds=3,
    )
    runs = run(quadratic, config)
    record = json.loads((tmp_path / "results.json").read_text())
    for found in record["runs"].values():
        found["versions"] = {"commit": "another"}
    (tmp_path / "results.json").write_text(json.dumps(record))
    run(quadratic, config)  # drawn again
    for found in runs["error by step"].values():
        assert 0.95 < found["slope"] < 1.15
        assert max(found["finite step"]) < 1e-6
    for found in runs["averaged"].values():
        half = np.array(found["half the Hessian"])
        np.testing.assert_allclose(found["mean ω / σ²"], half, atol=0.2)
    np.testing.assert_allclose(
        runs["averaged"]["diagonal"]["median Ω"],
        runs["averaged"]["diagonal"]["half the Hessian"],
        rtol=0.03,
    )
    noisy = runs["noisy"]
    for name in (*quadratic.OPTIMIZERS, "SGD, predicted"):
        small, full = np.mean(noisy[name]["by batch size"], axis=1)
        assert small > full
        assert 0.98 < full < 1.1, "no noise, no excess"
    np.testing.assert_allclose(
        noisy["SGD"]["by batch size"],
        noisy["SGD, predicted"]["by batch size"],
        rtol=0.3,
    )


@pytest.mark.parametrize("experiment", [quadratic, surrogate])
def test_shipped_configurations_are_the_defaults(experiment):
    name = experiment.__name__.split(".")[-1]
    assert command.parse(experiment.Config, name, []) == experiment.Config()
