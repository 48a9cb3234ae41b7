"""What can be set, and what makes sense."""

import dataclasses
import math
from typing import ClassVar, Literal, get_args

from experiments.engine import command

Name = Literal[
    "fine-tuning",
    "l2",
    "si",
    "unbiased",
    "bias",
    "root fisher",
    "fisher",
    "mas",
    "absolute",
    "squared",
    "hessian",
    "squisher",
    "sos",
]


TITLES: dict[str, str] = {
    "fine-tuning": "none (c = 0)",
    "l2": "1 (L2)",
    "si": "SI",
    "unbiased": "SI, unbiased",
    "bias": "SI, bias alone",
    "root fisher": "√Fisher",
    "fisher": "Fisher",
    "mas": "MAS",
    "absolute": "Σ|g|",
    "squared": "Σg²",
    "hessian": "Hessian",
    "squisher": "Adam's ν",
    "sos": "√(Adam's ν)",
}


MEASURES = "measures"  # a record's name for what is measured
CORRELATED = tuple(TITLES)[2:]


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Importances compared, and learned with: SI's, its parts, and its relatives.

    All are measured after the first task. Each is then the importance that old tasks
    are held with; its strength is chosen on a part of the training set, and what is
    chosen is trained on all of it, with fresh seeds, and evaluated on the test set.
    """

    network: Literal["split", "permuted"] = "split"
    """Split MNIST, or permuted MNIST."""
    data: Literal["tfds", "mnist5k"] = "tfds"
    """MNIST itself through TFDS, or 5,000 of its digits that need no download."""
    batch_sizes: tuple[int, ...] = (32, 256, 2048)
    """Examples a step, in runs of their own; more can be added in the same --out."""
    importances: tuple[Name, ...] = get_args(Name)[:-3]  # the Hessian costs most
    """What to learn with, likewise; none: only measure."""
    seeds: int = 5
    """Runs of each on the test set, with the seeds 0, 1, …; more can be added later."""
    networks: int = 3
    """To measure the importances of, with the seeds 0, 1, …"""
    grid_seeds: int = 1
    """Runs of each strength to choose from, with other seeds."""
    pulls: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """c to choose from, for each importance over its mean after the first task."""
    tasks: int = 5
    """Of permuted MNIST; split MNIST has five."""
    epochs: int = 10
    """Passes over each task."""
    learning_rate: float = 1e-3
    """Adam's."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    zero_init_output: bool = True
    """Start the output layer at zero."""
    reset_optimizer: bool = True
    """Start each task with a fresh optimizer."""
    damping: float = 1e-3
    """ξ of eq. 5."""
    importance_examples: int = 1000
    """Of each task, for the Fisher information, MAS and the Hessian."""
    held_out: float = 1 / 6
    """The fraction of the training set to choose on."""

    PICKS: ClassVar[tuple[str, ...]] = ("batch_sizes", "importances", "seeds")

    def __post_init__(self):
        """Refuse values that make no sense."""
        counts = ("seeds", "networks", "grid_seeds", "tasks", "epochs")
        self.check(
            positive=("damping", "learning_rate"),
            at_least_1=(*counts, "importance_examples"),
        )
        for name in ("batch_sizes", "hidden", "pulls"):
            values = getattr(self, name)
            least = 0 if name == "pulls" else 1
            if not values or not least <= min(values) <= max(values) < math.inf:
                raise ValueError(f"{name} must be >= {least}, one or more: {values}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
