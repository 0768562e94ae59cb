import math

import pytest
import torch

from sssd.teacher import label_maps, pad_objects
from sssd.teacher.label_maps import draw_label_maps, pixel_chunks, random_scales
from tests.teacher.scenes import NUM_CLASSES, permuted, scene, with_more_padding


def one_object(*box, size=(6, 8), label=1):
    """The map of a single box."""
    objects = pad_objects(
        [torch.tensor([box]).float()], [torch.tensor([label])], [size], num_classes=NUM_CLASSES
    )
    drawing = draw_label_maps(objects, size)
    assert drawing.classes.tolist() == [label]
    return drawing.maps[0, 0]


def pixels(low, high, extent):
    """Indices along an axis that an object owns, straight from the rule."""
    inside = [i for i in range(extent) if low <= i + 0.5 <= high]
    return inside or [min(max(math.floor((low + high) / 2), 0), extent - 1)]


def reference_maps(objects, size, scales=None):
    """All classes, by loops over images, objects and pixels, in float64."""
    maps = torch.zeros(len(objects.boxes), NUM_CLASSES, *size, dtype=torch.float64)
    for image, slot in objects.valid.nonzero().tolist():
        x1, y1, x2, y2 = objects.boxes[image, slot].double().tolist()
        height, width = (int(v) for v in objects.image_sizes[image])
        canvas = maps[image, objects.classes[image, slot]]
        for row in pixels(y1, y2, height):
            for column in pixels(x1, x2, width):
                x = abs(column + 0.5 - (x1 + x2) / 2) / max(x2 - x1, 1e-6)
                y = abs(row + 0.5 - (y1 + y2) / 2) / max(y2 - y1, 1e-6)
                value = 1 - min(max(x, y), 0.5)
                if scales is not None:
                    value *= float(scales[image, slot])
                canvas[row, column] = max(float(canvas[row, column]), value)
    return maps


def dense(drawing):
    """The channels of all classes."""
    maps = drawing.maps
    full = torch.zeros(len(maps), NUM_CLASSES, *maps.shape[2:])
    full[:, drawing.classes] = maps
    return full.double()


def test_values_by_hand():
    # Centre (3, 3), size 4: the pixels' middles are at 0.5 and 1.5 from it.
    square = one_object(1, 1, 5, 5)
    expected = torch.zeros(6, 8)
    expected[1:5, 1:5] = 1 - 1.5 / 4
    expected[2:4, 2:4] = 1 - 0.5 / 4
    assert torch.equal(square, expected)

    # A middle on the centre is 1, on the border 0.5; the border belongs to the box.
    assert one_object(0.5, 0.5, 4.5, 2.5)[:4].tolist() == [
        [0.5, 0.5, 0.5, 0.5, 0.5, 0, 0, 0],
        [0.5, 0.75, 1, 0.75, 0.5, 0, 0, 0],
        [0.5, 0.5, 0.5, 0.5, 0.5, 0, 0, 0],
        [0] * 8,
    ]


def test_small_boxes_by_hand():
    # No middle inside: the pixel under the centre, at a distance of at most 0.5.
    cases = {
        (2.6, 3.6, 2.9, 3.9): (3, 2, 0.5),  # below and right of the middle of its pixel
        (2.5, 3.5, 2.5, 3.5): (3, 2, 1.0),  # no area, on a middle
        (3.0, 3.0, 3.0, 3.0): (3, 3, 0.5),  # no area, where four pixels meet
        (8.0, 6.0, 8.0, 6.0): (5, 7, 0.5),  # in the far corner, under no pixel of the image
        (2.4, 3.3, 2.8, 3.7): (3, 2, 0.75),  # holds a middle, 0.1 of 0.4 from the centre
    }
    for box, (row, column, value) in cases.items():
        drawn = one_object(*box)
        assert drawn.nonzero().tolist() == [[row, column]], box
        assert drawn[row, column].item() == pytest.approx(value, abs=1e-6), box
    # A line: all of its length, as on a border.
    line = one_object(2.2, 1, 2.2, 4)
    assert line.nonzero().tolist() == [[1, 2], [2, 2], [3, 2]]
    assert line[line > 0].tolist() == [0.5] * 3


def test_objects_without_area_stay_on_their_image_and_off_the_padding():
    # Two images in a batch that is larger than both; each object at its image's far corner.
    boxes = [torch.tensor([[5.0, 4, 5, 4]]), torch.tensor([[3.0, 7, 3, 7]])]
    labels = [torch.tensor([0]), torch.tensor([0])]
    objects = pad_objects(boxes, labels, [(4, 5), (7, 3)], num_classes=1)
    assert draw_label_maps(objects, (8, 8)).maps.nonzero()[:, [0, 2, 3]].tolist() == [
        [0, 3, 4],
        [1, 6, 2],
    ]


@pytest.mark.parametrize("counts", [(1,), (0, 3), (4, 0, 9), (25, 1)])
@pytest.mark.parametrize("scaled", [False, True])
def test_equals_loops_over_objects_and_pixels(counts, scaled):
    # The sizes are multiples of nothing; every third object has no area.
    sizes = [(23, 31), (17, 40), (33, 19)][: len(counts)]
    objects = scene(*counts, sizes=sizes, seed=len(counts))
    scales = random_scales(objects.valid.shape) if scaled else None
    drawing = draw_label_maps(objects, (37, 41), scales=scales)
    assert drawing.classes.tolist() == sorted(set(objects.classes[objects.valid].tolist()))
    expected = reference_maps(objects, (37, 41), scales)
    torch.testing.assert_close(dense(drawing), expected, rtol=0, atol=2e-6)
    if not scaled:
        drawn = drawing.maps[drawing.maps > 0]
        assert drawn.min() >= 0.5 and drawn.max() <= 1


