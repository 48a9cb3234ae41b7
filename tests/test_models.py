import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from experiments.data.tasks import mask_logits
from experiments.networks import convolution
from experiments.networks.convolution import convolve, halve, winograd
from experiments.networks.models import CNN, MLP

IMAGES = jnp.ones((2, 28, 28, 1))
NUMBERS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


@pytest.mark.parametrize("zero_init_output", [False, True])
def test_mlp_starts_as_the_paper_says(zero_init_output):
    model = MLP((256, 128), 10, zero_init_output)
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)
    layers = [params["params"][f"Dense_{i}"] for i in range(3)]
    shapes = [(784, 256), (256, 128), (128, 10)]
    for i, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        assert layer["kernel"].shape == shape
        assert not layer["bias"].any()
        limit = np.sqrt(6 / sum(shape))  # Glorot & Bengio, 2010, eq. 16
        largest = np.abs(layer["kernel"]).max()
        if i == 2 and zero_init_output:
            assert largest == 0
        else:
            assert 0.98 * limit < largest <= limit


def test_masked_classes_get_no_probability_and_no_gradient():
    classes = jnp.array([True, False, True])
    logits = jnp.array([[1.0, 9.0, 2.0]])

    def loss(x):
        masked = mask_logits(x, classes)
        return optax.softmax_cross_entropy_with_integer_labels(
            masked, jnp.array([2])
        ).mean()

    two = jnp.array([[1.0, 2.0]])
    expected = optax.softmax_cross_entropy_with_integer_labels(two, jnp.array([1]))
    np.testing.assert_allclose(loss(logits), expected.mean(), rtol=1e-6)
    gradient = jax.grad(loss)(logits)
    assert gradient[0, 1] == 0
    assert np.isfinite(gradient).all()
    assert mask_logits(logits, classes).argmax(-1) == 2


def test_dropout_takes_a_key_and_keeps_the_mean():
    model = MLP((3000,), 2, dropout=0.25)
    params = model.init(jax.random.key(0), IMAGES)

    def hidden(**rngs):
        _, state = model.apply(
            params, IMAGES, **rngs, capture_intermediates=True, mutable="intermediates"
        )
        return state["intermediates"]["Dropout_0"]["__call__"][0]

    plain, dropped = hidden(), hidden(rngs={"dropout": jax.random.key(1)})
    active = plain > 0
    kept = dropped[active] > 0
    assert 0.72 < kept.mean() < 0.78
    np.testing.assert_allclose(
        dropped[active][kept], plain[active][kept] / 0.75, rtol=1e-5
    )
    np.testing.assert_array_equal(plain, hidden())


PHOTOS = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
CNN_60 = CNN(60, zero_init_output=False)


@pytest.fixture(scope="module")
def trained():
    """As if: all parameters differ from zero."""
    rng = np.random.default_rng(0)

    def values(leaf):
        found = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(found / np.float32(np.prod(leaf.shape[:-1])) ** 0.5)

    shapes = jax.eval_shape(CNN_60.init, jax.random.key(0), PHOTOS)
    return jax.tree.map(values, shapes)


@pytest.fixture(scope="module")
def logits(trained):
    return CNN_60.apply(trained, PHOTOS)


def test_cnn_is_the_papers():
    params = jax.jit(CNN(60).init)(jax.random.key(0), PHOTOS)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 1_276_508
    for i, (inputs, outputs) in enumerate([(3, 32), (32, 32), (32, 64), (64, 64)]):
        layer = params[f"Conv_{i}"]
        assert layer["kernel"].shape == (3, 3, inputs, outputs)
        assert not layer["bias"].any()
        limit = np.sqrt(6 / (9 * (inputs + outputs)))
        assert 0.95 * limit < jnp.abs(layer["kernel"]).max() <= limit
    assert not params["Dense_1"]["kernel"].any()


def test_cnn_drops_units_with_a_key_only(trained, logits):
    np.testing.assert_array_equal(logits, CNN_60.apply(trained, PHOTOS))
    one, other = (
        CNN_60.apply(trained, PHOTOS, rngs={"dropout": jax.random.key(i)})
        for i in (0, 1)
    )
    assert (one != logits).any()
    assert (one != other).any()


def test_cnn_in_bfloat16_has_float32_parameters_and_nearly_the_same_logits(
    trained, logits
):
    narrow = CNN_60.clone(dtype=jnp.bfloat16)
    initial = jax.eval_shape(narrow.init, jax.random.key(0), PHOTOS)
    assert jax.tree.map(lambda x: x.dtype, initial) == (
        jax.tree.map(lambda x: x.dtype, trained)
    )
    found = narrow.apply(trained, PHOTOS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, logits, atol=0.02 * np.ptp(logits))


