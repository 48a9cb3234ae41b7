import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from si_jax.models import MLP, mask_logits

IMAGES = jnp.ones((2, 28, 28, 1))


@pytest.mark.parametrize("zero_init_output", [False, True])
def test_mlp_starts_as_the_paper_says(zero_init_output):
    params = MLP((256, 128), 10, zero_init_output).init(jax.random.key(0), IMAGES)
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