def test_large_images_are_exact_at_their_far_end():
    box = torch.tensor([[1300.3, 790.7, 1301.9, 793.2]])
    objects = pad_objects([box], [torch.tensor([2])], [(800, 1333)], num_classes=NUM_CLASSES)
    drawing = draw_label_maps(objects, (800, 1344))
    x1, y1, x2, y2 = box[0].double().tolist()
    column = abs(1301.5 - (x1 + x2) / 2) / (x2 - x1)
    row = abs(792.5 - (y1 + y2) / 2) / (y2 - y1)
    assert drawing.maps[0, 0, 792, 1301].item() == pytest.approx(1 - max(column, row), abs=1e-6)


def test_overlapping_objects_of_one_class_keep_the_highest_and_classes_do_not_mix():
    boxes = torch.tensor([[0.0, 0, 6, 6], [2, 2, 8, 6], [2, 2, 8, 6]])
    sizes = [(6, 8)]
    both = pad_objects([boxes], [torch.tensor([3, 3, 1])], sizes, num_classes=NUM_CLASSES)
    drawing = draw_label_maps(both, (6, 8))
    assert drawing.classes.tolist() == [1, 3]
    a, b = one_object(0, 0, 6, 6), one_object(2, 2, 8, 6)
    assert torch.equal(drawing.maps[0, 0], b)
    assert torch.equal(drawing.maps[0, 1], torch.maximum(a, b))
    # A pale object hides nothing: highest after scaling, not before.
    pale = draw_label_maps(both, (6, 8), scales=torch.tensor([[1.0, 0.25, 0.5]]))
    torch.testing.assert_close(pale.maps[0, 0], b / 2)
    torch.testing.assert_close(pale.maps[0, 1], torch.maximum(a, b / 4))


def test_padding_and_order_do_not_matter():
    objects = scene(7, 2, seed=4)
    before = draw_label_maps(objects, (96, 96))
    for changed in (with_more_padding(objects, 3), permuted(objects, torch.arange(6, -1, -1))):
        after = draw_label_maps(changed, (96, 96))
        assert torch.equal(after.classes, before.classes)
        assert torch.equal(after.maps, before.maps)


def test_one_empty_channel_without_any_object():
    for objects in (scene(0, 0), with_more_padding(scene(0, 0), 4)):
        drawing = draw_label_maps(objects, (96, 96))
        assert drawing.maps.shape == (2, 1, 96, 96) and not drawing.maps.any()
        assert drawing.classes.tolist() == [0]


def test_chunks_enumerate_every_pixel_of_every_object_once():
    areas = torch.tensor([5, 1, 0, 12, 3])
    expected = [(i, j) for i, area in enumerate(areas.tolist()) for j in range(area)]
    for chunk_size in (1, 4, 7, 100):
        chunks = list(pixel_chunks(areas, chunk_size))
        assert [len(owner) for owner, _ in chunks[:-1]] == [chunk_size] * (len(chunks) - 1)
        assert 0 < len(chunks[-1][0]) <= chunk_size
        owners, pixels = (torch.cat(x).tolist() for x in zip(*chunks, strict=True))
        assert list(zip(owners, pixels, strict=True)) == expected
    assert list(pixel_chunks(areas[:0], 4)) == []


def test_many_objects_take_memory_for_a_chunk_of_their_area(monkeypatch):
    # 500 objects on 90 x 120 pixels: one tensor over objects and pixels would have 5.4 million.
    objects = scene(500, sizes=[(90, 120)], seed=2)
    expected = draw_label_maps(objects, (96, 128), chunk_size=10**9)
    lengths = []

    def recorded(areas, chunk_size, **kwargs):
        for owner, pixel in pixel_chunks(areas, chunk_size, **kwargs):
            lengths.append(len(owner))
            yield owner, pixel

    monkeypatch.setattr(label_maps, "pixel_chunks", recorded)
    drawing = draw_label_maps(objects, (96, 128), chunk_size=10_000)
    area = (objects.boxes[0, :, 2:] - objects.boxes[0, :, :2] + 1).prod(dim=1).sum()
    assert 500 < sum(lengths) <= area < 500 * 90 * 120 / 8
    assert len(lengths) > 10 and max(lengths) == 10_000
    assert torch.equal(drawing.maps, expected.maps)


def test_scales_are_min_of_one_and_twice_a_uniform_number():
    scales = random_scales((100, 200), torch.Generator().manual_seed(0))
    uniform = torch.rand(100, 200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scales, torch.minimum(torch.ones(()), 2 * uniform))
    assert (scales == 1).float().mean() == pytest.approx(0.5, abs=0.02)
    assert scales[scales < 1].mean() == pytest.approx(0.5, abs=0.02)


def test_an_image_larger_than_the_maps_is_refused():
    objects = scene(1, 1, sizes=[(20, 20), (20, 33)])
    sentence = "Image 1 of the batch is 20 x 33 pixels .* the label maps of 32 x 32; give"
    with pytest.raises(ValueError, match=sentence):
        draw_label_maps(objects, (32, 32))
