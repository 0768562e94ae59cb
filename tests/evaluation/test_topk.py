"""Top-k accuracy: scikit-learn's figures, cases by hand, several processes."""

import logging

import pytest
import torch

import sssd_compat

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
sssd_compat.apply()

from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.evaluation import print_csv_format  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from sssd.evaluation.topk import ClassificationEvaluator  # noqa: E402

DATASET = "sssd_test_topk"


@pytest.fixture(autouse=True)
def metadata():
    """Metadata without classes; forgotten after the test."""
    yield MetadataCatalog.get(DATASET)
    MetadataCatalog.pop(DATASET)


@pytest.fixture
def evaluator():
    return ClassificationEvaluator(DATASET)


def feed(evaluator, labels, ids=None, **logits):
    """Processes a batch: name -> a row of logits for each image."""
    ids = range(len(labels)) if ids is None else ids
    inputs = [{"label": label, "image_id": i} for label, i in zip(labels, ids, strict=True)]
    rows = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in logits.items()}
    outputs = [
        {"logits": {name: value[i] for name, value in rows.items()}} for i in range(len(labels))
    ]
    evaluator.process(inputs, outputs)


def test_by_hand(evaluator):
    # Six classes, the label is always 2; before it come 0, 1, 4 and 5 classes.
    logits = [
        [0, 0, 9, 0, 0, 0],
        [0, 0, 8, 9, 0, 0],
        [9, 8, 3, 7, 6, 0],
        [9, 8, 3, 7, 6, 5],
    ]
    feed(evaluator, [2, 2, 2, 2], student=logits, head1=[logits[0]] * 4)
    results = evaluator.evaluate()
    assert results == {
        "classification": {"top1": 25.0, "top5": 75.0},
        "head1": {"top1": 100.0, "top5": 100.0},
    }
    print_csv_format(results)  # Detectron2's trainer prints them so


@pytest.mark.parametrize("classes", [2, 5, 6, 100])
def test_against_scikit_learn(evaluator, classes):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (300,), generator=generator)
    student, head = torch.randn(2, 300, classes, generator=generator)
    student[torch.arange(300), labels] += 1.0
    for start in range(0, 300, 64):
        part = slice(start, start + 64)
        ids = range(300)[part]
        feed(evaluator, labels[part].tolist(), ids, head=head[part], student=student[part])
    results = evaluator.evaluate()
    assert list(results) == ["classification", "head"]
    for name, scores in (("classification", student), ("head", head)):
        assert set(results[name]) == ({"top1", "top5"} if classes > 5 else {"top1"})
        for key, value in results[name].items():
            # Of two classes scikit-learn takes one score, of class 1, against the threshold 0.
            target = scores[:, 1] - scores[:, 0] if classes == 2 else scores
            expected = metrics.top_k_accuracy_score(
                labels, target, k=int(key[3:]), labels=range(classes)
            )
            assert value == pytest.approx(100 * expected, abs=1e-9)


def test_equal_logits_are_ordered_by_class(evaluator):
    feed(evaluator, list(range(10)), student=torch.zeros(10, 10))
    assert evaluator.evaluate() == {"classification": {"top1": 10.0, "top5": 50.0}}
    evaluator.reset()
    feed(evaluator, [1, 1], student=[[3, 3, 0], [2, 3, 3]])
    assert evaluator.evaluate() == {"classification": {"top1": 50.0}}


def test_nan_is_wrong_and_infinity_is_a_number(evaluator, caplog):
    nan, inf = float("nan"), float("inf")
    rows = [[nan] * 6, [0, nan, 9, 0, 0, 0], [0, 0, inf, 0, 0, 0], [-inf] * 6, [0, 0, 9, 0, 0, 0]]
    with caplog.at_level(logging.WARNING):
        feed(evaluator, [2] * 5, student=rows, head=[rows[-1]] * 5)
        results = evaluator.evaluate()
    assert results["classification"] == {"top1": 40.0, "top5": 60.0}
    assert results["head"] == {"top1": 100.0, "top5": 100.0}
    (message,) = caplog.messages
    assert message == (
        f"2 of the 5 images of '{DATASET}' have NaN among the logits of 'student'; "
        "they count as wrong."
    )


def test_repeated_images_count_once(evaluator):
    feed(evaluator, [0, 1, 0], ["a", "b", "a"], student=[[1, 0], [1, 0], [1, 0]])
    feed(evaluator, [0], ["a"], student=[[1, 0]])
    assert evaluator.evaluate() == {"classification": {"top1": 50.0}}


