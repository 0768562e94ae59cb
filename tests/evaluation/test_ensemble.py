"""The mean of several classifiers, against hand values."""

import pytest
import torch
from torch import nn

from sssd.evaluation.ensemble import NetworkEnsemble

INPUTS = [{"image_id": 0}, {"image_id": 1}]


class Fixed(nn.Module):
    """Answers with the same logits of two images, whatever it is asked."""

    def __init__(self, *probabilities):
        super().__init__()
        self.register_buffer("logits", torch.tensor(probabilities).log())

    def forward(self, batched_inputs):
        return [{"logits": {"student": x, "head1": -x}} for x in self.logits]


FIRST = Fixed([0.5, 0.5], [0.9, 0.1])
SECOND = Fixed([0.2, 0.8], [0.6, 0.4])
THIRD = Fixed([0.4, 0.6], [0.2, 0.8])


def probabilities(members, name, **options):
    outputs = NetworkEnsemble(members, **options)(INPUTS)
    return torch.stack([x["logits"][name] for x in outputs]).softmax(1)


def close(values, expected):
    return torch.allclose(values, torch.tensor(expected), atol=1e-6)


def test_the_ensemble_averages_probabilities_without_the_first_member_and_with_it():
    members = {"generation0": FIRST, "generation1": SECOND, "generation2": THIRD}
    assert close(probabilities(members, "student"), [[0.4, 0.6], [0.2, 0.8]])  # the last
    assert close(probabilities(members, "ensemble"), [[0.3, 0.7], [0.4, 0.6]])
    expected = [[1.1 / 3, 1.9 / 3], [1.7 / 3, 1.3 / 3]]
    assert close(probabilities(members, "ensemble_with_first"), expected)


def test_the_mean_of_logits_is_the_geometric_mean_of_probabilities():
    members = {"generation0": FIRST, "generation1": SECOND, "generation2": THIRD}
    values = probabilities(members, "ensemble", average="logits")
    a, b = (0.2 * 0.4) ** 0.5, (0.8 * 0.6) ** 0.5
    assert values[0, 0].item() == pytest.approx(a / (a + b), rel=1e-6)


def test_a_single_member_is_its_own_ensemble():
    for name in ("student", "ensemble", "ensemble_with_first"):
        assert close(probabilities({"generation0": FIRST}, name), [[0.5, 0.5], [0.9, 0.1]])


def test_an_unknown_average_is_refused():
    with pytest.raises(ValueError, match="Unknown average 'votes'"):
        NetworkEnsemble({"generation0": FIRST}, average="votes")(INPUTS)


def test_members_are_in_evaluation_mode():
    member = Fixed([0.5, 0.5], [0.5, 0.5]).train()
    NetworkEnsemble({"generation0": member})
    assert not member.training
