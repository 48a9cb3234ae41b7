"""From one text to the next: the methods, bound to what they go on with."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import si_jax
from experiments.engine import command, driver
from experiments.engine.record import Record
from experiments.engine.run import Label, Problem, Run
from experiments.finetune.config import PRETRAINING, Config
from experiments.finetune.methods import (
    Family,
    GoOn,
    Importance,
    Pretraining,
    arms,
    families,
    half_kept,
    kernels,
    network,
    optimizer,
    third,
)
from experiments.finetune.texts import make_problem, stops, with_stages
from experiments.training import language
from experiments.training.loop import Carry
from si_jax import ewc, lora, sweep


class Study(NamedTuple):
    """The methods, and what they are run on.

    Attributes:
      config: the experiment's.
      problem: the texts.
      record: what was found.
      runs: by name, of every strength.
    """

    config: Config
    problem: Problem
    record: Record
    runs: dict[str, Run]

    def add(self, label: Label, **settings: Any) -> None:
        """A run more, of all seeds."""
        config = self.config
        strength = 1.0 if label.strength is None else label.strength
        settings = {
            "seeds": range(config.seeds),
            "epochs": config.epochs,
            "hyperparameters": {"strength": strength, "damping": config.damping},
            **settings,
        }
        self.runs[str(label)] = Run(label, **settings)

    def learning(
        self, which: Sequence[int], steps: Sequence[int]
    ) -> Callable[[], Problem]:
        """What learns some of the texts, stage after stage of so many steps."""
        return functools.partial(
            with_stages, self.problem, which, steps, self.config.epochs
        )

    def group(self, name: str, seeds: Sequence[int]) -> Run:
        """A run of some of its seeds."""
        return dataclasses.replace(self.runs[name], seeds=seeds)

    def carry(self, name: str, seeds: Sequence[int]) -> Carry:
        """What a finished run ended with."""
        return driver.trained(self.group(name, seeds), self.record)

    def windows(self, text: int) -> np.ndarray:
        """Of the part of a text that is trained on: uint8 ``(examples, length + 1)``.

        They are spread evenly; what is important for the text is measured on them. No
        method but those with a Fisher information or MAS sees old ones.
        """
        trained, length = self.problem.train, self.config.length + 1
        begin, size = trained.begin[text], trained.size[text]
        starts = language.spread(begin, size, self.config.fisher_examples, length)
        return np.asarray(language.cut(trained.content, starts, length))


def measured(
    config: Config,
    measure: Importance,
    lora: bool,
    networks: Any,
    windows: np.ndarray,
    seeds: Sequence[int],
) -> Any:
    """The importance of some runs' networks, parameters and base, on some windows."""
    mesh = sweep.mesh(len(seeds))
    per_run = sweep.spread((networks, np.asarray(seeds, np.uint32)), mesh)
    program = _measuring(config, measure, lora, mesh)
    return sweep.gather(program(*per_run, sweep.replicate(windows, mesh)), len(seeds))


@functools.cache  # what several methods measure is compiled once
def _measuring(
    config: Config, measure: Importance, lora: bool, mesh: Mesh
) -> Callable[..., Any]:
    net = network(config, config.lora_rank if lora else 0)

    def of_one(networks, seed, windows):
        params, base = networks
        key = jax.random.fold_in(jax.random.key(seed), 2**31)
        return measure(net.logits(base), params, windows, key)

    return sweep.over_runs(of_one, mesh, mapped=2)


def make_study(config: Config, contents: Mapping[str, bytes]) -> Study:
    """The methods, none of them run."""
    problem = make_problem(list(contents.values()), config)
    study = Study(config, problem, Record("finetune", config), {})
    study.add(
        Label(PRETRAINING),
        make_learner=Pretraining(config),
        problem=study.learning((0,), (config.pretraining_steps,)),
        hyperparameters={"strength": 0.0, "damping": config.damping},
    )
    kept = jax.jit(jax.vmap(functools.partial(half_kept, config)))
    pretrained_carry = functools.lru_cache(maxsize=2)(
        functools.partial(study.carry, PRETRAINING)
    )

    def origin(family: Family, seeds: Sequence[int]) -> Mapping[str, Any]:
        """The pretrained networks with what is important for the old text."""
        if "diverged" in study.record.runs.get(PRETRAINING, {}):
            raise command.UserError(
                "The pretraining diverged: there is nothing to fine-tune. Lower the "
                "learning rate, with another --out."
            )
        pretrained = pretrained_carry(seeds)
        params, base = pretrained.params, None
        if family.lora:
            base = params
            adapters = network(config, config.lora_rank).init
            params = jax.vmap(lambda seed: adapters(jax.random.key(seed)))(
                np.asarray(seeds, np.uint32)
            )
        if family.importance is not None:
            # With B = 0 the product's importance is that of the network without it.
            product = family.memory == "si product"
            networks = (base, None) if product else (params, base)
            how = family.importance, family.lora and not product
            windows = study.windows(0)
            omega = measured(config, *how, networks, windows, seeds)
        elif family.memory == "ewc":
            omega = kept(pretrained.opt_state)
        elif family.memory:
            omega = si_jax.synapses(pretrained.opt_state).importance
        else:
            omega = None

        def begin(params, omega):
            opt_state = optimizer(config, family.memory, 0.0, config.damping).init(
                params
            )
            if family.memory == "si product":
                omega = kernels(omega, opt_state)
                opt_state = lora.consolidate(opt_state, params, omega)
            elif omega is not None:
                opt_state = si_jax.add_importance(opt_state, omega)
            return Carry(params, opt_state)

        start = jax.jit(jax.vmap(begin))(params, omega)
        return {"start": jax.device_get(start)} | ({"base": base} if base else {})

    for name, family in families(config).items():
        at = [config.steps] if family.strengths else stops(config.steps, config)
        which, steps = (0, 1) if family.mixed else (1,), np.diff([0, *at]).tolist()
        start = functools.lru_cache(maxsize=2)(functools.partial(origin, family))
        for arm in arms(name, family):
            study.add(
                arm,
                make_learner=GoOn(config, family.memory, family.lora, family.rate),
                problem=study.learning(which, steps),
                given=start,
            )
    return study


def then_third(study: Study, chosen: Mapping[str, Label]) -> None:
    """Let the chosen methods go on with the third text, what they know of two in one.

    Args:
      study: gets a method more for each of them.
      chosen: by family, the method.
    """
    config = study.config
    kept = jax.jit(jax.vmap(functools.partial(half_kept, config)))

    def origin(family: Family, arm: Label, seeds: Sequence[int]) -> Mapping[str, Any]:
        before = study.runs[str(arm)].given(seeds)
        carry = study.carry(str(arm), seeds)
        params, opt_state, _ = carry
        if family.memory == "ewc":
            if family.importance is None:
                omega = kept(opt_state)
            else:
                networks, windows = (params, before.get("base")), study.windows(1)
                how = family.importance, family.lora
                omega = measured(config, *how, networks, windows, seeds)
            opt_state = jax.jit(jax.vmap(ewc.consolidate))(opt_state, params, omega)
        elif family.memory:
            opt_state = jax.jit(jax.vmap(si_jax.consolidate))(opt_state, params)
        start = jax.device_get(carry._replace(opt_state=opt_state))
        return {**before, "start": start}

    for name, arm in chosen.items():
        family = families(config)[name]
        which = (0, 1, 2) if family.mixed else (2,)
        study.runs[str(third(arm))] = dataclasses.replace(
            study.runs[str(arm)],
            label=third(arm),
            problem=study.learning(which, (config.third_steps,)),
            given=functools.partial(origin, family, arm),
        )
