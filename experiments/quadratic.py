"""Section 4 of the paper, from runs: ``python -m experiments.quadratic``.

Where ω is what the closed forms say, and where it stops to be.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import si_jax
from experiments import figures
from experiments.engine import command
from experiments.engine.record import Record, is_first
from experiments.engine.tables import aligned
from si_jax import theory

SPECTRA = {
    "diagonal": (0.5, 1.0, 1.5, 2.0, 2.5, 3.0),
    "full": (0.5, 1.0, 1.5, 2.0, 2.5, 3.0),
    "low rank": (0.0, 0.0, 0.0, 0.0, 1.0, 3.0),
    "ill-conditioned": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
}
EXAMPLES = 512  # of the regression
OPTIMIZERS = {
    "SGD": optax.sgd,
    "momentum 0.9": lambda rate: optax.sgd(rate * 0.1, momentum=0.9),
    "Adam": lambda rate: optax.adam(rate * 0.1),
}


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Path integral and importance on quadratic losses, against the closed forms."""

    learning_rates: tuple[float, ...] = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
    """η of full-batch gradient descent."""
    starts: int = 1000
    """Random initial conditions to average over."""
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Of a linear regression with 512 examples, which they divide."""
    noisy_learning_rates: tuple[float, ...] = (0.2, 0.1, 0.05, 0.02, 0.01)
    """η of SGD there; momentum has η/10 and β = 0.9, Adam η/10."""
    epochs: int = 50
    """Passes over the regression's examples."""
    seeds: int = 10
    """Runs of the regression."""

    def __post_init__(self):
        """Refuse values that make no sense."""
        self.check(at_least_1=("starts", "epochs", "seeds"))
        for name in ("learning_rates", "batch_sizes", "noisy_learning_rates"):
            if not min(getattr(self, name), default=0) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if any(EXAMPLES % size for size in self.batch_sizes):
            raise ValueError(
                f"batch_sizes must divide {EXAMPLES}, got {self.batch_sizes}"
            )


def hessian(kind: str) -> jax.Array:
    """A Hessian of a kind of :data:`SPECTRA`, float64 ``(6, 6)``."""
    eigenvalues = jnp.array(SPECTRA[kind], jnp.float64)
    if kind == "diagonal":
        return jnp.diag(eigenvalues)
    u, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (6, 6), jnp.float64))
    return u @ jnp.diag(eigenvalues) @ u.mT


def steps(kind: str, rate: float) -> int:
    """After which e⁻²⁰ of the slowest mode is left."""
    return int(20 / (min(value for value in SPECTRA[kind] if value) * rate))


@jax.jit
def descend(h: jax.Array, start: jax.Array, rate: float, count: int) -> Any:
    """Gradient descent on ½ θᵀHθ through the transformation: ω and Ω at damping ~0."""
    tx = si_jax.with_synaptic_intelligence(optax.sgd(rate), damping=1e-300)

    def step(_, carry):
        theta, opt_state = carry
        updates, opt_state = tx.update(h @ theta, opt_state, theta)
        return optax.apply_updates(theta, updates), opt_state

    theta, opt_state = jax.lax.fori_loop(0, count, step, (start, tx.init(start)))
    omega = si_jax.synapses(opt_state).path_integral
    return omega, si_jax.synapses(si_jax.consolidate(opt_state, theta)).importance


def error_by_step(config: Config) -> dict[str, Any]:
    """Largest relative error of ω against eq. 11, and against its finite-step form."""
    by_kind: dict[str, Any] = {}
    for kind in SPECTRA:
        h, start = hessian(kind), jnp.linspace(1.0, -2.0, 6, dtype=jnp.float64)
        errors: dict[str, list[float]] = {"eq. 11": [], "finite step": []}
        for rate in config.learning_rates:
            omega, _ = descend(h, start, rate, steps(kind, rate))
            for name, eta in (("eq. 11", 0.0), ("finite step", rate)):
                expected = jnp.diag(theory.path_matrix(h, start, eta))
                errors[name].append(float(jnp.abs(omega / expected - 1).max()))
        slope = np.polyfit(np.log(config.learning_rates), np.log(errors["eq. 11"]), 1)
        by_kind[kind] = {**errors, "slope": float(slope[0])}
    return by_kind


def averaged(config: Config) -> dict[str, Any]:
    """⟨ω⟩/σ² and the median of Ω over random starts, beside H/2."""
    by_kind: dict[str, Any] = {}
    rate = min(config.learning_rates)
    key = jax.random.key(1)
    starts = jax.random.normal(key, (config.starts, 6), jnp.float64)
    run = jax.jit(jax.vmap(descend, (None, 0, None, None)))
    for kind in SPECTRA:
        h = hessian(kind)
        omega, importance = run(h, starts, rate, steps(kind, rate))
        by_kind[kind] = {
            "half the Hessian": jnp.diag(h) / 2,
            "mean ω / σ²": omega.mean(0),
            "median Ω": jnp.median(importance, axis=0),
        }
    return by_kind


