"""Neither the teacher nor the loss makes the host wait for the device."""

import pytest
import torch

from sssd.losses import PyramidDistillation, ShareController
from sssd.losses.distillation import DISTANCES
from sssd.meta_arch.logged_value import LoggedValue
from sssd.teacher import LabelEncodingTeacher, image_cells
from sssd.teacher.fusion import INTERACTIONS
from tests.teacher.scenes import NUM_CLASSES, STRIDES, pyramid, scene


def step(device, distance="js", **options):
    """What an iteration does beside the detector: teacher, distance, coefficient, gradients."""
    settings = {"num_classes": NUM_CLASSES, "strides": STRIDES, "num_heads": 4, **options}
    teacher = LabelEncodingTeacher(channels=16, **settings).to(device)
    distillation = PyramidDistillation(channels=16, distance=distance).to(device)
    controller = ShareController(share=0.45).to(device)
    features = {level: x.to(device).requires_grad_() for level, x in pyramid(2, height=64).items()}
    objects = scene(5, 2).to(device)

    def run():
        taught = teacher(features, objects)
        masks = {
            level: image_cells(objects.image_sizes, x.shape[-2:], STRIDES[level])
            for level, x in features.items()
        }
        value = distillation(features, taught, masks)
        detection = sum(x.sum() for x in taught.values())
        coefficient = controller(detection.detach(), value.detach())
        logged = LoggedValue(value), LoggedValue(coefficient)
        loss = detection + coefficient * value
        loss.backward()
        return loss, logged

    return run


OPTIONS = [
    *({"interaction": interaction} for interaction in INTERACTIONS),
    {"add_context_box": True},
    *({"distance": distance} for distance in DISTANCES),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_value_is_asked_for(options):
    # A meta tensor has a shape and no values, so that whatever asks for one fails.
    loss, _ = step("meta", **options)()
    assert loss.shape == ()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        float(torch.zeros((), device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_waits_for_the_gpu(options, request):
    run = step("cuda", **options)
    run()  # loading a kernel may wait
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    torch.cuda.set_sync_debug_mode("error")
    _, logged = run()
    torch.cuda.set_sync_debug_mode("default")
    assert all(float(x) > 0 for x in logged)


def test_a_logged_value_is_its_number():
    value = torch.tensor(2.5, requires_grad=True)
    assert float(LoggedValue(value)) == float(LoggedValue(value * 1)) == 2.5
    assert float(LoggedValue(3)) == 3.0
