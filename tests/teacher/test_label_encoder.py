import pytest
import torch

from sssd.teacher import pad_objects
from sssd.teacher.label_encoder import LabelEncoder, normalised_boxes
from tests.teacher.scenes import NUM_CLASSES, one_image, permuted, scene, with_more_padding


def encoder(*, num_classes=NUM_CLASSES, embed_dim=24, at_identity=False):
    torch.manual_seed(0)
    module = LabelEncoder(num_classes=num_classes, embed_dim=embed_dim)
    if not at_identity:
        for transform in (module.input_transform, module.feature_transform):
            torch.nn.init.normal_(transform.matrix.weight, std=0.05)
    return module


def test_boxes_are_normalised_by_the_size_of_their_own_image():
    # (10, 5, 20, 20) of a 20 x 40 image: x / 40 and y / 20 are 0.25, 0.25, 0.5, 1.
    # (10, 5, 20, 20) of an 80 x 20 image: 0.5, 0.0625, 1, 0.25. Then 2 v - 1.
    boxes = torch.tensor([[10.0, 5, 20, 20]])
    classes = torch.tensor([0])
    objects = pad_objects([boxes, boxes], [classes, classes], [(20, 40), (80, 20)], num_classes=1)
    assert normalised_boxes(objects).tolist() == [[[-0.5, -0.5, 0, 1]], [[0, -0.875, 1, -0.5]]]


def test_an_image_is_encoded_the_same_whatever_its_batch_mates():
    # Fault: boxes divided by the size of the padded batch.
    module = encoder()
    objects = scene(3, 2, sizes=[(64, 96), (600, 800)])
    assert torch.equal(normalised_boxes(objects)[0], normalised_boxes(one_image(objects, 0))[0])
    torch.testing.assert_close(module(objects)[0], module(one_image(objects, 0))[0])


def test_images_are_encoded_apart():
    module, objects = encoder(), scene(3, 2)
    before = module(objects)
    objects.boxes[1, 0] /= 2
    objects.classes[1, 1] = (objects.classes[1, 1] + 1) % NUM_CLASSES
    after = module(objects)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_padding_changes_nothing():
    module, objects = encoder(), scene(3, 1)
    padded = module(with_more_padding(objects, 4))
    torch.testing.assert_close(padded[:, :3][objects.valid], module(objects)[objects.valid])


def test_permuting_the_objects_permutes_the_embeddings():
    module, objects, order = encoder(), scene(4), torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(module(permuted(objects, order)), module(objects)[:, order])


def test_each_embedding_depends_on_box_class_and_company():
    module, objects = encoder(at_identity=True), scene(3)
    before = module(objects)

    def change(slot, *, box=0.0, label=0):
        boxes, classes = objects.boxes.clone(), objects.classes.clone()
        boxes[0, slot, 0] += box
        classes[0, slot] = (classes[0, slot] + label) % NUM_CLASSES
        moved = module(objects._replace(boxes=boxes, classes=classes))
        return (moved - before)[0].abs().amax(1)

    assert change(0, box=3)[0] > 1e-3
    assert change(0, label=1)[0] > 1e-3
    assert change(0, label=1)[1] > 1e-3  # the company of object 1


def test_parameters_grow_linearly_with_the_classes():
    # Fault: a transform of (4 + classes)^2 entries, 370 million weights for LVIS.
    counts = {
        n: sum(p.numel() for p in LabelEncoder(num_classes=n, embed_dim=256).parameters())
        for n in (1, 80, 1203)
    }
    each = LabelEncoder.DESCRIPTOR_DIM - 4
    assert counts[80] - counts[1] == 79 * each
    assert counts[1203] - counts[80] == 1123 * each
    assert counts[80] < 4.89e6  # LGD's label encoder


@pytest.mark.parametrize("num_classes", [1, 80, 1203])
def test_any_number_of_classes(num_classes):
    classes = torch.tensor([0, num_classes - 1])
    boxes = torch.tensor([[1.0, 1, 5, 5], [2, 2, 9, 7]])
    objects = pad_objects([boxes], [classes], [(10, 10)], num_classes=num_classes)
    assert encoder(num_classes=num_classes)(objects).shape == (1, 2, 24)


def test_no_class_is_zeros_and_learns_nothing():
    module = encoder()
    objects = scene(2, 0).with_context_box(NUM_CLASSES)
    assert module.class_embedding(objects.classes)[:, -1].abs().max() == 0
    module(objects).square().sum().backward()
    used = objects.classes[objects.valid].unique().tolist()
    rows = module.class_embedding.weight.grad.abs().amax(1)
    assert rows[NUM_CLASSES] == 0
    assert all(rows[c] > 0 for c in used if c < NUM_CLASSES)


def test_both_transforms_start_at_the_identity():
    module, objects = encoder(at_identity=True), scene(3, 1)
    # Without the transforms: point features, and the largest of the set features.
    labels = module.class_embedding(objects.classes)
    x = module.point(torch.cat([normalised_boxes(objects), labels], dim=2))
    company = module.set_features(x).masked_fill(~objects.valid[..., None], 0).amax(1)
    expected = module.output(torch.cat([x, company[:, None].expand(-1, 3, -1)], dim=2))
    torch.testing.assert_close(module(objects), expected)


def test_every_parameter_gets_a_gradient_without_any_object():
    module = encoder()
    module(scene(0, 0)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_objects_of_one_image_start_out_distinct():
    # Between-object share of the embeddings' energy: 0.015 when every input of the last layer
    # starts with the same weight, since 1024 of the 1088 are the same for the whole image.
    torch.manual_seed(0)
    module = LabelEncoder(num_classes=5, embed_dim=64)
    embeddings = torch.cat([module(scene(5, 5, seed=seed)) for seed in range(4)])
    deviation = embeddings - embeddings.mean(dim=1, keepdim=True)
    assert deviation.square().sum() / embeddings.square().sum() > 0.1
