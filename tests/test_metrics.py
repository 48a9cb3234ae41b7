import jax.numpy as jnp
import numpy as np

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
