"""Small trained parts that stand between a student's layer and a teacher's.

Shapes are of one image: (C, H, W). None of these belongs to the network that is deployed.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "FactorDecoder",
    "FactorEncoder",
    "SectionHead",
    "build_connector",
    "build_regressor",
    "check_map_shapes",
]

_SLOPE = 0.1  # of factor transfer's LeakyReLU


def build_regressor(student: Sequence[int], teacher: Sequence[int], *, kind: str) -> nn.Module:
    """FitNets' regressor, from maps of the student's shape to maps of the teacher's.

    Args:
        student, teacher: (C, H, W).
        kind: "valid", one convolution without padding whose kernel makes up the difference of the
            sizes, and a ReLU, as the hint has had one (official code, which has the teacher's own
            nonlinearity there); or "strided", a 3x3 convolution of stride 2 to half the size, a 4x4
            transposed one to twice the size, else one without padding, and BatchNorm and ReLU
            (RepDistiller).

    Raises:
        ValueError: for an unknown kind, or shapes that it cannot join.
    """
    check_map_shapes("A regressor", student, teacher)
    (width_in, *size_in), (width, *size) = student, teacher
    shrinks = all(a >= b for a, b in zip(size_in, size, strict=True))
    kernel = [a - b + 1 for a, b in zip(size_in, size, strict=True)]
    if kind == "valid" and shrinks:
        return nn.Sequential(nn.Conv2d(width_in, width, kernel), nn.ReLU())
    if kind == "strided":
        convolution = None
        if size == [(a + 1) // 2 for a in size_in]:
            convolution = nn.Conv2d(width_in, width, 3, stride=2, padding=1)
        elif size == [2 * a for a in size_in]:
            convolution = nn.ConvTranspose2d(width_in, width, 4, stride=2, padding=1)
        elif shrinks:
            convolution = nn.Conv2d(width_in, width, kernel)
        if convolution is not None:
            return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())
    if kind not in ("valid", "strided"):
        raise ValueError(f"The regressor of the hint is {kind!r}: use 'valid' or 'strided'.")
    raise ValueError(
        f"A {kind!r} regressor cannot turn the student's map of the shape {tuple(student)} into "
        f"the teacher's, {tuple(teacher)}: choose a layer of the student whose map is at least as "
        "large as the teacher's."
    )


def build_connector(
    student: Sequence[int], teacher: Sequence[int], names: tuple[str, str]
) -> nn.Module:
    """Activation boundaries' connector: a 1x1 convolution and BatchNorm where the widths differ.

    Args:
        student, teacher: (C, H, W).
        names: of the two layers, for the error.

    Raises:
        ValueError: heights or widths differ.
    """
    check_map_shapes("A connector", student, teacher)
    if tuple(student[1:]) != tuple(teacher[1:]):
        raise ValueError(
            f"A connector cannot join the student's {names[0]!r}, a map of the shape "
            f"{tuple(student)}, and the teacher's {names[1]!r}, {tuple(teacher)}: their heights "
            "and widths must be equal; choose layers of equal size."
        )
    if student[0] == teacher[0]:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(student[0], teacher[0], 1, bias=False), nn.BatchNorm2d(teacher[0])
    )


def _factor_layers(
    convolution: type[nn.Module], widths: Sequence[tuple[int, int]], norm: bool
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width_in, width in widths:
        layers.append(convolution(width_in, width, 3, padding=1))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(nn.LeakyReLU(_SLOPE))
    return layers


class FactorEncoder(nn.Sequential):
    """Maps (B, C, H, W) to factors (B, width, H, W): paraphraser or translator."""

    def __init__(self, channels: int, width: int, *, norm: bool = False) -> None:
        widths = [(channels, channels), (channels, width), (width, width)]
        super().__init__(*_factor_layers(nn.Conv2d, widths, norm))


class FactorDecoder(nn.Sequential):
    """Factors (B, width, H, W) back to maps (B, C, H, W), the encoder's mirror image."""

    def __init__(self, width: int, channels: int, *, norm: bool = False) -> None:
        widths = [(width, width), (width, channels), (channels, channels)]
        super().__init__(*_factor_layers(nn.ConvTranspose2d, widths, norm))


class SectionHead(nn.Module):
    """A classifier on an inner section of a network, for BYOT.

    A bottleneck (1x1, k x k with stride k, 1x1 convolutions, a quarter of the width between) brings
    the section's map to the width and about the size of the deepest one; then it is pooled and
    classified.
    """

    def __init__(
        self, section: Sequence[int], deepest: Sequence[int], num_classes: int, name: str
    ) -> None:
        """
        Args:
            section, deepest: (C, H, W) of the section's map and of the deepest one.
            num_classes: number of logits.
            name: of the section, for the error.

        Raises:
            ValueError: one of them is no map, or the section's is smaller than the deepest.
        """
        super().__init__()
        check_map_shapes(f"A head on {name!r}", section, deepest)
        stride = [a // b for a, b in zip(section[1:], deepest[1:], strict=True)]
        if min(stride) < 1:
            raise ValueError(
                f"The section {name!r} has a map of the shape {tuple(section)}, smaller than the "
                f"deepest one, {tuple(deepest)}: name sections before the deepest."
            )
        width, middle = deepest[0], max(deepest[0] // 4, 1)
        self.bottleneck = nn.Sequential(
            *_convolution(section[0], middle, 1),
            *_convolution(middle, middle, stride, stride=stride),
            *_convolution(middle, width, 1),
        )
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, section: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to logits (B, K) and the pooled feature (B, deepest C)."""
        feature = F.adaptive_avg_pool2d(self.bottleneck(section), 1).flatten(1)
        return self.classifier(feature), feature


def _convolution(
    width_in: int, width: int, kernel: int | Sequence[int], **options: object
) -> list[nn.Module]:
    convolution = nn.Conv2d(width_in, width, kernel, bias=False, **options)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


def check_map_shapes(what: str, *shapes: Sequence[int]) -> None:
    """Raises ValueError for shapes of an image's value that are not (C, H, W)."""
    for shape in shapes:
        if len(shape) != 3:
            raise ValueError(
                f"{what} needs layers whose value for an image is a map (channels, height, width), "
                f"got the shape {tuple(shape)}: name other layers."
            )
