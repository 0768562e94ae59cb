"""COCO average precision through Detectron2's evaluator, computed by faster-coco-eval.

Detectron2 has a compiled COCOeval of its own, which an unbuilt Detectron2 lacks, and pycocotools,
which is slow. This evaluator keeps Detectron2's interface, files, log lines and result dict, and
changes only the class that matches detections to ground truth.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import numpy as np
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.utils import comm
from pycocotools.cocoeval import COCOeval

from sssd.data import dataset_files, is_coco_style
from sssd.disk import naming

__all__ = ["BACKENDS", "FastCOCOEvaluator"]

BACKENDS = ("auto", "faster_coco_eval", "pycocotools")

logger = logging.getLogger(__name__)


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with a choice of what computes the average precision.

    Results are Detectron2's: per task ("bbox", "segm", "keypoints") a dict of AP, AP50, AP75, APs,
    APm, APl and, where there are several classes, AP-<class>; all from 0 to 100. NaN stands for
    what cannot be computed because no ground truth exists for it. A detector that finds nothing
    gets 0.0 for everything that has ground truth (Detectron2 gives NaN or an empty dict, which
    leaves the selection of the best checkpoint without a number in the first evaluations).

    Attributes:
        backend: "faster_coco_eval" or "pycocotools", the one in use.
        stats: task -> COCO's own summary of the latest evaluation, from 0 to 1, -1 for "cannot be
            computed": 12 values for boxes and masks (AP, AP50, AP75, APs, APm, APl, then AR for
            1, 10 and the most detections an image, ARs, ARm, ARl), 10 for keypoints.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        backend: str = "auto",
        max_dets_per_image: int | None = None,
        kpt_oks_sigmas: Sequence[float] = (),
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset with ``json_file`` in its metadata, or in
                Detectron2's own format (then it is converted, below ``output_dir``).
            tasks: some of "bbox", "segm", "keypoints"; None takes them from the predictions.
            distributed: gather the predictions of all processes and evaluate on the main one;
                the others get an empty dict.
            output_dir: where the predictions are written, if anywhere.
            backend: "faster_coco_eval", "pycocotools", or "auto" for the first where it is
                installed and can read the file, else the second.
            max_dets_per_image: most detections that count in an image, 10 or more; None is 100.
            kpt_oks_sigmas: OKS sigma of each keypoint; empty is COCO's 17.

        Raises:
            ValueError: for an unknown backend, a limit of detections below 10, or when
                faster-coco-eval is asked for and the file has ids it cannot hold.
            FileNotFoundError: when the annotation file does not exist.
            ImportError: when faster-coco-eval is asked for and is not installed.
        """
        if backend not in BACKENDS:
            raise ValueError(
                f"Unknown COCO evaluation backend {backend!r}; choose one of {', '.join(BACKENDS)}."
            )
        if max_dets_per_image is not None and max_dets_per_image < 10:
            # Detectron2 sorts it among COCO's limits 1 and 10, and reports AP at the largest.
            raise ValueError(
                f"max_dets_per_image={max_dets_per_image} would be read as 10, because COCO also "
                "computes recall for 10 detections; give at least 10."
            )
        fast_coco = None if backend == "pycocotools" else _import_fast_coco()
        if backend == "faster_coco_eval" and fast_coco is None:
            raise ImportError(
                "backend='faster_coco_eval' needs the package faster-coco-eval, which is not "
                "installed; run `pip install faster-coco-eval` or use backend='pycocotools'."
            )
        try:
            super().__init__(
                dataset_name,
                tasks,
                distributed,
                output_dir,
                max_dets_per_image=max_dets_per_image,
                use_fast_impl=False,  # Detectron2's own fast one is the extension we never need
                kpt_oks_sigmas=kpt_oks_sigmas,
            )
        except FileNotFoundError:
            if is_coco_style(dataset_name):
                dataset_files(dataset_name)  # raises with the path and the variable to set
            raise
        self._json_file = self._metadata.json_file
        self._dataset_name = dataset_name
        dataset = self._coco_api.dataset
        bad_id = _first_non_integer_id(dataset) if fast_coco is not None else None
        if bad_id is not None:
            message = (
                f"faster-coco-eval holds integer ids only, and {self._json_file} has the "
                f"id {bad_id!r}"
            )
            if backend == "faster_coco_eval":
                raise ValueError(f"{message}; use backend='pycocotools' or number the ids.")
            logger.warning(f"{message}: evaluating with pycocotools.")
            fast_coco = None

        # Both implementations mark "unmatched" with id 0, so that an annotation of that id counts
        # as missed when it is found, and keep one annotation per id. Ids are never reported:
        # numbering them anew loses nothing.
        for number, annotation in enumerate(dataset.get("annotations", ()), start=1):
            annotation["id"] = number
        with contextlib.redirect_stdout(None):
            if fast_coco is None:
                self._coco_api.createIndex()
            else:
                # COCOeval_faster reads attributes that pycocotools' COCO lacks (keypoints).
                self._coco_api = fast_coco(dataset)

        self.backend = "pycocotools" if fast_coco is None else "faster_coco_eval"
        # Which of its two names for a COCOeval Detectron2 looks up, and what it logs: "official
        # COCO API" for pycocotools, "unofficial" for anything else.
        self._use_fast_impl = fast_coco is not None
        self._coco_eval = COCOeval if fast_coco is None else _make_fast_coco_eval
        self._img_ids: Sequence[int] | None = None
        self.stats: dict[str, np.ndarray] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Detectron2's ``process``, which first sees that the ground truth has the images.

        Raises:
            ValueError: for an image id that is not in the annotation file.
        """
        self._check_image_ids(record["image_id"] for record in inputs)
        super().process(inputs, outputs)

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Compute the metrics of everything processed since ``reset()``.

        Args:
            img_ids: the images to evaluate on; None for all of the annotation file.

        Returns:
            task -> metric -> value from 0 to 100, or NaN. Empty on all but the main process, and
            for a file without the key "annotations" (a test set; predictions are still written).

        Raises:
            ValueError: for an image id that is not in the annotation file, and when the metadata
                lacks the classes because the dataset was never loaded.
            OSError: ``output_dir`` cannot be written.
        """
        self._check_image_ids(img_ids or ())
        self._check_classes()
        self._img_ids = img_ids
        self.stats = {}
        with naming(self._output_dir or "standard output"):
            results = super().evaluate(img_ids)
        if results or not self._do_evaluation:
            return results
        if self._distributed and not comm.is_main_process():
            return results
        # Nothing processed had any instances: Detectron2 has said so, and gave no metric at all.
        class_names = self._metadata.get("thing_classes")
        return OrderedDict(
            (task, self._derive_coco_results(None, task, class_names=class_names))
            for task in sorted(self._tasks or ("bbox",))
        )

    def _eval_predictions(
        self, predictions: list[dict], img_ids: Sequence[int] | None = None
    ) -> None:
        # Detectron2 finds its COCOeval by name in its module, where nothing else can reach it; the
        # names are put back even after an exception, so its own evaluator is as it was.
        if not self._coco_api.anns:
            # Its keypoint checks look into the first annotation; None is "nothing to compare".
            changes = {"_evaluate_predictions_on_coco": lambda *args, **kwargs: None}
        elif self._use_fast_impl:
            changes = dict.fromkeys(("COCOeval_opt", "COCOevalMaxDets"), self._coco_eval)
        else:
            changes = {"COCOeval": self._coco_eval}
        with mock.patch.multiple(coco_evaluation, **changes):
            super()._eval_predictions(predictions, img_ids=img_ids)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            lacking = "detections" if self._coco_api.anns else f"annotations in {self._json_file}"
            self._logger.warning(
                f"[{type(self).__name__}] {self._dataset_name}, {iou_type}: there are no {lacking}."
            )
            coco_eval = self._evaluate_without_detections(iou_type)
        self.stats[iou_type] = np.array(coco_eval.stats)
        return super()._derive_coco_results(coco_eval, iou_type, class_names=class_names)

    def _evaluate_without_detections(self, iou_type: str) -> Any:
        """A summarized COCOeval of an empty list of detections, which ``loadRes`` does not take.

        By COCO's definition precision is 0 at every recall where ground truth exists, and -1
        (Detectron2 makes it NaN) where none does. Returning NaN for all, as Detectron2 does,
        would make "found nothing" look like "nothing to find", and best-checkpoint logic, which
        cannot order NaN, would skip such evaluations.
        """
        detections = type(self._coco_api)()
        detections.dataset = {**self._coco_api.dataset, "annotations": []}
        with contextlib.redirect_stdout(None):
            detections.createIndex()
        coco_eval = self._coco_eval(self._coco_api, detections, iou_type)
        if self._img_ids is not None:
            coco_eval.params.imgIds = self._img_ids
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
        return coco_eval

    def _check_image_ids(self, image_ids: Iterable) -> None:
        for image_id in image_ids:
            if image_id not in self._coco_api.imgs:
                raise ValueError(
                    f"Image id {image_id!r}, evaluated for '{self._dataset_name}', is not among "
                    f"the {len(self._coco_api.imgs)} images of {self._json_file}; "
                    "evaluate on the images this file describes, or add the image to it."
                )

    def _check_classes(self) -> None:
        # Without the mapping Detectron2 takes class numbers for category ids, which is right for
        # files it wrote itself, and silently wrong for others.
        categories = self._coco_api.cats
        if hasattr(self._metadata, "thing_dataset_id_to_contiguous_id"):
            return
        if set(categories) != set(range(len(categories))):
            raise ValueError(
                f"The metadata of '{self._dataset_name}' does not say which class each category "
                f"of {self._json_file} is, because the dataset has not been loaded; call "
                f"DatasetCatalog.get({self._dataset_name!r}) before evaluating."
            )


def _import_fast_coco() -> type | None:
    """The ``COCO`` class of faster-coco-eval, or None where the package is not installed."""
    try:
        from faster_coco_eval import COCO as FastCOCO
    except ImportError:
        return None
    return FastCOCO


def _make_fast_coco_eval(coco_gt: Any, coco_dt: Any, iou_type: str) -> Any:
    """A ``COCOeval_faster`` that behaves as pycocotools' class, in whose place it is called."""
    from faster_coco_eval import COCOeval_faster

    # pycocotools prints its summary, and so the tables appear where Detectron2's users look.
    coco_eval = COCOeval_faster(coco_gt, coco_dt, iou_type, print_function=print)
    # It leaves out the categories without keypoint annotations, by which the per-class columns
    # would no longer be those of the dataset's classes.
    coco_eval.params.catIds = sorted(coco_gt.getCatIds())
    return coco_eval


def _first_non_integer_id(dataset: dict) -> Any | None:
    """The first image or category id of a COCO-format dict that is no integer; None if all are."""
    for kind in ("images", "categories"):
        for entry in dataset.get(kind, ()):
            if not isinstance(entry["id"], int):
                return entry["id"]
    return None
