# pip install jaxopt==0.8.5
"""JAXopt's OptaxSolver: its state may be passed whole."""

import jax.numpy as jnp
import jaxopt

import si_jax
from trainers.account import REGRESSIONS, Account, report, si


def loss(w, task):
    """The mean squared error."""
    x, y = task
    return jnp.mean((x @ w - y) ** 2)


def two_tasks(strength):
    """Step by step: ``run`` would start with a fresh state."""
    account = Account(si(strength))
    solver = jaxopt.OptaxSolver(loss, account.tx)
    w, losses = jnp.zeros((3, 1)), []
    state = solver.init_state(w, REGRESSIONS[0])
    for task in REGRESSIONS:
        for _ in range(200):
            w, state = solver.update(w, state, task)
        account.close(state, w)
        state = si_jax.consolidate(state, w)
        losses.append(loss(w, REGRESSIONS[0]))
    return account, *losses


report("jaxopt", two_tasks)
