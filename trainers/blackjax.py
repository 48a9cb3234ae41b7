# pip install blackjax==1.7.1
"""BlackJAX' variational inference: its state may be passed whole."""

import functools

import blackjax
import jax
import jax.numpy as jnp

import si_jax
from trainers.account import REGRESSIONS, Account, report, si


def log_density(w, task):
    """Of a linear regression; with a wide prior."""
    x, y = task
    return -jnp.sum((x @ w - y[:, 0]) ** 2) / 2 - jnp.sum(w**2) / 200


def two_tasks(strength):
    """A Gaussian's means and the logarithms of its widths are the parameters."""
    account = Account(si(strength))
    state, losses = None, []
    for task in REGRESSIONS:
        density = functools.partial(log_density, task=task)
        vi = blackjax.meanfield_vi(density, account.tx)
        state = state or vi.init(jnp.zeros(3))
        for key in jax.random.split(jax.random.key(0), 200):
            state, _ = jax.jit(vi.step)(key, state)
        params = state.mu, state.rho
        account.close(state, params)
        state = si_jax.consolidate(state, params)
        losses.append(-log_density(state.mu, REGRESSIONS[0]))
    return account, *losses


report("blackjax", two_tasks)
