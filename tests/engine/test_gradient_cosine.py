"""Cosine and ratio of the gradients of detection losses and distillation."""

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
    found = gradient_agreement(Fixed(), [None, None, None], count=2, iteration=4)
    # below the pyramid: (2, 0) and (0, 4); above: (3, 0) and (-3, -3)
    assert found["bottom_up"] == Agreement([0.0, 0.0], [2.0, 2.0], [1.0])
    assert found["pyramid"].cosine == pytest.approx([-(2**-0.5)] * 2)
    assert found["pyramid"].ratio == pytest.approx([2**0.5] * 2)
    assert found["bottom_up"].summary() == (
        "cosine 0.000 ± 0.000, ratio of norms 2.000 ± 0.000, "
        "detection losses of two batches: cosine 1.000"
    )
    with pytest.raises(ValueError, match="In iteration 5 the distance does not train the student"):
        gradient_agreement(Fixed(), [None], count=1, iteration=5)


def test_detection_losses_are_compared_with_those_of_the_batch_before():
    # Below the pyramid: (2, 0), (1, 1), (1, 1).
    found = gradient_agreement(Fixed(), [None, [0.0, 1.0], [0.0, 1.0]], count=3, iteration=4)
    assert found["bottom_up"].next_batch == pytest.approx([2**-0.5, 1.0])
    alone = gradient_agreement(Fixed(), [None], count=1, iteration=4)["pyramid"]
    assert alone.next_batch == [] and "two batches" not in alone.summary()


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
    with EventStorage(0):
        losses = model(batch)
    name, parameter = next(iter(model.student.backbone.bottom_up.named_parameters()))
    (distilled,) = torch.autograd.grad(losses["loss_distill"], parameter, retain_graph=True)
    assert distilled.norm() > 0, name
    assert set(found) == {"bottom_up", "pyramid"}
    for agreement in found.values():
        assert -1 <= agreement.cosine[0] <= 1 and agreement.ratio[0] > 0
