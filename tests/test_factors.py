"""Kronecker factors, against the outer products of single examples' gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from si_jax import importance
from si_jax.kronecker import Factors

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape) / 2


def full_fisher(logits, params, xs):
    """The whole Fisher matrix, from the Jacobian of the logits and softmax's own."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def of_one(x):
        out = logits(params, x).reshape(-1)
        j = jax.jacobian(lambda f: logits(unravel(f), x).reshape(-1))(flat)
        p = jax.nn.softmax(out)
        return j.T @ (jnp.diag(p) - jnp.outer(p, p)) @ j

    return np.asarray(jax.lax.map(of_one, xs)).mean(0)


def block(layer, kernel, bias=None):
    """A ⊗ G for the kernel's entries in their order, then the bias's."""
    half = np.ndim(kernel)
    sizes = [int(np.prod(x.shape[:half])) for x in (layer.inputs, layer.outputs)]
    a, g = (np.asarray(x).reshape(n, n) for x, n in zip(layer[:2], sizes, strict=True))
    if bias is not None:
        (mean,) = layer.bias.values()
        a = np.block([[a, np.c_[np.ravel(mean)]], [np.ravel(mean), layer.tasks]])
    return np.kron(a, g)


def layers_match(logits, params, xs, expected):
    """Names of kernels and their biases, and what is left to the diagonal."""
    factors = importance.kronecker(logits, params, xs, KEY)
    found = {name: list(layer.bias) for name, layer in factors.layers.items()}
    assert found == expected[0]
    assert sorted(factors.diagonal) == sorted(expected[1])
    return factors


# --- Against the full matrix ----------------------------------------------------------


def test_one_layer_is_exact_where_the_labels_slope_is_that_of_every_input():
    """At W = 0 all examples have the same G: the block is the Hessian itself."""
    params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}
    xs = normal(1, 11, 3)

    def logits(p, x):
        return x @ p["w"] + p["b"]

    factors = importance.kronecker(logits, params, xs, exact=True)
    actual = block(factors.layers["['w']"], params["w"], params["b"])

    def loss(flat):
        w = flat.reshape(4, 4)
        log_p = jax.nn.log_softmax(xs @ w[:3] + w[3][None])
        return -log_p[:, 0].mean()  # any label: the Hessian is the same

    expected = jax.hessian(loss)(jnp.zeros(16))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 40])
def test_blocks_are_nearer_to_the_full_fisher_than_the_diagonal_in_every_layer(seed):
    """Of a net that is not sure of itself: then slopes depend little on inputs."""
    sizes = [4, 6, 5, 3]
    params = {
        f"layer{i}": {"a": normal(seed + i, m, n), "z": normal(seed + 10 + i, n) / 2}
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }
    xs = normal(seed + 5, 200, 4) + 0.3

    def logits(p, x):
        for i in range(3):
            x = x @ p[f"layer{i}"]["a"] + p[f"layer{i}"]["z"]
            x = jax.nn.relu(x) if i < 2 else x
        return x

    factors = importance.kronecker(logits, params, xs, exact=True)
    whole, start = full_fisher(logits, params, xs), 0
    for i in range(3):
        layer = params[f"layer{i}"]
        n = layer["a"].size + layer["z"].size
        exact = whole[start : start + n, start : start + n]
        start += n
        ours = block(factors.layers[f"['layer{i}']['a']"], layer["a"], layer["z"])
        diagonal = np.diag(np.diag(exact))
        error = np.linalg.norm(ours - exact), np.linalg.norm(diagonal - exact)
        assert error[0] < error[1], (i, error)


def test_sampled_labels_agree_with_all_labels():
    params = {"w": normal(1, 3, 4)}

    def logits(p, x):
        return x @ p["w"]

    xs = jnp.tile(normal(2, 1, 3), (4000, 1))
    sampled = importance.kronecker(logits, params, xs, KEY, chunk_size=1000)
    exact = importance.kronecker(logits, params, xs[:1], exact=True)
    a, b = (f.layers["['w']"].outputs for f in (sampled, exact))
    np.testing.assert_allclose(a, b, atol=0.02)


