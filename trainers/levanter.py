# pip install levanter==1.2.dev1644 haliax==1.4.dev453 chex flax gitpython
"""Levanter's Trainer: its state may be passed whole."""

import tempfile
from pathlib import Path

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from levanter.checkpoint import CheckpointerConfig
from levanter.distributed import RayConfig
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig

import si_jax
from trainers.account import REGRESSIONS, Account, report, si

TASKS = [
    (hax.named(x, ("batch", "x")), hax.named(y, ("batch", "y"))) for x, y in REGRESSIONS
]


def loss(model, task, key=None):
    """The mean squared error."""
    del key
    x, y = (part.array for part in task)
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def two_tasks(strength):
    """A linear layer."""
    account = Account(si(strength))
    folder = Path(tempfile.mkdtemp())
    config = TrainerConfig(
        id="run",
        tracker=NoopConfig(),
        log_dir=folder,
        checkpointer=CheckpointerConfig(base_path=str(folder)),
        ray=RayConfig(auto_start_cluster=False),
        require_accelerator=False,
        num_train_steps=400,
        train_batch_size=16,
    )
    losses = []
    with Trainer(config, account.tx, loss, add_default_hooks=False) as trainer:
        model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
        state = trainer.initial_state(jax.random.PRNGKey(0), model=model)
        for task in TASKS:
            state = trainer.train(state, [task] * 200).state
            account.close(state.opt_state, state.trainable_model)
            state = si_jax.consolidate(state, state.trainable_model)
            losses.append(loss(state.model, TASKS[0]))
    return account, *losses


report("levanter", two_tasks)
