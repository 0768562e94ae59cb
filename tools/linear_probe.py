#!/usr/bin/env python
"""Accuracy of a linear classifier on the frozen features of trained classifiers (transfer).

    tools/linear_probe.py output/ce_cifar10_small/model_final.pth output/tsd/model_final.pth \\
        --train digits_trainval --test digits_test

Logistic regression learns the classes of another dataset from each network's embedding. Its
regularisation is chosen on a part of --train; --test decides nothing. Each architecture is also
probed with random weights, which is what any training must beat.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse

from sssd.engine import user_errors
from sssd.engine.trained_network import TrainedNetwork, load_trained_network, titles_of
from sssd.evaluation.embeddings import embed_dataset
from sssd.evaluation.linear_probe import linear_probe


def row(title: str, trained: TrainedNetwork, train: str, test: str) -> str:
    """A line of the table."""
    parts = (embed_dataset(trained.network, trained.cfg, name) for name in (train, test))
    probe = linear_probe(*parts)
    return f"| {title} | {probe.accuracy:.2f} | {probe.val_accuracy:.2f} | {probe.strength:g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help=".pth files written by training")
    parser.add_argument("--titles", nargs="+", default=[], help="default: names of the folders")
    parser.add_argument("--train", required=True, help="registered dataset to learn from")
    parser.add_argument("--test", required=True, help="registered dataset to test on")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (0)")
    args = parser.parse_args()
    with user_errors():
        if args.train == args.test:
            raise ValueError(
                f"--train and --test are both {args.train}: name the two parts of the dataset."
            )
        titles = titles_of(args.checkpoints, args.titles)
        print("| network | top-1 % | validation % | C |\n|---|---|---|---|")
        untrained = {}
        for title, checkpoint in zip(titles, args.checkpoints, strict=True):
            trained = load_trained_network(checkpoint)
            print(row(title, trained, args.train, args.test), flush=True)
            network = load_trained_network(checkpoint, random_seed=args.seed)
            keys = trained.cfg.MODEL.SSSD.CLASSIFIER
            # Networks of one architecture that see images alike have one row.
            same = (
                f"{network.network} {keys.SIZE} {keys.AUGMENTATION} {trained.cfg.MODEL.PIXEL_STD}"
            )
            untrained.setdefault(same, (keys.NETWORK, network))
        for name, network in untrained.values():
            print(row(f"{name}, random weights", network, args.train, args.test), flush=True)


if __name__ == "__main__":
    main()
