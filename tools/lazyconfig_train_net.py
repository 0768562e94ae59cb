#!/usr/bin/env python
"""Trains or evaluates what a LazyConfig describes, plain or self-distilled.

    tools/lazyconfig_train_net.py --config-file configs/lazy/SSSD/retinanet_R_50_FPN_2x.py
    tools/lazyconfig_train_net.py --config-file ... --resume
    tools/lazyconfig_train_net.py --config-file ... --eval-only train.init_checkpoint=...

The flags, and what a config holds (model, dataloader, optimizer, lr_multiplier, train), are those
of Detectron2's script of the same name. For LabelEnc's second step, train.first_step names the
checkpoint of the first. train.amp.precision may be "bfloat16"; with train.batch_parts k, the
gradients of k batches of the loader make one update; up to train.max_skipped iterations that are
not finite are skipped; train.averaging_decay averages the weights (as MODEL.SSSD.AVERAGING.DECAY);
train.clip_value clips gradients by value.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
import logging
from typing import Any

from detectron2.config import instantiate
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from sssd import SelfDistiller
from sssd.engine import (
    AveragedWeights,
    Checkpointer,
    CheckpointError,
    TrainingStep,
    argument_parser,
    begin_output,
    clip_gradients,
    describe_distillation,
    distributed,
    evaluate_with_average,
    hold_frozen_parameters,
    initialise_second_step,
    launch_script,
    load_lazy_config,
    save_last_good,
    set_earlier_run_aside,
    training_hooks,
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
    if cfg.train.get("clip_value"):
        clip_gradients(optimizer, cfg.train.clip_value)
    if isinstance(model, SelfDistiller):
        hold_frozen_parameters(optimizer, model)
        logging.getLogger("detectron2").info(describe_distillation(model))

    model = distributed(model, **cfg.train.ddp)
    trainer = TrainingStep(
        model,
        instantiate(cfg.dataloader.train),
        optimizer,
        precision=cfg.train.amp.get("precision", "float16") if cfg.train.amp.enabled else "float32",
        num_batches=cfg.train.get("batch_parts", 1),
        max_skipped=cfg.train.get("max_skipped", 0),
    )
    checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=trainer)
    averaged = None
    if cfg.train.get("averaging_decay"):
        averaged = AveragedWeights(checkpointer.model, cfg.train.averaging_decay)
        checkpointer.add_checkpointable("averaged", averaged)
    trainer.save_last_good = lambda: save_last_good(trainer, checkpointer)
    trainer.register_hooks(
        training_hooks(
            checkpointer.model,
            checkpointer,
            loaders={"train": trainer.data_loader},
            scheduler=hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            checkpoint_period=cfg.train.checkpointer.period,
            max_to_keep=cfg.train.checkpointer.get("max_to_keep"),
            eval_period=cfg.train.eval_period,
            evaluate=lambda: evaluate_with_average(model, lambda: do_test(cfg, model), averaged),
            averaged=averaged,
            make_writers=lambda: default_writers(cfg.train.output_dir, cfg.train.max_iter),
            writer_period=cfg.train.log_period,
        )
    )
    if not args.resume and comm.is_main_process():
        set_earlier_run_aside(cfg.train.output_dir)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    resumed = args.resume and checkpointer.has_checkpoint()
    if cfg.train.get("first_step") and not resumed:
        initialise_second_step(checkpointer.model, cfg.train.first_step)
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)


def main(args: argparse.Namespace) -> None:
    cfg = load_lazy_config(args.config_file, args.opts)
    begin_output(cfg, args)
    if not args.eval_only:
        do_train(args, cfg)
        return
    model = instantiate(cfg.model).to(cfg.train.device)
    checkpointer = Checkpointer(model, cfg.train.output_dir)
    path = checkpointer.last_file_or(cfg.train.init_checkpoint, args.resume)
    if not path:
        raise CheckpointError(
            "There is nothing to evaluate: name a checkpoint in train.init_checkpoint, or give "
            "--resume for the last one of train.output_dir."
        )
    checkpointer.load(path, checkpointables=[], whole=True)
    do_test(cfg, distributed(model))


if __name__ == "__main__":
    launch_script(main, argument_parser().parse_args())
