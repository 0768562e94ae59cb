"""Small batches for the teacher, and its geometry once more, one cell and one object at a time."""

import torch
from torch import Tensor

from sssd.teacher import LabelEncodingTeacher, ObjectBatch, pad_objects

STRIDES = {"lateral0": 8, "lateral1": 16, "extra": 64}
NUM_CLASSES = 5


def scene(*counts: int, sizes: list[tuple[int, int]] | None = None, seed: int = 0) -> ObjectBatch:
    """Images with that many objects each: large, small and degenerate boxes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes or [(64, 96), (80, 50), (33, 96)][: len(counts)]
    boxes, classes = [], []
    for count, (height, width) in zip(counts, sizes, strict=True):
        limits = torch.tensor([width, height, width, height])
        corner = torch.rand(count, 2, generator=generator) * 0.8
        extent = torch.rand(count, 2, generator=generator) ** 3
        extent[2::3] = 0  # every third box has no area
        boxes.append(torch.cat([corner, (corner + extent).clamp(max=1)], dim=1) * limits)
        classes.append(torch.randint(NUM_CLASSES, (count,), generator=generator))
    return pad_objects(boxes, classes, sizes, num_classes=NUM_CLASSES)


def one_image(objects: ObjectBatch, index: int) -> ObjectBatch:
    """One image of the batch, without its padding (but at least one slot)."""
    count = max(int(objects.valid[index].sum()), 1)
    image = slice(index, index + 1)
    return ObjectBatch(
        objects.boxes[image, :count],
        objects.classes[image, :count],
        objects.valid[image, :count],
        objects.image_sizes[image],
    )


def permuted(objects: ObjectBatch, order: Tensor) -> ObjectBatch:
    """The same objects in another order of their slots."""
    return ObjectBatch(
        objects.boxes[:, order],
        objects.classes[:, order],
        objects.valid[:, order],
        objects.image_sizes,
    )


def with_more_padding(objects: ObjectBatch, slots: int) -> ObjectBatch:
    """``slots`` more slots an image, with boxes and classes that nobody may look at."""
    images = len(objects.boxes)
    return ObjectBatch(
        torch.cat([objects.boxes, torch.tensor([2.0, 3, 44, 29]).expand(images, slots, 4)], dim=1),
        torch.cat([objects.classes, torch.ones(images, slots, dtype=torch.int64)], dim=1),
        torch.cat([objects.valid, torch.zeros(images, slots, dtype=torch.bool)], dim=1),
        objects.image_sizes,
    )


def small_teacher(*, channels: int = 16, seed: int = 0, **options) -> LabelEncodingTeacher:
    """A teacher whose transforms have left the identity, so that every path matters."""
    torch.manual_seed(seed)
    settings = {"num_classes": NUM_CLASSES, "strides": STRIDES, "num_heads": 4, **options}
    teacher = LabelEncodingTeacher(channels=channels, **settings)
    encoder = teacher.label_encoder
    if encoder is not None:
        for transform in (encoder.input_transform, encoder.feature_transform):
            torch.nn.init.normal_(transform.matrix.weight, std=0.05)
    return teacher


def pyramid(
    images: int, *, channels: int = 16, height: int = 80, width: int = 96, seed: int = 0
) -> dict[str, Tensor]:
    """The student's maps of a padded batch of that size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        level: torch.randn(
            images, channels, -(-height // stride), -(-width // stride), generator=generator
        )
        for level, stride in STRIDES.items()
    }


def owned_cells(box, image_size, size, stride) -> set[tuple[int, int]]:
    """(row, column) of the cells that a box owns: plain Python, straight from the rule."""

    def along(low, high, extent, length):
        centres = [(i + 0.5) * stride for i in range(length)]
        inside = {i for i in range(length) if low <= centres[i] <= high}
        if inside:
            return inside
        # The cell under the middle, or the image's last cell (or its first, if it has none).
        on_image = [i for i in range(length) if centres[i] <= extent] or [0]
        under = [i for i in on_image if i * stride <= (low + high) / 2]
        return {max(under)}

    x1, y1, x2, y2 = (float(v) for v in box)
    rows = along(y1, y2, float(image_size[0]), size[0])
    columns = along(x1, x2, float(image_size[1]), size[1])
    return {(row, column) for row in rows for column in columns}


def reference_cells(objects: ObjectBatch, size: tuple[int, int], stride: int) -> Tensor:
    """What ``object_cells`` gives, by loops over images, objects and cells."""
    cells = torch.zeros(*objects.valid.shape, *size, dtype=torch.bool)
    for image, box_slots in enumerate(objects.boxes):
        for slot, box in enumerate(box_slots):
            if objects.valid[image, slot]:
                for cell in owned_cells(box, objects.image_sizes[image], size, stride):
                    cells[image, slot][cell] = True
    return cells


def reference_pooling(features: Tensor, cells: Tensor) -> Tensor:
    """Mean of (E, H, W) features over each object's cells (M, H, W): (M, E)."""
    embeddings = features.new_zeros(len(cells), len(features))
    for slot, mask in enumerate(cells):
        owned = mask.nonzero().tolist()
        for row, column in owned:
            embeddings[slot] += features[:, row, column] / len(owned)
    return embeddings


def reference_painting(embeddings: Tensor, cells: Tensor) -> Tensor:
    """Mean of the (M, E) embeddings of the objects on each cell of (M, H, W): (E, H, W)."""
    canvas = embeddings.new_zeros(embeddings.shape[1], *cells.shape[1:])
    for row in range(cells.shape[1]):
        for column in range(cells.shape[2]):
            on_it = [slot for slot in range(len(cells)) if cells[slot, row, column]]
            for slot in on_it:
                canvas[:, row, column] += embeddings[slot] / len(on_it)
    return canvas


def assert_pyramids_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal up to the rounding of sums in another order."""
    assert list(a) == list(b)
    for level in a:
        torch.testing.assert_close(a[level], b[level], rtol=1e-4, atol=1e-5)
