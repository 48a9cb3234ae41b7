"""Importances that are computed at a task's end.

In a pass of their own, from functions of one example: :func:`fisher` takes a
classifier's logits, :func:`empirical_fisher` any log-likelihood, :func:`sensitivity`
any outputs, without labels; :func:`kronecker` takes the logits and gives more than a
diagonal, for :mod:`si_jax.kronecker`. Each takes the derivative for every single
example, and means over the examples what it makes of it. Without a pass, and without
data, :func:`second_moment` takes what the optimizer has accumulated. :func:`save` and
:func:`load` make files of them.

The examples are a tree of arrays whose leading axis runs over them, the parameters a
tree of real arrays: ``params`` of Linen, ``nnx.split(model, nnx.Param, ...)``, or
``eqx.partition(model, eqx.is_inexact_array)``. All can be jitted; call them so when
they are called more than once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from si_jax.accumulators import second_moment
from si_jax.checks import zeros_wide
from si_jax.examples import check_leaf, number_of, spread
from si_jax.factors import kronecker
from si_jax.importance_file import load, save
from si_jax.pytrees import wide

__all__ = [
    "empirical_fisher",
    "fisher",
    "kronecker",
    "load",
    "save",
    "second_moment",
    "sensitivity",
]


def fisher(
    logits: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    inputs: Any,
    key: jax.Array | None = None,
    *,
    exact: bool = False,
    weights: ArrayLike | None = None,
    chunk_size: int = 16,
) -> optax.Params:
    r"""The diagonal of a classifier's Fisher information, which EWC takes.

    .. math::

      F_k = \frac{1}{n} \sum_i \left( \frac{\partial}{\partial \theta_k} \sum_t
        w_{it} \log p_t(y_{it} \mid x_i; \theta) \right)^2,
        \qquad y_{it} \sim p_t(\cdot \mid x_i; \theta)

    with one position t for an ordinary classifier, and several for one that labels the
    tokens of a sequence, say. Given the input, the positions' labels are independent,
    so that F is in expectation the sum of the positions' own:

    .. math::

      F_k = \frac{1}{n} \sum_i \sum_t w_{it}^2 \sum_y p_t(y \mid x_i; \theta)
        \left(\frac{\partial \log p_t(y \mid x_i; \theta)}{\partial \theta_k} \right)^2

    Of a network whose logits are piecewise linear in every single parameter, such as a
    ReLU net, this is the diagonal of the Hessian of the cross-entropy, whatever the
    true labels. (The square of a batch's mean gradient, often taken for it, is
    something else: near a minimum it vanishes, whatever the curvature.)

    F belongs to the negative log-likelihood of an example, summed over its positions;
    to a loss that is the mean over T of them belongs F / T. It is a second derivative:
    EWC of strength c = λ/2 takes F itself, while F/2 has the units of Ω, loss per
    squared parameter, with which c = 1 stands for the loss.

    Args:
      logits: ``(params, input) → logits (…, classes)`` of one example, leading axes
        over its positions; −∞ for classes that take no part.
      params: where to compute it.
      inputs: a tree of arrays ``(n, …)``.
      key: to sample a label for every position from the model.
      exact: given instead of ``key``, the second formula, at the price of a derivative
        for each label at each position, one after another.
      weights: w, ``(n, …)``; those of one example broadcast to its positions. They
        multiply the log-likelihood, and so enter F squared. 0 leaves a position out,
        such as padding, whatever its logits are; n still counts all examples.
      chunk_size: how many examples' derivatives to hold at once; memory for as many
        trees like ``params``, in float32.

    Returns:
      A tree like ``params``, float32 at least.

    Raises:
      ValueError: if not exactly one of ``key`` and ``exact`` is given, there are no
        inputs, leading axes differ, ``weights`` do not fit the positions, there are
        less than two classes, or parameters are not real floating-point arrays.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from si_jax import importance
      >>> two_classes = lambda w, x: jnp.stack([w * x, 0 * x])
      >>> inputs = jnp.full(32, 2.0)
      >>> w = jnp.array(0.0)
      >>> print(importance.fisher(two_classes, w, inputs, jax.random.key(0)))
      1.0
      >>> print(importance.fisher(two_classes, w, inputs, exact=True))  # x² p (1 − p)
      1.0

    References:
      Kirkpatrick et al., `Overcoming catastrophic forgetting in neural networks
      <https://arxiv.org/abs/1612.00796>`_, PNAS 2017; Kunstner et al., `Limitations of
      the empirical Fisher approximation <https://arxiv.org/abs/1905.12558>`_, NeurIPS
      2019
    """
    if (key is not None) + exact != 1:
        raise ValueError(
            "give either a key, to sample labels from the model, or exact=True. For "
            "given labels there is empirical_fisher."
        )
    n = number_of(inputs=inputs, weights=weights)
    w = jnp.ones(n) if weights is None else jnp.asarray(weights)
    keys = None if key is None else jax.random.split(key, n)

    def log_likelihoods(params, x, weight):
        """Of every label at every position, and the positions' weights."""
        out = wide(logits(params, x))
        weight = spread(weight, out.shape).astype(out.dtype)
        # What a position without weight holds, infinities or not, is of no account.
        out = jnp.where(weight[..., None] == 0, 0, out)
        return jax.nn.log_softmax(out), weight

    def sampled(params, example):
        x, weight, label_key = example

        def log_likelihood(params):
            log_p, weights = log_likelihoods(params, x, weight)
            labels = jax.random.categorical(label_key, log_p)
            of_labels = jnp.take_along_axis(log_p, labels[..., None], -1)
            return jnp.sum(weights * of_labels[..., 0])

        return _square(jax.grad(log_likelihood)(params))

    def expected(params, example):
        x, weight, _ = example
        log_p, pull_back, weights = jax.vjp(
            lambda p: log_likelihoods(p, x, weight), params, has_aux=True
        )
        share = jnp.exp(log_p) * jnp.square(weights)[..., None]

        def add(total, i):
            one = jnp.zeros(log_p.size, log_p.dtype).at[i].set(1)
            (gradient,) = pull_back(one.reshape(log_p.shape))

            def added(t, square):
                return t + share.ravel()[i].astype(t.dtype) * square

            return jax.tree.map(added, total, _square(gradient)), None

        return jax.lax.scan(add, zeros_wide(params), jnp.arange(log_p.size))[0]

    return _mean(
        expected if exact else sampled, params, (inputs, w, keys), n, chunk_size
    )


