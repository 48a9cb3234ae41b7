"""What the transformations need of pytrees.

Wide sums, leaves matched by path, and states found by type inside of others.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

_HINT = (
    "Pass the tree that init got: of a TrainState its params, of an nnx model "
    "nnx.state(model, nnx.Param), of an Equinox module "
    "eqx.filter(module, eqx.is_inexact_array)."
)


def wide(x: ArrayLike) -> jax.Array:
    """``x`` in float32 at least: sums of small steps stall in narrower types."""
    dtype = jnp.result_type(x)
    return jnp.asarray(x, dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def stored(x: ArrayLike) -> jax.Array:
    """``wide(x)`` as ``x``'s own dtype will hold it once it is written to memory.

    Inside a fusion XLA may keep a narrow type's excess precision; what the parameters
    really move includes the rounding.
    """
    info = jnp.finfo(jnp.result_type(x))
    if info.bits >= 32:
        return wide(x)
    return wide(jax.lax.optimization_barrier(x))


def zeros(x: jax.Array) -> jax.Array:
    """Zeros that lie where ``x`` lies; under jit, a constant lies on every device."""
    return jnp.where(x == 0, x, 0)


def align(tree: Any, like: optax.Params, name: str) -> Any:
    """The leaves of ``tree``, matched by key path, in the containers of ``like``.

    Leaves under an ``optax.MaskedNode`` of ``like`` are left out. Matching by path
    bridges containers that differ in type alone: the variables in which nnx boxes the
    parameters and, differently, the optimizer's state.
    """
    slots, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_masked)
    masked = {path for path, slot in slots if _is_masked(slot)}
    leaves = dict(jax.tree_util.tree_leaves_with_path(tree))
    aligned = []
    for path, slot in slots:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if _is_masked(slot):
            aligned.append(slot)
        elif path not in leaves:
            raise ValueError(
                f"{where} is missing: the optimizer's state was made with it. {_HINT}"
            )
        else:
            leaf = leaves.pop(path)
            if jnp.shape(leaf) != jnp.shape(slot):
                raise ValueError(
                    f"{where} has shape {jnp.shape(leaf)}, but the state of Synaptic "
                    f"Intelligence was made for {jnp.shape(slot)}."
                )
            aligned.append(leaf)
    for path in leaves:
        if any(path[:depth] in masked for depth in range(len(path) + 1)):
            continue
        where = f"{name}{jax.tree_util.keystr(path)}"
        raise ValueError(
            f"{where} is unknown: the state of Synaptic Intelligence was made for "
            f"parameters without it. {_HINT}"
        )
    return jax.tree.unflatten(treedef, aligned)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def states(opt_state: optax.OptState, kind: Any) -> list[Any]:
    """The states of a type, or of several, wherever they sit inside ``opt_state``."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in leaves if isinstance(x, kind)]


def map_states(
    function: Callable[[Any], Any], opt_state: optax.OptState, kind: Any
) -> Any:
    """``opt_state`` with ``function`` of the states of a type in their place."""
    return jax.tree.map(
        lambda x: function(x) if isinstance(x, kind) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, kind),
    )
