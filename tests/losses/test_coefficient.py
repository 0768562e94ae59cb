import math
import random
import subprocess
import sys
import textwrap

import pytest
import torch

from sssd.losses import ShareController, coefficient_schedule
from sssd.losses.coefficient import SCHEDULES
from tests.conftest import REPOSITORY


def share_of(coefficient, detection_loss, distance):
    return float(coefficient * distance / (detection_loss + coefficient * distance))


def feed(controller, detection_loss, distance):
    return controller(torch.tensor(detection_loss), torch.tensor(distance))


# ---- Schedules ----


def test_constant():
    schedule = coefficient_schedule("constant", values=[50])
    assert [schedule(t) for t in (0, 1, 120_000, 10**9)] == [50] * 4


def test_step_switches_at_the_milestone_itself():
    schedule = coefficient_schedule("step", values=[75, 100], milestones=[120_000])
    assert [schedule(t) for t in (0, 119_999, 120_000, 120_001, 180_000)] == [75, 75, 100, 100, 100]


def test_step_with_several_milestones_and_with_none():
    schedule = coefficient_schedule("step", values=[1, 2, 0], milestones=[10, 20])
    assert [schedule(t) for t in (0, 9, 10, 19, 20, 99)] == [1, 1, 2, 2, 0, 0]
    schedule = coefficient_schedule("step", values=[7])
    assert [schedule(t) for t in (0, 10**6)] == [7, 7]


def test_linear():
    # From 10 down to 2 over 400 iterations: -2 every 100.
    schedule = coefficient_schedule("linear", values=[10, 2], max_iter=400)
    assert [schedule(t) for t in (0, 100, 200, 300, 400, 401, 9999)] == [10, 8, 6, 4, 2, 2, 2]
    assert schedule(399) == pytest.approx(2.02)


def test_cosine():
    # 2 + 8 (1 + cos(pi t / 400)) / 2; at a quarter (1 + cos(45 degrees)) / 2 = 0.853553.
    schedule = coefficient_schedule("cosine", values=[10, 2], max_iter=400)
    expected = {0: 10, 100: 2 + 8 * 0.853553, 200: 6, 300: 2 + 8 * 0.146447, 400: 2, 9999: 2}
    for iteration, value in expected.items():
        assert schedule(iteration) == pytest.approx(value, abs=1e-5)
    upwards = coefficient_schedule("cosine", values=[2, 10], max_iter=400)
    for iteration in range(0, 500, 7):
        assert upwards(iteration) == pytest.approx(12 - schedule(iteration))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("constant", {"values": [3]}),
        ("step", {"values": [1, 2, 3], "milestones": [20, 60]}),
        ("linear", {"values": [1, 5], "max_iter": 80}),
        ("cosine", {"values": [1, 5], "max_iter": 80}),
    ],
)
def test_schedules_are_pure(name, options):
    schedule = coefficient_schedule(name, **options)
    iterations = list(range(100))
    in_order = {t: schedule(t) for t in iterations}
    random.Random(0).shuffle(iterations)
    assert {t: schedule(t) for t in iterations} == in_order
    # What the caller does with its lists afterwards changes nothing.
    for value in options.values():
        if isinstance(value, list):
            value[:] = [99] * len(value)
    assert {t: schedule(t) for t in iterations} == in_order


