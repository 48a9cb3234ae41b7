"""What optimizers have kept of the gradients, as an importance."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from si_jax import checks
from si_jax.pytrees import states, wide


def second_moment(
    opt_state: optax.OptState,
    *,
    b2: ArrayLike,
    batch_size: ArrayLike,
    power: ArrayLike = 1.0,
) -> optax.Params:
    r"""The Fisher information that Adam has kept already: no pass, and no data.

    Adam and its kin average the squared gradient, :math:`\nu \leftarrow b_2 \nu +
    (1 - b_2) \bar g^2`. With the bias correction :math:`\hat\nu = \nu / (1 - b_2^t)`
    after t steps,

    .. math::

      F_k \approx (B\, \hat\nu_k)^{\text{power}}.

    Near a minimum the mean of the gradient vanishes, and what is left of
    :math:`\bar g^2`, of a batch of B examples, is the noise, F/B. So this estimates
    the empirical Fisher information, in the units of :func:`fisher`, so that the same c
    fits, if: the gradient has been of the mean loss, near a minimum, for the last
    1/(1 − b2) steps; batches are small beside the data; and labels are as the model has
    them. Far from a minimum, or with large batches, the mean adds B times its square.

    The gradient is the one that the optimizer was given: behind
    ``optax.clip_by_global_norm`` a clipped one, behind SI's or EWC's pull the sum of
    both.

    Args:
      opt_state: the state of ``optax.adam``, ``adamw``, ``nadam``, ``radam``, ``lamb``,
        ``amsgrad`` or ``rmsprop``, wherever it sits inside. ``adamax``, ``yogi`` and
        ``optax.contrib.adopt`` keep something else in a state of the same type, which
        cannot be told apart: not for them.
      b2: the optimizer's own decay (of ``rmsprop``, ``decay``), in (0, 1). ``rmsprop``
        counts its steps only with ``bias_correction=True``; without, ν is taken as it
        is, and wants more steps than 1/(1 − b2).
      batch_size: B, how many examples the gradient of an update is a mean of, at least
        1: over all devices, and over the steps of ``optax.MultiSteps``.
      power: 0.5 gives the root mean square of an example's gradient, Benzing's SOS (for
        α = 0), which he finds SI to approximate. Its units are loss per parameter: c is
        to be chosen anew. (His is of the batch's gradient: his c is ours times √B.)

    Returns:
      A tree like the parameters, float32 at least; ``optax.MaskedNode`` where the
      optimizer has it.

    Raises:
      ValueError: if ``opt_state`` holds no such average or several, no step was taken
        yet, ν is too narrow for ``b2`` (in bfloat16 the average stalls), or arguments
        are out of their ranges. What is traced cannot be refused.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from si_jax import importance
      >>> squared = jnp.array([0.5, -1.0]) ** 2
      >>> opt_state = optax.ScaleByAdamState(  # Adam's, after its first step
      ...     count=jnp.array(1), mu=jnp.zeros(2), nu=(1 - 0.75) * squared
      ... )
      >>> F = importance.second_moment(opt_state, b2=0.75, batch_size=64)
      >>> print(F.round(3))
      [16. 64.]

    References:
      Li et al., `Fishers for Free? <https://arxiv.org/abs/2507.18807>`_, ICML 2025;
      Benzing, `Unifying Importance Based Regularisation Methods for Continual Learning
      <https://arxiv.org/abs/2006.06357>`_, AISTATS 2022
    """
    decay = _within("b2", b2, 0, 1)
    _within("batch_size", batch_size, 1, math.inf, least=True)
    _within("power", power, 0, math.inf)
    # Two of optax's types have no public name.
    counted = optax.scale_by_rms(bias_correction=True).init(0.0)
    centred = optax.scale_by_stddev(bias_correction=True).init(0.0)
    kinds = (
        optax.ScaleByAdamState,
        optax.ScaleByAmsgradState,
        optax.ScaleByRmsState,
        optax.ScaleByRStdDevState,
        type(counted),
        type(centred),
    )
    found = states(opt_state, kinds)
    if not found:
        raise ValueError(
            "opt_state holds no average of squared gradients, as those of optax.adam, "
            "adamw, nadam, radam, lamb, amsgrad and rmsprop do (adagrad's is a sum of "
            "uncounted steps): take fisher or empirical_fisher. If it is a checkpoint "
            "that was restored as dicts, restore it into tx.init(params)."
        )
    if len(found) > 1:
        raise ValueError(
            f"opt_state holds {len(found)} averages of squared gradients: pass the "
            "part of it that you mean, of a chain one entry, of optax.partition one of "
            "its inner_states."
        )
    (state,) = found
    leaves = jax.tree.leaves(state.nu)
    count = checks.scalar(state.count) if "count" in state._fields else None
    started = count if count is not None else sum(map(jnp.count_nonzero, leaves))
    if not isinstance(started, jax.core.Tracer) and not started:
        raise ValueError(
            "the optimizer has taken no step yet, or was reset: take its second "
            "moment before reset_optimizer."
        )
    weight = jnp.ones(())
    if count is not None:
        log = jnp.log(b2) if decay is None else np.log(np.asarray(b2, float))
        log = jnp.asarray(log, weight.dtype)
        weight = -jnp.expm1(count.astype(weight.dtype) * log)

    def leaf(nu):
        info = jnp.finfo(jnp.result_type(nu))
        if decay is not None and 1 - decay < info.eps:
            raise ValueError(
                f"the second moment is {info.dtype}, in which an average with b2 = "
                f"{b2} stalls: keep the optimizer's state in float32."
            )
        corrected = wide(nu) / weight.astype(wide(nu).dtype)
        scaled = corrected * jnp.asarray(batch_size, corrected.dtype)
        return scaled ** jnp.asarray(power, corrected.dtype)

    return jax.tree.map(leaf, state.nu)


def _within(
    name: str, value: Any, low: float, high: float, *, least: bool = False
) -> Any:
    """``value`` as a number, ``None`` if traced; refused outside of the interval."""
    x = checks.number(name, value)
    if x is not None and not (low < x < high or (least and x == low)):
        interval = f"{'[' if least else '('}{low}, {high})"
        raise ValueError(f"{name} must be in {interval}, got {value}.")
    return x
