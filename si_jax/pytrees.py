"""What the transformations need of pytrees.

Wide sums, leaves matched by path, and states found by type inside of others.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from si_jax import narrow

_Path = tuple[Any, ...]

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


def copied(tree: Any, like: Any) -> Any:
    """A copy in the dtypes of ``like``: neither may donate the other's buffer."""
    return jax.tree.map(lambda x, old: jnp.array(x, jnp.result_type(old)), tree, like)


def unboxed(x: Any) -> jax.Array:
    """The array out of the box that nnx puts it in."""
    (array,) = jax.tree.leaves(x)
    return array


def align(tree: Any, like: optax.Params, name: str) -> Any:
    """The leaves of ``tree``, matched by key path, in the containers of ``like``.

    Leaves under an ``optax.MaskedNode`` of ``like`` are left out. Matching by path
    bridges containers that differ in type alone: the variables in which nnx boxes the
    parameters and, differently, the optimizer's state. A complex leaf is two where
    ``optax.contrib.split_real_and_imaginary`` made two of it. What else a module holds
    (functions, integers, a rate) is left out as the filter left it out of ``like``.
    """
    _check_whole(tree, like, name)
    slots, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_masked)
    masked = {path for path, slot in slots if _is_masked(slot)}
    leaves = _split_complex(tree, {path for path, _ in slots})
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
                    f"{where} has shape {jnp.shape(leaf)}, but the optimizer's "
                    f"state was made for {jnp.shape(slot)}."
                )
            aligned.append(leaf)
    for path, leaf in leaves.items():
        # A MaskedNode may stand for a leaf or for a whole subtree.
        if any(path[:depth] in masked for depth in range(len(path) + 1)):
            continue
        if not jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.inexact):
            continue
        where = f"{name}{jax.tree_util.keystr(path)}"
        raise ValueError(
            f"{where} is unknown: the optimizer's state was made for "
            f"parameters without it. {_HINT}"
        )
    return jax.tree.unflatten(treedef, aligned)


def _check_whole(tree: Any, like: Any, name: str) -> None:
    """Refuse a tree that optax makes of the parameters for itself, or its opposite."""
    if isinstance(like, optax.LookaheadParams):
        raise ValueError(
            "optax.lookahead cannot be inside of Synaptic Intelligence, as its "
            "gradient is of one of its two copies of the parameters: take "
            "optax.lookahead(optax.chain(si_jax.synaptic_intelligence(…), …), …) and "
            "si_jax.consolidate(opt_state, params.fast)."
        )
    if isinstance(tree, optax.LookaheadParams):
        raise ValueError(
            f"{name} are those of optax.lookahead, of which Synaptic Intelligence sees "
            f"the fast ones: pass {name}.fast."
        )
    sizes = [x.size for x in jax.tree.leaves(tree) if hasattr(x, "size")]
    if hasattr(like, "ndim") and len(sizes) > 1 and like.shape == (sum(sizes),):
        raise ValueError(
            "the state was made for all parameters as one vector: optax.flatten "
            "belongs inside, si_jax.with_synaptic_intelligence(optax.flatten(…)) or "
            "optax.chain(si_jax.synaptic_intelligence(…), optax.flatten(…))."
        )


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _split_complex(tree: Any, slots: set[_Path]) -> dict[_Path, Any]:
    """The leaves by path; of a complex one its parts, if these have slots."""
    real, imaginary = map(jax.tree_util.GetAttrKey, ("real", "imaginary"))
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if np.iscomplexobj(leaf) and (*path, real) in slots:  # a module has functions
            leaves[*path, real] = jnp.real(leaf)
            leaves[*path, imaginary] = jnp.imag(leaf)
        else:
            leaves[path] = leaf
    return leaves


def names(tree: Any) -> list[str]:
    """A name for each leaf: ``layer/kernel``."""
    return path_names([path for path, _ in jax.tree_util.tree_leaves_with_path(tree)])


def path_names(paths: list[_Path]) -> list[str]:
    """``layer/kernel``; without the last step into the boxes of nnx."""
    box = jax.tree_util.GetAttrKey("value")
    if all(path and path[-1] == box for path in paths):
        paths = [path[:-1] for path in paths]
    simple = [jax.tree_util.keystr(x, simple=True, separator="/") for x in paths]
    if len(set(simple)) < len(simple):
        return [jax.tree_util.keystr(x) for x in paths]
    return [name or "params" for name in simple]  # one array is the whole tree


def extend(old: Any, new: Any) -> Any:
    """``new`` with the leaves of ``old``, matched by path, at its origin.

    In the dtypes of ``new`` and, where it is committed to devices, on them. Nothing of
    the result is shared with ``old``; leaves that ``old`` has not are ``new``'s own.
    """
    leaves = dict(jax.tree_util.tree_leaves_with_path(old))
    slots, treedef = jax.tree_util.tree_flatten_with_path(new)
    extended = []
    for path, slot in slots:
        if path not in leaves:
            extended.append(slot)
            continue
        leaf = leaves.pop(path)
        before, after = jnp.shape(leaf), jnp.shape(slot)
        if len(before) != len(after) or any(map(operator.gt, before, after)):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has shape {before} in opt_state, "
                f"but {after} in into: a parameter may grow along its axes, not shrink "
                "or change their number. Make into from parameters that hold the old."
            )
        extended.append(_at_origin(leaf, slot))
    for path, leaf in leaves.items():
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)} is in "
            "opt_state, but not in into: what is remembered of it would be lost. Make "
            "into from parameters that have it, by an optimizer that does not mask it."
        )
    return jax.tree.unflatten(treedef, extended)


def _at_origin(block: jax.Array, whole: jax.Array) -> jax.Array:
    """``whole`` with ``block`` in the corner where every index is 0."""
    moved = narrow.converted(block, jnp.result_type(whole))
    if jnp.shape(block) == jnp.shape(whole):
        return placed(moved, whole)
    shapes = zip(jnp.shape(block), jnp.shape(whole), strict=True)
    margin = [(0, after - before) for before, after in shapes]
    moved = placed(jnp.pad(moved, margin), whole)
    filled = placed(jnp.pad(jnp.ones(jnp.shape(block), bool), margin), whole)
    return jnp.where(filled, moved, whole)


def placed(x: jax.Array, like: Any) -> jax.Array:
    """``x`` on the devices that ``like`` is committed to; under jit there are none."""
    traced = isinstance(x, jax.core.Tracer) or isinstance(like, jax.core.Tracer)
    if traced or not getattr(like, "committed", False):
        return x
    return jax.device_put(x, like.sharding)


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
