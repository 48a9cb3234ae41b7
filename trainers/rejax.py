# pip install rejax==0.1.3
# ruff: noqa: ARG002, D102
"""Rejax' PPO: replace the optimizer in its train state, which it takes and returns."""

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from gymnax.environments import environment, spaces
from rejax import PPO

import si_jax
from trainers.account import Account, report, si


class Choice(environment.Environment):
    """One step: the observation is the task's, and so is the action that pays."""

    def __init__(self, seen, pays):
        self.seen, self.pays = jnp.array(seen), pays

    def reset_env(self, key, params):
        return self.seen, environment.EnvState(time=0)

    def step_env(self, key, state, action, params):
        reward = jnp.where(action == self.pays, 1.0, 0.0)
        return *self.reset_env(key, params), reward, jnp.array(True), {}

    def action_space(self, params=None):
        return spaces.Discrete(2)

    def observation_space(self, params=None):
        return spaces.Box(0, 1, (2,))


TASKS = [Choice([1.0, 0.0], 0), Choice([1.0, 0.3], 1)]


def two_tasks(strength):
    """SI in the actor; the critic may have one of its own."""
    account, actor, losses = Account(si(strength, 0.003)), None, []
    for env in TASKS:
        ppo = PPO.create(
            env=env,
            agent_kwargs={"hidden_layer_sizes": (16,)},
            num_envs=8,
            num_steps=8,
            num_minibatches=2,
            num_epochs=2,
            total_timesteps=6400,
            eval_freq=6400,
            skip_initial_evaluation=True,
        )
        state = ppo.init_state(jax.random.key(0))
        actor = actor or TrainState.create(
            apply_fn=(), params=state.actor_ts.params, tx=account.tx
        )
        state, _ = jax.jit(ppo.train)(train_state=state.replace(actor_ts=actor))
        actor = state.actor_ts
        account.close(actor, actor.params)
        actor = si_jax.consolidate(actor, actor.params)
        log_prob, _ = ppo.actor.apply(
            actor.params, TASKS[0].seen[None], jnp.array([0]), method="log_prob_entropy"
        )
        losses.append(-log_prob[0])
    return account, *losses


report("rejax", two_tasks)
