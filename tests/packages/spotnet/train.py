"""Trains SpotNet on squares and saves it: train.py OUTPUT_DIR."""

import sys

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import JSONWriter

from spotnet import add_spotnet_config


def squares(count, seed):
    """Bright and dark squares on grey."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(count):
        batch = []
        for _ in range(2):
            image = torch.full((3, 70, 90), 128, dtype=torch.uint8)
            x, y, size, kind = number(0, 60), number(0, 40), number(12, 30), number(0, 2)
            image[:, y : y + size, x : x + size] = 255 * kind
            instances = Instances((70, 90))
            instances.gt_boxes = Boxes(torch.tensor([[x, y, x + size, y + size]]).float())
            instances.gt_classes = torch.tensor([kind])
            batch.append({"image": image, "instances": instances})
        yield batch


def main(output_dir):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cfg = get_cfg()
    add_spotnet_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SpotNet"
    cfg.MODEL.BACKBONE.NAME = "LateralBackbone"
    cfg.SOLVER.BASE_LR = 0.01
    model = build_model(cfg)
    trainer = SimpleTrainer(model, squares(80, seed=1), build_optimizer(cfg, model))
    writer = hooks.PeriodicWriter([JSONWriter(f"{output_dir}/metrics.json")], period=10)
    trainer.register_hooks([writer])
    trainer.train(0, 80)
    DetectionCheckpointer(model, output_dir).save("model_final")


if __name__ == "__main__":
    main(sys.argv[1])
