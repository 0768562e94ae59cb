"""Checkpoints whose ``model`` entry is a stock detector or classifier.

A file written during distillation holds

- ``model``: the student under its stock keys, loaded strictly by stock Detectron2, timm or
  torchvision;
- ``sssd``: of a detector the teacher, the adapter and, where there is one, the share controller; of
  a classifier what its terms train beside it, and its peers;
- ``trainer``: iteration, optimizer, states of the hooks (learning-rate schedule and others).

Beside them, ``last_checkpoint`` names the newest, as everywhere in Detectron2, and
``checkpoints.json`` all of the run, oldest first.
"""

import json
import logging
import os
from contextlib import suppress
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import nn

from ..weights_file import (
    FOREIGN,
    CodeInWeightsError,
    WeightsFileError,
    check_weights,
    read_checkpoint_file,
    read_foreign_weights,
)
from .files import PART, write_whole
from .processes import file_of_main, from_main

__all__ = ["Checkpointer", "CheckpointError", "set_earlier_run_aside"]

logger = logging.getLogger("sssd")

_NEWEST, _ALL = "last_checkpoint", "checkpoints.json"
_COUNTS = "num_batches_tracked"  # of BatchNorm; torch fills it in where a file lacks it


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, said in one sentence."""


class DamagedCheckpointError(CheckpointError):
    """The content of the file is no checkpoint, or not all of one."""


class _DataOnly(FvcoreCheckpointer):
    """Behind Detectron2's checkpointer, which asks here for the content of a torch file."""

    def _load_file(self, f: str) -> dict[str, Any]:
        return read_checkpoint_file(f)


