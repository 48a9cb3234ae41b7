"""What the pages quote of the committed records.

A path RECORD.RUN.MEASURE names a number, or numbers with a first axis over the seeds.
RECORD is a file of ``experiments/results``. RUN is a run's name, without its strength
where the record has one only; ``A - B`` is their difference, seed for seed; ``*``
stands for any letters: all runs that fit. MEASURE is one of ``MEASURES`` or a number of
the run's own; ``test[2]`` is the second task's, ``test[-1]`` the last one's, and
``test[*]`` has an axis for them. RECORD.FAMILY at P is what a method of fine-tuning has
forgotten where it has learned P %, RECORD.FAMILY at equal KL by what plain fine-tuning
has where it went as far. STATISTIC is mean, min, max, sum or abs.
What is said once only has a name among ``QUANTITIES``.
"""

import dataclasses
import functools
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

import numpy as np

from experiments import permuted_mnist, split_cifar, split_mnist, sweep
from experiments.engine import command
from experiments.engine.run import Label, with_fields
from experiments.finetune import config as finetune
from experiments.finetune import findings
from experiments.scenarios import config as scenarios
from experiments.why import config as why
from experiments.why.findings import grid, shares
from si_jax import metrics

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments/results"
EXPERIMENTS = {
    module.__name__.split(".")[1]: module
    for module in (
        finetune,
        permuted_mnist,
        scenarios,
        split_cifar,
        split_mnist,
        sweep,
        why,
    )
}


# --- What a record says ---------------------------------------------------------------


@functools.cache
def read(name):
    """A record: all that is known here of how one looks inside.

    Its ``runs``, by name, have the fields of a label, and arrays ``(seeds, after tasks,
    on tasks)``, or numbers; ``settings`` are what it keeps, ``config`` is the
    experiment's with them.
    """
    known = sorted(path.stem for path in RESULTS.glob("*.json"))
    path = RESULTS / f"{one_of(name, known, 'record')}.json"
    content = json.loads(path.read_text())
    content |= {"name": name, "settings": content.pop("config")}
    content["runs"] = with_fields(content.get("runs", {}))
    if content["experiment"] == "benchmark":
        content["runs"] = {
            f"{net}: {method}": numbers
            for net, of_net in content["summary"].items()
            for method, numbers in of_net.items()
        }
    if experiment := EXPERIMENTS.get(content["experiment"]):
        config = configuration(experiment, name, content["settings"])
        if experiment is finetune:  # whose tables have a row a method
            run = {x["method"] for x in content["runs"].values()}
            methods = tuple(x for x in get_args(finetune.Name) if x in run)
            config = dataclasses.replace(config, methods=methods)
        content["config"] = config
    return content


def configuration(experiment, name, settings):
    """A record's: the file that its name begins with, and what the record keeps."""
    files = sorted((ROOT / "configs").glob("*.toml"), key=lambda x: len(x.stem))
    (*_, file) = (x for x in files if name.startswith(x.stem))
    module = experiment.__name__.split(".")[1]
    config = command.parse(experiment.Config, module, ["--config", str(file)])
    fields = {x.name for x in dataclasses.fields(config)}
    kept = {
        key: tuple(x) if isinstance(x, list) else x
        for key, x in settings.items()
        if key in fields
    }
    return dataclasses.replace(config, **kept)


def one_of(name, known, what):
    """A name that is known."""
    if name not in known:
        raise ValueError(f"no {what} {name!r}; there is {', '.join(known)}")
    return name


def of_method(run):
    """A run's name without its strength."""
    fields = {k: run.get(k) for k in ("method", "scenario", "batch_size", "role")}
    return str(Label(**fields))


def named(record, pattern):
    """The names of a record's runs that a marker means."""
    runs = read(record)["runs"]
    if "*" in pattern:
        return [x for x in runs if fnmatchcase(x, pattern)]
    fits = [x for x in runs if x == pattern]
    fits = fits or [x for x, run in runs.items() if of_method(run) == pattern]
    if len(fits) != 1:
        one_of(pattern, list(runs), f"single run of {record},")
    return fits


def accuracy(split, record, name):
    """``(seeds, tasks)``: after all tasks."""
    return split_cifar.final(read(record)["runs"][name], split)


def over_time(measure, record, name):
    """A measure of how accuracy went, the seeds first."""
    return np.asarray(measure(np.array(read(record)["runs"][name]["test"])))


def authors(record, name):
    """``(tasks,)``: the data that the paper's authors published."""
    content = read(record)
    found = EXPERIMENTS[content["experiment"]].published(content["config"])
    return np.array(found[one_of(name, found, "run of the authors'")])


def correlation(kind, record, name, one, other):
    """``(layers,)``: how two importances correlate, the mean of the networks."""
    known = why.CORRELATED
    i, j = (known.index(one_of(x, known, "importance")) for x in (one, other))
    layers = read(record)["runs"][name]["layers"].values()
    return [np.mean(layer[kind], axis=0)[i, j] for layer in layers]


