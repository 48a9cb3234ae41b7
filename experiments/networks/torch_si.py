"""Synaptic Intelligence in PyTorch, as users write it, for the benchmark alone."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from experiments.data.datasets import Examples
from experiments.networks.models import CNN, MLP


def network(model: MLP | CNN) -> nn.Module:
    """A network of ours in PyTorch, for images ``(batch, channels, height, width)``."""
    return mlp(model.hidden) if isinstance(model, MLP) else cnn(model.outputs)


def mlp(hidden: tuple[int, ...]) -> nn.Sequential:
    """784 inputs, ReLU layers, 10 outputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    widths = (784, *hidden)
    for i in range(len(hidden)):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def cnn(outputs: int) -> nn.Sequential:
    """The convolutional network for CIFAR."""

    def block(before: int, width: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
        ]

    dense = [nn.Flatten(), nn.Linear(64 * 6 * 6, 512), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*block(3, 32), *block(32, 64), *dense, nn.Linear(512, outputs))


class PathIntegral:
    """ω, Ω and θ̃ of eqs. 3 to 5, a tensor each for every parameter."""

    def __init__(self, model: nn.Module, strength: float, importance: float = 0.0):
        self.params: list[torch.Tensor] = list(model.parameters())
        self.strength = strength
        self.omega = [torch.zeros_like(p) for p in self.params]
        self.importance = [torch.full_like(p, importance) for p in self.params]
        self.reference = [p.detach().clone() for p in self.params]

    def penalty(self) -> torch.Tensor:
        """C Σ Ω (θ̃ − θ)²."""
        total = torch.zeros(())
        for omega, ref, p in zip(
            self.importance, self.reference, self.params, strict=True
        ):
            total = total + (omega * (ref - p) ** 2).sum()
        return self.strength * total

    def consolidate(self, damping: float) -> None:
        """Close a task."""
        for i, p in enumerate(self.params):
            moved = p.detach() - self.reference[i]
            self.importance[i] += self.omega[i] / (moved**2 + damping)
            self.importance[i].clamp_(min=0)
            self.reference[i] = p.detach().clone()
            self.omega[i].zero_()


def usual(
    model: nn.Module,
    si: PathIntegral | None = None,
    outputs: slice = slice(None),
) -> Callable[..., None]:
    """The penalty in the loss, the task's gradient from a pass of its own.

    What one writes who wants ω of the task's loss alone: the loss and the penalty are
    differentiated one after the other, and Python loops over the tensors. Adam is as
    PyTorch has it by default, not fused.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    si = si or PathIntegral(model, 0.1, importance=1e-3)
    criterion = nn.CrossEntropyLoss()

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(images)[:, outputs], labels).backward()
        # Copied before the penalty's backward pass adds to them.
        grads = [p.grad.clone() for p in si.params if p.grad is not None]
        before = [p.detach().clone() for p in si.params]
        si.penalty().backward()
        optimizer.step()
        for omega, g, old, p in zip(si.omega, grads, before, si.params, strict=True):
            omega -= g * (p.detach() - old)

    return step


def careful(model: nn.Module) -> Callable[..., None]:
    """The penalty's gradient in closed form, fused Adam, tensors in lists."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    si = PathIntegral(model, 0.1, importance=1e-3)
    criterion = nn.CrossEntropyLoss()

    def pull_and_move() -> None:
        grads = [p.grad for p in si.params if p.grad is not None]
        # Times 1, to copy a list of tensors in one call.
        task = torch._foreach_mul(grads, 1.0)
        before = torch._foreach_mul(si.params, 1.0)
        pull = torch._foreach_sub(before, si.reference)
        torch._foreach_mul_(pull, 2 * si.strength)
        torch._foreach_addcmul_(grads, pull, si.importance)
        optimizer.step()
        moved = torch._foreach_sub(before, si.params)
        torch._foreach_addcmul_(si.omega, task, moved)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        with torch.no_grad():
            pull_and_move()

    return step


def plain(model: nn.Module) -> Callable[..., None]:
    """Adam alone, in PyTorch's fastest form."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    criterion = nn.CrossEntropyLoss()

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()

    return step


METHODS = {"torch adam": plain, "torch SI": usual, "torch SI, careful": careful}


def split_mnist(
    train: Examples,
    test: Examples,
    groups: Sequence[Sequence[int]],
    *,
    epochs: int,
    seed: int,
) -> np.ndarray:
    """A whole run of split MNIST with SI as usually written, c = 1 and ξ = 0.001.

    Returns:
      ``(2, tasks, tasks)``: accuracies on test and training examples after each task.
    """
    torch.manual_seed(seed)
    model = mlp((256, 256))
    nn.init.zeros_(list(model.parameters())[-2])  # the output layer's kernel
    si = PathIntegral(model, strength=1.0)
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for examples in (test, train):
        images = torch.tensor(np.asarray(examples.images), dtype=torch.float32) / 255
        labels = torch.tensor(np.asarray(examples.labels), dtype=torch.int64)
        tasks = [torch.isin(labels, torch.tensor(group)) for group in groups]
        parts.append([(images[t], labels[t]) for t in tasks])
    accuracies = []
    for group, (images, labels) in zip(groups, parts[1], strict=True):
        step = usual(model, si, slice(group[0], group[-1] + 1))
        for _ in range(epochs):
            for rows in torch.randperm(len(labels)).split(64):
                step(images[rows], labels[rows] - group[0])
        si.consolidate(1e-3)
        accuracies.append(
            [
                [accuracy(model, k, *x) for k, x in zip(groups, of, strict=True)]
                for of in parts
            ]
        )
    return np.swapaxes(accuracies, 0, 1)


def accuracy(
    model: nn.Module, group: Sequence[int], images: torch.Tensor, labels: torch.Tensor
) -> float:
    """The fraction of a task's examples that is classified correctly."""
    with torch.no_grad():
        predictions = model(images)[:, group[0] : group[-1] + 1].argmax(1) + group[0]
    return float((predictions == labels).float().mean())
