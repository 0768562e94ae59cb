"""A training loop written by hand, around a detector that is built already.

own_loop.py CONFIG_FILE ANNOTATIONS IMAGES OUTPUT_DIR [KEY VALUE ...]
"""

import os
import sys

import sssd

# isort: split
import torch
from detectron2.config import get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from sssd.engine import Checkpointer, hold_frozen_parameters, optimizer_params
from sssd.losses import coefficient_schedule


def main(config_file, annotations, images, output_dir, *opts):
    register_coco_instances("loop_train", {}, annotations, images)
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    cfg.DATASETS.TRAIN = ("loop_train",)
    cfg.merge_from_list(list(opts))
    max_iter = cfg.SOLVER.MAX_ITER

    detector = build_model(cfg)
    model = sssd.distill(
        detector,
        coefficient=coefficient_schedule("cosine", values=[75.0, 100.0], max_iter=max_iter),
        phases=sssd.Phases(max_iter=max_iter, no_distill_iters=1, freeze_backbone_iters=1),
    ).to(cfg.MODEL.DEVICE)
    groups = optimizer_params(model, base_lr=0.001, weight_decay_norm=0.0)
    optimizer = torch.optim.SGD(groups, lr=0.001, momentum=0.9, weight_decay=1e-4)
    # Keeps weight decay and momentum from moving the backbone while it is frozen.
    hold_frozen_parameters(optimizer, model)
    # The checkpoint's "model" is the detector; the teacher lies beside it under "sssd".
    os.makedirs(output_dir, exist_ok=True)
    checkpointer = Checkpointer(model, output_dir, optimizer=optimizer)

    model.train()
    # The iteration is that of Detectron2's event storage; the phases are functions of it.
    with EventStorage(start_iter=0) as storage:
        for inputs, _ in zip(build_detection_train_loader(cfg), range(max_iter), strict=False):
            losses = model(inputs)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            print(storage.iter, {name: round(loss.item(), 3) for name, loss in losses.items()})
            storage.step()
    checkpointer.save("model_final", iteration=max_iter - 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
