"""Many runs as one program, over all local devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def mesh(runs: int) -> Mesh:
    """The local devices, as many as there are runs to share out, along an axis."""
    return Mesh(jax.local_devices()[:runs], ("runs",))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of ``tree`` on every device of ``mesh``, once."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def over_runs(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    mapped: int = 1,
    donate: bool = False,
) -> Callable[..., Any]:
    """Compile ``function`` for many runs at once.

    The runs are shared out over the devices of ``mesh``. Those of one device run side
    by side on an accelerator (``vmap``), and one after the other on a CPU, where
    ``vmap`` is slower. A number of runs that the devices do not divide is padded, and
    the padding dropped.

    Args:
      function: takes ``mapped`` arguments of its run, then arguments that all runs
        share; returns a tree of arrays.
      mesh: from :func:`mesh`.
      mapped: how many of the arguments have a leading axis over the runs.
      donate: whether the first argument's buffers may be reused.

    Returns:
      A jitted function like ``function`` with that leading axis on its first ``mapped``
      arguments and on its results.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import sweep
      >>> scale = sweep.over_runs(lambda x, factor: x * factor, sweep.mesh(3))
      >>> print(scale(jnp.array([1.0, 2.0, 3.0]), jnp.float32(10)))
      [10. 20. 30.]
    """
    devices = mesh.devices.size
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    runs, shared = PartitionSpec("runs"), PartitionSpec()

    def each(own, rest):
        def one(arguments):
            return function(*arguments, *rest)

        return jax.lax.map(one, own) if on_cpu else jax.vmap(one)(own)

    spread = jax.shard_map(
        each, mesh=mesh, in_specs=(runs, shared), out_specs=runs, check_vma=False
    )

    def all_runs(*arguments):
        own, rest = arguments[:mapped], arguments[mapped:]
        count = len(jax.tree.leaves(own)[0])
        missing = -count % devices

        def pad(x):
            return jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])

        padded = jax.tree.map(pad, own) if missing else own
        results = spread(padded, rest)
        return jax.tree.map(lambda x: x[:count], results) if missing else results

    return jax.jit(all_runs, donate_argnums=0 if donate else ())