class Checkpointer(DetectionCheckpointer, _DataOnly):
    """Detectron2's checkpointer, which also keeps the training parts and refuses half a match.

    A file is there whole or not at all, and ``last_checkpoint`` names none but whole ones.
    Detectron2 skips what does not fit with a warning in the log. Here

    - a resume whose newest file is damaged goes on from the one before;
    - a resume must find all that was saved: the whole model and every checkpointable;
    - a file for evaluation must fill the whole model;
    - a file to start from may leave heads untouched (fine-tuning), but not all of the backbone
      below the pyramid, or any of it because of its shape; of a classifier, only the layer that
      makes the logits.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs: Any) -> None:
        super().__init__(model, save_dir, **kwargs)
        self._resuming = False
        self._expected: list[str] = []
        self._entry = "model"
        self._whole = False
        self._files: list[str] = []  # of this run, oldest first
        self.last_iteration = -1  # that has been saved
        if hasattr(self.model, "training_parts"):
            self.add_checkpointable("sssd", self.model.training_parts)

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves model and checkpointables as ``<name>.pth``.

        Raises:
            CheckpointError: the file cannot be written; what was there before still is.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if "://" in self.save_dir:  # of a storage service, which names whole objects only
            super().save(name, **kwargs)
            return
        data = {"model": self.model.state_dict()}
        data.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        data.update(kwargs)
        file = f"{name}.pth"
        path = os.path.join(self.save_dir, file)
        self.logger.info(f"Saving checkpoint to {path}")
        files = [*(other for other in self._files if other != file), file]
        listed = json.dumps(files).encode()
        try:
            write_whole(path, lambda f: torch.save(data, f))
            write_whole(os.path.join(self.save_dir, _ALL), lambda f: f.write(listed))
            write_whole(os.path.join(self.save_dir, _NEWEST), lambda f: f.write(file.encode()))
        except (OSError, RuntimeError) as error:  # of torch's writer
            of_disk = isinstance(error, OSError)
            reason = (
                f"[Errno {error.errno}] {error.strerror}"
                if of_disk
                else str(error).strip().splitlines()[0]
            )
            raise CheckpointError(
                f"The checkpoint {path} cannot be written ({reason}): make room, or set OUTPUT_DIR "
                "to a folder that can be written, and go on with --resume from the checkpoint "
                "before, which is unharmed."
            ) from error
        self._files = files
        self.last_iteration = kwargs.get("iteration", -1)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Goes on from the newest checkpoint of the folder that can be read, or loads ``path``.

        Raises:
            CheckpointError: there are checkpoints to go on from, and none can be read.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        self._files = from_main(self._listed_files())
        damaged = []
        for file in reversed(self._files):
            try:
                rest = self.load(os.path.join(self.save_dir, file))
            except DamagedCheckpointError as error:
                self.logger.warning("%s Trying the one before.", error)
                damaged.append(file)
                continue
            self._files = [other for other in self._files if other not in damaged]
            return rest
        raise CheckpointError(
            f"None of the checkpoints in {self.save_dir} can be read "
            f"({', '.join(damaged) or 'last_checkpoint names no file that is there'}): train anew "
            "without --resume."
        )

    def has_checkpoint(self) -> bool:
        """Whether the main process finds one."""
        return from_main(super().has_checkpoint())

    def last_file_or(self, path: str, resume: bool) -> str:
        """With ``resume``, the last checkpoint of the folder, where there is one; else ``path``."""
        if resume and self.has_checkpoint():
            return from_main(self.get_checkpoint_file())
        return path

    def _listed_files(self) -> list[str]:
        """The checkpoints of the run that are there, oldest first."""
        files: list[str] = []
        with suppress(OSError, ValueError), open(os.path.join(self.save_dir, _ALL)) as f:
            files = [str(file) for file in json.load(f)]
        newest = os.path.basename(self.get_checkpoint_file())
        # It decides: somebody may have written another name into it.
        if newest and newest != _NEWEST:
            files = [*(file for file in files if file != newest), newest]
        return [f for f in files if self.path_manager.isfile(os.path.join(self.save_dir, f))]

    def load(
        self,
        path: str,
        checkpointables: list[str] | None = None,
        *,
        whole: bool = False,
        entry: str = "model",
    ) -> dict[str, Any]:
        """Loads a checkpoint.

        Args:
            path: file or URL; empty for none.
            checkpointables: names to load besides the model; None for all (a resume).
            whole: every parameter of the model must be in the file; always so in a resume.
            entry: of the file, that the model is filled from.

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
            if not from_main(self.path_manager.isfile(path)):
                raise CheckpointError(f"The checkpoint {path} does not exist; check MODEL.WEIGHTS.")
        self._resuming = checkpointables is None
        self._expected = list(self.checkpointables) if self._resuming else checkpointables
        self._whole = whole or self._resuming
        self._entry = entry
        try:
            with file_of_main(path) as file:
                return super().load(file, checkpointables)
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
        finally:
            # Detectron2 main takes a load that failed for one that goes on.
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            foreign = filename.endswith(FOREIGN)
            checkpoint = read_foreign_weights(filename) if foreign else super()._load_file(filename)
            check_weights(checkpoint["model"])
        except CodeInWeightsError as error:
            raise CheckpointError(f"The checkpoint {filename} is refused: {error}.") from error
        except (WeightsFileError, OSError) as error:
            raise DamagedCheckpointError(
                f"The checkpoint {filename} cannot be read: {error}; use another file of the same "
                "run."
            ) from error
        missing = [name for name in self._expected if name not in checkpoint]
        if missing and self._resuming:
            raise CheckpointError(
                f"Training cannot resume from {filename}: it lacks {', '.join(missing)}. To "
                "start a new training from its weights, use MODEL.WEIGHTS without --resume."
            )
        if missing:
            what = self.model.without_training_parts
            raise CheckpointError(f"The checkpoint {filename} lacks {', '.join(missing)}: {what}")
        if self._entry != "model":
            if self._entry not in checkpoint:
                raise CheckpointError(
                    f"The checkpoint {filename} has no averaged weights: they are there after a "
                    "training with MODEL.SSSD.AVERAGING.DECAY above 0."
                )
            checkpoint["model"] = checkpoint.pop(self._entry)
        self._filename = filename
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]):
        incompatible = super()._load_model(checkpoint)
        num_keys = len(self.model.state_dict())
        missing, shapes = incompatible.missing_keys, incompatible.incorrect_shapes
        # Shapes that differ are left out of what is loaded, so they count as missing as well.
        if self._whole:
            bad = bool(missing)
        elif hasattr(self.model, "classifier_keys"):
            bad = not self.model.classifier_keys.issuperset(missing)
        else:
            backbone = {
                key
                for key in self.model.state_dict()
                if key.startswith("backbone.bottom_up.") and not key.endswith(_COUNTS)
            }
            bad = (
                len(missing) == num_keys
                or any("backbone" in key for key, _, _ in shapes)
                # Some may be new, such as the offsets of deformable convolutions.
                or (bool(backbone) and backbone.issubset(missing))
            )
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


def set_earlier_run_aside(folder: str) -> None:
    """So that a resume of the run that begins in ``folder`` never goes on from an earlier one.

    The earlier run's checkpoints stay where they are until a file of the same name replaces them.
    """
    with suppress(OSError):
        os.remove(os.path.join(folder, _ALL))
    newest = os.path.join(folder, _NEWEST)
    if os.path.isfile(newest):
        os.replace(newest, newest + "_of_earlier_run")
        logger.warning(
            "%s holds the checkpoints of an earlier run, and this one begins anew, without "
            "--resume. To go on with the earlier one instead, rename "
            "last_checkpoint_of_earlier_run to last_checkpoint before this one saves.",
            folder,
        )
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name.endswith(".pth" + PART):
            os.remove(os.path.join(folder, name))
