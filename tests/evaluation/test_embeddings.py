"""Embeddings of a dataset, how far they tell classes apart, pictures of them, and linear probes."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from sssd.classification import build_network
from sssd.engine import load_config
from sssd.evaluation.embeddings import (
    Embeddings,
    class_separation,
    draw_embeddings,
    embed_dataset,
    tsne,
)
from sssd.evaluation.linear_probe import STRENGTHS, linear_probe
from tests.conftest import REPOSITORY


class MeanColor(nn.Module):
    """Its embedding is the mean of each channel."""

    def __init__(self, channels=3):
        super().__init__()
        self.fc = nn.Linear(channels, 2)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))


def config(channels=3):
    cfg = load_config(str(REPOSITORY / "configs/Base-Classification-digits.yaml"))
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [10.0] * channels, [5.0] * channels
    cfg.MODEL.SSSD.CLASSIFIER.TEST_BATCH = 3
    return cfg


@pytest.fixture
def dataset():
    """Registers a dataset of uniform images for the length of a test."""
    names = []

    def register(values, channels, labels, size=4):
        name = f"uniform{len(names)}"
        pictures = [np.full((size, size, channels), value, np.uint8) for value in values]
        records = [
            {"image": picture, "label": label, "image_id": i}
            for i, (picture, label) in enumerate(zip(pictures, labels, strict=True))
        ]
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).classes = ["dark", "bright"]
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def toy(spread=0.0, per_class=6, classes=3, width=4, seed=0):
    """Classes around the corners of a cube of side 10."""
    random = np.random.RandomState(seed)
    labels = np.repeat(np.arange(classes), per_class)
    features = 10 * np.eye(classes, width)[labels] + spread * random.randn(len(labels), width)
    return Embeddings(features.astype(np.float32), labels, tuple("abcdef"[:classes]))


@pytest.mark.parametrize("channels", [1, 3])
def test_embeddings_are_those_of_evaluation_and_grey_images_are_repeated(dataset, channels):
    name = dataset([0, 15, 20, 30], channels, [0, 0, 1, 1])
    found = embed_dataset(MeanColor().eval(), config(), name)
    # (value - 10) / 5 in each channel; two batches, the second of one image.
    assert found.features.tolist() == [[x] * 3 for x in (-2.0, 1.0, 2.0, 4.0)]
    assert found.features.dtype == np.float32
    assert found.labels.tolist() == [0, 0, 1, 1] and found.classes == ("dark", "bright")


def test_a_part_of_the_images_is_the_same_for_every_network(dataset):
    name = dataset(range(20), 3, [0, 1] * 10)
    parts = [
        embed_dataset(network.eval(), config(), name, max_images=5)
        for network in (MeanColor(), build_network("cifar_resnet8", num_classes=7))
    ]
    assert np.array_equal(parts[0].labels, parts[1].labels) and len(parts[0].labels) == 5
    values = (parts[0].features[:, 0] * 5 + 10).round().astype(int)
    assert len(set(values)) == 5 and not np.array_equal(values, range(5))
    assert np.array_equal(values % 2, parts[0].labels)


def test_images_and_embeddings_that_cannot_be_used_are_refused(dataset):
    name = dataset([1, 2], 3, [0, 1])
    with pytest.raises(ValueError, match=f"'{name}' have 3 channels and the network takes 1"):
        embed_dataset(MeanColor(1), config(1), name)
    with pytest.raises(ValueError, match="'not_there' is not registered"):
        embed_dataset(MeanColor(), config(), "not_there")
    cfg = config()
    cfg.MODEL.PIXEL_STD = [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=f"embeddings of '{name}' .* are not finite"):
        embed_dataset(MeanColor(), cfg, name)


def test_class_separation_by_hand():
    # On a line: 0 and 1 of one class, 4 and 6 of the other.
    features = np.array([[0.0], [1.0], [4.0], [6.0]], np.float32)
    line = Embeddings(features, np.array([0, 0, 1, 1]), ("a", "b"))
    assert class_separation(line) == pytest.approx(((4 + 6 + 3 + 5) / 4) / ((1 + 2) / 2))
    scaled = Embeddings(-7 * features, line.labels, line.classes)
    assert class_separation(scaled) == pytest.approx(3.0)
    # A single image of a class has no distance within it, but one to the others.
    single = Embeddings(features[:3], np.array([0, 0, 1]), ("a", "b"))
    assert class_separation(single) == pytest.approx((4 + 3) / 2)
    assert class_separation(toy()) == float("inf")
    # Labels that say nothing: 1, over more images than one chunk of distances has.
    random = np.random.RandomState(0)
    noise = Embeddings(
        random.randn(1200, 3).astype(np.float32), random.randint(2, size=1200), ("a", "b")
    )
    assert class_separation(noise) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_separation_needs_two_classes_and_two_images_of_one(labels):
    embeddings = Embeddings(np.zeros((3, 2), np.float32), np.array(labels), ("a", "b", "c"))
    with pytest.raises(ValueError, match="no distances within and between classes: use two"):
        class_separation(embeddings)


def test_tsne_keeps_classes_together_and_repeats_itself():
    embeddings = toy(spread=0.5, per_class=12)
    positions = tsne(embeddings.features)
    assert positions.shape == (36, 2)
    distances = torch.cdist(*[torch.from_numpy(positions)] * 2).fill_diagonal_(np.inf)
    nearest = embeddings.labels[distances.argmin(1).numpy()]
    assert np.array_equal(nearest, embeddings.labels)
    assert np.array_equal(positions, tsne(embeddings.features))
    with pytest.raises(ValueError, match="picture of 3 images .* give it 4 or more"):
        tsne(embeddings.features[:3])


def test_the_picture_has_an_axis_and_a_number_for_each_network(tmp_path):
    tight, loose = toy(spread=0.5), toy(spread=5.0)
    figure = draw_embeddings({"CS-KD": tight, "cross-entropy": loose})
    assert [axis.get_title() for axis in figure.axes] == ["CS-KD", "cross-entropy"]
    for axis, embeddings in zip(figure.axes, (tight, loose), strict=True):
        assert axis.get_xlabel().endswith(f": {class_separation(embeddings):.2f}")
        # One cloud of points for each class, all of them drawn.
        assert [len(points.get_offsets()) for points in axis.collections] == [6, 6, 6]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert class_separation(tight) > 2 * class_separation(loose)


def test_pictures_of_different_images_are_refused():
    with pytest.raises(ValueError, match="a, b cannot be drawn side by side"):
        draw_embeddings({"a": toy(), "b": toy(per_class=5)})
    with pytest.raises(ValueError, match="no network cannot be drawn"):
        draw_embeddings({})


def test_a_probe_separates_what_is_separable_and_only_that():
    probe = linear_probe(toy(spread=0.5, per_class=10), toy(spread=0.5, seed=1))
    assert probe.accuracy == probe.val_accuracy == 100
    assert probe.strength == STRENGTHS[0]  # the smallest of equally good ones
    # Features without the classes: chance is a third.
    nothing = [
        Embeddings(np.random.RandomState(s).randn(300, 4), toy(per_class=100).labels, tuple("abc"))
        for s in range(2)
    ]
    assert 20 < linear_probe(*nothing).accuracy < 47


def test_the_test_part_decides_nothing_of_a_probe():
    train = toy(spread=6.0, per_class=30)
    probes = [linear_probe(train, toy(spread=spread, seed=1)) for spread in (0.1, 20.0)]
    assert probes[0].accuracy > probes[1].accuracy
    for other in probes[1:]:
        assert (other.strength, other.val_accuracy) == (probes[0].strength, probes[0].val_accuracy)


def test_a_probe_is_standardised_by_the_training_part():
    # The scale of each number does not matter, however far from that of the others.
    train, test = toy(spread=6.0, per_class=20), toy(spread=6.0, per_class=20, seed=1)
    scale = np.array([1e-4, 1, 1e4, 1], np.float32)
    scaled = [Embeddings(x.features * scale, x.labels, x.classes) for x in (train, test)]
    plain = linear_probe(train, test)
    assert 50 < plain.accuracy < 100
    assert linear_probe(*scaled).accuracy == plain.accuracy


def test_parts_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="3 classes and embeddings of 4 numbers, .* 3 and 5"):
        linear_probe(toy(), toy(width=5))
    with pytest.raises(ValueError, match="two parts of one dataset by one network"):
        linear_probe(toy(), toy(classes=4))
    one = toy()
    one = Embeddings(one.features[:6], one.labels[:6], one.classes)
    with pytest.raises(ValueError, match="All 6 images to learn from have one label"):
        linear_probe(one, toy())
