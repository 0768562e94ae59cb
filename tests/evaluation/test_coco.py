"""COCO average precision: COCO's own figures, hand-worked cases, and both backends in agreement."""

import copy
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sssd_compat

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
sssd_compat.apply()

import pycocotools.mask as mask_util  # noqa: E402
from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.evaluation import coco_evaluation  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

from sssd.evaluation import FastCOCOEvaluator  # noqa: E402

BACKENDS = ("faster_coco_eval", "pycocotools")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# The full-precision figures of COCO's own fake detections (cocoapi/README.md of the shared data).
COCO_FIGURES = {
    "bbox": """0.5045806987249628 0.6969727247299577 0.5729816669904824 0.5856257209410443
        0.5193996948036719 0.5013978986347466 0.38681277964578054 0.5936795762842003
        0.595352982877607 0.6398109626113442 0.5664205978994309 0.5642905982905982""",
    "segm": """0.3195452758576433 0.5622883972521636 0.29892653412086784 0.3873740315997837
        0.31018272403369485 0.3269339071005138 0.2682297225711534 0.41544868114906375
        0.4168394992198818 0.4694498622754236 0.37675922666197265 0.3814715099715099""",
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "faster_coco_eval":
        pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    return request.param


@pytest.fixture
def make_evaluator(tmp_path):
    """A function (COCO dict or path, backend, ...) -> evaluator, after ``reset()``."""
    names = []

    def make(ground_truth, backend="auto", **kwargs):
        name = f"sssd_test_evaluation_{tmp_path.name}_{len(names)}"
        names.append(name)
        if isinstance(ground_truth, dict):
            json_file = tmp_path / f"{name}.json"
            json_file.write_text(json.dumps(ground_truth))
        else:
            json_file = ground_truth
            ground_truth = json.loads(json_file.read_text())
        categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
        MetadataCatalog.get(name).set(
            json_file=str(json_file),
            thing_classes=[category["name"] for category in categories],
            thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
        )
        evaluator = FastCOCOEvaluator(name, backend=backend, **kwargs)
        evaluator.reset()
        return evaluator

    yield make
    for name in names:
        MetadataCatalog.pop(name)


def coco_dict(boxes, num_images, num_classes=2, **annotation_fields):
    """COCO format from (image id, class, x, y, w, h) rows; images 1, 2.., categories 10, 20.."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": 400, "width": 400}
            for i in range(1, num_images + 1)
        ],
        "categories": [{"id": 10 * (k + 1), "name": f"class{k}"} for k in range(num_classes)],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": 10 * (k + 1),
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                **{name: values[number - 1] for name, values in annotation_fields.items()},
            }
            for number, (image_id, k, x, y, w, h) in enumerate(boxes, start=1)
        ],
    }


class ExactBoxes(Boxes):
    """Boxes that stay in double precision.

    ``Boxes`` holds float32, and two of COCO's fake detections overlap by exactly 0.6 and 0.8 with
    their ground truth: rounded to float32 they fall below these thresholds (AP 0.50407, not
    0.50458, of Detectron2's own evaluator as well).
    """

    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        return self


def process(evaluator, detections, image_ids, **fields):
    """Feed (image id, class, x, y, w, h, score) rows, one call of ``process`` per image."""
    rows = np.asarray(detections, dtype=np.float64).reshape(-1, 7)
    for image_id in image_ids:
        index = np.flatnonzero(rows[:, 0] == image_id)
        chosen = torch.from_numpy(rows[index])
        instances = Instances((400, 400))
        corners = torch.cat([chosen[:, 2:4], chosen[:, 2:4] + chosen[:, 4:6]], dim=1)
        instances.pred_boxes = ExactBoxes(corners)
        instances.scores = chosen[:, 6].float()
        instances.pred_classes = chosen[:, 1].long()
        for name, values in fields.items():
            instances.set(name, [values[i] for i in index])
            if name == "pred_keypoints":
                keypoints = [torch.as_tensor(values[i]) for i in index]
                instances.set(name, torch.stack(keypoints) if keypoints else torch.zeros(0, 1, 3))
        evaluator.process([{"image_id": int(image_id)}], [{"instances": instances}])


# One class with three boxes in two images, another class without any.
MINI_BOXES = [(1, 0, 0, 0, 100, 100), (1, 0, 200, 200, 50, 50), (2, 0, 10, 10, 20, 20)]
MINI_DETECTIONS = [
    (1, 0, 0, 0, 100, 100, 0.9),  # exact
    (2, 0, 300, 300, 40, 40, 0.8),  # finds nothing
    (2, 0, 10, 10, 20, 20, 0.7),  # exact
    (1, 0, 200, 200, 50, 36, 0.6),  # IoU 0.72: found at 0.50, 0.55, .. 0.70, missed at 0.75 ..
]
# Where all three are found, precision is 1, 1/2, 2/3, 3/4 at recall 1/3, 1/3, 2/3, 1. Of COCO's
# 101 recall points the first 34 see the best precision from recall 1/3 on, 1, the others 3/4.
MINI_AP50 = (34 * 1 + 67 * 3 / 4) / 101
# Where the last is missed: 34 points at 1, 33 points (up to recall 2/3) at 2/3, 34 points at 0.
MINI_AP75 = (34 * 1 + 33 * 2 / 3) / 101


def test_hand_worked_average_precision(make_evaluator, backend):
    evaluator = make_evaluator(coco_dict(MINI_BOXES, num_images=2), backend)
    process(evaluator, MINI_DETECTIONS, image_ids=(1, 2))
    results = evaluator.evaluate()["bbox"]
    ap = (5 * MINI_AP50 + 5 * MINI_AP75) / 10
    # Medium: one box, below a false positive of medium size: precision 1/2 at five thresholds of
    # ten. Small and large: one box each, found.
    expected = [ap, MINI_AP50, MINI_AP75, 1, 0.25, 1]
    assert list(results) == [*METRICS, "AP-class0", "AP-class1"]
    assert [results[metric] for metric in METRICS] == pytest.approx([100 * v for v in expected])
    assert results["AP-class0"] == pytest.approx(100 * ap)
    assert math.isnan(results["AP-class1"])
    # Recall: of each image's first detection one of three boxes; of all, 3/3 or 2/3.
    expected += [1 / 3, 5 / 6, 5 / 6, 1, 0.5, 1]
    assert evaluator.stats["bbox"] == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("misses", "max_dets", "precision"),
    [(10, 10, 0), (10, 11, 1 / 11), (100, None, 0), (100, 101, 1 / 101)],
)
def test_detections_per_image_are_limited(make_evaluator, backend, misses, max_dets, precision):
    truth = coco_dict([(1, 0, 0, 0, 100, 100)], num_images=1)
    evaluator = make_evaluator(truth, backend, max_dets_per_image=max_dets)
    rows = [(1, 0, 200, 200, 50, 50, 0.9)] * misses + [(1, 0, 0, 0, 100, 100, 0.5)]
    process(evaluator, rows, image_ids=(1,))
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100 * precision)


def test_too_few_detections_per_image(make_evaluator):
    with pytest.raises(ValueError, match=r"max_dets_per_image=9 .* at least 10"):
        make_evaluator(coco_dict(MINI_BOXES, 2), max_dets_per_image=9)


def test_images_are_limited(make_evaluator, backend):
    evaluator = make_evaluator(coco_dict(MINI_BOXES, 2), backend)
    process(evaluator, MINI_DETECTIONS, image_ids=(1, 2))
    # Image 2 alone: the box is found, below the false positive.
    assert evaluator.evaluate(img_ids=[2])["bbox"]["AP"] == pytest.approx(50)
    with pytest.raises(ValueError, match=r"Image id 7, .* not among the 2 images"):
        evaluator.evaluate(img_ids=[2, 7])


def test_detectron2s_own_evaluator_agrees(make_evaluator, backend):
    evaluator = make_evaluator(coco_dict(MINI_BOXES, 2), backend)
    stock = coco_evaluation.COCOEvaluator(evaluator._dataset_name, use_fast_impl=False)
    stock.reset()
    for each in (evaluator, stock):
        process(each, MINI_DETECTIONS, image_ids=(1, 2))
    ours, theirs = evaluator.evaluate()["bbox"], stock.evaluate()["bbox"]
    assert list(ours) == list(theirs)
    assert list(ours.values()) == pytest.approx(list(theirs.values()), nan_ok=True)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_cocos_own_figures(make_evaluator, backend, task):
    root = os.environ.get("DETECTRON2_DATASETS")
    folder = Path(root) / "cocoapi" if root else None
    if folder is None or not folder.is_dir():
        pytest.skip("needs cocoapi/ below the folder that DETECTRON2_DATASETS names")
    evaluator = make_evaluator(folder / "instances_val2014_100.json", backend, tasks=(task,))
    results = json.loads((folder / f"instances_val2014_fake{task}100_results.json").read_text())
    contiguous = evaluator._metadata.thing_dataset_id_to_contiguous_id
    masks = [mask_util.decode(r["segmentation"]) for r in results] if task == "segm" else []
    boxes = [mask_util.toBbox(r["segmentation"]) for r in results] if task == "segm" else []
    rows = [
        (
            r["image_id"],
            contiguous[r["category_id"]],
            *(boxes[i] if boxes else r["bbox"]),
            r["score"],
        )
        for i, r in enumerate(results)
    ]
    fields = {"pred_masks": masks} if masks else {}
    process(evaluator, rows, image_ids=sorted(evaluator._coco_api.imgs), **fields)
    metrics = evaluator.evaluate()[task]
    expected = np.array([float(figure) for figure in COCO_FIGURES[task].split()])
    assert len(evaluator.stats[task]) == 12
    np.testing.assert_allclose(evaluator.stats[task], expected, rtol=0, atol=1e-6)
    interface = [metrics[metric] / 100 for metric in METRICS]
    np.testing.assert_allclose(interface, expected[:6], rtol=0, atol=1e-6)


def random_case(seed, num_images=30, num_classes=5):
    """Ground truth (none of the last class, some crowds); detections with many tied scores."""
    rng = np.random.default_rng(seed)

    def draw(count, classes):
        size = np.exp(rng.uniform(np.log(8), np.log(200), (count, 2)))
        corner = rng.uniform(0, 400 - size)
        image_ids = rng.integers(1, num_images + 1, count)
        return np.column_stack([image_ids, rng.integers(0, classes, count), corner, size])

    truth = draw(150, num_classes - 1).round(1)
    near = truth[rng.integers(0, len(truth), 300)].copy()
    near[:, 2:] += rng.normal(0, 0.08, (300, 4)) * near[:, [4, 5, 4, 5]]
    rows = np.concatenate([near, draw(300, num_classes)])
    rows[:, 4:6] = np.maximum(rows[:, 4:6], 1)
    scores = rng.integers(1, 40, len(rows)) / 40
    rows = np.column_stack([rows, scores])[rng.permutation(len(rows))]
    boxes = [(int(row[0]), int(row[1]), *map(float, row[2:])) for row in truth]
    crowds = [int(crowd) for crowd in rng.random(len(truth)) < 0.1]
    return coco_dict(boxes, num_images, num_classes, iscrowd=crowds), rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_dets", [None, 10, 300])
def test_both_backends_agree_on_random_detections(make_evaluator, seed, max_dets):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    truth, rows = random_case(seed)
    results, stats = [], []
    for backend in BACKENDS:
        evaluator = make_evaluator(truth, backend, max_dets_per_image=max_dets)
        process(evaluator, rows, image_ids=range(1, 31))
        results.append(evaluator.evaluate()["bbox"])
        stats.append(evaluator.stats["bbox"])
    assert list(results[0]) == [*METRICS, *(f"AP-class{k}" for k in range(5))]
    assert 5 < results[0]["AP"] < 95 and math.isnan(results[0]["AP-class4"])
    values = [list(result.values()) for result in results]
    np.testing.assert_allclose(values[0], values[1], rtol=0, atol=1e-9)
    np.testing.assert_allclose(stats[0], stats[1], rtol=0, atol=1e-11)


def test_keypoints_by_hand(make_evaluator, backend):
    # One keypoint of sigma 0.5: similarity is exp(-d^2 / (2 area)), here 0.72 for an area of 5000.
    distance = math.sqrt(-2 * 5000 * math.log(0.72))
    truth = coco_dict(
        [(1, 0, 50, 50, 50, 100), (2, 0, 50, 50, 50, 100)],
        num_images=2,
        num_classes=2,
        keypoints=[[60.0, 60.0, 2], [80.0, 80.0, 2]],
        num_keypoints=[1, 1],
    )
    evaluator = make_evaluator(truth, backend, tasks=("keypoints",), kpt_oks_sigmas=[0.5])
    # Detectron2's keypoints lie half a pixel beyond COCO's.
    keypoints = [[[60.5, 60.5, 1.0]], [[80.5 + distance, 80.5, 1.0]]]
    rows = [(1, 0, 50, 50, 50, 100, 0.9), (2, 0, 50, 50, 50, 100, 0.8)]
    process(evaluator, rows, image_ids=(1, 2), pred_keypoints=keypoints)
    results = evaluator.evaluate()["keypoints"]
    # Both found at five thresholds, one of two (51 of 101 recall points) at the other five.
    ap75 = 100 * 51 / 101
    expected = {"AP": 50 + ap75 / 2, "AP50": 100, "AP75": ap75, "APm": 50 + ap75 / 2}
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert math.isnan(results["APl"]) and math.isnan(results["AP-class1"])


@pytest.mark.parametrize("images", ["processed", "none"])
def test_finding_nothing_is_zero_where_there_is_something(make_evaluator, backend, images):
    truth = coco_dict(MINI_BOXES[:2], num_images=2)
    evaluator = make_evaluator(truth, backend)
    process(evaluator, [], image_ids=(1, 2) if images == "processed" else ())
    results = evaluator.evaluate()["bbox"]
    zero = [metric for metric, value in results.items() if value == 0.0]
    undefined = [metric for metric, value in results.items() if math.isnan(value)]
    assert zero == ["AP", "AP50", "AP75", "APm", "APl", "AP-class0"]
    assert undefined == ["APs", "AP-class1"]
    # In image 2 there is nothing to find.
    assert all(math.isnan(value) for value in evaluator.evaluate(img_ids=[2])["bbox"].values())


def test_finding_nothing_for_every_task(make_evaluator, backend):
    polygons = [[[x, y, x + w, y, x + w, y + h, x, y + h]] for _, _, x, y, w, h in MINI_BOXES]
    truth = coco_dict(
        MINI_BOXES, 2, segmentation=polygons, keypoints=[[5, 5, 2]] * 3, num_keypoints=[1] * 3
    )
    tasks = ("bbox", "segm", "keypoints")
    evaluator = make_evaluator(truth, backend, tasks=tasks, kpt_oks_sigmas=[0.5])
    process(evaluator, [], image_ids=(1, 2))
    results = evaluator.evaluate()
    assert sorted(results) == sorted(tasks)
    assert {results[task]["AP"] for task in tasks} == {0.0}


def test_only_the_main_process_reports(make_evaluator, backend, monkeypatch):
    evaluator = make_evaluator(coco_dict(MINI_BOXES, 2), backend)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluator.evaluate() == {}


@pytest.mark.parametrize("task", ["bbox", "keypoints"])
def test_file_without_annotations(make_evaluator, backend, task, tmp_path):
    truth = coco_dict([], num_images=2)
    keypoints = [[[1.0, 1.0, 1.0]]] * len(MINI_DETECTIONS)
    evaluator = make_evaluator(truth, backend, tasks=(task,))
    process(evaluator, MINI_DETECTIONS, image_ids=(1, 2), pred_keypoints=keypoints)
    results = evaluator.evaluate()[task]
    assert "AP50" in results and all(math.isnan(value) for value in results.values())

    del truth["annotations"]  # a test set: predictions are written, nothing is computed
    evaluator = make_evaluator(truth, backend, tasks=(task,), output_dir=str(tmp_path / "out"))
    process(evaluator, MINI_DETECTIONS, image_ids=(1, 2))
    assert evaluator.evaluate() == {}
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert sorted(row["score"] for row in written) == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert {row["category_id"] for row in written} == {10}


@pytest.mark.parametrize("ids", [(0, 1, 2), (5, 5, 5)])
def test_annotation_ids_do_not_matter(make_evaluator, backend, ids):
    truth = coco_dict(MINI_BOXES, 2)
    for annotation, number in zip(truth["annotations"], ids, strict=True):
        annotation["id"] = number
    evaluator = make_evaluator(truth, backend)
    process(evaluator, [(*box, 0.5) for box in MINI_BOXES], image_ids=(1, 2))
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_image_missing_from_the_file(make_evaluator, backend):
    evaluator = make_evaluator(coco_dict(MINI_BOXES, 2), backend)
    with pytest.raises(ValueError, match=r"Image id 3, .* not among the 2 images of .*\.json"):
        process(evaluator, MINI_DETECTIONS, image_ids=(3,))


def test_annotation_file_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"instances_val\.json .* DETECTRON2_DATASETS"):
        FastCOCOEvaluator("bccd_val")


def test_classes_that_are_unknown(make_evaluator):
    evaluator = make_evaluator(coco_dict(MINI_BOXES, 2))
    del MetadataCatalog.get(evaluator._dataset_name).thing_dataset_id_to_contiguous_id
    process(evaluator, MINI_DETECTIONS, image_ids=(1, 2))
    with pytest.raises(ValueError, match=r"call DatasetCatalog\.get\('.*'\) before evaluating"):
        evaluator.evaluate()


def test_ids_that_are_text(make_evaluator):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    truth = coco_dict(MINI_BOXES, 2)
    for image in truth["images"]:
        image["id"] = str(image["id"])
    for annotation in truth["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    evaluator = make_evaluator(truth, "auto")
    assert evaluator.backend == "pycocotools"
    instances = Instances((400, 400), pred_boxes=Boxes([[10, 10, 30, 30]]))
    instances.set("scores", torch.ones(1))
    instances.set("pred_classes", torch.zeros(1, dtype=torch.long))
    evaluator.process([{"image_id": "2"}], [{"instances": instances}])
    # One of three boxes, without a false positive.
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100 * 34 / 101)
    with pytest.raises(ValueError, match="has the id '1'; use backend='pycocotools'"):
        make_evaluator(truth, "faster_coco_eval")


@pytest.mark.parametrize("max_dets", [None, 300])
def test_backend_is_the_one_asked_for(make_evaluator, backend, max_dets, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the other backend was called")

    # Detectron2's compiled evaluation is never used: an unbuilt Detectron2 lacks it.
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", refuse)
    if backend == "faster_coco_eval":
        monkeypatch.setattr(COCOeval, "evaluate", refuse)
    else:
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    evaluator = make_evaluator(coco_dict(MINI_BOXES, 2), "auto", max_dets_per_image=max_dets)
    process(evaluator, MINI_DETECTIONS, image_ids=(1, 2))
    assert evaluator.backend == backend
    assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(100 * MINI_AP50)


def test_backend_that_is_missing_or_unknown(make_evaluator, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match="pip install faster-coco-eval"):
        make_evaluator(coco_dict(MINI_BOXES, 2), "faster_coco_eval")
    with pytest.raises(ValueError, match="'fast'; choose one of auto, faster_coco_eval"):
        make_evaluator(coco_dict(MINI_BOXES, 2), "fast")


def test_detectron2_is_put_back_after_an_exception(make_evaluator, backend):
    before = copy.copy(vars(coco_evaluation))
    evaluator = make_evaluator(coco_dict(MINI_BOXES, 2), backend)
    process(evaluator, [(1, 9, 0, 0, 5, 5, 0.5)], image_ids=(1,))
    with pytest.raises(AssertionError, match="class=9"):
        evaluator.evaluate()
    assert vars(coco_evaluation) == before
    evaluator.reset()
    process(evaluator, MINI_DETECTIONS, image_ids=(1, 2))
    evaluator.evaluate()
    assert vars(coco_evaluation) == before