def empirical_fisher(
    log_likelihood: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    examples: Any,
    *,
    chunk_size: int = 16,
) -> optax.Params:
    r"""The mean squared gradient of single examples' log-likelihood: of any model.

    .. math::

      F_k = \frac{1}{n} \sum_i \left( \frac{\partial}{\partial \theta_k}
        \log p(x_i, y_i; \theta) \right)^2

    It goes by the name of empirical Fisher, but is not the Fisher information, whose
    labels come from the model: with the data's it shrinks as the model fits them, and
    is no curvature (see the reference). For classifiers there is :func:`fisher`; for
    regressions, contrastive and other losses this is what there is without more
    knowledge of them. To make it the Fisher information, draw the targets in
    ``examples`` from the model.

    Units as in :func:`fisher`: c = λ/2 of EWC takes F, and F/2 stands for Ω.

    Args:
      log_likelihood: ``(params, example) → scalar``, such as minus the loss of one
        example.
      params: where to compute it.
      examples: a tree of arrays ``(n, …)``, inputs and targets say.
      chunk_size: how many examples' gradients to hold at once, as in :func:`fisher`.

    Returns:
      A tree like ``params``, float32 at least.

    Raises:
      ValueError: if there are no examples, leading axes differ, ``log_likelihood`` is
        not a scalar, or parameters are not real floating-point arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import importance
      >>> gaussian = lambda w, example: -((example["y"] - w * example["x"]) ** 2) / 2
      >>> examples = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([3.0, 4.0])}
      >>> print(importance.empirical_fisher(gaussian, jnp.array(1.0), examples))
      10.0

    References:
      Kunstner et al., `Limitations of the empirical Fisher approximation
      <https://arxiv.org/abs/1905.12558>`_, NeurIPS 2019
    """
    n = number_of(examples=examples)

    def of_one(params, example):
        def checked(params):
            value = log_likelihood(params, example)
            if jnp.shape(value):
                raise ValueError(
                    "log_likelihood must be a scalar, of one example; it has shape "
                    f"{jnp.shape(value)}. Sum over what belongs to the example."
                )
            return value

        return _square(jax.grad(checked)(params))

    return _mean(of_one, params, examples, n, chunk_size)


