import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from sssd.losses.relations import rkd_angle_loss, rkd_distance_loss
from tests.losses.properties import assert_gradient_reaches_the_student_alone, random_tensor

LOSSES = [
    partial(loss, normalize=normalize)
    for loss in (rkd_distance_loss, rkd_angle_loss)
    for normalize in (False, True)
]
EVERY = pytest.mark.parametrize(
    "loss", LOSSES, ids=lambda loss: f"{loss.func.__name__}-{loss.keywords['normalize']}"
)


def points(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@EVERY
def test_gradient_reaches_the_student_alone(loss):
    student, teacher = random_tensor(5, 3), random_tensor(5, 4, seed=1)
    assert_gradient_reaches_the_student_alone(loss, student, teacher)


def test_distances_by_hand():
    # The student's distances 3, 4, 5 have the mean 4; the teacher's 1, 1, 2 have 4/3.
    student = points([0, 0], [3, 0], [0, 4])
    teacher = points([0], [1], [-1])
    differences = (3 / 4 - 3 / 4, 4 / 4 - 3 / 4, 5 / 4 - 6 / 4)
    expected = 2 * sum(x**2 / 2 for x in differences) / 9  # each pair twice, and the diagonal
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(expected)


def test_distances_that_are_far_off_count_linearly():
    # 1, 100, 101 against 100, 1, 101: both have the mean 202/3.
    student, teacher = points([0], [-1], [100]), points([0], [-100], [1])
    difference = 99 / (202 / 3)
    assert difference > 1
    expected = 2 * 2 * (difference - 1 / 2) / 9
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(expected)


def test_angles_by_hand():
    # A right angle with two of 45 degrees, against a triangle with three of 60.
    student = points([0, 0], [1, 0], [0, 1])
    teacher = points([0, 0], [1, 0], [1 / 2, math.sqrt(3) / 2])
    differences = (0 - 1 / 2, math.sqrt(1 / 2) - 1 / 2, math.sqrt(1 / 2) - 1 / 2)
    # Each angle twice; the other 21 triples have an angle of 0, or none.
    expected = 2 * sum(x**2 / 2 for x in differences) / 27
    assert rkd_angle_loss(student, teacher).item() == pytest.approx(expected)
    # Seen from all three, the end points of a straight line: cosines -1, 1, 1.
    line = points([0], [1], [-1])
    differences = (-1 - 1 / 2, 1 / 2, 1 / 2)
    expected = 2 * (1.5 - 1 / 2 + 2 * 0.25 / 2) / 27
    assert rkd_angle_loss(line, teacher).item() == pytest.approx(expected)


@EVERY
def test_scale_rotation_and_translation_of_the_student_do_not_count(loss):
    student, teacher = random_tensor(6, 4), random_tensor(6, 3, seed=1)
    rotation, _ = torch.linalg.qr(random_tensor(4, 4, seed=2))
    moved = 7 * student @ rotation
    if not loss.keywords["normalize"]:
        moved = moved + 5
    torch.testing.assert_close(loss(moved, teacher), loss(student, teacher))
    torch.testing.assert_close(loss(moved, student), teacher.new_zeros(()), atol=1e-12, rtol=0)


@EVERY
def test_normalize_projects_onto_the_sphere_and_maps_are_flattened(loss):
    student, teacher = random_tensor(5, 3, 2, 2), random_tensor(5, 2, 4, seed=1)
    flat = student.flatten(1), teacher.flatten(1)
    torch.testing.assert_close(loss(student, teacher), loss(*flat))
    if loss.keywords["normalize"]:
        flat = (F.normalize(x) for x in flat)
        torch.testing.assert_close(loss(student, teacher), loss.func(*flat))


@EVERY
@pytest.mark.parametrize("size", [0, 1])
def test_batches_without_a_pair_give_zero_and_keep_the_graph(loss, size):
    student = random_tensor(size, 3).requires_grad_()
    value = loss(student, random_tensor(size, 2, seed=1))
    value.backward()
    assert value.item() == 0
    assert student.grad.shape == student.shape
    assert not student.grad.any()


@EVERY
def test_two_samples_have_nothing_to_compare(loss):
    # One distance, which is its own mean; and the only angles are those between equal directions.
    student = random_tensor(2, 3).requires_grad_()
    value = loss(student, random_tensor(2, 4, seed=1))
    assert value.item() == pytest.approx(0, abs=1e-30)
    assert grad(value, student)[0].abs().max() < 1e-15


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_embeddings_give_each_other_no_gradient(loss, dtype):
    student, teacher = random_tensor(6, 50).to(dtype) + 30, random_tensor(6, 4, seed=1).to(dtype)
    student[4] = student[1]
    student.requires_grad_()
    (slope,) = grad(loss(student, teacher), student)
    assert slope.abs().max() < 1  # the root of 1e-12 gives up to 1e11
    # Gradients of the two differ only through the teacher.
    teacher[4] = teacher[1]
    (slope,) = grad(loss(student, teacher), student)
    torch.testing.assert_close(slope[4], slope[1])
    # All equal: nothing has a direction.
    student = student.detach()[:1].repeat(6, 1).requires_grad_()
    value = loss(student, teacher)
    assert value.isfinite()
    assert value > 0
    assert not grad(value, student)[0].any()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher = (3e4 * random_tensor(6, 5, seed=i).clamp(-2, 2) for i in range(2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.double(), teacher.double()).float())
    assert grad(value, student)[0].isfinite().all()
    # Autocast turns the factors of a matrix product into half precision, in the backward, too.
    student = student.detach().float().requires_grad_()
    value = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(student, teacher)
        assert torch.equal(inside, value)
        (of_inside,) = grad(inside, student)
    assert torch.equal(of_inside, grad(value, student)[0])


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_close_embeddings_far_from_the_origin_keep_their_digits(loss):
    # Distances from products lose them: in float32, the squares are rounded to 1e-2.
    single = (random_tensor(6, 8, seed=3) / 10 + 100).float().requires_grad_()
    teacher = random_tensor(6, 4, seed=1)
    double = single.detach().double().requires_grad_()
    values = loss(single, teacher.float()), loss(double, teacher)
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-5, atol=0)
    (a,), (b,) = grad(values[0], single), grad(values[1], double)
    torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max())


@pytest.fixture
def peer():
    return pytest.importorskip("torchdistill.losses.mid_level")


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize(
    ("loss", "weights"), [(rkd_distance_loss, (1, 0)), (rkd_angle_loss, (0, 1))]
)
def test_equal_to_torchdistill(peer, loss, weights, duplicates):
    student = random_tensor(8, 16)
    teacher = random_tensor(8, 32, seed=1)
    if duplicates:
        student[5] = student[2]
    student.requires_grad_()
    theirs = peer.RKDLoss("m", "m", *weights, reduction="mean")
    expected = theirs({"m": {"output": student}}, {"m": {"output": teacher}})
    value = loss(student, teacher)
    # The peer's distance of duplicates is the root of its eps, 1e-6, plus rounding; and its slope
    # there multiplies rounding errors by up to 1e6 (its gradient is not compared).
    precision = 1e-5 if duplicates else 1e-9
    torch.testing.assert_close(value, expected, rtol=precision, atol=0)
    if not duplicates:
        ours, theirs = grad(value, student)[0], grad(expected, student)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_errors_name_the_shapes_and_the_fix():
    for loss in LOSSES:
        with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\); flatten or pool"):
            loss(torch.zeros(3, 4), torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"\(3,\) and \(3, 4\); flatten or pool"):
            loss(torch.zeros(3), torch.zeros(3, 4))
