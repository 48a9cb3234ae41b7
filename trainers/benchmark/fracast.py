"""Fracast-0, a pretrained forecaster that a package ships, fine-tuned.

In an environment with PyTorch for the package's own encoder::

    pip install fracast==0.1.0 torch==2.13.0 jax==0.10.2 optax==0.2.8 numpy==2.4.6
    pip install --no-deps continual-foragax==0.58.0 && pip install -e .
    python -m trainers.benchmark.fracast runs/fracast.json

The weights are Apache-2.0. The temperatures are of the European Climate Assessment &
Dataset, free to use where it is named (Klein Tank et al., Int. J. of Climatol. 22,
2002); the package that has them names no licence of its own. Nothing of either is here.
"""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from fracast import FracastModel

import si_jax
from si_jax import importance

CONTEXT, HORIZON, SEED_STATES = 2048, 48, 128
QUANTILES = jnp.linspace(0.1, 0.9, 9)
SETTINGS = {
    "seeds": [1, 2, 3],
    "steps": 200,
    "stops": [5, 10, 25, 50, 100],
    "batch_size": 16,
    "learning_rate": 3e-4,
    "rates": [0.1, 0.3],
    "strengths": {
        "si": [1.0, 10.0, 100.0, 1000.0],
        "fisher": [10.0, 100.0, 1e3, 1e4, 1e5],
        "second moment": [10.0, 100.0, 1e3, 1e4, 1e5],
    },
    "weights": [0.2, 0.4, 0.6, 0.8],
    "old series": {"importance": 64, "choice": 64, "test": 128},
    "years": {"early": [1800, 1990], "late": [1990, 2100]},
    "of a station": {"early": 4, "late": 3},
    "damping": 1e-3,
}


# --- Old and new ----------------------------------------------------------------------


def kernel_synth(rng, length=1024):
    """A series as Chronos' KernelSynth draws them, which Fracast was trained on.

    A Gaussian process whose kernel is a random sum or product of up to five
    (`Ansari et al. <https://arxiv.org/abs/2403.07815>`_, appendix A).
    """
    x = np.linspace(0, 1, length)[:, None]
    distance = np.abs(x - x.T)
    periods = [4, 6, 7, 12, 14, 24, 26, 30, 48, 52, 60, 96, 168, 336, 365]

    def drawn():
        kind = rng.integers(6)
        scale = rng.choice([0.1, 1.0, 10.0])
        if kind == 0:
            period = rng.choice(periods) / length
            return np.exp(-2 * np.sin(np.pi * distance / period) ** 2)
        if kind == 1:
            return rng.choice([0.0, 1.0, 10.0]) ** 2 + x * x.T
        if kind == 2:
            return np.exp(-((distance / scale) ** 2) / 2)
        if kind == 3:
            return (1 + distance**2 / (2 * scale)) ** -scale
        if kind == 4:
            return rng.choice([0.1, 1.0]) * np.eye(length)
        return np.ones((length, length))

    kernel = drawn()
    for _ in range(rng.integers(5)):
        kernel = kernel + drawn() if rng.integers(2) else kernel * drawn()
    jitter = 1e-6 * kernel.diagonal().max() * np.eye(length)
    return np.linalg.cholesky(kernel + jitter) @ rng.normal(size=length)


def temperatures():
    """Daily means, and days as numpy has them, by station; NaN where not valid."""
    (file,) = (
        x
        for x in importlib.metadata.files("continual-foragax")
        if x.name == "metadata.txt"
    )
    found = defaultdict(list)
    for path in sorted(Path(file.locate()).parent.glob("TG_*.txt")):
        lines = path.read_text().splitlines()
        start = 1 + next(i for i, x in enumerate(lines) if x.startswith(" STAID"))
        rows = np.loadtxt(lines[start:], delimiter=",", dtype=int)
        days = np.array([f"{d[:4]}-{d[4:6]}-{d[6:]}" for d in rows[:, 2].astype(str)])
        days = days.astype("datetime64[D]")
        series = np.full((days[-1] - days[0]).astype(int) + 1, np.nan)
        series[(days - days[0]).astype(int)] = np.where(rows[:, 4], np.nan, rows[:, 3])
        found[rows[0, 0]].append((days[0], series / 10))
    return found


def windows(of_station, period, count):
    """Complete windows, so many of a station, whose targets lie in a period."""
    found, length = [], CONTEXT + HORIZON
    for first, series in of_station:
        for start in range(0, len(series) - length + 1, 97):
            target = first + start + np.array([CONTEXT, length - 1])
            whole = np.isfinite(series[start : start + length]).all()
            if whole and period[0] <= target[0] and target[1] < period[1]:
                found.append(series[start : start + length])
    every = np.linspace(0, len(found) - 1, min(count, len(found))).round()
    return [found[int(i)] for i in every]


