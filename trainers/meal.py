# pip install meal-bench==0.3.1 matplotlib pandas seaborn
"""MEAL's IPPO: a subclass takes the optimizer that it makes inside, and keeps it."""

import contextlib
import sys

import jax
import jax.numpy as jnp

import si_jax
from trainers.account import Account, report
from trainers.benchmark.meal import IPPOConfig, WithMemory


def observations(env):
    """What agents that move at random see in a kitchen, ``[seen, feature]``."""

    def step(state, key):
        actions = jax.random.randint(key, (env.num_agents,), 0, env.action_space().n)
        actions = dict(zip(env.agents, actions, strict=True))
        seen, state, *_ = env.step(key, state, actions)
        return state, jnp.stack([seen[agent].ravel() for agent in env.agents])

    _, state = env.reset(jax.random.key(0))
    _, seen = jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 100))
    return jnp.concatenate(seen).astype(float)


def two_tasks(strength):
    """Too short to cook a soup: the loss is how far the first policy moves, in nats."""
    account, policies = None, []

    def around(tx):
        nonlocal account
        account = Account(si_jax.with_synaptic_intelligence(tx, strength, damping=1e-3))
        return account.tx

    def close(opt_state, params):
        account.close(opt_state, params)
        seen = observations(ippo.envs[0])
        policies.append(ippo.network.apply(params, seen, env_idx=0)[0])
        return si_jax.consolidate(opt_state, params)

    config = IPPOConfig(
        seq_length=2,
        num_envs=4,
        num_steps=100,
        steps_per_task=8000,
        update_epochs=4,
        num_minibatches=4,
        hidden_size=32,
        evaluation=False,
        record_video=False,
        use_wandb=False,
    )
    with contextlib.redirect_stdout(sys.stderr):
        ippo = WithMemory(config, around, close)
        ippo.run()
    first, second = policies
    return account, 0.0, first.kl_divergence(second).mean()


report("meal-bench", two_tasks)
