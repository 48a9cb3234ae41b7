"""Why does SI work? ``python -m experiments.why``.

Benzing (https://arxiv.org/abs/2006.06357) answers: by a bias of ω, through minibatch
noise, that makes Ω resemble the root of the Fisher information. So ω is taken apart,
each part and each relative is correlated with the others, and takes Ω's place.
"""

import dataclasses
import functools

from experiments import permuted_mnist
from experiments.engine import command, driver
from experiments.engine.choice import chosen
from experiments.engine.record import Record, is_first
from experiments.engine.run import Label, Problem, Run
from experiments.scenarios import config as scenarios
from experiments.scenarios.problems import Problems
from experiments.scenarios.problems import make_problems as in_pairs
from experiments.why.config import MEASURES, Config
from experiments.why.findings import report
from experiments.why.measures import measure
from experiments.why.parts import holding, make_learner


def make_problems(config: Config) -> Problems:
    """The tasks to choose on and those to test on."""
    if config.network == "split":
        return in_pairs(
            scenarios.Config(
                data=config.data, data_dir=config.data_dir, held_out=config.held_out
            )
        )

    def permuted(held_out: float) -> Problem:
        return permuted_mnist.make_problem(
            permuted_mnist.Config(
                data=config.data,
                data_dir=config.data_dir,
                tasks=config.tasks,
                held_out=held_out,
            )
        )

    return Problems(permuted(config.held_out), permuted(0.0))


def candidates(config: Config, scale: float) -> list[float]:
    """The strengths to choose from, of an importance of this mean; two digits each."""
    return [float(f"{pull / scale:.2g}") for pull in config.pulls]


def run(config: Config) -> None:
    """Run what is not finished; print and draw."""
    record = Record("why", config, default=f"{config.network}-{config.data}")
    problems = functools.cache(lambda: make_problems(config))
    runs: list[Run] = []
    for batch_size in config.batch_sizes:
        run = Run(
            Label(MEASURES, batch_size=batch_size),
            make_learner(config, batch_size),
            lambda: problems().test,
            range(config.networks),
            config.epochs,
            {"strength": 0.0, "damping": config.damping},
        )
        if run.name not in record.runs:
            measures = measure(run, record.config.max_parallel)
            record.add(run.label, measures, lambda _: {})
        scales = {"l2": 1.0, **record.runs[run.name]["scale"]}
        if missing := {*config.importances} - {*scales, "fine-tuning"}:
            raise command.UserError(
                f"{record.folder} was measured before there was "
                f"{', '.join(sorted(missing))}: choose another --out."
            )
        for of in config.importances:
            arm = dataclasses.replace(
                holding(run, of),
                label=Label(of, batch_size=batch_size),
                seeds=range(config.seeds),
            )
            if of in scales:
                choice = dataclasses.replace(arm, problem=lambda: problems().choice)
                strengths = candidates(config, scales[of])
                c = chosen(choice, strengths, config.grid_seeds, record)
                arm = arm.with_strength(c)
            runs.append(arm)
    if runs:
        driver.run_all(runs, record)
    if is_first():
        report(config, record)


if __name__ == "__main__":
    command.main(Config, "why", run)
