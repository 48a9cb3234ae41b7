"""What every trainer is held to: ω is −Σ g·Δθ, and with SI the first task is kept."""

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import si_jax

_U = jnp.linspace(-1.5, 1.5, 16)[:, None]
_O = jnp.zeros_like(_U)
REGRESSIONS = [
    (jnp.hstack([_U, _O, _O]), _U),  # asks for w₀ = 1
    (jnp.hstack([_U, _U, _O]), 3 * _U),  # asks for w₀ + w₁ = 3
]


def si(strength: float, rate: float = 0.05) -> optax.GradientTransformation:
    """The optimizer under test, as a user would write it."""
    return si_jax.with_synaptic_intelligence(optax.adam(rate), strength, damping=1e-3)


class Counted(NamedTuple):
    """The user's state, and the number of steps."""

    count: jax.Array
    inner: optax.OptState


class Account:
    """Notes gradient and parameters of every step, around the user's optimizer.

    ``tx`` is what the trainer gets. It knows nothing of Synaptic Intelligence. Of a
    trainer that passes no parameters it takes those that ``si_jax.persistent`` knows.
    """

    def __init__(self, inner: optax.GradientTransformation):
        self.inner = optax.with_extra_args_support(inner)
        self.tx = optax.GradientTransformationExtraArgs(self._init, self._update)
        self._steps: dict[int, Any] = {}
        self.error = 0.0

    def _init(self, params):
        return Counted(jnp.zeros((), int), self.inner.init(params))

    def _update(self, grads, state, params=None, **extra):
        count, inner = state
        updates, after = self.inner.update(grads, inner, params, **extra)
        noted = leaves(grads), leaves(inner.params if params is None else params)
        jax.debug.callback(self._note, count, noted)
        return updates, Counted(count + 1, after)

    def _note(self, count, step):
        self._steps[int(count)] = jax.tree.map(np.array, step)

    def close(self, opt_state: Any, params: Any) -> None:
        """Compare ω in ``opt_state`` with the task's −Σ g·Δθ up to ``params``."""
        jax.effects_barrier()
        steps = [self._steps[count] for count in sorted(self._steps)]
        grads, thetas = zip(*steps, strict=True)
        self._steps.clear()
        thetas = [*thetas, leaves(params)]
        omega = leaves(si_jax.synapses(opt_state).path_integral)
        account = {
            name: -sum(
                g[name] * np.subtract(after[name], now[name], dtype=float)
                for g, now, after in zip(grads, thetas, thetas[1:], strict=False)
            )
            for name in grads[0]
        }
        assert omega.keys() == account.keys(), (omega.keys(), account.keys())
        worst = max(np.max(np.abs(omega[k] - account[k]), initial=0) for k in omega)
        largest = max(np.max(np.abs(account[k]), initial=0) for k in omega)
        self.error = max(self.error, worst / largest)


def leaves(tree: Any) -> dict[str, Any]:
    """The numbers by path: no functions, out of nnx's boxes, complex ones as two."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path).removesuffix(".value")
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        if jnp.iscomplexobj(leaf):
            found[f"{name}.real"], found[f"{name}.imaginary"] = leaf.real, leaf.imag
        else:
            found[name] = leaf
    return found


def report(
    package: str,
    two_tasks: Callable[[float], tuple[Account, Any, Any]],
    *,
    part: str = "",
    strength: float = 1.0,
) -> None:
    """Print a row; ``two_tasks`` returns the loss on the first after each of both."""
    start = time.time()
    account, learned, after = two_tasks(strength)
    held = float(after - learned)
    _, learned, after = two_tasks(0.0)
    forgotten = float(after - learned)
    ok = account.error < 1e-5 and held < 0.7 * forgotten and forgotten > 0
    row = [
        f"{package} {part}".strip(),
        importlib.metadata.version(package),
        platform.python_version(),
        jax.__version__,
        f"{account.error:.0e}",
        f"{held:.3f}",
        f"{forgotten:.3f}",
        f"{time.time() - start:.0f}",
        "ok" if ok else "FAILED",
    ]
    print(f"| {' | '.join(row)} |", flush=True)
    if not ok:
        sys.exit(1)
