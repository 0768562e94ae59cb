import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sssd.losses.logits import (
    confidence_penalty,
    confidence_weighted_cross_entropy,
    cross_entropies,
    cross_entropy,
    eta_from_target_confidence,
    kd_loss,
    permute_dark_knowledge,
    soft_cross_entropy,
    target_confidence,
    tolerant_teacher_loss,
    top_score_difference,
)
from tests.losses.properties import (
    assert_empty_batch_gives_zero_and_keeps_the_graph,
    assert_gradient_reaches_the_student_alone,
    random_logits,
)

LABELS = torch.tensor([2, 0, 3])

# Every loss as a function of (student, teacher).
LOSSES = {
    "kd": kd_loss,
    "kd without square": partial(kd_loss, temperature=3.0, t_square=False),
    "soft cross-entropy": soft_cross_entropy,
    "soft cross-entropy with square": partial(soft_cross_entropy, temperature=3.0, t_square=True),
    "cross-entropy": lambda student, _: cross_entropy(student, LABELS[: len(student)]),
    "smoothed cross-entropy": lambda student, _: cross_entropy(
        student, LABELS[: len(student)], label_smoothing=0.1
    ),
    "confidence penalty": lambda student, _: confidence_penalty(student),
    "cwtm": lambda student, teacher: confidence_weighted_cross_entropy(
        student, LABELS[: len(student)], teacher
    ),
    "top-score difference": lambda student, _: top_score_difference(student, 3),
    "tolerant teacher": lambda student, _: tolerant_teacher_loss(
        student, LABELS[: len(student)], k=3, eta=0.4
    ),
}
EVERY = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


@EVERY
def test_gradient_reaches_the_student_alone(loss):
    student, teacher = random_logits(3, 5), random_logits(3, 5, seed=1)
    assert_gradient_reaches_the_student_alone(loss, student, teacher)


@EVERY
def test_an_empty_batch_gives_zero_and_keeps_the_graph(loss):
    assert_empty_batch_gives_zero_and_keeps_the_graph(loss, 5)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher = ((2e4 * random_logits(3, 5, seed=i)).clamp(-6e4, 6e4) for i in range(2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float()), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(value, student)
    assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(("temperature", "cat"), [(1.0, 0.982), (10.0, 0.599)])
def test_kd_of_two_classes_by_hand(temperature, cat):
    # Logits (5, 1) and (3, 2): sigmoids of their differences, 4 and 1, over the temperature.
    teacher, student = torch.tensor([[5.0, 1.0]]), torch.tensor([[3.0, 2.0]])
    p, q = (1 / (1 + math.exp(-x / temperature)) for x in (4, 1))
    assert p == pytest.approx(cat, abs=5e-4)
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    for function, value in ((kd_loss, divergence), (soft_cross_entropy, divergence + entropy)):
        for t_square, factor in ((False, 1), (True, temperature**2)):
            loss = function(student, teacher, temperature=temperature, t_square=t_square)
            assert loss.item() == pytest.approx(factor * value, rel=1e-5)


def test_defaults_and_batch_mean():
    # Two images, of which one has nothing to learn: half of the other's value.
    student, teacher = random_logits(1, 4), random_logits(1, 4, seed=1)
    expected = 16 * F.kl_div(
        (student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="sum"
    )
    value = kd_loss(torch.cat([student, teacher]), torch.cat([teacher, teacher]))
    torch.testing.assert_close(value, expected / 2)
    expected = F.cross_entropy(student, teacher.softmax(1))
    torch.testing.assert_close(soft_cross_entropy(student, teacher), expected)


@pytest.mark.parametrize("t_square", [False, True])
def test_soft_cross_entropy_has_the_gradient_of_kd(t_square):
    student, teacher = random_logits(3, 5).requires_grad_(), random_logits(3, 5, seed=1)
    options = {"temperature": 3.0, "t_square": t_square}
    grads = [
        torch.autograd.grad(loss(student, teacher, **options), student)[0]
        for loss in (kd_loss, soft_cross_entropy)
    ]
    torch.testing.assert_close(*grads)
    # softmax minus target, over B, with one 1 / T; the square of T leaves T of it.
    closed = ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / 3 * (3 if t_square else 1 / 3)
    torch.testing.assert_close(grads[0], closed)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.75])
def test_cross_entropy_equals_torch(share):
    logits = random_logits(3, 5).requires_grad_()
    ours = cross_entropy(logits, LABELS, label_smoothing=share)
    theirs = F.cross_entropy(logits, LABELS, label_smoothing=share)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-15)
    # softmax minus target, over B; the label keeps its part of what is spread.
    target = (1 - share) * F.one_hot(LABELS, 5) + share / 5
    torch.testing.assert_close(grads[0], (logits.softmax(1) - target) / 3)


