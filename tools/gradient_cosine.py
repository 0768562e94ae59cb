#!/usr/bin/env python
"""Whether distillation pulls the student where its detection losses pull it, or elsewhere.

    tools/gradient_cosine.py --config-file configs/BCCD/faster_rcnn_R_18_FPN_sssd.yaml \\
        MODEL.WEIGHTS output/bccd/R_18_sssd/model_final.pth

Takes --batches batches of the training, and prints, for the backbone and for the pyramid, the
cosine between the gradients of the two and the ratio of their norms, with the coefficient of
--iteration (the last one that distils); for comparison, the cosine between the detection losses of
two batches; and that of the two expected gradients, which is without the noise of batches. All
gradients are kept in the host's memory: for each batch, eight bytes for each parameter of the
backbone.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse

from detectron2.utils.env import seed_all_rng

from sssd.engine import Trainer, load_config, user_errors
from sssd.engine.gradient_cosine import gradient_agreement


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "SelfDistiller":
        raise ValueError(
            f"{args.config_file} distills nothing (MODEL.META_ARCHITECTURE is "
            f"{cfg.MODEL.META_ARCHITECTURE!r}): name the config of a self-distilled training."
        )
    cfg.MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH = True  # so that its teacher is loaded
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else 1)
    model = Trainer.load_for_evaluation(cfg)
    iteration = args.iteration
    if iteration is None:
        iteration = cfg.SOLVER.MAX_ITER - model.phases.distill_off_iters - 1
    batches = iter(Trainer.build_train_loader(cfg))
    found = gradient_agreement(model, batches, count=args.batches, iteration=iteration)
    for part, agreement in found.items():
        print(f"{part}: {agreement.summary()} ({args.batches} batches)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, help="of the training")
    parser.add_argument("--batches", type=int, default=20, help="of the training (20)")
    parser.add_argument("--iteration", type=int, help="whose coefficient counts (the last one)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="keys and values of the config")
    return parser.parse_args()


if __name__ == "__main__":
    with user_errors():
        main(parse())
