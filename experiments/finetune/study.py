"""From one text to the next: the methods, bound to what they go on with."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import si_jax
from experiments.engine import command, driver, programs
from experiments.engine.driver import Method
from experiments.engine.record import Record
from experiments.finetune.config import PRETRAINING, Config
from experiments.finetune.methods import (
    Family,
    Importance,
    arms,
    families,
    go_on,
    network,
    optimizer,
    pretraining,
    third,
)
from experiments.finetune.texts import make_problem, on, stops
from experiments.training import language
from experiments.training.loop import Carry
from si_jax import ewc, sweep


class Study(NamedTuple):
    """The methods, and what they are run on.

    Attributes:
      config: the experiment's.
      problem: the texts.
      record: what was found.
      methods: by name, of every strength.
    """

    config: Config
    problem: programs.Problem
    record: Record
    methods: dict[str, Method]

    def carry(self, name: str, seeds: Sequence[int]) -> Carry:
        """What a finished method ended with."""
        config, problem, record, methods = self
        return driver.trained(config, name, methods[name], seeds, problem, record)

    def windows(self, text: int) -> np.ndarray:
        """Of the part of a text that is trained on: uint8 ``(examples, length + 1)``.

        They are spread evenly; what is important for the text is measured on them. No
        method but those with a Fisher information or MAS sees old ones.
        """
        trained, length = self.problem.train, self.config.length + 1
        begin, size = trained.begin[text], trained.size[text]
        starts = language.spread(begin, size, self.config.fisher_examples, length)
        return np.asarray(language.cut(trained.content, starts, length))


@functools.cache
def measured(
    config: Config, measure: Importance, lora: bool
) -> Callable[[Any, Any, np.ndarray, Sequence[int]], Any]:
    """Compile the importance of some runs' parameters on some windows."""
    net = network(config, config.lora_rank if lora else 0)

    def of_one(own, seed, windows):
        params, base = own
        key = jax.random.fold_in(jax.random.key(seed), 2**31)
        return measure(net.logits(base), params, windows, key)

    def of_all(params, base, windows, seeds):
        mesh = sweep.mesh(len(seeds))
        own = sweep.spread(((params, base), np.asarray(seeds, np.uint32)), mesh)
        program = compiled(mesh)
        return sweep.gather(program(*own, sweep.replicate(windows, mesh)), len(seeds))

    @functools.cache
    def compiled(mesh):
        return sweep.over_runs(of_one, mesh, mapped=2)

    return of_all


def make_study(config: Config, contents: Mapping[str, bytes]) -> Study:
    """The methods, none of them run."""
    problem = make_problem(list(contents.values()), config)
    study = Study(config, problem, Record("finetune", config), {})
    study.methods[PRETRAINING] = pretraining(config)
    own_network = functools.lru_cache(maxsize=2)(
        functools.partial(study.carry, PRETRAINING)
    )

    def given(family: Family, seeds: Sequence[int]) -> Mapping[str, Any]:
        """The pretrained networks with what is important for the old text."""
        if "diverged" in study.record.runs.get(PRETRAINING, {}):
            raise command.UserError(
                "The pretraining diverged: there is nothing to fine-tune. Lower the "
                "learning rate, with another --out."
            )
        pretrained = own_network(seeds)
        params, base = pretrained.params, None
        if family.lora:
            base = params
            adapters = network(config, config.lora_rank).init
            params = jax.vmap(lambda seed: adapters(jax.random.key(seed)))(
                np.asarray(seeds, np.uint32)
            )
        if family.importance is not None:
            measure = measured(config, family.importance, family.lora)
            omega = measure(params, base, study.windows(0), seeds)
        elif family.memory:
            omega = si_jax.synapses(pretrained.opt_state).importance
        else:
            omega = None

        def begin(params, omega):
            opt_state = optimizer(config, family.memory, 0.0, config.damping).init(
                params
            )
            if omega is not None:
                opt_state = si_jax.add_importance(opt_state, omega)
            return Carry(params, opt_state)

        start = jax.jit(jax.vmap(begin))(params, omega)
        return {"start": jax.device_get(start)} | ({"base": base} if base else {})

    for name, family in families(config).items():
        make = go_on(config, family.memory, family.lora, family.rate)
        at = [config.steps] if family.strengths else stops(config.steps, config)
        which = (0, 1) if family.mixed else (1,)
        start = functools.lru_cache(maxsize=2)(functools.partial(given, family))
        for arm, strength in arms(name, family).items():
            study.methods[arm] = Method(
                make,
                strength,
                on(config, which, tuple(np.diff([0, *at]).tolist())),
                given=start,
            )
    return study


def then_third(study: Study, chosen: Mapping[str, str]) -> None:
    """Let the chosen methods go on with the third text, what they know of two in one.

    Args:
      study: gets a method more for each of them.
      chosen: by family, the method.
    """
    config = study.config

    def given(family: Family, arm: str, seeds: Sequence[int]) -> Mapping[str, Any]:
        before = study.methods[arm].given(seeds)
        carry = study.carry(arm, seeds)
        params, opt_state, _ = carry
        if family.memory == "ewc":
            measure = measured(config, family.importance, family.lora)
            omega = measure(params, before.get("base"), study.windows(1), seeds)
            opt_state = jax.jit(jax.vmap(ewc.consolidate))(opt_state, params, omega)
        elif family.memory == "si":
            opt_state = jax.jit(jax.vmap(si_jax.consolidate))(opt_state, params)
        start = jax.device_get(carry._replace(opt_state=opt_state))
        return {**before, "start": start}

    for name, arm in chosen.items():
        family = families(config)[name]
        which = (0, 1, 2) if family.mixed else (2,)
        study.methods[third(arm)] = study.methods[arm]._replace(
            learns=on(config, which, (config.third_steps,)),
            given=functools.partial(given, family, arm),
        )
