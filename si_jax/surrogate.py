"""The surrogate loss of eq. 4, c Σ Ω (θ̃ − θ)², wherever the importance Ω comes from.

What Synaptic Intelligence and EWC share: the loss, its gradient, and the checks of what
they are given.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from si_jax.pytrees import align, wide, zeros

# The message of optax's own transformations, which do not export it.
NO_PARAMS_MSG = (
    "You are using a transformation that requires the current value of "
    "parameters, but you are not passing `params` when calling `update`."
)


def penalty(
    params: optax.Params,
    importance: optax.Params,
    reference: optax.Params,
    dtype: DTypeLike,
) -> optax.Params:
    """Eq. 4 before c, leaf by leaf: Σ Ω (θ̃ − θ)² of each, a scalar."""

    def leaf(p, omega, ref):
        theta = wide(p)
        square = jnp.square(ref.astype(theta.dtype) - theta)
        return jnp.sum(omega.astype(theta.dtype) * square, dtype=dtype)

    return jax.tree.map(leaf, params, importance, reference)


def pull_back(
    grads: optax.Updates,
    params: optax.Params,
    importance: optax.Params,
    reference: optax.Params,
    strength: jax.Array,
) -> optax.Updates:
    """The gradient of eq. 4: g + 2 c Ω (θ − θ̃), in g's dtype."""

    def leaf(g, p, omega, ref):
        theta = wide(p)
        stiffness = 2 * strength.astype(theta.dtype) * omega.astype(theta.dtype)
        pull = stiffness * (theta - ref.astype(theta.dtype))
        return (g.astype(pull.dtype) + pull).astype(g.dtype)

    return jax.tree.map(leaf, grads, params, importance, reference)


def aligned(
    grads: optax.Updates, params: optax.Params | None, reference: optax.Params
) -> tuple[optax.Updates, optax.Params]:
    """Gradients and parameters in the containers of the state's trees."""
    if params is None:
        raise ValueError(NO_PARAMS_MSG)
    return (
        jax.tree.map(jnp.asarray, align(grads, reference, "updates")),
        align(params, reference, "params"),
    )


# --- Initial values and checks --------------------------------------------------------


def zeros_wide(params: optax.Params) -> optax.Params:
    """Zeros like the parameters, float32 at least."""
    return jax.tree.map(lambda p: zeros(wide(p)), params)


def check_real(params: optax.Params) -> None:
    """Refuse parameters that are not real floating-point arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"Importances need real floating-point parameters; "
                f"params{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}. "
                "Leave it out with optax.masked; for complex parameters, wrap the "
                "optimizer in optax.contrib.split_real_and_imaginary."
            )


def check_strength(strength: Any) -> None:
    """Refuse a strength that is not a number, negative or infinite."""
    c = number("strength", strength)
    if c is not None and not 0 <= c < np.inf:
        raise ValueError(
            f"strength (c of eq. 4) must be >= 0 and finite, got {strength}."
        )


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
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {jnp.shape(value)}; to sweep over "
            "several values, use jax.vmap."
        )
    if isinstance(value, jax.core.Tracer):
        return None
    return np.asarray(value, jnp.result_type(float))  # 1e-46 is 0 in float32


def scalar(x: Any) -> jax.Array:
    """A hyperparameter of the state, out of the box that nnx puts it in."""
    (value,) = jax.tree.leaves(x)
    if jnp.ndim(value) != 0:
        raise ValueError(
            f"opt_state is batched, {jnp.shape(value)} at the front of every array: "
            "call this function inside jax.vmap."
        )
    return value


def missing(
    opt_state: optax.OptState, what: str, makers: str, name: str = "opt_state"
) -> ValueError:
    """The error for a state without the memory that a function needs."""
    if _is_untyped(opt_state):
        return ValueError(
            f"{name} is made of dicts and lists, like a checkpoint that was restored "
            "without a target, not of the optimizer's types: restore it into "
            "tx.init(params), which tells Orbax (or Flax) what to make of it."
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
