"""What the pictures of pyramids show is what the training compares."""

import pytest
import torch

from sssd.losses import PyramidDistillation, js_distance
from sssd.losses.pyramid import pyramid_distance
from sssd.visualization import view_pyramids
from tests.detectors import build, tiny_config, training_input


def maps(seed, channels=8):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"p3": (6, 8), "p4": (3, 4)}
    return {k: torch.randn(2, channels, *s, generator=generator) for k, s in sizes.items()}


def test_the_distance_over_channels_is_the_mean_of_what_is_shown():
    student, teacher = maps(0), maps(1)
    term = PyramidDistillation(channels=8, reduction="per_distribution")
    shown = term.position_distances(student, teacher)
    means = [x.mean() for x in shown.values()]
    assert {k: tuple(x.shape) for k, x in shown.items()} == {"p3": (2, 6, 8), "p4": (2, 3, 4)}
    assert float(sum(means) / 2) == pytest.approx(term(student, teacher).item(), rel=1e-5)


def test_it_is_the_jensen_shannon_distance_of_normalised_maps():
    student, teacher = maps(0), maps(1)
    term = PyramidDistillation(channels=8)
    with torch.no_grad():
        adapted = {k: term.adapter(x) for k, x in student.items()}

    def normalised(x):
        mean, std = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        return (x - mean) / (std + 1e-5).sqrt()

    expected = js_distance(
        normalised(adapted["p3"]), normalised(teacher["p3"]), dim=1, log_base=2.0
    )
    shown = term.position_distances(student, teacher)["p3"]
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)
    same = {k: normalised(x) for k, x in adapted.items()}
    zero = PyramidDistillation(channels=8)
    zero.adapter = torch.nn.Identity()
    assert zero.position_distances(same, same)["p3"].max() < 1e-5
    assert pyramid_distance(same, same) < 1e-5


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_padding_is_cut_off_and_detections_are_those_of_the_model(detector):
    model = build(tiny_config(detector=detector)).eval()
    inputs = training_input(2, height=80, width=96, detector=detector)
    view = view_pyramids(model, inputs)
    for name, cells in {"p2": (20, 24), "p3": (10, 12), "p4": (5, 6)}.items():
        if name in view.levels:  # RetinaNet begins with p3; the batch is padded to 96 x 96
            level = view.levels[name]
            assert level.student.shape == level.teacher.shape == level.distance.shape == cells
    for level in view.levels.values():
        assert level.distance.min() >= 0 and level.distance.max() <= 1
    with torch.no_grad():
        (alone,) = model([inputs])
    torch.testing.assert_close(view.student.pred_boxes.tensor, alone["instances"].pred_boxes.tensor)
    (taught,) = model.detect_from_teacher([inputs])
    torch.testing.assert_close(view.teacher.scores, taught["instances"].scores)
    assert view.truth is inputs["instances"]
    with pytest.raises(RuntimeError, match="needs evaluation mode"):
        view_pyramids(model.train(), inputs)


def test_the_strength_of_a_map_is_its_root_mean_square_over_channels():
    model = build(tiny_config()).eval()
    for p in model.student.backbone.parameters():
        torch.nn.init.zeros_(p)
    # Lateral and output biases alone are left: every cell of a map has them.
    output = model.student.backbone.fpn_output3
    norm = getattr(output, "norm", None)
    bias = norm.bias if norm is not None else output.bias
    with torch.no_grad():
        bias.copy_(torch.arange(len(bias), dtype=torch.float32))
    view = view_pyramids(model, training_input(2))
    expected = torch.arange(len(bias), dtype=torch.float32).square().mean().sqrt()
    assert view.levels["p3"].student == pytest.approx(float(expected), rel=1e-5)