def test_cnn_with_the_convolution_of_lax_has_the_same_logits(trained, logits):
    plain = CNN_60.clone(convolve=jax.lax.conv_general_dilated)
    np.testing.assert_allclose(
        plain.apply(trained, PHOTOS), logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("padding", ["SAME", "VALID", [(1, 0), (0, 2)]])
@pytest.mark.parametrize(
    ("size", "channels"), [((3, 3), 3), ((2, 3), 3), ((3, 3), 16), ((2, 3), 16)]
)
def test_convolution_and_its_gradients_are_those_of_lax(padding, size, channels):
    keys = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(keys[0], (2, 7, 6, channels))
    kernel = jax.random.normal(keys[1], (*size, channels, 4))

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(convolution):
        value, gradients = jax.vjp(
            lambda *args: convolution(*args, (1, 1), padding, **NUMBERS), images, kernel
        )
        return value, *gradients(jax.random.normal(keys[2], value.shape))

    expected = value_and_gradients(jax.lax.conv_general_dilated)
    for actual, wanted in zip(value_and_gradients(convolve), expected, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize(
    ("strides", "padding", "more"),
    [
        ((2, 2), "SAME", {}),
        ((2, 1), "VALID", {}),
        ((1, 1), [(1, 0), (0, 2)], {"rhs_dilation": (2, 2)}),
        ((1, 1), "SAME", {"rhs_dilation": (1, 2)}),
        ((1, 1), [(1, 1), (2, 1)], {"lhs_dilation": (2, 1)}),
        ((1, 1), [(-1, 0), (1, -1)], {}),
        ((1, 1), "SAME", {"feature_group_count": 2}),
        ((1, 1), "SAME", {"batch_group_count": 2}),
        ((1, 1), "SAME_LOWER", {"rhs_dilation": None, "precision": "highest"}),
        ((1, 1), "SAME", {"dimension_numbers": ("HWNC", "HWIO", "NHWC")}),
        ((1, 1), "SAME", {"dimension_numbers": ("NHWC", "HWIO", "NCHW")}),
    ],
)
def test_every_setting_of_a_convolution_is_that_of_lax(
    strides, padding, more, channels
):
    more = NUMBERS | more
    images = jax.random.normal(jax.random.key(0), (4, 6, 7, channels))
    if more["dimension_numbers"][0] == "HWNC":
        images = images.transpose(1, 2, 0, 3)
    inputs = channels // more.get("feature_group_count", 1)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, inputs, 4))
    found, wanted = (
        function(images, kernel, strides, padding, **more)
        for function in (convolve, jax.lax.conv_general_dilated)
    )
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_convolutions_of_signals_volumes_and_integers_are_those_of_lax():
    """With a stride in a network's layer, too, and without the order of the axes."""
    for dimensions in (1, 3):
        signal = jax.random.normal(jax.random.key(0), (2, *[5] * dimensions, 3))
        size = (3,) * dimensions
        layers = (
            nn.Conv(4, size, padding="SAME", conv_general_dilated=function)
            for function in (None, convolve)
        )
        plain, ours = layers
        params = plain.init(jax.random.key(1), signal)
        np.testing.assert_allclose(
            plain.apply(params, signal), ours.apply(params, signal), rtol=1e-5
        )
    images, kernel = jnp.arange(32).reshape(1, 4, 4, 2), jnp.ones((3, 3, 2, 1), int)
    np.testing.assert_array_equal(
        convolve(images, kernel, (2, 2), "SAME"),
        jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME", **NUMBERS),
    )


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_winograd_is_as_exact_as_the_convolution_of_lax(size):
    rng = np.random.default_rng(size)
    images = rng.normal(size=(2, size, 9 - size, 64))
    kernel = rng.normal(size=(3, 3, 64, 4))
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), (1, 2))
    wanted = np.einsum("nijcab,abco->nijo", windows, kernel)
    narrow = jnp.float32(images), jnp.float32(kernel)
    plain = jax.lax.conv_general_dilated(*narrow, (1, 1), "VALID", **NUMBERS)
    error, of_lax = (np.abs(x - wanted).max() for x in (winograd(*narrow), plain))
    assert 0 < error < 3 * of_lax


def test_winograd_under_vmap_and_in_second_derivatives():
    keys = jax.random.split(jax.random.key(0), 2)
    images = jax.random.normal(keys[0], (3, 2, 4, 5, 2))
    kernel = jax.random.normal(keys[1], (3, 3, 2, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def hessian_of(convolution):
        def loss(kernel, images):
            return jnp.sum(jnp.sin(convolution(images, kernel)))

        return jax.vmap(jax.hessian(loss), (None, 0))(kernel, images)

    def plain(images, kernel):
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", **NUMBERS)

    wanted = hessian_of(plain)
    np.testing.assert_allclose(
        hessian_of(winograd),
        wanted,
        rtol=1e-5,
        atol=1e-5 * np.abs(wanted).max(),
    )


def test_narrow_images_and_few_channels_do_not_take_winograd(monkeypatch):
    taken = []
    monkeypatch.setattr(
        convolution, "winograd", lambda x, _: taken.append((x.dtype, x.shape[-1]))
    )
    for dtype, channels in [("float32", 16), ("float32", 3), ("bfloat16", 16)]:
        images, kernel = jnp.ones((1, 4, 4, channels)), jnp.ones((3, 3, channels, 2))
        convolve(images.astype(dtype), kernel.astype(dtype), (1, 1), "VALID")
    assert taken == [(jnp.float32, 16)]


@pytest.mark.parametrize("size", [4, 5])
def test_halve_is_flax_max_pool(size):
    images = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    np.testing.assert_array_equal(
        halve(images), nn.max_pool(images, (2, 2), strides=(2, 2))
    )
