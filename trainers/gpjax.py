# pip install gpjax==1.0.0
"""GPJax's fit: it drops the optimizer's state."""

import gpjax as gpx
import jax
import jax.numpy as jnp

import si_jax
from trainers.account import Account, report, si

jax.config.update("jax_enable_x64", True)
X = jnp.linspace(-1.0, 1.0, 12)[:, None]
TASKS = [gpx.Dataset(X, jnp.sin(6 * X)), gpx.Dataset(X, 3 + 0.1 * X)]


def negative_log_likelihood(posterior, data):
    """Of the noise, the kernel and the constant mean."""
    return -gpx.objectives.conjugate_mll(posterior, data)


def two_tasks(strength):
    """The parameters are not those of the model: they are unconstrained."""
    tx = si_jax.persistent(si(strength))
    account = Account(tx)
    prior = gpx.gps.Prior(
        mean_function=gpx.mean_functions.Constant(), kernel=gpx.kernels.RBF()
    )
    model, losses = prior * gpx.likelihoods.Gaussian(), []
    for data in TASKS:
        model, _ = gpx.fit(
            model=model,
            objective=negative_log_likelihood,
            train_data=data,
            optim=account.tx,
            num_iters=200,
            verbose=False,
        )
        account.close(tx.opt_state, tx.params)
        tx.opt_state = si_jax.consolidate(tx.opt_state, tx.params)
        losses.append(negative_log_likelihood(model, TASKS[0]))
    return account, *losses


report("gpjax", two_tasks)
