"""Checkpoints whose ``model`` entry is a stock detector or classifier.

A file written during distillation holds

- ``model``: the student under its stock keys, loaded strictly by stock Detectron2, timm or
  torchvision;
- ``sssd``: of a detector the teacher, the adapter and, where there is one, the share controller; of
  a classifier what its terms train beside it, and its peers;
- ``trainer``: iteration, optimizer, states of the hooks (learning-rate schedule and others).
"""

from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..meta_arch import ClassificationDistiller

__all__ = ["Checkpointer", "CheckpointError"]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, said in one sentence."""


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also keeps the training parts and refuses half a match.

    Detectron2 skips what does not fit with a warning in the log. Here

    - a resume must find all that was saved: the whole model and every checkpointable;
    - a file for evaluation must fill the whole model;
    - a file to start from may leave heads untouched (fine-tuning), but not the backbone; of a
      classifier, only the layer that makes the logits.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs: Any) -> None:
        super().__init__(model, save_dir, **kwargs)
        self._resuming = False
        self._expected: list[str] = []
        self._whole = False
        if hasattr(self.model, "training_parts"):
            self.add_checkpointable("sssd", self.model.training_parts)

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, whole: bool = False
    ) -> dict[str, Any]:
        """Loads a checkpoint.

        Args:
            path: file or URL; empty for none.
            checkpointables: names to load besides the model; None for all (a resume).
            whole: every parameter of the model must be in the file; always so in a resume.

        Raises:
            CheckpointError: when the file cannot be had or read, lacks what it must hold, or
                belongs to another architecture.
        """
        if path:
            try:
                path = self.path_manager.get_local_path(path)
            except Exception as error:
                raise CheckpointError(
                    f"The weights {path} cannot be fetched ({error}); download the file where "
                    "there is a network and set MODEL.WEIGHTS to its path, or train from random "
                    "weights (MODEL.WEIGHTS '', with BatchNorm or GroupNorm and nothing frozen)."
                ) from error
            if not self.path_manager.isfile(path):
                raise CheckpointError(f"The checkpoint {path} does not exist; check MODEL.WEIGHTS.")
        self._resuming = checkpointables is None
        self._expected = list(self.checkpointables) if self._resuming else checkpointables
        self._whole = whole or self._resuming
        try:
            return super().load(path, checkpointables)
        except RuntimeError as error:
            # load_state_dict's first line has the class, each further one what does not fit.
            first, _, others = str(error).partition("\n")
            if not first.startswith("Error(s) in loading state_dict"):
                raise
            reason = others.strip().partition("\n")[0].strip(" .")
            raise CheckpointError(
                f"What was trained beside the model in {path} is not what this config trains "
                f"({reason}); use the config that it was trained with."
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            checkpoint = super()._load_file(filename)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error)
            raise CheckpointError(
                f"The checkpoint {filename} cannot be read ({reason}): it is truncated or no "
                "checkpoint; use another file of the same run."
            ) from error
        missing = [name for name in self._expected if name not in checkpoint]
        if missing and self._resuming:
            raise CheckpointError(
                f"Training cannot resume from {filename}: it lacks {', '.join(missing)}. To "
                "start a new training from its weights, use MODEL.WEIGHTS without --resume."
            )
        if missing:
            if isinstance(self.model, ClassificationDistiller):
                what = (
                    "it is a classifier without the heads, branches or peers that are evaluated "
                    "beside it. Use a file that its training has written, such as "
                    "model_final.pth, or a config without them (MODEL.SSSD.CLASSIFIER.TERMS and "
                    "PEERS)."
                )
            else:
                what = (
                    "it is a detector without the parts that trained it. Use a file that "
                    "self-distillation has written, or set "
                    "MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH to False."
                )
            raise CheckpointError(f"The checkpoint {filename} lacks {', '.join(missing)}: {what}")
        self._filename = filename
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]):
        incompatible = super()._load_model(checkpoint)
        num_keys = len(self.model.state_dict())
        missing, shapes = incompatible.missing_keys, incompatible.incorrect_shapes
        # Shapes that differ are left out of what is loaded, so they count as missing as well.
        if self._whole:
            bad = bool(missing)
        elif isinstance(self.model, ClassificationDistiller):
            bad = not self.model.classifier_keys.issuperset(missing)
        else:
            bad = len(missing) == num_keys or any("backbone" in key for key, _, _ in shapes)
        if bad:
            if shapes:
                key, found, expected = shapes[0]
                example = f"{key} is {found} in the file and {expected} in the model"
            else:
                example = f"{missing[0]} is not in the file"
            raise CheckpointError(
                f"The checkpoint {self._filename} belongs to another architecture: "
                f"{len(missing)} of the model's {num_keys} parameters and buffers are missing or "
                f"of another shape ({example}); use the config that it was trained with."
            )
        return incompatible
