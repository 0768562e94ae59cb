"""The SelfDistiller under DistributedDataParallel: two CPU processes."""

import sssd  # noqa: F401  (spawned processes import this first: the compatibility layer)

# isort: split
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from sssd.engine import hold_frozen_parameters
from tests.detectors import DETECTORS, build, losses_at, tiny_config, training_input
from tests.ranks import join, run_two_ranks

STEPS = 4


def configure(**options):
    return tiny_config(
        "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 2, "MODEL.SSSD.PHASES.NO_DISTILL_ITERS", 1,
        "MODEL.SSSD.PHASES.DISTILL_OFF_ITERS", 1, "SOLVER.MAX_ITER", STEPS,
        "MODEL.SSSD.COEFFICIENT.SCHEDULE", "share", "MODEL.SSSD.COEFFICIENT.VALUES", [0.0, 100.0],
        **options,
    )  # fmt: skip


def train_one_rank(rank, port, folder, trains_heads):
    join(rank, port)
    cfg = configure()
    cfg.MODEL.SSSD.TEACHER.TRAINS_HEADS = trains_heads
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    hold_frozen_parameters(optimizer, model)
    # No find_unused_parameters: every parameter must take part by itself.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    torch.manual_seed(rank)
    history = []
    for iteration in range(STEPS):
        # Only the first process has objects in iteration 1; none has any in iteration 2.
        counts = [(3, 1), (2, 0), (0, 0), (1, 4)][iteration]
        batch = [training_input(counts[rank], seed=10 * iteration + rank)]
        with EventStorage(iteration):
            losses = wrapped(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        history.append({n: p.detach().clone() for n, p in model.named_parameters()})
    torch.save({"parameters": history, "coefficient": float(model.last_coefficient)},
               os.path.join(folder, f"{rank}.pth"))  # fmt: skip
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[True, False])
def ranks(tmp_path_factory, request):
    one_rank = partial(train_one_rank, trains_heads=request.param)
    return run_two_ranks(one_rank, tmp_path_factory.mktemp("ranks"))


def test_both_processes_hold_the_same_weights_through_every_phase(ranks):
    for iteration, (first, second) in enumerate(
        zip(ranks[0]["parameters"], ranks[1]["parameters"], strict=True)
    ):
        for name in first:
            assert torch.equal(first[name], second[name]), (iteration, name)


def test_the_backbone_trains_on_reduced_gradients_once_it_is_not_frozen(ranks):
    name = "student.backbone.bottom_up.res4.0.conv1.weight"
    history = [step[name] for step in ranks[0]["parameters"]]
    assert torch.equal(history[0], history[1])  # frozen in iterations 0 and 1
    assert not torch.equal(history[1], history[3])


def test_both_processes_use_the_same_controlled_coefficient(ranks):
    assert ranks[0]["coefficient"] == ranks[1]["coefficient"]


@pytest.mark.parametrize("detector", DETECTORS)
def test_no_parameter_of_any_detector_is_unused_in_any_phase(detector):
    # DistributedDataParallel gives up on a parameter that the graph of an iteration does not reach.
    model = build(configure(detector=detector))
    for iteration in range(STEPS):
        for counts in ((3, 1), (0, 2), (0, 0)):
            batch = [training_input(n, seed=n, detector=detector) for n in counts]
            losses, _ = losses_at(model, iteration, batch)
            model.zero_grad()
            sum(losses.values()).backward()
            unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert not unused, (iteration, counts)
