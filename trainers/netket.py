# pip install netket==3.23.0
"""NetKet's VMC: its state may be assigned; with SR, SI belongs before the metric."""

import jax
import jax.numpy as jnp
import netket as nk
import optax

import si_jax
from trainers.account import Account, report, si

HILBERT = nk.hilbert.Spin(0.5, 4)
CHAIN = nk.graph.Chain(4)
TASKS = [nk.operator.Ising(HILBERT, CHAIN, h=0.5, J=J) for J in (1.0, -1.0)]


def start(dtype):
    """Without sampling, to be exact."""
    model = nk.models.RBM(param_dtype=dtype)
    return nk.vqs.FullSumState(HILBERT, model, seed=0)


def vmc(strength, dtype):
    """One driver for every Hamiltonian; the new one gets the old one's state."""
    account, psi, opt_state, losses = Account(si(strength)), start(dtype), None, []
    tx = account.tx
    if dtype is complex:
        tx = optax.contrib.split_real_and_imaginary(tx)
    for hamiltonian in TASKS:
        driver = nk.driver.VMC(hamiltonian, tx, variational_state=psi)
        if opt_state is not None:
            driver._optimizer_state = opt_state
        driver.run(150, out=nk.logging.RuntimeLog(), show_progress=False)
        account.close(driver._optimizer_state, psi.parameters)
        opt_state = si_jax.consolidate(driver._optimizer_state, psi.parameters)
        losses.append(psi.expect(TASKS[0]).mean.real)
    return account, *losses


def natural(strength):
    """The optimizer is passed the natural gradient: the link takes the one before."""
    account = Account(si_jax.synaptic_intelligence(strength, damping=1e-3))
    psi, sr, losses = start(float), nk.optimizer.SR(diag_shift=0.01), []
    link = account.tx.init(psi.parameters)

    def preconditioner(psi, grads, step):
        nonlocal link
        grads, link = account.tx.update(grads, link, psi.parameters)
        return sr(psi, grads, step)

    for hamiltonian in TASKS:
        driver = nk.driver.VMC(
            hamiltonian,
            optax.sgd(0.05),
            variational_state=psi,
            preconditioner=preconditioner,
        )
        driver.run(150, out=nk.logging.RuntimeLog(), show_progress=False)
        zeros = jax.tree.map(jnp.zeros_like, psi.parameters)
        # The link sees what a step moved at the next call.
        _, closed = account.inner.update(zeros, link.inner, psi.parameters)
        account.close(closed, psi.parameters)
        link = si_jax.consolidate(link, psi.parameters)
        losses.append(psi.expect(TASKS[0]).mean.real)
    return account, *losses


report("netket", lambda c: vmc(c, float), part="VMC", strength=10.0)
report("netket", lambda c: vmc(c, complex), part="VMC, complex", strength=10.0)
report("netket", natural, part="VMC with SR", strength=10.0)