def test_schedule_errors_name_the_value():
    def raises(match, name, **options):
        with pytest.raises(ValueError, match=match):
            coefficient_schedule(name, **options)

    raises("Unknown .* schedule 'exponential'; use one of constant", "exponential", values=[1])
    raises(r"'constant' .* needs 1 value\(s\).*got 2: \[1, 2\]", "constant", values=[1, 2])
    raises(r"'constant' .* got 0: \[\]", "constant", values=[])
    raises(
        r"'step' .* needs 2 value\(s\) \(one more than the milestones \[120000\]\), got 1: \[75\]",
        "step",
        values=[75],
        milestones=[120_000],
    )
    raises(r"must ascend, got \[20, 10\]", "step", values=[1, 2, 3], milestones=[20, 10])
    raises(r"must ascend, got \[20, 20\]", "step", values=[1, 2, 3], milestones=[20, 20])
    raises(r"'linear' .* needs 2 value\(s\).*got 1: \[5\]", "linear", values=[5], max_iter=10)
    raises(r"'cosine' .* got 3: \[1, 2, 3\]", "cosine", values=[1, 2, 3], max_iter=10)
    raises("needs max_iter >= 1, got 0", "linear", values=[1, 2])
    raises(r"finite and >= 0, got -1", "constant", values=[-1])
    raises(r"finite and >= 0, got nan", "linear", values=[1, math.nan], max_iter=10)
    raises(r"finite and >= 0, got inf", "step", values=[math.inf])
    # It is a schedule by name, but one that follows the losses.
    assert "share" in SCHEDULES
    raises("make a ShareController", "share", values=[0, 1])


# ---- The share controller ----


@pytest.mark.parametrize("share", [0.1, 0.45, 0.9])
def test_constant_losses_have_the_target_share_at_once(share):
    # c = s / (1 - s) * L / D; for a share of 0.45 with L = 1.2 and D = 0.03: 9/11 * 40 = 32.73.
    controller = ShareController(share=share)
    for _ in range(5):
        coefficient = feed(controller, 1.2, 0.03)
        assert coefficient.shape == ()
        assert coefficient.item() == pytest.approx(share / (1 - share) * 1.2 / 0.03, rel=1e-5)
        assert share_of(coefficient, 1.2, 0.03) == pytest.approx(share, abs=1e-5)


def test_coefficient_is_of_the_running_averages():
    # Momentum 1/2, L = 2 then 4, D = 1 always, from 0: 2/4 + 4/2 = 2.5 to 1/4 + 1/2 = 0.75.
    controller = ShareController(share=0.5, momentum=0.5)
    assert feed(controller, 2.0, 1.0).item() == pytest.approx(2)
    assert feed(controller, 4.0, 1.0).item() == pytest.approx(10 / 3)


def test_it_follows_a_change_of_the_losses():
    controller = ShareController(share=0.45, momentum=0.9)
    for _ in range(50):
        feed(controller, 2.0, 0.05)
    first = share_of(feed(controller, 0.8, 0.2), 0.8, 0.2)
    assert first > 0.6  # one odd batch moves the coefficient little
    for _ in range(150):
        coefficient = feed(controller, 0.8, 0.2)
    assert share_of(coefficient, 0.8, 0.2) == pytest.approx(0.45, abs=1e-3)


def test_noisy_losses_have_the_target_share_on_average():
    controller = ShareController(share=0.45)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(500):
        loss, distance = (0.5 + torch.rand(2, generator=generator)) * torch.tensor([1.5, 0.03])
        shares.append(share_of(controller(loss, distance), loss, distance))
    assert sum(shares[100:]) / 400 == pytest.approx(0.45, abs=0.02)


def test_bounds():
    controller = ShareController(share=0.5, min_coefficient=2.0, max_coefficient=10.0)
    assert feed(controller, 1.0, 1e-9).item() == 10
    controller = ShareController(share=0.5, min_coefficient=2.0, max_coefficient=10.0)
    assert feed(controller, 1.0, 1e9).item() == 2
    controller = ShareController(share=0.5)
    assert feed(controller, 1.0, 0.0).item() == 1000  # no distance at all


@pytest.mark.parametrize("bad", [(math.nan, 0.1), (1.0, math.inf), (-math.inf, math.nan)])
def test_a_non_finite_batch_is_left_out(bad):
    controller, other = ShareController(share=0.45), ShareController(share=0.45)
    # Also when it is the very first.
    assert feed(controller, *bad).isfinite()
    for losses in [(1.0, 0.1), (2.0, 0.3)]:
        feed(controller, *losses)
        feed(other, *losses)
    held = feed(controller, *bad)
    assert held.isfinite()
    for name, value in other.state_dict().items():
        assert torch.equal(controller.state_dict()[name], value)
    assert torch.equal(feed(controller, 1.5, 0.2), feed(other, 1.5, 0.2))


