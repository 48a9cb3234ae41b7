"""Fine-tuning a language model without forgetting: ``python -m experiments.finetune``.

A model of bytes is pretrained on an old text and fine-tuned on a new one, without the
old one or with it, by several methods. How much each keeps for how much it learns is
the question; its strength, or when it stops, is the answer.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure

import si_jax
from experiments import benchmark, figures
from experiments.data import texts
from experiments.engine import command, driver, programs
from experiments.engine.driver import Method
from experiments.engine.record import Record, count, is_first, statistics
from experiments.engine.tables import DIVERGED, aligned, best, number, over_seeds
from experiments.networks.transformer import Transformer, functional
from experiments.split_mnist import check_strengths
from experiments.training import language
from experiments.training.boundaries import consolidate
from experiments.training.language import Stage, Texts
from experiments.training.loop import Boundary, Carry, Learner
from si_jax import ewc, importance, metrics, sweep

Name = Literal[
    "fine-tuning",
    "slow",
    "l2",
    "ewc",
    "mas",
    "si",
    "si fisher",
    "slow si",
    "slow si fisher",
    "lora",
    "lora si",
    "mixed",
]
Memory = Literal["si", "ewc"] | None
PRETRAINING = "pretraining"
HELD_OUT = 0.1


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Fine-tune a small language model on a new text; what does it keep of the old?"""

    methods: tuple[Name, ...] = get_args(Name)
    """What to run; more can be added later in the same --out."""
    seeds: int = 3
    """Runs of each method, with the seeds 0, 1, …; more can be added later."""
    old: tuple[Path, ...] = ()
    """Files to pretrain on; by default the help that Python ships."""
    new: tuple[Path, ...] = ()
    """Files to fine-tune on; by default source code that Python ships."""
    third: tuple[Path, ...] = ()
    """Files to fine-tune on after that; by default tables that Python ships."""
    text_bytes: int = 400_000
    """Of each text, the first; the last tenth of them is held out."""
    width: int = 128
    """Of the network's vectors."""
    layers: int = 3
    """Of the network."""
    heads: int = 4
    """Of attention."""
    length: int = 128
    """Bytes of a sequence."""
    batch_size: int = 16
    """Sequences a step."""
    micro_batch: int = 0
    """Parts of a batch to take one by one, for less memory; 0: all at once."""
    learning_rate: float = 1e-3
    """Adam's; in pretraining it rises to it and falls to a tenth."""
    pretraining_steps: int = 3000
    """On the old text."""
    steps: int = 256
    """On the new text."""
    third_steps: int = 256
    """On the third text, of each method's best strength; 0: leave it out."""
    stops: int = 6
    """Points where fine-tuning is evaluated: after all steps, a half, a quarter, …"""
    epochs: int = 4
    """Parts that the steps are cut into, for progress and checkpoints."""
    evaluated: int = 128
    """Sequences to evaluate on, of each half of a text's held-out tenth."""
    damping: float = 1e-3
    """ξ of eq. 5."""
    fisher_examples: int = 128
    """Sequences of a text, for the Fisher information and for MAS."""
    slow_factors: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Of the learning rate, for fine-tuning with a smaller one, a method each."""
    l2_strengths: tuple[float, ...] = (0.01, 0.03, 0.1, 1.0)
    """c of L2 to the pretrained weights, a method each."""
    fisher_strengths: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3)
    """c of what takes half the Fisher information: ewc, si fisher, lora si."""
    mas_strengths: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1)
    """c of MAS."""
    si_strengths: tuple[float, ...] = (0.1, 1.0, 3.0, 10.0)
    """c of SI with its own Ω, from the pretraining."""
    slow_si_factor: float = 0.1
    """Of the learning rate, for SI with a smaller one."""
    lora_rank: int = 8
    """Of the adapters."""
    state_dtype: Literal["bfloat16"] | None = None
    """Of SI's Ω and θ̃; None is the parameters' float32."""
    cost_turns: int = 5
    """How often to time each method's step, in turn; 0: leave it out."""
    sha256: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Of the texts, to be found out."""

    PICKS: ClassVar[tuple[str, ...]] = (
        "methods",
        "cost_turns",
        "seeds",
        "slow_factors",
        "l2_strengths",
        "fisher_strengths",
        "mas_strengths",
        "si_strengths",
    )

    def __post_init__(self):
        """Refuse values that make no sense."""
        self.check(
            positive=("learning_rate", "damping", "slow_si_factor"),
            at_least_1=(
                *("seeds", "text_bytes", "width", "layers", "heads", "length"),
                *("batch_size", "pretraining_steps", "steps", "stops", "epochs"),
                *("evaluated", "fisher_examples", "lora_rank"),
            ),
        )
        for name in ("l2", "fisher", "mas", "si"):
            check_strengths(f"{name}_strengths", getattr(self, f"{name}_strengths"))
        check_strengths("slow_factors", self.slow_factors)
        if not self.methods:
            raise ValueError("methods must name at least one")
        for name in ("micro_batch", "third_steps", "cost_turns"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch must divide batch_size: {self.micro_batch}, "
                f"{self.batch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"heads must divide width: {self.heads}, {self.width}")
        for name, parts in (
            ("pretraining_steps", self.epochs),
            ("steps", self.epochs * 2 ** (self.stops - 1)),
            ("third_steps", self.epochs * 2 ** (self.stops - 1)),
        ):
            if getattr(self, name) % parts:
                raise ValueError(
                    f"{name} must be a multiple of {parts} (epochs, times 2 for each "
                    f"of the stops before the last), got {getattr(self, name)}"
                )
        if bool(self.old) != bool(self.new):
            raise ValueError("--old and --new go together")


# --- The texts ------------------------------------------------------------------------


def load(config: Config) -> dict[str, bytes]:
    """The texts by name, in the order in which they are learned.

    Raises:
      UserError: if one cannot be read, is too short, or is the same as another.
    """
    found = {}
    for name, files, default in (
        ("old", config.old, "prose"),
        ("new", config.new, "code"),
        ("third", config.third, "tables"),
    ):
        if files:
            found[name] = texts.read(files)
        elif name != "third" or not config.old:
            found[name] = texts.shipped(default)
    if not config.third_steps:
        found.pop("third", None)
    found = {name: text[: config.text_bytes] for name, text in found.items()}
    texts.check(found, least=round(2 * (config.length + 1) / HELD_OUT) + 1)
    return found


def titles(config: Config) -> dict[str, str]:
    """What to call each text."""
    if config.old:
        return {"old": "old text", "new": "new text", "third": "third text"}
    return {"old": "prose", "new": "code", "third": "tables"}


def join(contents: Sequence[bytes]) -> Texts:
    """The texts as arrays, with the last tenth of each held out."""
    return language.join([texts.bytes_of(x) for x in contents], HELD_OUT)


def halves(contents: Sequence[bytes], config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Windows of each text's held-out tenth: of its first half, and of its second.

    Returns:
      Where they start, twice int32 ``(texts, windows)``.
    """
    joined = join(contents)
    starts: list[list[np.ndarray]] = [[], []]
    for begin, trained, content in zip(
        joined.begin, joined.size, contents, strict=True
    ):
        half = (len(content) - trained) // 2
        for i in range(2):
            at, window = begin + trained + i * half, config.length + 1
            starts[i].append(language.spread(at, half, config.evaluated, window))
    return np.stack(starts[0]), np.stack(starts[1])


