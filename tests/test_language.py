"""The language model's pieces against what is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.networks.transformer import Transformer, functional
from experiments.training import language
from experiments.training.loop import Carry

TEXTS = language.join([np.arange(100, dtype=np.uint8), np.full(50, 200, np.uint8)], 0.2)


def lookup(params, text):
    """The simplest model: of each byte, what follows."""
    return params[text.astype(jnp.int32)]


def test_no_byte_sees_those_after_it_nor_another_text():
    init, apply = functional(
        lambda key: Transformer(8, layers=2, heads=2, length=8, rngs=nnx.Rngs(key))
    )
    params = jax.jit(init)(jax.random.key(0))
    text = jnp.arange(8, dtype=jnp.uint8)
    both = jnp.stack([text, text.at[5].set(99)])
    (logits, changed), (alone, other) = jax.jit(
        lambda both: (apply(params, both), [apply(params, x) for x in both])
    )(both)
    np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(changed, other, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(alone[:5], other[:5])
    assert jnp.abs(alone[5:] - other[5:]).min(axis=1).max() > 0


def test_windows_are_of_the_part_that_is_trained_on_in_the_shares_given():
    draw = jax.jit(language.draw, static_argnums=(3, 4))
    windows = draw(TEXTS, jnp.array([0.25, 0.75]), jax.random.key(0), 400, 9)
    second = windows[:, 0] == 200
    assert 0.7 < second.mean() < 0.8
    first = np.asarray(windows[~second])
    np.testing.assert_array_equal(np.diff(first.astype(int)), 1)
    assert (first.min(), first.max()) == (1, 79)  # the last fifth is held out
    alone = draw(TEXTS, jnp.array([1.0, 0.0]), jax.random.key(1), 100, 9)
    assert alone.max() < 80


def test_a_batch_in_parts_has_the_same_gradient():
    tx = optax.sgd(0.1)
    params = jax.random.normal(jax.random.key(0), (256, 256))
    start = Carry(params, tx.init(params))
    stage = language.Stage(jnp.array([0.5, 0.5]), jnp.int32(2))
    whole, parts = (
        jax.jit(
            language.learner(
                lookup,
                tx,
                lambda _: start,
                batch_size=4,
                length=8,
                micro_batch=micro_batch,
            ).epoch
        )(start, TEXTS, stage, jax.random.key(1))
        for micro_batch in (0, 2)
    )
    for a, b in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_parts_must_divide_the_batch():
    with pytest.raises(ValueError, match="micro_batch must divide the batch size 4"):
        language.learner(
            lookup, optax.sgd(1), Carry, batch_size=4, length=8, micro_batch=3
        )


def test_loss_of_a_known_model_in_bits():
    """Half of the probability on the byte that follows, half on the next."""

    def logits(_, text):
        after = text.astype(jnp.int32) + 1
        both = jax.nn.one_hot(after, 256) + jax.nn.one_hot(after + 1, 256)
        return jnp.log(both / 2)

    pieces = language.learner(logits, optax.sgd(1), Carry, batch_size=4, length=8)
    starts = jnp.array([[0, 20, 40], [1, 2, 3]])
    bits = pieces.evaluate(Carry(None, None), TEXTS, starts)
    np.testing.assert_allclose(bits, [1, 1], rtol=1e-6)


def test_writing_goes_on_beyond_the_window():
    def successor(_, text):
        return 99 * jax.nn.one_hot(text.astype(jnp.int32) + 1, 256)

    for prompt in (jnp.array([1], jnp.uint8), jnp.arange(9, dtype=jnp.uint8)):
        text = language.sample(
            successor, None, prompt, jax.random.key(0), count=7, length=4
        )
        assert text.tolist() == list(range(int(prompt[-1]) + 1, int(prompt[-1]) + 8))


def test_a_text_longer_than_the_network_is_refused():
    """Positions beyond its table would be no numbers."""
    model = Transformer(8, layers=1, heads=2, length=4, rngs=nnx.Rngs(0))
    assert np.isfinite(model(jnp.zeros((2, 4), jnp.uint8))).all()
    for shape in ((5,), (2, 5)):
        with pytest.raises(ValueError, match=r"has 5 bytes, the network is for 4"):
            model(jnp.zeros(shape, jnp.uint8))
