#!/usr/bin/env python
"""The whole story in a few minutes: trains a plain and a self-distilled detector on generated
pictures for the same iterations, evaluates both, and leaves pictures and the student's weights in
``output/demo``.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from detectron2.data import MetadataCatalog

from sssd.engine import export_student, load_config, user_errors
from sssd.visualization import plot_runs, read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUT = Path("output") / "demo"
RUNS = {
    "plain": (REPOSITORY / "configs/Demo/faster_rcnn_R_18_FPN.yaml", OUTPUT / "plain"),
    "sssd": (REPOSITORY / "configs/Demo/faster_rcnn_R_18_FPN_sssd.yaml", OUTPUT),
}
HEARTBEAT_SECONDS = 5


class Heartbeat(threading.Thread):
    """Prints what is going on every few seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.started = time.monotonic()
        self.status: Callable[[], str] = lambda: "starting"

    def say(self, status: str | Callable[[], str]) -> None:
        """Sets what is going on: a text, or a function that looks."""
        self.status = status if callable(status) else lambda: status
        self._print()

    def run(self) -> None:
        while True:
            time.sleep(HEARTBEAT_SECONDS)
            self._print()

    def _print(self) -> None:
        print(f"demo: {time.monotonic() - self.started:4.0f} s | {self.status()}", flush=True)


def start(name: str) -> subprocess.Popen:
    """Starts one training in a process of its own; what it prints goes to a log."""
    config, output = RUNS[name]
    output.mkdir(parents=True, exist_ok=True)
    with open(OUTPUT / f"{name}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tools" / "train_net.py"), "--config-file",
             str(config), "OUTPUT_DIR", str(output)],
            stdout=log, stderr=subprocess.STDOUT,
            # Two trainings of one thread each make better use of two cores than one of two.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def progress(name: str, max_iter: int) -> str:
    """Where a training is, from the last lines of its log."""
    text = (OUTPUT / f"{name}.log").read_text(errors="replace")
    evaluating = text.rfind("Start inference")
    steps = list(re.finditer(r"iter: (\d+) .*?total_loss: (\S+)", text))
    if not steps:
        return f"{name} starts"
    if evaluating > steps[-1].start():
        return f"{name} {max_iter}/{max_iter}, evaluates"
    return f"{name} {int(steps[-1][1]) + 1}/{max_iter}, loss {float(steps[-1][2]):.2f}"


def train_both(heartbeat: Heartbeat) -> None:
    """Trains side by side; raises SystemExit when one fails."""
    max_iter = {
        name: load_config(str(config)).SOLVER.MAX_ITER for name, (config, _) in RUNS.items()
    }
    processes = {name: start(name) for name in RUNS}
    heartbeat.say(lambda: " | ".join(progress(name, max_iter[name]) for name in RUNS))
    try:
        # Both at a time: when one fails, the other is not waited for
        while any(p.poll() is None for p in processes.values()):
            if any(p.poll() for p in processes.values()):
                break
            time.sleep(0.5)
    finally:
        for process in processes.values():
            process.terminate()
    codes = {name: process.wait() for name, process in processes.items()}
    # A training that was ended because the other failed (a negative code) is not to blame
    for name in sorted(codes, key=lambda name: -codes[name]):
        if codes[name] != 0:
            log = OUTPUT / f"{name}.log"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            sys.exit(f"{tail}\ndemo: the {name} training failed; {log} has all of it")


def draw_pictures() -> None:
    """Detections of all, both pyramids and curves, as `tools/visualize.py` shows them."""
    (config, output), (plain_config, plain_output) = RUNS["sssd"], RUNS["plain"]
    command = [
        sys.executable, REPOSITORY / "tools" / "visualize.py", "report", "--config-file", config,
        "--weights", output / "model_final.pth", "--baseline-config", plain_config,
        "--baseline-weights", plain_output / "model_final.pth", "--runs", plain_output, output,
        # Detectors this young have low scores
        "--threshold", "0.3", "--title", "The demo", "--output", OUTPUT / "report",
    ]  # fmt: skip
    with open(OUTPUT / "report.log", "w") as log:
        code = subprocess.call(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)
    if code:
        sys.exit(f"demo: the report failed; {OUTPUT / 'report.log'} says why")
    shutil.copy(OUTPUT / "report/overview.png", OUTPUT / "detections.png")
    plot_runs(
        OUTPUT / "curves.png",
        {"": read_metrics(OUTPUT / "metrics.json")},
        panels=("losses", "share", "coefficient"),
    )


def final_results(output: Path) -> dict[str, float]:
    return next(x for x in reversed(read_metrics(output / "metrics.json")) if "bbox/AP" in x)


def main() -> None:
    # What Detectron2 warns of is in the logs of the trainings
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    shutil.rmtree(OUTPUT, ignore_errors=True)  # metrics would be appended to those of the last run
    OUTPUT.mkdir(parents=True)
    heartbeat = Heartbeat()
    heartbeat.start()
    heartbeat.say("making the pictures (once)")
    for config, _ in RUNS.values():
        for name in load_config(str(config)).DATASETS.TRAIN:
            MetadataCatalog.get(name).json_file  # noqa: B018  (reading it makes the files)
    train_both(heartbeat)

    heartbeat.say("drawing")
    draw_pictures()
    student = OUTPUT / "student" / "model.pth"
    export_student(
        str(OUTPUT / "model_final.pth"), str(OUTPUT / "config.yaml"), str(student.parent)
    )
    results = {name: final_results(output) for name, (_, output) in RUNS.items()}
    print(
        f"\nWritten to {OUTPUT}: metrics.json, detections.png, curves.png, report/index.html, "
        "student/\n"
    )
    columns = ["AP", "AP50", "AP75", "APs", "APm"]
    print(f"{'':8}" + "".join(f"{c:>8}" for c in columns))
    for name, result in results.items():
        print(f"{name:8}" + "".join(f"{result[f'bbox/{c}']:8.2f}" for c in columns))
    print(
        f"demo: AP={results['sssd']['bbox/AP']:.2f} AP50={results['sssd']['bbox/AP50']:.2f} "
        f"baseline_AP={results['plain']['bbox/AP']:.2f} student={student}"
    )


if __name__ == "__main__":
    with user_errors():
        main()