# --- The network ----------------------------------------------------------------------


def encoded(model, series):
    """What the package's own encoder makes of contexts, and the targets.

    Returns:
      Of each series ``mean`` and ``last`` of the states, the ``fill`` of the future by
      its period, ``target``, and the package's ``forecast``; all in units of the
      context's range, as it was trained.
    """
    kept = defaultdict(list)

    def keep(_, arguments):
        states, fill, _ = arguments
        kept["mean"].append(states.mean(1).numpy())
        kept["last"].append(states[:, -SEED_STATES:].numpy())
        kept["fill"].append(fill.numpy())

    hook = model.head.future_conv.register_forward_pre_hook(keep)
    for start in range(0, len(series), 16):
        batch = np.array(series[start : start + 16], np.float32)
        context, target = np.split(batch, [-HORIZON], axis=1)
        low = context.min(1, keepdims=True)
        span = np.maximum(context.max(1, keepdims=True) - low, 1e-5)
        kept["target"].append((target - low) / span)
        forecast = model.forecast_batch(context)
        kept["forecast"].append((forecast - low[..., None]) / span[..., None])
    hook.remove()
    return {key: np.concatenate(x).astype(np.float32) for key, x in kept.items()}


def linear(p, x):
    """``torch.nn.Linear``."""
    return x @ p["weight"].T + p["bias"]


def norm(p, x):
    """``torch.nn.RMSNorm``."""
    eps = jnp.finfo(x.dtype).eps
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + eps) * p["weight"]


def swiglu(p, x):
    """Both halves of one projection, the first as a gate."""
    gate, value = jnp.split(linear(p["up"], x), 2, axis=-1)
    return linear(p["down"], jax.nn.silu(gate) * value)


def convolved(p, x, dilation):
    """Each channel with its own three weights, along the first axis; no padding."""
    n = len(x) - 2 * dilation
    taps = [x[i * dilation : i * dilation + n] for i in range(3)]
    return (
        sum(p["dw_weight"][:, 0, i] * tap for i, tap in enumerate(taps)) + p["dw_bias"]
    )


def decode(p, mean, last, fill):
    """The package's head: quantiles ``(horizon, quantile)`` of one series."""
    delta = jnp.arange(1, HORIZON + 1) / CONTEXT
    decays = [jnp.exp(-k * delta) for k in (0.5, 2.0, 8.0)]
    recency = jnp.stack([delta, jnp.log1p(delta) / jnp.log(2.0), *decays], 1)
    summary = jnp.broadcast_to(jnp.concatenate([mean, last[-1]]), (HORIZON, 128))
    x = linear(p["summary_proj"], jnp.concatenate([recency, summary], 1)) + p["queries"]
    x = norm(p["decoder_norms"]["0"], x + swiglu(p["decoder_ffns"]["0"], x))
    for i, block in p["fc_blocks"].items():
        padded = jnp.pad(x, ((2 * 2 ** int(i), 0), (0, 0)))
        x = norm(block["norm"], x + convolved(block, padded, 2 ** int(i)))
    q, future = p["future_conv"], jnp.concatenate([fill[:, None], recency], 1)
    z = jnp.concatenate([last, linear(q["in_proj"], future)])
    for dilation in (1, 2, 4, 8, 16, 32):
        convolution = linear(q["block"]["pw"], convolved(q["block"], z, dilation))
        z = norm(q["block"]["norm1"], z[2 * dilation :] + convolution)
        z = norm(q["block"]["norm2"], z + swiglu(q["block"]["ffn"], z))
    return linear(p["out_proj"], x + linear(q["out_proj"], z[-HORIZON:]))


def loss(params, example):
    """The quantile loss that it was trained with, of one series, times 100."""
    inputs = (example[key] for key in ("mean", "last", "fill"))
    error = example["target"][:, None] - decode(params, *inputs)
    return 100 * jnp.mean(jnp.maximum(QUANTILES * error, (QUANTILES - 1) * error))


def parameters(module):
    """PyTorch's, as a nested dictionary."""
    tree = {}
    for name, value in module.state_dict().items():
        *path, last = name.split(".")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = jnp.asarray(value.numpy())
    return tree


# --- Training -------------------------------------------------------------------------


@jax.jit
def mean_loss(params, examples):
    """Over the examples, a chunk at a time."""
    return jnp.mean(jax.lax.map(lambda x: loss(params, x), examples, batch_size=16))