# --- What a layer may look like -------------------------------------------------------


def check_diagonal(factors, logits, params, xs):
    fisher = importance.fisher(logits, params, xs, exact=True)
    fisher = {
        jax.tree_util.keystr(p): x
        for p, x in jax.tree_util.tree_leaves_with_path(fisher)
    }
    for name, x in factors.diagonal.items():
        np.testing.assert_allclose(x, fisher[name], rtol=1e-4, atol=1e-7)


class Attention(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.MultiHeadDotProductAttention(2, qkv_features=6)(x)
        x = linen.LayerNorm()(x)
        return linen.Dense(3)(x.mean(-2))


def test_attention_of_linen():
    model, xs = Attention(), normal(1, 9, 5, 4)
    params = model.init(KEY, xs[0])["params"]

    def logits(p, x):
        return model.apply({"params": p}, x)

    factors = importance.kronecker(logits, params, xs, exact=True)
    attention = "['MultiHeadDotProductAttention_0']"
    names = {f"{attention}['{k}']" for k in ("query", "key", "value", "out")}
    names.add("['Dense_0']")
    assert set(factors.layers) == {f"{name}['kernel']" for name in names}
    for name, layer in factors.layers.items():
        assert list(layer.bias) == [name.replace("kernel", "bias")]
    query = factors.layers[f"{attention}['query']['kernel']"]
    assert query.inputs.shape == (4, 1, 1, 4, 1, 1)
    assert query.outputs.shape == (1, 2, 3, 1, 2, 3)
    rows = xs.reshape(-1, 4)
    np.testing.assert_allclose(
        query.inputs.reshape(4, 4), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6
    )
    out = factors.layers[f"{attention}['out']['kernel']"]
    assert out.inputs.shape == (2, 3, 1, 2, 3, 1)
    assert list(factors.diagonal) == [
        "['LayerNorm_0']['bias']",
        "['LayerNorm_0']['scale']",
    ]
    check_diagonal(factors, logits, params, xs)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_convolution_is_a_dense_layer_of_patches(padding):
    params = {"k": normal(1, 3, 2, 2, 4), "b": normal(2, 4), "w": normal(3, 4, 3)}
    xs = normal(4, 7, 6, 5, 2)

    def convolve(p, x):
        return jax.lax.conv_general_dilated(
            x[None], p["k"], (2, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def logits(p, x):
        y = convolve(p, x) + p["b"][None, None, None]
        return jnp.tanh(y).mean((0, 1, 2)) @ p["w"]

    factors = importance.kronecker(logits, params, xs, exact=True)
    layer = factors.layers["['k']"]
    # A patch is the derivative of one channel of the output by the kernel.
    patches = jax.vmap(
        jax.jacobian(lambda k, x: convolve({"k": k}, x)[0, ..., 0]), (None, 0)
    )
    rows = np.asarray(patches(params["k"], xs)[..., 0]).reshape(-1, 12)
    actual = layer.inputs.reshape(12, 12)
    np.testing.assert_allclose(actual, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    mean = layer.bias["['b']"].ravel()
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-4, atol=1e-5)

    def gradients(x):  # by the output, of every label's log-likelihood
        def log_p(tap):
            y = convolve(params, x) + params["b"][None, None, None] + tap
            return jax.nn.log_softmax(jnp.tanh(y).mean((0, 1, 2)) @ params["w"])

        zero = jnp.zeros_like(convolve(params, x))
        g = jax.jacobian(log_p)(zero).reshape(3, -1, 4)
        return jnp.einsum("y,ysi,ysj->ij", jnp.exp(log_p(zero)), g, g)

    expected = jax.vmap(gradients)(xs).mean(0)
    np.testing.assert_allclose(
        layer.outputs.reshape(4, 4), expected, rtol=1e-4, atol=1e-7
    )


def test_nnx_model_and_its_convolutions():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
            self.dense = nnx.Linear(3, 4, rngs=rngs)

        def __call__(self, x):
            return self.dense(nnx.relu(self.conv(x)).mean((0, 1)))

    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    factors = importance.kronecker(
        lambda p, x: nnx.merge(graph, p)(x), params, normal(1, 5, 4, 4, 2), KEY
    )
    assert len(factors.layers) == 2
    assert not factors.diagonal
    for layer in factors.layers.values():
        assert len(layer.bias) == 1


def dense(p, x):
    y = x @ p["w"]
    return y + jnp.broadcast_to(p["b"], y.shape)


def outputs_first(p, x):
    return jnp.einsum("i,oi->o", x, p["w"]) + p["b"]


def reshaped(p, x):
    return dense({**p, "w": p["w"].reshape(3, 4)}, x)


def heads_first(p, x):
    return (jnp.einsum("i,aib->ab", x, p["w"]) + p["b"]).ravel()


PARAMS = {"w": normal(1, 3, 4), "b": normal(2, 4)}
HEADS = {
    "w": PARAMS["w"].reshape(3, 2, 2).swapaxes(0, 1),
    "b": PARAMS["b"].reshape(2, 2),
}


@pytest.mark.parametrize(
    ("logits", "params"),
    [
        (dense, PARAMS),
        (jax.jit(dense), PARAMS),
        (jax.checkpoint(dense), PARAMS),
        (lambda p, x: jax.nn.relu(dense(p, x)), PARAMS),
        (lambda p, x: dense(p, x[None])[0], PARAMS),
        (lambda p, x: p["w"] @ x + p["b"], {**PARAMS, "w": PARAMS["w"].T}),
        (outputs_first, {**PARAMS, "w": PARAMS["w"].T}),
        (reshaped, {**PARAMS, "w": PARAMS["w"].reshape(3, 2, 2)}),
        (heads_first, HEADS),
    ],
    ids=[
        *("plain", "jit", "checkpoint", "relu", "batch", "transposed"),
        *("einsum", "reshaped", "heads"),
    ],
)  # fmt: skip
def test_however_a_dense_layer_is_written_its_factors_are_the_same(logits, params):
    xs = normal(3, 20, 3)
    layer = importance.kronecker(logits, params, xs, exact=True).layers["['w']"]
    half = params["w"].ndim
    outs = tuple(n for n in layer.outputs.shape[:half] if n > 1)
    assert int(np.prod(outs)) == 4
    expected = importance.fisher(logits, params, xs, exact=True)["b"].ravel()
    reached = jax.vmap(lambda x: jnp.any(jax.jacobian(logits)(params, x)["b"] != 0))(xs)
    xs = xs[reached]  # behind a ReLU not every example is
    np.testing.assert_allclose(
        layer.inputs.reshape(3, 3), xs.T @ xs / len(xs), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        layer.bias["['b']"].ravel(), xs.mean(0), rtol=1e-5, atol=1e-6
    )
    actual = jnp.diagonal(layer.outputs.reshape(4, 4))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def twice(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"]


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


@jax.custom_vjp
def straight_through(w, x):
    return x @ w


straight_through.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda r, g: (jnp.outer(r[1], g), g)
)


@pytest.mark.parametrize(
    ("logits", "params"),
    [
        (twice, {"w": normal(1, 3, 3)}),
        (scanned, {"w": normal(1, 2, 3, 3)}),
        (lambda p, x: x * p["w"], {"w": normal(1, 3)}),
        (lambda p, x: p["w"][0] @ x, {"w": normal(1, 2, 3, 3)}),
        (lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])), {"w": normal(1, 3, 3)}),
        (lambda p, x: jnp.einsum("i,io->io", x, p["w"]).sum(0), {"w": normal(1, 3, 3)}),
        (lambda p, x: straight_through(p["w"], x), {"w": normal(1, 3, 3)}),
        (lambda p, x: p["w"] + x, {"w": normal(1, 3)}),
        (lambda p, x: x @ p["w"].reshape(3, 3), {"w": normal(1, 9)}),
        (lambda p, x: x @ (normal(2, 3, 3) @ p["w"]), {"w": normal(1, 3, 3)}),
    ],
    ids=[
        *("twice", "scan", "scale", "slice", "normed", "elementwise"),
        *("own_rule", "shift", "cut", "transformed"),
    ],
)  # fmt: skip
def test_what_is_no_layer_gets_the_diagonal(logits, params):
    xs = normal(3, 20, 3)
    factors = importance.kronecker(logits, params, xs, exact=True)
    assert not factors.layers
    expected = importance.fisher(logits, params, xs, exact=True)["w"]
    np.testing.assert_allclose(
        factors.diagonal["['w']"], expected, rtol=1e-4, atol=1e-7
    )


