"""The importances, and a learner that holds with any of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import si_jax
from experiments.data.tasks import mask_logits
from experiments.engine.run import Run
from experiments.networks.models import MLP
from experiments.training.boundaries import (
    consolidate,
    consolidate_fisher,
    consolidate_importance,
    consolidate_second_moment,
    consolidate_sensitivity,
    reset,
)
from experiments.training.classifier import learner
from experiments.training.loop import Boundary, Carry, Learner
from experiments.why.config import TITLES, Config
from si_jax import ewc, importance


class Watched(NamedTuple):
    """What :func:`watch` keeps of the current task's gradients: trees like parameters.

    Attributes:
      path_integral: ω of the gradients that follow the steps, without the last step.
      absolute: Σ|g|.
      squared: Σg².
      last_params: at the last step.
    """

    path_integral: optax.Params
    absolute: optax.Params
    squared: optax.Params
    last_params: optax.Params


def watch() -> optax.GradientTransformation:
    """A link of a chain that changes nothing: see :class:`Watched`."""

    def init(params: optax.Params) -> Watched:
        first, second, third = (jax.tree.map(jnp.zeros_like, params) for _ in range(3))
        return Watched(first, second, third, jax.tree.map(jnp.copy, params))

    def update(
        grads: optax.Updates, state: Watched, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Watched]:
        integral, absolute, squared, last = state
        return grads, Watched(
            jax.tree.map(
                lambda w, g, p, q: w - g * (p - q), integral, grads, params, last
            ),
            jax.tree.map(lambda total, g: total + jnp.abs(g), absolute, grads),
            jax.tree.map(lambda total, g: total + jnp.square(g), squared, grads),
            jax.tree.map(jnp.copy, params),
        )

    return optax.GradientTransformation(init, update)


def boundaries(model: MLP, count: int, batch_size: int) -> dict[str, Boundary]:
    """Each importance as what adds it, at a task's end, to that of EWC's link.

    The optimizer is a named chain of Synaptic Intelligence with strength 0, ``"si"``,
    :func:`watch`, ``"watched"``, online EWC, ``"ewc"``, which holds what is added, and
    others.
    """

    def added(measure: Callable[[Carry], optax.Params]) -> Boundary:
        def boundary(carry, *_):
            held = ewc.consolidate(carry.opt_state, carry.params, measure(carry))
            return carry._replace(opt_state=held)

        return boundary

    def ones(carry):
        return jax.tree.map(jnp.ones_like, carry.params)

    def equation_5(carry, synaptic):
        """What it adds to the importance so far, in the core's own hands."""
        before = carry.opt_state["ewc"].importance
        synapses = synaptic.synapses._replace(importance=before)
        after = si_jax.consolidate(synaptic._replace(synapses=synapses), carry.params)
        return jax.tree.map(jnp.subtract, after.synapses.importance, before)

    def with_path_integral(synaptic, omega):
        return synaptic._replace(
            synapses=synaptic.synapses._replace(path_integral=omega)
        )

    def biased(carry):
        return equation_5(carry, carry.opt_state["si"])

    def unbiased(carry):
        synaptic, watched = carry.opt_state["si"], carry.opt_state["watched"]
        # As in the core, the last step is credited with its own gradient.
        synaptic = with_path_integral(synaptic, watched.path_integral)
        return equation_5(carry, synaptic)

    def bias(carry):
        synaptic, watched = carry.opt_state["si"], carry.opt_state["watched"]
        both = synaptic.synapses.path_integral, watched.path_integral
        # The last step has none: in both it is credited with its own gradient.
        synaptic = synaptic._replace(last_params=carry.params)
        omega = jax.tree.map(jnp.subtract, *both)
        return equation_5(carry, with_path_integral(synaptic, omega))

    def logits_of(classes):
        def logits(params, image):
            out: Any = model.apply(params, image[None])
            return mask_logits(out, classes)[0]

        return logits

    def root(params, images, classes, key):
        information = importance.fisher(logits_of(classes), params, images, key)
        return jax.tree.map(jnp.sqrt, information)

    def hessian(params, images, classes, _):
        # Of a ReLU net the exact Fisher diagonal is the Hessian's.
        return importance.fisher(logits_of(classes), params, images, exact=True)

    return {
        "l2": added(ones),
        "si": added(biased),
        "unbiased": added(unbiased),
        "bias": added(bias),
        "root fisher": consolidate_importance(root, count),
        "fisher": consolidate_fisher(model, count),
        "mas": consolidate_sensitivity(model, count),
        "absolute": added(lambda carry: carry.opt_state["watched"].absolute),
        "squared": added(lambda carry: carry.opt_state["watched"].squared),
        "hessian": consolidate_importance(hessian, count),
        "squisher": consolidate_second_moment(batch_size),
        "sos": consolidate_second_moment(batch_size, power=0.5),
    }


def holding(run: Run, name: str) -> Run:
    """The same, old tasks held with one of the importances.

    Which one is a hyperparameter, its number in :func:`boundaries`, so that all share a
    program; fine-tuning has any, with c = 0.
    """
    number = float(max(tuple(TITLES).index(name) - 1, 0))
    values = {**run.hyperparameters, "importance": number}
    return dataclasses.replace(run, hyperparameters=values)


def make_learner(config: Config, batch_size: int) -> Callable[..., Learner]:
    """The pieces of a run with any of the importances: one program for all of them."""
    model = MLP(config.hidden, 10, config.zero_init_output)
    every = tuple(boundaries(model, config.importance_examples, batch_size).values())

    def make(strength: jax.Array, damping: jax.Array, importance: jax.Array) -> Learner:
        tx = optax.named_chain(
            ("si", si_jax.synaptic_intelligence(0.0, damping)),
            ("watched", watch()),
            ("ewc", ewc.elastic_weight_consolidation(strength, decay=1.0)),
            ("adam", optax.adam(config.learning_rate)),
        )

        def chosen(*arguments):
            return jax.lax.switch(importance.astype(jnp.int32), every, *arguments)

        def watch_afresh(carry, *_):
            fresh = {"watched": watch().init(carry.params)}
            return carry._replace(opt_state=carry.opt_state | fresh)

        return learner(
            model,
            tx,
            (28, 28, 1),
            batch_size=batch_size,
            boundary=[
                chosen,
                consolidate,
                watch_afresh,
                *([reset(tx)] * config.reset_optimizer),
            ],
        )

    return make
