import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import tasks
from experiments.data.datasets import Examples

LABELS = np.array([2, 0, 1, 3, 2, 2, 0])


def test_split_classes_partitions_the_examples():
    split = tasks.split_classes(LABELS, [(0, 1), (2, 3)], outputs=5)
    assert split.size.tolist() == [3, 4]
    rows = [r[:n].tolist() for r, n in zip(split.rows, split.size, strict=True)]
    assert rows == [[1, 2, 6], [0, 3, 4, 5]]
    expected = [[True, True, False, False, False], [False, False, True, True, False]]
    assert split.classes.tolist() == expected


def test_groups_may_be_arrays():
    """Such as a permutation of the classes, drawn from a seed."""
    wanted = tasks.split_classes(LABELS, [(3, 0), (2, 1)], outputs=4)
    pairs = np.array([[3, 0], [2, 1]])
    for groups in (pairs, jnp.asarray(pairs), list(pairs), [range(3, -1, -3), {1, 2}]):
        found = tasks.split_classes(LABELS, groups, outputs=4)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_split_classes_refuses_what_is_not_there():
    with pytest.raises(ValueError, match=r"no examples of the classes \[8, 9\]"):
        tasks.split_classes(LABELS, [(0, 1), (8, 9)], outputs=10)
    with pytest.raises(ValueError, match="at least one group"):
        tasks.split_classes(LABELS, [], outputs=3)
    with pytest.raises(ValueError, match=r"do not fit into 3 outputs"):
        tasks.split_classes(LABELS, [(2, 3)], outputs=3)


def test_shuffle_permutes_the_examples_and_leaves_the_padding_last():
    split = tasks.split_classes(LABELS, [(0, 1), (2, 3)], outputs=5)
    task = jax.tree.map(lambda x: x[0], split)
    seen = set()
    for seed in range(30):
        order = tasks.shuffle(task, jax.random.key(seed))
        assert sorted(order[:3].tolist()) == [1, 2, 6]
        seen.add(tuple(order[:3].tolist()))
    assert len(seen) == 6, "every order comes up"


def test_shuffle_leaves_the_padding_last_in_double_precision():
    with jax.enable_x64(True):
        task = tasks.Task(jnp.arange(30), jnp.int32(20), jnp.ones(2, bool))
        order = tasks.shuffle(task, jax.random.key(0))
    assert sorted(order[:20].tolist()) == list(range(20))


def test_shuffle_is_uniform():
    task = tasks.Task(jnp.arange(5), jnp.int32(4), jnp.ones(2, bool))
    keys = jax.random.split(jax.random.key(0), 4000)
    first = jax.vmap(lambda key: tasks.shuffle(task, key)[0])(keys)
    counts = np.bincount(first, minlength=5)
    assert counts[4] == 0
    np.testing.assert_allclose(counts[:4], 1000, atol=120)  # 4.4 standard deviations


IMAGES = np.arange(5 * 6, dtype=np.uint8).reshape(5, 2, 3, 1)
DIGITS = Examples(IMAGES, np.array([3, 1, 4, 1, 5], np.int32))


def test_permuted_rows_show_every_image_through_one_permutation():
    seen = tasks.permute(DIGITS, jax.random.key(0), 3)
    split = tasks.permuted(5, 3, outputs=6)
    assert split.classes.all()
    assert split.size.tolist() == [5, 5, 5]
    for pixels, rows in zip(np.asarray(seen.pixels), split.rows, strict=True):
        assert sorted(pixels) == list(range(6))
        images, labels = tasks.look_up(seen, rows)
        assert images.shape == IMAGES.shape
        np.testing.assert_array_equal(labels, DIGITS.labels)
        expected = IMAGES.reshape(5, 6)[:, pixels].astype(np.float32) / 255
        np.testing.assert_allclose(images.reshape(5, 6), expected)


def test_permutations_are_a_function_of_the_key_and_the_first_is_none():
    first, again, other = (
        tasks.permute(DIGITS, jax.random.key(i), 4).pixels for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first[1:] != other[1:]).any()
    assert first[0].tolist() == list(range(6))
    assert len({tuple(p.tolist()) for p in first}) == 4
    more = tasks.permute(DIGITS, jax.random.key(0), 5).pixels
    np.testing.assert_array_equal(more[:4], first)


def test_permutations_are_uniform():
    keys = jax.random.split(jax.random.key(0), 3000)
    second = jax.vmap(lambda key: tasks.permute(DIGITS, key, 2).pixels[1])(keys)
    counts = np.stack([np.bincount(column, minlength=6) for column in second.T])
    np.testing.assert_allclose(counts, 500, atol=95)  # 4.6 standard deviations


def test_together_is_all_the_examples():
    joint = tasks.together(tasks.permuted(5, 3, outputs=6))
    assert joint.rows.tolist() == [list(range(15))]
    assert joint.size.tolist() == [15]
    assert joint.classes.shape == (1, 6)
    unequal = tasks.split_classes(LABELS, [(0, 1), (2, 3)], outputs=5)
    joint = tasks.together(tasks.padded(unequal, 9))
    assert joint.rows.tolist() == [[1, 2, 6, 0, 3, 4, 5]]
    assert joint.size.tolist() == [7]
    assert joint.classes.tolist() == [[True] * 4 + [False]]
