"""Why does SI work? ``python -m experiments.why``.

Benzing (https://arxiv.org/abs/2006.06357) answers: by a bias of ω, through minibatch
noise, that makes Ω resemble the root of the Fisher information. So ω is taken apart,
each part and each relative is correlated with the others, and takes Ω's place.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from scipy import stats

import si_jax
from experiments import figures, permuted_mnist, scenarios, split_mnist
from experiments.data.tasks import mask_logits
from experiments.engine import command, driver, programs
from experiments.engine.driver import Method
from experiments.engine.programs import Problem
from experiments.engine.record import Record, is_first
from experiments.engine.tables import aligned, cell, over_seeds
from experiments.networks.models import MLP
from experiments.training.boundaries import (
    consolidate,
    consolidate_fisher,
    consolidate_importance,
    consolidate_sensitivity,
    reset,
)
from experiments.training.classifier import learner
from experiments.training.loop import Boundary, Carry, Learner
from si_jax import ewc, importance, metrics

Name = Literal[
    "fine-tuning",
    "l2",
    "si",
    "unbiased",
    "bias",
    "root fisher",
    "fisher",
    "mas",
    "absolute",
    "squared",
    "hessian",
]
TITLES: dict[str, str] = {
    "fine-tuning": "none (c = 0)",
    "l2": "1 (L2)",
    "si": "SI",
    "unbiased": "SI, unbiased",
    "bias": "SI, bias alone",
    "root fisher": "√Fisher",
    "fisher": "Fisher",
    "mas": "MAS",
    "absolute": "Σ|g|",
    "squared": "Σg²",
    "hessian": "Hessian",
}
CORRELATED = tuple(TITLES)[2:]


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Importances compared, and learned with: SI's, its parts, and its relatives.

    All are measured after the first task. Each is then the importance that old tasks
    are held with; its strength is chosen on a part of the training set, and what is
    chosen is trained on all of it, with fresh seeds, and evaluated on the test set.
    """

    network: Literal["split", "permuted"] = "split"
    """Split MNIST, or permuted MNIST."""
    data: Literal["tfds", "mnist5k"] = "tfds"
    """MNIST itself through TFDS, or 5,000 of its digits that need no download."""
    batch_sizes: tuple[int, ...] = (32, 256, 2048)
    """Examples a step, in runs of their own; more can be added in the same --out."""
    importances: tuple[Name, ...] = get_args(Name)[:-1]  # the Hessian costs most
    """What to learn with, likewise; none: only measure."""
    seeds: int = 5
    """Runs of each on the test set, with the seeds 0, 1, …; more can be added later."""
    networks: int = 3
    """To measure the importances of, with the seeds 0, 1, …"""
    grid_seeds: int = 1
    """Runs of each strength to choose from, with other seeds."""
    pulls: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """c to choose from, for each importance over its mean after the first task."""
    tasks: int = 5
    """Of permuted MNIST; split MNIST has five."""
    epochs: int = 10
    """Passes over each task."""
    learning_rate: float = 1e-3
    """Adam's."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    zero_init_output: bool = True
    """Start the output layer at zero."""
    reset_optimizer: bool = True
    """Start each task with a fresh optimizer."""
    damping: float = 1e-3
    """ξ of eq. 5."""
    importance_examples: int = 1000
    """Of each task, for the Fisher information, MAS and the Hessian."""
    held_out: float = 1 / 6
    """The fraction of the training set to choose on."""

    PICKS: ClassVar[tuple[str, ...]] = ("batch_sizes", "importances", "seeds")

    def __post_init__(self):
        """Refuse values that make no sense."""
        counts = ("seeds", "networks", "grid_seeds", "tasks", "epochs")
        self.check(
            positive=("damping", "learning_rate"),
            at_least_1=(*counts, "importance_examples"),
        )
        for name in ("batch_sizes", "hidden", "pulls"):
            values = getattr(self, name)
            least = 0 if name == "pulls" else 1
            if not values or not least <= min(values) <= max(values) < math.inf:
                raise ValueError(f"{name} must be >= {least}, one or more: {values}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")


# --- The importances ------------------------------------------------------------------


class Watched(NamedTuple):
    """What :func:`watch` keeps of the current task's gradients: trees like parameters.

    Attributes:
      path_integral: ω of the gradients that follow the steps, without the last step.
      absolute: Σ|g|.
      squared: Σg².
      last_params: at the last step.
    """

    path_integral: optax.Params
    absolute: optax.Params
    squared: optax.Params
    last_params: optax.Params


def watch() -> optax.GradientTransformation:
    """A link of a chain that changes nothing: see :class:`Watched`."""

    def init(params: optax.Params) -> Watched:
        first, second, third = (jax.tree.map(jnp.zeros_like, params) for _ in range(3))
        return Watched(first, second, third, jax.tree.map(jnp.copy, params))

    def update(
        grads: optax.Updates, state: Watched, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Watched]:
        integral, absolute, squared, last = state
        return grads, Watched(
            jax.tree.map(
                lambda w, g, p, q: w - g * (p - q), integral, grads, params, last
            ),
            jax.tree.map(lambda total, g: total + jnp.abs(g), absolute, grads),
            jax.tree.map(lambda total, g: total + jnp.square(g), squared, grads),
            jax.tree.map(jnp.copy, params),
        )

    return optax.GradientTransformation(init, update)


def boundaries(model: MLP, count: int) -> dict[str, Boundary]:
    """Each importance as what adds it, at a task's end, to that of EWC's link.

    The optimizer is a chain of Synaptic Intelligence with strength 0, :func:`watch`,
    online EWC, which holds what is added, and others.
    """

    def added(measure: Callable[[Carry], optax.Params]) -> Boundary:
        def boundary(carry, *_):
            held = ewc.consolidate(carry.opt_state, carry.params, measure(carry))
            return carry._replace(opt_state=held)

        return boundary

    def ones(carry):
        return jax.tree.map(jnp.ones_like, carry.params)

    def equation_5(carry, synaptic):
        """What it adds to the importance so far, in the core's own hands."""
        before = carry.opt_state[2].importance
        synapses = synaptic.synapses._replace(importance=before)
        after = si_jax.consolidate(synaptic._replace(synapses=synapses), carry.params)
        return jax.tree.map(jnp.subtract, after.synapses.importance, before)

    def with_path_integral(synaptic, omega):
        return synaptic._replace(
            synapses=synaptic.synapses._replace(path_integral=omega)
        )

    def biased(carry):
        return equation_5(carry, carry.opt_state[0])

    def unbiased(carry):
        synaptic, watched, *_ = carry.opt_state
        # As in the core, the last step is credited with its own gradient.
        synaptic = with_path_integral(synaptic, watched.path_integral)
        return equation_5(carry, synaptic)

    def bias(carry):
        synaptic, watched, *_ = carry.opt_state
        both = synaptic.synapses.path_integral, watched.path_integral
        # The last step has none: in both it is credited with its own gradient.
        synaptic = synaptic._replace(last_params=carry.params)
        omega = jax.tree.map(jnp.subtract, *both)
        return equation_5(carry, with_path_integral(synaptic, omega))

    def logits_of(classes):
        def logits(params, image):
            out: Any = model.apply(params, image[None])
            return mask_logits(out, classes)[0]

        return logits

    def root(params, images, classes, key):
        found = importance.fisher(logits_of(classes), params, images, key)
        return jax.tree.map(jnp.sqrt, found)

    def hessian(params, images, classes, _):
        # Of a ReLU net the exact Fisher diagonal is the Hessian's.
        return importance.fisher(logits_of(classes), params, images, exact=True)

    return {
        "l2": added(ones),
        "si": added(biased),
        "unbiased": added(unbiased),
        "bias": added(bias),
        "root fisher": consolidate_importance(root, count),
        "fisher": consolidate_fisher(model, count),
        "mas": consolidate_sensitivity(model, count),
        "absolute": added(lambda carry: carry.opt_state[1].absolute),
        "squared": added(lambda carry: carry.opt_state[1].squared),
        "hessian": consolidate_importance(hessian, count),
    }


