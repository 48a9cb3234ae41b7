"""What was found: the best of each family, tables, the figure."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.engine import choice
from experiments.engine.measures import statistics
from experiments.engine.run import Label
from experiments.engine.tables import DIVERGED, aligned, number, over_seeds
from experiments.finetune import figures
from experiments.finetune.config import DIVERGENCE, PRETRAINING, Config
from experiments.finetune.methods import Family, arms, families, means, third
from experiments.finetune.study import Study
from experiments.finetune.texts import stops, titles
from si_jax import metrics


def held_table(layers: Mapping[str, Mapping[str, float]]) -> str:
    """A row a layer."""
    rows = [["", "of parameters", "of ΣΩ", "of penalty", "displacement"]]
    for name, row in layers.items():
        *shares, moved = (np.nan if x is None else x for x in row.values())
        rows.append([name, *(number(x, ".1%") for x in shares), number(moved)])
    return aligned(rows)


def cost_table(cost: Mapping[str, Mapping[str, float]]) -> str:
    """A row a kind of method."""
    rows = [["", "state B/parameter", "time × Adam's", "ms a step", "peak MB"]]
    for name, row in cost.items():
        numbers = [f"{row['state_bytes']:.1f}", f"{row['to_adam']:.2f}"]
        peak = row.get("peak_bytes")  # not every backend says
        numbers += [f"{row['ms']:.1f}", f"{peak / 1e6:.0f}" if peak else ""]
        rows.append([name, *numbers])
    return aligned(rows)


def curve(
    name: str, family: Family, runs: Mapping[str, Any], half: str = "test"
) -> np.ndarray:
    """A family's losses, from the one nearest to the pretrained network on.

    Returns:
      ``(seeds, points, texts)``, in bits a byte.
    """
    if not family.strengths:
        return np.asarray(runs[name][half])
    of = (runs[str(arm)] for arm in ordered(name, family))
    losses = [np.asarray(run[half])[:, -1] for run in of]
    n = min(map(len, losses))
    return np.stack([x[:n] for x in losses], axis=1)


def ordered(name: str, family: Family) -> list[Label]:
    """A family's methods, the one that moves the least first."""
    held = bool(family.memory)
    return sorted(arms(name, family), key=lambda x: x.strength or 0, reverse=held)


def choose(config: Config, runs: Mapping[str, Any]) -> dict[str, tuple[Label, int]]:
    """Each family's best, by its mean loss on the old and the new text.

    On the held-out half that is there to choose on.

    Returns:
      By family, the method and the stage.
    """
    best = {}
    for name, family in families(config).items():
        loss = curve(name, family, runs, "choice")[..., :2].mean(2)
        (least,) = choice.choose(-loss, name)
        every = ordered(name, family)
        best[name] = (every[least], 0) if family.strengths else (every[0], least)
    return best


def at_equal_loss(
    config: Config, runs: Mapping[str, Any], fractions: Sequence[float]
) -> dict[str, np.ndarray]:
    """Forgetting: each family's loss on the old text, after minus before.

    For each fraction of what fine-tuning takes from the loss on the new text, the point
    of a family's curve where it took as much, by linear interpolation between
    neighbouring points, on the half to choose on; reported is the other half. All
    curves begin at the pretrained network, and those of a strength end with
    fine-tuning at their learning rate, of adapters alone if so, which is c = 0, if that
    was run. Means with the pretrained network are a curve a strength; of these the best
    is taken at each fraction, by the half to choose on.

    Returns:
      By family and by how its means are taken, bits a byte ``(seeds, fractions)``; NaN
      where it learns less.
    """
    growth = {}
    for name, family in families(config).items():
        slow = str(Label("slow", family.rate))
        last = "fine-tuning" if family.rate == 1 else slow
        last = "lora" if family.lora else last
        parts = [functools.partial(curve, name, family, runs)]
        if family.strengths and last in runs:
            parts.append(functools.partial(_end, runs, last))
        growth[name] = _grown(runs, parts, "test", fractions)
    for title, labels in averaged(config, runs).items():
        every = np.stack(
            [_grown(runs, _between(runs, x), "test", fractions) for x in labels]
        )
        best = [labels.index(x) for x in best_means(runs, labels, fractions)]
        growth[title] = every[best, :, np.arange(len(fractions))].T
    return growth


