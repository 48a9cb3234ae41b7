# pip install google-tunix==0.1.7
# ruff: noqa: D102
"""Tunix' PeftTrainer: in place, in a hook at the end; a trainer for every task."""

import jax.numpy as jnp
from flax import nnx
from tunix.sft.hooks import TrainingHooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import si_jax
from trainers.account import REGRESSIONS, Account, report, si


class Consolidate(TrainingHooks):
    """Closes the task before the trainer writes its last checkpoint."""

    def __init__(self, account):
        self.account = account

    def on_train_end(self, trainer):
        opt_state, params = trainer.optimizer.opt_state, trained(trainer.model)
        self.account.close(opt_state, params)
        opt_state = si_jax.consolidate(opt_state, params)
        nnx.update(trainer.optimizer.opt_state, nnx.state(opt_state))

    def _nothing(self, *_, **__):
        pass

    on_train_start = on_train_step_start = on_train_step_end = _nothing
    on_eval_step_start = on_eval_step_end = _nothing


def trained(model):
    """What Tunix trains of a model: the adapters, if there are any."""
    adapters = nnx.state(model, nnx.LoRAParam)
    return adapters if nnx.to_flat_state(adapters) else nnx.state(model, nnx.Param)


def loss(model, x, y):
    """The mean squared error."""
    return jnp.mean((model(x) - y) ** 2)


def two_tasks(strength, model):
    """A new trainer starts with a fresh state, and is given the old one's memory."""
    account, old, losses = Account(si(strength)), None, []
    for x, y in REGRESSIONS:
        config = TrainingConfig(eval_every_n_steps=1000)
        trainer = PeftTrainer(model, account.tx, config).with_loss_fn(loss)
        trainer.with_training_hooks(Consolidate(account))
        fresh = trainer.optimizer.opt_state
        if old is not None:
            nnx.update(fresh, nnx.state(si_jax.carry_over(old, into=fresh)))
        trainer.train([{"x": x, "y": y}] * 200)
        old = trainer.optimizer.opt_state
        losses.append(loss(model, *REGRESSIONS[0]))
    return account, *losses


def linear():
    """A linear layer."""
    return nnx.Linear(3, 1, rngs=nnx.Rngs(0))


def lora():
    """A linear layer with adapters."""
    return nnx.LoRALinear(3, 1, lora_rank=2, rngs=nnx.Rngs(0))


report("google-tunix", lambda c: two_tasks(c, linear()))
report("google-tunix", lambda c: two_tasks(c, lora()), part="LoRA")
