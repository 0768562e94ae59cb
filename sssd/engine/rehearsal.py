"""One step of a classification training on random images, before anything is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ..classification.surroundings import cannot_take
from ..meta_arch import ClassificationDistiller
from ..meta_arch.passes import forked_random_state

__all__ = ["rehearse"]

_IMAGES = 2  # the fewest that BatchNorm takes after pooling


def rehearse(model: ClassificationDistiller, size: int) -> list[str]:
    """Lets every network of a model learn once, and evaluates it, so that what does not fit shows.

    Parameters that no term reaches (the student's last layers while a hint trains its first ones)
    are frozen from then on: DistributedDataParallel waits for a gradient of the others, and weight
    decay must not move them. All else is afterwards as it was before.

    Args:
        model: as it will be trained.
        size: height and width of the images.

    Returns:
        The names of the parameters that were frozen.

    Raises:
        ValueError: the terms do not fit the networks, or nothing is left to train.
    """
    channels = len(model.pixel_mean)
    was_training, was_trained = model.training, model.teacher_is_trained
    model.teacher_is_trained = True
    with forked_random_state(model.device), _kept_buffers(model), EventStorage(0):
        inputs = [
            {
                "image": torch.randint(256, (channels, size, size), dtype=torch.uint8),
                "pair": torch.randint(256, (channels, size, size), dtype=torch.uint8),
                "label": label % 2,
                "image_id": label,
            }
            for label in range(_IMAGES)
        ]
        try:
            model.train()
            for learner in range(model.num_learners):
                model.learner = learner
                loss = sum(model(inputs).values())
                if loss.requires_grad:
                    loss.backward()
            model.learner = 0
            model.eval()
            with torch.no_grad():
                model(inputs)
        except TypeError as error:
            raise ValueError(
                f"The first step of MODEL.SSSD.CLASSIFIER.TERMS fails ({error}): correct the types "
                "of their options."
            ) from error
        except (AssertionError, RuntimeError) as error:
            shape = (channels, size, size)
            raise ValueError(cannot_take(model.student, shape, error)) from error
    model.train(was_training)
    model.teacher_is_trained = was_trained
    return _freeze_unreached(model)


def _freeze_unreached(model: nn.Module) -> list[str]:
    frozen, reached = [], 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
            frozen.append(name)
        reached += parameter.grad is not None
        parameter.grad = None
    if not reached:
        raise ValueError(
            "No term of MODEL.SSSD.CLASSIFIER reaches a parameter, so there is nothing to train: "
            "add a term that reads the student's predictions or layers."
        )
    return frozen


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
