"""The importances are what they are called; the experiment, on made-up digits."""

import json

import jax
import jax.numpy as jnp
import made_up
import numpy as np
import optax
import problem
import pytest

import si_jax
from experiments.engine import command
from experiments.engine.run import Label, Run
from experiments.networks.models import MLP
from experiments.training.loop import Carry
from experiments.why import __main__ as why
from experiments.why import figures, findings, measures, parts
from experiments.why.config import CORRELATED, TITLES, Config
from si_jax import ewc


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    made_up.write(folder, "mnist", train=240, test=60)
    return folder


def make_config(folder, out=None, **settings):
    small = {
        "batch_sizes": (16,),
        "seeds": 2,
        "networks": 2,
        "pulls": (0.0, 1.0),
        "epochs": 2,
        "hidden": (8,),
        "importance_examples": 10,
        "held_out": 0.2,
    }
    return Config(data_dir=folder, out=out, **(small | settings))


def run(config):
    with jax.numpy_dtype_promotion("standard"):
        why.run(config)
    return json.loads((config.out / "results.json").read_text())


# --- The importances ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Ω after two tasks by the core's two rules; what is held instead; the steps."""
    links = {
        "si": si_jax.synaptic_intelligence(0.0, 0.1),
        "unbiased": si_jax.synaptic_intelligence(0.0, 0.1, unbiased=True),
    }
    boundaries = parts.boundaries(MLP((8,), 10), 1, 1)
    names = ("l2", "si", "unbiased", "absolute", "squared")
    tx = optax.named_chain(
        ("si", links["si"]),
        ("watched", parts.watch()),
        ("ewc", ewc.elastic_weight_consolidation(0.0, decay=1.0)),
        ("adam", problem.OPTIMIZERS["adam"]),
    )

    def core(link):
        both = optax.chain(link, problem.OPTIMIZERS["adam"])
        _, _, state = problem.train(both, problem.init(), tasks=2)[-1]
        return si_jax.synapses(state).importance

    def held(name):
        @jax.jit  # as in a run; by itself a negative importance is refused
        def held_by(carry):
            return boundaries[name](carry)

        def boundary(_, state, params):
            state = held_by(Carry(params, state)).opt_state
            state = si_jax.consolidate(state, params)
            return state | {"watched": parts.watch().init(params)}

        history = problem.train(tx, problem.init(), tasks=2, boundary=boundary)
        return history[-1][-1]["ewc"].importance, history

    return {k: core(x) for k, x in links.items()}, {k: held(k) for k in names}


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


def test_both_rules_are_the_cores(trained):
    core, held = trained
    for name, expected in core.items():
        close(held[name][0], expected)
    kernels = [core[name]["kernel"] for name in core]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2, "they differ"


def test_gradients_are_summed_over_the_tasks(trained):
    _, held = trained
    assert all((x == 2).all() for x in jax.tree.leaves(held["l2"][0])), "1 a task"
    for name, of in (("absolute", jnp.abs), ("squared", jnp.square)):
        found, history = held[name]
        gradients = [g for visited, *_ in history for g, _ in visited]
        sums = jax.tree.map(lambda *g, of=of: sum(map(of, g)), *gradients)
        close(found, sums)


def test_the_bias_is_what_the_rules_differ_in():
    """In eq. 5's numerator, of one task whose sums are all positive."""
    params, moved = {"w": jnp.array([0.5, 0.5])}, {"w": jnp.array([1.0, 2.0])}
    tx = optax.named_chain(
        ("si", si_jax.synaptic_intelligence(0.0, 1.0)),
        ("watched", parts.watch()),
        ("ewc", ewc.elastic_weight_consolidation(0.0, decay=1.0)),
    )
    opt_state = tx.init(params)
    synaptic, watched = opt_state["si"], opt_state["watched"]
    synapses = synaptic.synapses._replace(path_integral={"w": jnp.array([5.0, 1.0])})
    synaptic = synaptic._replace(
        synapses=synapses, last_grads={"w": jnp.array([-100.0, -100.0])}
    )
    watched = watched._replace(path_integral={"w": jnp.array([3.0, 2.0])})
    carry = Carry(moved, opt_state | {"si": synaptic, "watched": watched})
    after = parts.boundaries(MLP((8,), 10), 1, 1)["bias"](carry).opt_state["ewc"]
    np.testing.assert_allclose(after.importance["w"], [(5 - 3) / 1.25, 0], rtol=1e-6)


def test_numbers_are_those_of_the_boundaries():
    boundaries = list(parts.boundaries(MLP((8,), 10), 1, 1))
    assert list(TITLES) == ["fine-tuning", *boundaries]
    run = Run(Label("si"), None, None, [0], 1, {"strength": 0.0})
    for i, name in enumerate(boundaries):
        held = parts.holding(run, name)
        assert held.hyperparameters == {"strength": 0.0, "importance": i}
    assert parts.holding(run, "fine-tuning").hyperparameters["importance"] == 0