def test_a_bias_of_an_output_that_goes_elsewhere_too_gets_the_diagonal():
    def logits(p, x):
        y = x @ p["w"]
        return (y + p["b"]) * y

    layers_match(logits, PARAMS, normal(3, 20, 3), ({"['w']": []}, ["['b']"]))


def test_a_bias_by_position_is_none_of_the_layer():
    params = {"w": normal(1, 3, 4), "b": normal(2, 5, 4)}

    def logits(p, x):
        return (x @ p["w"] + p["b"]).sum(0)

    layers_match(logits, params, normal(3, 20, 5, 3), ({"['w']": []}, ["['b']"]))


# --- Examples, weights, positions -----------------------------------------------------


def test_padding_without_weight_leaves_no_trace():
    """Examples and positions alike, whatever they hold."""
    xs = normal(3, 6, 5, 3)
    weights = jnp.ones((6, 5)).at[:, 3:].set(0).at[5].set(0)

    def logits(p, x):
        return jnp.tanh(dense(p, x))

    clean = importance.kronecker(logits, PARAMS, xs[:5, :3], exact=True).layers["['w']"]
    padded = importance.kronecker(
        logits,
        PARAMS,
        xs.at[:, 3:].set(9.0).at[5].set(9.0),
        exact=True,
        weights=weights,
    ).layers["['w']"]
    np.testing.assert_allclose(padded.inputs, clean.inputs, rtol=1e-5)
    np.testing.assert_allclose(padded.outputs, clean.outputs * 5 / 6, rtol=1e-5)
    np.testing.assert_allclose(
        padded.bias["['b']"], clean.bias["['b']"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 50])
