"""What a term may look at when it is built: networks, and the shapes inside them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from .capture import Capture

__all__ = ["Surroundings", "cannot_take", "probe"]


@dataclass
class Surroundings:
    """What a term may look at when it is built.

    Attributes:
        student: the network that will learn, already built.
        teacher: the frozen network, or None.
        num_classes: number of logits.
        image_shape: (channels, height, width) of the images.
        num_peers: networks that learn beside the student.
        new_network: builds the student's network once more, with other random weights.
    """

    student: nn.Module
    teacher: nn.Module | None
    num_classes: int
    image_shape: tuple[int, int, int]
    num_peers: int = 0
    new_network: Callable[[], nn.Module] | None = None
    _shapes: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict, repr=False)

    def student_shape(self, layer: str) -> tuple[int, ...]:
        """Shape of a layer of the student for one image, such as (C, H, W).

        Raises:
            ValueError: the student has no such layer.
        """
        return self._shape(self.student, layer)

    def teacher_shape(self, layer: str) -> tuple[int, ...]:
        """Shape of a layer of the teacher for one image.

        Raises:
            ValueError: the teacher has no such layer.
        """
        return self._shape(self.teacher, layer)

    def _shape(self, network: nn.Module, layer: str) -> tuple[int, ...]:
        key = (id(network), layer)
        if key not in self._shapes:
            self._shapes[key] = probe(network, layer, self.image_shape)
        return self._shapes[key]


def probe(network: nn.Module, layer: str, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what a layer makes of one image; the network is afterwards as it was before."""
    first = next(network.parameters())
    images = torch.zeros(1, *image_shape, device=first.device, dtype=first.dtype)
    modes = {module: module.training for module in network.modules()}
    capture = Capture(network, [layer])
    network.eval()
    try:
        with torch.no_grad(), capture:
            network(images)
        return tuple(capture[layer].shape[1:])
    except (AssertionError, RuntimeError) as error:
        raise ValueError(cannot_take(network, image_shape, error)) from error
    except KeyError:
        raise ValueError(
            f"The layer {layer!r} of the network {type(network).__name__} does not run when it "
            "classifies an image: name a layer that does."
        ) from None
    finally:
        for module, mode in modes.items():
            module.training = mode


def cannot_take(network: nn.Module, image_shape: tuple[int, ...], error: Exception) -> str:
    """The sentence for a network that fails on images of a shape."""
    reason = str(error).strip().partition("\n")[0]
    return (
        f"The network {type(network).__name__} cannot take images of the shape "
        f"{tuple(image_shape)} (channels, height, width): {reason}. Set "
        "MODEL.SSSD.CLASSIFIER.SIZE or NETWORK_OPTIONS to what it takes."
    )
