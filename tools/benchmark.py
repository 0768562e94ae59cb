#!/usr/bin/env python
"""Compares step time and memory of trainings, interleaved in one run; the first is the reference.

    tools/benchmark.py --config-file configs/Classification/{ce,kd,dml}_cifar_resnet8_digits.yaml
    tools/benchmark.py --config-file A.yaml B.yaml --steps 2 --json out.json SOLVER.IMS_PER_BATCH 4

Each config trains in a process of its own; they take turns of a few steps, A B C A B C ..., and the
others sleep. Of a classification in several stages it is the last one, or --stage. Threads are
torch's default, or OMP_NUM_THREADS. The table (Markdown) goes to standard output, progress to
standard error.
"""

import sssd  # (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
import importlib
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from sssd.engine import user_errors
from sssd.engine.benchmark import BenchmarkError, measure, plan_jobs

WARMUP = 3  # steps

MEMORY = {
    "cpu": "peak resident set of the process (Linux: VmHWM) above its resident set before the "
    "first step, when libraries, data, student and teacher were there: activations, gradients, the "
    "optimizer's state, and what the allocator keeps",
    "cuda": "peak of what torch has allocated on the GPU, weights included",
}


def main(args: argparse.Namespace) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    jobs = plan_jobs(args.config_file, args.opts, device=device, stage=args.stage)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.open("a").close()  # before the measurement, not after it
    load = os.getloadavg()[0]
    configs = measure(
        jobs,
        rounds=args.rounds,
        steps=args.steps,
        warmup=WARMUP,
        progress=lambda text: print(f"benchmark: {text}", file=sys.stderr, flush=True),
    )
    report = {
        "command": command_line(),
        "versions": versions(),
        "device": configs[0]["device"] if device != "cpu" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": configs[0]["threads"],
        "load_before": load,
        "rounds": args.rounds,
        "steps": args.steps,
        "warmup": WARMUP,
        "memory_is": MEMORY[torch.device(device).type],
        "configs": configs,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report) + "\n")
    print(table(configs))
    print(f"\n{notes(report)}")


def table(configs: list[dict[str, Any]]) -> str:
    """A Markdown table with aligned columns, a row for each config."""
    rows = [
        ["config", "step, ms", "time ratio", "quartiles", "images/s", "data, ms", "memory, MiB",
         "memory ratio", "student, parameters", "training only"]
    ]  # fmt: skip
    for config in configs:
        ratio, above = config["ratio"], config["memory"]["above"]
        speed = config["images_per_second"]
        rows.append(
            [
                config["name"],
                f"{config['step_seconds'] * 1e3:.1f}",
                f"{ratio['median']:.2f}",
                f"{ratio['q1']:.2f} to {ratio['q3']:.2f}",
                f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}",
                f"{config['data_seconds'] * 1e3:.1f}",
                "-" if above is None else f"{above / 2**20:.0f}",
                "-" if config["memory_ratio"] is None else f"{config['memory_ratio']:.2f}",
                f"{config['student_parameters']:,}",
                f"{config['training_only_parameters']:,}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def notes(report: dict[str, Any]) -> str:
    """What the columns are, and where they were measured."""
    return (
        f"Interleaved in one run: {report['rounds']} rounds of {report['steps']} steps of each, "
        f"after {report['warmup']} for warming up. Step: median of all. Time ratio: to the "
        "first row, median and quartiles over the rounds of the ratio in the same round. Data: "
        f"loading a batch, no part of the step. Memory: {report['memory_is']}. Training only: "
        "parameters that the trained model does not have, a frozen teacher's among them.\n\n"
        f"{report['device']}, cores: {report['cores']}, threads of each process: "
        f"{report['threads']}, load before the start: {report['load_before']:.1f}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + f".\n\n```sh\n{report['command']}\n```"
    )


def command_line() -> str:
    """How this program was called, with the number of threads if the environment sets it."""
    threads = os.environ.get("OMP_NUM_THREADS")
    called = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    return f"OMP_NUM_THREADS={threads} {called}" if threads else called


def versions() -> dict[str, str]:
    """Of Python and of the packages that a step runs through."""
    found = {"sssd": sssd.__version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "detectron2", "timm"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError:
            continue
    return found


def cpu_name() -> str:
    """Model of the processor, where Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", nargs="+", required=True, help="the first: the reference")
    parser.add_argument("--rounds", type=positive, default=15, help="turns of each (default 15)")
    parser.add_argument("--steps", type=positive, default=4, help="steps of a turn (default 4)")
    parser.add_argument("--stage", default="", help="stage to time, in the configs that have it")
    parser.add_argument("--device", default="", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ..., for all configs")
    args = parser.parse_args(arguments)
    # Overrides may follow the files directly, and argparse takes them for more of these.
    files = args.config_file
    count = next((i for i, x in enumerate(files) if i and not x.endswith((".yaml", ".yml"))), None)
    if count is not None:
        args.config_file, args.opts = files[:count], files[count:] + args.opts
    return args


if __name__ == "__main__":
    with user_errors():
        try:
            main(parse())
        except BenchmarkError as error:
            sys.exit(f"error: {error}")