def test_correlations_leave_out_what_is_dead():
    hessian = np.array([0.0, 0.0, 1.0, 2.0, 3.0])
    found = measures.correlate(
        {"si": hessian**3 + 1, "mas": -hessian, "hessian": hessian}
    )
    assert found["alive"] == 0.6
    np.testing.assert_allclose(
        found["rank"], [[1, -1, 1], [-1, 1, -1], [1, -1, 1]], atol=1e-12
    )
    assert 0.9 < found["linear"][0, 2] < 1


# --- The experiment -------------------------------------------------------------------


@pytest.mark.slow
def test_importances_are_measured_chosen_and_learned_with(folder, tmp_path, capsys):
    config = make_config(folder, tmp_path, importances=("fine-tuning", "si"))
    record = run(config)
    runs = record["runs"]
    measures = findings.measured(runs)[16]
    assert list(measures["layers"]) == ["layer 1", "layer 2"]
    assert np.shape(measures["layers"]["layer 1"]["rank"]) == (2, 11, 11)
    i, j = (CORRELATED.index(x) for x in ("fisher", "root fisher"))
    ranks = np.asarray(measures["layers"]["layer 1"]["rank"])
    np.testing.assert_allclose(ranks[:, i, j], 1, atol=1e-6)
    omega = measures["ω"]
    np.testing.assert_allclose(
        sum(findings.shares(omega).values()),
        1 - np.divide(omega["unbiased"], omega["sum"]),
        rtol=1e-5,
    )
    found = dict(findings.tested(runs))
    assert set(found) == {(16, "fine-tuning"), (16, "si")}
    assert np.shape(found[16, "si"]["test"]) == (2, 5, 5)
    assert runs["batch 16: si, grid"]["points"]["strength"][0] == 0
    printed = capsys.readouterr().out
    for table in (
        findings.bias_table(runs),
        findings.correlation_table(runs, "si"),
        findings.choice_table(config, runs),
        findings.accuracy_table(runs),
    ):
        assert table in printed
    for name in ("why", "why_correlations"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert run(config) == record


@pytest.mark.slow
def test_the_permuted_network_is_only_measured_if_asked_to_learn_with_none(
    folder, tmp_path
):
    settings = {"network": "permuted", "importances": (), "tasks": 2, "hidden": (32,)}
    runs = run(make_config(folder, tmp_path, **settings))["runs"]
    assert list(runs) == ["batch 16: measures"]
    assert min(runs["batch 16: measures"]["layers"]["layer 1"]["alive"]) > 0


@pytest.mark.parametrize("shuffled", [False, True])
def test_bias_by_noise_and_by_long_steps_are_told_apart(shuffled):
    rng, rate, hessian = np.random.default_rng(0), 0.3, np.array([1.0, 4.0])
    theta = np.ones((1000, 2))  # runs
    noise = rng.normal(size=(34, 3, *theta.shape))
    if shuffled:  # then an epoch's noise sums to 0
        noise -= noise.mean(1, keepdims=True)
    noise = noise.reshape(-1, *theta.shape)
    total = unbiased = paid = np.zeros(len(theta))
    loss = [0.5 * (hessian * theta**2).sum(-1)]
    gradient = hessian * theta + noise[0]
    for following in noise[1:]:
        step = -rate * gradient
        paid = paid - ((gradient - hessian * theta) * step).sum(-1)
        theta = theta + step
        total = total - (gradient * step).sum(-1)
        gradient = hessian * theta + following
        unbiased = unbiased - (gradient * step).sum(-1)
        loss.append(0.5 * (hessian * theta**2).sum(-1))
    omega = {"sum": total, "unbiased": unbiased, "loss drop": loss[0] - loss[-1]}
    found = findings.shares({name: [np.mean(x)] for name, x in omega.items()})
    share = np.mean(paid) / np.mean(total)
    if shuffled:
        assert 0.5 * share < found["noise"] < 0.95 * share, "too little"
    else:
        np.testing.assert_allclose(found["noise"], share, rtol=0.01)
    assert found["long steps"] > 0.1
    np.testing.assert_allclose(
        sum(found.values()), 1 - np.mean(unbiased) / np.mean(total), rtol=1e-6
    )


def test_the_figure_has_the_bias_and_the_accuracies():
    figure = figures.by_batch_size(
        {"noise": {32: [0.5, 0.7], 256: [0.1, 0.1]}, "long steps": {32: [0.0]}},
        {"SI": {32: [0.9], 256: [0.8, 0.6]}},
    )
    left, right = figure.axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [0.6, 0.1], rtol=1e-6)
    np.testing.assert_allclose(right.lines[0].get_ydata(), [0.9, 0.7], rtol=1e-6)


@pytest.mark.parametrize("path", sorted(command.CONFIGS.glob("why*.toml")))
def test_shipped_configurations_are_valid(path):
    config = command.parse(Config, "why", ["--config", str(path)])
    assert (config == Config()) == (path.stem == "why")