def test_smoothed_cross_entropy_by_hand():
    # Targets 0.7 + 0.3 / 3 and twice 0.3 / 3; then half the value, with an image that costs ln 3.
    logits = logits_of([0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3])
    expected = 0.8 * math.log(2) + 0.2 * math.log(4)
    value = cross_entropy(logits[:1], torch.tensor([0]), label_smoothing=0.3)
    assert value.item() == pytest.approx(expected)
    value = cross_entropy(logits, torch.tensor([0, 2]), label_smoothing=0.3)
    assert value.item() == pytest.approx((expected + math.log(3)) / 2)


def test_confidence_penalty_by_hand():
    assert confidence_penalty(torch.zeros(4, 8)).item() == pytest.approx(-math.log(8))
    assert confidence_penalty(torch.tensor([[0.0, 1e4]])).item() == 0
    # -ln 2 / 2 - 2 ln 4 / 4 and 0.9 ln 0.9 + 2 (0.05 ln 0.05)
    value = confidence_penalty(logits_of([0.5, 0.25, 0.25], [0.9, 0.05, 0.05]))
    assert value.item() == pytest.approx((-1.039721 - 0.394398) / 2, abs=1e-6)


def test_confidence_weights_by_hand():
    # Confidences 3/4 and 1/2: weights 3/5 and 2/5; cross-entropies ln 2 and ln 4. The teacher's
    # best class of the second image is not its label.
    student = logits_of([0.5, 0.25, 0.25], [0.5, 0.25, 0.25])
    teacher = logits_of([0.75, 0.125, 0.125], [0.5, 0.3, 0.2])
    value = confidence_weighted_cross_entropy(student, torch.tensor([0, 2]), teacher)
    assert value.item() == pytest.approx(0.6 * math.log(2) + 0.4 * math.log(4))
    # A teacher that is equally sure of all leaves the plain mean.
    value = confidence_weighted_cross_entropy(
        student, torch.tensor([0, 2]), teacher[:1].repeat(2, 1)
    )
    assert value.item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_permutation_keeps_the_best_and_the_multiset():
    teacher = random_logits(50, 6).requires_grad_()
    permuted = permute_dark_knowledge(teacher, generator=torch.Generator().manual_seed(3))
    again = permute_dark_knowledge(teacher, generator=torch.Generator().manual_seed(3))
    other = permute_dark_knowledge(teacher, generator=torch.Generator().manual_seed(4))
    assert torch.equal(permuted, again) and not torch.equal(permuted, other)
    assert not permuted.requires_grad and permuted.dtype == teacher.dtype
    assert torch.equal(permuted.sort(1).values, teacher.sort(1).values)
    assert torch.equal(permuted.max(1).values, teacher.max(1).values)
    assert torch.equal(permuted.argmax(1), teacher.argmax(1))
    # Each image has a permutation of its own: the second of two equal ones differs from the first.
    twins = permute_dark_knowledge(teacher[:1].repeat(50, 1))
    assert len(twins.unique(dim=0)) > 10


def test_every_permutation_is_as_likely():
    teacher = torch.tensor([[0.0, 1.0, 9.0, 2.0]]).repeat(6000, 1)
    permuted = permute_dark_knowledge(teacher, generator=torch.Generator().manual_seed(0))
    orders, counts = permuted.unique(dim=0, return_counts=True)
    assert len(orders) == 6 and (orders[:, 2] == 9).all()
    assert (counts - 1000).abs().max() < 120  # four standard deviations


def test_top_score_difference_by_hand():
    # Ranks are each image's own: 0.5 - (0.3 + 0.1) / 2 and 0.4 - (0.3 + 0.2) / 2.
    logits = logits_of([0.1, 0.5, 0.3, 0.1], [0.4, 0.1, 0.2, 0.3])
    assert top_score_difference(logits, 3).item() == pytest.approx((0.3 + 0.15) / 2)
    assert top_score_difference(logits, 2).item() == pytest.approx((0.2 + 0.1) / 2)
    # The third-party form divides by K = 3: 0.5 - 0.4 / 3 for the first.
    ours, theirs = top_score_difference(logits[:1], 3).item(), 0.5 - 0.4 / 3
    assert (0.5 - theirs) / (0.5 - ours) == pytest.approx(2 / 3)
    value = tolerant_teacher_loss(logits, torch.tensor([0, 0]), k=3, eta=0.4)
    hard = (math.log(10) + math.log(2.5)) / 2
    assert value.item() == pytest.approx(0.4 * hard + 0.6 * 0.225)
    for eta, expected in ((1, hard), (0, 0.225)):
        value = tolerant_teacher_loss(logits, torch.tensor([0, 0]), k=3, eta=eta)
        assert value.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("eta", "u"), [(0.3, 0.343), (0.4, 0.533), (0.45, 0.6545), (0.5, 0.8), (0.55, 0.978)]
)
@pytest.mark.parametrize("num_classes", [5, 8])
def test_the_tolerant_teacher_is_least_at_its_target_confidence(eta, u, num_classes):
    assert target_confidence(eta, 5) == pytest.approx(u, abs=5e-4)
    assert eta_from_target_confidence(target_confidence(eta, 5), 5) == pytest.approx(eta)

    def loss(confidence):
        logits = torch.full((1, num_classes), -60.0, dtype=torch.float64)
        logits[0, :5] = math.log((1 - confidence) / 4)
        logits[0, 3] = math.log(confidence)
        logits.requires_grad_()
        value = tolerant_teacher_loss(logits, torch.tensor([3]), k=5, eta=eta)
        return value, torch.autograd.grad(value, logits)[0]

    least, grad = loss(target_confidence(eta, 5))
    assert grad.abs().max() < 1e-12
    assert min(loss(target_confidence(eta, 5) + step)[0] for step in (-0.01, 0.01)) > least