@jax.jit
def train(params, omega, examples, rows, rate, strength):
    """Adam, and a pull to ``params`` with importance ``omega``, a row a batch.

    Returns:
      The parameters after every step, stacked, and the last state.
    """
    tx = si_jax.with_synaptic_intelligence(
        optax.adam(rate), strength, damping=SETTINGS["damping"]
    )
    opt_state = si_jax.add_importance(tx.init(params), omega)

    def batch_loss(params, batch):
        return jax.vmap(loss, (None, 0))(params, batch).mean()

    def step(carry, at):
        params, opt_state = carry
        batch = jax.tree.map(lambda x: x[at], examples)
        grads = jax.grad(batch_loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), params

    (_, opt_state), every = jax.lax.scan(step, (params, opt_state), rows)
    return every, opt_state


def batches(examples, seed):
    """Which examples each step takes."""
    rng, n = np.random.default_rng(seed), len(examples["target"])
    size = SETTINGS["batch_size"]
    return np.stack(
        [rng.choice(n, size, replace=False) for _ in range(SETTINGS["steps"])]
    )


def importances(params, old, seed):
    """Ω of the pretrained network, from a few old series, in three ways."""
    none, rows = jax.tree.map(jnp.zeros_like, params), batches(old, seed)
    # With a rate of 0 Adam moves nothing, and keeps the second moment.
    _, still = train(params, none, old, rows, 0.0, 0.0)
    every, state = train(params, none, old, rows, SETTINGS["learning_rate"], 0.0)
    state = si_jax.consolidate(state, jax.tree.map(lambda x: x[-1], every))
    fisher = importance.empirical_fisher(lambda p, x: -loss(p, x), params, old)
    moment = importance.second_moment(
        still, b2=0.999, batch_size=SETTINGS["batch_size"]
    )
    return {
        "si": si_jax.synapses(state).importance,
        "fisher": jax.tree.map(lambda f: f / 2, fisher),
        "second moment": jax.tree.map(lambda f: f / 2, moment),
    }


def between(pretrained, tuned, weight):
    """The weights between both: ``weight`` is how much of the tuned."""
    return jax.tree.map(lambda a, b: a + weight * (b - a), pretrained, tuned)


def study(pretrained, old, new, seed):
    """All methods with one seed: by family, its points from the pretrained network on.

    Returns:
      By family a list of points: a name, and the losses on old and new series, on
      those to ``choice`` and those to ``test``.
    """
    none, rows = jax.tree.map(jnp.zeros_like, pretrained), batches(new["train"], seed)

    def point(name, params):
        losses = {
            half: [round(float(mean_loss(params, x[half])), 5) for x in (old, new)]
            for half in ("choice", "test")
        }
        print(seed, name, losses, flush=True)
        return {"name": name, **losses}

    def tuned(times=1.0, strength=0.0, omega=none, stops=(SETTINGS["steps"],)):
        rate = times * SETTINGS["learning_rate"]
        every, _ = train(pretrained, omega, new["train"], rows, rate, strength)
        return [jax.tree.map(lambda x, i=i: x[i - 1], every) for i in stops]

    start = point("pretrained", pretrained)
    stops = [*SETTINGS["stops"], SETTINGS["steps"]]
    plain = tuned(stops=stops)
    points = [point(f"{i} steps", x) for i, x in zip(stops, plain, strict=True)]
    end = points[-1]
    families = {"early stopping": [start, *points]}

    def interpolated(name, params, last):
        of = [
            point(f"{name}, {w:g} of it", between(pretrained, params, w))
            for w in SETTINGS["weights"]
        ]
        families[f"{name}, interpolated"] = [start, *of, last]

    slow = {r: tuned(r)[0] for r in SETTINGS["rates"]}
    points = {r: point(f"rate × {r:g}", x) for r, x in slow.items()}
    families["smaller rate"] = [start, *points.values(), end]
    interpolated("fine-tuning", plain[-1], end)
    interpolated("rate × 0.3", slow[0.3], points[0.3])
    for name, omega in importances(pretrained, old["importance"], seed).items():
        of, points = {}, {}
        for c in reversed(SETTINGS["strengths"][name]):
            (of[c],) = tuned(1.0, c, omega)
            points[c] = point(f"{name} c={c:g}", of[c])
        families[name] = [start, *points.values(), end]
        best = min(points, key=lambda c: sum(points[c]["choice"]))
        interpolated(name, of[best], points[best])
    return families


# --- The record -----------------------------------------------------------------------


def grew(families, fraction):
    """How much the old loss grew where this part of what fine-tuning learns was.

    The place on a family's curve is found on the half to choose on, by linear
    interpolation between its points, and the growth is that of the other half; NaN if
    the family does not come as far.
    """
    start, *_, end = families["early stopping"]
    before, after = start["choice"][1], end["choice"][1]
    level = before - fraction * (before - after)
    found = {}
    for name, points in families.items():
        new = np.array([x["choice"][1] for x in points])
        old = np.array([x["test"][0] for x in points])
        i = int(np.argmax(new <= level))
        if i == 0:
            found[name] = np.nan
            continue
        share = (new[i - 1] - level) / (new[i - 1] - new[i])
        found[name] = old[i - 1] + share * (old[i] - old[i - 1]) - old[0]
    return found


