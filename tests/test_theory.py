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
from si_jax import theory


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
    hessian, _ = random_hessian(2, eigenvalues)
    expected = jnp.diag(theory.path_matrix(hessian, start))
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
    expected = sigma**2 / 2 * jnp.diag(hessian)
    np.testing.assert_allclose(omega.mean(axis=0), expected, rtol=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_importance_of_a_diagonal_hessian_is_half_of_it(form):
    """Eq. 13 with the ½ it lacks, so that c = 1 makes the surrogate the loss."""
    eigenvalues, start = SPECTRUM.astype(jnp.float64), START.astype(jnp.float64)
    hessian = jnp.diag(eigenvalues)
    omega, importance, _, opt_state = descend(form, hessian, start, 1e-3)
    np.testing.assert_allclose(omega, eigenvalues * start**2 / 2, rtol=0.01)
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
    np.testing.assert_allclose(omega, d**2 / 2 * jnp.diag(hessian), rtol=0.01)
    np.testing.assert_allclose(importance, np.full(4, 1.5), rtol=0.01)


# --- The closed forms themselves ------------------------------------------------------

SPECTRA = {
    "diagonal": None,
    "full": [0.5, 1.0, 2.0, 5.0],
    "low rank": [0.0, 0.0, 2.0, 5.0],
    "ill-conditioned": [0.02, 0.1, 1.0, 10.0],
}


@pytest.fixture(params=SPECTRA)
def hessian(request):
    if request.param == "diagonal":
        return jnp.diag(SPECTRUM.astype(jnp.float64))
    return random_hessian(5, jnp.array(SPECTRA[request.param], jnp.float64))[0]


def flow(hessian, start, time):
    """Eq. 8, θ − θ* after a time of gradient descent in small steps."""
    return jax.scipy.linalg.expm(-hessian * time) @ start


def test_path_matrix_is_the_integral_of_eq_10(hessian):
    start = START.astype(jnp.float64)
    times = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-5, 2e3, 20_000)])

    def outer(time):
        velocity = -hessian @ flow(hessian, start, time)
        return velocity[:, None] * velocity[None]

    integral = np.trapezoid(jax.vmap(outer)(times), times, axis=0)
    expected = theory.path_matrix(hessian, start)
    np.testing.assert_allclose(integral, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [0.15, 0.01])
def test_path_matrix_is_exact_for_finite_steps(hessian, step):
    start = START.astype(jnp.float64)
    omega, importance, *_ = descend("wrapper", hessian, start, step, time=2000.0)
    expected = jnp.diag(theory.path_matrix(hessian, start, step))
    np.testing.assert_allclose(omega, expected, rtol=1e-7, atol=1e-10)
    moved = jnp.abs(importance) > 1e-6
    closed = theory.importance(hessian, start, learning_rate=step)
    np.testing.assert_allclose(importance[moved], closed[moved], rtol=1e-6)


def test_special_cases_are_eq_11():
    start = START.astype(jnp.float64)
    eigenvalues = SPECTRUM.astype(jnp.float64)
    q = theory.path_matrix(jnp.diag(eigenvalues), start)
    np.testing.assert_allclose(jnp.diag(q), eigenvalues * start**2 / 2)
    assert jnp.abs(q[0, 2]) > 0.5, (
        "off the diagonal, Q is not zero, whatever eq. 13 says"
    )
    rank_one, u = random_hessian(6, jnp.array([0.0, 0.0, 0.0, 2.0], jnp.float64))
    eq_14 = (u[:, 3] @ start) ** 2 / 2 * rank_one
    np.testing.assert_allclose(theory.path_matrix(rank_one, start), eq_14, atol=1e-9)


def test_rounding_does_not_turn_flat_directions_into_valleys():
    """A Hessian of rank one in float32: every Ω is λ/2."""
    with jax.enable_x64(False):
        keys = jax.random.split(jax.random.key(0))
        u = jax.random.normal(keys[0], (50,))
        u = u / jnp.linalg.norm(u)
        start = jax.random.normal(keys[1], (50,))
        importance = theory.importance(2 * u[:, None] * u[None, :], start)
    np.testing.assert_allclose(importance, 1, rtol=1e-2)


def test_trace_of_the_path_matrix_is_the_loss_drop(hessian):
    start = START.astype(jnp.float64)
    drop = start @ hessian @ start / 2
    np.testing.assert_allclose(jnp.trace(theory.path_matrix(hessian, start)), drop)


def test_noise_is_credited_without_end():
    """SGD at a minimum: the loss does not fall, ω rises by σ²t whatever the step."""
    sigma, time = jnp.array([0.5, 1.0, 0.0, 2.0], jnp.float64), 40.0
    for step in (0.02, 0.005):
        tx = FORMS["wrapper"](optax.sgd(step))

        def body(carry, key, tx=tx):
            theta, opt_state = carry
            gradient = 0.1 * theta + sigma * jax.random.normal(key, (4,), jnp.float64)
            updates, opt_state = tx.update(gradient, opt_state, theta)
            return (optax.apply_updates(theta, updates), opt_state), None

        start = jnp.zeros(4, jnp.float64)
        keys = jax.random.split(jax.random.key(0), round(time / step))
        (_, opt_state), _ = jax.lax.scan(body, (start, tx.init(start)), keys)
        omega = si_jax.synapses(opt_state).path_integral
        expected = theory.noise_path_integral(sigma**2, time)
        np.testing.assert_allclose(omega, expected, rtol=0.1)
