#!/usr/bin/env python
"""Trains or evaluates what a LazyConfig describes, plain or self-distilled.

    tools/lazyconfig_train_net.py --config-file configs/lazy/SSSD/retinanet_R_50_FPN_2x.py
    tools/lazyconfig_train_net.py --config-file ... --resume
    tools/lazyconfig_train_net.py --config-file ... --eval-only train.init_checkpoint=...

The flags, and what a config holds (model, dataloader, optimizer, lr_multiplier, train), are those
of Detectron2's script of the same name. For LabelEnc's second step, train.first_step names the
checkpoint of the first.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
import logging
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from sssd import SelfDistiller
from sssd.engine import (
    Checkpointer,
    DistillationMetrics,
    describe_distillation,
    hold_frozen_parameters,
    initialise_second_step,
    launch_script,
)


def do_test(cfg: DictConfig, model: nn.Module) -> dict[str, Any] | None:
    """Evaluates, where the config names an evaluator."""
    if "evaluator" not in cfg.dataloader:
        return None
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    print_csv_format(results)
    return results


def do_train(args: argparse.Namespace, cfg: DictConfig) -> None:
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    of_distillation = []
    if isinstance(model, SelfDistiller):
        hold_frozen_parameters(optimizer, model)
        of_distillation = [DistillationMetrics(model)]
        logging.getLogger("detectron2").info(describe_distillation(model))

    model = create_ddp_model(model, **cfg.train.ddp)
    make_trainer = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = make_trainer(model, instantiate(cfg.dataloader.train), optimizer)
    # Detectron2 v0.6's trainers keep the optimizer out of their state.
    own = {} if "optimizer" in trainer.state_dict() else {"optimizer": optimizer}
    checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=trainer, **own)
    of_main_process = []
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        of_main_process = [
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period),
        ]
    trainer.register_hooks(
        [
            *of_distillation,
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            *of_main_process[:1],
            hooks.EvalHook(cfg.train.eval_period, lambda: do_test(cfg, model)),
            *of_main_process[1:],
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    resumed = args.resume and checkpointer.has_checkpoint()
    if cfg.train.get("first_step") and not resumed:
        initialise_second_step(checkpointer.model, cfg.train.first_step)
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)


def main(args: argparse.Namespace) -> None:
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    default_setup(cfg, args)
    if not args.eval_only:
        do_train(args, cfg)
        return
    model = instantiate(cfg.model).to(cfg.train.device)
    Checkpointer(model).load(cfg.train.init_checkpoint, checkpointables=[], whole=True)
    do_test(cfg, create_ddp_model(model))


if __name__ == "__main__":
    launch_script(main, default_argument_parser().parse_args())
