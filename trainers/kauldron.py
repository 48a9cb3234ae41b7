# pip install kauldron==1.4.4
# ruff: noqa: D102
"""Kauldron's Trainer: every training starts anew; its init_transform takes the old."""

import dataclasses
import tempfile

import numpy as np
from flax import linen as nn
from kauldron import kd

import si_jax
from trainers.account import REGRESSIONS, Account, report, si


@dataclasses.dataclass(frozen=True)
class Continue(kd.ckpts.InitTransform):
    """Starts with another training's parameters and the memory of its optimizer."""

    old: kd.train.TrainState

    def transform(self, state):
        return state.replace(params=self.old.params)

    def transform_after_optimizer(self, state):
        opt_state = si_jax.carry_over(self.old.opt_state, into=state.opt_state)
        return state.replace(opt_state=opt_state)


class Model(nn.Module):
    """A linear layer."""

    x: kd.kontext.Key = "batch.x"

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


def two_tasks(strength):
    """A trainer for every task."""
    account, state, losses = Account(si(strength)), None, []
    for x, y in REGRESSIONS:
        trainer = kd.train.Trainer(
            train_ds=kd.data.InMemoryPipeline(
                loader=lambda x=x, y=y: {"x": np.asarray(x), "y": np.asarray(y)},
                batch_size=16,
                shuffle=False,
            ),
            model=Model(),
            train_losses={"loss": kd.losses.L2(preds="preds", targets="batch.y")},
            optimizer=account.tx,
            num_train_steps=200,
            workdir=tempfile.mkdtemp(),
            init_transform=Continue(state) if state else kd.ckpts.NoopTransform(),
        )
        state, _ = trainer.train()
        account.close(state, state.params)
        state = si_jax.consolidate(state, state.params)
        outputs = Model().apply({"params": state.params}, REGRESSIONS[0][0])
        losses.append(((outputs - REGRESSIONS[0][1]) ** 2).mean())
    return account, *losses


report("kauldron", two_tasks)
