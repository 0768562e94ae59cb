import pytest
import torch

from sssd.teacher import ObjectBatch, image_cells, object_cells, pad_objects
from tests.teacher.scenes import reference_cells, scene, with_more_padding


def batch_of(*boxes, image_size=(32, 32)):
    """One image with these boxes."""
    return pad_objects(
        [torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)],
        [torch.zeros(len(boxes), dtype=torch.int64)],
        [image_size],
        num_classes=1,
    )


def columns_and_rows(box, *, image_size=(32, 32), size=(4, 4), stride=8):
    """First and last column and row that a box owns; they must form a full rectangle."""
    cells = object_cells(batch_of(box, image_size=image_size), size, stride)[0, 0]
    rows, columns = cells.any(1).nonzero().flatten(), cells.any(0).nonzero().flatten()
    assert cells.sum() == len(rows) * len(columns)
    return columns.tolist(), rows.tolist()


# ---- Padding ----


def test_padding_by_hand():
    objects = pad_objects(
        [torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), torch.zeros(0, 4), torch.ones(1, 4)],
        [torch.tensor([4, 0]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])],
        [(10, 20), (30, 40), (50, 60)],
        num_classes=5,
    )
    zero = [0, 0, 0, 0]
    assert objects.boxes.tolist() == [
        [[1, 2, 3, 4], [5, 6, 7, 8]],
        [zero, zero],
        [[1, 1, 1, 1], zero],
    ]
    assert objects.classes.tolist() == [[4, 0], [5, 5], [2, 5]]
    assert objects.valid.tolist() == [[True, True], [False, False], [True, False]]
    assert objects.image_sizes.tolist() == [[10, 20], [30, 40], [50, 60]]


def test_a_batch_without_any_object_has_one_slot_an_image():
    objects = scene(0, 0)
    assert objects.boxes.shape == (2, 1, 4)
    assert objects.classes.tolist() == [[5], [5]]
    assert not objects.valid.any()


def test_boxes_are_clipped_to_their_own_image():
    objects = pad_objects(
        [torch.tensor([[-5.0, -5, 100, 100]]), torch.tensor([[-5.0, 3, 100, 100]])],
        [torch.tensor([0]), torch.tensor([0])],
        [(10, 20), (30, 40)],
        num_classes=1,
    )
    assert objects.boxes.tolist() == [[[0, 0, 20, 10]], [[0, 3, 40, 30]]]


@pytest.mark.parametrize("bad", [-1, 5, 80])
def test_a_class_out_of_range_is_an_error(bad):
    classes = [torch.tensor([0, 4]), torch.tensor([1, bad, bad])]
    boxes = [torch.zeros(2, 4), torch.zeros(3, 4)]
    message = rf"Image 1 .* class \[{bad}\].* the 5 classes 0 to 4; set the class count"
    with pytest.raises(ValueError, match=message):
        pad_objects(boxes, classes, [(8, 8), (8, 8)], num_classes=5)


def test_boxes_without_a_class_are_an_error():
    with pytest.raises(ValueError, match="Image 0 of the batch has 2 boxes and 1 classes"):
        pad_objects([torch.zeros(2, 4)], [torch.tensor([0])], [(8, 8)], num_classes=5)
    with pytest.raises(ValueError):
        pad_objects([torch.zeros(1, 4)], [torch.tensor([0])], [(8, 8), (8, 8)], num_classes=5)


def test_context_box_is_last_covers_the_image_and_has_no_class():
    objects = scene(2, 0).with_context_box(5)
    assert objects.boxes[:, -1].tolist() == [[0, 0, 96, 64], [0, 0, 50, 80]]
    assert objects.classes[:, -1].tolist() == [5, 5]
    assert objects.valid.tolist() == [[True, True, True], [False, False, True]]
    assert torch.equal(objects.boxes[:, :-1], scene(2, 0).boxes)
    # The image, and not the padding of the batch.
    cells = object_cells(objects, (12, 16), 8)[:, -1]
    assert torch.equal(cells, image_cells(objects.image_sizes, (12, 16), 8))
    assert not cells.all()


def test_to_moves_every_part():
    objects = scene(2, 1).to(torch.device("meta"))
    assert all(x.device.type == "meta" for x in objects)


# ---- Cells. Stride 8 and 4 x 4 cells, unless said: their centres are at 4, 12, 20, 28 ----


def test_a_cell_belongs_to_a_box_that_holds_its_centre():
    # Fault: integer cell indices without the half cell give (8, 8, 16, 16) cells 1 and 2.
    assert columns_and_rows((8, 8, 16, 16)) == ([1], [1])
    assert columns_and_rows((0, 0, 32, 32)) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert columns_and_rows((3, 11, 21, 29)) == ([0, 1, 2], [1, 2, 3])
    assert columns_and_rows((5, 0, 27, 32)) == ([1, 2], [0, 1, 2, 3])
    # A centre on the border is inside.
    assert columns_and_rows((4, 4, 12, 12)) == ([0, 1], [0, 1])


