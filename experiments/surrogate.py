"""The paper's Figs. 1 and 2, from runs: ``python -m experiments.surrogate``."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import si_jax
from experiments import figures
from experiments.engine import command
from experiments.engine.record import Record, is_first

Loss = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Two tasks of two parameters (Fig. 1), and one of one parameter (Fig. 2)."""

    learning_rate: float = 0.01
    """η of gradient descent."""
    steps: int = 3000
    """Of each task."""
    strength: float = 1.0
    """c of eq. 4."""
    damping: float = 1e-6
    """ξ of eq. 5."""

    def __post_init__(self):
        """Refuse values that make no sense."""
        self.check(positive=("learning_rate", "damping"), at_least_1=("steps",))
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength must be >= 0, got {self.strength}")


def task_1(theta: jax.Array) -> jax.Array:
    """Needs the second parameter, hardly the first."""
    return 0.03 * jnp.square(theta[0] + 0.5) + 1.5 * jnp.square(theta[1] - 1)


def task_2(theta: jax.Array) -> jax.Array:
    """Asks for a combination of both."""
    return jnp.square(theta[0] - theta[1] - 1) + 0.03 * jnp.square(theta[1] + 1)


TASKS = (task_1, task_2)
START = np.array([-1.5, -1.5], np.float32)


def bump(theta: jax.Array) -> jax.Array:
    """One parameter: steep near its minimum at 0, flat far from it."""
    return 1 - jnp.exp(-jnp.square(theta)) + 0.02 * jnp.square(theta)


class Descent(NamedTuple):
    """A run of gradient descent with Synaptic Intelligence.

    Attributes:
      path: the parameters visited, ``(tasks, steps + 1, …)``.
      opt_state: after the last task, consolidated.
    """

    path: jax.Array
    opt_state: optax.OptState


@functools.partial(jax.jit, static_argnames=("losses", "config"))
def descend(
    losses: tuple[Loss, ...], start: jax.Array, strength: float, config: Config
) -> Descent:
    """Learn one task after the other."""
    tx = si_jax.with_synaptic_intelligence(
        optax.sgd(config.learning_rate), strength, config.damping
    )
    params, opt_state, paths = start, tx.init(start), []
    for loss in losses:

        def step(carry, _, loss=loss):
            params, opt_state = carry
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), params

        carry, path = jax.lax.scan(step, (params, opt_state), length=config.steps)
        params, opt_state = carry
        paths.append(jnp.concatenate([path, params[None]]))
        opt_state = si_jax.consolidate(opt_state, params)
    return Descent(jnp.stack(paths), opt_state)


def two_tasks(config: Config) -> dict[str, Any]:
    """Fig. 1: both trajectories, and where they end on either loss."""
    by_method: dict[str, Any] = {}
    # Most of the way is made in the first steps.
    drawn = np.unique(np.geomspace(1, config.steps + 1, 120).astype(int)) - 1
    for name, c in (("fine-tuning", 0.0), ("SI", config.strength)):
        path = descend(TASKS, jnp.asarray(START), c, config).path
        by_method[name] = {
            "path": path[:, drawn],
            "losses": [loss(path[-1, -1]) for loss in TASKS],
        }
    return by_method


def one_task(config: Config) -> dict[str, Any]:
    """Fig. 2: the loss, the surrogate loss and the Hessian's quadratic on a grid."""
    start = jnp.float32(-2.5)
    run = descend((bump,), start, 1.0, config)
    end = run.path[-1, -1]
    grid = jnp.linspace(-3, 2, 201)

    def surrogate(theta):
        return bump(end) + si_jax.surrogate_loss(run.opt_state, theta)

    curvature = jax.grad(jax.grad(bump))(end)
    return {
        "grid": grid,
        "loss": jax.vmap(bump)(grid),
        "surrogate": jax.vmap(surrogate)(grid),
        "hessian": bump(end) + curvature / 2 * jnp.square(grid - end),
        "start": [start, bump(start), surrogate(start)],
        "end": [end, bump(end), surrogate(end)],
    }


def run(config: Config) -> None:
    """Compute both, print what they show and draw them."""
    record = Record("surrogate", config)
    for name, part in (("two tasks", two_tasks), ("one task", one_task)):
        if name not in record.runs:
            record.add(name, part(config), lambda _: {})
    if not is_first():
        return
    two, one = record.runs["two tasks"], record.runs["one task"]
    for name, result in two.items():
        first, second = result["losses"]
        print(
            f"{name}: after task 2 the loss of task 1 is {first:.3f}, of 2 {second:.3f}"
        )
    drop, matched = (one["start"][i] - one["end"][i] for i in (1, 2))
    print(f"the loss fell by {drop:.3f}, the surrogate loss by {matched:.3f}")
    record.save("figure_1", figure_1(two))
    record.save("figure_2", figures.surrogate(one))
    print(f"Everything is in {record.folder}.")


def figure_1(by_method: dict[str, Any]) -> Any:
    """Heat maps of both losses with the trajectories."""
    x, y = jnp.linspace(-2.2, 2.8, 120), jnp.linspace(-2.2, 2.2, 110)
    points = jnp.stack(jnp.meshgrid(x, y), axis=-1).reshape(-1, 2)
    maps = [jax.vmap(loss)(points).reshape(len(y), len(x)) for loss in TASKS]
    paths = {name: np.asarray(run["path"]) for name, run in by_method.items()}
    return figures.trajectories(x, y, maps, paths)


if __name__ == "__main__":
    command.main(Config, "surrogate", run)
