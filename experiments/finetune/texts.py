"""The texts, and what is learned of them and evaluated."""

from collections.abc import Sequence

import numpy as np

from experiments.data import texts
from experiments.engine.run import Problem
from experiments.finetune.config import HELD_OUT, Config
from experiments.training import language
from experiments.training.language import Stage, Texts


def load(config: Config) -> dict[str, bytes]:
    """The texts by name, in the order in which they are learned.

    Raises:
      UserError: if one cannot be read, is too short, or is the same as another.
    """
    contents = {}
    for name, files, default in (
        ("old", config.old, "prose"),
        ("new", config.new, "code"),
        ("third", config.third, "tables"),
    ):
        if files:
            contents[name] = texts.read(files)
        elif name != "third" or not config.old:
            contents[name] = texts.shipped(default)
    if not config.third_steps:
        contents.pop("third", None)
    contents = {name: text[: config.text_bytes] for name, text in contents.items()}
    texts.check(contents, least=round(2 * (config.length + 1) / HELD_OUT) + 1)
    return contents


def titles(config: Config) -> dict[str, str]:
    """What to call each text."""
    if config.old:
        return {"old": "old text", "new": "new text", "third": "third text"}
    return {"old": "prose", "new": "code", "third": "tables"}


def join(contents: Sequence[bytes]) -> Texts:
    """The texts as arrays, with the last tenth of each held out."""
    return language.join([texts.bytes_of(x) for x in contents], HELD_OUT)


def halves(contents: Sequence[bytes], config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Windows of each text's held-out tenth: of its first half, and of its second.

    Returns:
      Where they start, twice int32 ``(texts, windows)``.
    """
    joined = join(contents)
    starts: list[list[np.ndarray]] = [[], []]
    for begin, trained, content in zip(
        joined.begin, joined.size, contents, strict=True
    ):
        half = (len(content) - trained) // 2
        for i in range(2):
            at, window = begin + trained + i * half, config.length + 1
            starts[i].append(language.spread(at, half, config.evaluated, window))
    return np.stack(starts[0]), np.stack(starts[1])


def make_problem(contents: Sequence[bytes], config: Config) -> Problem:
    """What is evaluated: the half to choose on, and the one to report."""
    joined = join(contents)
    choose, report = halves(contents, config)
    return Problem(joined, joined, choose, report, second="choice")


def with_stages(
    problem: Problem, which: Sequence[int], steps: Sequence[int], epochs: int
) -> Problem:
    """To learn some of the texts, in equal shares, stage after stage of so many steps.

    Each stage's steps are shared out among its epochs.
    """
    shares = np.isin(np.arange(len(problem.train_tasks)), which).astype(np.float32)
    stages = Stage(
        np.tile(shares / shares.sum(), (len(steps), 1)),
        np.array(steps, np.int32) // epochs,
    )
    return problem._replace(stages=stages)


def stops(steps: int, config: Config) -> list[int]:
    """After how many steps fine-tuning is evaluated."""
    return [steps // 2**k for k in reversed(range(config.stops))]
