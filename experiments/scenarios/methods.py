"""What is compared."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import si_jax
from experiments.networks.models import MLP
from experiments.scenarios.config import Config
from experiments.split_mnist import IMAGE_SHAPE
from experiments.training.boundaries import (
    consolidate,
    consolidate_fisher,
    consolidate_importance,
    consolidate_kronecker,
    consolidate_second_moment,
    consolidate_sensitivity,
    kronecker_factors,
    reset,
)
from experiments.training.classifier import learner
from experiments.training.loop import Boundary, Learner
from si_jax import ewc, kronecker


class Arm(NamedTuple):
    """A method before its strength is chosen.

    Attributes:
      make_learner: the pieces of a run as a function of what may be swept.
      candidates: the strengths to choose from; none if it has none.
      further: which importance, of those methods that differ in it alone.
    """

    make_learner: Callable[..., Learner]
    candidates: tuple[float, ...] = ()
    further: Mapping[str, float] = {}


def arms(config: Config) -> dict[str, Arm]:
    """The methods by name.

    L2, online EWC and MAS have one surrogate loss, c Σ Ω (θ̃ − θ)² with θ̃ the weights at
    the last task's end, and Ω, summed over the tasks, their own: 1 of every weight,
    Fisher information, the outputs' sensitivity. They are one program, and fine-tuning
    is theirs with c = 0. EWC pulls to the weights of each task; Squisher is EWC with
    the Fisher information that Adam has kept, which costs no pass; Kronecker is EWC
    with that of whole layers, in factors.
    """
    model = MLP(config.hidden, 10, config.zero_init_output)
    adam = optax.adam(config.learning_rate)
    count = config.importance_examples
    fisher = consolidate_fisher(model, count)
    importances = (
        consolidate_importance(lambda p, *_: jax.tree.map(jnp.ones_like, p), 1),
        fisher,
        consolidate_sensitivity(model, count),
    )

    def pieces(tx: optax.GradientTransformation, *boundary: Boundary) -> Learner:
        fresh = [reset(tx, keep_count=config.keep_count)] * config.reset_optimizer
        return learner(
            model,
            tx,
            IMAGE_SHAPE,
            batch_size=config.batch_size,
            boundary=[*boundary, *fresh],
        )

    def plain(strength: jax.Array, damping: jax.Array) -> Learner:
        del strength, damping
        return pieces(adam)

    def synaptic(strength: jax.Array, damping: jax.Array) -> Learner:
        tx = si_jax.with_synaptic_intelligence(adam, strength, damping)
        return pieces(tx, consolidate)

    def merged(boundary: Boundary) -> Callable[..., Learner]:
        def make(strength: jax.Array, damping: jax.Array) -> Learner:
            del damping
            link = ewc.elastic_weight_consolidation(strength)
            return pieces(optax.chain(link, adam), boundary)

        return make

    def factored(strength: jax.Array, damping: jax.Array) -> Learner:
        del damping
        shapes = kronecker_factors(model, IMAGE_SHAPE)
        link = kronecker.kronecker_consolidation(strength, shapes)
        return pieces(optax.chain(link, adam), consolidate_kronecker(model, count))

    def summed(
        strength: jax.Array, damping: jax.Array, importance: jax.Array
    ) -> Learner:
        del damping
        link = ewc.elastic_weight_consolidation(strength, decay=1.0)

        def boundary(*arguments):
            which = importance.astype(jnp.int32)
            return jax.lax.switch(which, importances, *arguments)

        return pieces(optax.chain(link, adam), boundary)

    l2, online_ewc, mas = ({"importance": float(i)} for i in range(len(importances)))
    return {
        "fine-tuning": Arm(summed, (), l2),
        "l2": Arm(summed, config.l2_strengths, l2),
        "si": Arm(synaptic, config.si_strengths),
        "ewc": Arm(merged(fisher), config.ewc_strengths),
        "squisher": Arm(
            merged(consolidate_second_moment(config.batch_size)), config.ewc_strengths
        ),
        "kronecker": Arm(factored, config.kronecker_strengths),
        "online ewc": Arm(summed, config.ewc_strengths, online_ewc),
        "mas": Arm(summed, config.mas_strengths, mas),
        "joint": Arm(plain),
    }
