"""Checks of what SI and EWC are given: trees, importances, numbers, states."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from si_jax.pytrees import align, unboxed, wide, zeros

# The message of optax's own transformations, which do not export it.
NO_PARAMS_MSG = (
    "You are using a transformation that requires the current value of "
    "parameters, but you are not passing `params` when calling `update`."
)


def inputs(
    grads: optax.Updates, params: optax.Params | None, reference: optax.Params
) -> tuple[optax.Updates, optax.Params]:
    """Gradients and parameters in the containers of the state's trees."""
    if params is None:
        raise ValueError(NO_PARAMS_MSG)
    return aligned(grads, reference, "updates"), aligned(params, reference, "params")


def aligned(tree: Any, like: optax.Params, name: str) -> Any:
    """``tree`` in the containers of ``like``, made of arrays that nobody writes to."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if hasattr(leaf, "dtype"):  # a module has functions, too
            _dtype(f"{name}{jax.tree_util.keystr(path)}", leaf)
    return jax.tree.map(own, align(tree, like, name))


def own(x: Any) -> jax.Array:
    """``x`` as an array of JAX that nobody else writes to."""
    return jnp.asarray(frozen(x))


def frozen(x: Any) -> Any:
    """``x``; a NumPy array copied at once, as JAX may read it after the call."""
    return np.array(x) if isinstance(x, np.ndarray) else x


def zeros_wide(params: optax.Params) -> optax.Params:
    """Zeros like the parameters, float32 at least."""
    return jax.tree.map(lambda p: zeros(wide(p)), params)


def check_real(params: optax.Params) -> None:
    """Refuse parameters that are not real floating-point arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(dtype := _dtype(name, leaf), jnp.floating):
            raise ValueError(
                f"Importances need real floating-point parameters; {name} is {dtype}. "
                "Leave it out with optax.masked; for complex parameters, wrap the "
                "optimizer in optax.contrib.split_real_and_imaginary."
            )


def _dtype(name: str, leaf: Any) -> Any:
    try:
        return getattr(leaf, "dtype", jnp.result_type(leaf))
    except TypeError:
        raise ValueError(
            f"{name} is of type {type(leaf).__name__}, which JAX does not take: make "
            "it an array of JAX (of torch's, jnp.array(x.numpy(force=True)))."
        ) from None


def importances(tree: Any, like: optax.Params) -> optax.Params:
    """``tree`` in the containers of ``like``; refused if negative or no number.

    Traced leaves cannot be refused, and are taken as they are.
    """
    new = align(tree, like, "importance")
    for path, x in jax.tree_util.tree_leaves_with_path(new):
        if isinstance(x, jax.core.Tracer):
            continue
        name = f"importance{jax.tree_util.keystr(path)}"
        with jax.ensure_compile_time_eval():  # of constants under jit, too
            finite, negative = jnp.isfinite(x).all(), (jnp.asarray(x) < 0).any()
            if not finite:
                raise ValueError(
                    f"{name} is not finite: the surrogate loss would not be a number."
                )
            if negative:
                raise ValueError(
                    f"{name} is negative: the surrogate loss would push the parameter "
                    "away. Importances are at least 0; clip them, or square what they "
                    "come from."
                )
    return jax.tree.map(own, new)


def check_strength(strength: Any) -> None:
    """Refuse a strength that is not a number, negative or infinite."""
    c = number("strength", strength)
    if c is not None and not 0 <= c < np.inf:
        raise ValueError(
            f"strength (c of eq. 4) must be >= 0 and finite, got {strength}."
        )


def check_state_dtype(state_dtype: DTypeLike | None, *others: str) -> None:
    """In a narrower range than bfloat16's, which is float32's, Ω could overflow."""
    if state_dtype is None or (isinstance(state_dtype, str) and state_dtype in others):
        return
    try:
        info = jnp.finfo(state_dtype)
    except (TypeError, ValueError):
        info = None
    if info is None or (info.bits < 32 and info.dtype != jnp.bfloat16):
        names = "".join(f" or {name!r}" for name in others)
        raise ValueError(
            f"state_dtype must be bfloat16, float32 or wider{names}, got {state_dtype}."
        )


_REAL = (jnp.floating, jnp.integer, jnp.bool_)


def number(name: str, value: Any) -> Any:
    """``value`` in the dtype it is used in, or ``None`` if it is traced."""
    if isinstance(value, optax.GradientTransformation):
        raise ValueError(
            f"{name} must be a number, not an optimizer; to wrap one, use "
            "with_synaptic_intelligence, or put this link before it in a chain."
        )
    if callable(value):
        raise ValueError(
            f"{name} must be a number, not a function; to schedule it, wrap what takes "
            "it: optax.inject_hyperparams(si_jax.synaptic_intelligence)"
            f"({name}=schedule), say."
        )
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in _REAL):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    if array.shape != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {array.shape}; to sweep over several "
            "values, use jax.vmap."
        )
    if isinstance(value, jax.core.Tracer):
        return None
    return np.asarray(value, jnp.result_type(float))  # 1e-46 is 0 in float32


def scalar(x: Any) -> jax.Array:
    """A hyperparameter of the state, out of the box that nnx puts it in."""
    value = unboxed(x)
    if jnp.ndim(value) != 0:
        raise ValueError(
            f"opt_state is batched, {jnp.shape(value)} at the front of every array: "
            "call this function inside jax.vmap."
        )
    return jnp.asarray(value)


def missing(
    opt_state: optax.OptState, what: str, makers: str, name: str = "opt_state"
) -> ValueError:
    """The error for a state without the memory that a function needs."""
    if _is_untyped(opt_state):
        return ValueError(
            f"{name} is made of dicts and lists, like a checkpoint that was restored "
            "without a target, not of the optimizer's types: restore it into "
            "tx.init(params), which tells Orbax (or Flax) what to make of it. What "
            "nnx.split took apart, nnx.merge puts together: pass the opt_state of that."
        )
    return ValueError(
        f"{name} holds no {what}: build the optimizer with {makers}, and pass the "
        "state that its init and update return."
    )


def _is_untyped(opt_state: optax.OptState) -> bool:
    """Whether a dict has the fields of a memory."""
    key = jax.tree_util.DictKey
    entries = {
        path[:depth]
        for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)
        for depth in range(1, len(path) + 1)
    }
    return any(
        (*entry[:-1], key("reference")) in entries
        for entry in entries
        if entry[-1] == key("importance")
    )
