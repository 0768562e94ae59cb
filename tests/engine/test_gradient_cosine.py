"""Cosine and ratio of the gradients of detection losses and distillation."""

import math

import pytest
import torch
from detectron2.utils.events import EventStorage

from sssd.engine.gradient_cosine import Agreement, gradient_agreement
from tests.detectors import build, tiny_config, training_batch


class Fixed(torch.nn.Module):
    """A SelfDistiller's outside around two parameters with known gradients."""

    class _Phases:
        @staticmethod
        def distills(iteration):
            return iteration < 5

    def __init__(self):
        super().__init__()
        self.student = torch.nn.Module()
        self.student.backbone = torch.nn.Module()
        self.student.backbone.bottom_up = torch.nn.Linear(2, 1, bias=False)
        self.student.backbone.output = torch.nn.Linear(2, 1, bias=False)
        self.bottom_up = self.student.backbone.bottom_up
        self.phases = self._Phases()

    def forward(self, batch):
        low, high = self.bottom_up.weight[0], self.student.backbone.output.weight[0]
        first = torch.tensor([1.0, 0.0]) if batch is None else torch.tensor(batch)
        return {
            "loss_cls": low @ first + high @ torch.tensor([3.0, 0.0]),
            "loss_box_reg": low @ torch.tensor([1.0, 0.0]),
            "teacher_loss_cls": 100 * low.sum(),
            "loss_distill": low @ torch.tensor([0.0, 4.0]) - high @ torch.tensor([3.0, 3.0]),
        }


def test_cosine_and_ratio_are_those_of_the_two_gradients():
    found = gradient_agreement(Fixed(), [None] * 4, count=3, iteration=4)
    # below the pyramid: (2, 0) and (0, 4); above: (3, 0) and (-3, -3)
    assert found["bottom_up"].cosine.tolist() == [0.0] * 3
    assert found["bottom_up"].ratio.tolist() == [2.0] * 3
    assert found["bottom_up"].two_batches.tolist() == [1.0] * 3
    assert found["pyramid"].cosine.tolist() == pytest.approx([-(2**-0.5)] * 3)
    assert found["pyramid"].ratio.tolist() == pytest.approx([2**0.5] * 3)
    assert found["pyramid"].summary() == (
        "cosine -0.707 ± 0.000, ratio of norms 1.414 ± 0.000, "
        "detection losses of two batches: cosine 1.000 ± 0.000, "
        "expected gradients: cosine -0.71 ± 0.00"
    )
    with pytest.raises(ValueError, match="In iteration 5 the distance does not train the student"):
        gradient_agreement(Fixed(), [None], count=1, iteration=5)


def test_detection_losses_of_every_two_batches_are_compared():
    # Below the pyramid: (2, 0), (1, 1), (1, 1).
    found = gradient_agreement(Fixed(), [None, [0.0, 1.0], [0.0, 1.0]], count=3, iteration=4)
    assert found["bottom_up"].two_batches.tolist() == pytest.approx([2**-0.5, 2**-0.5, 1.0])
    alone = gradient_agreement(Fixed(), [None], count=1, iteration=4)["pyramid"]
    assert not len(alone.two_batches) and "two batches" not in alone.summary()
    assert "expected gradients: hidden by the noise of so few batches" in alone.summary()


def of(detection, distillation):
    d, s = torch.tensor(detection).double(), torch.tensor(distillation).double()
    return Agreement(d @ d.T, s @ s.T, d @ s.T)


def test_the_cosine_of_expected_gradients_is_without_the_noise_of_a_batch():
    # Detection (4, 0) and (0, 4), whose mean is (2, 2); its squared length by products of
    # different batches is 0: two batches that say nothing of each other tell of no direction.
    assert math.isnan(of([[4.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]).expected[0])
    # Sums over the six ordered pairs of different batches: detection 2 (3 + 3 + 9), distillation 6,
    # between 2 + 6 + 6.
    cosine, error = of([[1.0, 0.0], [3.0, 0.0], [3.0, 5.0]], [[1.0, 0.0]] * 3).expected
    assert cosine == pytest.approx(14 / (30 * 6) ** 0.5)
    # The same of two batches, without the first, the second, the third.
    left_out = [6 / (18 * 2) ** 0.5, 4 / (6 * 2) ** 0.5, 4 / (6 * 2) ** 0.5]
    mean = sum(left_out) / 3
    assert error == pytest.approx((2 / 3 * sum((x - mean) ** 2 for x in left_out)) ** 0.5)


def test_noise_hides_a_common_direction_in_a_batch_but_not_over_many():
    generator = torch.Generator().manual_seed(0)
    direction = torch.zeros(1000)
    direction[0] = 1.0
    noisy = [direction + torch.randn(40, 1000, generator=generator) / 5 for _ in range(2)]
    agreement = of(noisy[0].tolist(), noisy[1].tolist())
    assert agreement.cosine.mean() < 0.1 and agreement.two_batches.mean() < 0.1
    cosine, error = agreement.expected
    assert abs(cosine - 1) < 3 * error < 0.5


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_of_a_detector_they_are_those_that_its_training_adds(detector):
    model = build(tiny_config(detector=detector))
    weights = {k: v.clone() for k, v in model.student.state_dict().items() if "running" not in k}
    batch = training_batch(detector=detector)
    torch.manual_seed(1)
    found = gradient_agreement(model, [batch], count=1, iteration=0)
    after = model.student.state_dict()
    assert all(torch.equal(after[k], v) for k, v in weights.items() if "num_batches" not in k)
    assert all(p.grad is None for p in model.parameters())

    torch.manual_seed(1)
    model.train()
    vars(model.student).pop("loss_normalizer", None)  # RetinaNet's, which every pass moves
    with EventStorage(0):
        losses = model(batch)
    own = sum(x for n, x in losses.items() if not n.startswith(("teacher", "loss_distill")))
    assert set(found) == {"bottom_up", "pyramid"}
    for name, agreement in found.items():
        backbone = model.student.backbone.named_parameters()
        part = [p for n, p in backbone if n.startswith("bottom_up.") == (name == "bottom_up")]
        detection, distilled = (
            torch.cat([
                torch.zeros(p.numel()).double() if g is None else g.flatten().double()
                for p, g in zip(
                    part,
                    torch.autograd.grad(loss, part, retain_graph=True, allow_unused=True),
                    strict=True,
                )
            ])
            for loss in (own, losses["loss_distill"])
        )  # fmt: skip
        cosine = torch.nn.functional.cosine_similarity(detection, distilled, dim=0)
        assert agreement.cosine.item() == pytest.approx(cosine.item(), abs=1e-4)
        ratio = distilled.norm() / detection.norm()
        assert agreement.ratio.item() == pytest.approx(ratio.item(), rel=1e-3) and ratio > 0


def test_a_share_controller_stays_as_it_is():
    model = build(
        tiny_config(
            "MODEL.SSSD.COEFFICIENT.SCHEDULE",
            "share",
            "MODEL.SSSD.COEFFICIENT.VALUES",
            [0.0, 100.0],
        )
    )
    model.training_parts["coefficient"].averages.copy_(torch.tensor([2.0, 0.1]))
    gradient_agreement(model, [training_batch()] * 2, count=2, iteration=0)
    assert model.training_parts["coefficient"].averages.tolist() == pytest.approx([2.0, 0.1])


def test_without_batches_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match="0 batches have no gradients"):
        gradient_agreement(Fixed(), [None], count=0, iteration=0)
