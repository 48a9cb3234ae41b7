"""Why does SI work? ``python -m experiments.why``.

Benzing (https://arxiv.org/abs/2006.06357) answers: by a bias of ω, through minibatch
noise, that makes Ω resemble the root of the Fisher information. So ω is taken apart,
each part and each relative is correlated with the others, and takes Ω's place.
"""

import functools

from experiments import permuted_mnist
from experiments.engine import choice, command, driver
from experiments.engine.driver import Method
from experiments.engine.programs import Problem
from experiments.engine.record import Record, is_first
from experiments.scenarios import config as scenarios
from experiments.scenarios.problems import Problems
from experiments.scenarios.problems import make_problems as in_pairs
from experiments.why.config import Config
from experiments.why.findings import grid_name, measures_name, report
from experiments.why.measures import measure
from experiments.why.parts import make_learner, number


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
    methods: dict[str, Method] = {}
    for batch_size in config.batch_sizes:
        make = make_learner(config, batch_size)
        name = measures_name(batch_size)
        if name not in record.runs:
            found = measure(config, make, problems().test)
            record.add(name, found, lambda _: {})
        scales = {"l2": 1.0, **record.runs[name]["scale"]}
        for of in config.importances:
            method, c = f"batch {batch_size}: {of}", 0.0
            if of in scales:
                c = choice.chosen(
                    config,
                    grid_name(batch_size, of),
                    make,
                    lambda: problems().choice,
                    record,
                    candidates(config, scales[of]),
                    {"importance": number(of)},
                )
                method = f"{method} c={c:g}"
            methods[method] = Method(make, c, further={"importance": number(of)})
    if methods:
        driver.run_methods(config, methods, lambda _: problems().test, record)
    if is_first():
        report(config, record)


if __name__ == "__main__":
    command.main(Config, "why", run)
