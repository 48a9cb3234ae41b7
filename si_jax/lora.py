r"""Low-rank adapters held by their product: EWC-LoRA, in a state as thin as they are.

An adapter A (m, r), B (r, n) adds ΔW = A B to a weight. What a task needs is ΔW, not A
and B: twice A with half of B is the same network, and where B = 0, as adapters begin,
the gradient by A is zero, so that an importance of A and B apart holds no A at all.
Here F is the importance of ΔW, which is that of the weight beside it, as both have one
gradient, and the penalty is eq. 4 of the products,

    c Σ F (A B − Ã B̃)²,

whose gradient reaches A and B through the chain rule.

F would be as large as the weight. Of it are kept the sums of its rows R = Σ_j F_ij and
of its columns C = Σ_i F_ij, as Adafactor does: R Cᵀ / ΣF has the same sums, and of all
F that have them the largest entropy. With it, and with A B − Ã B̃ taken
as P Q, where P = [A − Ã, Ã] and Q = [B; B − B̃] are as thin as the adapters, the
penalty is

    c tr(Pᵀ diag(R) P · Q diag(C) Qᵀ) / ΣF,

two matrices of 2r × 2r: ΔW is never made.

**Several tasks**: R and C are summed, which is exact for sums of F; θ̃ becomes the last
parameters, as in :mod:`si_jax.kronecker` and for its reason.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from si_jax import checks, surrogate
from si_jax.kronecker import name_of, named
from si_jax.pytrees import align, copied, map_states, states, unboxed, wide


class Pair(NamedTuple):
    """What is kept of the importance of one product A B, summed over the tasks.

    Attributes:
      rows: R ``(…, m)``, by the name of A (``jax.tree_util.keystr``).
      columns: C ``(…, n)``, by the name of B.
    """

    rows: dict[str, jax.Array]
    columns: dict[str, jax.Array]


class ProductConsolidationState(NamedTuple):
    """State of :func:`product_consolidation`.

    Attributes:
      pairs: the importance of each product, by the adapter's name; changes at a task's
        end.
      reference: θ̃, the parameters at the last task's end; float32 at least.
      strength: c in force at the last update, a scalar; a record, to be set where the
        transformation is made.
    """

    pairs: dict[str, Pair]
    reference: optax.Params
    strength: jax.Array


def product_consolidation(
    strength: ArrayLike, left: str = "lora_a", right: str = "lora_b"
) -> optax.GradientTransformationExtraArgs:
    r"""Adapters held by their product A B, as the first link of an optax chain.

    Adds the gradient of the penalty to that of the task: with F = R Cᵀ / ΣF,

    .. math::

      S = F \odot (A B - \tilde A \tilde B), \qquad
      g_A \leftarrow g_A + 2\,c\,S B^\top, \qquad
      g_B \leftarrow g_B + 2\,c\,A^\top S,

    and is used as :func:`si_jax.ewc.elastic_weight_consolidation`: pass the gradient of
    the task's loss alone, :func:`consolidate` at every task's end, and keep the link
    behind Synaptic Intelligence's, or inside its wrapper. ``value_fn``, ``grad_fn`` and
    ``obj_fn`` are refused outside of that wrapper.

    An adapter is two parameters side by side, A ``(…, m, r)`` and B ``(…, r, n)``; axes
    before the last two are stacked layers. It costs m + n numbers beside θ̃. Parameters
    that are in no adapter are free, a head, say; ``optax.masked`` spares their θ̃, and
    another link holds them.

    Args:
      strength: c = λ/2, at least 0. May be traced.
      left: what A is called, or what its name ends with after a ``_``
        (``kernel_lora_a``).
      right: likewise B.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` whose state is a
      :class:`ProductConsolidationState`.

    Raises:
      ValueError: for a negative ``strength`` (when it is concrete), one name for A and
        B, parameters without an adapter, half of one or two that cannot be multiplied,
        an update without ``params``, with trees that do not fit the state or with
        functions to be evaluated.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from si_jax import lora
      >>> tx = optax.chain(lora.product_consolidation(0.5, "A", "B"), optax.sgd(0.1))
      >>> params = {"body": {"A": jnp.ones((2, 1)), "B": jnp.ones((1, 2))}}
      >>> F = jnp.array([[3.0, 0.0], [0.0, 0.0]])  # W[0, 0] alone is needed
      >>> opt_state = lora.consolidate(tx.init(params), params, {"body": F})
      >>> def pulled(A, B):
      ...     now = {"body": {"A": jnp.array(A), "B": jnp.array(B)}}
      ...     zero = jax.tree.map(jnp.zeros_like, now)
      ...     return tx.update(zero, opt_state, now)[0]["body"]["A"].ravel()
      >>> print(pulled([[2.0], [1.0]], [[0.5, 0.5]]) + 0.0)  # 2 × 0.5 is as good
      [0. 0.]
      >>> print(pulled([[2.0], [1.0]], [[1.0, 1.0]]))  # −0.1 × 2 × 0.5 × 3 × (2 − 1)
      [-0.3 -0. ]

    References:
      `EWC-LoRA <https://arxiv.org/abs/2602.17559>`_, ICLR 2026; the sums are those of
      Shazeer & Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, ICML 2018
    """
    checks.check_strength(strength)
    if left == right:
        raise ValueError(f"left and right are the names of A and B, both are {left}.")
    strength = checks.frozen(strength)

    def init_fn(params: optax.Params) -> ProductConsolidationState:
        checks.check_real(params)
        reference = jax.tree.map(lambda p: jnp.array(wide(checks.own(p))), params)
        return ProductConsolidationState(
            _unimportant(reference, left, right),
            reference,
            jnp.array(strength, jnp.result_type(float)),
        )

    def update_fn(
        updates: optax.Updates,
        state: ProductConsolidationState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProductConsolidationState]:
        surrogate.refuse_functions(extra_args)
        grads, params = checks.inputs(updates, params, state.reference)
        c = jnp.array(strength, jnp.result_type(checks.scalar(state.strength)))
        penalty = surrogate.Penalty(Memory(state.pairs, state.reference, c))
        pull = jax.grad(penalty)(jax.tree.map(wide, params))
        return (
            jax.tree.map(surrogate.plus, grads, pull),
            ProductConsolidationState(state.pairs, state.reference, c),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def consolidate(
    opt_state: optax.OptState, params: optax.Params, importance: dict[str, ArrayLike]
) -> optax.OptState:
    """Close a task: add what its products need, and move θ̃ to the parameters.

    Pure; finds the state by type wherever it sits inside ``opt_state``, as
    :func:`si_jax.consolidate` finds Synaptic Intelligence. To hold what a network knew
    before its adapters, give it their first state and first parameters.

    Args:
      opt_state: the state of an optimizer that contains :func:`product_consolidation`.
      params: the parameters at the task's end.
      importance: by adapter the importance ``(…, m, n)`` of A B, at least 0: that of
        the weight beside it, from :func:`si_jax.importance.fisher`, say, with the
        adapters in place. If not A B but s A B is added, times s². An adapter's name is
        its path, and what A's name has before ``_`` and ``left``: ``block/dense``, or
        ``block/dense/kernel``; ``""`` of one that is the whole tree.

    Returns:
      ``opt_state``, consolidated, of the same structure, shapes and dtypes.

    Raises:
      ValueError: if there is no such state in ``opt_state``, the trees do not fit it,
        or ``importance`` is negative or not finite. Under ``jit`` what is traced cannot
        be refused: it is added as it is, and NaN then shows in every update.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import lora
      >>> tx = lora.product_consolidation(0.5, "A", "B")
      >>> params = {"A": jnp.zeros((2, 1)), "B": jnp.zeros((1, 2))}
      >>> F = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> state = lora.consolidate(tx.init(params), params, {"": F})
      >>> print(*state.pairs[""].rows.values(), *state.pairs[""].columns.values())
      [3. 7.] [4. 6.]
    """

    def merge(state: ProductConsolidationState) -> Any:
        checks.scalar(state.strength)
        theta = checks.aligned(params, state.reference, "params")
        old = plain(state.pairs)
        new = _sums(importance, old)
        leaves = jax.tree.leaves(jax.tree.map(jnp.add, old, new))
        return state._replace(
            pairs=jax.tree.unflatten(jax.tree.structure(state.pairs), leaves),
            reference=copied(theta, state.reference),
        )

    if not states(opt_state, ProductConsolidationState):
        raise checks.missing(
            opt_state, "products of adapters", "lora.product_consolidation"
        )
    return map_states(merge, opt_state, ProductConsolidationState)


class Memory(NamedTuple):
    """R, C, θ̃ and c of a penalty, as :class:`si_jax.surrogate.Memory`."""

    pairs: dict[str, Pair]
    reference: optax.Params
    strength: jax.Array

    def __call__(self, params: optax.Params) -> jax.Array:
        """The penalty, c Σ F (A B − Ã B̃)²."""
        now = named(align(params, self.reference, "params"))
        reference, c = named(self.reference), self.strength

        def moved(name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
            theta = wide(now[name])
            ref = reference[name].astype(theta.dtype)
            return theta, ref, theta - ref

        total = jnp.zeros_like(c)
        for rows, columns in plain(self.pairs).values():
            ((a, r),), ((b, s),) = rows.items(), columns.items()
            (_, before, by_a), (now_b, _, by_b) = moved(a), moved(b)
            # No difference of large numbers: each half is as small as its move.
            p = jnp.concatenate([by_a, before], axis=-1)
            q = jnp.concatenate([now_b, by_b], axis=-2)
            r, s = r.astype(p.dtype), s.astype(p.dtype)
            over = r.sum(-1)[..., None, None]
            inner = _dot(p.mT, r[..., :, None] * p) / jnp.where(over > 0, over, 1)
            outer = _dot(q * s[..., None, :], q.mT)
            total += jnp.sum(inner * outer, dtype=c.dtype)
        return c * total


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest")


# --- Which parameters are adapters ----------------------------------------------------


def _unimportant(params: optax.Params, left: str, right: str) -> dict[str, Pair]:
    """Zeros for every adapter, by its name."""
    halves: dict[str, dict[str, tuple[str, jax.Array]]] = {left: {}, right: {}}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = name_of(path)
        boxed = name != jax.tree_util.keystr(path)
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        *parents, last = keys[:-1] if boxed else keys or [""]
        for half, found in halves.items():
            if last == half or last.endswith(f"_{half}"):
                stem = last[: -len(half)].removesuffix("_")
                adapter = "/".join([*parents, stem] if stem else parents)
                if adapter in found:
                    raise ValueError(
                        f"params{found[adapter][0]} and params{name} would both be of "
                        f"the adapter {adapter}: rename one."
                    )
                found[adapter] = name, x
    lone = sorted(halves[left].keys() ^ halves[right].keys())
    if lone or not halves[left]:
        where = f"in {lone[0] or 'params'} one is alone" if lone else "there are none"
        raise ValueError(
            f"An adapter is two parameters side by side, {left} and {right}: {where}. "
            "Name A and B as params does: product_consolidation(c, left, right)."
        )
    pairs = {}
    for name, (a, x) in halves[left].items():
        b, y = halves[right][name]
        if x.ndim < 2 or x.shape[:-2] + x.shape[-1:] != y.shape[:-1]:
            raise ValueError(
                f"params{a} of shape {x.shape} and params{b} of shape {y.shape} are no "
                "adapter (…, m, r), (…, r, n): if ΔW is the other one's product with "
                "this one, exchange left and right."
            )
        rows, columns = jnp.zeros(x.shape[:-1], x.dtype), jnp.zeros_like(y[..., 0, :])
        pairs[name] = Pair({a: rows}, {b: columns})
    return pairs


def _sums(importance: Any, pairs: dict[str, Pair]) -> dict[str, Pair]:
    """Those of the rows and columns of F, for the pairs."""
    if not isinstance(importance, dict) or importance.keys() != pairs.keys():
        got = list(importance) if isinstance(importance, dict) else type(importance)
        raise ValueError(
            "importance must be a dict of the importance of A B by the adapter's name, "
            f"{list(pairs)}; got {got}."
        )

    def shape(pair: Pair) -> tuple[int, ...]:
        ((rows,), (columns,)) = pair.rows.values(), pair.columns.values()
        return (*rows.shape, columns.shape[-1])

    for name, f in importance.items():
        if jnp.shape(f) != shape(pairs[name]):
            raise ValueError(
                f"importance[{name!r}] has shape {jnp.shape(f)}, but A B is "
                f"{shape(pairs[name])}."
            )
    sums = {}
    for name, f in checks.importances(importance, importance).items():
        rows, columns = pairs[name]
        sums[name] = Pair(
            {a: jnp.sum(f, -1, dtype=x.dtype) for a, x in rows.items()},
            {b: jnp.sum(f, -2, dtype=x.dtype) for b, x in columns.items()},
        )
    return sums


def plain(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """The sums out of the boxes that nnx puts arrays in."""
    return {
        name: Pair(*({key: unboxed(x) for key, x in kept.items()} for kept in pair))
        for name, pair in pairs.items()
    }