def summary(runs):
    """Mean, standard error and number of the seeds that reach it.

    By family: the growth where parts of what fine-tuning learns were learned, and both
    losses at the point that is best by their sum, on the half to choose on.
    """

    def statistics(values):
        values = np.array(values)[np.isfinite(values)]
        n = len(values)
        error = float(np.std(values, ddof=1) / n**0.5) if n > 1 else None
        return float(values.mean()) if n else None, error, n

    runs, table = list(runs.values()), defaultdict(dict)
    for fraction in (0.5, 0.75, 0.9):
        of = [grew(families, fraction) for families in runs]
        for name in of[0]:
            table[name][f"{fraction:.0%}"] = statistics([x[name] for x in of])

    def losses(points):
        return {
            text: statistics([x["test"][i] for x in points])
            for i, text in enumerate(("old", "new"))
        }

    for name, row in table.items():
        row |= losses([min(x[name], key=lambda p: sum(p["choice"])) for x in runs])
    ends = [x["early stopping"] for x in runs]
    return {
        "pretrained": losses([x[0] for x in ends]),
        "fine-tuning": losses([x[-1] for x in ends]),
        **table,
    }


def data(model):
    """What the encoder makes of old series, and of early and of late new ones.

    New is the mean temperature of the days from the forecast on, up to each: what
    degree days are made of. That of each day the network forecasts well already.
    """
    rng = np.random.default_rng(0)
    count = sum(SETTINGS["old series"].values())
    series = {"old": [kernel_synth(rng) for _ in range(count)], "early": [], "late": []}
    station = {"early": [], "late": []}
    for name, of in temperatures().items():
        for part, years in SETTINGS["years"].items():
            period = [np.datetime64(f"{year}-01-01") for year in years]
            found = windows(of, period, SETTINGS["of a station"][part])
            series[part] += found
            station[part] += [name] * len(found)
    parts = {part: encoded(model, series[part]) for part in series}
    for part, names in station.items():
        parts[part]["station"] = np.array(names)
        days = np.arange(1, HORIZON + 1, dtype=np.float32)
        parts[part]["target"] = np.cumsum(parts[part]["target"], 1) / days
    return parts


def split(parts, seed):
    """A seed's: which old series, and which stations' late windows, are for what."""
    rng = np.random.default_rng(seed)

    def taken(part, at):
        return {k: jnp.asarray(x[at]) for k, x in parts[part].items() if k != "station"}

    sizes = SETTINGS["old series"]
    cuts = np.cumsum(list(sizes.values()))
    of_old = dict(
        zip(sizes, np.split(rng.permutation(cuts[-1]), cuts[:-1]), strict=True)
    )
    old = {name: taken("old", at) for name, at in of_old.items()}
    stations = rng.permutation(np.unique(parts["late"]["station"]))
    to_choose = np.isin(parts["late"]["station"], stations[: len(stations) // 3])
    new = {"choice": taken("late", to_choose), "test": taken("late", ~to_choose)}
    return old, new | {"train": taken("early", slice(None))}


def main(file):
    """Write a record."""
    start, used = time.time(), time.process_time()
    model = FracastModel.from_pretrained(weights="fp32")
    pretrained = parameters(model.head)
    parts, differences = data(model), []
    for examples in parts.values():
        forecast = examples.pop("forecast")
        inputs = [examples[key] for key in ("mean", "last", "fill")]
        ours = jax.lax.map(lambda x: decode(pretrained, *x), inputs, batch_size=16)
        differences.append(float(np.abs(ours - forecast).max()))
    assert max(differences) < 1e-5, differences
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout
    packages = ["fracast", "continual-foragax", "jax", "optax", "numpy"]
    record = {
        "command": "python -m trainers.benchmark.fracast",
        "settings": SETTINGS,
        "versions": {
            **{package: importlib.metadata.version(package) for package in packages},
            "torch": torch.__version__,
            "si_jax": si_jax.__version__,
            "commit": commit.strip(),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        },
        "largest difference from the package's forecast": max(differences),
        "windows": {part: len(x["target"]) for part, x in parts.items()},
        "stations": len(np.unique(parts["late"]["station"])),
    }
    runs = {}
    for seed in SETTINGS["seeds"]:
        runs[seed] = study(pretrained, *split(parts, seed), seed)
        record["seconds"] = round(time.time() - start)
        record["CPU seconds"] = round(time.process_time() - used)
        content = {**record, "summary": summary(runs), "runs": runs}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