def number(name: str) -> float:
    """Which of :func:`boundaries`, as a hyperparameter; fine-tuning has any, c = 0."""
    return float(max(tuple(TITLES).index(name) - 1, 0))


def make_learner(config: Config, batch_size: int) -> Callable[..., Learner]:
    """The pieces of a run with any of the importances: one program for all of them."""
    model = MLP(config.hidden, 10, config.zero_init_output)
    every = tuple(boundaries(model, config.importance_examples).values())

    def make(strength: jax.Array, damping: jax.Array, importance: jax.Array) -> Learner:
        tx = optax.chain(
            si_jax.synaptic_intelligence(0.0, damping),
            watch(),
            ewc.elastic_weight_consolidation(strength, decay=1.0),
            optax.adam(config.learning_rate),
        )

        def chosen(*arguments):
            return jax.lax.switch(importance.astype(jnp.int32), every, *arguments)

        def watch_afresh(carry, *_):
            synaptic, _, *others = carry.opt_state
            fresh = (synaptic, watch().init(carry.params), *others)
            return carry._replace(opt_state=fresh)

        return learner(
            model,
            tx,
            (28, 28, 1),
            batch_size=batch_size,
            boundary=[
                chosen,
                consolidate,
                watch_afresh,
                *([reset(tx)] * config.reset_optimizer),
            ],
        )

    return make