def test_state_continues_bit_identically():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(40, 2, generator=generator) + 0.1
    straight = ShareController(share=0.45)
    expected = [straight(*pair) for pair in losses]

    first = ShareController(share=0.45)
    for pair in losses[:17]:
        first(*pair)
    state = {name: x.clone() for name, x in first.state_dict().items()}
    assert sum(x.numel() for x in state.values()) == 2
    resumed = ShareController(share=0.45)
    resumed.load_state_dict(state)
    for pair, value in zip(losses[17:], expected[17:], strict=True):
        assert torch.equal(resumed(*pair), value)


def test_coefficient_carries_no_gradient():
    controller = ShareController(share=0.45)
    loss = torch.tensor(1.0, requires_grad=True)
    distance = torch.tensor(0.1, requires_grad=True)
    coefficient = controller(loss * 2, distance * 3)
    assert not coefficient.requires_grad
    # c = 9/11 * 2 / 0.3; the gradient of 3 c D is that of a constant c.
    (grad,) = torch.autograd.grad(coefficient * distance * 3, distance)
    assert grad.item() == pytest.approx(3 * 9 / 11 * 2 / 0.3, rel=1e-5)
    assert not any(x.requires_grad for x in controller.buffers())


def test_half_precision_losses_are_averaged_in_single_precision():
    controller = ShareController(share=0.5)
    coefficient = controller(torch.tensor(3.0).half(), torch.tensor(0.5).half())
    assert coefficient.dtype == torch.float32
    assert coefficient.item() == pytest.approx(6, rel=1e-6)


def test_no_value_is_read_back_from_the_device():
    controller = ShareController(share=0.45).to("meta")
    loss = torch.zeros((), device="meta")
    assert controller(loss, loss).device.type == "meta"


def test_controller_errors_name_the_value():
    for share in (0.0, 1.0, 45.0):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {share}"):
            ShareController(share=share)
    with pytest.raises(ValueError, match=r"momentum must be .*, got 1\.0"):
        ShareController(share=0.5, momentum=1.0)
    with pytest.raises(ValueError, match="ascend, got 5 to 2"):
        ShareController(share=0.5, min_coefficient=5, max_coefficient=2)
    with pytest.raises(ValueError, match="got -1 to 2"):
        ShareController(share=0.5, min_coefficient=-1, max_coefficient=2)


# The second process sees a non-finite loss in the third iteration, and both leave it out.
PROCESS = """
    import sys
    sys.modules["detectron2"] = None  # the loss core needs torch alone
    import torch
    from sssd.losses import ShareController

    rank, file = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group(
        "gloo", init_method="file://" + file, rank=rank, world_size=2
    )
    controller = ShareController(share=0.45)
    losses = [[(1.0, 0.1), (2.0, 0.1), (3.0, 0.1), (1.0, 0.4)],
              [(3.0, 0.3), (4.0, 0.2), (float("nan"), 0.1), (2.0, 0.2)]][rank]
    print([controller(torch.tensor(l), torch.tensor(d)).item() for l, d in losses])
    torch.distributed.destroy_process_group()
"""


def test_two_processes_hold_the_same_coefficient(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,  # from where it imports sssd
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    # Which is the coefficient of the losses averaged over both.
    alone = ShareController(share=0.45)
    means = [(2.0, 0.2), (3.0, 0.15), (math.nan, 0.1), (1.5, 0.3)]
    expected = [feed(alone, *pair).item() for pair in means]
    values = [float(x) for x in outputs[0][0].strip("[]\n").split(",")]
    assert values == pytest.approx(expected, rel=1e-6)
