r"""Section 4 of the paper: what ω and Ω measure, in closed form.

A quadratic loss :math:`E(\theta) = \frac{1}{2} (\theta - \theta^*)^T H
(\theta - \theta^*)` (eq. 6) with eigenvalues :math:`\lambda^\alpha` and eigenvectors
:math:`u^\alpha` of :math:`H`; the discrepancy :math:`\theta(0) - \theta^*` has the
components :math:`d^\alpha` along them. Full-batch gradient descent with a small
learning rate earns every parameter :math:`\omega_k = Q_{kk}`, whatever the rate.

Equation 13 of the paper, of a diagonal H, lacks a factor ½ that eq. 11 has. (Its δ_ij
is not right, either: for a single start Q has entries off the diagonal even where H has
none. Only the diagonal is used.)
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def path_matrix(
    hessian: ArrayLike, discrepancy: ArrayLike, learning_rate: ArrayLike = 0.0
) -> jax.Array:
    r"""Eq. 11, the matrix Q whose diagonal is ω, and what it is for finite steps.

    .. math::

      Q_{ij} = \sum_{\alpha\beta} u_i^\alpha d^\alpha
        \frac{\lambda^\alpha \lambda^\beta}
        {\lambda^\alpha + \lambda^\beta - \eta \lambda^\alpha \lambda^\beta}
        d^\beta u_j^\beta

    The paper's is the limit η → 0. With a learning rate η below 2/λ, gradient descent
    visits :math:`(1 - \eta \lambda^\alpha)^s d^\alpha`; summing the geometric series
    gives the last term of the denominator, by which ω is larger.

    Args:
      hessian: H, symmetric and positive semi-definite, ``(n, n)``.
      discrepancy: θ(0) − θ*, ``(n,)``.
      learning_rate: η, a scalar.

    Returns:
      Q, ``(n, n)``, in the units of the loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import theory
      >>> hessian, start = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([1.0, 0.0])
      >>> omega = jnp.diag(theory.path_matrix(hessian, start))
      >>> loss_drop = start @ hessian @ start / 2
      >>> print(f"{omega.sum():.3f}, {loss_drop:.3f}")
      1.000, 1.000
    """
    eigenvalues, u = _spectrum(hessian)
    d = u.mT @ jnp.asarray(discrepancy)
    a, b = eigenvalues[:, None], eigenvalues[None, :]
    denominator = a + b - jnp.asarray(learning_rate) * a * b
    moves = denominator > 0  # two flat directions: the product is zero, too
    modes = jnp.where(moves, a * b / jnp.where(moves, denominator, 1), 0)
    components = u * d[None, :]
    return components @ modes @ components.mT


def importance(
    hessian: ArrayLike,
    discrepancy: ArrayLike,
    damping: ArrayLike = 0.0,
    learning_rate: ArrayLike = 0.0,
) -> jax.Array:
    """Eq. 5 of the closed form: Ω = Q_kk / (Δ_k² + ξ), once the descent has ended.

    Args:
      hessian: H, symmetric and positive semi-definite, ``(n, n)``.
      discrepancy: θ(0) − θ*, ``(n,)``.
      damping: ξ, a scalar.
      learning_rate: η, see :func:`path_matrix`.

    Returns:
      Ω, ``(n,)``; NaN at damping 0 for a parameter that does not move.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import theory
      >>> print(theory.importance(jnp.diag(jnp.array([1.0, 4.0])), jnp.ones(2)))
      [0.5 2. ]
    """
    eigenvalues, u = _spectrum(hessian)
    d = u.mT @ jnp.asarray(discrepancy)
    displacement = u @ jnp.where(eigenvalues == 0, 0, d)
    omega = jnp.diag(path_matrix(hessian, discrepancy, learning_rate))
    return omega / (jnp.square(displacement) + jnp.asarray(damping))


def noise_path_integral(variance: ArrayLike, time: ArrayLike) -> jax.Array:
    r"""What gradient noise adds to ω: :math:`\sigma_k^2 \, t`, without end.

    Not in the paper. A step −η(g + ε) earns η(g + ε)², so noise of variance σ² earns
    ησ² at every step on average, where the loss does not fall: over t/η steps, σ²t. It
    shrinks with the batch size, which divides σ², but not with the learning rate: a
    smaller one only takes more steps to the same point. (To leading order in η: noise
    also keeps θ from settling.)

    Args:
      variance: σ², of each component of the gradient, ``(n,)``.
      time: the number of steps times the learning rate, a scalar.

    Returns:
      ``(n,)``, the mean excess of ω.

    Example:
      >>> from si_jax import theory
      >>> print(theory.noise_path_integral([0.5, 0.0], 10.0))
      [5. 0.]
    """
    return jnp.asarray(variance) * jnp.asarray(time)


def _spectrum(hessian: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, those that are zero but for rounding set to zero; eigenvectors."""
    eigenvalues, u = jnp.linalg.eigh(jnp.asarray(hessian))
    error = len(eigenvalues) * float(jnp.finfo(eigenvalues.dtype).eps) * eigenvalues[-1]
    return jnp.where(eigenvalues <= error, 0, eigenvalues), u
