# pip install keras==3.12.0
"""Keras 3 with the backend jax, in a loop of one's own (its fit takes no optax)."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import optax

import si_jax
from trainers.account import REGRESSIONS, Account, report, si


def two_tasks(strength):
    """The parameters are the list of the model's trainable variables."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    account = Account(si(strength))
    params = [x.value for x in model.trainable_variables]
    opt_state, losses = account.tx.init(params), []

    def loss(params, x, y):
        outputs, _ = model.stateless_call(params, [], x)
        return jnp.mean((outputs - y) ** 2)

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, opt_state = account.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for x, y in REGRESSIONS:
        for _ in range(200):
            params, opt_state = step(params, opt_state, x, y)
        account.close(opt_state, params)
        opt_state = si_jax.consolidate(opt_state, params)
        for variable, value in zip(model.trainable_variables, params, strict=True):
            variable.assign(value)
        x, y = REGRESSIONS[0]
        losses.append(jnp.mean((model(x) - y) ** 2))
    return account, *losses


report("keras", two_tasks)
