# pip install trainax==0.0.2
"""Trainax' trainers: they take the optimizer's state and do not return it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from trainax.trainer import SupervisedTrainer

import si_jax
from trainers.account import REGRESSIONS, Account, report, si


def one_step(x, y):
    """Trajectories of one step, from x to y: (samples, 2, 3)."""
    return jnp.stack([x, jnp.pad(y, ((0, 0), (0, 2)))], axis=1)


def two_tasks(strength):
    """An emulator that is linear."""
    tx = si_jax.persistent(si(strength))
    account = Account(tx)
    stepper = eqx.nn.Linear(3, 3, key=jax.random.key(0))
    losses = []
    for x, y in REGRESSIONS:
        trainer = SupervisedTrainer(
            one_step(x, y),
            optimizer=account.tx,
            num_training_steps=200,
            batch_size=8,
        )
        stepper, _ = trainer(stepper, jax.random.key(1), spawn_tqdm=False)
        account.close(tx.opt_state, eqx.filter(stepper, eqx.is_inexact_array))
        tx.opt_state = si_jax.consolidate(tx.opt_state, tx.params)
        x, y = REGRESSIONS[0]
        losses.append(jnp.mean((jax.vmap(stepper)(x)[:, :1] - y) ** 2))
    return account, *losses


report("trainax", two_tasks)