def from_authors(record, name):
    """``(tasks,)``: our mean less the authors'; of permuted MNIST averages so far."""
    over = "so_far" if read(record)["experiment"] == "permuted_mnist" else "test"
    return MEASURES[over](record, name).mean(0) - authors(record, name)


def errors_from_authors(record, name):
    """``(tasks,)``: the same for split CIFAR, by the difference's standard error."""
    ours = metrics.standard_error(accuracy("test", record, name))
    # That of the authors' five seeds is not corrected for their number.
    error = np.hypot(ours, np.array(AUTHORS_DEVIATIONS[name]) / np.sqrt(4))
    return from_authors(record, name) / error


def deviations_from_authors(record, name):
    """``(tasks,)``: the same for permuted MNIST, by the deviation of our seeds."""
    deviation = MEASURES["so_far"](record, name).std(0, ddof=1)
    return from_authors(record, name) / deviation


AUTHORS_DEVIATIONS = {
    "si c=0.01": [0.011, 0.019, 0.008, 0.006, 0.014, 0.004],
    "si c=0.1": [0.008, 0.012, 0.012, 0.007, 0.009, 0.011],
    "fine-tuning": [0.007, 0.017, 0.022, 0.016, 0.010, 0.004],
    "from scratch": [0.004, 0.015, 0.015, 0.005, 0.008, 0.018],
}


def of_bias(record, name):
    """The parts of Σω that are bias, ``(networks,)`` each."""
    return shares(read(record)["runs"][name]["ω"])


def of_omega(measure, record, name, layer):
    """``(tasks - 1,)``: how ω correlates between tasks in a layer."""
    return measure(permuted_mnist.hidden_layers(read(record)["runs"][name])[layer])


MEASURES = {
    "test": functools.partial(accuracy, "test"),
    "train": functools.partial(accuracy, "train"),
    "authors": authors,
    "from_authors": from_authors,
    "errors_from_authors": errors_from_authors,
    "deviations_from_authors": deviations_from_authors,
    "so_far": functools.partial(over_time, metrics.average_accuracy_so_far),
    "forgetting": functools.partial(over_time, metrics.forgetting),
    "seeds": lambda record, name: len(read(record)["runs"][name]["test"]),
    "minutes": lambda record, name: read(record)["runs"][name].get("seconds", 0) / 60,
    "noise": lambda record, name: of_bias(record, name)["noise"],
    "bias": lambda record, name: sum(of_bias(record, name).values()),
    "rank": functools.partial(correlation, "rank"),
    "linear": functools.partial(correlation, "linear"),
    "with_last": functools.partial(of_omega, permuted_mnist.with_last),
    "with_earlier": functools.partial(of_omega, permuted_mnist.with_earlier),
}
OVER_TASKS = ("test", "train", "authors")  # averaged where no task is named
OF_SEEDS = "test", "train", "forgetting", "noise", "bias", "lost", "more"
OVER_SEEDS = rf"[^*]+(\.({'|'.join(OF_SEEDS)})(\[-?\d+\])?| at (\d+|equal KL))"


def value(words):
    """What RECORD.RUN.MEASURE is, an array, the seeds first; a number with STATISTIC.

    Raises:
      ValueError: what of it there is not, and what there is.
    """
    path, statistic = re.fullmatch(r"(.*?)(?: (mean|min|max|sum|abs))?", words).groups()
    finetuned = re.fullmatch(r"(finetune\w*)\.(.+) at (equal KL|\d+)", path)
    if path in QUANTITIES:
        found = QUANTITIES[path]()
    elif finetuned:
        record, family, at = finetuned.groups()
        by_family = by_kl(record) if at == "equal KL" else grew(record, int(at) / 100)
        found = by_family[one_of(family, by_family, "family")]
    else:
        found = measured(path)
    found = np.atleast_1d(found)
    return getattr(np, statistic)(found) if statistic else found


def measured(path):
    """What RECORD.RUN.MEASURE is."""
    parts = re.fullmatch(r"(\w+)\.(.+)\.(\w+)(?:\((.+)\))?(?:\[(-?\d+|\*)\])?", path)
    if not parts:
        raise ValueError("this is no RECORD.RUN.MEASURE")
    record, run, measure, words, task = parts.groups()

    def of(name):
        run = read(record)["runs"][name]
        if measure not in MEASURES:
            numbers = [x for x in run if isinstance(run[x], int | float)]
            return run[one_of(measure, [*numbers, *MEASURES], "measure")]
        further = words.split(", ") if words else ()
        found = np.asarray(MEASURES[measure](record, name, *further))
        if task and task != "*":
            return found[..., int(task) - (int(task) > 0)]
        return found.mean(-1) if measure in OVER_TASKS and not task else found

    first, *second = (
        np.concatenate([np.atleast_1d(of(name)) for name in named(record, pattern)])
        for pattern in run.split(" - ")
    )
    for other in second:
        n = min(len(first), len(other))
        first = first[:n] - other[:n]
    return first


