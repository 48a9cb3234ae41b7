"""Importances from a pass of their own, against closed forms and finite differences."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from si_jax.importance import empirical_fisher, fisher, sensitivity

RNG = np.random.default_rng(0)
N, TOKENS = 48, 5  # three chunks
INPUTS = RNG.normal(size=(N, 4)).astype(np.float32)
KERNEL = RNG.normal(size=(4, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, N)
PROBABILITIES = np.asarray(jax.nn.softmax(INPUTS @ KERNEL))
NOISE = RNG.normal(size=(N, TOKENS, 4))
SEQUENCES = (INPUTS[:, None] + NOISE / 2).astype(np.float32)
WEIGHTS = RNG.choice([0, 0.5, 1, 2], size=(N, TOKENS)).astype(np.float32)
KEY = jax.random.key(0)


def linear(kernel, x):
    """Logits of an input (features,), or of each token of a sequence."""
    return x @ kernel


def log_likelihood(kernel, example):
    x, label = example
    return jax.nn.log_softmax(linear(kernel, x))[label]


def compiled(importance, function, params, data, *args, **kwargs):
    return jax.jit(lambda p, d: importance(function, p, d, *args, **kwargs))(
        params, data
    )


def closed_form(x, weights):
    """Σ w² x_j² E[(1[y = k] − p_k)²] = Σ w² x_j² p_k (1 − p_k), and a sample's spread.

    The squared residual is (1 − p)² with probability p, else p².
    """
    p = np.asarray(jax.nn.softmax(x @ KERNEL))
    variance = p * (1 - p)
    mean = np.einsum("n,nj,nk->jk", weights**2, x**2, variance)
    return mean, np.einsum("n,nj,nk->jk", weights**4, x**4, variance * (1 - 2 * p) ** 2)


# --- The Fisher information -----------------------------------------------------------


def test_fisher_of_a_linear_softmax():
    times = 400
    many = np.tile(INPUTS, (times, 1))
    actual = compiled(fisher, linear, KERNEL, many, KEY, chunk_size=1000)
    expected, spread = closed_form(INPUTS, np.ones(N))
    error = np.sqrt(spread / times) / N
    np.testing.assert_array_less(np.abs(actual - expected / N), 4.5 * error)


def test_exact_fisher_of_a_linear_softmax():
    expected, _ = closed_form(INPUTS, np.ones(N))
    actual = fisher(linear, KERNEL, INPUTS, exact=True)
    np.testing.assert_allclose(actual, expected / N, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_exact_fisher_of_a_sequence_is_the_sum_of_its_tokens(weights):
    """Tokens are independent linear softmaxes; weights enter squared."""
    actual = compiled(fisher, linear, KERNEL, SEQUENCES, exact=True, weights=weights)
    w = np.ones(N * TOKENS) if weights is None else weights.ravel()
    expected, _ = closed_form(SEQUENCES.reshape(-1, 4), w)
    np.testing.assert_allclose(actual, expected / N, rtol=1e-5)


def test_sampled_fisher_of_a_sequence_has_the_exact_one_as_its_mean():
    """Within four errors of the mean of 200 samples, by the spread between them.

    Were the tokens' labels not independent, the gradients of tokens that are alike
    would add up to more.
    """
    keys = jax.random.split(KEY, 200)

    @jax.jit
    def sample(key):
        return fisher(linear, KERNEL, SEQUENCES, key, weights=WEIGHTS, chunk_size=N)

    samples = np.asarray(jax.lax.map(sample, keys))
    expected, _ = closed_form(SEQUENCES.reshape(-1, 4), WEIGHTS.ravel())
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    np.testing.assert_array_less(np.abs(samples.mean(0) - expected / N), 4 * error)
    wrong, _ = closed_form(SEQUENCES.reshape(-1, 4), np.sqrt(WEIGHTS.ravel()))
    assert (np.abs(samples.mean(0) - wrong / N) > 4 * error).all(), "a sharp test"


@pytest.mark.parametrize("how", [{"key": KEY}, {"exact": True}])
def test_padding_without_weight_changes_nothing(how):
    nothing = jnp.array([0] * TOKENS + [7, -jnp.inf, jnp.nan])

    def logits(kernel, example):
        there, x = example["there"], example["x"]
        return jnp.where(there[:, None], x @ kernel, nothing[: len(x), None])

    def of(tokens):
        there = np.tile(np.arange(tokens) < TOKENS, (N, 1))
        padding = ((0, 0), (0, tokens - TOKENS), (0, 0))
        inputs = {"x": np.pad(SEQUENCES, padding), "there": there}
        return compiled(fisher, logits, KERNEL, inputs, **how, weights=there)

    np.testing.assert_allclose(of(TOKENS + 3), of(TOKENS), rtol=1e-6)


def test_weights_of_whole_examples():
    """One weight an example; n counts those without, too."""
    weights = np.arange(N) % 2
    actual = compiled(fisher, linear, KERNEL, INPUTS, exact=True, weights=weights)
    expected, _ = closed_form(INPUTS, weights)
    np.testing.assert_allclose(actual, expected / N, rtol=1e-5)
    column = {"exact": True, "weights": weights[:, None]}  # of all tokens
    actual = compiled(fisher, linear, KERNEL, SEQUENCES, **column)
    expected, _ = closed_form(SEQUENCES.reshape(-1, 4), np.repeat(weights, TOKENS))
    np.testing.assert_allclose(actual, expected / N, rtol=1e-5)


def test_exact_fisher_of_a_relu_net_is_the_diagonal_of_its_hessian():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(4, 6), (6, 5), (5, 3)]
    kernels = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]

    def logits(kernels, x):
        for kernel in kernels[:-1]:
            x = jax.nn.relu(x @ kernel)
        return x @ kernels[-1]

    def loss(kernels):
        out = jax.vmap(logits, (None, 0))(kernels, INPUTS)
        return optax.softmax_cross_entropy_with_integer_labels(out, LABELS).mean()

    flat, unravel = jax.flatten_util.ravel_pytree(kernels)
    hessian = jax.jit(jax.hessian(lambda flat: loss(unravel(flat))))(flat)
    found = compiled(fisher, logits, kernels, INPUTS, exact=True)
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(found)[0],
        jnp.diag(hessian),
        rtol=1e-3,
        atol=1e-5,
    )


def test_classes_that_take_no_part_have_no_fisher_information():
    def masked(kernel, x):
        return jnp.where(jnp.array([True, False, True]), x @ kernel, -jnp.inf)

    for how in ({"key": KEY}, {"exact": True}):
        found = compiled(fisher, masked, KERNEL, INPUTS, **how)
        assert np.isfinite(found).all()
        assert not found[:, 1].any()
        assert (found[:, ::2] > 0).all()


# --- Of given labels, and of any log-likelihood ---------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 7, 24, 48, 64])
def test_empirical_fisher_of_a_linear_softmax(chunk_size):
    """∂ log p(y | x) / ∂ W_jk = x_j (1[y = k] − p_k)."""
    residual = np.eye(3)[LABELS] - PROBABILITIES
    expected = np.einsum("nj,nk->jk", INPUTS**2, residual**2) / N
    examples = (INPUTS, LABELS)
    actual = compiled(
        empirical_fisher, log_likelihood, KERNEL, examples, chunk_size=chunk_size
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_empirical_fisher_does_not_vanish_with_the_mean_gradient():
    """The squared gradient of a batch does: what others call Fisher."""
    examples = np.ones((2, 1), np.float32), np.array([0, 1])
    kernel = jnp.zeros((1, 2))

    def loss(kernel):
        return -jax.vmap(log_likelihood, (None, 0))(kernel, examples).mean()

    assert not jnp.square(jax.grad(loss)(kernel)).any()
    np.testing.assert_allclose(empirical_fisher(log_likelihood, kernel, examples), 0.25)


def test_empirical_fisher_of_a_gaussian_regression():
    """∂ log p / ∂ w = (y − w·x) x / σ², ∂ log p / ∂ log σ = ((y − w·x) / σ)² − 1."""
    params = {"w": KERNEL[:, 0], "log_sigma": jnp.array(0.3)}
    y = RNG.normal(size=N).astype(np.float32)

    def gaussian(params, example):
        z = (example["y"] - example["x"] @ params["w"]) / jnp.exp(params["log_sigma"])
        return -jnp.square(z) / 2 - params["log_sigma"]

    examples = {"x": INPUTS, "y": y}
    actual = compiled(empirical_fisher, gaussian, params, examples)
    sigma = np.exp(0.3)
    z = (y - INPUTS @ params["w"]) / sigma
    np.testing.assert_allclose(
        actual["w"], np.mean((z[:, None] * INPUTS / sigma) ** 2, 0), rtol=1e-5
    )
    np.testing.assert_allclose(actual["log_sigma"], np.mean((z**2 - 1) ** 2), rtol=1e-5)


def test_empirical_fisher_of_sampled_targets_is_the_fisher_information():
    many = np.tile(INPUTS, (200, 1))
    labels = jax.random.categorical(KEY, many @ KERNEL)
    actual = compiled(
        empirical_fisher, log_likelihood, KERNEL, (many, labels), chunk_size=1000
    )
    expected, spread = closed_form(INPUTS, np.ones(N))
    error = np.sqrt(spread / 200) / N
    np.testing.assert_array_less(np.abs(actual - expected / N), 4.5 * error)


# --- Sensitivity ----------------------------------------------------------------------


def test_sensitivity_against_finite_differences():
    with jax.enable_x64(True):
        params = {
            "w": jnp.asarray(RNG.normal(size=(4, 3))),
            "b": jnp.asarray(RNG.normal(size=3)),
        }
        inputs = jnp.asarray(RNG.normal(size=(6, 4)))

        def outputs(params, x):  # of any shape
            out = jnp.tanh(x @ params["w"] + params["b"])
            return jnp.stack([out, jnp.square(out)])

        norms = jax.jit(
            lambda p: jnp.square(jax.vmap(outputs, (None, 0))(p, inputs)).sum((1, 2))
        )
        actual = compiled(sensitivity, outputs, params, inputs, chunk_size=4)
        assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype(jnp.float64)}
        step = 1e-5
        for name, leaf in params.items():
            for index in np.ndindex(leaf.shape):
                up, down = (
                    norms(params | {name: leaf.at[index].add(by)})
                    for by in (step, -step)
                )
                slopes = (up - down) / (2 * step)
                np.testing.assert_allclose(
                    actual[name][index], jnp.abs(slopes).mean(), rtol=1e-8
                )


def test_sensitivity_does_not_let_inputs_cancel():
    """The slope of (w + x)² is 2 (w + x)."""
    inputs = jnp.array([[1.0, 2.0], [-1.0, 3.0]])
    actual = sensitivity(lambda w, x: w + x, jnp.array([0.0, -2.0]), inputs)
    assert actual.tolist() == [2.0, 1.0]


# --- All of them ----------------------------------------------------------------------

ALL = {
    "fisher, sampled": lambda f, p, x, **kw: fisher(f, p, x, KEY, **kw),
    "fisher, exact": lambda f, p, x, **kw: fisher(f, p, x, exact=True, **kw),
    "empirical_fisher": lambda f, p, x, **kw: empirical_fisher(
        lambda p, e: jax.nn.log_softmax(f(p, e))[0], p, x, **kw
    ),
    "sensitivity": sensitivity,
}


@pytest.fixture(params=ALL)
def importance(request):
    return ALL[request.param]


def test_chunks_change_nothing(importance):
    at_once, in_chunks = (
        compiled(importance, linear, KERNEL, INPUTS, chunk_size=size) for size in (N, 7)
    )
    np.testing.assert_allclose(in_chunks, at_once, rtol=1e-5)


def test_it_is_traced_once_and_wide_for_narrow_parameters(importance):
    traces = []

    def narrow(kernel, x):
        traces.append(x)
        return x.astype(kernel.dtype) @ kernel

    compute = jax.jit(lambda w, x: importance(narrow, w, x, chunk_size=24))
    kernel = jnp.asarray(KERNEL, jnp.bfloat16)
    found = compute(kernel, INPUTS)
    assert found.dtype == jnp.float32
    once = len(traces)
    assert not np.array_equal(compute(2 * kernel, INPUTS[::-1]), found)
    assert len(traces) == once


def linen():
    model = nn.Dense(3)
    params = model.init(KEY, INPUTS[0])
    return params, model.apply


def nnx_model():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda p, x: nnx.merge(graphdef, p, rest)(x)


def equinox():
    model = eqx.nn.MLP(4, 3, 5, 1, key=KEY)  # holds its activation, a function
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda p, x: eqx.combine(p, static)(x)


@pytest.mark.parametrize("make", [linen, nnx_model, equinox])
def test_the_parameters_of_any_library(make):
    params, function = make()
    found = compiled(fisher, function, params, INPUTS, exact=True)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for leaf, param in zip(*map(jax.tree.leaves, (found, params)), strict=True):
        assert leaf.shape == param.shape
        assert (leaf >= 0).all()
        assert leaf.any()


# --- Mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (INPUTS[:0], "there are no examples in"),
        ((), "there are no examples in"),
        ({"x": INPUTS, "y": INPUTS[:7]}, r"\['x'\] has 48 of them and .*\['y'\] 7"),
        ({"x": INPUTS, "y": np.float32(1)}, r"\['y'\] has no leading axis"),
    ],
)
def test_examples_that_do_not_fit_are_explained(importance, inputs, message):
    with pytest.raises(ValueError, match=message):
        importance(linear, KERNEL, inputs)


@pytest.mark.parametrize(
    ("leaf", "is_what"),
    [
        (jnp.zeros(3, int), "int32"),
        (jnp.zeros(3, jnp.complex64), "complex64"),
        (jnp.tanh, "function|ufunc"),
        (KEY, r"key<fry>"),
    ],
)
def test_parameters_that_are_none_are_explained(importance, leaf, is_what):
    with pytest.raises(ValueError, match=rf"params\['b'\] is .*({is_what})"):
        importance(lambda p, x: x @ p["w"], {"w": KERNEL, "b": leaf}, INPUTS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fisher(linear, KERNEL, INPUTS), "either a key"),
        (lambda: fisher(linear, KERNEL, INPUTS, KEY, exact=True), "either a key"),
        (
            lambda: fisher(linear, KERNEL, INPUTS, KEY, weights=np.ones(7)),
            "inputs has 48 of them and weights 7",
        ),
        (
            lambda: fisher(linear, KERNEL, INPUTS, KEY, weights=np.ones((N, 3))),
            r"weights of an example, of shape \(3,\), .* its positions, \(\)",
        ),
        (
            lambda: fisher(lambda w, x: (x @ w)[:1], KERNEL, INPUTS, KEY),
            r"logits must be \(…, classes\) .* got shape \(1,\)",
        ),
        (
            lambda: fisher(lambda w, x: (x @ w)[0], KERNEL, INPUTS, KEY),
            r"logits must be \(…, classes\) .* got shape \(\)",
        ),
        (
            lambda: empirical_fisher(linear, KERNEL, INPUTS),
            r"log_likelihood must be a scalar.* it has shape \(3,\)",
        ),
        (
            lambda: sensitivity(linear, KERNEL, INPUTS, chunk_size=0),
            "chunk_size must be at least 1, got 0",
        ),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