def as_processes(monkeypatch, evaluators):
    """What each of the evaluators returns when they run in processes of their own."""
    state = {"sent": []}

    def gather(data, dst):
        assert dst == 0
        state["sent"].append(data)
        return list(reversed(state["sent"])) if state["rank"] == 0 else []

    monkeypatch.setattr(comm, "gather", gather)
    monkeypatch.setattr(comm, "is_main_process", lambda: state["rank"] == 0)
    results = {}
    for rank in reversed(range(len(evaluators))):  # the main process last: it receives the others'
        state["rank"] = rank
        results[rank] = evaluators[rank].evaluate()
    return results


def test_two_processes(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (21,), generator=generator).tolist()
    logits = torch.randn(21, 10, generator=generator)
    alone = ClassificationEvaluator(DATASET)
    feed(alone, labels, student=logits, head=-logits)
    expected = alone.evaluate()

    shards = [list(range(11)), [*range(11, 21), 0]]  # a sampler that pads repeats the first image
    evaluators = [ClassificationEvaluator(DATASET) for _ in shards]
    for evaluator, shard in zip(evaluators, shards, strict=True):
        rows = logits[shard]
        feed(evaluator, [labels[i] for i in shard], shard, student=rows, head=-rows)
    results = as_processes(monkeypatch, evaluators)
    assert results[0] == expected and results[1] == {}
    assert list(results[0]) == ["classification", "head"]


def test_a_process_without_images(monkeypatch):
    evaluators = [ClassificationEvaluator(DATASET) for _ in range(2)]
    evaluators[0].process([], [])
    feed(evaluators[1], [0, 1, 2], student=torch.eye(3, 8))
    expected = {"classification": {"top1": 100.0, "top5": 100.0}}
    assert as_processes(monkeypatch, evaluators)[0] == expected


def test_without_gathering(monkeypatch):
    monkeypatch.setattr(comm, "gather", lambda *args, **kwargs: pytest.fail("gathered"))
    evaluator = ClassificationEvaluator(DATASET, distributed=False)
    feed(evaluator, [0, 1], student=torch.eye(2))
    assert evaluator.evaluate() == {"classification": {"top1": 100.0}}


def test_reset_and_no_images(evaluator, caplog):
    feed(evaluator, [0], student=[[1, 0]])
    evaluator.reset()
    with caplog.at_level(logging.WARNING):
        assert evaluator.evaluate() == {}
    assert caplog.messages == [f"No images of '{DATASET}' were evaluated: no results."]


def test_half_precision_and_labels_as_tensors(evaluator):
    logits = torch.tensor([1.0, 2.0, 0.0], dtype=torch.bfloat16)
    record = {"label": torch.tensor(1), "image_id": 5}
    evaluator.process([record], [{"logits": {"student": logits}}])
    assert evaluator.evaluate() == {"classification": {"top1": 100.0}}


def test_bad_input_is_named(evaluator, metadata):
    row = {"student": torch.zeros(3)}
    good = {"label": 0, "image_id": 0}
    for record, logits, sentence in (
        ({"image_id": 0}, row, "has no 'label', only image_id"),
        ({"label": 0}, row, "has no 'image_id', only label"),
        (good, {"head": torch.zeros(3)}, "are named head: one must be 'student'"),
        (good, {}, "are named nothing"),
        (good, {**row, "classification": torch.zeros(3)}, "and none 'classification'"),
        (good, {"student": torch.zeros(3, 2)}, r"have the shape \(3, 2\): return one vector"),
        ({"label": 3, "image_id": 0}, row, "has the label 3, and the logits 'student' are for the"),
        ({"label": -1, "image_id": 0}, row, "has the label -1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluator.process([record], [{"logits": logits}])
    evaluator.reset()
    with pytest.raises(ValueError, match="named student for some images.* and head, student for o"):
        evaluator.process(
            [good, {"label": 0, "image_id": 1}],
            [{"logits": row}, {"logits": {**row, "head": torch.zeros(3)}}],
        )
    with pytest.raises(ValueError, match="for 4 classes and others had 3.*num_classes=3"):
        feed(evaluator, [0], student=torch.zeros(1, 3), head=torch.zeros(1, 4))
    evaluator.reset()
    feed(evaluator, [0], ["a"], student=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="image_id 'a' .* comes with the labels 0 and 1"):
        feed(evaluator, [1], ["a"], student=torch.zeros(1, 3))
    metadata.classes = ["cat", "dog"]
    evaluator.reset()
    with pytest.raises(ValueError, match="for 3 classes and the dataset has 2"):
        feed(evaluator, [0], student=torch.zeros(1, 3))


def test_names_that_differ_between_batches(evaluator):
    feed(evaluator, [0], ["a"], student=torch.zeros(1, 3))
    feed(evaluator, [0], ["b"], student=torch.zeros(1, 3), head=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="must return the same for all"):
        evaluator.evaluate()
