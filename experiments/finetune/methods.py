"""What is compared: networks, importances, families of methods."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import si_jax
from experiments.engine.run import Label
from experiments.finetune.config import Config
from experiments.networks.transformer import Transformer, functional
from experiments.training import language
from experiments.training.boundaries import consolidate
from experiments.training.loop import Boundary, Carry, Learner
from si_jax import ewc, importance, lora, pytrees

Memory = Literal["si", "ewc", "si product"] | None


class Network(NamedTuple):
    """A language model as pure functions, all of it trained or its adapters."""

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    adapted: bool

    def logits(self, base: Any) -> language.Logits:
        """Of the parameters that are trained; ``base`` are the others, if any."""
        if not self.adapted:
            return self.apply
        return lambda params, text: self.apply(params, base, text)


def network(config: Config, lora_rank: int = 0) -> Network:
    """The transformer; with adapters these alone are trained."""

    def make(key: jax.Array) -> Transformer:
        return Transformer(
            config.width,
            layers=config.layers,
            heads=config.heads,
            length=config.length,
            lora_rank=lora_rank,
            rngs=nnx.Rngs(key),
        )

    trained = (nnx.LoRAParam,) if lora_rank else ()
    return Network(*functional(make, *trained), adapted=bool(lora_rank))


Importance = Callable[[language.Logits, Any, jax.Array, jax.Array], Any]


"""``(logits, params, windows, key) → importance``, a tree like ``params``."""


def half_fisher(logits: Any, params: Any, windows: Any, key: jax.Array) -> Any:
    """Half the Fisher information of a mean over a sequence's bytes."""
    windows = windows[:, :-1]
    information = importance.fisher(logits, params, windows, key)
    return jax.tree.map(lambda f: f / (2 * windows.shape[-1]), information)


def sensitivity(logits: Any, params: Any, windows: Any, key: jax.Array) -> Any:
    """MAS, of the mean over a sequence's bytes."""
    del key
    windows = windows[:, :-1]

    def outputs(params, window):
        return logits(params, window) / windows.shape[-1] ** 0.5

    return importance.sensitivity(outputs, params, windows)


def ones(logits: Any, params: Any, windows: Any, key: jax.Array) -> Any:
    """L2: every parameter is as important."""
    del logits, windows, key
    return jax.tree.map(jnp.ones_like, params)