def best_means(
    runs: Mapping[str, Any], labels: Sequence[Label], fractions: Sequence[float]
) -> list[Label]:
    """Of means with the pretrained network those that keep the most, by the choice."""
    grown = [_grown(runs, _between(runs, x), "choice", fractions) for x in labels]
    mean = np.mean(grown, axis=1)
    return [labels[i] for i in np.where(np.isnan(mean), np.inf, mean).argmin(0)]


_Part = Callable[[str], np.ndarray]  # of a curve: from a half, (seeds, points, texts)


def _end(runs: Mapping[str, Any], name: str, half: str) -> np.ndarray:
    return np.asarray(runs[name][half])[:, -1:]


def _between(runs: Mapping[str, Any], label: Label) -> list[_Part]:
    """Means with the pretrained network, ending with what it is averaged with."""
    whole = str(dataclasses.replace(label, role=None))
    return [
        lambda half: np.asarray(runs[str(label)][half]),
        functools.partial(_end, runs, whole),
    ]


def _grown(
    runs: Mapping[str, Any],
    parts: Sequence[_Part],
    half: str,
    fractions: Sequence[float],
) -> np.ndarray:
    """How much a half's loss grew on a curve that begins at the pretrained network."""
    parts = [functools.partial(_end, runs, PRETRAINING), *parts]
    after = _end(runs, "fine-tuning", "choice")[:, 0, 1]
    n = min(len(after), *(len(part("choice")) for part in parts))
    chosen, reported = (
        np.concatenate([part(x)[:n] for part in parts], axis=1)
        for x in ("choice", half)
    )
    before = chosen[:, 0, 1]
    levels = before[:, None] - np.outer(before - after[:n], fractions)
    return (
        np.array(
            [
                [_crossing(chosen[i, :, 1], reported[i, :, 0], x) for x in levels[i]]
                for i in range(n)
            ]
        )
        - reported[:, :1, 0]
    )


def averaged(config: Config, runs: Mapping[str, Any]) -> dict[str, list[Label]]:
    """The means with the pretrained network: by family and kind, those of its arms."""
    found: dict[str, list[Label]] = {}
    for name, family in families(config).items():
        for arm in arms(name, family):
            for label in means(config, arm, family):
                if str(label) in runs:
                    found.setdefault(f"{name}, {label.role}", []).append(label)
    return found