def make_problems(config: Config) -> scenarios.Problems:
    """The tasks to choose on and those to test on."""
    if config.network == "split":
        return scenarios.make_problems(
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

    return scenarios.Problems(permuted(config.held_out), permuted(0.0))


# --- Measuring them -------------------------------------------------------------------


def measure(
    config: Config, make: Callable[..., Learner], problem: Problem
) -> dict[str, Any]:
    """The networks' importances after the first task.

    Returns:
      ``seconds``; ``ω``: sums of ω, of the unbiased one, and the loss drop,
      ``(networks,)`` each, without the task's last step, whose next gradient is not
      there; ``scale``: the importances' means over parameters and networks;
      ``layers``: by layer, what :func:`correlate` finds, ``(networks, …)``.
    """
    begin, seeds = time.perf_counter(), np.arange(config.networks)
    pieces = programs.compile_pieces(make, problem, len(seeds), config.max_parallel)

    def runs(name: str) -> Any:
        values = {
            "strength": 0.0,
            "damping": config.damping,
            "importance": number(name),
        }
        every = {k: np.full(len(seeds), x, np.float32) for k, x in values.items()}
        return pieces.to_devices((seeds.astype(np.uint32), every))

    own = runs("si")
    carry, loss_drop = pieces.init(own), np.zeros(len(seeds))
    for i in range(config.epochs):
        carry, report = pieces.epoch(carry, own, 0, i)
        loss_drop += pieces.to_host(report.loss_drop)
    end = pieces.to_host(carry)
    synaptic, watched, *_ = end.opt_state

    def total(tree):
        return sum(np.sum(x, tuple(range(1, x.ndim))) for x in jax.tree.leaves(tree))

    if not np.isfinite(total(end.params)).all():
        raise command.UserError(
            "A network diverged in the first task: there is nothing to measure. Lower "
            "the learning rate."
        )
    found = {}
    for name in CORRELATED:
        # A copy, as the boundary donates what it is given.
        after = pieces.finish(pieces.to_devices(end), runs(name), 0, config.epochs)
        found[name] = pieces.to_host(after.opt_state[2].importance)
    size = sum(x[0].size for x in jax.tree.leaves(found["si"]))
    layers = {}
    for i in range(len(config.hidden) + 1):
        kernels = {k: x["params"][f"Dense_{i}"]["kernel"] for k, x in found.items()}
        each = [correlate({k: x[run] for k, x in kernels.items()}) for run in seeds]
        layers[f"layer {i + 1}"] = {k: [x[k] for x in each] for k in each[0]}
    return {
        "points": {"seed": seeds},
        "seconds": time.perf_counter() - begin,
        "ω": {
            "sum": total(synaptic.synapses.path_integral),
            "unbiased": total(watched.path_integral),
            "loss drop": loss_drop,
        },
        "scale": {k: float(total(x).mean() / size) for k, x in found.items()},
        "layers": layers,
    }


def correlate(kernels: dict[str, np.ndarray]) -> dict[str, Any]:
    """Rank and linear correlations of all pairs, where the Hessian's diagonal is not 0.

    The other parameters belong to pixels that are always blank and units that are
    always silent; they would all be ties.

    Returns:
      ``alive``, their fraction, and ``rank`` and ``linear``, ``(names, names)`` each.
    """
    alive = kernels["hessian"] > 0
    values = np.stack([kernels[name][alive] for name in kernels]).astype(np.float64)
    return {
        "alive": float(alive.mean()),
        "rank": np.corrcoef(stats.rankdata(values, axis=-1)),
        "linear": np.corrcoef(values),
    }


# --- Learning with them ---------------------------------------------------------------


def measures_name(batch_size: int) -> str:
    """Of what is measured, in the record."""
    return f"batch {batch_size}: measures"


def grid_name(batch_size: int, name: str) -> str:
    """Of an importance's grid."""
    return f"batch {batch_size}: {name}, grid"


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
                c = scenarios.chosen(
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


# --- What comes of it -----------------------------------------------------------------


def report(config: Config, record: Record) -> None:
    """Print and draw what is finished."""
    runs = record.runs
    name = f"{config.network.capitalize()} {split_mnist.NAMES[config.data]}"
    print(f"\n{name}: ω after the first task, mean ± SEM, n = {config.networks}")
    print(bias_table(runs))
    for with_ in ("si", "root fisher", "hessian"):
        print(f"\nRank, linear correlation with {TITLES[with_]}")
        print(correlation_table(runs, with_))
    record.save("why_correlations", correlations_figure(runs, name))
    learned = dict(tested(runs))
    if learned:
        print("\nHeld-out accuracy after all tasks, mean over the seeds; * is chosen")
        print(choice_table(config, runs))
        over = over_seeds(learned)
        print(f"\n{name}: test accuracy after all tasks, {over}")
        print(accuracy_table(runs))
        record.save("why", accuracy_figure(runs, f"{name}, {over}"))
    seconds = sum(run.get("seconds", 0) for run in runs.values())
    print(f"\nTook {seconds:.0f} s. Everything is in {record.folder}.")


def measured(runs: dict[str, Any]) -> dict[int, Any]:
    """What was measured, by batch size, from the smallest."""
    names = [x for x in runs if x.endswith(": measures")]
    return dict(sorted((int(x.split()[1].removesuffix(":")), runs[x]) for x in names))


def tested(runs: dict[str, Any]) -> Iterator[tuple[tuple[int, str], Any]]:
    """What was learned and tested, by batch size and importance."""
    for name, run in runs.items():
        batch, _, of = name.removeprefix("batch ").partition(": ")
        if "points" not in run:
            yield (int(batch), of.split(" c=")[0]), run


def shares(omega: dict[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """The parts of Σω that are bias, by noise and by long steps, ``(networks,)`` each.

    Along a step the gradient changes: that at its start, SI's, overestimates the loss
    drop, and that at its end, the unbiased one's, underestimates it, where the loss is
    quadratic by as much. Their mean would be the loss drop, but for noise.

    What is noise is at least this, and what is long steps at most. An epoch draws
    without replacement, so that the next minibatch's noise opposes a little that of the
    step, which makes the unbiased sum too low.
    """
    total, unbiased, drop = (
        np.asarray(omega[k]) for k in ("sum", "unbiased", "loss drop")
    )
    return {
        "noise": (total + unbiased - 2 * drop) / total,
        "long steps": 2 * (drop - unbiased) / total,
    }


def bias_table(runs: dict[str, Any]) -> str:
    """A row a batch size: Σω, without its bias, the loss drop, the bias' shares."""
    rows = [["batch size", "Σω", "unbiased", "loss drop"]]
    rows[0] += ["noise / Σω ≥", "long steps / Σω ≤"]
    for batch_size, found in measured(runs).items():
        omega = found["ω"]
        sums = [cell(omega[k]) for k in ("sum", "unbiased", "loss drop")]
        rows.append([str(batch_size), *sums, *map(cell, shares(omega).values())])
    return aligned(rows)


def correlation_table(runs: dict[str, Any], with_: str) -> str:
    """A row a batch size and importance, a column a layer: rank, linear ± SEM."""
    column, rows = CORRELATED.index(with_), []
    for batch_size, found in measured(runs).items():
        rows.append([f"batch size {batch_size}", *found["layers"]])
        for i, name in enumerate(CORRELATED):
            if i == column:
                continue
            row = [f"  {TITLES[name]}"]
            for layer in found["layers"].values():
                both = (np.asarray(layer[k])[:, i, column] for k in ("rank", "linear"))
                row.append(", ".join(map(short, both)))
            rows.append(row)
    return aligned(rows)


def short(values: np.ndarray) -> str:
    """Mean ± SEM to two digits."""
    if len(values) == 1:
        return f"{values.mean():.2f}"
    return f"{values.mean():.2f} ± {metrics.standard_error(values):.2f}"


def choice_table(config: Config, runs: dict[str, Any]) -> str:
    """A row an importance and batch size: accuracy by pull, the best with a *."""
    rows = [["", "batch size", *(f"{pull:g}" for pull in config.pulls)]]
    for name in TITLES:
        for batch_size in measured(runs):
            if grid := runs.get(grid_name(batch_size, name)):
                after = np.asarray(metrics.average_accuracy(grid["test"]))
                cells = scenarios.choices(after.reshape(-1, len(config.pulls)))
                rows.append([TITLES[name], str(batch_size), *cells])
    return aligned(rows)


def accuracy_table(runs: dict[str, Any]) -> str:
    """A row an importance, a column a batch size: accuracy averaged over the tasks."""
    found, sizes = dict(tested(runs)), list(measured(runs))
    rows = [["importance", *(f"batch size {size}" for size in sizes)]]
    for name, title in TITLES.items():
        cells = [
            cell(metrics.average_accuracy(found[size, name]["test"]))
            if (size, name) in found
            else ""
            for size in sizes
        ]
        rows += [[title, *cells]] if any(cells) else []
    return aligned(rows)


def correlations_figure(runs: dict[str, Any], name: str) -> Figure:
    """All pairs, a panel a batch size and layer."""
    return figures.pairs(
        {
            f"batch size {batch_size}": {
                layer: {k: np.mean(x[k], axis=0) for k in ("rank", "linear")}
                for layer, x in found["layers"].items()
            }
            for batch_size, found in measured(runs).items()
        },
        [TITLES[x] for x in CORRELATED],
        suptitle=f"{name}, after the first task",
    )


def accuracy_figure(runs: dict[str, Any], name: str) -> Figure:
    """The bias and the accuracies by batch size."""
    accuracy: dict[str, dict[int, Any]] = {}
    for (size, of), run in tested(runs):
        after = np.asarray(metrics.average_accuracy(run["test"]))
        accuracy.setdefault(TITLES[of], {})[size] = after
    of_size = {size: shares(found["ω"]) for size, found in measured(runs).items()}
    return figures.by_batch_size(
        {
            f"{name}, {bound}": {size: found[name] for size, found in of_size.items()}
            for name, bound in (("noise", "at least"), ("long steps", "at most"))
        },
        accuracy,
        suptitle=name,
    )


if __name__ == "__main__":
    command.main(Config, "why", run)