def test_chunks_are_of_no_account(chunk_size):
    xs = normal(3, 9, 3)
    a, b = (
        importance.kronecker(dense, PARAMS, xs, KEY, chunk_size=n)
        for n in (9, chunk_size)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b
    )


def test_under_jit_and_vmap_in_float16():
    params = jax.tree.map(lambda x: x.astype("float16"), PARAMS)
    xs = normal(3, 9, 3).astype("float16")

    def measure(p):
        return importance.kronecker(dense, p, xs, KEY)

    both = jax.jit(jax.vmap(measure))(jax.tree.map(lambda x: jnp.stack([x, x]), params))
    assert isinstance(both, Factors)
    one = measure(params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[1], y, rtol=2e-2, atol=1e-3),
        both,
        one,
    )
    assert {x.dtype for x in jax.tree.leaves(one)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (dense, PARAMS, jnp.ones((2, 3))), "either a key"),
        (lambda: (dense, PARAMS, jnp.ones((0, 3)), KEY), "no examples"),
        (lambda: (dense, {"n": jnp.array(1)}, jnp.ones((2, 3)), KEY), "real floating"),
        (lambda: (lambda _, x: x[0], PARAMS, jnp.ones((2, 3)), KEY), "logits must be"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        importance.kronecker(*arguments())
