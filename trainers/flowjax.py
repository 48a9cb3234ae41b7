# pip install flowjax==19.1.2
"""FlowJAX' fit_to_data: it drops the optimizer's state."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import Affine
from flowjax.distributions import Normal, Transformed
from flowjax.train import fit_to_data

import si_jax
from trainers.account import Account, report, si

NOISE = jax.random.normal(jax.random.key(0), (200, 2))
TASKS = [0.5 * NOISE + 1.0, NOISE - 1.0]


def two_tasks(strength):
    """Two Gaussians by minibatches."""
    tx = si_jax.persistent(si(strength, 0.02))
    account = Account(tx)
    flow = Transformed(Normal(jnp.zeros(2)), Affine(jnp.zeros(2), jnp.ones(2)))
    losses = []
    for data in TASKS:
        flow, _ = fit_to_data(
            jax.random.key(1),
            flow,
            data,
            optimizer=account.tx,
            batch_size=30,
            max_epochs=50,
            max_patience=50,
            return_best=False,
            show_progress=False,
        )
        account.close(tx.opt_state, eqx.filter(flow, eqx.is_inexact_array))
        tx.opt_state = si_jax.consolidate(tx.opt_state, tx.params)
        losses.append(-jnp.mean(flow.log_prob(TASKS[0])))
    return account, *losses


report("flowjax", two_tasks)
