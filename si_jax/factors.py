"""The pass that measures Kronecker factors: a layer's inputs, and its outputs' slopes.

Layers are found in the model's jaxpr: a parameter that is used once, in one
``dot_general`` or ``conv_general_dilated``, is a kernel, and one that is used once, to
be added to such a product that goes nowhere else, is the bias of that layer. On the way
there they may be reshaped, transposed, broadcast and converted, and be inside of
``jit`` and ``jax.checkpoint``. Everything else gets the diagonal: scales, embeddings,
what is used twice or makes up a kernel, grouped convolutions, and what enters a
``scan``, a ``cond`` or a function with a derivative of its own. So a model of Linen,
NNX, Equinox or plain JAX needs no hooks and no names. (kfac-jax registers layers
likewise, by matching patterns of jaxprs, but comes with its optimizer, losses and
dependencies, and its graph matcher is private.)

The jaxpr is then run with zeros added to the outputs of the layers: the derivative by
these zeros is g.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.typing import ArrayLike

from si_jax.examples import check_leaf, number_of, spread
from si_jax.kronecker import Factors, Layer, name_of
from si_jax.pytrees import wide


def kronecker(
    logits: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    inputs: Any,
    key: jax.Array | None = None,
    *,
    exact: bool = False,
    weights: ArrayLike | None = None,
    chunk_size: int = 16,
) -> Factors:
    r"""The Fisher information of a classifier, in Kronecker factors of each layer.

    .. math::

      A = \mathrm{mean}_{i, s}\; a_{is} a_{is}^\top, \qquad
      G = \frac{1}{n} \sum_i \sum_s g_{is} g_{is}^\top

    with a the input of a layer (and 1, if it has a bias), and g the derivative of the
    log-likelihood of example i by its output, labels and ``weights`` as in
    :func:`si_jax.importance.fisher`. A ⊗ G stands for the Fisher information of the
    kernel; it is exact if inputs and derivatives are independent and s is one position.

    A layer that is applied at several positions s (a convolution, whose inputs are
    patches; the tokens of a sequence) is taken as if these were independent: K-FAC's
    *expand* (Grosse & Martens, 2016). A is a mean over the positions that reach the
    likelihood, those whose g is not zero; padding without weight is left out.

    Args:
      logits: ``(params, input) → logits (…, classes)`` of one example, as for
        :func:`si_jax.importance.fisher`.
      params: where to compute it.
      inputs: a tree of arrays ``(n, …)``.
      key: to sample a label for every position from the model.
      exact: given instead of ``key``, the expectation over all labels, at the price of
        a derivative for each, held at once.
      weights: w, ``(n, …)``, as for :func:`si_jax.importance.fisher`.
      chunk_size: how many examples' inputs and derivatives to hold at once.

    Returns:
      A :class:`si_jax.kronecker.Factors`, float32 at least. Parameters that are no
      kernel of a dense, convolutional or attention layer, or used more than once, are
      in its ``diagonal``.

    Raises:
      ValueError: as :func:`si_jax.importance.fisher`.

    Example:
      >>> import jax.numpy as jnp
      >>> from si_jax import importance
      >>> logits = lambda params, x: x @ params["w"] + params["b"]
      >>> params = {"w": jnp.zeros((1, 2)), "b": jnp.zeros(2)}
      >>> x = jnp.array([[1.0], [3.0]])
      >>> factors = importance.kronecker(logits, params, x, exact=True)
      >>> layer = factors.layers["['w']"]
      >>> print(layer.inputs.ravel(), layer.bias["['b']"].ravel())  # E[x²], E[x]
      [5.] [2.]
      >>> print(layer.outputs[0, :, 0].round(2))  # of softmax: diag p − ppᵀ
      [[ 0.25 -0.25]
       [-0.25  0.25]]

    References:
      Grosse & Martens, `A Kronecker-factored approximate Fisher matrix for convolution
      layers <https://arxiv.org/abs/1602.01407>`_, ICML 2016; Ritter, Botev & Barber,
      `Online Structured Laplace Approximations <https://arxiv.org/abs/1805.07810>`_,
      NeurIPS 2018
    """
    if (key is not None) + exact != 1:
        raise ValueError(
            "give either a key, to sample labels from the model, or exact=True."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    n = number_of(inputs=inputs, weights=weights)
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [name_of(path) for path, _ in paths]
    for name, (_, leaf) in zip(names, paths, strict=True):
        check_leaf(f"params{name}", leaf)
    leaves = [jnp.asarray(leaf) for _, leaf in paths]
    w = jnp.ones(n) if weights is None else jnp.asarray(weights)
    keys = None if key is None else jax.random.split(key, n)

    first = jax.eval_shape(lambda t: jax.tree.map(lambda x: x[0], t), inputs)
    program = jax.make_jaxpr(
        lambda leaves, x: logits(jax.tree.unflatten(treedef, leaves), x)
    )(leaves, first)
    layers = _find(program, leaves, first)
    matrices = {i for layer in layers for i in (layer.kernel, layer.bias)}
    loose = [i for i in range(len(leaves)) if i not in matrices]

    def of_one(leaves, example):
        """Layers' (inputs, derivatives) by position, and squares of other leaves."""
        x, weight, label_key = example

        def log_likelihoods(taps, others):
            free = dict(zip(loose, others, strict=True))
            now = [free.get(i, leaf) for i, leaf in enumerate(leaves)]
            run = _Run(now, {s.number: t for s, t in zip(layers, taps, strict=True)})
            (out,) = run(program.jaxpr, program.consts, now + jax.tree.leaves(x))
            out = wide(out)
            at = spread(weight, out.shape).astype(out.dtype)
            # What a position without weight holds is of no account.
            out = jnp.where(at[..., None] == 0, 0, out)
            entered = [run.sites[layer.number].inputs for layer in layers]
            return jax.nn.log_softmax(out), (at, entered)

        taps = [jnp.zeros(s.output.shape, s.output.dtype) for s in layers]
        log_p, pull_back, (at, entered) = jax.vjp(
            log_likelihoods, taps, [leaves[i] for i in loose], has_aux=True
        )
        at = at[..., None]
        if exact:
            each = jnp.eye(log_p.size, dtype=log_p.dtype).reshape(-1, *log_p.shape)
            each *= (at * jnp.exp(log_p / 2))[None]
        else:
            labels = jax.random.categorical(label_key, log_p)
            each = (at * jax.nn.one_hot(labels, log_p.shape[-1], dtype=log_p.dtype))[
                None
            ]
        slopes, gradients = jax.lax.map(pull_back, each)
        slopes = [
            jax.vmap(s.rows)(wide(g)) for s, g in zip(layers, slopes, strict=True)
        ]
        squares = [jnp.square(wide(g)).sum(0) for g in gradients]
        return [wide(a) for a in entered], slopes, squares

    def of_chunk(leaves, chunk):
        entered, slopes, squares = jax.vmap(of_one, (None, 0))(leaves, chunk)
        sums = []
        for a, g in zip(entered, slopes, strict=True):
            reached = jnp.any(g != 0, axis=(1, 3)).astype(a.dtype)[..., None]
            a, g = (a * reached).reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
            sums.append((_square(a), a.sum(0), reached.sum(), _square(g)))
        return sums, [square.sum(0) for square in squares]

    whole = n - n % chunk_size

    @jax.jit
    def total(leaves, examples):
        def part(chunk):
            return of_chunk(leaves, chunk)

        rest = jax.tree.map(lambda x: x[whole:], examples)
        if not whole:
            return part(rest)
        chunks = jax.tree.map(
            lambda x: jnp.reshape(x[:whole], (-1, chunk_size, *x.shape[1:])), examples
        )
        shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], chunks))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        found, _ = jax.lax.scan(
            lambda t, chunk: (jax.tree.map(jnp.add, t, part(chunk)), None),
            zeros,
            chunks,
        )
        return found if whole == n else jax.tree.map(jnp.add, found, part(rest))

    sums, squares = total(leaves, jax.tree.map(jnp.asarray, (inputs, w, keys)))
    found = {}
    for layer, (aa, a, count, gg) in zip(layers, sums, strict=True):
        shape = leaves[layer.kernel].shape
        rows = tuple(1 if i in layer.outs else k for i, k in enumerate(shape))
        columns = tuple(k if i in layer.outs else 1 for i, k in enumerate(shape))
        count = jnp.maximum(count, 1)
        mean = (
            {} if layer.bias is None else {names[layer.bias]: (a / count).reshape(rows)}
        )
        found[names[layer.kernel]] = Layer(
            (aa / count).reshape(2 * rows),
            (gg / n).reshape(2 * columns),
            mean,
            jnp.ones((), gg.dtype),
        )
    return Factors(
        found, {names[i]: x / n for i, x in zip(loose, squares, strict=True)}
    )


