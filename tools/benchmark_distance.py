#!/usr/bin/env python
"""Compares distances between two maps, forward and backward, interleaved; MSE is the reference.

    tools/benchmark_distance.py --shape 2 256 64 64 --shape 2 256 32 32 --mask --json out.json
    tools/benchmark_distance.py --device cuda --dtype bfloat16 --shape 16 256 200 336

Time, bytes that autograd keeps for the backward pass, and bandwidth as a share of a copy's. The
tables (Markdown) go to standard output, progress to standard error.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
import json
import os
from pathlib import Path

import torch

from sssd.benchmark import report as report_of
from sssd.benchmark.distance import Case, measure_distances
from sssd.benchmark.distance_rows import plan_rows
from sssd.benchmark.environment import (
    circumstances,
    cpu_name,
    environment,
    positive,
    print_progress,
    reserve,
)
from sssd.benchmark.jobs import BenchmarkError, chosen_device
from sssd.engine import user_errors
from sssd.engine.training_step import PRECISIONS


def main(args: argparse.Namespace) -> None:
    device = chosen_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    reserve(args.json)
    report = environment("tools/benchmark_distance.py", ("torch", "triton", "liger_kernel"))
    dtype = PRECISIONS[args.dtype] or torch.float32
    results, notes = [], []
    for shape in args.shape or [(2, 256, 64, 64)]:
        rows, notes = plan_rows(device, dtype, compiles=not args.no_compile)
        case = Case(tuple(shape), device, dtype, args.mask)
        measured = measure_distances(
            case, rows, rounds=args.rounds, repeats=args.repeats, progress=print_progress
        )
        results.append({"shape": list(shape), **measured})
    is_cuda = device.startswith("cuda")
    report |= {
        "load_after": os.getloadavg()[0],
        "device": torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "mask": args.mask,
        "rounds": args.rounds,
        "repeats": args.repeats,
        "notes": notes,
        "results": results,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report) + "\n")
    texts = [report_of.distance_table(x, args.dtype) for x in results]
    texts += [report_of.distance_notes(report), circumstances(report)]
    print("\n\n".join(texts))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--shape",
        type=positive,
        nargs=4,
        action="append",
        metavar=("N", "C", "H", "W"),
        help="of the maps; can be given repeatedly (default 2 256 64 64)",
    )
    add("--dtype", choices=PRECISIONS, default="float32")
    add("--mask", action="store_true", help="some cells are padding")
    add("--device", default="", help="cpu or cuda; default: cuda if there is one")
    add("--threads", type=positive, help="of the CPU")
    add("--rounds", type=positive, default=15, help="turns of each (default 15)")
    add("--repeats", type=positive, default=5, help="calls of a turn (default 5)")
    add("--no-compile", action="store_true", help="leave out the compiled distance")
    add("--json", type=Path, help="file for all that was measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with user_errors(BenchmarkError):
        main(parse())
