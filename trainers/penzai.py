# pip install penzai==0.2.5
"""Penzai's StatefulTrainer: its state may be passed whole."""

import jax
import jax.numpy as jnp
from penzai import pz
from penzai.toolshed import basic_training

import si_jax
from trainers.account import REGRESSIONS, Account, report, si


def loss(model, state, rng, x, y):
    """The mean squared error, in the form that the trainer asks for."""
    del rng
    x = pz.nx.wrap(x).tag("batch", "features")
    outputs = model(x).unwrap("batch", "outputs")
    return jnp.mean((outputs - y) ** 2), state, {}


def two_tasks(strength):
    """A linear layer."""
    account = Account(si(strength))
    model = pz.nn.Linear.from_config(
        "linear", jax.random.key(0), {"features": 3}, {"outputs": 1}
    )
    trainer = basic_training.StatefulTrainer.build(
        jax.random.key(0), model, account.tx, loss, donate_states=True
    )
    losses = []
    for x, y in REGRESSIONS:
        for _ in range(200):
            trainer.step(x=x, y=y)
        params = pz.freeze_params(pz.unbind_params(trainer.model)[1])
        account.close(trainer.state.value, params)
        trainer.state.value = si_jax.consolidate(trainer.state.value, params)
        losses.append(loss(trainer.model, None, None, *REGRESSIONS[0])[0])
    return account, *losses


report("penzai", two_tasks)
