"""Elastic weight consolidation (EWC), the method that the paper compares SI with.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017
(https://arxiv.org/abs/1612.00796). It pulls parameters back with the quadratic
surrogate loss of Synaptic Intelligence, eq. 4 there,

    c Σ F (θ̃ − θ)²,  with c = λ/2 for their λ;

only where the importance comes from differs: F is the diagonal of the Fisher
information at the end of a task, computed by :func:`si_jax.importance.fisher` in a pass
of its own.

The penalties of several tasks are one: the sum of F₁ (θ₁ − θ)² and F₂ (θ₂ − θ)² is
(F₁ + F₂) (θ̃ − θ)², with θ̃ their mean weighted by F, and a constant. So the state does
not grow with the tasks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from si_jax import checks, narrow, surrogate
from si_jax.pytrees import map_states, states, wide


class ElasticWeightConsolidationState(NamedTuple):
    """State of :func:`elastic_weight_consolidation`.

    Attributes:
      importance: ΣF over the finished tasks; float32 at least, or ``state_dtype``.
        Changes at a task's end.
      reference: θ̃, where the surrogate loss is smallest; the dtype of ``importance``,
        as it is a mean. Changes at a task's end.
      strength: c = λ/2 in force at the last update, a scalar; a record, to be set where
        the transformation is made.
      decay: γ of online EWC, likewise; 1 without.
      online: whether it is online EWC, a boolean scalar.
    """

    importance: optax.Params
    reference: optax.Params
    strength: jax.Array
    decay: jax.Array
    online: jax.Array


def elastic_weight_consolidation(
    strength: ArrayLike,
    *,
    decay: ArrayLike | None = None,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EWC as the first link of an optax chain.

    Adds the gradient of the surrogate loss to that of the task,

    .. math::

      g_k \leftarrow g_k + 2\,c\,F_k\,(\theta_k - \tilde\theta_k).

    Pass the gradient of the task's loss alone; there is nothing to add to the loss. At
    every task's end compute its Fisher information and :func:`consolidate`. Beside
    Synaptic Intelligence: behind its link, or inside its wrapper, so that ω sees the
    gradient of the task alone.

    An optimizer that evaluates the loss itself (``optax.lbfgs``) needs Synaptic
    Intelligence's wrapper around the chain, with ``strength=0.0`` for EWC alone: it
    adds this surrogate loss, too, to what the optimizer evaluates. A link cannot, so
    ``value_fn``, ``grad_fn`` and ``obj_fn`` are refused here without it.

    Args:
      strength: c = λ/2, at least 0. May be traced.
      decay: ``None`` adds the tasks' penalties exactly. A number γ in (0, 1] is online
        EWC (Schwarz et al., 2018): F ← γF + F of the new task, and θ̃ the parameters at
        the last task's end.
      state_dtype: of ΣF and θ̃; ``"bfloat16"`` makes it 4 bytes a parameter. At a task's
        end both are rounded up or down by chance (of a hash of F and the parameters),
        so that many small F add up; a parameter is pulled to its rounded value. By
        default float32 at least.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` whose state is an
      :class:`ElasticWeightConsolidationState`.

    Raises:
      ValueError: for a negative ``strength`` or a ``decay`` outside of (0, 1] (when
        they are concrete), a ``state_dtype`` narrower than bfloat16, an update without
        ``params``, with trees that do not fit the state or with functions to be
        evaluated.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from si_jax import ewc
      >>> link = ewc.elastic_weight_consolidation(strength=0.5)
      >>> tx = optax.chain(link, optax.sgd(0.25))
      >>> params = jnp.array([1.0, 1.0])
      >>> opt_state = tx.init(params)
      >>> opt_state = ewc.consolidate(opt_state, params, jnp.array([4.0, 0.0]))
      >>> params = jnp.array([2.0, 2.0])
      >>> updates, opt_state = tx.update(jnp.zeros(2), opt_state, params)
      >>> print(params + updates)  # 2 − 0.25 × 2 × 0.5 × 4 × (2 − 1); the other is free
      [1. 2.]

    References:
      Kirkpatrick et al., `Overcoming catastrophic forgetting in neural networks
      <https://arxiv.org/abs/1612.00796>`_, PNAS 2017; Schwarz et al., `Progress &
      Compress <https://arxiv.org/abs/1805.06370>`_, ICML 2018
    """
    checks.check_state_dtype(state_dtype)
    checks.check_strength(strength)
    gamma = 1.0 if decay is None else decay
    concrete = checks.number("decay", gamma)
    if concrete is not None and not 0 < concrete <= 1:
        raise ValueError(f"decay (γ of online EWC) must be in (0, 1], got {decay}.")

    strength, gamma = checks.frozen(strength), checks.frozen(gamma)

    def hyperparameters(like: Any = 0.0) -> tuple[jax.Array, jax.Array, jax.Array]:
        dtype = jnp.result_type(checks.scalar(like))
        return (
            jnp.array(strength, dtype),
            jnp.array(gamma, dtype),
            jnp.array(decay is not None),
        )

    def init_fn(params: optax.Params) -> ElasticWeightConsolidationState:
        checks.check_real(params)

        def held(x):
            return jnp.array(wide(x), state_dtype or wide(x).dtype)

        params = jax.tree.map(checks.own, params)
        return ElasticWeightConsolidationState(
            jax.tree.map(held, checks.zeros_wide(params)),
            jax.tree.map(held, params),
            *hyperparameters(),
        )

    def update_fn(
        updates: optax.Updates,
        state: ElasticWeightConsolidationState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ElasticWeightConsolidationState]:
        surrogate.refuse_functions(extra_args)
        grads, params = checks.inputs(updates, params, state.reference)
        importance, reference = state.importance, state.reference
        c, gamma, online = hyperparameters(state.strength)
        pulled = surrogate.pull_back(grads, params, importance, reference, c)
        return pulled, ElasticWeightConsolidationState(
            importance, reference, c, gamma, online
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def consolidate(
    opt_state: optax.OptState, params: optax.Params, importance: optax.Params
) -> optax.OptState:
    """Close a task: merge its penalty, from ``importance`` and ``params``, into EWC's.

    Pure; finds EWC by type wherever it sits inside ``opt_state``, as
    :func:`si_jax.consolidate` finds Synaptic Intelligence.

    Args:
      opt_state: the state of an optimizer that contains
        :func:`elastic_weight_consolidation`.
      params: the parameters at the task's end.
      importance: F, from :func:`si_jax.importance.fisher` or, without a pass,
        :func:`si_jax.importance.second_moment`; a tree of arrays at least 0, like
        ``params``.

    Returns:
      ``opt_state``, consolidated, of the same structure, shapes and dtypes.

    Raises:
      ValueError: if there is no EWC in ``opt_state``, the trees do not fit it, or
        ``importance`` is negative or not finite. Under ``jit`` what is traced cannot be
        refused: it is merged as it is, and NaN then shows in every update.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import ewc
      >>> tx = ewc.elastic_weight_consolidation(strength=1.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> state = ewc.consolidate(state, jnp.array([1.0]), jnp.array([1.0]))
      >>> state = ewc.consolidate(state, jnp.array([5.0]), jnp.array([3.0]))
      >>> print(state.importance, state.reference)  # 1 + 3, (1 × 1 + 3 × 5) / (1 + 3)
      [4.] [4.]
    """

    def merge(state: ElasticWeightConsolidationState) -> Any:
        new = checks.importances(importance, state.reference)
        theta = checks.aligned(params, state.reference, "params")
        decay, online = checks.scalar(state.decay), checks.scalar(state.online)

        def summed(old, f):
            return decay.astype(wide(old).dtype) * wide(old) + f.astype(wide(old).dtype)

        def centred(old, total, f, p):
            ref = wide(old)
            share = jnp.where(total > 0, f.astype(ref.dtype) / total, 1)
            share = jnp.where(online, jnp.ones_like(share), share)
            mean = ref + share * (p.astype(ref.dtype) - ref)
            return narrow.written(mean, old.dtype, f, p, total)

        def kept(old, total, f, p):
            return narrow.written(total, old.dtype, f, p, total)

        total = jax.tree.map(summed, state.importance, new)
        return state._replace(
            importance=jax.tree.map(kept, state.importance, total, new, theta),
            reference=jax.tree.map(centred, state.reference, total, new, theta),
        )

    if not states(opt_state, ElasticWeightConsolidationState):
        raise checks.missing(opt_state, "EWC", "ewc.elastic_weight_consolidation")
    return map_states(merge, opt_state, ElasticWeightConsolidationState)
