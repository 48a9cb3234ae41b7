"""What can be set, and what makes sense."""

import dataclasses
from typing import ClassVar, Literal

from experiments import split_mnist

Scenario = Literal["task", "domain", "class"]


Name = Literal[
    "fine-tuning",
    "l2",
    "si",
    "ewc",
    "online ewc",
    "squisher",
    "kronecker",
    "mas",
    "joint",
]


SCENARIOS: tuple[Scenario, ...] = ("task", "domain", "class")


@dataclasses.dataclass(frozen=True)
class Config(split_mnist.Setting):
    """Split MNIST in the three scenarios: task-, domain- and class-incremental.

    Each method's strength c is chosen in each scenario on a part of the training set,
    and what is chosen is then trained on all of it, with fresh seeds, and evaluated on
    the test set.
    """

    scenario: tuple[Scenario, ...] = SCENARIOS
    """What to run; more can be added later in the same --out."""
    methods: tuple[Name, ...] = (
        *("fine-tuning", "l2", "si", "ewc", "online ewc", "mas", "joint"),
    )
    """Likewise."""
    seeds: int = 10
    """Runs of each method, with the seeds 0, 1, …; more can be added later."""
    grid_seeds: int = 2
    """Runs of each strength to choose from, with other seeds."""
    epochs: int = 4
    """Passes over each task."""
    batch_size: int = 128
    """Examples a step."""
    hidden: tuple[int, ...] = (400, 400)
    """Widths of the hidden layers."""
    zero_init_output: bool = False
    """Start the output layer at zero."""
    reset_optimizer: bool = False
    """Start each task with a fresh optimizer."""
    damping: float = 0.1
    """ξ of eq. 5."""
    l2_strengths: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """The values of c to choose from; the importance is 1 a task."""
    si_strengths: tuple[float, ...] = (100.0, 1e3, 1e4, 1e5)
    """Likewise, c of eq. 4."""
    ewc_strengths: tuple[float, ...] = (1e6, 1e8, 1e10, 1e12)
    """Likewise, c = λ/2, of EWC, online EWC and Squisher."""
    kronecker_strengths: tuple[float, ...] = (1e3, 1e5, 1e7, 1e9)
    """Likewise, c = λ/2 of EWC with Kronecker factors."""
    mas_strengths: tuple[float, ...] = (0.1, 10.0, 1e3, 1e5)
    """Likewise, c = λ of MAS."""
    importance_examples: int = 500
    """Of each task, for the Fisher information and MAS's sensitivity."""
    held_out: float = 1 / 6
    """The fraction of the training set to choose on."""

    PICKS: ClassVar[tuple[str, ...]] = ("scenario", "methods", "seeds")

    def __post_init__(self):
        """Refuse values that make no sense."""
        super().__post_init__()
        counts = ("seeds", "grid_seeds", "importance_examples")
        methods = ("l2", "si", "ewc", "kronecker", "mas")
        self.check(
            positive=("damping",),
            at_least_1=counts,
            strengths=tuple(f"{name}_strengths" for name in methods),
            named=("scenario", "methods"),
        )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
