"""The surrogate loss of eq. 4, c Σ Ω (θ̃ − θ)², wherever the importance Ω comes from.

What Synaptic Intelligence and EWC share: the loss, its gradient, and both added to what
an optimizer evaluates by itself.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from si_jax.checks import aligned
from si_jax.pytrees import align, map_states, wide


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
        return plus(g, stiffness * (theta - ref.astype(theta.dtype)))

    return jax.tree.map(leaf, grads, params, importance, reference)


def plus(g: jax.Array, pull: jax.Array) -> jax.Array:
    """The sum in g's dtype; where g is finite it is, too, be it float16."""
    total = g.astype(pull.dtype) + pull
    if (limit := jnp.finfo(g.dtype).max) < jnp.finfo(pull.dtype).max:
        bound = limit.astype(pull.dtype)
        total = jnp.where(jnp.isfinite(g), jnp.clip(total, -bound, bound), total)
    return total.astype(g.dtype)


# --- What an optimizer evaluates by itself --------------------------------------------

_FUNCTIONS = ("value_fn", "obj_fn", "grad_fn")
_SEARCHES = optax.ScaleByZoomLinesearchState | optax.ScaleByBacktrackingLinesearchState


class Memory(NamedTuple):
    """Ω, θ̃ and c of a penalty; called, the penalty."""

    importance: optax.Params
    reference: optax.Params
    strength: jax.Array

    def __call__(self, params: optax.Params) -> jax.Array:
        """Eq. 4, c Σ Ω (θ̃ − θ)²."""
        c = self.strength
        now = align(params, self.reference, "params")
        terms = penalty(now, self.importance, self.reference, c.dtype)
        return c * sum(jax.tree.leaves(terms), jnp.zeros_like(c))


class Penalized:
    """A function of the parameters with the penalty, or its gradient, added."""

    def __init__(
        self, function: Callable[..., Any], add: Callable[[Any, optax.Params], Any]
    ) -> None:
        functools.update_wrapper(self, function)  # line searches read its signature
        self._function, self._add = function, add

    def __call__(self, params: optax.Params, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, and the penalty at ``params``."""
        return self._add(self._function(params, *args, **kwargs), params)


class Penalty:
    """The penalties of several memories, added to what is of the task's loss alone."""

    def __init__(self, *memories: Any) -> None:
        self._memories = memories

    def __call__(self, params: optax.Params) -> jax.Array:
        """Eq. 4, c Σ Ω (θ̃ − θ)², summed over the memories."""
        first, *others = (memory(params) for memory in self._memories)
        return sum(others, first)

    def to_value(self, value: Any, params: optax.Params, sign: int = 1) -> jax.Array:
        """The value of the loss and the penalty, in the value's dtype."""
        return value + sign * self(params).astype(jnp.result_type(value, float))

    def to_grads(self, grads: Any, params: optax.Params, sign: int = 1) -> Any:
        """The gradient of both, in the gradient's dtypes."""
        pull = jax.grad(self)(jax.tree.map(wide, params))
        grads = aligned(grads, params, "grad")
        return jax.tree.map(lambda g, x: plus(g, sign * x), grads, pull)

    def to_extra_args(
        self, extra_args: dict[str, Any], params: optax.Params
    ) -> dict[str, Any]:
        """The arguments of an update that are of the loss, those of both."""
        added = {
            "value": lambda value: self.to_value(value, params),
            "grad": lambda grads: self.to_grads(grads, params),
            "value_fn": lambda function: Penalized(function, self.to_value),
            "obj_fn": lambda function: Penalized(function, self.to_value),
            "grad_fn": lambda function: Penalized(function, self.to_grads),
        }
        return {
            name: added[name](x) if name in added and x is not None else x
            for name, x in extra_args.items()
        }

    def to_searches(
        self, inner_state: optax.OptState, params: optax.Params, sign: int
    ) -> optax.OptState:
        """Line searches keep value and gradient for the next step to be asked for."""

        def leaf(state: Any) -> Any:
            value = self.to_value(state.value, params, sign)
            grads = state.grad
            if grads is not None:
                grads = self.to_grads(grads, params, sign)
            return state._replace(value=value, grad=grads)

        return map_states(leaf, inner_state, _SEARCHES)


def refuse_functions(extra_args: dict[str, Any]) -> None:
    """What comes after a link would evaluate them without the link's penalty."""
    for name in _FUNCTIONS:
        function = extra_args.get(name)
        if function is not None and not isinstance(function, Penalized):
            raise ValueError(
                f"{name} is evaluated without the surrogate loss, as a link of a chain "
                "cannot add it for what comes after: use "
                "si_jax.with_synaptic_intelligence, around EWC's link, too (with "
                f"strength=0.0 for EWC alone). If no optimizer needs {name}, leave it "
                "out."
            )
