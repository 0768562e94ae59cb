#!/usr/bin/env python
"""Accuracy of every exit of a network trained by BYOT, beside what it costs to stop there.

    tools/early_exit.py --config-file configs/Classification/byot_cifar_resnet8_digits.yaml \\
        MODEL.WEIGHTS output/Classification/byot_digits/model_final.pth

A row for each head, for the network itself and for the ensemble of all: top-1 accuracy on
DATASETS.TEST, multiply-adds and parameters of one image, and their share of the network's own.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse

from detectron2.config import CfgNode
from torch import nn

from sssd.classification.early_exit import Cost, EveryExit, cost_of, early_exits
from sssd.classification.terms.byot import OwnTeacher
from sssd.engine import ClassificationTrainer, last_stage, load_config, user_errors

NETWORK = "classification"  # under which the evaluator reports the student


def costs(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Cost]:
    """Name of the result -> what it costs."""
    terms = model.training_parts["terms"][0].values()
    term = next((term for term in terms if isinstance(term, OwnTeacher)), None)
    if term is None:
        raise ValueError(
            "The config has no term 'own_teacher', so its network has no exits: name the config "
            "of a BYOT training."
        )
    exits = early_exits(model.student, term)
    modules = {**exits, NETWORK: model.student, "ensemble": EveryExit(model.student, exits)}
    return {name: cost_of(module, image_shape) for name, module in modules.items()}


def table(cfg: CfgNode) -> list[str]:
    """The lines of the table, for each dataset of DATASETS.TEST."""
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("There is nothing to evaluate: set MODEL.WEIGHTS to a checkpoint.")
    cfg = last_stage(cfg)
    model = ClassificationTrainer.load_for_evaluation(cfg)
    size = cfg.MODEL.SSSD.CLASSIFIER.SIZE
    cost = costs(model, (len(cfg.MODEL.PIXEL_MEAN), size, size))
    results = ClassificationTrainer.test(cfg, model)
    if len(cfg.DATASETS.TEST) == 1:
        results = {cfg.DATASETS.TEST[0]: results}
    whole = cost[NETWORK]
    lines = ["| exit | dataset | top-1 % | multiply-adds | share | parameters | share |"]
    lines.append("|---|---|---|---|---|---|---|")
    for dataset, accuracies in results.items():
        for name, of_one in cost.items():
            top1 = accuracies[name]["top1"]
            lines.append(
                f"| {'network' if name == NETWORK else name} | {dataset} | {top1:.2f} "
                f"| {of_one.multiply_adds:,} | {of_one.multiply_adds / whole.multiply_adds:.1%} "
                f"| {of_one.parameters:,} | {of_one.parameters / whole.parameters:.1%} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, help="of the training")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="keys and values of the config")
    args = parser.parse_args()
    with user_errors():
        print("\n".join(table(load_config(args.config_file, args.opts))))


if __name__ == "__main__":
    main()
