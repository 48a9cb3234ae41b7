"""Many runs as one program, over all devices."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def sweep(
    train: Callable[..., Any],
    *shared: Any,
    seeds: Sequence[int],
    max_parallel: int | None = None,
    **axes: Sequence[float],
) -> Any:
    """Run ``train`` at every point of a grid, as one compiled program.

    Args:
      train: ``(key, *shared, **hyperparameters) → tree of arrays``, pure; the
        hyperparameters are float32 scalars.
      *shared: arguments that all runs share, such as the examples; copied to every
        device once.
      seeds: each point's runs; a run's key is ``jax.random.key(seed)``.
      max_parallel: see :func:`over_runs`.
      **axes: the values of each hyperparameter.

    Returns:
      The results of ``train`` with leading axes ``(seeds, *axes)``, in the order given;
      equal to those of sequential runs.

    Raises:
      ValueError: if there are no seeds, or no values of a hyperparameter.

    Example:
      >>> import jax
      >>> from si_jax import sweep
      >>> def train(key, strength, damping):
      ...     return strength / damping + 0 * jax.random.uniform(key)
      >>> print(sweep.sweep(train, seeds=[0], strength=[1, 2, 3], damping=[1, 4])[0])
      [[1.   0.25]
       [2.   0.5 ]
       [3.   0.75]]
    """
    shape = (len(seeds), *map(len, axes.values()))
    if 0 in shape:
        empty = [k for k, n in zip(("seeds", *axes), shape, strict=True) if not n]
        raise ValueError(f"{', '.join(empty)} must have one value at least.")
    points = list(itertools.product(seeds, *axes.values()))
    columns = list(zip(*points, strict=True))
    values = {
        name: np.asarray(column, np.float32)
        for name, column in zip(axes, columns[1:], strict=True)
    }
    devices = mesh(len(points))

    def run(seed, hyperparameters, *rest):
        return train(jax.random.key(seed), *rest, **hyperparameters)

    all_runs = over_runs(run, devices, mapped=2, max_parallel=max_parallel)
    # Seeds, not keys: spread takes what NumPy can hold.
    per_run = spread((np.asarray(columns[0], np.uint32), values), devices)
    results = all_runs(*per_run, *replicate(shared, devices))
    return jax.tree.map(
        lambda x: x[: len(points)].reshape(*shape, *x.shape[1:]), results
    )


def mesh(runs: int) -> Mesh:
    """The devices to share ``runs`` out over, along one axis.

    Under ``jax.distributed`` all devices of all processes; else the local ones, as many
    as there are runs.
    """
    devices = jax.devices() if jax.process_count() > 1 else jax.devices()[:runs]
    return Mesh(np.array(devices), ("runs",))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of ``tree`` on every device of ``mesh``, once."""
    return _place(tree, NamedSharding(mesh, PartitionSpec()))


def spread(tree: Any, mesh: Mesh) -> Any:
    """Share out the leading axis of every array, the runs, over the devices.

    A number of runs that the devices do not divide is made up by repeating the last.
    """

    def pad(x):
        x = np.asarray(x)
        return np.concatenate([x, x[-1:].repeat(-len(x) % mesh.size, axis=0)])

    return _place(jax.tree.map(pad, tree), NamedSharding(mesh, PartitionSpec("runs")))


def gather(tree: Any, runs: int) -> Any:
    """NumPy arrays of what :func:`spread` shared out, those of other processes too.

    Without what was made up: ``runs`` of each.

    Raises:
      ConnectionError: if another process is gone.
    """
    if jax.process_count() == 1:
        arrays = jax.device_get(tree)
    else:
        try:
            arrays = multihost_utils.process_allgather(tree, tiled=True)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            raise ConnectionError(str(error).splitlines()[0]) from error
    return jax.tree.map(lambda x: x[:runs], arrays)


def _place(tree: Any, sharding: NamedSharding) -> Any:
    def place(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(place, tree)


def over_runs(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    mapped: int = 1,
    donate: bool = False,
    max_parallel: int | None = None,
) -> Callable[..., Any]:
    """Compile ``function`` for many runs at once.

    The runs are shared out over the devices of ``mesh``, which must divide their number
    (:func:`spread` sees to it).

    Args:
      function: takes ``mapped`` arguments of its run, then arguments that all runs
        share; returns a tree of arrays.
      mesh: from :func:`mesh`.
      mapped: how many of the arguments have a leading axis over the runs.
      donate: whether the first argument's buffers may be reused.
      max_parallel: how many runs of one device go side by side (``vmap``); the rest
        follows, so that a grid of any size fits into memory. By default 64 on an
        accelerator and 1 on a CPU, where ``vmap`` is slower than one after the other.

    Returns:
      A jitted function like ``function`` with that leading axis on its first ``mapped``
      arguments and on its results.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import sweep
      >>> mesh = sweep.mesh(3)
      >>> scale = sweep.over_runs(lambda x, factor: x * factor, mesh)
      >>> own = sweep.spread(jnp.array([1.0, 2.0, 3.0]), mesh)
      >>> print(sweep.gather(scale(own, jnp.float32(10)), runs=3))
      [10. 20. 30.]
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    parallel = max_parallel or (1 if on_cpu else 64)
    runs, shared = PartitionSpec("runs"), PartitionSpec()

    def each(per_run, rest):
        def one(arguments):
            return function(*arguments, *rest)

        # A batch of one would still be a vmap.
        return jax.lax.map(one, per_run, batch_size=parallel if parallel > 1 else None)

    on_each_device = jax.shard_map(
        each, mesh=mesh, in_specs=(runs, shared), out_specs=runs, check_vma=False
    )

    def all_runs(*arguments):
        return on_each_device(arguments[:mapped], arguments[mapped:])

    return jax.jit(all_runs, donate_argnums=0 if donate else ())
