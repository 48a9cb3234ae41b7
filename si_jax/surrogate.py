"""The surrogate loss of eq. 4, c Σ Ω (θ̃ − θ)², wherever the importance Ω comes from.

What Synaptic Intelligence and EWC share: the loss, its gradient, and the checks of what
they are given.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from si_jax.pytrees import align, map_states, wide, zeros

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
        return _plus(g, stiffness * (theta - ref.astype(theta.dtype)))

    return jax.tree.map(leaf, grads, params, importance, reference)


def _plus(g: jax.Array, pull: jax.Array) -> jax.Array:
    """The sum in g's dtype; where g is finite it is, too, be it float16."""
    total = g.astype(pull.dtype) + pull
    if (limit := jnp.finfo(g.dtype).max) < jnp.finfo(pull.dtype).max:
        bound = limit.astype(pull.dtype)
        total = jnp.where(jnp.isfinite(g), jnp.clip(total, -bound, bound), total)
    return total.astype(g.dtype)


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


# --- What an optimizer evaluates by itself --------------------------------------------

_FUNCTIONS = ("value_fn", "obj_fn", "grad_fn")
_SEARCHES = optax.ScaleByZoomLinesearchState | optax.ScaleByBacktrackingLinesearchState


class Memory(NamedTuple):
    """Ω, θ̃ and c of a penalty."""

    importance: optax.Params
    reference: optax.Params
    strength: jax.Array


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

    def __init__(self, *memories: Memory) -> None:
        self._memories = memories

    def __call__(self, params: optax.Params) -> jax.Array:
        """Eq. 4, c Σ Ω (θ̃ − θ)², summed over the memories."""

        def of(memory: Memory) -> jax.Array:
            importance, reference, c = memory
            now = align(params, reference, "params")
            terms = penalty(now, importance, reference, c.dtype)
            return c * sum(jax.tree.leaves(terms), jnp.zeros_like(c))

        first, *others = map(of, self._memories)
        return sum(others, first)

    def to_value(self, value: Any, params: optax.Params, sign: int = 1) -> jax.Array:
        """The value of the loss and the penalty, in the value's dtype."""
        return value + sign * self(params).astype(jnp.result_type(value, float))

    def to_grads(self, grads: Any, params: optax.Params, sign: int = 1) -> Any:
        """The gradient of both, in the gradient's dtypes."""
        pull = jax.grad(self)(jax.tree.map(wide, params))
        grads = aligned(grads, params, "grad")
        return jax.tree.map(lambda g, x: _plus(g, sign * x), grads, pull)

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


# --- Initial values and checks --------------------------------------------------------


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
    (value,) = jax.tree.leaves(x)
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
