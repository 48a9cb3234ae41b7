"""What Synaptic Intelligence and EWC share once they sit in an optimizer's state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from si_jax import surrogate
from si_jax.ewc import ElasticWeightConsolidationState
from si_jax.pytrees import align, map_states, states
from si_jax.transform import (
    SynapticIntelligenceState,
    WithSynapticIntelligenceState,
)

_Memory = (
    SynapticIntelligenceState
    | WithSynapticIntelligenceState
    | ElasticWeightConsolidationState
)


def reset_optimizer(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params
) -> optax.OptState:
    """Start the optimizer afresh, moments and counts; keep what SI and EWC remember.

    The authors do so between the tasks of split MNIST and split CIFAR. (Their code
    keeps Adam's step count; a fresh bias correction needs it to start at zero.)
    Hyperparameters of ``optax.inject_hyperparams`` return to their first values, too.

    Args:
      tx: the optimizer that made ``opt_state``.
      opt_state: its state, before or after :func:`consolidate`.
      params: the current parameters.

    Returns:
      ``tx.init(params)`` with the memory of Synaptic Intelligence and EWC from
      ``opt_state``.

    Raises:
      ValueError: if there is neither in ``opt_state``, or if it was not made by ``tx``
        for such parameters.

    Example:
      >>> import jax.numpy as jnp, optax, si_jax
      >>> inner = optax.sgd(0.5, momentum=0.9)
      >>> tx = si_jax.with_synaptic_intelligence(inner)
      >>> params = jnp.array([0.0])
      >>> opt_state = tx.init(params)
      >>> updates, opt_state = tx.update(jnp.array([1.0]), opt_state, params)
      >>> opt_state = si_jax.reset_optimizer(tx, opt_state, params)
      >>> print(optax.tree.get(opt_state, "trace"))
      [0.]
      >>> print(si_jax.synapses(opt_state).path_integral)
      [0.5]
    """
    kept = _require(opt_state)
    for state in kept:
        surrogate.scalar(state.strength)
    fresh = tx.init(params)
    if [type(state) for state in find_memories(fresh)] != [
        type(state) for state in kept
    ]:
        raise ValueError(
            "opt_state was not made by this tx: they do not hold the same memories in "
            "the same form and number."
        )
    remaining = iter(kept)

    def keep(state: Any) -> Any:
        old = next(remaining)
        match state:
            case ElasticWeightConsolidationState():
                return state._replace(
                    importance=old.importance, reference=old.reference
                )
            case SynapticIntelligenceState():
                return state._replace(
                    synapses=old.synapses,
                    last_params=old.last_params,
                    last_grads=old.last_grads,
                )
            case _:
                return state._replace(
                    synapses=old.synapses,
                    inner_state=map_states(keep, state.inner_state, _Memory),
                )

    # Put back leaf by leaf: the old state's containers may be boxed (nnx.Optimizer).
    leaves = jax.tree.leaves(map_states(keep, fresh, _Memory))
    if list(map(jnp.shape, leaves)) != list(map(jnp.shape, jax.tree.leaves(opt_state))):
        raise ValueError(
            "opt_state was not made by this tx for these params: their numbers or "
            "shapes of arrays differ."
        )
    return jax.tree.unflatten(jax.tree.structure(opt_state), leaves)


def surrogate_loss(opt_state: optax.OptState, params: optax.Params) -> jax.Array:
    """The penalty of eq. 4: c Σ Ω (θ̃ − θ)², for logging.

    Its gradient is already in the updates; do not add it to the loss.

    Args:
      opt_state: the state of an optimizer that contains Synaptic Intelligence, EWC, or
        both.
      params: the current parameters.

    Returns:
      A scalar in the units of the loss, summed over all of them in ``opt_state``.

    Raises:
      ValueError: if there is neither in ``opt_state``, if ``params`` does not fit it,
        or if the state is batched (then call it inside ``jax.vmap``).

    Example:
      >>> import jax.numpy as jnp, optax, si_jax
      >>> tx = si_jax.with_synaptic_intelligence(optax.sgd(0.5), 0.1, damping=1.0)
      >>> opt_state = tx.init(jnp.array([0.0]))
      >>> _, opt_state = tx.update(jnp.array([-2.0]), opt_state, jnp.array([0.0]))
      >>> opt_state = si_jax.consolidate(opt_state, jnp.array([1.0]))  # Ω = 1, θ̃ = 1
      >>> print(si_jax.surrogate_loss(opt_state, jnp.array([3.0])))  # 0.1 × 1 × 2²
      0.4
    """

    def penalty(state: Any) -> jax.Array:
        elastic = isinstance(state, ElasticWeightConsolidationState)
        importance, reference = (
            (state.importance, state.reference) if elastic else state.synapses[1:]
        )
        strength = surrogate.scalar(state.strength)
        terms = surrogate.penalty(
            align(params, reference, "params"), importance, reference, strength.dtype
        )
        return strength * sum(jax.tree.leaves(terms), jnp.zeros_like(strength))

    first, *others = map(penalty, _require(opt_state))
    return sum(others, first)


def find_memories(opt_state: optax.OptState) -> list[Any]:
    """The states of SI and EWC inside ``opt_state``, in the order of its leaves."""
    found = []
    for state in states(opt_state, _Memory):
        found.append(state)  # the wrapper's optimizer may hold more of them
        if isinstance(state, WithSynapticIntelligenceState):
            found += find_memories(state.inner_state)
    return found


def _require(opt_state: optax.OptState) -> list[Any]:
    found = find_memories(opt_state)
    if not found:
        raise ValueError(
            "opt_state holds no Synaptic Intelligence and no EWC: build the optimizer "
            "with si_jax.synaptic_intelligence, si_jax.with_synaptic_intelligence or "
            "si_jax.ewc.elastic_weight_consolidation, and pass the state that its init "
            "and update return."
        )
    return found
