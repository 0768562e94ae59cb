"""The batched teacher against the method image by image: same maps, no work for each image."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sssd.teacher.label_encoder import normalised_boxes
from tests.teacher.scenes import (
    NUM_CLASSES,
    STRIDES,
    assert_pyramids_close,
    one_image,
    permuted,
    pyramid,
    reference_cells,
    reference_painting,
    reference_pooling,
    scene,
    small_teacher,
    with_more_padding,
)


def reference_maps(teacher, features, objects):
    """The method once more: one image and one level at a time, without padding, masks or sharing.

    Only the weights are the teacher's. Attention and normalisation are those of torch on single
    images. A part that the interaction does not need is not there to be called.
    """
    encoder, relation, painter = teacher.label_encoder, teacher.relation_adapter, teacher.painter
    pattern = relation.interaction
    if teacher.add_context_box:
        objects = objects.with_context_box(teacher.num_classes)
    maps = {level: [] for level in teacher.strides}
    for index in range(len(objects.boxes)):
        on = objects.valid[index]

        def transform(module, x):
            summary = x.new_zeros(1024)
            if len(x):
                summary = module.local(x).amax(0)
            return x @ module.matrix(module.glob(summary)).view(module.dim, module.dim)

        labels = None
        if pattern != "student_fill":
            height, width = objects.image_sizes[index].tolist()
            boxes = objects.boxes[index, on] / torch.tensor([width, height, width, height]) * 2 - 1
            x = torch.cat([boxes, encoder.class_embedding(objects.classes[index, on])], dim=1)
            x = transform(
                encoder.feature_transform, encoder.point(transform(encoder.input_transform, x))
            )
            company = encoder.set_features(x).amax(0) if len(x) else x.new_zeros(1024)
            labels = encoder.output(torch.cat([x, company.expand(len(x), -1)], dim=1))
            labels = relation.label_projection(labels)

        for level, stride in teacher.strides.items():
            image = features[level][index : index + 1]
            single = type(objects)(*(part[index : index + 1] for part in objects))
            cells = reference_cells(single, image.shape[2:], stride)[0, on]
            seen = None
            if pattern != "label_fill":
                seen = reference_pooling(teacher.appearance_encoder.projection(image)[0], cells)
            width = painter.object_projection.in_features
            canvas, context = image.new_zeros(width, *image.shape[2:]), 0
            if len(cells):
                fused = {
                    "student_guided": lambda a, b: relation.attention(a[None], b[None], b[None])[0],
                    "label_guided": lambda a, b: relation.attention(b[None], a[None], a[None])[0],
                    "label_fill": lambda a, b: b[None],
                    "student_fill": lambda a, b: a[None],
                }[pattern](seen, labels)[0]
                if relation.label_residual:
                    fused = fused + labels
                if teacher.add_context_box:
                    context = painter.context_projection(fused[-1])[:, None, None]
                    fused, cells = fused[:-1], cells[:-1]
                canvas = reference_painting(painter.object_projection(fused), cells)
            canvas = painter.canvas(canvas[None]) + context
            maps[level].append(painter.refinement(canvas.relu()))
    return {level: torch.cat(images) for level, images in maps.items()}


@pytest.mark.parametrize("counts", [(5, 2, 0), (1, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize(
    ("interaction", "residual"),
    [
        ("student_guided", False),
        ("student_guided", True),
        ("label_guided", False),
        ("label_guided", True),
        ("label_fill", False),
        ("student_fill", False),
    ],
)
def test_equals_the_method_by_loops(counts, context, interaction, residual):
    # Faults: Python loops over images and levels; here they are the proof of the batched form.
    teacher = small_teacher(
        add_context_box=context, interaction=interaction, label_residual=residual
    )
    features, objects = pyramid(3), scene(*counts)
    assert_pyramids_close(teacher(features, objects), reference_maps(teacher, features, objects))


@pytest.mark.parametrize("context", [False, True])
def test_a_batch_gives_what_each_image_gives_alone(context):
    teacher = small_teacher(add_context_box=context)
    features, objects = pyramid(3), scene(6, 1, 0)
    batched = teacher(features, objects)
    for index in range(3):
        alone = teacher(
            {level: x[index : index + 1] for level, x in features.items()},
            one_image(objects, index),
        )
        of_batch = {level: x[index : index + 1] for level, x in batched.items()}
        assert_pyramids_close(of_batch, alone)


def test_images_do_not_mix():
    teacher, features, objects = small_teacher(), pyramid(2), scene(4, 3)
    before = teacher(features, objects)
    boxes, classes = objects.boxes.clone(), objects.classes.clone()
    boxes[1] *= 0.7
    classes[1] = (classes[1] + 1) % NUM_CLASSES
    features = {level: torch.stack([x[0], -x[1]]) for level, x in features.items()}
    after = teacher(features, objects._replace(boxes=boxes, classes=classes))
    for level in STRIDES:
        assert torch.equal(after[level][0], before[level][0])
        assert not torch.allclose(after[level][1], before[level][1])


def test_more_padding_changes_nothing():
    teacher, features, objects = small_teacher(), pyramid(3), scene(4, 1, 0)
    assert_pyramids_close(
        teacher(features, with_more_padding(objects, 5)), teacher(features, objects)
    )


@pytest.mark.parametrize("context", [False, True])
def test_the_order_of_the_objects_changes_nothing(context):
    teacher, features, objects = small_teacher(add_context_box=context), pyramid(2), scene(5, 3)
    order = torch.tensor([4, 2, 0, 3, 1])  # moves padding between objects, too
    assert_pyramids_close(teacher(features, permuted(objects, order)), teacher(features, objects))


def test_batch_padding_does_not_move_the_descriptors():
    # The same image beside a larger one: only the maps' padded area may make a difference.
    objects, beside = scene(4, sizes=[(64, 96)]), scene(4, 2, sizes=[(64, 96), (640, 960)])
    assert torch.equal(objects.boxes, beside.boxes[:1])
    assert torch.equal(normalised_boxes(objects), normalised_boxes(beside)[:1])
    encoder = small_teacher(add_context_box=True).label_encoder
    alone = encoder(objects.with_context_box(NUM_CLASSES))
    together = encoder(beside.with_context_box(NUM_CLASSES))[:1]
    torch.testing.assert_close(together, alone)


class CountOperations(TorchDispatchMode):
    """Counts what torch computes: the work that Python starts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "batches",
    [
        [(2, 2), (4, 2), (3, 3, 0, 1, 4, 2)],  # few objects for the width of 16,
        [(5, 2), (9, 7), (40, 3, 0, 1, 7, 2)],  # and many: these are painted first
    ],
)
def test_no_python_work_for_each_image_or_object(batches):
    teacher = small_teacher(add_context_box=True)
    counts = []
    for per_image in batches:
        sizes = [(64, 96)] * len(per_image)
        features, objects = pyramid(len(per_image)), scene(*per_image, sizes=sizes)
        with CountOperations() as operations:
            teacher(features, objects)
        counts.append(operations.count)
    assert counts[0] > 0
    assert len(set(counts)) == 1, counts
