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

import si_jax
from si_jax import ewc
from si_jax.importance import (
    empirical_fisher,
    fisher,
    second_moment,
    sensitivity,
)

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


# --- What the optimizer has kept ------------------------------------------------------

STREAM = RNG.normal(size=(40, 3)).astype(np.float32)
ZEROS = jnp.zeros(3)
COUNTED = {"decay": 0.95, "bias_correction": True}
KEEPERS = {
    "adam": optax.adam(0.1, b2=0.95),
    "adamw": optax.adamw(0.1, b2=0.95),
    "nadam": optax.nadam(0.1, b2=0.95),
    "radam": optax.radam(0.1, b2=0.95),
    "lamb": optax.lamb(0.1, b2=0.95),
    "amsgrad": optax.amsgrad(0.1, b2=0.95),
    "rmsprop": optax.rmsprop(0.1, **COUNTED),
    "centred rmsprop": optax.rmsprop(0.1, centered=True, **COUNTED),
    "clipped first, then in a chain": optax.chain(
        optax.clip_by_global_norm(1e9), optax.adam(0.1, b2=0.95)
    ),
    "named": optax.named_chain(("adam", optax.adam(0.1, b2=0.95))),
    "injected": optax.inject_hyperparams(optax.adam)(0.1, b2=0.95),
    "inside SI": si_jax.with_synaptic_intelligence(optax.adam(0.1, b2=0.95), 0.0),
    "persistent": si_jax.persistent(optax.adam(0.1, b2=0.95)),
}


def stepped(tx, stream=STREAM, params=ZEROS):
    opt_state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(tx.update)
        for grads in stream:
            _, opt_state = update(jnp.asarray(grads), opt_state, params)
    return opt_state


def averaged(stream=STREAM, b2=0.95):
    """Σ (1 − b₂) b₂^(t − i) g_i² over the sum of the weights, in float64."""
    weights = b2 ** np.arange(len(stream))[::-1]
    return np.tensordot(weights / weights.sum(), np.float64(stream) ** 2, 1)


@pytest.mark.parametrize("name", KEEPERS)
def test_second_moment_is_the_weighted_mean_of_squared_gradients(name):
    opt_state = stepped(KEEPERS[name])
    for compute in (lambda f: f, jax.jit):
        found = compute(lambda s: second_moment(s, b2=0.95, batch_size=8))(opt_state)
        np.testing.assert_allclose(found, 8 * averaged(), rtol=1e-5)


def test_second_moment_without_a_count_is_taken_as_it_is():
    opt_state = stepped(optax.rmsprop(0.1, decay=0.95))
    found = second_moment(opt_state, b2=0.95, batch_size=8)
    expected = 8 * averaged() * (1 - 0.95 ** len(STREAM))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_second_moment_of_accumulated_gradients_is_of_their_mean():
    opt_state = stepped(optax.MultiSteps(optax.adam(0.1, b2=0.95), 4))
    means = STREAM.reshape(-1, 4, 3).mean(1)
    found = second_moment(opt_state, b2=0.95, batch_size=4 * 8)
    np.testing.assert_allclose(found, 32 * averaged(means), rtol=1e-5)


def test_power_one_half_is_the_root():
    found = second_moment(
        stepped(KEEPERS["adam"]), b2=0.95, batch_size=8, power=jnp.float32(0.5)
    )
    np.testing.assert_allclose(found, np.sqrt(8 * averaged()), rtol=1e-5)


