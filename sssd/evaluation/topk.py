"""Top-1 and top-5 accuracy of one or more classifiers on the same images."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

__all__ = ["ClassificationEvaluator"]

STUDENT = "student"
TASK = "classification"  # under which the student's figures are reported

logger = logging.getLogger(__name__)


class _Image(NamedTuple):
    """How one image was classified; this is all that is kept of it."""

    label: int
    # name -> how many classes come before the label's, so 0 is right; None for NaN among the logits
    ranks: dict[str, int | None]


class ClassificationEvaluator(DatasetEvaluator):
    """Accuracy in percent for each named logit vector of a classification model.

    Results are ``{"classification": {"top1": 93.1, "top5": 99.8}, "head1": {...}, ...}``, where
    "classification" is the student's logits and the others keep their names. "top5" is there with
    more than five classes only, since it is 100 for any smaller number.

    The classes are ordered by logit, and equal ones by their index: a constant prediction is right
    for the images of class 0 only. An image with a NaN among its logits counts as wrong, and a
    warning says how many there are. An image that is met several times (samplers that pad their
    shards with repeated images) counts once.
    """

    def __init__(self, dataset_name: str, distributed: bool = True) -> None:
        """
        Args:
            dataset_name: the dataset's name in Detectron2's catalog. If its metadata have
                ``classes``, the number of logits is compared with theirs.
            distributed: whether to gather over all processes; otherwise each evaluates its own.
        """
        self._dataset_name = dataset_name
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._images: dict[Any, _Image] = {}
        self._num_classes = 0

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Takes a batch into account.

        Args:
            inputs: "label" and "image_id" of each image.
            outputs: of each image "logits": name -> (C,) tensor; "student" is among the names, and
                all images have the same names.

        Raises:
            ValueError: one of these is missing, the names differ, a label is not among the logits,
                or there are not as many logits as classes.
        """
        if not inputs:
            return
        for record in inputs:
            for key in ("label", "image_id"):
                if key not in record:
                    raise ValueError(
                        f"An input of the dataset {self._dataset_name!r} has no {key!r}, only "
                        f"{', '.join(sorted(record))}: its mapper must keep it in evaluation."
                    )
        labels = [int(record["label"]) for record in inputs]
        logits = [output["logits"] for output in outputs]
        self._check_names(logits)
        ranks = {
            name: self._ranks(name, torch.stack([image[name] for image in logits]), labels)
            for name in logits[0]
        }
        for i, (record, label) in enumerate(zip(inputs, labels, strict=True)):
            image = _Image(label, {name: ranks[name][i] for name in ranks})
            self._add(self._images, record["image_id"], image)

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """The accuracies of all images so far.

        Returns:
            See the class; empty on other processes than the main one, and, with a warning, when
            there were no images.

        Raises:
            ValueError: one image_id came with two labels, or images with different names.
        """
        images, num_classes = self._images, self._num_classes
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather((images, num_classes), dst=0)
            if not comm.is_main_process():
                return OrderedDict()
            images, num_classes = {}, max(number for _, number in gathered)
            for part, _ in gathered:
                for image_id, image in part.items():
                    self._add(images, image_id, image)
        if not images:
            logger.warning("No images of %r were evaluated: no results.", self._dataset_name)
            return OrderedDict()
        names = next(iter(images.values())).ranks
        self._check_names([image.ranks for image in images.values()])
        results = OrderedDict()
        for name in (STUDENT, *(name for name in names if name != STUDENT)):
            ranks = [image.ranks[name] for image in images.values()]
            if None in ranks:
                logger.warning(
                    "%d of the %d images of %r have NaN among the logits of %r; they count as "
                    "wrong.",
                    ranks.count(None),
                    len(ranks),
                    self._dataset_name,
                    name,
                )
            results[TASK if name == STUDENT else name] = {
                f"top{k}": 100.0 * sum(r is not None and r < k for r in ranks) / len(ranks)
                for k in (1, 5)
                if k == 1 or k < num_classes
            }
        return results

    def _check_names(self, vectors: Sequence[dict[str, Any]]) -> None:
        names = set(vectors[0])
        if STUDENT not in names or TASK in names:
            raise ValueError(
                f"The logits that the model returned for {self._dataset_name!r} are named "
                f"{', '.join(sorted(names)) or 'nothing'}: one must be {STUDENT!r}, and none "
                f"{TASK!r}, under which the student's accuracy is reported."
            )
        for other in vectors:
            if set(other) != names:
                raise ValueError(
                    f"The model returned logits named {', '.join(sorted(names))} for some images "
                    f"of {self._dataset_name!r} and {', '.join(sorted(other))} for others: it must "
                    "return the same for all."
                )

    def _ranks(self, name: str, logits: Tensor, labels: list[int]) -> list[int | None]:
        """For logits (N, C) the number of classes that come before each label's."""
        if logits.dim() != 2:
            raise ValueError(
                f"The logits {name!r} of an image have the shape {tuple(logits.shape[1:])}: return "
                "one vector (classes,) for each image."
            )
        num_classes = logits.shape[1]
        classes = MetadataCatalog.get(self._dataset_name).get("classes")
        wanted = len(classes) if classes else self._num_classes or num_classes
        if num_classes != wanted:
            source = "the dataset has" if classes else "others had"
            raise ValueError(
                f"The logits {name!r} are for {num_classes} classes and {source} {wanted} "
                f"({self._dataset_name!r}): build the network with num_classes={wanted}."
            )
        self._num_classes = num_classes
        for label in labels:
            if not 0 <= label < num_classes:
                raise ValueError(
                    f"An image of {self._dataset_name!r} has the label {label}, and the logits "
                    f"{name!r} are for the classes 0 to {num_classes - 1}: correct the label, or "
                    "build the network with more classes."
                )
        target = torch.tensor(labels, device=logits.device)[:, None]
        value = logits.gather(1, target)
        lower_index = torch.arange(num_classes, device=logits.device) < target
        before = (logits > value) | ((logits == value) & lower_index)
        ranks = before.sum(1).masked_fill(logits.isnan().any(1), -1)
        return [None if rank < 0 else rank for rank in ranks.tolist()]

    def _add(self, images: dict[Any, _Image], image_id: Any, image: _Image) -> None:
        known = images.setdefault(image_id, image)
        if known.label != image.label:
            raise ValueError(
                f"The image_id {image_id!r} of {self._dataset_name!r} comes with the labels "
                f"{known.label} and {image.label}: give every image an id of its own."
            )
