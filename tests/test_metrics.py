import jax
import jax.numpy as jnp
import numpy as np
import pytest

from si_jax import metrics

# Rows: after task 1, 2, 3; columns: on task 1, 2, 3. Two seeds.
MATRIX = jnp.array(
    [
        [[0.8, 0.5, 0.4], [0.9, 0.7, 0.6], [0.6, 0.3, 1.0]],
        [[1.0, 0.5, 0.5], [1.0, 1.0, 0.5], [1.0, 1.0, 1.0]],
    ]
)


def test_by_hand():
    def check(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)

    check(metrics.average_accuracy(MATRIX), [1.9 / 3, 1.0])
    check(
        metrics.average_accuracy_so_far(MATRIX), [[0.8, 0.8, 1.9 / 3], [1.0, 1.0, 1.0]]
    )
    check(metrics.learning_accuracy(MATRIX), [2.5 / 3, 1.0])
    # From the best: task 1 was at 0.9 after task 2, above the 0.8 it was learned with.
    check(metrics.forgetting(MATRIX), [(0.3 + 0.4) / 2, 0.0])
    check(metrics.backward_transfer(MATRIX), [(-0.2 - 0.4) / 2, 0.0])
    initial = jnp.array([[0.5, 0.5, 0.4], [0.5, 0.5, 0.5]])
    check(metrics.forward_transfer(MATRIX, initial), [(0.0 + 0.2) / 2, 0.0])
    reference = jnp.array([[0.9, 0.9, 0.9], [1.0, 1.0, 1.0]])
    check(metrics.intransigence(MATRIX, reference), [(0.1 + 0.2 - 0.1) / 3, 0.0])


def test_standard_error():
    values = np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]])
    np.testing.assert_allclose(
        metrics.standard_error(values), [2 / np.sqrt(3), 0.0], rtol=1e-6
    )
    assert np.isnan(metrics.standard_error([4.0])), "one value has no spread"
    assert np.isnan(metrics.standard_error([4])), "nor has a whole number"
    np.testing.assert_allclose(metrics.standard_error([1, 3]), 1.0)
    for none in ([], 4.0):
        with pytest.raises(ValueError, match="one value at least"):
            metrics.standard_error(none)


nan = np.nan
SEEN = [[0.8, nan, nan], [0.9, 0.7, nan], [0.6, 0.3, 1.0]]


def test_tasks_that_were_not_seen_yet_may_be_no_numbers():
    """The best is taken over the rows in which there is one; so under jit and vmap."""
    whole = np.asarray(MATRIX[0])
    for of in (
        metrics.average_accuracy,
        metrics.average_accuracy_so_far,
        metrics.learning_accuracy,
        metrics.forgetting,
        metrics.backward_transfer,
    ):
        for table in (SEEN, np.array(SEEN), jnp.array(SEEN)):
            np.testing.assert_allclose(of(table), of(whole), rtol=1e-6)
        both = jax.jit(jax.vmap(of))(jnp.array([SEEN, SEEN]))
        np.testing.assert_allclose(both, [of(whole)] * 2, rtol=1e-6)
    np.testing.assert_allclose(metrics.forgetting(SEEN), (0.3 + 0.4) / 2, rtol=1e-6)
    reference = [0.9, 0.9, 0.9]
    np.testing.assert_allclose(metrics.intransigence(SEEN, reference), 0.2 / 3, 1e-5)
    assert np.isnan(metrics.forward_transfer(SEEN, [0.5, 0.5, 0.5])), "it asks for them"
    diverged = [*SEEN[:2], [nan, nan, nan]]
    assert np.isnan(metrics.forgetting(diverged))


def test_percent_in_whole_numbers_are_numbers():
    percent = np.round(100 * np.asarray(MATRIX[0])).astype(int)
    for table in (percent, percent.tolist()):
        np.testing.assert_allclose(metrics.forgetting(table), 35, rtol=1e-6)
        np.testing.assert_allclose(metrics.backward_transfer(table), -30, rtol=1e-6)
        found = metrics.forward_transfer(table, [50, 50, 40])
        np.testing.assert_allclose(found, 10, rtol=1e-6)


@pytest.mark.parametrize(
    "of",
    [
        metrics.average_accuracy_so_far,
        metrics.learning_accuracy,
        metrics.forgetting,
        metrics.backward_transfer,
        lambda table: metrics.forward_transfer(table, [0.5] * 3),
        lambda table: metrics.intransigence(table, [0.5] * 3),
    ],
)
def test_tables_of_another_shape_are_refused(of):
    """With a row before the first task, not finished, in one row, or ragged."""
    before = [[0.5, 0.5, 0.5], *SEEN]
    for table, message in (
        (before, "got 4 rows and 3 columns: without a row before the first task"),
        (SEEN[:2], "got 2 rows and 3 columns"),
        (SEEN[2:], "got 1 rows and 3 columns"),
        (SEEN[2], r"are \(…, tasks, tasks\), not \(3,\)"),
        (np.zeros((0, 3)), r"are \(…, tasks, tasks\)"),
        ([[0.8], [0.9, 0.7]], "rows of equal length; NaN stands for"),
        ([[0.8, None], [0.9, 0.7]], "rows of equal length; NaN stands for"),
    ):
        with pytest.raises(ValueError, match=message):
            of(table)


def test_measures_of_two_tasks_need_two_and_an_accuracy_for_each():
    for of in (metrics.forgetting, metrics.backward_transfer):
        with pytest.raises(ValueError, match="needs 2 tasks at least, got 1"):
            of([[0.9]])
    with pytest.raises(ValueError, match="needs 2 tasks at least, got 1"):
        metrics.forward_transfer([[0.9]], [0.5])
    with pytest.raises(ValueError, match="initial must have an accuracy for each of 3"):
        metrics.forward_transfer(MATRIX, [0.5, 0.5])
    with pytest.raises(ValueError, match="reference must have an accuracy for each"):
        metrics.intransigence(MATRIX, [0.5])
    np.testing.assert_allclose(metrics.average_accuracy([[0.5, 1.0]]), 0.75)  # joint
    np.testing.assert_allclose(metrics.learning_accuracy([[0.5]]), 0.5)
