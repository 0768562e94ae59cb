#!/usr/bin/env python
"""Compares step time and memory of trainings, interleaved in one run; the first is the reference.

    tools/benchmark.py --config-file configs/Classification/{ce,kd,dml}_cifar_resnet8_digits.yaml
    tools/benchmark.py --config-file A.yaml B.yaml --steps 2 --json out.json SOLVER.IMS_PER_BATCH 4
    tools/benchmark.py --config-file configs/{Plain,SSSD}/faster_rcnn_R_50_FPN_1x.yaml \\
        --image-size 256 --batch 2 --objects 10 --threads 2 --breakdown --chart steps.png \\
        --variant "no masks" MODEL.SSSD.DISTANCE.MASK_PADDING False

Each config trains in a process of its own; they take turns of a few steps, A B C A B C ..., and the
others sleep. Of a classification in several stages it is the last one, or --stage. Threads are
torch's default, or OMP_NUM_THREADS, or --threads. Detectors train on their dataset or, with
--image-size or --objects, on generated batches, for which nothing is read or downloaded. The tables
(Markdown) go to standard output, progress to standard error.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sssd.benchmark import report as report_of
from sssd.benchmark.chart import FORMATS, draw_chart
from sssd.benchmark.compare import measure, measure_inference
from sssd.benchmark.data import GeneratedData
from sssd.benchmark.environment import (
    circumstances,
    cpu_name,
    environment,
    positive,
    print_progress,
    reserve,
)
from sssd.benchmark.jobs import (
    BenchmarkError,
    Job,
    Setting,
    Variant,
    chosen_device,
    plan_jobs,
)
from sssd.engine import user_errors
from sssd.engine.training_step import PRECISIONS

WARMUP = 3  # steps


def main(args: argparse.Namespace) -> None:
    device = chosen_device(args.device)
    setting = setting_of(args)
    jobs = jobs_of(args, setting, device)
    for download in sorted({job.download for job in jobs} - {""}):
        print_progress(f"random weights instead of the download {download}")
    if args.chart is not None and args.chart.suffix not in FORMATS:
        raise BenchmarkError(
            f"--chart {args.chart} is no picture: let its name end in {', '.join(FORMATS)}."
        )
    reserve(args.json)
    reserve(args.chart)
    report: dict[str, Any] = environment("tools/benchmark.py")
    with tempfile.TemporaryDirectory(prefix="sssd_benchmark_") as folder:
        exports = [Path(folder, f"{i}.pth") for i in range(len(jobs))] if args.inference else []
        configs = measure(
            jobs,
            rounds=args.rounds,
            steps=args.steps,
            warmup=WARMUP,
            breakdown=args.breakdown,
            exports=exports,
            progress=print_progress,
        )
        inference = []
        if args.inference:
            inference = measure_inference(
                jobs,
                exports,
                rounds=args.rounds,
                passes=args.steps,
                warmup=WARMUP,
                progress=print_progress,
            )
    report |= {
        "load_after": os.getloadavg()[0],
        "device": configs[0]["device"] if device != "cpu" else cpu_name(),
        "threads": configs[0]["threads"],
        "rounds": args.rounds,
        "steps": args.steps,
        "warmup": WARMUP,
        "memory_is": report_of.MEMORY[torch.device(device).type],
        "data": described_data(setting, args.objects),
        "configs": configs,
        "inference": inference,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report) + "\n")
    if args.chart is not None:
        draw_chart(args.chart, configs, inference, chart_caption(report))
    texts = [report_of.step_table(configs), report_of.step_notes(report)]
    if args.breakdown:
        texts += [report_of.breakdown_table(configs)]
    if inference:
        texts += [report_of.inference_table(inference), report_of.INFERENCE_NOTES]
    print("\n\n".join([*texts, circumstances(report)]))


def jobs_of(args: argparse.Namespace, setting: Setting, device: str) -> list[Job]:
    """The rows: of each number of objects, all configs and variants."""
    variants = [Variant(name, tuple(opts)) for name, *opts in args.variant]
    settings = {"": setting}
    if args.objects is not None:
        settings = {
            f", {count} objects": replace(setting, data=replace(setting.data, objects=count))
            for count in args.objects
        }
    jobs = []
    for suffix, own_setting in settings.items():
        planned = plan_jobs(
            args.config_file,
            args.opts,
            variants=variants,
            device=device,
            stage=args.stage,
            setting=own_setting,
        )
        suffix = suffix if len(settings) > 1 else ""
        jobs += [replace(job, name=job.name + suffix) for job in planned]
    return jobs


def described_data(setting: Setting, objects: Sequence[int] | None) -> dict[str, Any] | None:
    if setting.data is None:
        return None
    described = asdict(setting.data)
    return {**described, "objects": " or ".join(map(str, objects or [described["objects"]]))}


def chart_caption(report: dict[str, Any]) -> str:
    batch = sorted({str(config["batch_size"]) for config in report["configs"]})
    parts = [report["device"], f"threads: {report['threads']}", f"batch: {' or '.join(batch)}"]
    if data := report["data"]:
        parts.append(f"{data['height']} x {data['width']}, {data['objects']} objects")
    return ", ".join([*parts, "whiskers: quartiles of the ratio"])


def setting_of(args: argparse.Namespace) -> Setting:
    data = None
    if args.image_size is not None or args.objects is not None:
        data = GeneratedData()
        if args.image_size is not None:
            data = replace(data, height=args.image_size[0], width=args.image_size[-1])
    return Setting(
        data=data,
        batch=args.batch,
        classes=args.classes,
        precision=args.precision,
        compiled=args.compile,
        threads=args.threads,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config-file", nargs="+", required=True, help="the first: the reference")
    add(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY VALUE"),
        help="one more row: the last config with these keys and values; can be given repeatedly",
    )
    add("--rounds", type=positive, default=15, help="turns of each (default 15)")
    add("--steps", type=positive, default=4, help="steps of a turn (default 4)")
    add("--stage", default="", help="stage to time, in the configs that have it")
    add("--device", default="", help="cpu or cuda; default: cuda if there is one")
    add("--threads", type=positive, help="of each process")
    add(
        "--image-size",
        type=positive,
        nargs="+",
        metavar=("HEIGHT", "WIDTH"),
        help="generated batches instead of the dataset: of this height and width, one number for "
        "both (default 256)",
    )
    add(
        "--objects",
        type=positive,
        nargs="+",
        help="generated batches: boxes of an image (default 10); of several numbers, each gives "
        "rows of its own",
    )
    add("--batch", type=positive, help="images of a step")
    add("--classes", type=positive, help="of the detectors")
    add("--precision", choices=PRECISIONS)
    add("--compile", action="store_true", help="torch.compile the convolutions of detectors")
    add("--inference", action="store_true", help="compare the exported students, too")
    add(
        "--breakdown",
        type=positive,
        nargs="?",
        const=3,
        default=0,
        metavar="STEPS",
        help="split the step into its parts, in a few steps of each at the end (default 3)",
    )
    add("--json", type=Path, help="file for all that was measured")
    add("--chart", type=Path, help="file for a picture of bars (.png, .svg or .pdf)")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE ..., for all configs")
    args = parser.parse_args(arguments)
    # Overrides may follow the files directly, and argparse takes them for more of these.
    files = args.config_file
    count = next((i for i, x in enumerate(files) if i and not x.endswith((".yaml", ".yml"))), None)
    if count is not None:
        args.config_file, args.opts = files[:count], files[count:] + args.opts
    if args.image_size is not None and len(args.image_size) > 2:
        parser.error("--image-size takes one number or two, height and width")
    return args


if __name__ == "__main__":
    with user_errors(BenchmarkError):
        main(parse())
