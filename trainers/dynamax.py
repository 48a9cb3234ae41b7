# pip install dynamax==1.0.3
"""Dynamax' fit_sgd: it drops the optimizer's state and passes no parameters."""

import jax
import jax.numpy as jnp
from dynamax.hidden_markov_model import GaussianHMM

import si_jax
from trainers.account import Account, report, si

NOISE = jax.random.normal(jax.random.key(0), (40, 1))
SIDES = jnp.where(jnp.arange(40)[:, None] // 5 % 2 == 0, 1.0, -1.0)
TASKS = [SIDES + 0.3 * NOISE, 3 * SIDES + 0.3 * NOISE]


def two_tasks(strength):
    """A hidden Markov model with two states; the parameters are unconstrained."""
    tx = si_jax.persistent(si(strength, 0.02))
    account = Account(tx)
    hmm = GaussianHMM(2, 1)
    params, props = hmm.initialize(
        jax.random.key(1),
        emission_means=jnp.array([[-0.5], [0.5]]),
        emission_covariances=jnp.ones((2, 1, 1)),
    )
    losses = []
    for data in TASKS:
        params, _ = hmm.fit_sgd(
            params, props, data, optimizer=account.tx, num_epochs=150
        )
        account.close(tx.opt_state, tx.params)
        tx.opt_state = si_jax.consolidate(tx.opt_state, tx.params)
        losses.append(-hmm.marginal_log_prob(params, TASKS[0]) / TASKS[0].size)
    return account, *losses


report("dynamax", two_tasks)