def make_problem(contents: Sequence[bytes], config: Config) -> programs.Problem:
    """What is evaluated: the half to choose on, and the one to report."""
    joined = join(contents)
    choose, report = halves(contents, config)
    return programs.Problem(joined, joined, choose, report, second="choice")


@functools.cache  # asked for again, it is the same object, and so compiled once
def on(
    config: Config, which: tuple[int, ...], steps: tuple[int, ...]
) -> Callable[[programs.Problem], programs.Problem]:
    """To learn some of the texts, in equal shares, stage after stage of so many steps.

    Returns:
      From the experiment's problem to that of a method.
    """

    def learns(problem: programs.Problem) -> programs.Problem:
        count = len(problem.train_tasks)
        shares = np.isin(np.arange(count), which).astype(np.float32)
        stages = Stage(
            np.tile(shares / shares.sum(), (len(steps), 1)),
            np.array(steps, np.int32) // config.epochs,
        )
        return problem._replace(stages=stages)

    return learns


def stops(steps: int, config: Config) -> list[int]:
    """After how many steps fine-tuning is evaluated."""
    return [steps // 2**k for k in reversed(range(config.stops))]


# --- The methods ----------------------------------------------------------------------


class Network(NamedTuple):
    """A language model as pure functions, all of it trained or its adapters."""

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    adapted: bool

    def logits(self, base: Any) -> language.Logits:
        """Of the parameters that are trained; ``base`` are the others, if any."""
        if not self.adapted:
            return self.apply
        return lambda params, text: self.apply(params, base, text)


def network(config: Config, lora_rank: int = 0) -> Network:
    """The transformer; with adapters these alone are trained."""

    def make(key: jax.Array) -> Transformer:
        return Transformer(
            config.width,
            layers=config.layers,
            heads=config.heads,
            length=config.length,
            lora_rank=lora_rank,
            rngs=nnx.Rngs(key),
        )

    trained = (nnx.LoRAParam,) if lora_rank else ()
    return Network(*functional(make, *trained), adapted=bool(lora_rank))


Importance = Callable[[language.Logits, Any, jax.Array, jax.Array], Any]
"""``(logits, params, windows, key) → importance``, a tree like ``params``."""


def half_fisher(logits: Any, params: Any, windows: Any, key: jax.Array) -> Any:
    """Half the Fisher information of a mean over a sequence's bytes."""
    windows = windows[:, :-1]
    found = importance.fisher(logits, params, windows, key)
    return jax.tree.map(lambda f: f / (2 * windows.shape[-1]), found)


def sensitivity(logits: Any, params: Any, windows: Any, key: jax.Array) -> Any:
    """MAS, of the mean over a sequence's bytes."""
    del key
    windows = windows[:, :-1]

    def outputs(params, window):
        return logits(params, window) / windows.shape[-1] ** 0.5

    return importance.sensitivity(outputs, params, windows)


def ones(logits: Any, params: Any, windows: Any, key: jax.Array) -> Any:
    """L2: every parameter is as important."""
    del logits, windows, key
    return jax.tree.map(jnp.ones_like, params)


class Family(NamedTuple):
    """Methods that differ in strength alone.

    Attributes:
      memory: SI's, or EWC's, whatever the importance; or none.
      importance: what is put in for a text that was learned; for SI after the
        pretraining there is none, as it has its own.
      strengths: c, a method each, or without memory a factor of the learning rate; of
        none, one that is evaluated at every stop.
      rate: a factor of the learning rate, for all of them.
      lora: train adapters alone.
      mixed: train on the old texts, too.
    """

    memory: Memory = None
    importance: Importance | None = None
    strengths: tuple[float, ...] = ()
    rate: float = 1.0
    lora: bool = False
    mixed: bool = False


def families(config: Config) -> dict[str, Family]:
    """What the configuration compares."""
    fisher, slow = config.fisher_strengths, config.slow_si_factor
    every = {
        "fine-tuning": Family(),
        "slow": Family(strengths=config.slow_factors),
        "l2": Family("ewc", ones, config.l2_strengths),
        "ewc": Family("ewc", half_fisher, fisher),
        "mas": Family("ewc", sensitivity, config.mas_strengths),
        "si": Family("si", None, config.si_strengths),
        "si fisher": Family("si", half_fisher, fisher),
        "slow si": Family("si", None, config.si_strengths, slow),
        "slow si fisher": Family("si", half_fisher, fisher, slow),
        "lora": Family(lora=True),
        "lora si": Family("si", half_fisher, fisher, lora=True),
        "mixed": Family(mixed=True),
    }
    return {name: every[name] for name in config.methods}


def optimizer(
    config: Config,
    memory: Memory,
    strength: jax.typing.ArrayLike,
    damping: jax.typing.ArrayLike,
    rate: float = 1.0,
) -> optax.GradientTransformation:
    """Adam with a memory of a strength, which without one multiplies the rate."""
    rate = config.learning_rate * rate
    if not memory:
        return optax.adam(rate * strength)
    adam = optax.adam(rate)
    if memory == "si":
        return si_jax.with_synaptic_intelligence(
            adam, strength, damping, state_dtype=config.state_dtype
        )
    return optax.chain(ewc.elastic_weight_consolidation(strength), adam)


@functools.cache
def go_on(
    config: Config, memory: Memory, lora: bool, rate: float = 1.0
) -> Callable[..., Learner]:
    """The pieces of a run that goes on from ``start``, one for each run."""
    net = network(config, config.lora_rank if lora else 0)

    def make(
        strength: jax.Array, damping: jax.Array, start: Carry, base: Any = None
    ) -> Learner:
        tx = optimizer(config, memory, strength, damping, rate)
        return bind(config, net.logits(base), tx, lambda _: start)

    return make


def pretraining(config: Config) -> Method:
    """A fresh network on the old text, with SI to measure what it takes."""
    net, steps = network(config), config.pretraining_steps
    rate = optax.warmup_cosine_decay_schedule(
        0, config.learning_rate, steps // 20, steps, config.learning_rate / 10
    )

    def make(strength: jax.Array, damping: jax.Array) -> Learner:
        tx = si_jax.with_synaptic_intelligence(optax.adam(rate), strength, damping)

        def start(key: jax.Array) -> Carry:
            params = net.init(key)
            return Carry(params, tx.init(params))

        return bind(config, net.apply, tx, start, [consolidate])

    return Method(make, learns=on(config, (0,), (steps,)))


def bind(
    config: Config,
    logits: language.Logits,
    tx: optax.GradientTransformation,
    start: Callable[[jax.Array], Carry],
    boundary: Sequence[Boundary] = (),
) -> Learner:
    """The pieces of a run with the configuration's batches."""
    return language.learner(
        logits,
        tx,
        start,
        batch_size=config.batch_size,
        length=config.length,
        boundary=boundary,
        micro_batch=config.micro_batch,
    )


# --- From one text to the next --------------------------------------------------------


class Study(NamedTuple):
    """The methods, and what they are run on.

    Attributes:
      config: the experiment's.
      problem: the texts.
      record: what was found.
      methods: by name, of every strength.
    """

    config: Config
    problem: programs.Problem
    record: Record
    methods: dict[str, Method]

    def carry(self, name: str, seeds: Sequence[int]) -> Carry:
        """What a finished method ended with."""
        config, problem, record, methods = self
        return driver.trained(config, name, methods[name], seeds, problem, record)

    def windows(self, text: int) -> np.ndarray:
        """Of the part of a text that is trained on: uint8 ``(examples, length + 1)``.

        They are spread evenly; what is important for the text is measured on them. No
        method but those with a Fisher information or MAS sees old ones.
        """
        trained, length = self.problem.train, self.config.length + 1
        begin, size = trained.begin[text], trained.size[text]
        starts = language.spread(begin, size, self.config.fisher_examples, length)
        return np.asarray(language.cut(trained.content, starts, length))


@functools.cache
def measured(
    config: Config, measure: Importance, lora: bool
) -> Callable[[Any, Any, np.ndarray, Sequence[int]], Any]:
    """Compile the importance of some runs' parameters on some windows."""
    net = network(config, config.lora_rank if lora else 0)

    def of_one(own, seed, windows):
        params, base = own
        key = jax.random.fold_in(jax.random.key(seed), 2**31)
        return measure(net.logits(base), params, windows, key)

    def of_all(params, base, windows, seeds):
        mesh = sweep.mesh(len(seeds))
        own = sweep.spread(((params, base), np.asarray(seeds, np.uint32)), mesh)
        program = compiled(mesh)
        return sweep.gather(program(*own, sweep.replicate(windows, mesh)), len(seeds))

    @functools.cache
    def compiled(mesh):
        return sweep.over_runs(of_one, mesh, mapped=2)

    return of_all


def make_study(config: Config, contents: Mapping[str, bytes]) -> Study:
    """The methods, none of them run."""
    problem = make_problem(list(contents.values()), config)
    study = Study(config, problem, Record("finetune", config), {})
    study.methods[PRETRAINING] = pretraining(config)
    own_network = functools.lru_cache(maxsize=2)(
        functools.partial(study.carry, PRETRAINING)
    )

    def given(family: Family, seeds: Sequence[int]) -> Mapping[str, Any]:
        """The pretrained networks with what is important for the old text."""
        if "diverged" in study.record.runs.get(PRETRAINING, {}):
            raise command.UserError(
                "The pretraining diverged: there is nothing to fine-tune. Lower the "
                "learning rate, with another --out."
            )
        pretrained = own_network(seeds)
        params, base = pretrained.params, None
        if family.lora:
            base = params
            adapters = network(config, config.lora_rank).init
            params = jax.vmap(lambda seed: adapters(jax.random.key(seed)))(
                np.asarray(seeds, np.uint32)
            )
        if family.importance is not None:
            measure = measured(config, family.importance, family.lora)
            omega = measure(params, base, study.windows(0), seeds)
        elif family.memory:
            omega = si_jax.synapses(pretrained.opt_state).importance
        else:
            omega = None

        def begin(params, omega):
            opt_state = optimizer(config, family.memory, 0.0, config.damping).init(
                params
            )
            if omega is not None:
                opt_state = si_jax.add_importance(opt_state, omega)
            return Carry(params, opt_state)

        start = jax.jit(jax.vmap(begin))(params, omega)
        return {"start": jax.device_get(start)} | ({"base": base} if base else {})

    for name, family in families(config).items():
        make = go_on(config, family.memory, family.lora, family.rate)
        at = [config.steps] if family.strengths else stops(config.steps, config)
        which = (0, 1) if family.mixed else (1,)
        start = functools.lru_cache(maxsize=2)(functools.partial(given, family))
        for arm, strength in arms(name, family).items():
            study.methods[arm] = Method(
                make,
                strength,
                on(config, which, tuple(np.diff([0, *at]).tolist())),
                given=start,
            )
    return study


def then_third(study: Study, chosen: Mapping[str, str]) -> None:
    """Let the chosen methods go on with the third text, what they know of two in one.

    Args:
      study: gets a method more for each of them.
      chosen: by family, the method.
    """
    config = study.config

    def given(family: Family, arm: str, seeds: Sequence[int]) -> Mapping[str, Any]:
        before = study.methods[arm].given(seeds)
        carry = study.carry(arm, seeds)
        params, opt_state, _ = carry
        if family.memory == "ewc":
            measure = measured(config, family.importance, family.lora)
            omega = measure(params, before.get("base"), study.windows(1), seeds)
            opt_state = jax.jit(jax.vmap(ewc.consolidate))(opt_state, params, omega)
        elif family.memory == "si":
            opt_state = jax.jit(jax.vmap(si_jax.consolidate))(opt_state, params)
        start = jax.device_get(carry._replace(opt_state=opt_state))
        return {**before, "start": start}

    for name, arm in chosen.items():
        family = families(config)[name]
        which = (0, 1, 2) if family.mixed else (2,)
        study.methods[third(arm)] = study.methods[arm]._replace(
            learns=on(config, which, (config.third_steps,)),
            given=functools.partial(given, family, arm),
        )


def arms(name: str, family: Family) -> dict[str, float]:
    """A family's methods and their strengths."""
    if not family.strengths:
        return {name: 1.0}
    return {of_strength(name, c): c for c in family.strengths}


def of_strength(name: str, strength: float) -> str:
    """The name of a family's method."""
    return f"{name} c={strength:g}"


def third(arm: str) -> str:
    """The name under which a method goes on with the third text."""
    return f"{arm}, then third"


# --- Beside the losses ----------------------------------------------------------------


def first_group(run: dict[str, Any]) -> range:
    """The seeds of a method that were trained together, the first of them."""
    parts = run.get("parts") or [{"seeds": count(run)}]
    return range(parts[0]["seeds"])


def samples(study: Study, names: Sequence[str]) -> dict[str, list[str]]:
    """How the networks of the first seed go on with each held-out text.

    Args:
      study: finished.
      names: of the methods, all of which train the whole network.

    Returns:
      The prompts, and for each method what it wrote, a text each.
    """
    config, problem, record, _ = study
    prompt_length, written = max(config.length // 2, 1), 160
    net = network(config)
    write = jax.jit(
        functools.partial(
            language.sample,
            net.apply,
            count=written,
            length=config.length,
            temperature=0.5,
        )
    )
    prompts = [
        language.cut(problem.test.content, starts[0], prompt_length)
        for starts in problem.test_tasks[:2]
    ]
    found = {"prompt": list(map(decoded, prompts))}
    for name in names:
        carry = study.carry(name, first_group(record.runs[name]))
        params = jax.tree.map(lambda x: x[0], carry.params)
        found[name] = [
            decoded(write(params, prompt, jax.random.key(i)))
            for i, prompt in enumerate(prompts)
        ]
    return found


def decoded(text: Any) -> str:
    """Bytes as characters, whatever they are."""
    return bytes(np.asarray(text).tolist()).decode(errors="replace")


def held(study: Study, name: str) -> dict[str, dict[str, float]]:
    """What SI holds after fine-tuning, by the network's layers: means over the seeds.

    Returns:
      By layer: its fraction of the parameters, its share of ΣΩ and of the penalty, and
      its displacement, the root of the mean of (θ − θ̃)².
    """
    carry = study.carry(name, first_group(study.record.runs[name]))
    report = jax.jit(jax.vmap(si_jax.diagnose))(carry.opt_state, carry.params)
    sizes = [x[0].size for x in jax.tree.leaves(carry.params)]
    layers: dict[str, list[Any]] = {}
    for leaf, size in zip(report.share, sizes, strict=True):
        columns = (report.share, report.penalty, report.displacement)
        share, penalty, moved = (np.mean(column[leaf]) for column in columns)
        layer = layers.setdefault(leaf.rsplit("/", 1)[0], [0, 0, 0, 0])
        for i, x in enumerate((size, share, penalty, size * moved**2)):
            layer[i] += x
    total, _, penalties, _ = map(sum, zip(*layers.values(), strict=True))
    return {
        name: {
            "parameters": size / total,
            "importance": float(share),
            "penalty": float(penalty / penalties) if penalties else 0.0,
            "displacement": float((square / size) ** 0.5),
        }
        for name, (size, share, penalty, square) in layers.items()
    }


def held_table(layers: Mapping[str, Mapping[str, float]]) -> str:
    """A row a layer."""
    rows = [["", "of parameters", "of ΣΩ", "of penalty", "displacement"]]
    for name, row in layers.items():
        *shares, moved = (np.nan if x is None else x for x in row.values())
        rows.append([name, *(number(x, ".1%") for x in shares), number(moved)])
    return aligned(rows)


def cost(config: Config, problem: programs.Problem) -> dict[str, dict[str, float]]:
    """Bytes and time of a step of every kind of method, on one device.

    Returns:
      By kind: bytes of the optimizer's state by the number of the network's
      parameters, the median of the step's time by Adam's in the same turn, and the
      memory that a step takes at most.
    """
    narrow = dataclasses.replace(config, state_dtype="bfloat16")
    size = config.batch_size
    split = max(n for n in range(1, 5) if size % n == 0)
    parts = dataclasses.replace(config, micro_batch=size // split)
    kinds: dict[str, tuple[Config, Memory, bool]] = {
        "fine-tuning": (config, None, False),
        "l2, ewc, mas": (config, "ewc", False),
        "si": (config, "si", False),
        "si, bfloat16 Ω and θ̃": (narrow, "si", False),
        f"si, batch in {split} parts": (parts, "si", False),
        "lora": (config, None, True),
        "lora si": (config, "si", True),
    }
    base = jax.jit(network(config).init)(jax.random.key(0))
    parameters = sum(x.size for x in jax.tree.leaves(base))
    shares = np.eye(len(problem.train.size), dtype=np.float32)[1]
    stage, key = Stage(shares, np.int32(4)), jax.random.key(0)
    programs, found = {}, {}
    for name, (own, memory, lora) in kinds.items():
        params = network(own, own.lora_rank if lora else 0).init(key)
        carry = Carry(params, optimizer(own, memory, 1.0, own.damping).init(params))
        make = go_on(own, memory, lora)

        def steps(carry, base, texts, stage, make=make):
            learner = make(jnp.float32(1), jnp.float32(1e-3), carry, base)
            return learner.epoch(carry, texts, stage, jax.random.key(0))[0]

        shared = (base, problem.train, stage)
        compiled = jax.jit(steps, donate_argnums=0).lower(carry, *shared).compile()
        programs[name] = benchmark.stateful(compiled, carry, *shared, steps=4)
        state = sum(x.nbytes for x in jax.tree.leaves(carry.opt_state))
        found[name] = {"state_bytes": state / parameters, **programs[name].facts}
    times = benchmark.take_turns(programs, config.cost_turns)
    for name, turns in times.items():
        ratios = np.divide(turns, times["fine-tuning"])
        found[name] |= {"ms": np.median(turns), "to_adam": np.median(ratios)}
    return found


def cost_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A row a kind of method."""
    rows = [["", "state B/parameter", "time × Adam's", "ms a step", "peak MB"]]
    for name, row in found.items():
        numbers = [f"{row['state_bytes']:.1f}", f"{row['to_adam']:.2f}"]
        peak = row.get("peak_bytes")  # not every backend says
        numbers += [f"{row['ms']:.1f}", f"{peak / 1e6:.0f}" if peak else ""]
        rows.append([name, *numbers])
    return aligned(rows)


# --- What was found -------------------------------------------------------------------


def curve(
    name: str, family: Family, runs: Mapping[str, Any], half: str = "test"
) -> np.ndarray:
    """A family's losses, from the one nearest to the pretrained network on.

    Returns:
      ``(seeds, points, texts)``, in bits a byte.
    """
    if not family.strengths:
        return np.asarray(runs[name][half])
    found = [np.asarray(runs[arm][half])[:, -1] for arm in ordered(name, family)]
    n = min(map(len, found))
    return np.stack([x[:n] for x in found], axis=1)


def ordered(name: str, family: Family) -> list[str]:
    """A family's methods, the one that moves the least first."""
    sign = -1 if family.memory else 1
    found = arms(name, family)
    return sorted(found, key=lambda arm: sign * found[arm])


def choose(config: Config, runs: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Each family's best, by its mean loss on the old and the new text.

    On the held-out half that is there to choose on.

    Returns:
      By family, the method and the stage.
    """
    found = {}
    for name, family in families(config).items():
        mean = curve(name, family, runs, "choice")[..., :2].mean((0, 2))
        least = best(-mean, name)
        arms = ordered(name, family)
        found[name] = (arms[least], 0) if family.strengths else (name, least)
    return found


def at_equal_loss(
    config: Config, runs: Mapping[str, Any], fractions: Sequence[float]
) -> dict[str, np.ndarray]:
    """How much each family's loss on the old text grew, for what it learned.

    For each fraction of what fine-tuning takes from the loss on the new text, the point
    of a family's curve where it took as much, by linear interpolation between
    neighbouring points, on the half to choose on; reported is the other half. All
    curves begin at the pretrained network, and those of a strength end with
    fine-tuning at their learning rate, which is c = 0, if that was run.

    Returns:
      By family, bits a byte ``(seeds, fractions)``; NaN where it learns less.
    """
    whole = {}
    for half in ("choice", "test"):
        before = np.asarray(runs[PRETRAINING][half])[:, -1:]
        after = np.asarray(runs["fine-tuning"][half])[:, -1:]
        for name, family in families(config).items():
            path = [before, curve(name, family, runs, half)]
            unheld = of_strength("slow", family.rate)
            end = "fine-tuning" if family.rate == 1 else unheld
            if family.strengths and not family.lora and end in runs:
                path.append(np.asarray(runs[end][half])[:, -1:])
            n = min(map(len, (*path, after)))
            whole[name, half] = np.concatenate([x[:n] for x in path], axis=1)
    found = {}
    for name in families(config):
        choice, test = whole[name, "choice"], whole[name, "test"]
        before, after = (
            np.asarray(runs[of]["choice"])[: len(choice), -1, 1]
            for of in (PRETRAINING, "fine-tuning")
        )
        found[name] = np.array(
            [
                [
                    _crossing(
                        choice[seed, :, 1],
                        test[seed, :, 0],
                        before[seed] - f * (before[seed] - after[seed]),
                    )
                    - test[seed, 0, 0]
                    for f in fractions
                ]
                for seed in range(len(choice))
            ]
        )
    return found


def _crossing(falling: np.ndarray, other: np.ndarray, level: float) -> float:
    """``other`` where ``falling`` first comes down to a level; NaN if it does not."""
    below = np.flatnonzero(falling <= level)
    if not len(below) or below[0] == 0:
        return np.nan
    i = below[0]
    share = (falling[i - 1] - level) / (falling[i - 1] - falling[i])
    return other[i - 1] + share * (other[i] - other[i - 1])


def cells(values: np.ndarray) -> str:
    """Mean ± SEM over the seeds, in bits a byte."""
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return DIVERGED
    mean = f"{values.mean():.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {metrics.standard_error(values):.3f}"


def summary(_: str, run: dict[str, Any]) -> dict[str, Any]:
    """Each text's loss at the end, of both halves."""
    return {
        half: [statistics(x) for x in np.asarray(run[half])[:, -1].T]
        for half in ("test", "choice")
    }


def best_table(config: Config, runs: Mapping[str, Any]) -> str:
    """Each family at its best, as chosen: its losses; after the third text, too."""
    names = list(titles(config).values())
    rows = [["", *names[:2], "mean"]]
    with_third = any(third(arm) in runs for arm, _ in choose(config, runs).values())
    if with_third:
        rows[0] += [f"after {names[2]}: {x}" for x in (*names, "mean")]

    def row(title, first, last):
        found = [title, *map(cells, first.T[:2]), cells(first[:, :2].mean(1))]
        if with_third:
            blank = [""] * (1 + len(names))
            found += (
                blank if last is None else [*map(cells, last.T), cells(last.mean(1))]
            )
        return found

    rows.append(row("pretrained", np.asarray(runs[PRETRAINING]["test"])[:, -1], None))
    for arm, stage in choose(config, runs).values():
        found, last = np.asarray(runs[arm]["test"]), runs.get(third(arm))
        if stage < found.shape[1] - 1:  # what goes on is what all steps led to
            at = stops(config.steps, config)[stage]
            rows.append(row(f"{arm}, stopped at {at} steps", found[:, stage], None))
        after = None if last is None else np.asarray(last["test"])[:, -1]
        rows.append(row(arm, found[:, -1], after))
    return aligned(rows)


def equal_table(config: Config, runs: Mapping[str, Any]) -> str:
    """A row a family: how much of the old text it forgot for what it learned."""
    fractions = (0.5, 0.75, 0.9)
    rows = [["", *(f"{f:.0%}" for f in fractions)]]
    for name, values in at_equal_loss(config, runs, fractions).items():
        title = "early stopping" if name == "fine-tuning" else name
        columns = (cells(x) if np.isfinite(x).all() else "–" for x in values.T)
        rows.append([title, *columns])
    return aligned(rows)


def so_far(test: np.ndarray, finished: int) -> str:
    """What a bar shows of the losses so far."""
    if not finished:
        return ""
    losses = test[:, finished - 1].mean(0)
    return ", held out " + " ".join(f"{x:.3f}" for x in losses) + " bits a byte"


def run(config: Config) -> None:
    """Run every method that is not finished, then print and draw all of them."""
    contents = load(config)
    digests = tuple(map(texts.sha256, contents.values()))
    config = dataclasses.replace(config, sha256=digests)
    study = make_study(config, contents)

    def train(methods):
        driver.run_methods(
            config, methods, lambda _: study.problem, study.record, summary, so_far
        )

    train(study.methods)
    if config.third_steps and len(contents) > 2:
        chosen = choose(config, study.record.runs)
        then_third(study, {name: arm for name, (arm, _) in chosen.items()})
        train(study.methods)
    shown(study)
    if is_first():
        report(study)


def shown(study: Study) -> None:
    """Samples, what SI holds and what the methods cost, if there is anything new."""
    config, problem, record, _ = study
    runs = record.runs
    chosen = {name: arm for name, (arm, _) in choose(config, runs).items()}
    whole = [arm for name, arm in chosen.items() if not families(config)[name].lora]
    if set(record.content.get("samples", {})) != {"prompt", PRETRAINING, *whole}:
        record.note("samples", samples(study, [PRETRAINING, *whole]))
        if "si" in chosen:
            record.note("held", {chosen["si"]: held(study, chosen["si"])})
    if config.cost_turns and "cost" not in record.content:
        record.note("cost", cost(config, problem))


def report(study: Study) -> None:
    """Print and draw the finished methods."""
    config, record = study.config, study.record
    runs = record.runs
    print(
        f"\nHeld-out loss in bits a byte, each method at its best, {over_seeds(runs)}"
    )
    print(best_table(config, runs))
    if "fine-tuning" in runs:
        gone = any("diverged" in run for run in runs.values())
        print(
            "\nHow much the loss on the old text grew where a method has learned as "
            "much of the new one,\nas a part of what fine-tuning learns; – where it "
            "is not reached" + ", or one diverged" * gone
        )
        print(equal_table(config, runs))
    for name, layers in record.content.get("held", {}).items():
        print(f"\nWhat {name} holds, after the {titles(config)['new']}")
        print(held_table(layers))
    if "cost" in record.content:
        print("\nWhat a step costs, on one device")
        print(cost_table(record.content["cost"]))
    for text in sample_tables(record.content["samples"]):
        print(f"\n{text}")
    seconds = sum(x["seconds"] for x in runs.values())
    print(f"\nTook {seconds:.0f} s. Everything is in {record.folder}.")
    record.save("finetune", figure(config, runs))


def sample_tables(found: Mapping[str, Sequence[str]]) -> list[str]:
    """How the networks go on, a text each."""
    (_, prompts), *others = found.items()
    width = max(len(name) for name, _ in others)
    return [
        "\n".join(
            [
                f"How they go on with {prompt!r}",
                *(f"{name:{width}}  {written[i]!r}" for name, written in others),
            ]
        )
        for i, prompt in enumerate(prompts)
    ]


def figure(config: Config, runs: Mapping[str, Any]) -> Figure:
    """Loss on the old text over that on the new one, a curve a family."""
    names = list(titles(config).values())
    found = {
        "early stopping" if name == "fine-tuning" else name: curve(name, family, runs)[
            ..., 1::-1
        ]
        for name, family in families(config).items()
    }
    return figures.frontier(
        found,
        start=np.asarray(runs[PRETRAINING]["test"])[:, -1, 1::-1],
        labels=[f"Loss on the {x}, bits a byte" for x in names[1::-1]],
        suptitle=f"Held-out text, {over_seeds(dict(runs))}",
    )


if __name__ == "__main__":
    command.main(Config, "finetune", run)
