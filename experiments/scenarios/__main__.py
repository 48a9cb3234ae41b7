"""The three scenarios on split MNIST: ``python -m experiments.scenarios``.

The same five pairs of digits, told apart three ways: with the task given, without it
but with the same two outputs for every pair, and as a growing number of classes.
"""

import dataclasses
import functools
from typing import Literal

from experiments.engine import command, driver
from experiments.engine.choice import chosen
from experiments.engine.record import Record, is_first
from experiments.engine.run import Label, Problem, Run, at_once
from experiments.scenarios.config import Config, Scenario
from experiments.scenarios.findings import report
from experiments.scenarios.methods import arms
from experiments.scenarios.problems import in_scenario, make_problems


def run(config: Config) -> None:
    """Run what is not finished, all the grids first; then print and draw."""
    record = Record("scenarios", config, default=config.data)
    known = arms(config)
    problems = functools.cache(lambda: make_problems(config))

    @functools.cache
    def problem(scenario: Scenario, split: Literal["choice", "test"]) -> Problem:
        return in_scenario(scenario, getattr(problems(), split))

    runs: list[Run] = []
    for scenario in config.scenario:
        for method in config.methods:
            arm = known[method]
            run = Run(
                Label(method, scenario=scenario),
                arm.make_learner,
                functools.partial(problem, scenario, "choice"),
                range(config.seeds),
                config.epochs,
                {"strength": 0.0, "damping": config.damping, **arm.further},
            )
            if arm.candidates:
                run = run.with_strength(
                    chosen(run, arm.candidates, config.grid_seeds, record)
                )
            test = functools.partial(problem, scenario, "test")
            if method == "joint":
                test = functools.partial(at_once, test)
            runs.append(dataclasses.replace(run, problem=test))
    driver.run_all(runs, record)
    if is_first():
        report(config, record)


if __name__ == "__main__":
    command.main(Config, "scenarios", run)
