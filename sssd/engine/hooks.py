"""Hooks for Detectron2's trainers."""

from typing import Any

from detectron2.engine import HookBase, TrainerBase, hooks

from ..losses import constant_coefficient

__all__ = ["BestCheckpointer", "DistillationMetrics", "TermWeights", "logged_now"]


def logged_now(trainer: TrainerBase) -> dict[str, float]:
    """What the present iteration has logged so far, by name.

    No losses, if it was skipped; and in processes besides the main one, which alone has them.
    """
    latest = trainer.storage.latest()
    return {name: value for name, (value, logged_in) in latest.items() if logged_in == trainer.iter}


class DistillationMetrics(HookBase):
    """Logs the raw distance, the coefficient and the share of the total loss.

    Their names contain "loss", so that Detectron2's console writer prints them beside the losses.
    They come from what the trainer has logged already: a value taken off the device in the middle
    of an iteration would make the device wait.
    """

    def __init__(self, model) -> None:
        """
        Args:
            model: the SelfDistiller, without DistributedDataParallel around it.
        """
        self._model = model

    def after_step(self) -> None:
        storage = self.trainer.storage
        if self._model.last_coefficient is None:
            return  # the first iteration was skipped
        coefficient = float(self._model.last_coefficient)
        storage.put_scalar("loss_distill/coefficient", coefficient, smoothing_hint=False)
        logged = logged_now(self.trainer)
        if "loss_distill" not in logged:
            return
        if self._model.last_distance is None:
            return  # it was not computed
        weighted, total = logged["loss_distill"], logged["total_loss"]
        # The logged loss is the mean over processes; with coefficient 0 there is only our own.
        distance = weighted / coefficient if coefficient else float(self._model.last_distance)
        storage.put_scalar("loss_distill/distance", distance)
        storage.put_scalar("loss_distill/share", weighted / total if total else 0.0)


class TermWeights(HookBase):
    """Logs the weight of each term of a classification whose weight follows the iteration."""

    def __init__(self, model) -> None:
        """
        Args:
            model: the ClassificationDistiller, without DistributedDataParallel around it.
        """
        weights = model.training_parts["terms"][0].weights
        self._changing = {
            name: weight
            for name, weight in weights.items()
            if weight.func is not constant_coefficient
        }

    def after_step(self) -> None:
        for name, weight in self._changing.items():
            value = weight(self.trainer.iter)
            self.trainer.storage.put_scalar(f"loss_{name}/weight", value, smoothing_hint=False)


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, which also remembers the best value over a resume.

    After a failure in the last iteration it saves nothing: Detectron2's would, and a resume from
    that file would take the training for complete.
    """

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()

    def state_dict(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_metric = state_dict["best_metric"]
        self.best_iter = state_dict["best_iter"]
