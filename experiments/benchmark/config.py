"""What can be set, and what makes sense."""

import dataclasses
from typing import Literal

from experiments.engine import command


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Time of a training step, of an update alone, and of whole runs, by method.

    The methods take turns, so that whatever else the machine does meets them alike (but
    for the large tree, whose states do not fit side by side); compilation is left out.
    Compare within a run: seconds of two machines say little.
    The methods in PyTorch are left out where it is not installed.
    """

    nets: tuple[
        Literal["split MNIST", "permuted MNIST", "split CIFAR", "narrow MNIST"], ...
    ] = (
        "split MNIST",
        "permuted MNIST",
        "split CIFAR",
    )
    """The paper's networks, with their batch sizes; that of permuted_mnist_narrow, of
    which the boundary and the update are timed, too, as the permuted MNIST net's."""
    convolutions: bool = True
    """Time what makes the convolutional network fast, too."""
    runs: tuple[int, ...] = (1, 2, 4, 10)
    """Numbers of whole runs of split MNIST in one program; none: leave them out."""
    data: Literal["tfds", "mnist5k"] = "mnist5k"
    """The digits of the whole runs."""
    epochs: int = 5
    """Of the whole runs, passes over each task."""
    repetitions: int = 9
    """Timings of each method."""
    large: int = 100_000_000
    """Parameters of a tree like a transformer's, to time the update on; 0: none."""

    def __post_init__(self):
        """Refuse values that make no sense."""
        self.check(at_least_0=("large",), at_least_1=("epochs", "repetitions"))
        if min(self.runs, default=1) < 1:
            raise ValueError(f"runs must be at least 1, got {self.runs}")
