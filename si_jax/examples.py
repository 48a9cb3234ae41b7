"""Examples, their weights and the parameters: what the passes over them check."""

from typing import Any

import jax
import jax.numpy as jnp


def number_of(**trees: Any) -> int:
    """How many examples there are: the leading axis that all arrays share."""
    lengths = {
        f"{path[0].key}{jax.tree_util.keystr(path[1:])}": jnp.shape(leaf)[:1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    }
    different = {length: name for name, length in lengths.items()}
    if () in different:
        raise ValueError(f"{different[()]} has no leading axis over the examples.")
    if len(different) > 1:
        ((m,), one), ((n,), other) = list(different.items())[:2]
        raise ValueError(
            f"the leading axis runs over the examples, but {one} has {m} of them and "
            f"{other} {n}."
        )
    if not different or (0,) in different:
        raise ValueError(f"there are no examples in {next(iter(trees))}.")
    ((n,),) = different
    return n


def spread(weight: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The weights of one example at each position of logits of this shape."""
    if not shape or shape[-1] < 2:
        raise ValueError(
            f"logits must be (…, classes) of one example, got shape {shape}. For two "
            "classes with one logit z give (z, 0)."
        )
    try:
        return jnp.broadcast_to(weight, shape[:-1])
    except ValueError as error:
        raise ValueError(
            f"the weights of an example, of shape {weight.shape}, do not broadcast to "
            f"its positions, {shape[:-1]}."
        ) from error


def check_leaf(name: str, leaf: Any) -> None:
    """Refuse what no importance is measured of."""
    dtype = getattr(leaf, "dtype", type(leaf).__name__)
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"importances need real floating-point parameters; {name} is {dtype}. "
            "Close the function over what is no such parameter, and give a complex one "
            "as its real and imaginary parts."
        )
