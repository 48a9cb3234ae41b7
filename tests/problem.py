"""A small nonlinear regression over several tasks, with noise at every step."""

import jax
import jax.numpy as jnp
import optax

import si_jax

STEPS = 30
TASKS = 3


def init(dtype=jnp.float32):
    kernel = jax.random.normal(jax.random.key(0), (4, 3)) / 2
    return {"kernel": kernel.astype(dtype), "bias": jnp.full(3, 0.1, dtype)}


def loss(params, task, step):
    """Each task has its own targets, each step its own batch."""
    key = jax.random.fold_in(jax.random.key(1), step)
    x = jax.random.normal(key, (8, 4), jnp.float32)
    target = jnp.sin(x[:, :3] * (1.0 + task) + task)
    x, target = (a.astype(params["bias"].dtype) for a in (x, target))
    y = jnp.tanh(x @ params["kernel"] + params["bias"][None])
    return jnp.mean(jnp.square(y - target))


grad = jax.jit(jax.grad(loss))


def train(tx, params, *, tasks=TASKS, steps=STEPS, boundary=None, project=None):
    """Run the tasks one after another; return every (grads, params) visited.

    ``boundary(tx, opt_state, params)`` makes the state that the next task starts with,
    ``project(params)`` changes the parameters after each update.
    """
    boundary = boundary or (lambda _, s, p: si_jax.consolidate(s, p))
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    history = []
    for task in range(tasks):
        visited = []
        for step in range(steps):
            grads = grad(params, task, task * steps + step)
            visited.append((grads, params))
            updates, opt_state = update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            if project is not None:
                params = project(params)
        opt_state = boundary(tx, opt_state, params)
        history.append((visited, params, opt_state))
    return history


def lenient(inner):
    """Standard dtype promotion inside optax, which needs it; ours stays strict."""
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        with jax.numpy_dtype_promotion("standard"):
            return inner.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adam": lenient(optax.adam(0.01)),
    "clip+adamw": lenient(
        optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01, weight_decay=0.1))
    ),
    "schedule": lenient(optax.adam(optax.cosine_decay_schedule(0.02, 80))),
    "lion": lenient(optax.lion(0.003)),
    "rmsprop": lenient(optax.rmsprop(0.003, momentum=0.5)),
}

FORMS = {
    "link": lambda inner, *args, **kwargs: optax.chain(
        si_jax.synaptic_intelligence(*args, **kwargs), inner
    ),
    "wrapper": si_jax.with_synaptic_intelligence,
}