def _square(x: jax.Array) -> jax.Array:
    return jnp.matmul(x.T, x, precision="highest")


# --- Layers in a jaxpr ----------------------------------------------------------------
#
# Of a value that is a parameter, or a layer's output, but for its shape, we know which
# axes are which: by axis of the value, the axes of the kernel (or bias) in it, without
# those of length 1. In an output, negative numbers are positions.

_Axes = tuple[tuple[int, ...], ...]
_CALLS = {"jit", "pjit", "closed_call", "checkpoint", "remat", "remat2"}
_SAME = {"convert_element_type", "copy", "copy_p", "reduce_precision"}


class _View(NamedTuple):
    """Parameter ``leaf``, or if ``site`` the output of that site."""

    number: int
    axes: _Axes
    sizes: dict[int, int]
    of_site: bool


class _Site:
    """Where a parameter meets an input."""

    def __init__(self, number, kernel, axes, outs, sizes, inputs):
        self.number, self.kernel, self.axes = number, kernel, axes
        self.outs, self.sizes, self.inputs = outs, sizes, inputs
        self.bias: int | None = None
        self.uses = 0
        self.output: Any = None

    def rows(self, g: jax.Array) -> jax.Array:
        return _rows(g, self.axes, self.sizes)


class _Run:
    """Runs a jaxpr, with taps added to the outputs of sites, and notes what it sees."""

    def __init__(self, leaves: list[Any], taps: dict[int, jax.Array]) -> None:
        self.leaves, self.taps = leaves, taps
        self.sites: list[_Site] = []
        self.uses: dict[int, list[Any]] = {i: [] for i in range(len(leaves))}

    def __call__(self, jaxpr: Any, consts: Any, values: Any) -> list[jax.Array]:
        views: list[_View | None] = []
        for i, leaf in enumerate(self.leaves):
            sizes = {k: size for k, size in enumerate(leaf.shape) if size != 1}
            axes = tuple((k,) if k in sizes else () for k in range(leaf.ndim))
            views.append(_View(i, axes, sizes, False))
        of_input = [False] * len(views) + [True] * (len(values) - len(views))
        views += [None] * (len(values) - len(views))
        outs, marks, _ = self.run(jaxpr, consts, values, views, of_input)
        self.consume(marks)
        return outs

    def run(self, jaxpr, consts, values, views, of_input):
        """The outputs, what is known of them, and whether they depend on the input."""
        ins = zip(values, views, of_input, strict=True)
        known = dict(zip(jaxpr.invars, ins, strict=True))
        known.update(
            (v, (c, None, False)) for v, c in zip(jaxpr.constvars, consts, strict=True)
        )

        def read(variables):
            literal = core.Literal
            found = [
                (v.val, None, False) if isinstance(v, literal) else known[v]
                for v in variables
            ]
            return [list(x) for x in zip(*found, strict=True)] or [[], [], []]

        for eqn in jaxpr.eqns:
            values, views, of_input = read(eqn.invars)
            inner = eqn.params.get("jaxpr")
            if eqn.primitive.name in _CALLS and inner is not None and any(views):
                body = getattr(inner, "jaxpr", inner)
                consts = getattr(inner, "consts", [])
                outs = self.run(body, consts, values, views, of_input)
            else:
                outs = _evaluate(jaxpr, eqn, values)
                outs, marks = self.mark(eqn, values, views, of_input, outs)
                outs = outs, marks, [any(of_input)] * len(outs)
            known.update(zip(eqn.outvars, zip(*outs, strict=True), strict=True))
        return read(jaxpr.outvars)

    def mark(self, eqn, values, views, of_input, outs):
        """What is known of the outputs of an operation; sites get their taps."""
        nothing = [None] * len(outs)
        if not any(views):
            return outs, nothing
        if len(views) == 1 and len(outs) == 1:
            axes = _reshaped(eqn, views[0], outs[0].shape)
            if axes is not None:
                return outs, [views[0]._replace(axes=axes)]
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated") and len(views) == 2:
            find = _of_dot if name == "dot_general" else _of_convolution
            for k, view in enumerate(views):
                if view is None or view.of_site or not self.is_whole(view, values[k]):
                    continue
                other = views[1 - k]
                if not of_input[1 - k]:  # the kernel is made of this parameter
                    continue
                found = find(eqn.params, values[1 - k], view, k, outs[0].ndim)
                if found is not None:
                    self.consume([other])
                    a, axes = found
                    return self.add_site(view, a, axes, outs[0])
        if name == "add" and all(views) and views[0].of_site != views[1].of_site:
            output, bias = sorted(views, key=lambda v: not v.of_site)
            self.sites[output.number].uses += 1
            self.uses[bias.number].append(
                ("bias", output.number) if self.is_bias(output, bias) else None
            )
            return outs, nothing
        self.consume(views)
        return outs, nothing

    def add_site(self, view, a, axes, out):
        outs = {k for group in axes for k in group if k >= 0}
        number = len(self.sites)
        sizes = dict(view.sizes)
        for axis, group in enumerate(axes):
            if group and group[0] < 0:
                sizes[group[0]] = out.shape[axis]
        site = _Site(number, view.number, axes, outs, sizes, a)
        site.output = jax.ShapeDtypeStruct(out.shape, out.dtype)
        self.sites.append(site)
        self.uses[view.number].append(("kernel", number))
        if number in self.taps:
            out = out + self.taps[number]
        return [out], [_View(number, axes, sizes, True)]

    def is_whole(self, view, value):
        """Whether every entry of the parameter is in the view once."""
        return math.prod(value.shape) == math.prod(self.leaves[view.number].shape) and (
            sorted(k for group in view.axes for k in group) == sorted(view.sizes)
        )

    def is_bias(self, output, bias):
        """Whether this adds the same to every position, in the order of the outputs."""
        ours: list[int] = []
        theirs: list[int] = []
        for y, b in zip(output.axes, bias.axes, strict=True):
            features = [k for k in y if k >= 0]
            if len(features) != len(y) and (features or b):
                return False
            sizes = [output.sizes[k] for k in features], [bias.sizes[k] for k in b]
            if math.prod(sizes[0]) != math.prod(sizes[1]):
                return False
            ours, theirs = ours + features, theirs + list(b)
        outs = sorted(self.sites[output.number].outs)
        return ours == outs and theirs == sorted(bias.sizes)

    def consume(self, views):
        for view in filter(None, views):
            if view.of_site:
                self.sites[view.number].uses += 1
            else:
                self.uses[view.number].append(None)


