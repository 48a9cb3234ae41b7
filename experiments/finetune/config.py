"""What can be set, and what makes sense."""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import numpy as np
import tyro

from experiments.engine import command

Name = Literal[
    "fine-tuning",
    "slow",
    "l2",
    "ewc",
    "mas",
    "squisher",
    "si",
    "si fisher",
    "slow si",
    "slow si fisher",
    "lora",
    "lora si",
    "lora si product",
    "mixed",
]


PRETRAINING = "pretraining"

DIVERGENCE = "divergence"
"""What a record calls KL(network ‖ pretrained) on the new text, in bits a byte.

By method, ``(seeds, stages)``, of the half that is reported.
"""


HELD_OUT = 0.1


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Fine-tune a small language model on a new text; what does it keep of the old?"""

    methods: tuple[Name, ...] = tuple(x for x in get_args(Name) if x != "squisher")
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
    """c of what takes half the Fisher information: ewc, squisher, si fisher, …"""
    mas_strengths: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1)
    """c of MAS."""
    si_strengths: tuple[float, ...] = (0.1, 1.0, 3.0, 10.0)
    """c of SI with its own Ω, from the pretraining."""
    slow_si_factor: float = 0.1
    """Of the learning rate, for SI with a smaller one."""
    lora_rank: int = 8
    """Of the adapters."""
    lora_factor: float = 1.0
    """Of the learning rate, for the adapters."""
    merge_weights: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Of a fine-tuned network, in its mean with the pretrained one; none: no means."""
    merge_factors: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Of the new text's Fisher information, in the mean by importance; likewise."""
    state_dtype: Literal["bfloat16", "compact"] | None = None
    """Of SI's Ω and θ̃, compact of ω, too; in EWC bfloat16. None is float32."""
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
            positive=("learning_rate", "damping", "slow_si_factor", "lora_factor"),
            at_least_1=(
                *("seeds", "text_bytes", "width", "layers", "heads", "length"),
                *("batch_size", "pretraining_steps", "steps", "stops", "epochs"),
                *("evaluated", "fisher_examples", "lora_rank"),
            ),
            at_least_0=("micro_batch", "third_steps", "cost_turns"),
            strengths=(
                *("l2_strengths", "fisher_strengths", "mas_strengths"),
                *("si_strengths", "slow_factors"),
            ),
            named=("methods",),
        )
        for name, end in (("merge_weights", 1.0), ("merge_factors", np.inf)):
            values = (0.0, *getattr(self, name), end)
            if not all(a < b for a, b in itertools.pairwise(values)):
                raise ValueError(
                    f"{name} must rise between 0 and {end:g}, got {values[1:-1]}"
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
