"""One run of a comparison, in a process that makes many."""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from ..engine.stage_runs import run_stages
from ..engine.stages import plan_stages
from ..visualization import read_metrics
from .classification_plan import TEACHER, Plan, Run, run_config
from .records import commit, write_record

__all__ = ["execute"]

_LOGGERS = ("detectron2", "fvcore", "sssd")
_WEIGHTS = "model_final.pth"
_KEPT = (_WEIGHTS, "config.yaml", "log.txt")


def execute(plan: Plan, run: Run, records: Path, scratch: Path) -> dict[str, Any]:
    """Trains and evaluates a run, and writes its record.

    Args:
        records: folder of what is kept: ``<run>.json`` and, logged by each stage,
            ``<run>_metrics.json.gz``.
        scratch: folder of checkpoints and logs; of a complete run only the last
            weights stay, with their config.

    Returns:
        The record: settings, accuracies in percent by split, seconds, commit.
    """
    output = scratch / run.name
    settings = run.settings()  # of now: the config may be edited while it runs
    teacher = scratch / run.data / TEACHER / f"seed{run.seed}" / _WEIGHTS
    cfg = run_config(plan, run, output, teacher)
    _prepare(output, cfg)
    start = time.time()
    with _log_in(output / "log.txt"):
        results = run_stages(cfg, resume=True)
    last = results.get("ensemble") or list(results.values())[-1]
    record = {
        "method": run.method.name,
        "data": run.data,
        "seed": run.seed,
        **settings,
        **_by_split(cfg, last),
        "stages": {name: _by_split(cfg, value) for name, value in results.items()},
        "iterations": cfg.SOLVER.MAX_ITER,
        "seconds": round(time.time() - start, 1),
        "commit": commit(),
        "torch": torch.__version__,
    }
    metrics = {
        stage.name: read_metrics(Path(stage.cfg.OUTPUT_DIR) / "metrics.json")
        for stage in plan_stages(cfg)
    }
    write_record(records / run.name, record, metrics)
    _tidy(output)
    return record


def _prepare(output: Path, cfg: CfgNode) -> None:
    """A folder with the config, and with what an interrupted run of the same config has left."""
    path = output / "config.yaml"
    if output.is_dir() and not (path.is_file() and path.read_text() == cfg.dump()):
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(cfg.dump())


def _by_split(cfg: CfgNode, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Figures as ``{"validation": {"classification/top1": 90.0, ...}, "test": {...}}``."""
    names = cfg.DATASETS.TEST
    parts = {names[0]: results} if len(names) == 1 else results
    return {
        split: {
            f"{task}/{key}": round(value, 4)
            for task, figures in parts[name].items()
            for key, value in figures.items()
        }
        for split, name in zip(("validation", "test"), names, strict=False)
    }


@contextmanager
def _log_in(path: Path) -> Iterator[None]:
    """Detectron2's and our log go to a file and nowhere else."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("[%(asctime)s %(name)s] %(message)s", "%m/%d %H:%M:%S"))
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [handler]
    try:
        yield
    finally:
        for logger in loggers:
            logger.handlers = [logging.NullHandler()]
        handler.close()


def _tidy(output: Path) -> None:
    """Leaves the last weights, their config and the log."""
    for path in output.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in _KEPT:
            path.unlink()
