"""Which parameters are held, how hard, and how far they went."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from si_jax import checks, surrogate
from si_jax.ewc import ElasticWeightConsolidationState
from si_jax.pytrees import align, path_names, wide
from si_jax.state import remembered, require_once
from si_jax.transform import SynapticIntelligenceState, observe


class Diagnosis(NamedTuple):
    """What :func:`diagnose` found: dicts of scalars by the names of the leaves.

    ``print`` shows it as a table, with a line below for what points to a mistake.

    Attributes:
      importance: ΣΩ, in loss per squared parameter.
      max_importance: the largest Ω.
      share: ΣΩ over that of all leaves; 0 before the first task has ended.
      path_integral: Σω, in units of the loss, of the task so far. EWC has none.
      penalty: c Σ Ω (θ̃ − θ)², in units of the loss.
      displacement: the root of the mean of (θ − θ̃)², in units of the parameter.
    """

    importance: dict[str, jax.Array]
    max_importance: dict[str, jax.Array]
    share: dict[str, jax.Array]
    path_integral: dict[str, jax.Array]
    penalty: dict[str, jax.Array]
    displacement: dict[str, jax.Array]

    def __str__(self) -> str:
        """A table with a row for each leaf and the sums below."""
        if any(isinstance(x, jax.core.Tracer) or x.ndim for x in self.share.values()):
            return repr(self)  # under jit, or of several networks
        report = Diagnosis(*jax.device_get(tuple(self)))

        def row(name: str) -> list[str]:
            columns = (column.get(name) for column in report)
            return [name, *("" if x is None else f"{x:.3g}" for x in columns)]

        sums = {"importance", "share", "path_integral", "penalty"}
        rows = [["", "ΣΩ", "max Ω", "share", "Σω", "penalty", "displacement"]]
        rows += map(row, report.share)
        rows += [
            ["all"]
            + [
                f"{sum(column.values()):.3g}" if name in sums and column else ""
                for name, column in report._asdict().items()
            ]
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [first.ljust(widths[0])]
                + [x.rjust(w) for x, w in zip(rest, widths[1:], strict=True)]
            ).rstrip()
            for first, *rest in rows
        ]
        return "\n".join(lines + _remarks(report))


def _remarks(report: Diagnosis) -> list[str]:
    """What in the table points to a mistake; the columns are NumPy's."""
    omega, earned, moved = report.importance, report.path_integral, report.displacement
    # The sum is no finite number where either is none.
    sums = {name: x + earned.get(name, 0) for name, x in omega.items()}
    no_number = [name for name, x in sums.items() if not math.isfinite(x)]
    resting = [name for name, x in earned.items() if x and not moved[name]]
    remarks = []
    if no_number:
        remarks.append(f"Ω or ω is no finite number: {', '.join(no_number)}.")
    if not any(omega.values()):
        remarks.append(
            "Nothing is held: no task has ended since init made this state, or none "
            "earned ω > 0. (carry_over takes the memory into a new state.)"
        )
    if sum(earned.values()) < 0:
        remarks.append(
            "Σω < 0: the loss rose. To maximise, pass the gradient of the negative."
        )
    if resting:
        remarks.append(
            f"Earned ω, but did not move: {', '.join(resting)}. What freezes it "
            "belongs inside of the wrapper."
        )
    if earned and not any(earned.values()) and any(moved[name] for name in earned):
        remarks.append(
            "Parameters moved, but earned no ω. If not by the optimizer, take the link."
        )
    return remarks


def diagnose(opt_state: optax.OptState, params: optax.Params) -> Diagnosis:
    """By leaf: how important it is, what it earned, how far it went, what that costs.

    Pure; works under ``jit`` and ``vmap``.

    Args:
      opt_state: the state of an optimizer that contains Synaptic Intelligence or EWC.
      params: the current parameters.

    Returns:
      A :class:`Diagnosis`.

    Raises:
      ValueError: if there is no memory in ``opt_state`` or more than one of a parameter
        (SI and EWC: pass the part that you mean), if ``params`` does not fit it, or if
        the state is batched (then call it inside ``jax.vmap``).

    Example:
      >>> import jax.numpy as jnp, optax, si_jax
      >>> tx = si_jax.with_synaptic_intelligence(optax.sgd(0.1), strength=0.5)
      >>> params = {"body": jnp.zeros(2), "head": jnp.zeros(2)}
      >>> importance = {"body": jnp.array([1.0, 2.0]), "head": jnp.array([1.0, 0.0])}
      >>> opt_state = si_jax.add_importance(tx.init(params), importance)
      >>> grads = {"body": jnp.array([-20.0, 0.0]), "head": jnp.array([0.0, -40.0])}
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(si_jax.diagnose(opt_state, params))
            ΣΩ  max Ω  share   Σω  penalty  displacement
      body   3      2   0.75   40        2          1.41
      head   1      1   0.25  160        0          2.83
      all    4             1  200        2
    """
    leaves: dict[Any, tuple[Any, ...]] = {}
    for state in require_once(opt_state):
        importance, reference = remembered(state)
        now = align(params, reference, "params")
        c = checks.scalar(state.strength)
        terms = surrogate.penalty(now, importance, reference, c.dtype)
        elastic = isinstance(state, ElasticWeightConsolidationState)
        if isinstance(state, SynapticIntelligenceState):
            state = observe(state, now, state.last_grads)  # of the last step, too
        earned = importance if elastic else state.synapses.path_integral
        for (path, omega), w, term, ref, p in zip(
            jax.tree_util.tree_leaves_with_path(importance),
            *map(jax.tree.leaves, (earned, terms, reference, now)),
            strict=True,
        ):
            leaves[path] = omega, None if elastic else w, c * term, ref, p
    named = dict(zip(path_names(list(leaves)), leaves.values(), strict=True))
    importance = {name: wide(omega).sum() for name, (omega, *_) in named.items()}
    total = sum(importance.values())
    return Diagnosis(
        importance=importance,
        max_importance={
            name: wide(omega).max() if omega.size else jnp.zeros_like(importance[name])
            for name, (omega, *_) in named.items()
        },
        share={
            name: jnp.where(total == 0, 0, x / jnp.where(total == 0, 1, total))
            for name, x in importance.items()
        },
        path_integral={
            name: wide(w).sum() for name, (_, w, *_) in named.items() if w is not None
        },
        penalty={name: penalty for name, (_, _, penalty, *_) in named.items()},
        displacement={
            name: _root_mean_square(p, ref) for name, (*_, ref, p) in named.items()
        },
    )


def _root_mean_square(p: jax.Array, ref: jax.Array) -> jax.Array:
    moved = wide(p) - ref.astype(wide(p).dtype)
    return jnp.sqrt(jnp.sum(jnp.square(moved)) / max(moved.size, 1))
