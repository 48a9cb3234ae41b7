# pip install numpyro==0.22.0
"""NumPyro's SVI: its state may be passed whole, the parameters unconstrained."""

import jax
import jax.numpy as jnp
import numpyro
from numpyro import distributions
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import optax_to_numpyro

import si_jax
from trainers.account import REGRESSIONS, Account, report, si


def model(x, y):
    """A linear regression with a wide prior."""
    prior = distributions.Normal(jnp.zeros(3), 10.0).to_event(1)
    w = numpyro.sample("w", prior)
    numpyro.sample("y", distributions.Normal(x @ w, 1.0), obs=y[:, 0])


def two_tasks(strength):
    """Also the posterior's width is a parameter, and its logarithm the optimizer's."""
    account = Account(si(strength))
    svi = SVI(model, AutoNormal(model), optax_to_numpyro(account.tx), Trace_ELBO(8))
    state, losses = None, []
    for x, y in REGRESSIONS:
        result = svi.run(
            jax.random.key(0), 300, x, y, init_state=state, progress_bar=False
        )
        state = result.state
        params = svi.optim.get_params(state.optim_state)  # not result.params
        account.close(state, params)
        state = si_jax.consolidate(state, params)
        losses.append(svi.evaluate(state, *REGRESSIONS[0]))
    return account, *losses


report("numpyro", two_tasks)
