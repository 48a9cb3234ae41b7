r"""Online Laplace with Kronecker factors: what EWC is, but not diagonal.

Ritter, Botev & Barber, "Online Structured Laplace Approximations for Overcoming
Catastrophic Forgetting", NeurIPS 2018 (https://arxiv.org/abs/1805.07810). A diagonal
cannot say that two weights matter together. Of a layer y = Wᵀa the gradient is a gᵀ,
with a its input and g the derivative by its output, so that the Fisher information is
E[aaᵀ ⊗ ggᵀ]. Taken apart as A ⊗ G, with A = E[aaᵀ] and G = E[ggᵀ], it costs two small
matrices a layer, and the penalty is

    c Σ tr(ΔWᵀ A ΔW G),  with ΔW = W − W̃ and c = λ/2,

its gradient 2c A ΔW G. A bias is one more row of W, whose input is 1. Where A and G are
diagonal, this is EWC's penalty with F = diag A (diag G)ᵀ. Parameters that are no matrix
keep EWC's diagonal.

**Several tasks** are one pair a layer: A is summed over them, and G averaged,

    Σ A ⊗ Σ G / T  instead of  Σ (A ⊗ G).

They are equal if A or G is that of every task, and always it is at least 1/T of the
exact sum, since it is that plus the products of one task's A and another's G, all of
them positive semidefinite: whatever one task needs stays held. The pair that is nearest
to the exact sum costs no more (a singular value decomposition of a 2 × 2 matrix), but
drops the smaller of two tasks that need different directions.

**θ̃** becomes the last parameters: they are where the last task's loss and the penalty
before it were smallest together, so that the sum of both has no slope there, and to
second order is the new penalty around them. (EWC's weighted mean adds up expansions of
each task's loss alone. With pairs it is the solution of a linear system as large as the
layer, singular where no task needs anything, for a sum that is not kept.)
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from si_jax import checks, surrogate
from si_jax.pytrees import align, copied, map_states, states, unboxed, wide

_Named = dict[str, jax.Array]


class Layer(NamedTuple):
    """The factors of one kernel, whose axes are of inputs or of outputs.

    Attributes:
      inputs: A; its shape is that of the kernel twice, with 1 in place of its output
        axes: (in, 1, in, 1) for a kernel (in, out).
      outputs: G, likewise (1, out, 1, out).
      bias: the mean input, shaped as half of ``inputs``, by the name of the bias; empty
        for a layer without. With ``tasks`` it is A's column for the bias.
      tasks: T, how many tasks' factors these are. A and the mean input are sums over
        them, G a mean.
    """

    inputs: jax.Array
    outputs: jax.Array
    bias: dict[str, jax.Array]
    tasks: jax.Array


class Factors(NamedTuple):
    """What :func:`si_jax.importance.kronecker` returns.

    Attributes:
      layers: the pairs, by the names of the kernels (``jax.tree_util.keystr``).
      diagonal: the diagonal of the Fisher information of all other parameters but the
        layers' biases, by their names.
    """

    layers: dict[str, Layer]
    diagonal: dict[str, jax.Array]


class KroneckerConsolidationState(NamedTuple):
    """State of :func:`kronecker_consolidation`.

    Attributes:
      factors: those of the finished tasks; changes at a task's end.
      reference: θ̃, the parameters at the last task's end; float32 at least.
      strength: c in force at the last update, a scalar; a record, to be set where the
        transformation is made.
    """

    factors: Factors
    reference: optax.Params
    strength: jax.Array


def kronecker_consolidation(
    strength: ArrayLike, factors: Factors
) -> optax.GradientTransformationExtraArgs:
    r"""Kronecker-factored online Laplace as the first link of an optax chain.

    Adds the gradient of the penalty to that of the task,

    .. math::

      g_W \leftarrow g_W + 2\,c\,A\,(W - \tilde W)\,G,

    and is used as :func:`si_jax.ewc.elastic_weight_consolidation`: pass the gradient of
    the task's loss alone, :func:`consolidate` at every task's end, and keep the link
    behind Synaptic Intelligence's, or inside its wrapper. ``value_fn``, ``grad_fn`` and
    ``obj_fn`` are refused outside of that wrapper.

    A layer of m inputs and n outputs costs m² + n² numbers beside θ̃, and two products
    of matrices at every step.

    Args:
      strength: c = λ/2, at least 0. May be traced.
      factors: what :func:`si_jax.importance.kronecker` will return, or its shapes:
        ``jax.eval_shape(measure, params)`` computes nothing. Its numbers are not used;
        it says which parameters make a layer and which axes are inputs.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` whose state is a
      :class:`KroneckerConsolidationState`.

    Raises:
      ValueError: for a negative ``strength`` (when it is concrete), parameters that
        ``factors`` do not fit, an update without ``params``, with trees that do not fit
        the state or with functions to be evaluated.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from si_jax import importance, kronecker
      >>> def measure(w):
      ...     logits = lambda w, x: jnp.array([1.0, 0.0]) * (x @ w)
      ...     x = jnp.array([[2.0, 2.0]])
      ...     return importance.kronecker(logits, w, x, exact=True)
      >>> w = jnp.zeros(2)
      >>> link = kronecker.kronecker_consolidation(1.0, jax.eval_shape(measure, w))
      >>> tx = optax.chain(link, optax.sgd(0.25))
      >>> opt_state = tx.init(w)
      >>> opt_state = kronecker.consolidate(opt_state, w, measure(w))
      >>> along, across = jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])
      >>> print(tx.update(jnp.zeros(2), opt_state, w + along)[0].round(2))
      [-1. -1.]
      >>> print(tx.update(jnp.zeros(2), opt_state, w + across)[0].round(2) + 0.0)
      [0. 0.]

    References:
      Ritter, Botev & Barber, `Online Structured Laplace Approximations for Overcoming
      Catastrophic Forgetting <https://arxiv.org/abs/1805.07810>`_, NeurIPS 2018
    """
    checks.check_strength(strength)
    strength = checks.frozen(strength)
    if not isinstance(factors, Factors):
        raise ValueError(
            "factors must be what importance.kronecker returns, or its shapes, "
            f"jax.eval_shape(measure, params); got {type(factors).__name__}."
        )
    shapes = jax.eval_shape(lambda f: f, factors)  # not to keep the numbers

    def init_fn(params: optax.Params) -> KroneckerConsolidationState:
        checks.check_real(params)
        reference = jax.tree.map(lambda p: jnp.array(wide(checks.own(p))), params)
        held = jax.eval_shape(
            lambda f: jax.tree.map(wide, _restrict(f, reference)), shapes
        )
        return KroneckerConsolidationState(
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), held),
            reference,
            jnp.array(strength, jnp.result_type(float)),
        )

    def update_fn(
        updates: optax.Updates,
        state: KroneckerConsolidationState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KroneckerConsolidationState]:
        surrogate.refuse_functions(extra_args)
        grads, params = checks.inputs(updates, params, state.reference)
        c = jnp.array(strength, jnp.result_type(checks.scalar(state.strength)))
        stiff = _product(plain(state.factors), _moved(params, state.reference))

        def pulled(path, g):
            pull = stiff[name_of(path)]
            return surrogate.plus(g, 2 * c.astype(pull.dtype) * pull)

        return (
            jax.tree_util.tree_map_with_path(pulled, grads),
            KroneckerConsolidationState(state.factors, state.reference, c),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def consolidate(
    opt_state: optax.OptState, params: optax.Params, factors: Factors
) -> optax.OptState:
    """Close a task: merge its factors, and move θ̃ to the parameters.

    Pure; finds the state by type wherever it sits inside ``opt_state``, as
    :func:`si_jax.consolidate` finds Synaptic Intelligence.

    Args:
      opt_state: the state of an optimizer that contains
        :func:`kronecker_consolidation`.
      params: the parameters at the task's end.
      factors: from :func:`si_jax.importance.kronecker`, for the same layers as those
        that the link was made with. A and G are positive semidefinite; of that only
        their diagonals are checked.

    Returns:
      ``opt_state``, consolidated, of the same structure, shapes and dtypes.

    Raises:
      ValueError: if there is no such state in ``opt_state``, the trees do not fit it,
        or ``factors`` are not finite or have a negative diagonal. Under ``jit`` what is
        traced cannot be refused: it is merged as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import kronecker
      >>> def layer(a, g):
      ...     one = jnp.ones((1, 1, 1, 1))
      ...     return kronecker.Layer(a * one, g * one, {}, jnp.array(1.0))
      >>> first = kronecker.Factors({"": layer(1.0, 4.0)}, {})
      >>> second = kronecker.Factors({"": layer(3.0, 2.0)}, {})
      >>> tx = kronecker.kronecker_consolidation(0.5, first)
      >>> state = tx.init(jnp.zeros((1, 1)))
      >>> state = kronecker.consolidate(state, jnp.ones((1, 1)), first)
      >>> state = kronecker.consolidate(state, jnp.ones((1, 1)), second)
      >>> print(state.factors.layers[""].inputs.sum())  # 1 + 3
      4.0
      >>> print(state.factors.layers[""].outputs.sum())  # (4 + 2) / 2
      3.0
    """

    def merge(state: KroneckerConsolidationState) -> Any:
        checks.scalar(state.strength)
        theta = checks.aligned(params, state.reference, "params")
        old, new = plain(state.factors), _restrict(factors, state.reference)
        _check_fit(new, old)
        _check_values(new)
        leaves = jax.tree.leaves(_merged(old, new))
        return state._replace(
            factors=jax.tree.unflatten(jax.tree.structure(state.factors), leaves),
            reference=copied(theta, state.reference),
        )

    if not states(opt_state, KroneckerConsolidationState):
        raise checks.missing(
            opt_state, "Kronecker factors", "kronecker.kronecker_consolidation"
        )
    return map_states(merge, opt_state, KroneckerConsolidationState)


class Memory(NamedTuple):
    """The factors, θ̃ and c of a penalty, as :class:`si_jax.surrogate.Memory`."""

    factors: Factors
    reference: optax.Params
    strength: jax.Array

    def __call__(self, params: optax.Params) -> jax.Array:
        """The penalty, c Σ tr(ΔWᵀ A ΔW G)."""
        now = align(params, self.reference, "params")
        moved = _moved(now, self.reference)
        stiff = _product(plain(self.factors), moved)
        c = self.strength
        terms = (jnp.sum(moved[k] * stiff[k], dtype=c.dtype) for k in moved)
        return c * sum(terms, jnp.zeros_like(c))


# --- The quadratic form ---------------------------------------------------------------


def _product(factors: Factors, moved: _Named) -> _Named:
    """F Δ, by the names of the parameters: the penalty is c Δ·FΔ, the pull 2c FΔ."""
    found = {}
    for name, f in factors.diagonal.items():
        found[name] = f.astype(moved[name].dtype) * moved[name]
    for name, layer in factors.layers.items():
        delta = moved[name]
        dtype, half = delta.dtype, delta.ndim
        to_matrix, from_matrix = _views(layer, delta.shape)
        rows, columns = (
            x.astype(dtype).reshape(2 * (math.prod(x.shape[:half]),))
            for x in (layer.inputs, layer.outputs)
        )
        w = to_matrix(delta)
        left = _dot(rows, w)
        for bias, mean in layer.bias.items():
            shift, a = moved[bias], mean.astype(dtype).ravel()
            ones = layer.tasks.astype(dtype) * shift.ravel()
            left += jnp.outer(a, shift.ravel())
            pull = _dot(_dot(a, w) + ones, columns)
            found[bias] = pull.reshape(shift.shape)
        found[name] = from_matrix(_dot(left, columns))
    return found


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest")


def _views(layer: Layer, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """From the kernel to (inputs, outputs), and back."""
    half = len(shape)
    outputs = [i for i, n in enumerate(layer.outputs.shape[:half]) if n > 1]
    order = [i for i in range(half) if i not in outputs] + outputs
    back = sorted(range(half), key=order.__getitem__)
    matrix = tuple(math.prod(x.shape[:half]) for x in (layer.inputs, layer.outputs))
    ordered = tuple(shape[i] for i in order)
    return (
        lambda x: x.transpose(order).reshape(matrix),
        lambda x: x.reshape(ordered).transpose(back),
    )


def _merged(old: Factors, new: Factors) -> Factors:
    """The factors of the tasks of both."""

    def layer(old: Layer, new: Layer) -> Layer:
        tasks = old.tasks + new.tasks.astype(old.tasks.dtype)
        share = new.tasks.astype(tasks.dtype) / jnp.where(tasks > 0, tasks, 1)

        def mean(x, y):
            return x + share.astype(x.dtype) * (y.astype(x.dtype) - x)

        return Layer(
            _sum(old.inputs, new.inputs),
            mean(old.outputs, new.outputs),
            jax.tree.map(_sum, old.bias, new.bias),
            tasks,
        )

    return Factors(
        {name: layer(x, new.layers[name]) for name, x in old.layers.items()},
        jax.tree.map(_sum, old.diagonal, new.diagonal),
    )


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y.astype(x.dtype)


def _moved(params: optax.Params, reference: optax.Params) -> _Named:
    """θ − θ̃ by name, float32 at least."""
    delta = jax.tree.map(
        lambda p, r: wide(p) - r.astype(wide(p).dtype), params, reference
    )
    return named(delta)


def named(tree: Any) -> dict[str, Any]:
    """The leaves by name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): leaf for path, leaf in leaves}


