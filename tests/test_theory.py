"""Section 4 of the paper: what ω and Ω are on a quadratic, by the real transformation.

Eq. 13 of the paper lacks a factor ½: eq. 11 with a diagonal Hessian gives
Q_ii = ½ (d^i)² H_ii, as its own eq. 14 has it. So Ω → H/2 as ξ → 0, and with c = 1 the
surrogate c Σ Ω (θ̃ − θ)² equals the quadratic loss ½ Σ H (θ − θ*)².
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import FORMS

import si_jax


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def descend(form, hessian, start, step, *, time=60.0, damping=1e-12):
    """Full-batch gradient descent on ½ θᵀHθ; returns (ω, Ω, loss drop, state)."""
    tx = FORMS[form](optax.sgd(step), strength=1.0, damping=damping)

    def energy(theta):
        return 0.5 * theta @ hessian @ theta

    def body(carry, _):
        theta, opt_state = carry
        updates, opt_state = tx.update(jax.grad(energy)(theta), opt_state, theta)
        return (optax.apply_updates(theta, updates), opt_state), None

    carry = (start, tx.init(start))
    (theta, opt_state), _ = jax.lax.scan(body, carry, length=round(time / step))
    omega = si_jax.synapses(opt_state).path_integral
    opt_state = si_jax.consolidate(opt_state, theta)
    drop = energy(start) - energy(theta)
    return omega, si_jax.synapses(opt_state).importance, drop, opt_state


def random_hessian(seed, eigenvalues):
    """A random rotation of the given spectrum; returns (H, eigenvectors)."""
    key = jax.random.key(seed)
    shape = (len(eigenvalues), len(eigenvalues))
    u, _ = jnp.linalg.qr(jax.random.normal(key, shape, jnp.float64))
    return u @ jnp.diag(eigenvalues) @ u.T, u


def eq11(eigenvalues, u, d):
    """Q_ij = Σ_αβ u_i^α d^α λ^α λ^β / (λ^α + λ^β) d^β u_j^β."""
    a, b = eigenvalues[:, None], eigenvalues[None]
    v = u * d[None]
    return v @ (a * b / (a + b)) @ v.T


SPECTRUM = jnp.array([0.5, 1.0, 2.0, 5.0])
START = jnp.array([1.0, -0.5, 2.0, 0.3])


def test_closed_form_for_sgd():
    """Δθ = −ηg, so ω = η Σ g²."""
    hessian, _ = random_hessian(0, SPECTRUM.astype(jnp.float64))
    omega, *_ = descend("wrapper", hessian, START.astype(jnp.float64), 0.1, time=5.0)
    theta, expected = np.asarray(START, np.float64), 0.0
    for _ in range(50):
        gradient = np.asarray(hessian) @ theta
        expected = expected + 0.1 * gradient**2
        theta = theta - 0.1 * gradient
    np.testing.assert_allclose(omega, expected, rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_omega_sums_to_the_loss_drop_as_the_step_shrinks(form):
    hessian, _ = random_hessian(1, SPECTRUM.astype(jnp.float64))
    start = START.astype(jnp.float64)
    errors = []
    for step in (0.02, 0.01, 0.005):
        omega, _, drop, *_ = descend(form, hessian, start, step, time=20.0)
        errors.append(abs(float(omega.sum() / drop) - 1))
    assert errors[-1] < 0.02
    np.testing.assert_allclose(np.divide(errors[1:], errors[:-1]), 0.5, rtol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_omega_is_eq_11(form):
    eigenvalues, start = SPECTRUM.astype(jnp.float64), START.astype(jnp.float64)
    hessian, u = random_hessian(2, eigenvalues)
    expected = jnp.diag(eq11(eigenvalues, u, u.T @ start))
    errors = []
    for step in (0.02, 0.01, 0.005):
        omega, *_ = descend(form, hessian, start, step)
        errors.append(np.abs(np.asarray(omega / expected - 1)).max())
    assert errors[-1] < 0.02
    np.testing.assert_allclose(np.divide(errors[1:], errors[:-1]), 0.5, rtol=0.1)


def test_averaged_omega_is_eq_12():
    """Starts with ⟨d dᵀ⟩ = σ² I: ⟨ω⟩ = ½ σ² diag H."""
    hessian, u = random_hessian(3, SPECTRUM.astype(jnp.float64))
    sigma = 0.7
    starts = sigma * jnp.sqrt(4.0) * u.T  # one along each eigenvector
    omega = jax.vmap(lambda s: descend("wrapper", hessian, s, 1e-3)[0])(starts)
    expected = 0.5 * sigma**2 * jnp.diag(hessian)
    np.testing.assert_allclose(omega.mean(axis=0), expected, rtol=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_importance_of_a_diagonal_hessian_is_half_of_it(form):
    """Eq. 13 with the ½ it lacks, so that c = 1 makes the surrogate the loss."""
    eigenvalues, start = SPECTRUM.astype(jnp.float64), START.astype(jnp.float64)
    hessian = jnp.diag(eigenvalues)
    _, importance, _, opt_state = descend(form, hessian, start, 1e-3)
    np.testing.assert_allclose(importance, eigenvalues / 2, rtol=0.01)
    probe = jnp.array([0.3, 1.0, -2.0, 0.1])
    surrogate = si_jax.surrogate_loss(opt_state, probe)
    np.testing.assert_allclose(surrogate, 0.5 * probe @ hessian @ probe, rtol=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_omega_of_a_rank_one_hessian_is_eq_14(form):
    """ω = ½ d² diag H; and as Δ_i = −d u_i, Ω = λ/2 in every direction that moves."""
    eigenvalues = jnp.array([0.0, 0.0, 0.0, 3.0], jnp.float64)
    hessian, u = random_hessian(4, eigenvalues)
    start = START.astype(jnp.float64)
    omega, importance, *_ = descend(form, hessian, start, 1e-3)
    d = u[:, 3] @ start
    np.testing.assert_allclose(omega, 0.5 * d**2 * jnp.diag(hessian), rtol=0.01)
    np.testing.assert_allclose(importance, np.full(4, 1.5), rtol=0.01)
