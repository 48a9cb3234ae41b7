"""Synaptic Intelligence as an optax gradient transformation.

The equation numbers are those of Zenke, Poole & Ganguli, "Continual Learning Through
Synaptic Intelligence", ICML 2017 (https://arxiv.org/abs/1703.04200).

=========  ==================  =====================================================
paper      here                rule
=========  ==================  =====================================================
ω, eq. 3   ``path_integral``   ω ← ω − g·Δθ at every step; g is the gradient of the
                               task's loss alone, Δθ what the parameter really moved
Ω, eq. 5   ``importance``      Ω ← max(Ω + ω / (Δ² + ξ), 0) at a task's end, Δ = θ − θ̃
θ̃         ``reference``       θ at the end of the last task, at first its initial value
c, eq. 4   ``strength``        the loss gains c Σ Ω (θ̃ − θ)², its gradient 2 c Ω (θ − θ̃)
ξ, eq. 5   ``damping``         ξ > 0 bounds Ω where a parameter hardly moved
=========  ==================  =====================================================

``max(…, 0)`` is not in the paper but in its authors' code: noise can leave a negative
sum, which would push the parameter away. ``nonnegative=False`` is eq. 5 to the letter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from si_jax import kronecker, lora, narrow
from si_jax.checks import (
    aligned,
    check_real,
    check_state_dtype,
    check_strength,
    frozen,
    inputs,
    missing,
    number,
    own,
    scalar,
    zeros_wide,
)
from si_jax.ewc import ElasticWeightConsolidationState
from si_jax.kronecker import KroneckerConsolidationState
from si_jax.lora import ProductConsolidationState
from si_jax.pytrees import copied, map_states, states, stored, wide, zeros
from si_jax.surrogate import Memory, Penalty, pull_back, refuse_functions


class Synapses(NamedTuple):
    """What each parameter remembers: three trees shaped like the parameters.

    Attributes:
      path_integral: ω of eq. 3, the drop of the current task's loss credited to each
        parameter. Changes at every step; float32 at least. (Inside of a compact state
        bfloat16, and Ω is there as √Ω in float8_e5m2.)
      importance: Ω of eq. 5, summed over the finished tasks. Changes at a task's end;
        float32 at least, or ``state_dtype``.
      reference: θ̃ of eq. 4, a copy of the parameters at the last task's end. Changes
        at a task's end; the parameters' dtype, or ``state_dtype``.
    """

    path_integral: optax.Params
    importance: optax.Params
    reference: optax.Params


class SynapticIntelligenceState(NamedTuple):
    """State of :func:`synaptic_intelligence`.

    Attributes:
      synapses: ω, Ω and θ̃.
      strength: c of eq. 4 at the last update, a scalar, for :func:`surrogate_loss`;
        set where the transformation is made.
      damping: ξ of eq. 5 at the last update, likewise, for :func:`consolidate`.
      nonnegative: whether Ω is kept from falling below zero, a boolean scalar.
      last_params: the parameters at the last update, to see what they moved since.
      last_grads: the gradient at the last update, which that movement belongs to.
      pending: whether there was an update in this task, a boolean scalar.
    """

    synapses: Synapses
    strength: jax.Array
    damping: jax.Array
    nonnegative: jax.Array
    last_params: optax.Params
    last_grads: optax.Updates
    pending: jax.Array


class WithSynapticIntelligenceState(NamedTuple):
    """State of :func:`with_synaptic_intelligence`.

    Attributes:
      synapses: ω, Ω and θ̃.
      strength: c of eq. 4 at the last update, a scalar, for :func:`surrogate_loss`;
        set where the transformation is made.
      damping: ξ of eq. 5 at the last update, likewise, for :func:`consolidate`.
      nonnegative: whether Ω is kept from falling below zero, a boolean scalar.
      inner_state: the state of the wrapped optimizer.
    """

    synapses: Synapses
    strength: jax.Array
    damping: jax.Array
    nonnegative: jax.Array
    inner_state: optax.OptState


_State = SynapticIntelligenceState | WithSynapticIntelligenceState


# --- The method: equations 3, 4 and 5 -------------------------------------------------


def _integrate(
    path_integral: optax.Params,
    grads: optax.Updates,
    movement: optax.Updates,
    params: optax.Params,
) -> optax.Params:
    """Eq. 3: ω ← ω − g·Δθ; nothing for a gradient that is no finite number."""

    def leaf(w, g, moved, p):
        earned = jnp.where(jnp.isfinite(g), g.astype(moved.dtype) * moved, 0)
        total = wide(w) - earned.astype(wide(w).dtype)
        return narrow.written(total, w.dtype, g, p)

    return jax.tree.map(leaf, path_integral, grads, movement, params)


def _consolidate(state: _State, params: optax.Params) -> _State:
    """Eq. 5 with the old θ̃, then θ̃ ← θ, then ω ← 0."""
    params = aligned(params, state.synapses.reference, "params")
    if isinstance(state, SynapticIntelligenceState):
        state = observe(state, params, jax.tree.map(zeros, state.last_grads))
        state = state._replace(pending=jax.tree.map(jnp.zeros_like, state.pending))
    path_integral, importance, reference = state.synapses
    damping, nonnegative = scalar(state.damping), scalar(state.nonnegative)

    def leaf(w, omega, ref, p):
        earned = wide(w)
        displacement = (wide(p) - ref.astype(wide(p).dtype)).astype(earned.dtype)
        gain = earned / (jnp.square(displacement) + damping.astype(earned.dtype))
        total = narrow.read(omega).astype(earned.dtype) + gain
        total = jnp.where(nonnegative, jnp.maximum(total, 0), total)
        return narrow.written(total, omega.dtype, earned, p)

    return state._replace(
        synapses=Synapses(
            path_integral=jax.tree.map(zeros, path_integral),
            importance=jax.tree.map(leaf, path_integral, importance, reference, params),
            reference=copied(params, reference),
        )
    )


def observe(
    state: SynapticIntelligenceState,
    params: optax.Params,
    grads: optax.Updates,
    *,
    unbiased: bool = False,
) -> SynapticIntelligenceState:
    """Credit a gradient with the movement since the last, and keep the new one.

    The last one; or the new one if ``unbiased``, where there is a step to credit and it
    is a finite number.
    """
    movement = jax.tree.map(
        lambda now, before: wide(now) - wide(before), params, state.last_params
    )
    credited = state.last_grads
    if unbiased:
        credited = jax.tree.map(
            lambda last, new: jnp.where(
                scalar(state.pending) & jnp.isfinite(new), new.astype(last.dtype), last
            ),
            state.last_grads,
            grads,
        )
    omega = _integrate(state.synapses.path_integral, credited, movement, params)
    return state._replace(
        synapses=state.synapses._replace(path_integral=omega),
        last_params=copied(params, state.last_params),
        last_grads=copied(grads, state.last_grads),
    )


# --- The two forms --------------------------------------------------------------------


def synaptic_intelligence(
    strength: ArrayLike = 0.1,
    damping: ArrayLike = 0.1,
    *,
    nonnegative: bool = True,
    unbiased: bool = False,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Synaptic Intelligence as the first link of an optax chain.

    Adds the gradient of the surrogate loss to that of the task,

    .. math::

      g_k \leftarrow g_k + 2\,c\,\Omega_k\,(\theta_k - \tilde\theta_k),

    and accumulates :math:`\omega_k \leftarrow \omega_k - g_k\,\Delta\theta_k` with the
    gradient that came in. It sees what the parameters moved one call later, as the
    difference of the ``params`` of two calls, so it is exact whatever happens to the
    update after it: moments, clipping, decay, rounding, projection. The price is two
    more trees than :func:`with_synaptic_intelligence` keeps: the last parameters and
    the last gradient. ``path_integral`` lags one step behind until :func:`consolidate`.

    Pass the gradient of the task's loss alone; there is nothing to add to the loss.
    Call :func:`consolidate` at every task's end. An entry of the gradient that is no
    finite number is credited with nothing. Two things to know:

    - ``optax.MultiSteps`` belongs around it, so that the gradient it is shown is the
      accumulated one that moves the parameters.
    - A link cannot change what an optimizer after it evaluates by itself: ``value_fn``,
      ``grad_fn`` and ``obj_fn`` are refused, as the optimizer would undo what Synaptic
      Intelligence does. For ``optax.lbfgs`` and its like take the wrapper. A ``value``
      reaches the optimizer as it is: for ``optax.polyak_sgd`` pass that of the loss
      plus :func:`surrogate_loss`.

    Args:
      strength: c of eq. 4, at least 0. May be traced (swept by ``jax.vmap``, or
        scheduled with ``optax.inject_hyperparams``).
      damping: ξ of eq. 5, above 0, in units of a squared parameter. May be traced.
      nonnegative: keep Ω from falling below zero, as the authors' code does; ``False``
        is eq. 5 to the letter.
      unbiased: ω ← ω − g·Δθ with the gradient after the step, of the next minibatch,
        instead of the one that made it. The noise of that one is in Δθ, too, so that
        eq. 3 credits it as if the loss had fallen; the noise of the next is not, and
        Σω follows the loss. Benzing shows that SI often owes its success to the bias.
        A task's last step takes its own gradient, as there is no other yet.
      state_dtype: of Ω and θ̃; ``"bfloat16"`` halves their bytes, and rounds Ω at every
        task's end and where a parameter is pulled to. By default Ω is float32 at least,
        θ̃ like the parameter. ``"compact"`` is 13 bytes a parameter: ω and θ̃ in
        bfloat16, √Ω in float8_e5m2, so that Ω goes in steps of a factor of 1.3 to 1.6
        from 2⁻³² to 2³¹, and stays there. Ω and ω are rounded up or down by chance (of
        a hash of parameters and gradients), so that no long sum stalls.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` whose state is a
      :class:`SynapticIntelligenceState`.

    Raises:
      ValueError: for a negative ``strength`` or a ``damping`` that is not positive
        (when they are concrete), a ``state_dtype`` narrower than bfloat16, parameters
        that are not real floating-point arrays, an update without ``params``, with
        trees that do not fit the state or with functions to be evaluated.

    Example:
      >>> import jax.numpy as jnp, optax, si_jax
      >>> tx = optax.chain(
      ...     si_jax.synaptic_intelligence(strength=1.0, damping=0.25), optax.sgd(0.25)
      ... )
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> opt_state = tx.init(params)
      >>> grads = {"w": jnp.array([2.0, 0.0])}  # of the task's loss
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> opt_state = si_jax.consolidate(opt_state, params)  # the task is finished
      >>> synapses = si_jax.synapses(opt_state)
      >>> print(synapses.importance["w"])  # 2 × 0.5 / (0.5² + 0.25), and 0: not moved
      [2. 0.]

    References:
      Zenke, Poole & Ganguli, `Continual Learning Through Synaptic Intelligence
      <https://arxiv.org/abs/1703.04200>`_, ICML 2017; Benzing, `Unifying Importance
      Based Regularisation Methods for Continual Learning
      <https://arxiv.org/abs/2006.06357>`_, AISTATS 2022
    """
    _check_hyperparameters(strength, damping, state_dtype)
    strength, damping = frozen(strength), frozen(damping)

    def init_fn(params: optax.Params) -> SynapticIntelligenceState:
        check_real(params)
        params = jax.tree.map(own, params)
        synapses = _init_synapses(params, state_dtype)
        return SynapticIntelligenceState(
            synapses,
            *_hyperparameters(strength, damping, nonnegative),
            last_params=copied(params, params),
            last_grads=zeros_wide(params),
            pending=jnp.array(False),
        )

    def update_fn(
        updates: optax.Updates,
        state: SynapticIntelligenceState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SynapticIntelligenceState]:
        refuse_functions(extra_args)
        importance, reference = remembered(state.synapses)
        grads, params = inputs(updates, params, reference)
        c, xi, floored = _hyperparameters(strength, damping, nonnegative, state)
        pulled = pull_back(grads, params, importance, reference, c)
        state = observe(state, params, grads, unbiased=unbiased)
        return pulled, state._replace(
            strength=c, damping=xi, nonnegative=floored, pending=jnp.array(True)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def with_synaptic_intelligence(
    inner: optax.GradientTransformation,
    strength: ArrayLike = 0.1,
    damping: ArrayLike = 0.1,
    *,
    nonnegative: bool = True,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Synaptic Intelligence around a whole optimizer.

    The same method as :func:`synaptic_intelligence`, with less state and faster: it
    holds the gradient and the final update at once, so
    :math:`\omega_k \leftarrow \omega_k - g_k\,\Delta\theta_k` needs no memory of the
    last step. :math:`\Delta\theta` is what ``optax.apply_updates`` will make of the
    update, rounding included. **It must be outermost** among the transformations that
    change the update: what is chained behind it, or done to the parameters by hand
    (``optax.lookahead``), goes unseen. Wrappers that only decide when or on which
    leaves to update (``optax.MultiSteps``, ``optax.apply_if_finite``, ``optax.masked``,
    ``optax.partition``) belong around it. An entry of the gradient that is no finite
    number is credited with nothing.

    An optimizer that evaluates the loss itself (``optax.lbfgs`` and other line
    searches, ``optax.contrib.sam``, ``optax.polyak_sgd``) is passed the task's loss, as
    ever: the surrogate loss, also that of EWC inside ``inner``, is added to ``value``
    and to what ``value_fn`` and ``obj_fn`` return, its gradient to ``grad`` and to what
    ``grad_fn`` returns. What a line search of optax keeps for
    ``optax.value_and_grad_from_state`` is of the task's loss again. The strength of
    that EWC is the one its state records: of the last update, where it is scheduled.

    Args:
      inner: the optimizer, any :class:`optax.GradientTransformation`. Extra arguments
        of ``update`` are passed on to it; those above are of the loss.
      strength: c of eq. 4, at least 0. May be traced (swept by ``jax.vmap``, or
        scheduled with ``optax.inject_hyperparams``).
      damping: ξ of eq. 5, above 0, in units of a squared parameter. May be traced.
      nonnegative: keep Ω from falling below zero, as the authors' code does; ``False``
        is eq. 5 to the letter.
      state_dtype: of Ω and θ̃; ``"bfloat16"`` halves their bytes, and rounds Ω at every
        task's end and where a parameter is pulled to. By default Ω is float32 at least,
        θ̃ like the parameter. ``"compact"`` is 5 bytes a parameter: ω and θ̃ in
        bfloat16, √Ω in float8_e5m2, so that Ω goes in steps of a factor of 1.3 to 1.6
        from 2⁻³² to 2³¹, and stays there. Ω and ω are rounded up or down by chance (of
        a hash of parameters and gradients), so that no long sum stalls.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` whose state is a
      :class:`WithSynapticIntelligenceState`.

    Raises:
      ValueError: as :func:`synaptic_intelligence`, but for functions, and if ``inner``
        already contains Synaptic Intelligence.

    Example:
      >>> import jax.numpy as jnp, optax, si_jax
      >>> tx = si_jax.with_synaptic_intelligence(
      ...     optax.sgd(0.25), strength=1.0, damping=0.25
      ... )
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> opt_state = tx.init(params)
      >>> grads = {"w": jnp.array([2.0, 0.0])}  # of the task's loss
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> print(si_jax.synapses(opt_state).path_integral["w"])  # −g·Δθ = 2 × 0.5
      [1. 0.]

    References:
      Zenke, Poole & Ganguli, `Continual Learning Through Synaptic Intelligence
      <https://arxiv.org/abs/1703.04200>`_, ICML 2017
    """
    if not hasattr(inner, "update"):
        raise ValueError(f"inner must be an optimizer, got {inner!r}.")
    _check_hyperparameters(strength, damping, state_dtype)
    strength, damping = frozen(strength), frozen(damping)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> WithSynapticIntelligenceState:
        check_real(params)
        synapses = _init_synapses(jax.tree.map(own, params), state_dtype)
        inner_state = inner.init(params)
        if find_synaptic(inner_state):
            raise ValueError(
                "with_synaptic_intelligence wraps an optimizer that already contains "
                "Synaptic Intelligence: use the wrapper or the link, not both."
            )
        return WithSynapticIntelligenceState(
            synapses, *_hyperparameters(strength, damping, nonnegative), inner_state
        )

    def update_fn(
        updates: optax.Updates,
        state: WithSynapticIntelligenceState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, WithSynapticIntelligenceState]:
        importance, reference = remembered(state.synapses)
        grads, params = inputs(updates, params, reference)
        c, xi, floored = _hyperparameters(strength, damping, nonnegative, state)
        pulled = pull_back(grads, params, importance, reference, c)
        # Inside, all that is of the loss is of loss and penalty; outside, of the loss.
        penalty = Penalty(Memory(importance, reference, c), *_penalties(state))
        updates, inner_state = inner.update(
            pulled,
            penalty.to_searches(state.inner_state, params, 1),
            params,
            **penalty.to_extra_args(extra_args, params),
        )
        after = optax.apply_updates(params, updates)
        movement = jax.tree.map(lambda p, new: stored(new) - wide(p), params, after)
        omega = _integrate(state.synapses.path_integral, grads, movement, params)
        return updates, WithSynapticIntelligenceState(
            state.synapses._replace(path_integral=omega),
            c,
            xi,
            floored,
            penalty.to_searches(inner_state, after, -1),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- What one does with the state -----------------------------------------------------


def consolidate(opt_state: optax.OptState, params: optax.Params) -> optax.OptState:
    """Close a task: update Ω (eq. 5), move θ̃ to the parameters, set ω to zero.

    Pure; works under ``jit``, ``scan``, ``vmap`` and ``cond``, and finds Synaptic
    Intelligence by type wherever it sits inside ``opt_state``: in a chain, masked,
    partitioned, under ``MultiSteps``, in an ``nnx.Optimizer``'s state, or in a tree
    that holds the optimizer's state, such as a whole Flax ``TrainState``. The rest of
    ``opt_state`` is returned as it is; see :func:`reset_optimizer` to start the next
    task with fresh moments. An ``nnx.Optimizer`` takes the new state in place:
    ``nnx.update(optimizer.opt_state, nnx.state(opt_state))``.

    ω belongs to the last weights. A task that ends with others, the best or an average,
    is closed as the guide *When nobody says that a task ends* has it.

    Args:
      opt_state: the state of an optimizer that contains
        :func:`synaptic_intelligence` or :func:`with_synaptic_intelligence`.
      params: the parameters at the task's end, all of them, also those that
        ``optax.masked`` hides from Synaptic Intelligence.

    Returns:
      ``opt_state``, consolidated, of the same structure, shapes and dtypes.

    Raises:
      ValueError: if there is no Synaptic Intelligence in ``opt_state``, if ``params``
        does not fit it, or if the state is batched (then call it inside ``jax.vmap``).

    Example:
      >>> import jax.numpy as jnp, optax, si_jax
      >>> tx = si_jax.with_synaptic_intelligence(optax.sgd(0.5), damping=1.0)
      >>> params = jnp.array([0.0])
      >>> opt_state = tx.init(params)
      >>> updates, opt_state = tx.update(jnp.array([-2.0]), opt_state, params)
      >>> params = optax.apply_updates(params, updates)  # moved by 1, ω = 2
      >>> opt_state = si_jax.consolidate(opt_state, params)
      >>> print(si_jax.synapses(opt_state).importance)  # 2 / (1² + 1)
      [1.]
    """
    _require(opt_state)
    return map_states(lambda state: _consolidate(state, params), opt_state, _State)


def synapses(opt_state: optax.OptState) -> Synapses:
    """ω, Ω and θ̃, wherever Synaptic Intelligence sits inside ``opt_state``.

    Args:
      opt_state: the state of an optimizer that contains Synaptic Intelligence once.

    Returns:
      A :class:`Synapses`, three trees shaped like the parameters (with
      ``optax.MaskedNode`` where ``optax.masked`` left them out).

    Raises:
      ValueError: if ``opt_state`` holds no Synaptic Intelligence, or more than one
        (``optax.partition`` with several: pass each part's state by itself).

    Example:
      >>> import jax.numpy as jnp, optax, si_jax
      >>> tx = optax.chain(si_jax.synaptic_intelligence(), optax.adam(1e-3))
      >>> print(si_jax.synapses(tx.init(jnp.array([0.5]))).reference)
      [0.5]
    """
    found = _require(opt_state)
    if len(found) > 1:
        raise ValueError(
            f"opt_state holds Synaptic Intelligence {len(found)} times: pass the part "
            "of it that you mean."
        )
    kept = found[0].synapses

    def widened(x):  # what optax.tree.map_params put there is left alone
        return wide(x) if getattr(x, "dtype", None) == jnp.bfloat16 else x

    path_integral = jax.tree.map(widened, kept.path_integral)
    return Synapses(path_integral, *remembered(kept))


def remembered(memory: Any) -> tuple[optax.Params, optax.Params]:
    """Ω and θ̃, as numbers, of synapses or of EWC's state."""
    return jax.tree.map(narrow.read, memory.importance), memory.reference


# --- Initial values and checks --------------------------------------------------------


def _penalties(state: WithSynapticIntelligenceState) -> list[Any]:
    """Those of the other memories in the wrapped optimizer."""
    links = (
        ElasticWeightConsolidationState
        | KroneckerConsolidationState
        | ProductConsolidationState
    )
    return [penalty_of(x) for x in states(state.inner_state, links)]


def penalty_of(state: Any) -> Any:
    """What a memory's state adds to the loss, a function of the parameters."""
    c = scalar(state.strength)
    if isinstance(state, KroneckerConsolidationState):
        return kronecker.Memory(state.factors, state.reference, c)
    if isinstance(state, ProductConsolidationState):
        return lora.Memory(state.pairs, state.reference, c)
    return Memory(*remembered(getattr(state, "synapses", state)), c)


def _init_synapses(params: optax.Params, state_dtype: DTypeLike | None) -> Synapses:
    dtypes = None, state_dtype, state_dtype
    if state_dtype == "compact":
        dtypes = jnp.bfloat16, narrow.ROOT, jnp.bfloat16

    def held(tree: optax.Params, dtype: DTypeLike | None) -> optax.Params:
        return jax.tree.map(lambda x: jnp.array(x, dtype or jnp.result_type(x)), tree)

    trees = zeros_wide(params), zeros_wide(params), params
    return Synapses(*map(held, trees, dtypes))


def _hyperparameters(
    strength: ArrayLike,
    damping: ArrayLike,
    nonnegative: bool,
    state: _State | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Arrays of the state's dtype, so that it is stable under scan and cond.

    Copies, so that donating the state leaves the caller's array alive.
    """
    dtype = jnp.result_type(float if state is None else scalar(state.strength))
    return (
        jnp.array(strength, dtype),
        jnp.array(damping, dtype),
        jnp.array(nonnegative, bool),
    )


def _check_hyperparameters(
    strength: Any, damping: Any, state_dtype: DTypeLike | None
) -> None:
    check_state_dtype(state_dtype, "compact")
    check_strength(strength)
    xi = number("damping", damping)
    if xi is not None and not 0 < xi < np.inf:
        raise ValueError(f"damping (ξ of eq. 5) must be > 0 and finite, got {damping}.")


def find_synaptic(opt_state: optax.OptState) -> list[Any]:
    """The states of Synaptic Intelligence inside ``opt_state``."""
    return states(opt_state, _State)


def _require(opt_state: optax.OptState) -> list[Any]:
    makers = "si_jax.synaptic_intelligence or si_jax.with_synaptic_intelligence"
    if found := find_synaptic(opt_state):
        return found
    raise missing(opt_state, "Synaptic Intelligence", makers)
