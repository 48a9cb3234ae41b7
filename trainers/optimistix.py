# pip install optimistix==0.1.0
"""Optimistix' minimise: it returns the optimizer's state and does not take it."""

import jax.numpy as jnp
import optimistix

import si_jax
from trainers.account import REGRESSIONS, Account, report, si


def loss(w, task):
    """The mean squared error."""
    x, y = task
    return jnp.mean((x @ w - y) ** 2)


def two_tasks(strength):
    """A linear regression, until its solver says that it has converged."""
    tx = si_jax.persistent(si(strength))
    account = Account(tx)
    solver = optimistix.OptaxMinimiser(account.tx, rtol=1e-5, atol=1e-6)
    w, losses = jnp.zeros((3, 1)), []
    for task in REGRESSIONS:
        w = optimistix.minimise(loss, solver, w, task, max_steps=2000).value
        account.close(tx.opt_state, w)
        tx.opt_state = si_jax.consolidate(tx.opt_state, tx.params)
        losses.append(loss(w, REGRESSIONS[0]))
    return account, *losses


report("optimistix", two_tasks)
