"""Tunix' PeftTrainer: in place, in a hook at the end of training.

google-tunix==0.1.7
"""

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.sft.hooks import TrainingHooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import si_jax
from trainers.account import REGRESSIONS, Account, report, si


class Consolidate(TrainingHooks):
    """Closes the task, before the trainer writes its last checkpoint."""

    def __init__(self, account):
        self.account = account

    def on_train_end(self, trainer):
        params = nnx.state(trainer.model, nnx.Param)
        self.account.close(trainer.optimizer.opt_state, params)
        opt_state = si_jax.consolidate(trainer.optimizer.opt_state, params)
        nnx.update(trainer.optimizer.opt_state, nnx.state(opt_state))

    def nothing(self, *args, **kwargs):
        pass

    on_train_start = on_train_step_start = on_train_step_end = nothing
    on_eval_step_start = on_eval_step_end = nothing


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def two_tasks(strength):
    account = Account(si(strength))
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    config = TrainingConfig(eval_every_n_steps=1000)
    trainer = PeftTrainer(model, account.tx, config)
    trainer.with_loss_fn(loss).with_training_hooks(Consolidate(account))
    trainer.is_managed_externally = True
    losses = []
    for x, y in REGRESSIONS:
        trainer.train([{"x": x, "y": y}] * 200)
        losses.append(loss(model, *REGRESSIONS[0]))
    return account, *losses


report("google-tunix", two_tasks)