def regression(seed: int) -> tuple[jax.Array, jax.Array]:
    """Examples ``(x, y)`` of a linear model with noise, ten inputs."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 3)
    scales = jnp.geomspace(0.3, 1.0, 10)
    x = jax.random.normal(keys[0], (EXAMPLES, 10)) * scales[None]
    y = x @ jax.random.normal(keys[1], (10,)) + jax.random.normal(keys[2], (EXAMPLES,))
    return x, y


@functools.partial(
    jax.jit, static_argnames=("optimizer", "batch_size", "epochs", "seeds")
)
def overestimate(
    optimizer: str, rate: float, batch_size: int, epochs: int, seeds: int
) -> jax.Array:
    """Σω over the loss drop of minibatch training, for each seed."""
    tx = si_jax.with_synaptic_intelligence(OPTIMIZERS[optimizer](rate))

    def run(seed):
        x, y = regression(seed)

        def loss(theta, rows):
            return jnp.mean(jnp.square(x[rows] @ theta - y[rows])) / 2

        def epoch(carry, key):
            rows = jax.random.permutation(key, EXAMPLES).reshape(-1, batch_size)

            def step(carry, rows):
                theta, opt_state = carry
                grads = jax.grad(loss)(theta, rows)
                updates, opt_state = tx.update(grads, opt_state, theta)
                return (optax.apply_updates(theta, updates), opt_state), None

            return jax.lax.scan(step, carry, rows)[0], None

        start = jnp.zeros(10)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), epochs)
        carry, _ = jax.lax.scan(epoch, (start, tx.init(start)), keys)
        theta, opt_state = carry
        every = jnp.arange(EXAMPLES)
        drop = loss(start, every) - loss(theta, every)
        return si_jax.synapses(opt_state).path_integral.sum() / drop

    return jax.vmap(run)(jnp.arange(seeds))


@functools.partial(jax.jit, static_argnames=("epochs", "seeds"))
def predicted(rate: float, batch_size: int, epochs: int, seeds: int) -> jax.Array:
    """The same for SGD by the closed form: 1 and what the noise at the minimum adds."""

    def one(seed):
        x, y = regression(seed)
        best = jnp.linalg.lstsq(x, y)[0]
        gradients = x * (x @ best - y)[:, None]  # of each example, there
        drop = jnp.mean(jnp.square(y)) / 2 - jnp.mean(jnp.square(x @ best - y)) / 2
        # Batches without replacement: the variance of a mean of B out of N.
        variance = (
            gradients.var(0) / batch_size * (EXAMPLES - batch_size) / (EXAMPLES - 1)
        )
        time = rate * epochs * (EXAMPLES // batch_size)
        return 1 + theory.noise_path_integral(variance, time).sum() / drop

    return jax.vmap(one)(jnp.arange(seeds))


def noisy(config: Config) -> dict[str, Any]:
    """Σω over the loss drop, by batch size and by learning rate."""
    middle = config.noisy_learning_rates[len(config.noisy_learning_rates) // 2]
    size = 32
    points = [(middle, b) for b in config.batch_sizes]
    points += [(rate, size) for rate in config.noisy_learning_rates]
    overestimates: dict[str, Any] = {"learning rate": middle, "batch size": size}
    bar = tqdm(total=len(points) * len(OPTIMIZERS), desc="minibatches", disable=None)
    for optimizer in OPTIMIZERS:
        values = []
        for rate, batch in points:
            run = overestimate(optimizer, rate, batch, config.epochs, config.seeds)
            values.append(run)
            bar.update()
        overestimates[optimizer] = split(values, config)
    bar.close()
    theory_values = [predicted(*p, config.epochs, config.seeds) for p in points]
    overestimates["SGD, predicted"] = split(theory_values, config)
    return overestimates


def split(values: list[jax.Array], config: Config) -> dict[str, list[jax.Array]]:
    """The points by batch size, and those by learning rate."""
    count = len(config.batch_sizes)
    return {"by batch size": values[:count], "by learning rate": values[count:]}


PARTS = {"error by step": error_by_step, "averaged": averaged, "noisy": noisy}


def run(config: Config) -> None:
    """Compute what is not there yet, then print and draw it."""
    record = Record("quadratic", config)
    for name, part in PARTS.items():
        if name not in record.runs:
            with jax.enable_x64(name != "noisy"):
                record.add(name, part(config), lambda _: {})
    if is_first():
        report(config, record)


def report(config: Config, record: Record) -> None:
    """Print the tables and draw the figure."""
    runs = {  # a part that was computed under other versions says which
        name: {key: value for key, value in result.items() if key != "versions"}
        for name, result in record.runs.items()
    }
    print("\nLargest relative error of ω against eq. 11, by learning rate")
    print(error_table(runs["error by step"], config))
    print("\nΣω over the loss drop, mean over the seeds, by batch size")
    print(noise_table(runs["noisy"], "by batch size", config.batch_sizes))
    print("\nand by learning rate")
    print(noise_table(runs["noisy"], "by learning rate", config.noisy_learning_rates))
    figure = figures.quadratic(
        runs["error by step"],
        runs["averaged"],
        runs["noisy"],
        learning_rates=config.learning_rates,
        batch_sizes=config.batch_sizes,
        noisy_learning_rates=config.noisy_learning_rates,
    )
    record.save("quadratic", figure)
    print(f"\nEverything is in {record.folder}.")


def error_table(by_kind: dict[str, Any], config: Config) -> str:
    """A row a kind of Hessian, a column a learning rate, and the slope on log axes."""
    rows = [["", *(f"{rate:g}" for rate in config.learning_rates), "slope"]]
    for kind, errors in by_kind.items():
        numbers = [f"{x:.1e}" for x in errors["eq. 11"]]
        rows.append([kind, *numbers, f"{errors['slope']:.2f}"])
    return aligned(rows)


def noise_table(
    overestimates: dict[str, Any], by: str, values: tuple[float, ...]
) -> str:
    """A row an optimizer, a column a batch size or learning rate."""
    rows = [["", *(f"{value:g}" for value in values)]]
    for name in (*OPTIMIZERS, "SGD, predicted"):
        rows.append([name, *(f"{np.mean(x):.2f}" for x in overestimates[name][by])])
    return aligned(rows)


if __name__ == "__main__":
    command.main(Config, "quadratic", run)