def gone(config: Config, content: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """How far every network went from the pretrained one, and what it forgot of it.

    Returns:
      By family and by how its means are taken, ``(seeds, points, 2)``: the KL
      divergence from the pretrained network on the new text, and how much the loss on
      the old text grew, both in bits a byte.
    """
    runs, divergence = content["runs"], content.get(DIVERGENCE, {})
    before = np.asarray(runs[PRETRAINING]["test"])[:, -1:, 0]

    def points(label: Label) -> np.ndarray:
        grown, kl = np.asarray(runs[str(label)]["test"])[..., 0], divergence[str(label)]
        n = min(len(grown), len(kl))
        return np.stack([np.asarray(kl)[:n], grown[:n] - before[:n]], axis=-1)

    families_of = {
        name: ordered(name, family) for name, family in families(config).items()
    }
    found = {}
    for title, labels in (families_of | averaged(config, runs)).items():
        if known := [x for x in labels if str(x) in divergence]:
            every = [points(label) for label in known]
            n = min(map(len, every))
            found[title] = np.concatenate([x[:n] for x in every], axis=1)
    return found


def off_the_law(config: Config, content: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What is forgotten by what plain fine-tuning forgets that went as far.

    "As far" is the KL divergence on the new text, and plain is fine-tuning at its rate
    and at the smaller ones, a curve of straight pieces on logarithmic axes.

    Returns:
      By family and by how its means are taken, ``(seeds,)``: the geometric mean of the
      ratio over its points within the curve's reach; NaN where there are none, or where
      one forgot nothing. Nothing if the curve is not there.
    """
    every = gone(config, content)
    if not {"fine-tuning", "slow"} <= every.keys():
        return {}
    whole, slow = every["fine-tuning"], every.pop("slow")
    n = min(len(whole), len(slow))
    plain = np.concatenate([slow[:n], whole[:n, -1:]], axis=1)
    every["fine-tuning"] = whole[:, :-1]
    ratios = {}
    for title, points in every.items():
        rows = []
        for along, at in zip(plain, points, strict=False):
            along = along[np.argsort(along[:, 0])]  # the rates may be in any order
            inside = (at[:, 0] >= along[0, 0]) & (at[:, 0] <= along[-1, 0])
            with np.errstate(divide="ignore", invalid="ignore"):
                (x, y), curve = np.log(at[inside]).T, np.log(along).T
            ratio = y - np.interp(x, *curve)
            finite = len(x) and np.isfinite(ratio).all()
            rows.append(np.exp(ratio.mean()) if finite else np.nan)
        ratios[title] = np.array(rows)
    return ratios


def _crossing(falling: np.ndarray, other: np.ndarray, level: float) -> float:
    """``other`` where ``falling`` first comes down to a level; NaN if it does not."""
    below = np.flatnonzero(falling <= level)
    if not len(below) or below[0] == 0:
        return np.nan
    i = below[0]
    share = (falling[i - 1] - level) / (falling[i - 1] - falling[i])
    return other[i - 1] + share * (other[i] - other[i - 1])


def cells(values: np.ndarray) -> str:
    """Mean ± SEM over the seeds, in bits a byte."""
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return DIVERGED
    mean = f"{values.mean():.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {metrics.standard_error(values):.3f}"


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """Each text's loss at the end, of both halves."""
    return {
        half: [statistics(x) for x in np.asarray(run[half])[:, -1].T]
        for half in ("test", "choice")
    }


def best_table(config: Config, runs: Mapping[str, Any]) -> str:
    """Each family at its best, as chosen: its losses; after the third text, too."""
    names = list(titles(config).values())
    rows = [["", *names[:2], "mean"]]
    every = choose(config, runs).values()
    with_third = any(str(third(arm)) in runs for arm, _ in every)
    if with_third:
        rows[0] += [f"after {names[2]}: {x}" for x in (*names, "mean")]

    def row(title, first, last):
        columns = [title, *map(cells, first.T[:2]), cells(first[:, :2].mean(1))]
        if with_third:
            blank = [""] * (1 + len(names))
            columns += (
                blank if last is None else [*map(cells, last.T), cells(last.mean(1))]
            )
        return columns

    rows.append(row("pretrained", np.asarray(runs[PRETRAINING]["test"])[:, -1], None))
    for arm, stage in every:
        losses, last = np.asarray(runs[str(arm)]["test"]), runs.get(str(third(arm)))
        if stage < losses.shape[1] - 1:  # what goes on is what all steps led to
            at = stops(config.steps, config)[stage]
            rows.append(row(f"{arm}, stopped at {at} steps", losses[:, stage], None))
        after = None if last is None else np.asarray(last["test"])[:, -1]
        rows.append(row(str(arm), losses[:, -1], after))
    return aligned(rows)


def equal_table(config: Config, runs: Mapping[str, Any]) -> str:
    """A row a family: how much of the old text it forgot for what it learned."""
    fractions = (0.5, 0.75, 0.9)
    rows = [["", *(f"{f:.0%}" for f in fractions)]]
    for name, values in at_equal_loss(config, runs, fractions).items():
        title = "early stopping" if name == "fine-tuning" else name
        columns = (cells(x) if np.isfinite(x).all() else "–" for x in values.T)
        rows.append([title, *columns])
    return aligned(rows)


def law_table(config: Config, content: Mapping[str, Any]) -> str:
    """A row a family: what it forgot by what plain fine-tuning forgot as far away."""
    rows = [["", "ratio at equal KL"]]
    for name, ratios in off_the_law(config, content).items():
        title = "early stopping" if name == "fine-tuning" else name
        rows.append([title, cells(ratios) if np.isfinite(ratios).all() else "–"])
    return aligned(rows)


def so_far(test: np.ndarray, finished: int) -> str:
    """What a bar shows of the losses so far."""
    if not finished:
        return ""
    losses = test[:, finished - 1].mean(0)
    return ", held out " + " ".join(f"{x:.3f}" for x in losses) + " bits a byte"


def report(study: Study) -> None:
    """Print and draw the finished methods."""
    config, record = study.config, study.record
    runs = record.runs
    print(
        f"\nHeld-out loss in bits a byte, each method at its best, {over_seeds(runs)}"
    )
    print(best_table(config, runs))
    if "fine-tuning" in runs:
        gone = any("diverged" in run for run in runs.values())
        print(
            "\nForgetting, the loss on the old text after minus before, where a method "
            "has learned as\nmuch of the new one, as a part of what fine-tuning "
            "learns; – where it is not reached" + ", or one diverged" * gone
        )
        print(equal_table(config, runs))
    if off_the_law(config, record.content):
        print(
            "\nThe same by that of fine-tuning, at its rate or a smaller one, whose KL "
            "divergence\nfrom the pretrained network on the new text is as large; – "
            "where none is"
        )
        print(law_table(config, record.content))
        record.save("finetune_law", law_figure(config, record.content))
    for name, layers in record.content.get("held", {}).items():
        print(f"\nWhat {name} holds, after the {titles(config)['new']}")
        print(held_table(layers))
    if "cost" in record.content:
        print("\nWhat a step costs, on one device")
        print(cost_table(record.content["cost"]))
    for text in sample_tables(record.content["samples"]):
        print(f"\n{text}")
    seconds = sum(x["seconds"] for x in runs.values())
    print(f"\nTook {seconds:.0f} s. Everything is in {record.folder}.")
    record.save("finetune", figure(config, runs))


def sample_tables(samples: Mapping[str, Sequence[str]]) -> list[str]:
    """How the networks go on, a text each."""
    (_, prompts), *others = samples.items()
    width = max(len(name) for name, _ in others)
    return [
        "\n".join(
            [
                f"How they go on with {prompt!r}",
                *(f"{name:{width}}  {written[i]!r}" for name, written in others),
            ]
        )
        for i, prompt in enumerate(prompts)
    ]


def figure(config: Config, runs: Mapping[str, Any]) -> Figure:
    """Loss on the old text over that on the new one, a curve a family."""
    names = list(titles(config).values())
    curves = {
        "early stopping" if name == "fine-tuning" else name: curve(name, family, runs)
        for name, family in families(config).items()
    }
    # Of the means, fine-tuning's and those of the method that keeps the most.
    every, grown = {}, {}
    if "fine-tuning" in runs:  # what is learned is measured by it
        every, at = averaged(config, runs), at_equal_loss(config, runs, (0.75,))
        grown = {k: x[:, 0].mean() for k, x in at.items()}
    others = [k for k in every if not k.startswith("fine-tuning")]
    best = sorted(others, key=lambda k: np.nan_to_num(grown[k], nan=np.inf))[:1]
    for title in [k for k in every if k not in others] + best:
        (label,) = best_means(runs, every[title], (0.75,))
        parts = [part("test") for part in _between(runs, label)]
        curves[title] = np.concatenate(parts, axis=1)
    curves = {name: losses[..., 1::-1] for name, losses in curves.items()}
    return figures.frontier(
        curves,
        start=np.asarray(runs[PRETRAINING]["test"])[:, -1, 1::-1],
        labels=[f"Loss on the {x}, bits a byte" for x in names[1::-1]],
        suptitle=f"Held-out text, {over_seeds(dict(runs))}",
    )


def law_figure(config: Config, content: Mapping[str, Any]) -> Figure:
    """What was forgotten over the KL divergence, a point a network."""
    every = gone(config, content)
    first = {name: every.pop(name) for name in ("slow", "fine-tuning") if name in every}
    plain = np.concatenate([first["slow"], first["fine-tuning"][:, -1:]], axis=1)
    names = list(titles(config).values())
    return figures.law(
        {"smaller rates": plain, "early stopping": first["fine-tuning"], **every},
        labels=[
            f"KL(network ‖ pretrained) on the {names[1]}, bits a byte",
            f"Forgetting of the {names[0]}, bits a byte",
        ],
        suptitle=f"Held-out text, {over_seeds(dict(content['runs']))}",
    )