def _find(program: Any, leaves: list[jax.Array], x: Any) -> list[_Site]:
    """The layers: kernels that are used once, with the biases that are."""
    run = _Run(leaves, {})
    jax.eval_shape(
        lambda *values: run(program.jaxpr, program.consts, list(values)),
        *leaves,
        *jax.tree.leaves(x),
    )
    for leaf, uses in run.uses.items():
        if len(uses) == 1 and uses[0] is not None and uses[0][0] == "bias":
            site = run.sites[uses[0][1]]
            site.bias = leaf if site.uses == 1 else None
    return [
        run.sites[uses[0][1]]
        for uses in run.uses.values()
        if len(uses) == 1 and uses[0] is not None and uses[0][0] == "kernel"
    ]


def _evaluate(jaxpr: Any, eqn: Any, values: list[Any]) -> list[jax.Array]:
    """One equation, as a program of its own: with its own derivative, if it has one."""
    given = {
        v: x
        for v, x in zip(eqn.invars, values, strict=True)
        if not isinstance(v, core.Literal)
    }
    one = core.Jaxpr([], list(given), eqn.outvars, [eqn], eqn.effects, jaxpr.debug_info)
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(one, []))(*given.values()))


def _reshaped(eqn: Any, view: _View, shape: tuple[int, ...]) -> _Axes | None:
    """The axes of a view after an operation that moves its entries alone."""
    name = eqn.primitive.name
    if name in _SAME:
        return view.axes
    if name == "transpose":
        return tuple(view.axes[k] for k in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        axes: list[tuple[int, ...]] = [()] * len(shape)
        for old, new in enumerate(eqn.params["broadcast_dimensions"]):
            axes[new] = view.axes[old]
        return tuple(axes)
    if name == "squeeze" or (
        name == "reshape" and eqn.params.get("dimensions") is None
    ):
        return _regroup(view, shape)
    return None


def _regroup(view: _View, shape: tuple[int, ...]) -> _Axes | None:
    rest = [k for group in view.axes for k in group]
    axes = []
    for n in shape:
        group, size = [], 1
        while size < n and rest:
            group.append(rest.pop(0))
            size *= view.sizes[group[-1]]
        if size != n:
            return None
        axes.append(tuple(group))
    return None if rest else tuple(axes)


def _of_dot(params, other, view, k, _):
    """The inputs (positions, features) of a product, and the axes of its output."""
    contracting, batch = params["dimension_numbers"]
    if batch[k]:
        return None
    ours, theirs = contracting[k], contracting[1 - k]
    free = [i for i in range(other.ndim) if i not in theirs]
    positions = [(-1 - i,) if other.shape[i] != 1 else () for i in free]
    axes = dict(zip(free, positions, strict=True))
    axes |= {i: view.axes[j] for i, j in zip(theirs, ours, strict=True)}
    a = _rows(other, [axes[i] for i in range(other.ndim)], view.sizes)
    features = [view.axes[j] for j in range(len(view.axes)) if j not in ours]
    return a, tuple(positions + features if k == 1 else features + positions)


def _of_convolution(params, other, view, k, ndim):
    """Its inputs are patches."""
    numbers = params["dimension_numbers"]
    if k != 1 or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    out, channel, *window = numbers.rhs_spec
    shape = [math.prod(view.sizes[i] for i in view.axes[j]) for j in window]
    patches = jax.lax.conv_general_dilated_patches(
        other,
        shape,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        numbers,
        precision=jax.lax.Precision.HIGHEST,
    )
    features = tuple(i for j in (channel, *window) for i in view.axes[j])
    at = numbers.out_spec[1]
    spatial = [(-1 - i,) if patches.shape[i] != 1 else () for i in range(ndim)]
    a = _rows(
        patches, [features if i == at else x for i, x in enumerate(spatial)], view.sizes
    )
    return a, tuple(view.axes[out] if i == at else x for i, x in enumerate(spatial))


def _rows(x: jax.Array, axes: Any, sizes: dict[int, int]) -> jax.Array:
    """``x`` as (positions, features), the features in the order of the kernel."""
    inner = [i for i, group in enumerate(axes) if group and group[0] >= 0]
    outer = [i for i in range(x.ndim) if i not in inner]
    tokens = [k for i in inner for k in axes[i]]
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    rows = math.prod(x.shape[i] for i in outer)
    x = x.transpose(outer + inner).reshape(rows, *(sizes[k] for k in tokens))
    return x.transpose(0, *(1 + i for i in order)).reshape(rows, -1)