def test_limits_of_the_target_confidence():
    assert [round(eta_from_target_confidence(u), 4) for u in (0.5, 0.6, 0.7)] == [
        0.3846,
        0.4286,
        0.4667,
    ]
    assert eta_from_target_confidence(1) == eta_from_target_confidence(1.2) == 1
    assert target_confidence(1) == target_confidence(5 / 9 + 1e-9) == 1
    assert target_confidence(0.1) == eta_from_target_confidence(0.2) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: top_score_difference(x, 6), "is 6; it must be from 2 to the number of cl.*, 5"),
        (lambda x: tolerant_teacher_loss(x, LABELS, k=1, eta=0.4), "difference is 1; it must be"),
        (lambda x: tolerant_teacher_loss(x, LABELS, eta=1.5), "eta .* from 0 to 1, got 1.5"),
        (lambda x: eta_from_target_confidence(0.1), r"is 0.1; the best of K=5 .* least 0.2"),
        (lambda x: target_confidence(0.5, 1), "is 1; it must be at least 2"),
        (lambda x: kd_loss(x, x[:, :4]), r"got \(3, 5\) and \(3, 4\)"),
        (lambda x: soft_cross_entropy(x, x[:1]), r"got \(3, 5\) and \(1, 5\)"),
        (lambda x: confidence_penalty(x[0]), r"needs logits \(images, classes\).* got \(5,\)"),
        (lambda x: kd_loss(x, x, temperature=0), "temperature must be positive, got 0"),
        (lambda x: cross_entropies(x, torch.tensor([0, 5, 1])), "A label is 5, .* has 5 classes"),
        (lambda x: cross_entropies(x, torch.tensor([0, 1, -100])), "A label is -100, .* 0 to 4"),
        (lambda x: cross_entropy(x, LABELS + 2), "A label is 5, .* 0 to 4"),
        (lambda x: cross_entropy(x, LABELS, label_smoothing=1), "at least 0 and below 1, got 1"),
        (lambda x: cross_entropy(x, LABELS, label_smoothing=-0.1), "smoothing .* got -0.1"),
        (lambda x: cross_entropies(x, LABELS[:2]), r"must be 3 class indices.* got \(2,\)"),
        (lambda x: cross_entropies(x, LABELS.int()), r"int64; got \(3,\) of torch.int32"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 5))


@pytest.fixture
def peer():
    return pytest.importorskip("torchdistill.losses.mid_level")


def test_kd_equals_torchdistill(peer):
    student, teacher = random_logits(8, 10).requires_grad_(), random_logits(8, 10, seed=1)
    labels = torch.arange(8)

    def theirs(targets=labels, **options):
        loss = peer.KDLoss("m", "output", "m", "output", temperature=4.0, **options)
        return loss({"m": {"output": student}}, {"m": {"output": teacher}}, targets)

    def assert_equal(a, b):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
        grads = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (a, b)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-15)

    ours = kd_loss(student, teacher)
    hard = cross_entropies(student, labels).mean()
    assert_equal(0.1 * hard + 0.9 * ours, theirs(alpha=0.1))
    # Without a share of the cross-entropy, the peer also leaves out the square of the temperature;
    # without labels that and the weight of the divergence.
    assert_equal(ours / 16, theirs(alpha=0))
    assert_equal(ours / 16, theirs(alpha=0.1, targets=None))
    # With the mean over all elements, its divergence is C times too small.
    with pytest.warns(UserWarning, match="batchmean"):
        assert_equal(ours / 16 / 10, theirs(alpha=0, reduction="mean"))
