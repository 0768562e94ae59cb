"""One iteration: passes over one or several batches, gradients, guard rails, and the update."""

import logging
import math
import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from ..disk import complaint
from ..losses import ShareController
from .checkpoint import CheckpointError
from .files import write_whole

__all__ = ["PRECISIONS", "TrainingStep"]

logger = logging.getLogger("sssd")

PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A loss that overflows at so small a scale is no matter of scale.
_SMALLEST_SCALE = 2.0**-10
_NORM = "grad_norm"


class TrainingStep(SimpleTrainer):
    """Detectron2's trainer of one iteration, with mixed precision, accumulation and guard rails.

    Over ``SimpleTrainer`` and ``AMPTrainer``:

    - float16 (with a loss scale) and bfloat16, on GPUs and on the CPU;
    - the gradients of several batches are averaged before the update;
    - a loss or gradient that is not finite stops the run, or is skipped up to ``max_skipped``
      times. Of a skipped iteration neither weights, optimizer and running statistics nor the
      averages of a share controller keep anything;
    - losses and the norm of the gradient leave the device together, once in an iteration.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "float32",
        num_batches: int = 1,
        max_skipped: int = 0,
    ) -> None:
        """
        Args:
            model: batch -> losses by name.
            data_loader: endless.
            optimizer: of the model.
            precision: of :data:`PRECISIONS`.
            num_batches: whose gradients make one update.
            max_skipped: iterations of the run that may be skipped. Those that overflow float16 at
                the present loss scale do not count: the scale gets smaller.

        Raises:
            ValueError: the precision is unknown.
        """
        if precision not in PRECISIONS:
            raise ValueError(
                f"The precision {precision!r} is unknown: give one of {', '.join(PRECISIONS)}."
            )
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device
        self.dtype = PRECISIONS[precision]
        self.scaler = _scaler(self.device, enabled=precision == "float16")
        self.num_batches, self.max_skipped, self.num_skipped = num_batches, max_skipped, 0
        self._forward_state = _ForwardState(model)
        self.prefix = ""  # of the total loss and the norm in the log, of one of several networks
        # Saves the state that the iteration before has left; returns the path of the file.
        self.save_last_good: Callable[[], str] | None = None

    def run_step(self) -> None:
        """
        Raises:
            FloatingPointError: a loss or gradient is not finite, and may not be skipped. The state
                before the iteration is saved, and so are its batches.
        """
        assert self.model.training, "The model was changed to evaluation mode."
        self._forward_state.keep()
        seconds, batches, losses = 0.0, [], []
        try:
            for i in range(self.num_batches):
                start = time.perf_counter()
                batches.append(next(self._data_loader_iter))
                seconds += time.perf_counter() - start
                losses.append(self._add_gradient(batches[-1], i))
        except FloatingPointError as error:
            # A detector gives up by itself. Other processes would wait for this one's gradient.
            if comm.get_world_size() > 1:
                raise
            self._not_finite(batches, {str(error).splitlines()[0]: math.nan}, error)
            return
        self.scaler.unscale_(self.optimizer)
        means = {name: sum(x[name] for x in losses) / len(losses) for name in losses[0]}
        values, seconds = self._over_processes({**means, _NORM: self._gradient_norm()}, seconds)
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        scale = self.scaler.get_scale()
        if not bad:
            self.scaler.step(self.optimizer)
            self._log(values, seconds)
        elif self.scaler.is_enabled() and list(bad) == [_NORM] and scale > _SMALLEST_SCALE:
            self._forward_state.put_back()
            del values[_NORM]
            self._log(values, seconds)
            logger.info("float16 overflows in iteration %d at the loss scale %g.", self.iter, scale)
        else:
            self._not_finite(batches, bad)
        self.scaler.update()  # after an overflow, to a smaller one

    def _add_gradient(self, batch: Any, position: int) -> dict[str, Tensor]:
        """Adds the gradient of a batch to that of the iteration; returns its losses."""
        model = self.model
        more = position < self.num_batches - 1
        waits = more and isinstance(model, DistributedDataParallel)
        # A scripted function (the focal loss) rounds otherwise from its third call in a process on,
        # when it has been optimised. On a CPU there is nothing to gain from that.
        scripted = torch.jit.optimized_execution(self.device.type != "cpu")
        with model.no_sync() if waits else nullcontext(), scripted:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                losses = model(batch)
            if isinstance(losses, Tensor):
                losses = {"total_loss": losses}
            if position == 0:
                self.optimizer.zero_grad()
            self.scaler.scale(sum(losses.values()) / self.num_batches).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _gradient_norm(self) -> Tensor:
        """Euclidean norm over all parameters, a scalar."""
        groups = self.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.device)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def _over_processes(
        self, values: Mapping[str, Tensor], seconds: float
    ) -> tuple[dict[str, float], float]:
        """Means over processes, and the longest time; the one place that waits for the device."""
        flat = torch.stack([value.float() for value in values.values()])
        processes = comm.get_world_size()
        if processes > 1:
            times = flat.new_zeros(processes)
            times[comm.get_rank()] = seconds
            flat = torch.cat([flat / processes, times])
            dist.all_reduce(flat)
        numbers = flat.tolist()
        count = len(values)
        return dict(zip(values, numbers[:count], strict=True)), max([seconds, *numbers[count:]])

    def _log(self, values: Mapping[str, float], seconds: float) -> None:
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", seconds)
        losses = {name: value for name, value in values.items() if name != _NORM}
        storage.put_scalar(f"{self.prefix}total_loss", sum(losses.values()))
        if len(losses) > 1:
            storage.put_scalars(**losses)
        if _NORM in values:
            storage.put_scalar(f"{self.prefix}{_NORM}", values[_NORM])
        if self.scaler.is_enabled():
            storage.put_scalar("loss_scale", self.scaler.get_scale(), smoothing_hint=False)
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        storage.put_scalar("max_memory_mb", memory, smoothing_hint=False)

    def _not_finite(
        self, batches: list[Any], bad: Mapping[str, float], cause: Exception | None = None
    ) -> None:
        """Skips the iteration, or stops and leaves what is needed to look into it."""
        self._forward_state.put_back()
        names = ", ".join(bad)
        ids = [_identity(sample) for batch in batches for sample in batch]
        images = ", ".join(str(i) for part in comm.all_gather(ids) for i in part)
        what = f"not finite in iteration {self.iter}: {names} (images {images})"
        if self.num_skipped < self.max_skipped:
            self.num_skipped += 1
            logger.warning("Skipped, %d of %d: %s.", self.num_skipped, self.max_skipped, what)
            return
        message = f"Training stops, {what}."
        if self.save_last_good is not None:
            message += f" {self._save_evidence(batches, bad)}"
        raise FloatingPointError(message) from cause

    def _save_evidence(self, batches: list[Any], bad: Mapping[str, float]) -> str:
        """Saves the state before the iteration and its batches; returns what to do next."""
        plain = {"iteration": self.iter, "values": dict(bad), "batches": _plain(batches)}
        rank = f"_of_process{comm.get_rank()}" if comm.get_world_size() > 1 else ""
        try:
            path = self.save_last_good()
            dump = os.path.join(os.path.dirname(path), f"not_finite{rank}.pth")
            write_whole(dump, lambda file: torch.save(plain, file))
            saved = (
                f"The state before is saved as {path}, the images with what is annotated as "
                f"{dump}; --resume repeats the iteration."
            )
        except CheckpointError as error:
            saved = str(error)
        except OSError as error:
            saved = (
                f"The state before is saved as {path}, but not the images ({complaint(error)}); "
                "--resume repeats the iteration."
            )
        return (
            f"{saved} Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or set "
            "SOLVER.CLIP_GRADIENTS first, or let MODEL.SSSD.SOLVER.MAX_SKIPPED iterations be "
            "skipped."
        )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # The name is that of Detectron2's AMPTrainer.
        return {**state, "grad_scaler": self.scaler.state_dict(), "num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        self.num_skipped = state_dict.get("num_skipped", 0)


class _ForwardState:
    """What a pass in training mode moves: running statistics and a share controller's averages."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, (_NormBase, ShareController))]
        self._buffers: list[Tensor] = []
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        # PreciseBN puts other tensors in their places.
        self._buffers = [b for m in self._layers for b in m.buffers(recurse=False)]
        if len(self._kept) != len(self._buffers):
            self._kept = [torch.empty_like(b) for b in self._buffers]
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)


def _scaler(device: torch.device, enabled: bool) -> Any:
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device.type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)  # before torch 2.3, of GPUs only


def _identity(sample: Mapping[str, Any]) -> Any:
    return sample.get("image_id", sample.get("file_name", "without image_id"))


def _plain(value: Any) -> Any:
    """With tensors, numbers, texts and containers only, as ``weights_only`` wants it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Instances):
        fields = {name: getattr(x, "tensor", x) for name, x in value.get_fields().items()}
        return _plain({"image_size": value.image_size, **fields})
    return value if isinstance(value, (Tensor, int, float, str, type(None))) else str(value)