def sensitivity(
    outputs: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    inputs: Any,
    *,
    chunk_size: int = 16,
) -> optax.Params:
    r"""Memory Aware Synapses (MAS): how much the outputs change with each parameter.

    .. math::

      M_k = \frac{1}{n} \sum_i \left| \frac{\partial \lVert f(x_i; \theta) \rVert^2}
        {\partial \theta_k} \right|

    It takes no labels, so that any inputs will do. Its units are outputs², not loss,
    per parameter: the strength that it needs has nothing to do with that of Ω or F. MAS
    adds λ M (θ̃ − θ)² to the loss, without a ½, so that its λ is c.

    Args:
      outputs: ``(params, input) → array`` of one example, of any shape.
      params: where to compute it.
      inputs: a tree of arrays ``(n, …)``.
      chunk_size: how many examples' gradients to hold at once, as in :func:`fisher`.

    Returns:
      A tree like ``params``, float32 at least.

    Raises:
      ValueError: if there are no inputs, leading axes differ, or parameters are not
        real floating-point arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import importance
      >>> inputs = jnp.array([1.0, -2.0])
      >>> print(importance.sensitivity(lambda w, x: w * x, jnp.array(3.0), inputs))
      15.0

    References:
      Aljundi et al., `Memory Aware Synapses: Learning what (not) to forget
      <https://arxiv.org/abs/1711.09601>`_, ECCV 2018
    """
    n = number_of(inputs=inputs)

    def of_one(params, x):
        def squared_norm(params):
            return jnp.sum(jnp.square(wide(outputs(params, x))))

        gradient = jax.grad(squared_norm)(params)
        return jax.tree.map(lambda g: jnp.abs(wide(g)), gradient)

    return _mean(of_one, params, inputs, n, chunk_size)


# --- What they share ------------------------------------------------------------------


def _mean(
    of_one: Callable[[optax.Params, Any], optax.Params],
    params: optax.Params,
    examples: Any,
    n: int,
    chunk_size: int,
) -> optax.Params:
    """The mean over the examples of trees like ``params``, chunk by chunk."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        check_leaf(f"params{jax.tree_util.keystr(path)}", leaf)

    whole = n - n % chunk_size

    # Compiled, so that the rest takes as little memory as a whole chunk.
    @jax.jit
    def mean(params, examples):
        def add(total, chunk):
            found = jax.vmap(of_one, (None, 0))(params, chunk)

            def added(t, x):
                # XLA:CPU takes 18 times as long over x.sum(0) of a large layer.
                ones = jnp.ones(len(x), x.dtype)
                return t + jnp.tensordot(ones, x, 1, precision="highest")

            return jax.tree.map(added, total, found), None

        total = zeros_wide(params)
        if whole:
            chunks = jax.tree.map(
                lambda x: x[:whole].reshape(-1, chunk_size, *x.shape[1:]), examples
            )
            total, _ = jax.lax.scan(add, total, chunks)
        if whole < n:
            total, _ = add(total, jax.tree.map(lambda x: x[whole:], examples))
        return jax.tree.map(lambda x: x / n, total)

    return mean(params, examples)


def _square(gradient: optax.Params) -> optax.Params:
    return jax.tree.map(lambda g: jnp.square(wide(g)), gradient)
