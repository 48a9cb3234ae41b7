# pip install dm-haiku==0.0.17
"""Haiku, in the loop of its documentation."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import si_jax
from trainers.account import REGRESSIONS, Account, report, si

network = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(x)))


@jax.jit
def loss(params, x, y):
    """The mean squared error."""
    return jnp.mean((network.apply(params, x) - y) ** 2)


def two_tasks(strength):
    """A linear layer."""
    account = Account(si(strength))
    params = network.init(jax.random.key(0), REGRESSIONS[0][0])
    opt_state, losses = account.tx.init(params), []
    update = jax.jit(account.tx.update)
    for x, y in REGRESSIONS:
        for _ in range(200):
            grads = jax.grad(loss)(params, x, y)
            updates, opt_state = update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        account.close(opt_state, params)
        opt_state = si_jax.consolidate(opt_state, params)
        losses.append(loss(params, *REGRESSIONS[0]))
    return account, *losses


report("dm-haiku", two_tasks)
