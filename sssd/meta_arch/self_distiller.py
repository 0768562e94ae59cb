"""Self-distillation around a stock Detectron2 detector: capture, teach, replay, compare."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..losses import PyramidDistillation, ShareController
from ..teacher import image_cells
from .build import build_distiller_parts, never_calls_backbone
from .evaluation_passes import evaluation_passes
from .ground_truth import ground_truth_objects
from .logged_value import LoggedValue
from .passes import (
    AnchorMatching,
    captured_pyramid,
    constant_parameters,
    forked_random_state,
    frozen,
    replayed_pyramid,
)
from .phases import Phases
from .pooling import pooled_over_cells
from .precision import check_precision, computing_in
from .student_wrapper import StudentWrapper

__all__ = ["SelfDistiller"]


@META_ARCH_REGISTRY.register()
class SelfDistiller(StudentWrapper):
    """Trains ``student``, a stock detector, with a teacher that is made from the ground truth.

    In training, each call

    1. runs the student as it is and *captures* the pyramid of its backbone,
    2. lets the teacher turn the ground truth and that pyramid into a second one,
    3. *replays* the second pyramid through the same student, for the teacher's detection losses
       (not when the teacher is frozen), which train its heads too, unless
       ``teacher_trains_heads`` is False,
    4. adds ``coefficient * distance(student's pyramid, teacher's pyramid)``.

    In evaluation it is the student. Its state dict is the student's as well, so that checkpoints
    hold a stock detector; what else training needs is in ``training_parts``.
    """

    without_training_parts = (
        "it is a detector without the parts that trained it. Use a file that self-distillation "
        "has written, or set MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH to False."
    )

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module,
        distillation: PyramidDistillation,
        coefficient: Callable[[int], float] | ShareController,
        phases: Phases,
        teacher_loss_weight: float = 1.0,
        teacher_trains_heads: bool = True,
        teacher_precision: str = "float32",
        activation_checkpoint: bool = False,
    ) -> None:
        """
        Args:
            student: any detector with a ``backbone`` that returns a dict of maps of equal width.
            teacher: makes the second pyramid (see :mod:`sssd.meta_arch.teachers`).
            distillation: raw distance between the pyramids.
            coefficient: iteration -> weight of the distance, or a controller of its share.
            phases: when the student learns from the teacher, and when its backbone is frozen.
            teacher_loss_weight: factor on the detection losses of the teacher's pass.
            teacher_trains_heads: whether they train the student's heads as well (LGD).
            teacher_precision: "float32", or "bfloat16" for teacher, its pass and the adapter.
            activation_checkpoint: compute what teacher and adapter hold for their gradients
                twice, instead of keeping it.
        """
        super().__init__()
        check_precision(teacher_precision)
        weights = distillation.options["level_weights"]
        if weights and len(weights) != len(teacher.strides):
            raise ValueError(
                f"MODEL.SSSD.DISTANCE.LEVEL_WEIGHTS has {len(weights)} values for the "
                f"{len(teacher.strides)} levels {', '.join(teacher.strides)}; give one for each "
                "level or none."
            )
        self.student = student
        # What exists for training only, and lies beside the student in checkpoints.
        self.training_parts = nn.ModuleDict({"teacher": teacher, "distillation": distillation})
        self.schedule = None
        if isinstance(coefficient, ShareController):
            self.training_parts["coefficient"] = coefficient
        else:
            self.schedule = coefficient
        self.phases = phases
        self.teacher_loss_weight = teacher_loss_weight
        self.teacher_trains_heads = teacher_trains_heads
        self.teacher_precision = teacher_precision
        self.activation_checkpoint = activation_checkpoint
        # Raw distance and coefficient of the last training call, for the log.
        self.last_distance: LoggedValue | None = None
        self.last_coefficient: LoggedValue | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return build_distiller_parts(cfg)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: what the student takes.

        Returns:
            In evaluation, what the student returns. In training, a dict of scalar losses: the
            student's own under their own names, those of the teacher's pass with the prefix
            ``teacher_`` (unless it is frozen), and "loss_distill". Without gradients
            (PreciseBN's passes, a validation loss) the student's own losses alone: there is
            nothing to teach.
        """
        _refuse_export()
        if not self.training or not torch.is_grad_enabled():
            return self.student(batched_inputs)

        iteration = get_event_storage().iter
        teaches = self.teaches
        objects = ground_truth_objects(
            batched_inputs, self.teacher.num_classes, getattr(self.teacher, "mask_strides", None)
        )
        matching = AnchorMatching(self.student)
        with (
            captured_pyramid(self.student.backbone) as pyramid,
            frozen(self.bottom_up, self.phases.freezes_backbone(iteration)),
            matching.recorded(),
        ):
            losses = dict(self.student(batched_inputs))
        if not pyramid:
            raise RuntimeError(never_calls_backbone(self.student))

        coefficient = None if self.schedule is None else self.schedule(iteration)
        untouched = self.untouched(iteration)
        if coefficient == 0 and not teaches:
            self.last_distance, self.last_coefficient = None, LoggedValue(coefficient)
            return {**losses, "loss_distill": untouched}

        features = {level: pyramid[level] for level in self.teacher.strides}
        with frozen(self.teacher, not teaches):
            taught = self._compute(self.teacher, features, objects)
        teacher_losses = {}
        if teaches:
            with matching.answered():
                teacher_losses = self._replay(batched_inputs, {**_detached(pyramid), **taught})

        if not self.phases.distills(iteration):
            features = _detached(features)
        image_sizes = objects.image_sizes.to(self.device, non_blocking=True)
        masks = {
            level: image_cells(image_sizes, x.shape[-2:], self.teacher.strides[level])
            for level, x in features.items()
        }
        distance = self._compute(self.training_parts["distillation"], features, taught, masks)
        if coefficient is None:
            detection_loss = sum(losses.values()) + sum(teacher_losses.values())
            coefficient = self.training_parts["coefficient"](detection_loss, distance)
        self.last_distance, self.last_coefficient = map(LoggedValue, (distance, coefficient))

        losses.update(teacher_losses)
        losses["loss_distill"] = coefficient * distance + untouched
        return losses

    @torch.no_grad()
    def detect_from_teacher(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Detections of the student's heads on the teacher's pyramid, in evaluation mode.

        A diagnostic: the teacher has seen the ground truth, so this is no result but a bound on
        what its pyramid can teach.

        Args:
            batched_inputs: as in training, with "instances".
        """
        if self.training:
            raise RuntimeError("detect_from_teacher needs evaluation mode; call .eval() first.")
        return evaluation_passes(self, batched_inputs).detected_from_teacher

    @property
    def teacher(self) -> nn.Module:
        return self.training_parts["teacher"]

    @property
    def teaches(self) -> bool:
        """Whether the teacher learns; if not, it has no pass of its own through the heads."""
        return any(p.requires_grad for p in self.teacher.parameters())

    @property
    def bottom_up(self) -> nn.Module:
        """The part of the student that the freezing phase freezes: the backbone below the FPN."""
        return getattr(self.student.backbone, "bottom_up", self.student.backbone)

    def frozen_parameters(self, iteration: int) -> list[nn.Parameter]:
        """Parameters that ``iteration`` leaves as they are although the config trains them."""
        frozen = []
        if self.phases.freezes_backbone(iteration):
            frozen += self.bottom_up.parameters()
        if self.schedule is not None and self.schedule(iteration) == 0:
            # Without a gradient, weight decay alone would move it.
            frozen += self.training_parts["distillation"].parameters()
        return [p for p in frozen if p.requires_grad]

    def _compute(self, part: nn.Module, *inputs: Any) -> Any:
        """What a training part returns, in the precision and with the memory that were chosen."""
        with computing_in(self.teacher_precision, self.device):
            if self.activation_checkpoint:
                return checkpoint(part, *inputs, use_reentrant=False)
            return part(*inputs)

    def _replay(self, batched_inputs: list[dict[str, Any]], pyramid: Mapping[str, Tensor]) -> dict:
        """Detection losses of the teacher's pyramid through the student's own heads."""
        storage = get_event_storage()
        try:
            with (
                computing_in(self.teacher_precision, self.device),
                replayed_pyramid(self.student, pyramid),
                pooled_over_cells(self.student),
                constant_parameters(self.student, not self.teacher_trains_heads),
                forked_random_state(self.device),
                # Of its own, because pictures and histograms know no name scope.
                EventStorage(storage.iter) as events,
            ):
                losses = self.student(batched_inputs)
        except Exception as error:
            bad = [level for level, x in pyramid.items() if not x.isfinite().all()]
            if not bad:
                raise
            raise FloatingPointError(
                f"The teacher's maps {', '.join(bad)} hold values that are infinite or NaN"
            ) from error
        for name, (value, _) in events.latest().items():
            storage.put_scalar(f"teacher/{name}", value, events.smoothing_hints()[name])
        return {f"teacher_{name}": self.teacher_loss_weight * x for name, x in losses.items()}

    def __prepare_scriptable__(self) -> None:
        _refuse_export(scripting=True)


def _detached(pyramid: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {level: x.detach() for level, x in pyramid.items()}


def _refuse_export(scripting: bool = False) -> None:
    exporting = (
        scripting
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or getattr(torch.compiler, "is_exporting", lambda: False)()
    )
    if exporting:
        raise RuntimeError(
            "SelfDistiller is for training and evaluation; to trace, script or export, write the "
            "stock detector with tools/export_student.py and give that to Detectron2's own tools."
        )
