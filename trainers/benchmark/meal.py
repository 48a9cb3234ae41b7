# ruff: noqa: E402
"""MEAL, a benchmark that others wrote: SI and EWC beside what it ships.

In an environment that has what the first line of ``trainers/meal.py`` names::

    python -m trainers.benchmark.meal runs/meal.json

Their IPPO, networks, kitchens, evaluation and measures, from their repository, as the
package has the environments alone. Ours are the optimizer and a shorter budget.
"""

import contextlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.tree_util import keystr

import si_jax
from si_jax import ewc, importance

URL = "https://github.com/TTomilin/MEAL"
COMMIT = "057f86291096657f0353a882d6a3ee2209689261"
FOLDER = Path(sys.prefix) / f"MEAL-{COMMIT[:7]}"
if not FOLDER.exists():
    for command in [
        ["clone", "-q", "--filter=blob:none", "--sparse", "--no-checkout", URL, FOLDER],
        ["-C", FOLDER, "sparse-checkout", "set", "experiments"],
        ["-C", FOLDER, "checkout", "-q", COMMIT],
    ]:
        subprocess.run(["git", *command], check=True)
sys.path.insert(0, str(FOLDER))  # before our own package of that name

from experiments.algos.ippo import IPPO, IPPOConfig
from experiments.results.plotting.utils.metrics import (
    compute_forgetting,
    training_end_idx_for_task,
)


class WithMemory(IPPO):
    """MEAL's IPPO with its optimizer inside ours, whose memory outlives the task.

    ``around(tx)`` is the optimizer, ``close(opt_state, params)`` a task's end.
    """

    def __init__(self, config, around=None, close=None):
        config.reset_optimizer = around is None  # theirs would drop the memory
        super().__init__(config)
        self.around, self.close, self.curves = around, close, defaultdict(list)

    def init_network(self):
        """Replace the optimizer that is made here."""
        super().init_network()
        if self.around is not None:
            self.tx = self.around(self.tx)
            self.train_state = TrainState.create(
                apply_fn=self.network.apply, params=self.train_state.params, tx=self.tx
            )

    def build_train_on_environment(self):
        """What trains on one task, and then closes it."""
        train = super().build_train_on_environment()
        if self.around is None:
            return train

        def train_and_close(*arguments):
            (state, *rest), metrics = train(*arguments)
            opt_state = self.close(state.opt_state, state.params)
            opt_state = si_jax.reset_optimizer(self.tx, opt_state, state.params)
            return (state.replace(opt_state=opt_state), *rest), metrics

        return train_and_close

    def setup_logging(self):
        """Keep what would be logged; write nothing."""
        self.writer, self.run_name, self.exp_dir = self, "", ""

    def add_scalar(self, name, value, step):
        """What the writer of a log has."""
        del step
        self.curves[name].append(float(value))

    def save_params(self, *_, **__):
        """No checkpoints."""


SETTINGS = {
    "seq_length": 2,
    "steps_per_task": 400_000,  # MEAL: 1e8, with 2048 environments
    "num_envs": 8,
    "num_steps": 400,
    "update_epochs": 4,
    "num_minibatches": 8,
    "hidden_size": 32,
    "log_interval": 25,
}
DAMPING = 1e-3
SEEDS = [1, 2]  # the kitchens, too
ARMS = [  # fine-tuning, MEAL's methods at MEAL's strengths, and ours
    ("ft", None),
    ("ewc", None),
    ("mas", None),
    ("si", 1.0),
    ("si", 10.0),
    ("ewc, second moment", 1.0),
    ("ewc, second moment", 10.0),
    ("ewc, second moment", 100.0),
]


def actor(params):
    """What MEAL's own methods hold by default, too: the policy, not the critic."""
    return jax.tree.map_with_path(lambda path, _: "actor" in keystr(path), params)


def close_ewc(opt_state, params):
    """EWC with what MEAL's Adam has kept, of clipped gradients.

    From the second kitchen's end on they have the pull in them; that is the last here.
    """
    agents = 2
    batch_size = agents * SETTINGS["num_envs"] * SETTINGS["num_steps"]
    found = importance.second_moment(
        opt_state, b2=0.999, batch_size=batch_size // SETTINGS["num_minibatches"]
    )
    return ewc.consolidate(opt_state, params, found)


OURS = {  # the link, and a task's end
    "si": (lambda c: si_jax.synaptic_intelligence(c, DAMPING), si_jax.consolidate),
    "ewc, second moment": (ewc.elastic_weight_consolidation, close_ewc),
}


def train(method, strength, seed):
    """One run of ours, or of MEAL's own ``method`` with the strength that it gives."""
    ours = method in OURS
    link, close = OURS.get(method, (None, None))

    def around(tx):
        return optax.chain(optax.masked(link(strength), actor), tx)

    config = IPPOConfig(
        cl_method="ft" if ours else method,
        seed=seed,
        record_video=False,
        use_wandb=False,
        **SETTINGS,
    )
    start = time.time(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        run = WithMemory(config, *([around, close] if ours else []))
        run.run()
    curves = [
        run.curves[f"Evaluation/Soup_Scaled/{i}_{name}"]
        for i, name in enumerate(run.env_names)
    ]
    return {
        "method": method,
        "strength": strength if ours else config.reg_coef,
        "seed": seed,
        "seconds": round(time.time() - start[0]),
        "CPU seconds": round(time.process_time() - start[1]),
        "curves": np.round(curves, 4).tolist(),
    }


def measures(run):
    """MEAL's, and two of ours; no forgetting where nothing was learned before."""
    curves = np.array(run["curves"])  # [task, evaluation]
    tasks, length = curves.shape
    own = (1 + np.arange(tasks)) * length // tasks - 1  # a task's last evaluation
    theirs = [training_end_idx_for_task(i, length, length, tasks) for i in range(tasks)]

    def forgetting(ends):
        found = [
            compute_forgetting(curve, "weighted", training_end_idx=end)
            for curve, end in zip(curves[:-1], ends, strict=False)
            if any(curve > 0)
        ]
        return float(np.mean(found)) if found else None

    return {
        "average performance": float(curves[:, -1].mean()),
        "forgetting": forgetting(theirs),
        "forgetting since the task's end": forgetting(own),
        "learned": float(curves[range(tasks), own].mean()),
    }


def summary(runs):
    """Mean, standard error and number of seeds, of every arm and measure."""
    table = {}
    for method, strength in ARMS:
        of_arm = [
            measures(run)
            for run in runs
            if run["method"] == method and strength in (None, run["strength"])
        ]
        arm = method if strength is None else f"{method} c={strength:g}"
        table[arm] = {}
        for name in of_arm[0]:
            values = [run[name] for run in of_arm if run[name] is not None]
            error = float(np.std(values, ddof=1) / len(values) ** 0.5)
            table[arm][name] = float(np.mean(values)), error, len(values)
    return table


def main(file):
    """Write a record, anew after every run; go on with one that was interrupted."""
    file = Path(file)
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    packages = ["meal-bench", "jax", "flax", "optax", "numpy"]
    record = {
        "command": "python -m trainers.benchmark.meal",
        "settings": {**SETTINGS, "difficulty": "easy", "damping": DAMPING},
        "versions": {
            **{package: importlib.metadata.version(package) for package in packages},
            "MEAL": COMMIT,
            "si_jax": si_jax.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        },
    }
    todo = [(*arm, seed) for arm in ARMS for seed in SEEDS]
    for arm in todo[len(runs) :]:
        runs.append(train(*arm))
        print(*arm, measures(runs[-1]), flush=True)
        if len(runs) == len(todo):
            record["summary"] = summary(runs)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**record, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
