"""Distillation of image classifiers: run the networks, and let the terms compare them."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..classification import Batch, Capture, Surroundings, Terms, build_network, build_terms
from ..classification.networks import classifier_of, load_network_weights
from ..classification.statistics import statistics_held
from ..classification.term import Term
from ..losses import mean_ensemble, twice_differentiable
from .passes import forked_random_state
from .student_wrapper import StudentWrapper

__all__ = ["ClassificationDistiller"]


@META_ARCH_REGISTRY.register()
class ClassificationDistiller(StudentWrapper):
    """Trains ``student``, a classification network, by the weighted terms of a config.

    In training, each call

    1. runs the network that learns, and captures the layers that the terms read,
    2. runs the frozen teacher, if there is one, and the other networks that learn, without a graph,
    3. gives all of it to the terms, and returns their weighted losses.

    As a rule the student is the only network that learns. With ``peers`` (deep mutual learning),
    ``learner`` says which of them does in this call: 0 is the student.

    In evaluation it classifies, with all there is: the student, its peers, heads and branches.
    Its state dict is the student's; peers and what the terms train are in ``training_parts``.
    """

    without_training_parts = (
        "it is a classifier without the heads, branches or peers that are evaluated beside it. "
        "Use a file that its training has written, such as model_final.pth, or a config without "
        "them (MODEL.SSSD.CLASSIFIER.TERMS and PEERS)."
    )

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        terms: Sequence[Terms],
        teacher: nn.Module | None = None,
        teacher_is_trained: bool = True,
        peers: Sequence[nn.Module] = (),
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        max_iter: int,
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            student: images (B, C, H, W) -> logits (B, K).
            terms: for the student and each of its peers, those that it learns by.
            teacher: a network that stays as it is, in evaluation mode.
            teacher_is_trained: False refuses to train with it.
            peers: networks that learn beside the student.
            pixel_mean, pixel_std: C values each, for pixels of 0 to 255.
            max_iter: iterations of the training, for what depends on its progress.
            channels_last: memory format of convolutions and maps.
        """
        super().__init__()
        if len(terms) != 1 + len(peers):
            raise ValueError(f"{1 + len(peers)} networks learn, by {len(terms)} lists of terms.")
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.teacher_is_trained = teacher_is_trained
        self.training_parts = nn.ModuleDict(
            {"terms": nn.ModuleList(terms), "peers": nn.ModuleList(peers)}
        )
        self.max_iter = max_iter
        self.learner = 0
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)
        shape = (-1, 1, 1)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(shape), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(shape), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        keys = cfg.MODEL.SSSD.CLASSIFIER
        channels = len(cfg.MODEL.PIXEL_MEAN)

        def network(name: str) -> nn.Module:
            if not name:
                raise ValueError(
                    "MODEL.SSSD.CLASSIFIER.NETWORK is empty: name a network, such as 'resnet18'."
                )
            options = dict(keys.NETWORK_OPTIONS) if name == keys.NETWORK else {}
            return build_network(name, num_classes=keys.NUM_CLASSES, in_chans=channels, **options)

        student = network(keys.NETWORK)
        # The student starts as it would alone: the rest draws from a copy of the random stream.
        with forked_random_state():
            peers = [network(name) for name in keys.PEERS]
            teacher = None
            if keys.TEACHER.NETWORK:
                teacher = network(keys.TEACHER.NETWORK)
                if keys.TEACHER.WEIGHTS:
                    load_network_weights(teacher, keys.TEACHER.WEIGHTS, keys.TEACHER.NETWORK)
            terms = []
            for name, learner in zip([keys.NETWORK, *keys.PEERS], [student, *peers], strict=True):
                surroundings = Surroundings(
                    student=learner,
                    teacher=teacher,
                    num_classes=keys.NUM_CLASSES,
                    image_shape=(channels, keys.SIZE, keys.SIZE),
                    num_peers=len(peers),
                    new_network=lambda name=name: network(name),
                )
                terms.append(build_terms(keys.TERMS, surroundings, cfg.SOLVER.MAX_ITER))
        return {
            "student": student,
            "terms": terms,
            "teacher": teacher,
            "teacher_is_trained": bool(keys.TEACHER.WEIGHTS),
            "peers": peers,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_iter": cfg.SOLVER.MAX_ITER,
            "channels_last": keys.CHANNELS_LAST,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: for each image a dict with "image", uint8 (C, H, W), in training also
                "label" and, where a term wants it, "pair", a second image.

        Returns:
            In training, scalar losses by name; a peer's have the prefix ``peer<i>_``. In
            evaluation, for each image ``{"logits": {"student": (K,), ...}}``.
        """
        images = self._normalised(batched_inputs, "image")
        if not self.training:
            return self._classify(images)
        if not torch.is_grad_enabled():  # PreciseBN: only the running statistics are wanted
            self._classify(images)
            return {}
        if self.teacher is not None and not self.teacher_is_trained:
            raise ValueError(
                "The teacher has random weights: name its checkpoint in "
                "MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS, or train with tools/train_net.py, which "
                "trains the teacher first."
            )
        labels = torch.as_tensor([x["label"] for x in batched_inputs], device=self.device)
        pair = self._normalised(batched_inputs, "pair") if self.terms.needs("pairs") else None
        iteration = get_event_storage().iter
        batch = Batch(images, labels, self.networks[self.learner], pair=pair)
        batch.progress = iteration / self.max_iter
        self._run(batch)
        losses = self.terms(batch, iteration)
        if self.num_learners > 1 and torch.distributed.is_initialized():
            losses["loss_untouched"] = self.untouched(iteration)
        prefix = f"peer{self.learner}_" if self.learner else ""
        return {prefix + name: loss for name, loss in losses.items()}

    def _run(self, batch: Batch) -> None:
        """Fills in what the networks make of the images."""
        terms = self.terms
        twice = terms.needs("input_gradient")
        if terms.needs("student"):
            capture = Capture(batch.student, terms.layers("student"))
            with ExitStack() as stack:
                stack.enter_context(capture)
                if twice:
                    # The gradient by the images needs no loss scaling in float32.
                    batch.images = batch.images.requires_grad_()
                    stack.enter_context(twice_differentiable())
                    stack.enter_context(torch.autocast(self.device.type, enabled=False))
                batch.logits = _logits(batch.student, batch.images)
            batch.features = capture
        batch.teacher = self.teacher
        if terms.runs_teacher:
            capture = Capture(self.teacher, terms.layers("teacher"))
            with torch.no_grad(), capture:
                batch.teacher_logits = _logits(self.teacher, batch.images)
            batch.teacher_features = capture
        if terms.needs("peers"):
            batch.peers = []
            for network in self.networks:
                if network is not batch.student:
                    with torch.no_grad(), statistics_held(network):
                        batch.peers.append(_logits(network, batch.images))

    def _classify(self, images: Tensor) -> list[dict[str, Any]]:
        terms = self.training_parts["terms"][0]
        capture = Capture(self.student, terms.layers("student"))
        with capture:
            logits = {"student": _logits(self.student, images)}
        batch = Batch(
            images,
            torch.empty(0, dtype=torch.int64, device=self.device),
            self.student,
            logits=logits["student"],
            features=capture,
        )
        logits.update(terms.predict(batch))
        peers = {
            f"peer{i + 1}": _logits(network, images)
            for i, network in enumerate(self.training_parts["peers"])
        }
        if peers:
            everyone = [logits["student"], *peers.values()]
            logits.update(peers, ensemble_of_peers=mean_ensemble(everyone))
        return [{"logits": {name: x[i] for name, x in logits.items()}} for i in range(len(images))]

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that learn: the student and its peers."""
        return [self.student, *self.training_parts["peers"]]

    @property
    def classifying(self) -> list[nn.Module]:
        """What runs in an evaluation: the networks that learn, and the terms that predict."""
        terms = self.training_parts["terms"][0].values()
        return [*self.networks, *(t for t in terms if type(t).predict is not Term.predict)]

    @property
    def classifier_keys(self) -> set[str]:
        """Names, in the state dict, of what makes the student's logits."""
        classifier = classifier_of(self.student)
        (path,) = (name for name, m in self.student.named_modules() if m is classifier)
        return {f"{path}.{name}" for name in classifier.state_dict()}

    @property
    def num_learners(self) -> int:
        """How many networks learn."""
        return 1 + len(self.training_parts["peers"])

    @property
    def terms(self) -> Terms:
        """The terms of the network that learns now."""
        return self.training_parts["terms"][self.learner]

    def take_over(self, earlier: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Lets every term take weights from the stage before; see :meth:`Term.take_over`."""
        for terms in self.training_parts["terms"]:
            for term in terms.values():
                term.take_over(earlier)

    def train(self, mode: bool = True) -> "ClassificationDistiller":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def frozen_parameters(self, iteration: int) -> list[nn.Parameter]:
        """Those of the networks that do not learn in this step, and of their terms."""
        return [
            p
            for i, (network, terms) in enumerate(
                zip(self.networks, self.training_parts["terms"], strict=True)
            )
            if i != self.learner
            for module in (network, terms)
            for p in module.parameters()
            if p.requires_grad
        ]

    def _normalised(self, batched_inputs: list[dict[str, Any]], key: str) -> Tensor:
        images = [x[key] for x in batched_inputs]
        wanted = len(self.pixel_mean)
        for image in images:
            if image.shape[0] != wanted or image.shape != images[0].shape:
                raise ValueError(
                    f"An image has the shape {tuple(image.shape)} (channels, height, width), and "
                    f"the network takes {wanted} channels and images of one size: give "
                    "MODEL.PIXEL_MEAN and PIXEL_STD as many values as the images have channels."
                )
        stacked = torch.stack(images).to(self.device, non_blocking=True)
        normalised = (stacked - self.pixel_mean) / self.pixel_std
        return normalised.contiguous(memory_format=self.memory_format)


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    logits = network(images)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"The network {type(network).__name__} returns a {type(logits).__name__} in training, "
            "not logits: build it without auxiliary classifiers "
            "(MODEL.SSSD.CLASSIFIER.NETWORK_OPTIONS {aux_logits: False})."
        )
    return logits
