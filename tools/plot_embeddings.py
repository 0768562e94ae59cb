#!/usr/bin/env python
"""Draws how one or more trained classifiers arrange the images of a dataset (t-SNE).

    tools/plot_embeddings.py output/ce/model_final.pth output/cs_kd/model_final.pth \\
        --titles "cross-entropy" "CS-KD" --dataset cifar10_small_val --output embeddings.png

Each checkpoint's config is taken from its folder. The number under each picture is the mean
distance between images of two classes over that between images of one, in the embedding itself.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse

from sssd.engine import user_errors
from sssd.engine.trained_network import load_trained_network, titles_of
from sssd.evaluation.embeddings import draw_embeddings, embed_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help=".pth files written by training")
    parser.add_argument("--titles", nargs="+", default=[], help="default: names of the folders")
    parser.add_argument("--dataset", required=True, help="registered name, digits_val for instance")
    parser.add_argument("--output", required=True, help="PNG file to write")
    parser.add_argument("--max-images", type=int, default=1000, help="drawn at most (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE (0)")
    args = parser.parse_args()
    with user_errors():
        embeddings = {}
        for title, checkpoint in zip(
            titles_of(args.checkpoints, args.titles), args.checkpoints, strict=True
        ):
            trained = load_trained_network(checkpoint)
            embeddings[title] = embed_dataset(
                trained.network, trained.cfg, args.dataset, max_images=args.max_images
            )
        draw_embeddings(embeddings, args.seed).savefig(args.output, dpi=110)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
