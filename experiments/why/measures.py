"""The importances after the first task, and how they correlate."""

import time
from typing import Any

import jax
import numpy as np
from scipy import stats

from experiments.engine import command
from experiments.engine.programs import Pieces
from experiments.engine.run import Run
from experiments.why.config import CORRELATED
from experiments.why.parts import holding


def measure(run: Run, max_parallel: int | None = None) -> dict[str, Any]:
    """The networks' importances after the first task.

    Args:
      run: of :func:`make_learner`, a seed a network.
      max_parallel: how many of them side by side on a device.

    Returns:
      ``seconds``; ``ω``: sums of ω, of the unbiased one, and the loss drop,
      ``(networks,)`` each, without the task's last step, whose next gradient is not
      there; ``scale``: the importances' means over parameters and networks;
      ``layers``: by layer, what :func:`correlate` finds, ``(networks, …)``.
    """
    begin, networks = time.perf_counter(), range(len(run.seeds))
    pieces = Pieces(holding(run, "si"), max_parallel)
    carry, loss_drop = pieces.init(), np.zeros(len(networks))
    for i in range(run.epochs):
        carry, report = pieces.epoch(carry, 0, i)
        loss_drop += pieces.to_host(report.loss_drop)
    end = pieces.to_host(carry)
    synaptic, watched = end.opt_state["si"], end.opt_state["watched"]

    def total(tree):
        return sum(np.sum(x, tuple(range(1, x.ndim))) for x in jax.tree.leaves(tree))

    if not np.isfinite(total(end.params)).all():
        raise command.UserError(
            "A network diverged in the first task: there is nothing to measure. Lower "
            "the learning rate."
        )
    importances = {}
    for name in CORRELATED:
        # A copy, as the boundary donates what it is given.
        with_it = pieces.of(holding(run, name))
        after = with_it.finish(pieces.to_devices(end), 0, run.epochs)
        importances[name] = pieces.to_host(after.opt_state["ewc"].importance)
    size = sum(x[0].size for x in jax.tree.leaves(importances["si"]))
    layers = {}
    for number, layer in enumerate(sorted(importances["si"]["params"]), start=1):
        kernels = {k: x["params"][layer]["kernel"] for k, x in importances.items()}
        each = [correlate({k: x[i] for k, x in kernels.items()}) for i in networks]
        layers[f"layer {number}"] = {k: [x[k] for x in each] for k in each[0]}
    return {
        "points": {"seed": list(run.seeds)},
        "seconds": time.perf_counter() - begin,
        "ω": {
            "sum": total(synaptic.synapses.path_integral),
            "unbiased": total(watched.path_integral),
            "loss drop": loss_drop,
        },
        "scale": {k: float(total(x).mean() / size) for k, x in importances.items()},
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