def test_second_moment_at_the_optimum_is_the_fisher_information():
    """Of a softmax that draws its own labels, within four errors of the average."""
    batch_size, steps, b2 = 16, 8000, 0.999
    tx = optax.adam(0.0, b2=b2)

    def mean_loss(kernel, x, labels):
        return optax.softmax_cross_entropy_with_integer_labels(
            linear(kernel, x), labels
        ).mean()

    def step(opt_state, key):
        keys = jax.random.split(key)
        x = jax.random.choice(keys[0], INPUTS, (batch_size,))
        labels = jax.random.categorical(keys[1], linear(KERNEL, x))
        grads = jax.grad(mean_loss)(jnp.asarray(KERNEL), x, labels)
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(grads, opt_state)[1], None

    keys = jax.random.split(KEY, steps)
    opt_state, _ = jax.jit(lambda k: jax.lax.scan(step, tx.init(KERNEL), k))(keys)
    found = second_moment(opt_state, b2=b2, batch_size=batch_size)
    expected = fisher(linear, KERNEL, INPUTS, exact=True)
    # Of a square the error is √2 (a little more: kurtosis), of 2000 independent ones.
    error = np.sqrt(3 * (1 - b2) / (1 + b2))
    np.testing.assert_array_less(np.abs(found / expected - 1), 4 * error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_moment_serves_ewc_and_si(dtype):
    """Also where the optimizer's state is boxed and its leaves are masked."""
    params = {"a": jnp.zeros(3, dtype), "frozen": jnp.zeros(2, dtype)}
    held = {"a": True, "frozen": False}
    inner = optax.chain(ewc.elastic_weight_consolidation(1.0), optax.adam(0.1, b2=0.9))
    tx = optax.masked(inner, held)
    stream = [{"a": g.astype(dtype), "frozen": jnp.ones(2, dtype)} for g in STREAM]
    opt_state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for grads in stream:
            _, opt_state = jax.jit(tx.update)(grads, opt_state, params)
    F = second_moment(opt_state, b2=0.9, batch_size=8)
    assert F["frozen"] == optax.MaskedNode()
    if dtype == "float32":
        np.testing.assert_allclose(F["a"], 8 * averaged(b2=0.9), rtol=1e-5)
    opt_state = ewc.consolidate(opt_state, params, F)
    away = jax.tree.map(lambda p: p + 1, params)
    penalty = si_jax.surrogate_loss(opt_state, away)
    np.testing.assert_allclose(penalty, F["a"].sum(), rtol=1e-6)

    tx = optax.masked(si_jax.with_synaptic_intelligence(optax.sgd(0.1), 1.0), held)
    opt_state = si_jax.add_importance(tx.init(params), F)
    assert si_jax.synapses(opt_state).importance["a"].tolist() == F["a"].tolist()


def test_second_moment_of_an_nnx_optimizer():
    model = nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0))
    tx = si_jax.with_synaptic_intelligence(optax.adam(0.1), 1.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    squares = np.square(grads["kernel"][...])
    with jax.numpy_dtype_promotion("standard"):
        optimizer.update(model, grads)
    F = second_moment(optimizer.opt_state, b2=0.999, batch_size=2)
    opt_state = si_jax.add_importance(optimizer.opt_state, F)
    report = si_jax.diagnose(opt_state, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(report.importance["kernel"], 2 * squares.sum(), 1e-5)


@pytest.mark.parametrize(
    ("tx", "kwargs", "message"),
    [
        (optax.sgd(0.1, momentum=0.9), {}, "no average of squared gradients"),
        (optax.lion(0.1), {}, "no average of squared gradients"),
        (optax.adagrad(0.1), {}, "adagrad's is a sum"),
        (
            optax.partition(
                {0: optax.adam(0.1), 1: optax.adam(0.2)}, lambda p: [0, 1][: len(p)]
            ),
            {},
            "holds 2 averages .* pass the part",
        ),
        (optax.adam(0.1), {"b2": 1.0}, r"b2 must be in \(0, 1\), got 1.0"),
        (optax.adam(0.1), {"b2": 0.0}, r"b2 must be in"),
        (optax.adam(0.1), {"batch_size": 0}, r"batch_size must be in \[1, inf\)"),
        (optax.adam(0.1), {"power": 0}, r"power must be in \(0, inf\)"),
        (optax.adam(0.1), {"b2": optax.constant_schedule(0.9)}, "b2 must be a number"),
    ],
)
def test_what_has_no_second_moment_is_refused(tx, kwargs, message):
    params = [jnp.zeros(3), jnp.zeros(2)]
    opt_state = stepped(tx, [], params)
    with pytest.raises(ValueError, match=message):
        second_moment(opt_state, **{"b2": 0.95, "batch_size": 8, **kwargs})


def test_second_moment_wants_a_step_and_a_wide_average():
    for tx in (optax.adam(0.1), optax.rmsprop(0.1)):
        with pytest.raises(ValueError, match="no step yet"):
            second_moment(tx.init(ZEROS), b2=0.999, batch_size=8)
    half = jnp.ones(3, jnp.bfloat16)
    narrow = optax.ScaleByAdamState(jnp.array(1), mu=half, nu=half)
    assert second_moment(narrow, b2=0.9, batch_size=8).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"is bfloat16, .* b2 = 0.999 stalls"):
        second_moment(narrow, b2=0.999, batch_size=8)
