"""The distillation term of the detectors: adapter, normalisation, distance."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .divergence import stable_root
from .fused import is_supported
from .normalisation import NORMS
from .pyramid import (
    DISTANCES,
    Distance,
    Pyramid,
    check_choice,
    check_options,
    check_pyramids,
    combine_levels,
    count_elements,
    pyramid_distance,
)

__all__ = ["PyramidAdapter", "PyramidDistillation"]


class PyramidAdapter(nn.Sequential):
    """Three 3x3 convolutions with ReLU between them, shared by all levels (LGD's adapter).

    It takes up the systematic difference between the student's maps and the teacher's, so that
    the student itself need not. Maps (N, C, H, W) keep their shape.
    """

    def __init__(self, channels: int, hidden_dim: int = 0) -> None:
        """
        Args:
            channels: width C.
            hidden_dim: width between the convolutions; 0 for C.
        """
        width = hidden_dim or channels
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )


class PyramidDistillation(nn.Module):
    """Distance of norm(adapter(student)) from norm(teacher without gradient).

    The published coefficients of LGD and SSSD assume instance normalisation on both sides, those
    of LabelEnc layer normalisation, and all an adapter on the student's side only. The result is
    raw: the coefficient is applied by the caller.
    """

    def __init__(
        self,
        *,
        channels: int,
        distance: str = "js",
        axis: str = "channel",
        reduction: str = "element_mean",
        level_reduction: str = "mean",
        level_weights: Sequence[float] = (),
        temperature: float = 1.0,
        log_base: float = 2.0,
        mask_padding: bool = True,
        norm: str = "instance",
        adapter_dim: int = 0,
    ) -> None:
        """
        Args:
            channels: width C of the pyramid.
            mask_padding: leave the padded cells of the batch out of normalisation and distance.
            norm: "instance" (LGD, SSSD) or "layer" (LabelEnc).
            adapter_dim: width between the convolutions of the adapter; 0 for C (LGD).
            others: see :func:`sssd.losses.pyramid_distance`.

        Raises:
            ValueError: for an unknown option.
        """
        super().__init__()
        self.adapter = PyramidAdapter(channels, adapter_dim)
        self.mask_padding = mask_padding
        check_choice("norm", norm, NORMS)
        self.norm = norm
        self.options = {
            "distance": distance,
            "axis": axis,
            "reduction": reduction,
            "level_reduction": level_reduction,
            "level_weights": tuple(level_weights),
            "temperature": temperature,
            "log_base": log_base,
        }
        check_options(**self.options)  # now, and not at the first iteration of a training

    def forward(
        self, student: Pyramid, teacher: Pyramid, masks: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """
        Args:
            student, teacher: level -> (N, C, H, W). The teacher gets no gradient from here; detach
                the student's maps to train the adapter alone.
            masks: level -> bool (N, H, W), True inside the images.

        Returns:
            Scalar distance, float32.

        Raises:
            ValueError: for pyramids or masks that do not match.
        """
        check_pyramids(student, teacher, masks)
        if not self.mask_padding:
            masks = None

        adapted = self._adapted(student)
        target = {level: teacher[level].detach() for level in student}
        chosen = DISTANCES[self.options["distance"]]
        if (
            chosen.of_unnormalised is not None
            and self.options["axis"] == "channel"
            and self.options["reduction"] == "element_mean"
            and all(is_supported(x) for x in adapted.values())
        ):
            return self._at_once(chosen, adapted, target, masks)

        return pyramid_distance(
            self._normalised(adapted, masks),
            self._normalised(target, masks),
            masks=masks,
            **self.options,
        )

    @torch.no_grad()
    def position_distances(
        self, student: Pyramid, teacher: Pyramid, masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Where the pyramids differ: the distance over the channels at each position, to look at.

        Args:
            student, teacher, masks: as in :meth:`forward`.

        Returns:
            Level -> (N, H, W), of which the "per_distribution" distance over channels is the mean.
        """
        check_pyramids(student, teacher, masks)
        masks = masks if self.mask_padding else None
        chosen = DISTANCES[self.options["distance"]]
        scales = {key: self.options[key] for key in ("temperature", "log_base")}
        maps = {}
        target = self._normalised(teacher, masks)
        for level, x in self._normalised(self._adapted(student), masks).items():
            divergence = chosen.divergence(x, target[level], dim=1, mask=None, **scales)
            maps[level] = stable_root(divergence) if chosen.root else divergence
        return maps

    def _adapted(self, student: Pyramid) -> dict[str, Tensor]:
        return {level: self.adapter(x) for level, x in student.items()}

    def _normalised(self, maps: Pyramid, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {
            level: NORMS[self.norm](x, None if masks is None else masks[level])
            for level, x in maps.items()
        }

    def _at_once(
        self,
        chosen: Distance,
        adapted: Pyramid,
        target: Pyramid,
        masks: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """The same, with normalisation and divergence in one."""
        levels = {}
        for level, x in adapted.items():
            mask = None if masks is None else masks[level]
            nats = chosen.of_unnormalised(
                x,
                target[level],
                mask,
                across_channels=self.norm == "layer",
                temperature=self.options["temperature"],
            )
            num_elements = count_elements(x, mask)
            value = nats / math.log(self.options["log_base"]) / num_elements
            levels[level] = stable_root(value) if chosen.root else value, num_elements
        return combine_levels(
            levels, self.options["level_reduction"], self.options["level_weights"]
        )

    def extra_repr(self) -> str:
        options = {**self.options, "mask_padding": self.mask_padding, "norm": self.norm}
        return ", ".join(f"{k}={v}" for k, v in options.items())
