"""The rest of a network from one of its layers on, as a module of its own."""

import torch
from torch import Tensor, nn

from .capture import Capture

__all__ = ["NetworkTail"]


class NetworkTail(nn.Module):
    """What a network computes from the input of a layer to its logits.

    It is the network itself, in which every module that runs before the layer does nothing. That is
    right for a chain of modules, as residual networks are above their blocks; whether it is for
    this one is tried out, once.
    """

    def __init__(self, network: nn.Module, layer: str, image_shape: tuple[int, int, int]) -> None:
        """
        Args:
            network: becomes part of this module, and loses the layers before.
            layer: path of the first module that is kept.
            image_shape: (channels, height, width) of the images.

        Raises:
            ValueError: there is no such layer, or what precedes it is no chain.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, *image_shape, generator=generator)
        capture = Capture(network, [f"{layer}:input"])
        was_training = network.training
        network.eval()
        with torch.no_grad(), capture:
            expected = network(images)
            for path in _paths_before(network, layer, images):
                parent, _, name = path.rpartition(".")
                setattr(network.get_submodule(parent), name, nn.Identity())
        try:
            with torch.no_grad():
                is_tail = torch.equal(network(capture[f"{layer}:input"]), expected)
        except (RuntimeError, ValueError, TypeError):
            is_tail = False
        if not is_tail:
            raise ValueError(
                f"The network {type(network).__name__} cannot branch off before {layer!r}, since "
                "it is no chain of modules there: name a stage of a residual network, such as "
                "'layer3'."
            )
        self.network = network.train(was_training)

    def forward(self, features: Tensor) -> Tensor:
        """The layer's input (B, C, H, W) to logits (B, K)."""
        # A copy: the tail may begin with an in-place ReLU, and others read the same map.
        return self.network(features.clone())


def _paths_before(network: nn.Module, layer: str, images: Tensor) -> list[str]:
    """Modules beside the path to ``layer`` that begin to run before it, by their paths."""
    order: list[str] = []
    handles = []
    parts = layer.split(".")
    for depth in range(len(parts)):
        parent = ".".join(parts[:depth])
        for name, child in network.get_submodule(parent).named_children():
            path = f"{parent}.{name}" if parent else name

            def note(*_: object, path: str = path) -> None:
                order.append(path)

            handles.append(child.register_forward_pre_hook(note))
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    above = {".".join(parts[:depth]) for depth in range(1, len(parts))}
    return [path for path in order[: order.index(layer)] if path not in above]
