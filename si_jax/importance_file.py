"""Importances as files: one computes them, others use them."""

import os
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from si_jax import checks
from si_jax.pytrees import names


def save(path: str | os.PathLike[str], importance: optax.Params, **about: Any) -> None:
    """Write importances to a safetensors file.

    A tensor for each leaf, under its path (``layer/kernel``), in its dtype. Needs the
    package safetensors: ``pip install "si_jax[safetensors]"``.

    Args:
      path: the file; one that is there is replaced.
      importance: a tree of arrays at least 0.
      **about: what the file says of itself, kept as text: what kind it is, the c or the
        units it is meant for, the data, how many examples.

    Raises:
      ValueError: if a leaf is negative or not finite.
      ImportError: without safetensors.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import importance
      >>> F = {"layer": {"kernel": jnp.ones((2, 3))}}
      >>> importance.save(  # doctest: +SKIP
      ...     "fisher.safetensors", F, kind="Fisher information", units="take c = λ/2",
      ...     data="MNIST, training set", count=1000,
      ... )
    """
    safetensors = _safetensors()
    importance = checks.importances(importance, importance)
    leaves = map(np.asarray, jax.device_get(jax.tree.leaves(importance)))
    # Only in C's order does every version of safetensors write what is meant.
    arrays = [np.array(x, order="C") for x in leaves]
    text = {name: str(value) for name, value in about.items()}
    tensors = dict(zip(names(importance), arrays, strict=True))
    safetensors.save_file(tensors, os.fspath(path), metadata=text)


def load(
    path: str | os.PathLike[str], like: optax.Params
) -> tuple[optax.Params, dict[str, str]]:
    """Read importances that :func:`save` wrote.

    Args:
      path: the file.
      like: a tree of arrays with the paths and shapes that are expected, the
        parameters; shapes are enough (``jax.eval_shape``).

    Returns:
      A tree like ``like`` in the dtypes of the file, and what the file says of itself.

    Raises:
      ValueError: if names or shapes differ, or a leaf is negative or not finite.
      ImportError: without safetensors.

    Example:
      >>> import optax, si_jax
      >>> from si_jax import importance
      >>> F, about = importance.load(  # doctest: +SKIP
      ...     "fisher.safetensors", like=params
      ... )
      >>> opt_state = si_jax.add_importance(opt_state, F)  # doctest: +SKIP
    """
    _safetensors()
    with import_module("safetensors").safe_open(os.fspath(path), "np") as file:
        about = file.metadata() or {}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wanted = dict(zip(names(like), map(jnp.shape, jax.tree.leaves(like)), strict=True))
    for one, other, what in (
        (wanted, found, "has no"),
        (found, wanted, "has what is not in like:"),
    ):
        if more := [name for name in one if name not in other]:
            shown = ", ".join(more[:5]) + ", …" * (len(more) > 5)
            raise ValueError(
                f"{os.fspath(path)} {what} {shown}. It was saved for other parameters, "
                "or for the same under other names: rename the leaves of one tree."
            )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{os.fspath(path)} has {name} with shape {found[name].shape}, but in "
                f"like it is {shape}: it was saved for other parameters."
            )
    leaves = [jnp.asarray(found[name]) for name in wanted]
    tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return checks.importances(tree, tree), about


def _safetensors() -> Any:
    try:
        return import_module("safetensors.numpy")
    except ImportError as error:
        raise ImportError(
            "importances are saved and loaded by the package safetensors: "
            'pip install "si_jax[safetensors]".'
        ) from error
