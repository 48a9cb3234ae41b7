"""What is measured beside the losses: samples, what SI holds, the cost."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import si_jax
from experiments.engine import timing
from experiments.engine.measures import count
from experiments.engine.run import Problem
from experiments.finetune.config import Config
from experiments.finetune.methods import GoOn, Memory, network, optimizer
from experiments.finetune.study import Study
from experiments.training import language
from experiments.training.language import Stage
from experiments.training.loop import Carry


def first_group(run: dict[str, Any]) -> range:
    """The seeds of a method that were trained together, the first of them."""
    parts = run.get("parts") or [{"seeds": count(run)}]
    return range(parts[0]["seeds"])


def samples(study: Study, names: Sequence[str]) -> dict[str, list[str]]:
    """How the networks of the first seed go on with each held-out text.

    Args:
      study: finished.
      names: of the methods, all of which train the whole network.

    Returns:
      The prompts, and for each method what it wrote, a text each.
    """
    config, problem, record, _ = study
    prompt_length, written = max(config.length // 2, 1), 160
    net = network(config)
    write = jax.jit(
        functools.partial(
            language.sample,
            net.apply,
            count=written,
            length=config.length,
            temperature=0.5,
        )
    )
    prompts = [
        language.cut(problem.test.content, starts[0], prompt_length)
        for starts in problem.test_tasks[:2]
    ]
    continuations = {"prompt": list(map(decoded, prompts))}
    for name in names:
        carry = study.carry(name, first_group(record.runs[name]))
        params = jax.tree.map(lambda x: x[0], carry.params)
        continuations[name] = [
            decoded(write(params, prompt, jax.random.key(i)))
            for i, prompt in enumerate(prompts)
        ]
    return continuations


def decoded(text: Any) -> str:
    """Bytes as characters, whatever they are."""
    return bytes(np.asarray(text).tolist()).decode(errors="replace")


def held(study: Study, name: str) -> dict[str, dict[str, float]]:
    """What SI holds after fine-tuning, by the network's layers: means over the seeds.

    Returns:
      By layer: its fraction of the parameters, its share of ΣΩ and of the penalty, and
      its displacement, the root of the mean of (θ − θ̃)².
    """
    carry = study.carry(name, first_group(study.record.runs[name]))
    report = jax.jit(jax.vmap(si_jax.diagnose))(carry.opt_state, carry.params)
    sizes = [x[0].size for x in jax.tree.leaves(carry.params)]
    layers: dict[str, list[Any]] = {}
    for leaf, size in zip(report.share, sizes, strict=True):
        columns = (report.share, report.penalty, report.displacement)
        share, penalty, moved = (np.mean(column[leaf]) for column in columns)
        layer = layers.setdefault(leaf.rsplit("/", 1)[0], [0, 0, 0, 0])
        for i, x in enumerate((size, share, penalty, size * moved**2)):
            layer[i] += x
    total, _, penalties, _ = map(sum, zip(*layers.values(), strict=True))
    return {
        name: {
            "parameters": size / total,
            "importance": float(share),
            "penalty": float(penalty / penalties) if penalties else 0.0,
            "displacement": float((square / size) ** 0.5),
        }
        for name, (size, share, penalty, square) in layers.items()
    }


def cost(config: Config, problem: Problem) -> dict[str, dict[str, float]]:
    """Bytes and time of a step of every kind of method, on one device.

    Returns:
      By kind: bytes of the optimizer's state by the number of the network's
      parameters, the median of the step's time by Adam's in the same turn, and the
      memory that a step takes at most.
    """
    narrow = dataclasses.replace(config, state_dtype="bfloat16")
    size = config.batch_size
    split = max(n for n in range(1, 5) if size % n == 0)
    parts = dataclasses.replace(config, micro_batch=size // split)
    kinds: dict[str, tuple[Config, Memory, bool]] = {
        "fine-tuning": (config, None, False),
        "l2, ewc, mas": (config, "ewc", False),
        "si": (config, "si", False),
        "si, bfloat16 Ω and θ̃": (narrow, "si", False),
        f"si, batch in {split} parts": (parts, "si", False),
        "lora": (config, None, True),
        "lora si": (config, "si", True),
        "lora si product": (config, "si product", True),
    }
    base = jax.jit(network(config).init)(jax.random.key(0))
    parameters = sum(x.size for x in jax.tree.leaves(base))
    shares = np.eye(len(problem.train.size), dtype=np.float32)[1]
    stage, key = Stage(shares, np.int32(4)), jax.random.key(0)
    programs, costs = {}, {}
    for name, (variant, memory, lora) in kinds.items():
        params = network(variant, variant.lora_rank if lora else 0).init(key)
        carry = Carry(
            params, optimizer(variant, memory, 1.0, variant.damping).init(params)
        )
        make = GoOn(variant, memory, lora)

        def steps(carry, base, texts, stage, make=make):
            learner = make(jnp.float32(1), jnp.float32(1e-3), carry, base)
            return learner.epoch(carry, texts, stage, jax.random.key(0))[0]

        shared = (base, problem.train, stage)
        compiled = jax.jit(steps, donate_argnums=0).lower(carry, *shared).compile()
        programs[name] = timing.stateful(compiled, carry, *shared, steps=4)
        state = sum(x.nbytes for x in jax.tree.leaves(carry.opt_state))
        costs[name] = {"state_bytes": state / parameters, **programs[name].facts}
    times = timing.take_turns(programs, config.cost_turns)
    for name, turns in times.items():
        ratios = np.divide(turns, times["fine-tuning"])
        costs[name] |= {"ms": np.median(turns), "to_adam": np.median(ratios)}
    return costs
