"""The memory of SI and EWC in another state: of a grown network, a fresh optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from si_jax import checks, kronecker, lora
from si_jax.ewc import ElasticWeightConsolidationState
from si_jax.kronecker import KroneckerConsolidationState
from si_jax.lora import ProductConsolidationState
from si_jax.pytrees import extend, zeros
from si_jax.state import Memory, Synaptic, find_memories, map_memories, none_of, require
from si_jax.transform import (
    Synapses,
    SynapticIntelligenceState,
    WithSynapticIntelligenceState,
)

_Link = (
    SynapticIntelligenceState
    | ElasticWeightConsolidationState
    | KroneckerConsolidationState
    | ProductConsolidationState
)
_KINDS = (
    (Synaptic, "SI"),
    (ElasticWeightConsolidationState, "EWC"),
    (KroneckerConsolidationState, "Kronecker factors"),
    (ProductConsolidationState, "products of adapters"),
)
_ELSE = "If the parameters grew or the optimizer is another one, use si_jax.carry_over."


def carry_over(opt_state: optax.OptState, *, into: optax.OptState) -> optax.OptState:
    """Put what SI and EWC remember in ``opt_state`` into another optimizer's state.

    For parameters that grew (a head with more classes, a new adapter, more words), for
    another optimizer, and from one form of Synaptic Intelligence into the other. Leaves
    are matched by path. One that is larger in ``into`` keeps its old block at the
    origin, the first entries along every axis; new entries and new leaves start free,
    with ω = Ω = 0 and θ̃ as ``into`` has it. Everything else is ``into``'s: strength,
    damping, moments, counts, random keys, dtypes, containers and where arrays lie.

    A run without SI or EWC goes on with them: if there is no memory in ``opt_state``,
    ``into`` keeps its own and takes the rest from there, moments and counts.

    Best at a task's end, after :func:`consolidate`. In mid-task ω is carried, too; but
    a link does not become a wrapper there, as its last step is still to be credited.

    Pure; under ``jit`` nothing is copied that need not be:
    ``jax.jit(lambda s, p: si_jax.carry_over(s, into=tx.init(p)), donate_argnums=0)``.

    Args:
      opt_state: the state of an optimizer with Synaptic Intelligence, EWC, or both; or
        of the optimizer that ``into`` has inside, or behind the links of its chain.
      into: the state of another one, usually ``tx.init(params)``; of an
        ``nnx.Optimizer`` for the grown model its ``opt_state``. If there are several
        memories (SI inside a partition), those of a kind are matched in order.

    Returns:
      ``into`` with the memory of ``opt_state``; it shares no array with either.

    Raises:
      ValueError: if there is no memory in ``into``, or none in ``opt_state`` and the
        rest does not fit, if they hold different numbers of memories, if a parameter
        that ``opt_state`` remembers shrank, changed its number of axes or is gone, or
        if a link would become a wrapper in mid-task. Under ``jit`` that is not seen,
        and ω is NaN.

    Example:
      >>> import jax.numpy as jnp, optax, si_jax
      >>> tx = si_jax.with_synaptic_intelligence(optax.adam(1e-3), damping=1.0)
      >>> head = jnp.array([0.0, 0.0])
      >>> opt_state = si_jax.add_importance(tx.init(head), jnp.array([1.0, 2.0]))
      >>> head = jnp.array([0.1, 0.2, 0.3])  # a third class
      >>> opt_state = si_jax.carry_over(opt_state, into=tx.init(head))
      >>> print(si_jax.synapses(opt_state).importance)
      [1. 2. 0.]
      >>> print(si_jax.synapses(opt_state).reference)
      [0.  0.  0.3]
    """
    new = require(into, "into")
    if not find_memories(opt_state):
        return _begin(opt_state, into)
    old = find_memories(opt_state)
    # Of a batched state the shapes would mislead.
    for state in (*old, *new):
        checks.scalar(state.strength)
    remaining = {}
    for kind, name in _KINDS:
        counts = [sum(isinstance(x, kind) for x in memories) for memories in (old, new)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"opt_state holds {name} {counts[0]} times and into {counts[1]} times: "
                "make into with an optimizer that has a place for each memory."
            )
        remaining[kind] = iter([x for x in old if isinstance(x, kind)])

    def carry(state: Any) -> Any:
        if isinstance(state, ElasticWeightConsolidationState):
            return _carry_elastic(next(remaining[type(state)]), state)
        if isinstance(state, KroneckerConsolidationState):
            before = next(remaining[type(state)])
            return _carry_named(before, state, "factors", kronecker.plain)
        if isinstance(state, ProductConsolidationState):
            before = next(remaining[type(state)])
            return _carry_named(before, state, "pairs", lora.plain)
        return _carry_synaptic(next(remaining[Synaptic]), state)

    copies = jax.tree.map(
        lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, into
    )
    return map_memories(carry, copies)


def _begin(opt_state: optax.OptState, into: optax.OptState) -> optax.OptState:
    """``into``, with all that is no memory from a state that has none."""
    plain = _without_memories(into)
    if _layout(plain) != _layout(opt_state):
        error = none_of(opt_state, "opt_state")
        raise ValueError(
            f"{error} A state without them fits if it is that of the same optimizer "
            "as into's, for the same parameters."
        )
    rest = iter(jax.tree.leaves(opt_state))

    def mark(state: Any) -> Any:
        memory = state._asdict()
        memory.pop("inner_state", None)
        return state._replace(**jax.tree.map(lambda _: False, memory))

    marks = map_memories(mark, jax.tree.map(lambda _: True, into))
    return jax.tree.map(lambda x, m: jnp.copy(next(rest) if m else x), into, marks)


def _layout(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


def _without_memories(opt_state: optax.OptState) -> optax.OptState:
    """The state of the optimizer without wrappers, and without links in its chains."""

    def is_link(x: Any) -> bool:
        inside = jax.tree.leaves(x, is_leaf=lambda y: isinstance(y, Memory))
        return bool(inside) and all(isinstance(y, _Link) for y in inside)

    def is_changed(x: Any) -> bool:
        chain = type(x) is tuple and any(map(is_link, x))
        return chain or isinstance(x, WithSynapticIntelligenceState)

    def without(x: Any) -> Any:
        if isinstance(x, WithSynapticIntelligenceState):
            return _without_memories(x.inner_state)
        if not is_changed(x):
            return x
        rest = tuple(_without_memories(y) for y in x if not is_link(y))
        # SI and one optimizer in a chain: the old one needs no chain.
        return rest[0] if len(rest) == 1 else rest

    return jax.tree.map(without, opt_state, is_leaf=is_changed)


def _carry_elastic(old: Any, new: Any) -> Any:
    return new._replace(
        importance=_free(old.importance, new.importance),
        reference=extend(old.reference, new.reference),
    )


def _carry_named(old: Any, new: Any, field: str, plain: Callable[[Any], Any]) -> Any:
    """Of a field that holds arrays by name, in the boxes of ``new``."""
    kept, slots = (getattr(state, field) for state in (old, new))
    leaves = jax.tree.leaves(_free(plain(kept), plain(slots)))
    return new._replace(
        **{field: jax.tree.unflatten(jax.tree.structure(slots), leaves)},
        reference=extend(old.reference, new.reference),
    )


def _carry_synaptic(old: Any, new: Any) -> Any:
    """Either form into either: ω, Ω and θ̃, and of a link into a link its last step."""
    reference = extend(old.synapses.reference, new.synapses.reference)
    from_link, to_link = (isinstance(x, SynapticIntelligenceState) for x in (old, new))
    path_integral = old.synapses.path_integral
    if from_link and not to_link:
        # A link is credited one call later; a wrapper has no place for that step.
        path_integral = _complete(path_integral, checks.scalar(old.pending))
    synapses = Synapses(
        _free(path_integral, new.synapses.path_integral),
        _free(old.synapses.importance, new.synapses.importance),
        reference,
    )
    if not to_link:
        return new._replace(synapses=synapses)
    if not from_link:
        # A wrapper has been credited with all: no step is pending.
        return new._replace(
            synapses=synapses,
            last_grads=jax.tree.map(zeros, new.last_grads),
            pending=jax.tree.map(jnp.zeros_like, new.pending),
        )
    pending = jnp.copy(checks.scalar(old.pending))
    return new._replace(
        synapses=synapses,
        last_params=extend(old.last_params, new.last_params),
        last_grads=_free(old.last_grads, new.last_grads),
        pending=jax.tree.map(lambda _: pending, new.pending),
    )


def _free(old: Any, new: Any) -> Any:
    """The leaves of ``old`` in a tree like ``new``; zeros, thus free, for others."""
    return extend(old, jax.tree.map(zeros, new))


def _complete(path_integral: Any, pending: jax.Array) -> Any:
    """ω of a link, if no step is still to be credited."""
    if isinstance(pending, jax.core.Tracer):
        nan = jnp.where(pending, jnp.nan, 0.0)
        return jax.tree.map(lambda w: w + nan.astype(w.dtype), path_integral)
    if pending:
        raise ValueError(
            "in mid-task a link does not become a wrapper: its last step is still to "
            "be credited. First opt_state = si_jax.consolidate(opt_state, params)."
        )
    return path_integral


def reset_optimizer(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params
) -> optax.OptState:
    """Start the optimizer afresh, moments and counts; keep what SI and EWC remember.

    The authors do so between the tasks of split MNIST and split CIFAR. (Their code
    keeps Adam's step count; a fresh bias correction needs it to start at zero.)
    Hyperparameters of ``optax.inject_hyperparams`` return to their first values, too.
    Random keys (typed ones, and vectors of two or four uint32) go on as they are:
    ``optax.add_noise`` and ``optax.contrib.dpsgd`` do not draw a task's noise again.

    Args:
      tx: the optimizer that made ``opt_state``. For another one, and for parameters
        that grew, use :func:`carry_over`.
      opt_state: its state, before or after :func:`consolidate`.
      params: the current parameters.

    Returns:
      ``tx.init(params)`` with the memory of Synaptic Intelligence and EWC from
      ``opt_state``, of its structure, shapes and dtypes.

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
    kept, fresh = require(opt_state), tx.init(params)
    for state in kept:
        checks.scalar(state.strength)
    if list(map(type, find_memories(fresh))) != list(map(type, kept)):
        raise ValueError(
            "opt_state was not made by this tx: they do not hold the same memories in "
            f"the same form and number. {_ELSE}"
        )
    late = _late(opt_state, fresh)
    old, treedef = jax.tree.flatten(opt_state)
    same = [x for x, is_late in zip(old, late, strict=True) if not is_late]
    if list(map(jnp.shape, same)) != list(map(jnp.shape, jax.tree.leaves(fresh))):
        raise ValueError(
            "opt_state was not made by this tx for these params: their numbers or "
            f"shapes of arrays differ. {_ELSE}"
        )
    # Put back leaf by leaf: the old state's containers may be boxed (nnx.Optimizer).
    new = iter(jax.tree.leaves(carry_over(opt_state, into=fresh)))
    fresh_leaves = [None if is_late else next(new) for is_late in late]
    leaves = [
        jnp.copy(x) if y is None or _is_key(x) else jnp.asarray(y, jnp.result_type(x))
        for x, y in zip(old, fresh_leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def _late(opt_state: Any, fresh: Any) -> list[bool]:
    """Which leaves are in dicts that ``init`` leaves empty, as ``optax.monitor``'s."""

    def is_empty(x: Any) -> bool:
        return isinstance(x, dict) and not x

    slots = jax.tree_util.tree_leaves_with_path(fresh, is_leaf=is_empty)
    empty = {path for path, x in slots if is_empty(x)}
    return [
        any(path[:depth] in empty for depth in range(len(path)))
        for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)
    ]


def _is_key(x: Any) -> bool:
    """A random key, typed or as ``jax.random.PRNGKey`` makes it."""
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    return dtype == jnp.uint32 and jnp.shape(x) in ((2,), (4,))
