"""Between the parameters before a task and after it: averaging with θ̃."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from si_jax import checks
from si_jax.pytrees import wide
from si_jax.state import Shared, reference, refuse_twice, remembered, require


def merge(
    opt_state: optax.OptState, params: optax.Params, weight: ArrayLike | optax.Params
) -> optax.Params:
    r"""Parameters between θ̃ and θ: what was known before the task, and what it taught.

    Evenly, with a number w for ``weight``,

    .. math::

      \theta_k \leftarrow (1 - w)\,\tilde\theta_k + w\,\theta_k,

    or by importance, with that of the new task, F, for ``weight``: where
    Σ Ω (θ − θ̃)² + Σ F (θ − θ_new)², the two tasks' losses to second order, is smallest,

    .. math::

      \theta_k \leftarrow \frac{\Omega_k\,\tilde\theta_k + F_k\,\theta_k}
        {\Omega_k + F_k}.

    It takes no training: choose ``weight`` on held-out data of both tasks. It serves
    networks that are fine-tuned from good parameters, whose loss is about convex in
    between; between tasks that have little in common it destroys both. Adapters (LoRA)
    are no weights, and the mean of two is not that of their products: with B = 0 at the
    start, multiply A B by w.

    Pure, of the optimizer's state, too. For a next task, Ω is of the path and θ̃ is to
    be what was merged: consolidate with ``params``, then with the result, and take a
    fresh optimizer (:func:`si_jax.reset_optimizer`).

    Args:
      opt_state: the state of an optimizer with a memory, Synaptic Intelligence, EWC,
        Kronecker factors or products of adapters, before the task's end is
        consolidated. With strength 0, it only keeps θ̃.
      params: the parameters after the task.
      weight: w, between 0, which gives θ̃, and 1, which gives ``params``; may be traced.
        A scalar is a number, also where ``params`` is one. Or F: a tree of arrays at
        least 0 like ``params``, in the units of Ω (:func:`si_jax.importance.fisher`,
        :func:`si_jax.importance.second_moment`, of the new task); times a number to
        prefer one of the two. Where Ω is not above 0, ``params`` stays.

    Returns:
      A tree like ``params``, of its dtypes. What ``optax.masked`` hides from the memory
      stays as it is.

    Raises:
      ValueError: if there is no memory in ``opt_state``, or several of a parameter (SI
        and EWC: pass the part that you mean), if ``params`` or ``weight`` do not fit
        it, if ``weight`` is outside of [0, 1], negative or not finite (when it is
        concrete), or is a tree and the memory of Kronecker factors or of products.

    Example:
      >>> import jax.numpy as jnp, optax, si_jax
      >>> tx = si_jax.with_synaptic_intelligence(optax.sgd(0.1))
      >>> pretrained, tuned = jnp.array([0.0, 0.0]), jnp.array([1.0, 1.0])
      >>> opt_state = tx.init(pretrained)
      >>> print(si_jax.merge(opt_state, tuned, 0.25))
      [0.25 0.25]
      >>> opt_state = si_jax.add_importance(opt_state, jnp.array([3.0, 0.0]))
      >>> print(si_jax.merge(opt_state, tuned, jnp.array([1.0, 1.0])))
      [0.25 1.  ]

    References:
      Wortsman et al., `Robust fine-tuning of zero-shot models
      <https://arxiv.org/abs/2109.01903>`_, CVPR 2022; Matena & Raffel, `Merging Models
      with Fisher-Weighted Averaging <https://arxiv.org/abs/2111.09832>`_, NeurIPS 2022
    """
    memories = require(opt_state)
    refuse_twice(memories)
    even = jax.tree_util.all_leaves([weight]) and jnp.ndim(weight) == 0
    if even:
        w = checks.number("weight", weight)
        if w is not None and not 0 <= w <= 1:
            raise ValueError(
                "weight must be between 0, the parameters before the task, and 1, "
                f"those after it; got {weight}."
            )
    merged: dict[Any, jax.Array] = {}
    for state in memories:
        checks.scalar(state.strength)
        between = _evenly if even else _by_importance
        found = between(state, params, weight)
        merged |= jax.tree_util.tree_leaves_with_path(found)
    real, imaginary = map(jax.tree_util.GetAttrKey, ("real", "imaginary"))

    def replaced(path: Any, p: Any) -> Any:
        if (*path, real) in merged:
            parts = merged[*path, real], merged[*path, imaginary]
            return jax.lax.complex(*parts).astype(jnp.result_type(p))
        if path in merged:
            return merged[path].astype(jnp.result_type(p))
        return p

    return jax.tree_util.tree_map_with_path(replaced, params)


def _evenly(state: Any, params: optax.Params, weight: ArrayLike) -> optax.Params:
    before = reference(state)
    after = checks.aligned(params, before, "params")
    return jax.tree.map(
        lambda p, ref: _mean(p, ref, jnp.asarray(weight)), after, before
    )


def _by_importance(state: Any, params: optax.Params, new: optax.Params) -> optax.Params:
    if isinstance(state, Shared):
        raise ValueError(
            "opt_state remembers with Kronecker factors or products of adapters, in "
            "which a parameter has no importance of its own: weight must be a number."
        )
    omega, before = remembered(state)
    after = checks.aligned(params, before, "params")
    new = checks.importances(new, before)

    def between(p: jax.Array, ref: jax.Array, old: jax.Array, f: jax.Array) -> Any:
        old = jnp.maximum(wide(old), 0)
        f = f.astype(old.dtype)
        return _mean(p, ref, jnp.where(old + f > 0, f / (old + f), 1))

    return jax.tree.map(between, after, before, omega, new)


def _mean(p: jax.Array, ref: jax.Array, share: jax.Array) -> jax.Array:
    """In float32 at least; exactly one of them where ``share`` is 0 or 1."""
    p = wide(p)
    share = share.astype(p.dtype)
    return (1 - share) * ref.astype(p.dtype) + share * p
