"""Classifying by an inner section of a network, and what that costs (BYOT, arXiv 1905.08094).

Letters: B: images, C: channels, K: classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .terms.byot import OwnTeacher

__all__ = ["Cost", "EarlyExit", "EveryExit", "cost_of", "early_exits"]


class _Reached(Exception):
    """The section has run: carries its output out of the network's forward."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _leave(module: nn.Module, args: tuple, output: Any) -> None:
    raise _Reached(output)


class EarlyExit(nn.Module):
    """Runs a network up to the end of one of its layers, then a head, and nothing after.

    A hook on the layer raises a private exception, which leaves the network's forward from
    whatever depth. So any network can be left at any module without taking it apart, and what it
    would have computed next is never begun. The prices: the layer must run once in a pass (the
    first run would count), the network must not swallow exceptions, and torch.compile,
    torch.export and DistributedDataParallel cannot follow it; give them the parts themselves.

    It shares network and head, and is in the mode that they are in: call ``eval()`` on it before
    use, for it classifies as trained.
    """

    def __init__(self, network: nn.Module, layer: str, head: nn.Module) -> None:
        """
        Args:
            network: images (B, C, H, W) -> logits (B, K).
            layer: path of the section's last module, as in ``network.named_modules()``.
            head: the layer's output -> logits (B, K), or a tuple that begins with them.

        Raises:
            ValueError: the network has no such layer.
        """
        super().__init__()
        if layer not in dict(network.named_modules()) or not layer:
            raise ValueError(
                f"The network {type(network).__name__} cannot be left after {layer!r}: name a "
                "module of it, not the input of one, as in network.named_modules()."
            )
        self.network, self.layer, self.head = network, layer, head

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K).

        Raises:
            RuntimeError: the network's forward does not reach the layer.
        """
        handle = self.network.get_submodule(self.layer).register_forward_hook(_leave)
        try:
            self.network(images)
        except _Reached as reached:
            logits = self.head(reached.output)
        else:
            raise RuntimeError(
                f"The layer {self.layer!r} of the network {type(self.network).__name__} does not "
                "run when it classifies an image: name a layer that does."
            )
        finally:
            handle.remove()
        return logits[0] if isinstance(logits, tuple) else logits


class EveryExit(nn.Module):
    """The network and all its heads in one pass, as the ensemble of them needs: for its cost."""

    def __init__(self, network: nn.Module, exits: Mapping[str, EarlyExit]) -> None:
        super().__init__()
        self.network = network
        self.exits = nn.ModuleDict(exits)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the sum of all logits (B, K)."""
        logits: list[Tensor] = []

        def head_of(early_exit: EarlyExit) -> Any:
            def run(module: nn.Module, args: tuple, output: Tensor) -> None:
                result = early_exit.head(output)
                logits.append(result[0] if isinstance(result, tuple) else result)

            return run

        handles = [
            self.network.get_submodule(early_exit.layer).register_forward_hook(head_of(early_exit))
            for early_exit in self.exits.values()
        ]
        try:
            return self.network(images) + sum(logits)
        finally:
            for handle in handles:
                handle.remove()


def early_exits(network: nn.Module, term: OwnTeacher) -> dict[str, EarlyExit]:
    """The exits of a network that was trained by the term ``own_teacher``, by its heads' names.

    Args:
        network: the student.
        term: with the trained heads.

    Raises:
        ValueError: a head reads the input of a layer, after which the network cannot be left.
    """
    return {
        f"head{i + 1}": EarlyExit(network, layer, head)
        for i, (layer, head) in enumerate(zip(term.layers, term.heads, strict=True))
    }


@dataclass(frozen=True)
class Cost:
    """What classifying one image takes.

    Attributes:
        multiply_adds: of convolutions and matrix products (attention included), without their
            biases, normalisation, activations and pooling.
        parameters: numbers that the logits depend on, without buffers such as running statistics.
    """

    multiply_adds: int
    parameters: int


def cost_of(module: nn.Module, image_shape: tuple[int, int, int]) -> Cost:
    """Counts what a network or an `EarlyExit` runs for one image, by running it.

    Operations are those that torch's FlopCounterMode knows, which counts a multiply-add as two.

    Args:
        module: images (1, C, H, W) -> logits (1, K); it is counted in evaluation mode, and
            afterwards as it was before.
        image_shape: (C, H, W).
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    # Leaves of their own: a frozen parameter counts, and no one's gradient changes.
    parameters = {
        name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()
    }
    first = next(iter(parameters.values()))
    images = torch.zeros(1, *image_shape, device=first.device, dtype=first.dtype)
    try:
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            logits = torch.func.functional_call(module, parameters, (images,))
    finally:
        for part, mode in modes.items():
            part.training = mode
    slopes = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
    used = [slope.numel() for slope in slopes if slope is not None]
    return Cost(counter.get_total_flops() // 2, sum(used))
