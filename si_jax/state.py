"""What one does with the memory in an optimizer's state, whichever it is."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from si_jax import checks, narrow, surrogate, transform
from si_jax.ewc import ElasticWeightConsolidationState
from si_jax.kronecker import KroneckerConsolidationState
from si_jax.lora import ProductConsolidationState
from si_jax.pytrees import map_states, states, wide
from si_jax.transform import SynapticIntelligenceState, WithSynapticIntelligenceState

Synaptic = SynapticIntelligenceState | WithSynapticIntelligenceState
Shared = KroneckerConsolidationState | ProductConsolidationState
Memory = Synaptic | ElasticWeightConsolidationState | Shared


def add_importance(
    opt_state: optax.OptState, importance: optax.Params
) -> optax.OptState:
    """Add to Ω; θ̃ stays: hold parameters that were trained elsewhere.

    To fine-tune a pretrained network, give its optimizer's first state what the network
    needs to keep what it knows. Ω is in units of loss per squared parameter: with
    strength 1, half the Fisher information of a negative log-likelihood (a mean over
    examples, like the loss) is the second-order expansion of the loss that was trained.

    Args:
      opt_state: the state of an optimizer with Synaptic Intelligence or EWC, wherever
        it sits inside.
      importance: what to add, a tree of arrays at least 0 like the parameters. Leaves
        that ``optax.masked`` or ``optax.partition`` hides from the memory may be there,
        and are ignored. Of a complex leaf it is complex: the importance of the real
        part, and of the imaginary part.

    Returns:
      ``opt_state`` with the sum, of the same structure, shapes and dtypes.

    Raises:
      ValueError: if there is no memory in ``opt_state`` or more than one of a parameter
        (SI and EWC: pass the part that you mean), if ``importance`` does not fit it, or
        is negative or not finite. Under ``jit`` what is traced cannot be refused: it is
        added as it is, and NaN then shows in every update.

    Example:
      >>> import jax.numpy as jnp, optax, si_jax
      >>> tx = si_jax.with_synaptic_intelligence(optax.sgd(0.25), strength=1.0)
      >>> pretrained = jnp.array([1.0, 1.0])
      >>> fisher = jnp.array([2.0, 0.0])
      >>> opt_state = si_jax.add_importance(tx.init(pretrained), fisher / 2)
      >>> strayed = jnp.array([2.0, 2.0])
      >>> updates, opt_state = tx.update(jnp.ones(2), opt_state, strayed)
      >>> print(updates)  # −0.25 (1 + 2 Ω (θ − θ̃)); the other is free
      [-0.75 -0.25]
    """

    def added(omega, new, ref):
        old = wide(narrow.read(omega))
        return narrow.written(old + new.astype(old.dtype), omega.dtype, new, ref)

    def add(state: Any) -> Any:
        checks.scalar(state.strength)
        memory = _memory(state)
        new = checks.importances(importance, memory.reference)
        total = jax.tree.map(added, memory.importance, new, memory.reference)
        memory = memory._replace(importance=total)
        if isinstance(state, ElasticWeightConsolidationState):
            return memory
        return state._replace(synapses=memory)

    require_once(opt_state)
    return map_memories(add, opt_state)


def surrogate_loss(opt_state: optax.OptState, params: optax.Params) -> jax.Array:
    """The penalty of eq. 4, c Σ Ω (θ̃ − θ)², or of another memory, for logging.

    Its gradient is already in the updates; do not add it to the loss.

    Args:
      opt_state: the state of an optimizer that contains Synaptic Intelligence, EWC,
        Kronecker factors or products of adapters, or several of them.
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
    memories = map(transform.penalty_of, require(opt_state))
    return surrogate.Penalty(*memories)(params)


# --- Finding them ---------------------------------------------------------------------


def find_memories(opt_state: optax.OptState) -> list[Any]:
    """The states of SI and EWC inside ``opt_state``, in the order of its leaves."""
    memories = []
    for state in states(opt_state, Memory):
        memories.append(state)  # the wrapper's optimizer may hold more of them
        if isinstance(state, WithSynapticIntelligenceState):
            memories += find_memories(state.inner_state)
    return memories


def require_once(opt_state: optax.OptState) -> list[Any]:
    """The memories with an importance of every parameter, which one of them holds."""
    memories = require(opt_state)
    for state in memories:
        if isinstance(state, Shared):
            what, module = "products of adapters", "lora"
            if isinstance(state, KroneckerConsolidationState):
                what, module = "Kronecker factors", "kronecker"
            raise ValueError(
                f"opt_state remembers with {what}, in which a parameter has no "
                f"importance of its own: si_jax.{module}.consolidate merges more of "
                "them, and si_jax.surrogate_loss is their penalty."
            )
    refuse_twice(memories)
    return memories


def refuse_twice(memories: list[Any]) -> None:
    """Refuse memories of which several hold one parameter."""
    seen = set()
    for state in memories:
        for path, _ in jax.tree_util.tree_leaves_with_path(reference(state)):
            if path in seen:
                raise ValueError(
                    f"opt_state remembers params{jax.tree_util.keystr(path)} more than "
                    "once, by Synaptic Intelligence and EWC, say: pass the part of it "
                    "that you mean, of a chain one entry."
                )
            seen.add(path)


def remembered(state: Any) -> tuple[optax.Params, optax.Params]:
    """Ω and θ̃ of a memory that has an importance of every parameter."""
    return transform.remembered(_memory(state))


def reference(state: Any) -> optax.Params:
    """θ̃ of a memory."""
    return _memory(state).reference


def _memory(state: Any) -> Any:
    """What has ``reference`` and, but of Kronecker factors, ``importance``."""
    return state.synapses if isinstance(state, Synaptic) else state


def map_memories(
    function: Callable[[Any], Any], opt_state: optax.OptState
) -> optax.OptState:
    """``opt_state`` with ``function`` of each memory in its place, in their order."""

    def inside(state: Any) -> Any:
        state = function(state)
        if not isinstance(state, WithSynapticIntelligenceState):
            return state
        return state._replace(inner_state=map_memories(function, state.inner_state))

    return map_states(inside, opt_state, Memory)


def require(opt_state: optax.OptState, name: str = "opt_state") -> list[Any]:
    """The memories inside ``opt_state``, one at least."""
    if memories := find_memories(opt_state):
        return memories
    raise none_of(opt_state, name)


def none_of(opt_state: optax.OptState, name: str) -> ValueError:
    """What to say where there is no memory."""
    return checks.missing(
        opt_state,
        "Synaptic Intelligence and no EWC, nor Kronecker factors or products of "
        "adapters",
        "si_jax.synaptic_intelligence, si_jax.with_synaptic_intelligence, "
        "si_jax.ewc.elastic_weight_consolidation, "
        "si_jax.kronecker.kronecker_consolidation or si_jax.lora.product_consolidation",
        name,
    )
