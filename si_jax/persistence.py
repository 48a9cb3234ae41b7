"""An optimizer that keeps its state itself, for trainers that drop it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import io_callback

from si_jax.checks import own
from si_jax.pytrees import align


class PersistentState(NamedTuple):
    """State of :func:`persistent`.

    Attributes:
      inner_state: the state of the wrapped optimizer.
      params: the parameters after the last update.
    """

    inner_state: optax.OptState
    params: optax.Params


class _Kept:
    """The last state: on the host, random keys as numbers."""

    state: PersistentState | None = None
    implementations: PersistentState | None = None  # of its keys; elsewhere ""


class _Persistent(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """A pair of functions as any other, and the state that they last handed out."""

    kept: _Kept

    @property
    def opt_state(self) -> optax.OptState:
        return self._last().inner_state

    @opt_state.setter
    def opt_state(self, opt_state: optax.OptState) -> None:
        state = _numbers(self._last()._replace(inner_state=opt_state))
        if _kinds(state) != _kinds(self.kept.state):
            raise ValueError(
                "opt_state is of another optimizer, or for other parameters, than this "
                "one's: put what it remembers into this one's with si_jax.carry_over("
                "opt_state, into=tx.opt_state)."
            )
        self.kept.state = jax.tree.map(np.array, state)

    @property
    def params(self) -> optax.Params:
        return self._last().params

    def _last(self) -> PersistentState:
        jax.effects_barrier()  # what was dispatched may not have run yet
        if self.kept.state is None:
            raise ValueError(
                "there is no state yet: train first, or call init(params)."
            )
        return _typed(self.kept.state, self.kept.implementations)


def persistent(inner: optax.GradientTransformation) -> _Persistent:
    """Keep an optimizer's state from one call of a trainer to the next.

    Many trainers take an optimizer, train, and return the model alone: the state is
    dropped, and the next call starts with ``init``. Synaptic Intelligence then runs and
    does nothing. This one hands its state out at every step, and ``init`` takes it in
    again, moments and counts included; under ``jit`` and ``scan``, too. It also serves
    trainers that pass no parameters to ``update``, as it knows them since ``init``.

    Take a new one for every network and every run: it has one state. The copy to the
    host at every step is cheap for small networks only. It is made for one device;
    under ``jax.vmap`` JAX refuses it.

    Args:
      inner: the optimizer, say one with Synaptic Intelligence. It must be outermost, as
        ``params`` are what its updates make of the last.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with two attributes:
      ``opt_state``, the state of ``inner`` after the last update, which may be
      assigned, and ``params``, the parameters that belong to it, as the trainer gave
      them to the optimizer (in their unconstrained form, say).

    Raises:
      ValueError: if ``init`` is called for parameters, or ``opt_state`` is assigned, of
        another structure or other shapes than the state that is kept, or if there is
        none yet.

    Example:
      >>> import jax, jax.numpy as jnp, optax, si_jax
      >>> def fit(loss, w, tx):  # somebody's trainer
      ...     opt_state = tx.init(w)
      ...     for _ in range(100):
      ...         updates, opt_state = tx.update(jax.grad(loss)(w), opt_state)
      ...         w = optax.apply_updates(w, updates)
      ...     return w
      >>> tx = si_jax.persistent(
      ...     si_jax.with_synaptic_intelligence(optax.sgd(0.02), 1.0, damping=1e-3)
      ... )
      >>> w = fit(lambda w: 10 * (w[0] - 1) ** 2, jnp.zeros(2), tx)
      >>> tx.opt_state = si_jax.consolidate(tx.opt_state, tx.params)
      >>> w = fit(lambda w: (w[0] + w[1] - 3) ** 2, w, tx)
      >>> print(w.round(1))  # without: [2. 1.]
      [1. 2.]
    """
    inner = optax.with_extra_args_support(inner)
    kept = _Kept()

    def take(fresh: PersistentState) -> PersistentState:
        if kept.state is None:
            give(fresh)
            return fresh
        return kept.state._replace(params=fresh.params)

    def give(state: PersistentState) -> None:  # a copy: it is lent for this call alone
        kept.state = jax.tree.map(np.array, state)

    def init_fn(params: optax.Params) -> PersistentState:
        params = jax.tree.map(lambda p: jnp.array(own(p)), params)
        fresh = PersistentState(inner.init(params), params)
        implementations, fresh = _implementations(fresh), _numbers(fresh)
        if kept.state is not None and _kinds(kept.state) != _kinds(fresh):
            raise ValueError(
                "persistent keeps the state of other parameters: make another one for "
                "these, and put what is remembered into its opt_state with "
                "si_jax.carry_over."
            )
        kept.implementations = implementations
        kept_or_fresh = io_callback(
            take, jax.eval_shape(lambda: fresh), fresh, ordered=True
        )
        return _typed(kept_or_fresh, implementations)

    def update_fn(
        updates: optax.Updates,
        state: PersistentState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PersistentState]:
        now = state.params if params is None else align(params, state.params, "params")
        updates, inner_state = inner.update(
            updates, state.inner_state, now, **extra_args
        )
        state = PersistentState(inner_state, optax.apply_updates(now, updates))
        io_callback(give, None, _numbers(state), ordered=True)
        return updates, state

    tx = _Persistent(init_fn, update_fn)
    tx.kept = kept
    return tx


def _kinds(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


# --- Random keys, which no callback takes ---------------------------------------------


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _implementations(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_impl(x) if _is_key(x) else "", tree)


def _numbers(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _typed(numbers: Any, implementations: Any) -> Any:
    def leaf(x, impl):
        return jax.random.wrap_key_data(x, impl=impl) if impl else jnp.array(x)

    return jax.tree.map(leaf, numbers, implementations)
