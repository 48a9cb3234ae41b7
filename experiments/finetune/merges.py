"""What is measured on finished networks, without training any further.

Means of the pretrained network and a fine-tuned one, and how far each went from the
pretrained one on the new text. A record without its checkpoints is left as it is.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import si_jax
from experiments.engine import driver
from experiments.engine.measures import count
from experiments.engine.run import Label
from experiments.finetune.config import DIVERGENCE, PRETRAINING, Config
from experiments.finetune.findings import summary
from experiments.finetune.methods import (
    Family,
    arms,
    bind,
    families,
    half_fisher,
    means,
    network,
)
from experiments.finetune.study import Study, measured
from experiments.training import language
from experiments.training.loop import Carry
from si_jax import ewc, sweep


def measure(study: Study) -> None:
    """Record what is missing of the methods that are finished."""
    record = study.record

    @functools.cache
    def pretrained(seeds: range) -> Any:
        return study.carry(PRETRAINING, seeds).params

    @functools.cache
    def needed(seeds: range) -> Any:
        """The Fisher information of the old text."""
        return fisher(study, pretrained(seeds), 0, seeds)

    for name, family in families(study.config).items():
        for arm in arms(name, family):
            begin = 0
            for part in record.runs[str(arm)].get("parts") or [{}]:
                seeds = range(begin, begin + part.get("seeds", count_of(study, arm)))
                of_group(study, family, arm, seeds, pretrained, needed)
                begin = seeds.stop


def count_of(study: Study, label: Label) -> int:
    """How many seeds are recorded."""
    run = study.record.runs.get(str(label))
    return count(run) if run else 0


def of_group(
    study: Study,
    family: Family,
    arm: Label,
    seeds: range,
    pretrained: Callable[[range], Any],
    needed: Callable[[range], Any],
) -> None:
    """The same, of seeds that were trained together.

    They wait for those before them, with which they would be confused.
    """
    config, record = study.config, study.record
    known = record.content.get(DIVERGENCE, {})

    def missing(label: Label) -> bool:
        noted = len(known.get(str(label), []))
        return min(noted, count_of(study, label)) == seeds.start

    todo = {k: x for k, x in means(config, arm, family).items() if missing(k)}
    if not todo and not missing(arm):
        return
    run = study.group(str(arm), seeds)
    end = driver.kept(run, record)
    if end is None:
        return
    base = pretrained(seeds)
    ends = functools.partial(losses, study, seeds, base, family.lora)
    if missing(arm):
        several = not family.strengths
        carries = driver.after_each_stage(run, record) if several else [end]
        found = [ends(carry.params)[DIVERGENCE] for carry in carries]
        note(study, arm, seeds, np.stack(found, axis=1))
    for label, weights in todo.items():
        start = time.perf_counter()
        networks = averages(study, label, seeds, base, end.params, weights, needed)
        rows = [ends(params) for params in networks]
        result: dict[str, Any] = {
            k: np.stack([row[k] for row in rows], axis=1) for k in rows[0]
        }
        divergence = result.pop(DIVERGENCE)
        result["seconds"] = round(time.perf_counter() - start, 1)
        if count_of(study, label) <= seeds.start:
            record.add(label, result, summary)
        note(study, label, seeds, divergence)


def note(study: Study, label: Label, seeds: range, divergence: np.ndarray) -> None:
    """Keep the divergence of some more seeds."""
    known = dict(study.record.content.get(DIVERGENCE, {}))
    before = known.get(str(label), [])[: seeds.start]
    known[str(label)] = [*before, *divergence.tolist()]
    study.record.note(DIVERGENCE, known)


def averages(
    study: Study,
    label: Label,
    seeds: range,
    base: Any,
    params: Any,
    weights: Sequence[float],
    needed: Callable[[range], Any],
) -> Iterator[Any]:
    """The pretrained networks and the fine-tuned, averaged with each of the weights."""
    if label.role == "interpolated":
        return (_evenly(base, params, np.float32(w)) for w in weights)
    old, new = needed(seeds), fisher(study, params, 1, seeds)
    return (_by_importance(base, params, old, new, np.float32(w)) for w in weights)


def fisher(study: Study, params: Any, text: int, seeds: range) -> Any:
    """Half the Fisher information of some networks on a text."""
    windows = study.windows(text)
    return measured(study.config, half_fisher, False, (params, None), windows, seeds)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, None))
def _evenly(base: Any, params: Any, weight: jax.Array) -> Any:
    before = ewc.elastic_weight_consolidation(0.0).init(base)
    return si_jax.merge(before, params, weight)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, None))
def _by_importance(base: Any, params: Any, old: Any, new: Any, factor: Any) -> Any:
    before = ewc.elastic_weight_consolidation(0.0).init(base)
    before = si_jax.add_importance(before, old)
    return si_jax.merge(before, params, jax.tree.map(lambda f: factor * f, new))


def losses(
    study: Study, seeds: Sequence[int], base: Any, lora: bool, params: Any
) -> dict[str, np.ndarray]:
    """Of some networks, on both halves of every text, and the divergence.

    Returns:
      ``test``, ``choice`` in bits a byte ``(seeds, texts)``, divergence ``(seeds,)``.
    """
    problem, mesh = study.problem, sweep.mesh(len(seeds))
    starts = {"test": problem.test_tasks, "choice": problem.train_tasks}
    program = _losses(study.config, lora, mesh)
    per_run = sweep.spread((params, base), mesh)
    shared = sweep.replicate((problem.train, starts), mesh)
    return sweep.gather(program(*per_run, *shared), len(seeds))


@functools.cache
def _losses(config: Config, lora: bool, mesh: Mesh) -> Callable[..., Any]:
    plain, net = network(config), network(config, config.lora_rank if lora else 0)

    def of_one(params, base, texts, starts):
        logits = net.logits(base)
        carry = Carry(params, ())
        pieces = bind(config, logits, optax.identity(), lambda _: carry)
        found = {half: pieces.evaluate(carry, texts, x) for half, x in starts.items()}

        def divergence(start):
            window = language.cut(texts.content, start, config.length + 1)
            models = (plain.apply, base), (logits, params)
            return language.divergence(*models, window)

        at_once = config.micro_batch or config.batch_size
        on_new = jax.lax.map(divergence, starts["test"][1], batch_size=at_once)
        return found | {DIVERGENCE: on_new.mean()}

    return sweep.over_runs(of_one, mesh, mapped=2)
