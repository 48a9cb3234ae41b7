"""The importances after the first task, and how they correlate."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy import stats

from experiments.engine import command, programs
from experiments.engine.programs import Problem
from experiments.training.loop import Learner
from experiments.why.config import CORRELATED, Config
from experiments.why.parts import number


def measure(
    config: Config, make: Callable[..., Learner], problem: Problem
) -> dict[str, Any]:
    """The networks' importances after the first task.

    Returns:
      ``seconds``; ``ω``: sums of ω, of the unbiased one, and the loss drop,
      ``(networks,)`` each, without the task's last step, whose next gradient is not
      there; ``scale``: the importances' means over parameters and networks;
      ``layers``: by layer, what :func:`correlate` finds, ``(networks, …)``.
    """
    begin, seeds = time.perf_counter(), np.arange(config.networks)
    pieces = programs.compile_pieces(make, problem, len(seeds), config.max_parallel)

    def runs(name: str) -> Any:
        values = {
            "strength": 0.0,
            "damping": config.damping,
            "importance": number(name),
        }
        every = {k: np.full(len(seeds), x, np.float32) for k, x in values.items()}
        return pieces.to_devices((seeds.astype(np.uint32), every))

    own = runs("si")
    carry, loss_drop = pieces.init(own), np.zeros(len(seeds))
    for i in range(config.epochs):
        carry, report = pieces.epoch(carry, own, 0, i)
        loss_drop += pieces.to_host(report.loss_drop)
    end = pieces.to_host(carry)
    synaptic, watched, *_ = end.opt_state

    def total(tree):
        return sum(np.sum(x, tuple(range(1, x.ndim))) for x in jax.tree.leaves(tree))

    if not np.isfinite(total(end.params)).all():
        raise command.UserError(
            "A network diverged in the first task: there is nothing to measure. Lower "
            "the learning rate."
        )
    found = {}
    for name in CORRELATED:
        # A copy, as the boundary donates what it is given.
        after = pieces.finish(pieces.to_devices(end), runs(name), 0, config.epochs)
        found[name] = pieces.to_host(after.opt_state[2].importance)
    size = sum(x[0].size for x in jax.tree.leaves(found["si"]))
    layers = {}
    for i in range(len(config.hidden) + 1):
        kernels = {k: x["params"][f"Dense_{i}"]["kernel"] for k, x in found.items()}
        each = [correlate({k: x[run] for k, x in kernels.items()}) for run in seeds]
        layers[f"layer {i + 1}"] = {k: [x[k] for x in each] for k in each[0]}
    return {
        "points": {"seed": seeds},
        "seconds": time.perf_counter() - begin,
        "ω": {
            "sum": total(synaptic.synapses.path_integral),
            "unbiased": total(watched.path_integral),
            "loss drop": loss_drop,
        },
        "scale": {k: float(total(x).mean() / size) for k, x in found.items()},
        "layers": layers,
    }


def correlate(kernels: dict[str, np.ndarray]) -> dict[str, Any]:
    """Rank and linear correlations of all pairs, where the Hessian's diagonal is not 0.

    The other parameters belong to pixels that are always blank and units that are
    always silent; they would all be ties.

    Returns:
      ``alive``, their fraction, and ``rank`` and ``linear``, ``(names, names)`` each.
    """
    alive = kernels["hessian"] > 0
    values = np.stack([kernels[name][alive] for name in kernels]).astype(np.float64)
    return {
        "alive": float(alive.mean()),
        "rank": np.corrcoef(stats.rankdata(values, axis=-1)),
        "linear": np.corrcoef(values),
    }
