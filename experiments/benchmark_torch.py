"""Synaptic Intelligence in PyTorch, as users write it, for the benchmark alone."""

from collections.abc import Callable

import torch
from torch import nn


def mlp(hidden: tuple[int, ...]) -> nn.Module:
    """784 inputs, ReLU layers, 10 outputs."""
    layers: list[nn.Module] = []
    widths = (784, *hidden)
    for i in range(len(hidden)):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


class PathIntegral:
    """ω, Ω and θ̃ of eqs. 3 to 5, a tensor each for every parameter."""

    def __init__(self, model: nn.Module, strength: float):
        self.params: list[torch.Tensor] = list(model.parameters())
        self.strength = strength
        self.omega = [torch.zeros_like(p) for p in self.params]
        self.importance = [torch.full_like(p, 1e-3) for p in self.params]
        self.reference = [p.detach().clone() for p in self.params]

    def penalty(self) -> torch.Tensor:
        """C Σ Ω (θ̃ − θ)²."""
        total = torch.zeros(())
        for omega, ref, p in zip(
            self.importance, self.reference, self.params, strict=True
        ):
            total = total + (omega * (ref - p) ** 2).sum()
        return self.strength * total


def usual(model: nn.Module, strength: float = 0.1) -> Callable[..., None]:
    """The penalty in the loss, the task's gradient from a pass of its own.

    What a careful user writes who wants ω of the task's loss alone: the loss and the
    penalty are differentiated one after the other, and Python loops over the tensors.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    si = PathIntegral(model, strength)
    criterion = nn.CrossEntropyLoss()

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        grads = [p.grad.clone() for p in si.params if p.grad is not None]
        before = [p.detach().clone() for p in si.params]
        si.penalty().backward()
        optimizer.step()
        for omega, g, old, p in zip(si.omega, grads, before, si.params, strict=True):
            omega -= g * (p.detach() - old)

    return step


def careful(model: nn.Module, strength: float = 0.1) -> Callable[..., None]:
    """The penalty's gradient in closed form, fused Adam, tensors in lists."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    si = PathIntegral(model, strength)
    criterion = nn.CrossEntropyLoss()

    def pull_and_move() -> None:
        grads = [p.grad for p in si.params if p.grad is not None]
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
    """Adam alone."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()

    return step


METHODS = {"torch adam": plain, "torch SI": usual, "torch SI, careful": careful}
