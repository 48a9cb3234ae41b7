"""Fine-tuning a language model without forgetting: ``python -m experiments.finetune``.

A model of bytes is pretrained on an old text and fine-tuned on a new one, without the
old one or with it, by several methods. How much each keeps for how much it learns is
the question; its strength, or when it stops, is the answer.
"""

import dataclasses

from experiments.data import texts
from experiments.engine import command, driver
from experiments.engine.record import is_first
from experiments.finetune.config import PRETRAINING, Config
from experiments.finetune.findings import choose, report, so_far, summary
from experiments.finetune.measures import cost, held, samples
from experiments.finetune.merges import measure
from experiments.finetune.methods import families
from experiments.finetune.study import Study, make_study, then_third
from experiments.finetune.texts import load


def run(config: Config) -> None:
    """Run every method that is not finished, then print and draw all of them."""
    contents = load(config)
    digests = tuple(map(texts.sha256, contents.values()))
    config = dataclasses.replace(config, sha256=digests)
    study = make_study(config, contents)

    def train():
        driver.run_all(study.runs.values(), study.record, summary, so_far)

    train()
    measure(study)
    if config.third_steps and len(contents) > 2:
        chosen = choose(config, study.record.runs)
        then_third(study, {name: arm for name, (arm, _) in chosen.items()})
        train()
    shown(study)
    if is_first():
        report(study)


def shown(study: Study) -> None:
    """Samples, what SI holds and what the methods cost, if there is anything new."""
    config, problem, record, _ = study
    runs = record.runs
    chosen = {name: str(arm) for name, (arm, _) in choose(config, runs).items()}
    whole = [arm for name, arm in chosen.items() if not families(config)[name].lora]
    if set(record.content.get("samples", {})) != {"prompt", PRETRAINING, *whole}:
        record.note("samples", samples(study, [PRETRAINING, *whole]))
        if "si" in chosen:
            record.note("held", {chosen["si"]: held(study, chosen["si"])})
    if config.cost_turns and "cost" not in record.content:
        record.note("cost", cost(config, problem))


if __name__ == "__main__":
    command.main(Config, "finetune", run)
