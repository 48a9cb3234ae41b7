"""The three scenarios on split MNIST: ``python -m experiments.scenarios``.

The same five pairs of digits, told apart three ways: with the task given, without it
but with the same two outputs for every pair, and as a growing number of classes.
"""

import functools

from experiments.engine import command, driver
from experiments.engine.choice import chosen
from experiments.engine.driver import Method
from experiments.engine.programs import Problem
from experiments.engine.record import Record, is_first
from experiments.scenarios.config import Config, Scenario
from experiments.scenarios.findings import grid_name, report
from experiments.scenarios.methods import arms
from experiments.scenarios.problems import in_scenario, jointly, make_problems


def run(config: Config) -> None:
    """Run what is not finished, all the grids first; then print and draw."""
    record = Record("scenarios", config, default=config.data)
    known = arms(config)
    problems = functools.cache(lambda: make_problems(config))

    def choice_problem(scenario: Scenario) -> Problem:
        return in_scenario(scenario, problems().choice)

    methods: dict[str, Method] = {}
    for scenario in config.scenario:
        for method in config.methods:
            name, c, arm = f"{scenario}: {method}", 0.0, known[method]
            if arm.candidates:
                c = chosen(
                    config,
                    grid_name(scenario, method),
                    arm.make_learner,
                    functools.partial(choice_problem, scenario),
                    record,
                    arm.candidates,
                    arm.further,
                )
                name = f"{name} c={c:g}"
            learns = functools.partial(in_scenario, scenario)
            if method == "joint":
                learns = functools.partial(jointly, scenario)
            methods[name] = Method(arm.make_learner, c, learns, further=arm.further)
    driver.run_methods(config, methods, lambda _: problems().test, record)
    if is_first():
        report(config, record)


if __name__ == "__main__":
    command.main(Config, "scenarios", run)