def test_boxes_smaller_than_a_cell_own_the_cell_under_their_centre():
    assert columns_and_rows((17, 1, 19, 3)) == ([2], [0])  # centre (18, 2)
    assert columns_and_rows((13, 21, 19, 27)) == ([2], [3])  # centre (16, 24): the next cell begins
    assert columns_and_rows((13, 21, 18, 26)) == ([1], [2])  # centre (15.5, 23.5)
    # Thin: many columns, one row.
    assert columns_and_rows((0, 13, 32, 14)) == ([0, 1, 2, 3], [1])


def test_boxes_of_size_zero():
    assert columns_and_rows((20, 20, 20, 20)) == ([2], [2])
    assert columns_and_rows((7.9, 8, 7.9, 8)) == ([0], [1])
    assert columns_and_rows((0, 0, 0, 0)) == ([0], [0])


def test_boxes_at_the_far_border():
    assert columns_and_rows((32, 32, 32, 32)) == ([3], [3])
    assert columns_and_rows((31, 30, 32, 32)) == ([3], [3])
    # Beyond the image before clipping.
    assert columns_and_rows((40, 50, 60, 70)) == ([3], [3])
    # An image of 24 x 24 in a batch padded to 32 x 32 ends with cell 2, not with cell 3.
    assert columns_and_rows((24, 24, 24, 24), image_size=(24, 24)) == ([2], [2])
    # An image of 26 x 26: the centre of cell 3 is off it, so that its last cell is 2 too.
    assert columns_and_rows((25, 25, 26, 26), image_size=(26, 26)) == ([2], [2])


def test_a_level_of_one_cell_and_an_image_smaller_than_a_cell():
    for box in [(0, 0, 32, 32), (1, 1, 2, 2), (32, 0, 32, 0)]:
        assert columns_and_rows(box, size=(1, 1), stride=64) == ([0], [0])
        assert columns_and_rows(box, size=(2, 2), stride=128) == ([0], [0])


@pytest.mark.parametrize("stride", [4, 8, 16, 64])
@pytest.mark.parametrize("seed", range(4))
def test_cells_equal_the_reference(stride, seed):
    sizes = [(64, 96), (80, 50), (33, 96)]
    objects = with_more_padding(scene(40, 7, 0, sizes=sizes, seed=seed), 2)
    size = (-(-80 // stride), -(-96 // stride))
    cells = object_cells(objects, size, stride)
    assert torch.equal(cells, reference_cells(objects, size, stride))
    # Nobody is lost, padding owns nothing, and no object lies off its image.
    assert torch.equal(cells.flatten(2).any(2), objects.valid)
    assert not (cells & ~image_cells(objects.image_sizes, size, stride)[:, None]).any()


def test_round_coordinates_equal_the_reference():
    # Corners on centres and borders of cells, where a wrong comparison would show.
    corners = torch.arange(0, 33, 4.0)
    x1, x2 = torch.cartesian_prod(corners, corners).unbind(1)
    keep = x1 <= x2
    x1, x2 = x1[keep], x2[keep]
    objects = batch_of(*torch.stack([x1, x1.flip(0), x2, x2.flip(0)], dim=1).tolist())
    assert torch.equal(object_cells(objects, (4, 4), 8), reference_cells(objects, (4, 4), 8))


def test_cells_do_not_depend_on_the_padding_of_the_batch():
    objects = scene(9, sizes=[(40, 56)])
    alone = object_cells(objects, (5, 7), 8)
    padded = object_cells(objects, (12, 16), 8)
    assert torch.equal(padded[:, :, :5, :7], alone)
    assert padded.sum() == alone.sum()


# ---- Cells of the image ----


def test_image_cells_by_hand():
    # Heights 32 and 26 at stride 8: 26 leaves the centre 28 of the last row out.
    cells = image_cells(torch.tensor([[32.0, 16.0], [26.0, 30.0]]), (4, 4), 8)
    assert cells[0].nonzero()[:, 1].unique().tolist() == [0, 1]
    assert cells[0].sum() == 4 * 2
    assert cells[1].sum() == 3 * 4
    assert not cells[1, 3].any()


@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
def test_every_image_owns_a_cell(size):
    cells = image_cells(torch.tensor([[1.0, 1.0], [20.0, 25.0]]), size, 64)
    assert cells[:, 0, 0].all()
    assert cells.sum() == 2


def test_no_value_is_read_back_from_the_device():
    objects = ObjectBatch(*(x.to("meta") for x in scene(3, 1)))
    assert object_cells(objects, (4, 6), 8).shape == (2, 3, 4, 6)
    assert image_cells(objects.image_sizes, (4, 6), 8).shape == (2, 4, 6)