def kernels(base: Any, opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Of a tree like the network without adapters the leaves beside them, by name."""
    (state,) = pytrees.states(opt_state, lora.ProductConsolidationState)
    leaves = dict(zip(pytrees.names(base), jax.tree.leaves(base), strict=True))
    return {name: leaves[name.removesuffix("lora") + "kernel"] for name in state.pairs}


def half_kept(config: Config, opt_state: optax.OptState) -> optax.Params:
    """Half the Fisher information, as :func:`half_fisher`, from what Adam has kept.

    Its gradient is of a mean over a batch's sequences and over their bytes.
    """
    found = importance.second_moment(
        opt_state, b2=0.999, batch_size=config.batch_size * config.length
    )
    return jax.tree.map(lambda f: f / 2, found)


class Family(NamedTuple):
    """Methods that differ in strength alone.

    Attributes:
      memory: SI's, or EWC's, whatever the importance; or none. "si product" is SI's,
        with what is put in held in the adapters' products.
      importance: what is measured and put in for a text that was learned. Without, SI
        has its own, from the pretraining, and EWC what Adam has kept.
      strengths: c, a method each, or without memory a factor of the learning rate; of
        none, one that is evaluated at every stop.
      rate: a factor of the learning rate, for all of them.
      lora: train adapters alone.
      mixed: train on the old texts, too.
    """

    memory: Memory = None
    importance: Importance | None = None
    strengths: tuple[float, ...] = ()
    rate: float = 1.0
    lora: bool = False
    mixed: bool = False


def families(config: Config) -> dict[str, Family]:
    """What the configuration compares."""
    fisher, slow = config.fisher_strengths, config.slow_si_factor
    fast = config.lora_factor
    every = {
        "fine-tuning": Family(),
        "slow": Family(strengths=config.slow_factors),
        "l2": Family("ewc", ones, config.l2_strengths),
        "ewc": Family("ewc", half_fisher, fisher),
        "mas": Family("ewc", sensitivity, config.mas_strengths),
        "squisher": Family("ewc", None, fisher),
        "si": Family("si", None, config.si_strengths),
        "si fisher": Family("si", half_fisher, fisher),
        "slow si": Family("si", None, config.si_strengths, slow),
        "slow si fisher": Family("si", half_fisher, fisher, slow),
        "lora": Family(rate=fast, lora=True),
        "lora si": Family("si", half_fisher, fisher, fast, lora=True),
        "lora si product": Family("si product", half_fisher, fisher, fast, lora=True),
        "mixed": Family(mixed=True),
    }
    return {name: every[name] for name in config.methods}


def optimizer(
    config: Config,
    memory: Memory,
    strength: jax.typing.ArrayLike,
    damping: jax.typing.ArrayLike,
    rate: float = 1.0,
) -> optax.GradientTransformation:
    """Adam with a memory of a strength, which without one multiplies the rate."""
    rate = config.learning_rate * rate
    if not memory:
        return optax.adam(rate * strength)
    adam = optax.adam(rate)
    if memory == "si product":
        adam = optax.chain(lora.product_consolidation(strength), adam)
    if memory != "ewc":
        return si_jax.with_synaptic_intelligence(
            adam, strength, damping, state_dtype=config.state_dtype
        )
    narrow = "bfloat16" if config.state_dtype else None
    link = ewc.elastic_weight_consolidation(strength, state_dtype=narrow)
    return optax.chain(link, adam)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The pieces of a run from a fresh network, with SI to measure what it takes."""

    config: Config

    def __call__(self, strength: jax.Array, damping: jax.Array) -> Learner:
        """Adam, at a learning rate that rises and falls."""
        config, steps = self.config, self.config.pretraining_steps
        net = network(config)
        rate = optax.warmup_cosine_decay_schedule(
            0, config.learning_rate, steps // 20, steps, config.learning_rate / 10
        )
        tx = si_jax.with_synaptic_intelligence(optax.adam(rate), strength, damping)

        def start(key: jax.Array) -> Carry:
            params = net.init(key)
            return Carry(params, tx.init(params))

        return bind(config, net.apply, tx, start, [consolidate])


@dataclasses.dataclass(frozen=True)
class GoOn:
    """The pieces of a run that goes on from ``start``, one for each run."""

    config: Config
    memory: Memory
    lora: bool
    rate: float = 1.0

    def __call__(
        self, strength: jax.Array, damping: jax.Array, start: Carry, base: Any = None
    ) -> Learner:
        """With adapters, ``base`` are the weights that they are added to."""
        net = network(self.config, self.config.lora_rank if self.lora else 0)
        tx = optimizer(self.config, self.memory, strength, damping, self.rate)
        return bind(self.config, net.logits(base), tx, lambda _: start)


def bind(
    config: Config,
    logits: language.Logits,
    tx: optax.GradientTransformation,
    start: Callable[[jax.Array], Carry],
    boundary: Sequence[Boundary] = (),
) -> Learner:
    """The pieces of a run with the configuration's batches."""
    return language.learner(
        logits,
        tx,
        start,
        batch_size=config.batch_size,
        length=config.length,
        boundary=boundary,
        micro_batch=config.micro_batch,
    )


def arms(name: str, family: Family) -> list[Label]:
    """A family's methods."""
    return [Label(name, c) for c in family.strengths or (None,)]


def means(config: Config, arm: Label, family: Family) -> dict[Label, tuple[float, ...]]:
    """The means of its network and the pretrained one, and their weights.

    Evenly, and, where it learned without a penalty, by importance.
    """
    if family.lora or family.mixed:
        return {}
    every = {"interpolated": config.merge_weights}
    if not family.memory:
        every["merged"] = config.merge_factors
    return {
        dataclasses.replace(arm, role=role): weights
        for role, weights in every.items()
        if weights
    }


def third(arm: Label) -> Label:
    """A method that goes on with the third text."""
    return dataclasses.replace(arm, role="then third")
