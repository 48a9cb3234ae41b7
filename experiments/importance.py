"""SI's importance beside the Hessian: ``python -m experiments.importance``.

The paper finds them correlated, in practice; this says how much, on a trained network.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from scipy import stats
from tqdm import tqdm

import si_jax
from experiments import figures, split_mnist
from experiments.data.tasks import Task, look_up
from experiments.engine import command
from experiments.engine.record import Record, is_first
from experiments.engine.run import Problem
from experiments.engine.tables import aligned
from experiments.networks.models import MLP
from experiments.training.loop import epoch_key, init_key
from si_jax.importance import fisher

MEASURES = ("importance", "path integral", "Fisher, sampled")


@dataclasses.dataclass(frozen=True)
class Config(split_mnist.Setting):
    """Importances of the split MNIST network after its first task, by layer."""

    seeds: int = 3
    """Networks, with the seeds 0, 1, …"""
    damping: float = 1e-3
    """ξ of eq. 5."""
    examples: int = 4000
    """Of the first task, for the Hessian and the Fisher information."""

    def __post_init__(self):
        """Refuse values that make no sense."""
        super().__post_init__()
        self.check(positive=("damping",), at_least_1=("seeds", "examples"))


def measure(config: Config, problem: Problem, seed: int) -> dict[str, Any]:
    """Train on the first task; each kernel's importances at its end.

    The logits of a ReLU net are piecewise linear in any one parameter, so that the
    exact Fisher diagonal is the Hessian's.
    """
    make = split_mnist.make_learner(config, optax.adam(config.learning_rate))
    learner = make(strength=0.0, damping=config.damping)
    key = jax.random.key(seed)
    task = jax.tree.map(lambda x: x[0], problem.train_tasks)
    carry = jax.jit(learner.init)(init_key(key))
    epoch = jax.jit(learner.epoch)
    for i in range(config.epochs):
        carry, _ = epoch(carry, problem.train, task, epoch_key(key, 0, i))
    params = carry.params
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        raise command.UserError(
            f"The network of seed {seed} diverged: there is nothing to measure. Lower "
            "the learning rate."
        )
    consolidated = si_jax.consolidate(carry.opt_state, params)
    model = MLP(config.hidden, 10, config.zero_init_output)
    heads = np.flatnonzero(task.classes)

    @jax.jit
    def at_the_end(params: optax.Params, examples: Any, task: Task) -> Any:
        images, _ = look_up(examples, task.rows[: config.examples])

        def logits(params, image):
            out: Any = model.apply(params, image[None])
            return out[0, heads]

        sampled = fisher(logits, params, images, epoch_key(key, 1, 0))
        return sampled, fisher(logits, params, images, exact=True)

    sampled, exact = at_the_end(params, problem.train, task)
    trees = {
        "Hessian": exact,
        "importance": si_jax.synapses(consolidated).importance,
        "path integral": si_jax.synapses(carry.opt_state).path_integral,
        "Fisher, sampled": sampled,
    }
    return {
        f"layer {i + 1}": {
            name: np.asarray(tree["params"][f"Dense_{i}"]["kernel"])
            for name, tree in trees.items()
        }
        for i in range(len(config.hidden) + 1)
    }


def correlate(layer: dict[str, np.ndarray]) -> dict[str, Any]:
    """Correlations with the Hessian's diagonal, over the parameters where it is not 0.

    The others belong to pixels that are always blank and units that are always silent;
    they would all be ties.
    """
    alive = layer["Hessian"] > 0
    hessian = layer["Hessian"][alive]
    found: dict[str, Any] = {"alive": float(alive.mean())}
    for name in MEASURES:
        values = layer[name][alive]
        found[name] = {
            "rank": float(stats.spearmanr(values, hessian).statistic),
            "linear": float(stats.pearsonr(values, hessian).statistic),
        }
    return found


def run(config: Config) -> None:
    """Measure every network that is not there yet; print and draw."""
    record = Record("importance", config, default=config.data)
    todo = [seed for seed in range(config.seeds) if f"seed {seed}" not in record.runs]
    problem = split_mnist.make_problem(config) if todo else None
    for seed in tqdm(todo, "networks", disable=None):
        assert problem is not None
        layers = measure(config, problem, seed)
        found: dict[str, Any] = {
            "correlations": {name: correlate(layer) for name, layer in layers.items()}
        }
        if seed == 0:
            found["sample"] = {k: sample(layer) for k, layer in layers.items()}
        record.add(f"seed {seed}", found, lambda _: {})
    if is_first():
        print(
            f"Correlation with the Hessian's diagonal, n = {config.seeds}: rank, linear"
        )
        print(table(record.runs))
        drawn = record.runs["seed 0"]["sample"]
        record.save("importance", figures.importances(drawn))
        print(f"\nEverything is in {record.folder}.")


def sample(layer: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """1000 parameters to draw: their Hessian and importance, to three digits."""
    rows = np.flatnonzero(layer["Hessian"] > 0)
    rows = np.random.default_rng(0).permutation(rows)[:1000]
    return {
        name: [float(f"{x:.3g}") for x in layer[name].ravel()[rows]]
        for name in ("Hessian", "importance")
    }


def table(runs: dict[str, Any]) -> str:
    """A row a layer, a column a measure: mean ± deviation over the networks."""
    rows = [["", "alive", *MEASURES]]
    for layer in next(iter(runs.values()))["correlations"]:
        found = [run["correlations"][layer] for run in runs.values()]
        row = [layer, f"{np.mean([x['alive'] for x in found]):.2f}"]
        for name in MEASURES:
            both = [[x[name][kind] for x in found] for kind in ("rank", "linear")]
            row.append(", ".join(f"{np.mean(x):.2f} ± {np.std(x):.2f}" for x in both))
        rows.append(row)
    return aligned(rows)


if __name__ == "__main__":
    command.main(Config, "importance", run)