def name_of(path: tuple[Any, ...]) -> str:
    """``keystr``, without the last step into a box of nnx, which comes and goes."""
    boxed = path[-1:] == (jax.tree_util.GetAttrKey("value"),)
    return jax.tree_util.keystr(path[:-1] if boxed else path)


# --- Which factors belong to the state ------------------------------------------------


def _restrict(factors: Factors, reference: optax.Params) -> Factors:
    """The factors without what ``optax.masked`` hides from the link."""
    if not isinstance(factors, Factors):
        raise ValueError(
            "factors must be what importance.kronecker returns, got "
            f"{type(factors).__name__}. A diagonal is for ewc.consolidate."
        )
    hidden = [
        name_of(path)
        for path, x in jax.tree_util.tree_leaves_with_path(
            reference, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
        )
        if isinstance(x, optax.MaskedNode)
    ]
    here = named(reference)

    def kept(names: Iterable[str]) -> list[str]:
        return [x for x in names if x in here or not x.startswith(tuple(hidden))]

    layers, diagonal = {}, {k: factors.diagonal[k] for k in kept(factors.diagonal)}
    for name, layer in factors.layers.items():
        biases = kept(layer.bias)
        if kept([name]):
            layers[name] = layer._replace(bias={k: layer.bias[k] for k in biases})
            continue
        for bias in biases:  # without its kernel it has no matrix, but G's diagonal
            g = layer.outputs
            g = jnp.diagonal(g.reshape(2 * (math.prod(g.shape[: g.ndim // 2]),)))
            diagonal[bias] = (layer.tasks * g).reshape(here[bias].shape)
    restricted = Factors(layers, diagonal)
    if here:  # optax.tree.map_params asks with none
        _check_shapes(restricted, here)
    return restricted


_REMAKE = (
    "Make the link and its state with what importance.kronecker measures of this "
    "model: kronecker_consolidation(c, jax.eval_shape(measure, params))."
)


def _check_shapes(factors: Factors, params: _Named) -> None:
    expected = {name: x.shape for name, x in factors.diagonal.items()}
    for name, layer in factors.layers.items():
        half = len(layer.inputs.shape) // 2
        pairs = zip(layer.inputs.shape, layer.outputs.shape, strict=True)
        expected[name] = tuple(max(pair) for pair in pairs)[:half]
        outputs = math.prod(layer.outputs.shape[:half])
        for bias in layer.bias:
            fits = bias in params and params[bias].size == outputs
            expected[bias] = params[bias].shape if fits else (outputs,)
    for name in {**expected, **params}:
        ours = expected.get(name, "none")
        theirs = params[name].shape if name in params else "none"
        if ours != theirs:
            raise ValueError(
                f"factors do not fit params{name}, of shape {theirs}: they are for "
                f"{ours}. {_REMAKE}"
            )


def _check_fit(new: Factors, old: Factors) -> None:
    layouts = [
        {name: jnp.shape(x) for name, x in named(factors).items()}
        for factors in (new, old)
    ]
    for name in {**layouts[0], **layouts[1]}:
        ours, theirs = (layout.get(name, "none") for layout in layouts)
        if ours != theirs:
            raise ValueError(
                f"factors{name} has shape {ours}, but the state was made for {theirs}. "
                f"{_REMAKE}"
            )


def _check_values(factors: Factors) -> None:
    """Refuse what is known to be no number or no positive semidefinite matrix."""
    for name, x in named(factors).items():
        if isinstance(x, jax.core.Tracer):
            continue
        with jax.ensure_compile_time_eval():  # of constants under jit, too
            x = jnp.asarray(x)
            if not jnp.isfinite(x).all():
                raise ValueError(f"factors{name} is not finite: no penalty would be.")
            if name.endswith((".inputs", ".outputs")):
                x = jnp.diagonal(x.reshape(2 * (math.prod(x.shape[: x.ndim // 2]),)))
            if ".bias" not in name and (x < 0).any():
                raise ValueError(
                    f"factors{name} is negative: the penalty would push parameters "
                    "away. Factors are means of outer products; diagonals, of squares."
                )


def plain(factors: Factors) -> Factors:
    """The factors out of the boxes that nnx puts arrays in."""

    def layer(x: Layer) -> Layer:
        bias = {name: unboxed(mean) for name, mean in x.bias.items()}
        return Layer(unboxed(x.inputs), unboxed(x.outputs), bias, unboxed(x.tasks))

    layers = {name: layer(x) for name, x in factors.layers.items()}
    return Factors(layers, {name: unboxed(x) for name, x in factors.diagonal.items()})