def number(words):
    """``RECORD.RUN.MEASURE STATISTIC FORMAT`` as a sentence has it."""
    path, form = re.fullmatch(r"(.*?)(?: (\.\d[f%]))?", words).groups()
    found = value(path)
    if found.size > 1 and not re.fullmatch(OVER_SEEDS, path):
        raise ValueError("these are many numbers: say mean, min, max or sum")
    if not np.isfinite(found).all():
        raise ValueError("here a run diverged")
    spread = [metrics.standard_error(found)] if found.size > 1 else []
    shown = (float(f"{x:.6g}") for x in (found.mean(), *spread))  # as records have it
    text = " ± ".join(f"{x:{form or '.4f'}}" for x in shown)
    return text.replace("-", "−").replace("%", " %")


# --- What stands in one sentence only -------------------------------------------------


def lead(record, size, one, other):
    """How much better one importance is than another with a batch size, by seeds."""
    return value(f"{record}.batch {size}: {one} - batch {size}: {other}.test")


def loss(record, small, large, name):
    """How much an importance loses by larger batches, by seeds."""
    return value(f"{record}.batch {small}: {name} - batch {large}: {name}.test")


def ranks(record, pattern, one, *others):
    """Rank correlations to two digits: ``(batch sizes or importances, layers)``."""
    return np.round(
        [
            correlation("rank", record, name, one, other)
            for name in named(record, f"batch {pattern}: measures")
            for other in others
        ],
        2,
    )


LEARNED = {
    "why_quick": (8, 32, 128),
    "why": (32, 256, 2048),
    "why_permuted_quick": (32, 256),
}


def noisy(least):
    """Records and batch sizes where noise is this much of Σω."""
    return [
        (record, size)
        for record, sizes in LEARNED.items()
        for size in sizes
        if value(f"{record}.batch {size}: measures.noise").mean() >= least
    ]


def in_choice(name):
    """Forgetting in the choice of c, at the grid's smallest."""
    run = read("why")["runs"][str(grid(2048, name))]
    return metrics.forgetting(np.array(run["test"])[:1])


def lost(name):
    """From the smallest batch to the largest, ``(records,)``."""
    return [loss(x, min(of), max(of), name).mean() for x, of in LEARNED.items()]


def grew(record, fraction):
    """By family: the loss on the old text at a part of what fine-tuning learns."""
    content = read(record)
    found = findings.at_equal_loss(content["config"], content["runs"], (fraction,))
    return {name: values[:, 0] for name, values in found.items()}


def by_kl(record):
    """By family: what it has forgotten by what plain fine-tuning has at its KL."""
    content = read(record)
    return findings.off_the_law(content["config"], content)


def times_of_torch():
    """How much longer two runs at the paper's length take in PyTorch."""
    seconds = read("benchmark_sweep_mnist")["seconds"]
    return seconds["PyTorch"]["2"][0] / seconds["one after another"]["2"][0]


QUANTITIES = {
    "finetune_quick_squisher.more": lambda: (
        grew("finetune_quick_squisher", 0.5)["squisher"]
        - grew("finetune_quick_squisher", 0.5)["ewc"]
    ),
    "split_mnist_compact.lost": lambda: (
        value("split_mnist.si.test") - value("split_mnist_compact.si c=1.test")
    ),
    "permuted_mnist.furthest": lambda: abs(
        value("permuted_mnist.si c=0.1.from_authors")
    ).max(),
    "permuted_mnist.spread": lambda: np.ptp(
        value("permuted_mnist.fine-tuning.so_far"), axis=0
    ),
    "permuted_mnist.least lead of ewc": lambda: (
        value("permuted_mnist.ewc c=1e+06.test").min()
        - value("permuted_mnist.si.test").max()
    ),
    "benchmark_sweep_mnist.torch": times_of_torch,
    "why.worse where noisy": lambda: [
        lead(*at, "si", "unbiased").mean() for at in noisy(0.105)
    ],
    "why.lost": lambda: lost("si"),
    "why.others lost": lambda: [
        loss("why", 32, 2048, name).mean()
        for name in ("root fisher", "fisher", "absolute", "squared")
    ],
    "why.better than si": lambda: [
        lead("why", 2048, name, "si").mean()
        for name in ("root fisher", "fisher", "squared")
    ],
    "why_quick.l2 below si": lambda: [
        lead("why_quick", size, "si", "l2").mean() for size in (8, 32, 128)
    ],
    "why.si in choice": lambda: in_choice("si"),
    "why.l2 in choice": lambda: in_choice("l2"),
    "why.gradients, large batches": lambda: ranks(
        "why", "2[50]*", "si", "absolute", "squared"
    ),
    "why.gradients, later layers": lambda: ranks(
        "why", "32", "si", "absolute", "squared"
    )[:, 1:],
    "why.bias, hidden layers": lambda: ranks("why", "32", "si", "bias")[:, :2],
    "why.mas, root fisher, split": lambda: [
        *ranks("why", "*", "mas", "root fisher"),
        *ranks("why_quick", "*", "mas", "root fisher"),
    ],
    "why.mas, root fisher, permuted": lambda: [
        *ranks("why_permuted", "*", "mas", "root fisher"),
        *ranks("why_permuted_quick", "*", "mas", "root fisher"),
    ],
}
