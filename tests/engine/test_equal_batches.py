"""Two processes with half of a batch each train as one process with all of it.

The trainer with its own loader runs five iterations, through every phase: without distillation and
with the backbone frozen (0), with distillation (1 to 3), without (4). Teacher and adapter learn in
all of them.

A mean over processes is the mean over the batch only where both halves have the same part in it,
and Detectron2 takes its means over what a process has. So these are pinned:

- All images have one size. (Which ones come, and which are flipped, is the same anyway.)
- BatchNorm is frozen, with the statistics of a few images: those of random weights explode.
- RPN and RoI heads take every anchor and every proposal, none is suppressed, and objects are none:
  so both halves have as many, while their numbers of objects differ.
- RetinaNet and FCOS divide by a running average of the number of positive anchors, each process by
  its own: it is ten an image instead.
- The distance is a mean of roots (DISTANCE.REDUCTION "per_distribution"). The default is the root
  of a mean, and the mean of two such roots is another number.
- Gradients are not clipped, which would hide a factor in them.
- Weights and maps are in double precision. In float32 another order of sums is enough for a ReLU to
  change its side, and then a gradient jumps: weights that agree to 3e-8 for three iterations
  can differ by 1e-5 after the next.
"""

import sssd  # noqa: F401  (spawned processes import this first: the compatibility layer)

# isort: split
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import proposal_utils
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sssd.engine import Trainer, trainer
from tests.coco_files import register_coco
from tests.detectors import tiny_config, training_input
from tests.ranks import join, run_two_ranks

STEPS = 5
MORE_THAN_THERE_ARE = 10_000
# The controller of Faster R-CNN's run computes its coefficient in float32.
TOLERANCE = {"faster_rcnn": 1e-5, "retinanet": 1e-9, "fcos": 1e-9}
# Of each detector, beside what all have.
PINNED = {
    "faster_rcnn": (
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 4096,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN", MORE_THAN_THERE_ARE,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", MORE_THAN_THERE_ARE,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", MORE_THAN_THERE_ARE,
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False,
        "MODEL.SSSD.COEFFICIENT.SCHEDULE", "share",
        "MODEL.SSSD.COEFFICIENT.VALUES", [0.3, 1000.0],
    ),
    "retinanet": (),
    "fcos": (),
}  # fmt: skip


def configure(detector, folder, *opts):
    return tiny_config(
        "SOLVER.MAX_ITER", STEPS, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 4, "SEED", 3,
        "SOLVER.CLIP_GRADIENTS.ENABLED", False,
        "INPUT.MIN_SIZE_TRAIN", (64,), "DATASETS.TEST", (),
        "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "FrozenBN",
        "MODEL.SSSD.DISTANCE.REDUCTION", "per_distribution", "MODEL.SSSD.AVERAGING.DECAY", 0.9,
        "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 1, "MODEL.SSSD.PHASES.NO_DISTILL_ITERS", 1,
        "MODEL.SSSD.PHASES.DISTILL_OFF_ITERS", 1, "OUTPUT_DIR", str(folder), *PINNED[detector],
        *opts, detector=detector,
    )  # fmt: skip


def write_weights(detector, path):
    """A student with the statistics of BatchNorm of four images."""
    cfg = configure(detector, "", "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN")
    torch.manual_seed(5)
    student = build_model(cfg).student.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    images = student.preprocess_image([training_input(0, seed=i) for i in range(4)])
    with torch.no_grad():
        student.backbone(images.tensor)
    torch.save({"model": student.state_dict()}, path)


class PinnedTrainer(Trainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg).double()
        if hasattr(model.student, "_ema_update"):
            images = []
            model.student.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
            model.student._ema_update = lambda *_: 10.0 * images[-1]
        return model

    def train(self):
        # Nothing is suppressed. (Detectron2's takes float32 only, and boxes are in that.)
        everything = mock.patch.object(
            proposal_utils, "batched_nms", lambda boxes, scores, *_: scores.argsort(descending=True)
        )
        with everything:
            return super().train()


class Watcher(HookBase):
    def __init__(self):
        self.losses = []

    def before_train(self):
        model = self.trainer.checkpointer.model
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.losses.append({name: value for name, (value, _) in latest.items() if "loss" in name})

    def after_train(self):
        model = self.trainer.checkpointer.model
        self.end = {name: p.detach().clone() for name, p in model.named_parameters()}


def train(detector, folder, name):
    """Trains in this process, alone or as one of two; returns what there was to see."""
    data = folder / f"data of {name}"
    dataset = register_coco("equal_batches", data, num_images=8)
    weights, output = folder / "weights.pth", folder / name
    output.mkdir(exist_ok=True)
    torch.manual_seed(0)
    cfg = configure(detector, output, "DATASETS.TRAIN", (dataset,), "MODEL.WEIGHTS", str(weights))
    run, watcher = PinnedTrainer(cfg), Watcher()
    run.register_hooks([watcher])
    run.resume_or_load(resume=False)
    run.train()
    return {"losses": watcher.losses, "start": watcher.start, "end": watcher.end,
            "averaged": run.averaged.state_dict()}  # fmt: skip


def sum_of_gradients(model):
    """In place of ``distributed``: a mistake, to see that it would be found."""
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)

    def add(_, bucket):
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, add)
    return wrapped


def train_one_rank(rank, port, folder):
    join(rank, port)
    folder = Path(folder)
    found = {"mean": train(folder.name, folder, f"rank {rank}")}
    if folder.name == "retinanet":
        trainer.distributed = sum_of_gradients
        found["sum"] = train(folder.name, folder, f"rank {rank}, sum")
    torch.save(found, folder / f"{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(detector, marks=pytest.mark.long)
        for detector in ("retinanet", "faster_rcnn", "fcos")
    ],
)
def runs(request, tmp_path_factory):
    """One process with batches of four images, and two with two each."""
    folder = tmp_path_factory.mktemp("equal") / request.param
    folder.mkdir()
    write_weights(request.param, folder / "weights.pth")
    ranks = run_two_ranks(train_one_rank, folder)
    alone = train(request.param, folder, "alone")
    shutil.rmtree(folder)  # hundreds of megabytes
    return {"alone": alone, "ranks": ranks, "tolerance": TOLERANCE[request.param]}


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_student_teacher_and_adapter_become_the_same(runs):
    alone, (first, second) = runs["alone"], [rank["mean"] for rank in runs["ranks"]]
    for name in ("end", "averaged"):
        assert largest_difference(first[name], alone[name]) < runs["tolerance"]
        assert largest_difference(first[name], second[name]) == 0
    # By far less than they have moved, every part of them.
    for part in ("bottom_up", "student", "training_parts.teacher", "training_parts.distillation"):
        start, end = ({k: v for k, v in alone[name].items() if part in k}
                      for name in ("start", "end"))  # fmt: skip
        assert largest_difference(start, end) > 1e-3, part


def test_the_losses_are_the_mean_over_the_processes(runs):
    alone, ranks = runs["alone"]["losses"], runs["ranks"][0]["mean"]["losses"]
    assert len(alone) == len(ranks) == STEPS
    for ours, expected in zip(ranks, alone, strict=True):
        assert ours.keys() >= {"total_loss", "loss_distill", "loss_distill/coefficient"}
        assert ours == pytest.approx(expected, abs=1e-5)


def test_gradients_that_are_not_averaged_would_be_found(runs):
    if "sum" in runs["ranks"][0]:
        wrong = runs["ranks"][0]["sum"]["end"]
        assert largest_difference(wrong, runs["alone"]["end"]) > 1e-3
