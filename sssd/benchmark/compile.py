"""Compiles what of a model torch.compile can take while a wrapper hooks into the rest."""

import torch
from torch import nn

from .jobs import BenchmarkError

__all__ = ["check_compiler", "compile_parts"]


def check_compiler(device: torch.device) -> None:
    """Compiles next to nothing.

    Raises:
        BenchmarkError: that fails.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BenchmarkError(
            f"torch.compile does not work here ({type(error).__name__}: {reason}): leave out "
            "--compile, or install a C++ compiler (for a CPU) or Triton (for a GPU)."
        ) from error


def compile_parts(model: nn.Module) -> list[str]:
    """Compiles the student's backbone, the adapter, and what of the teacher has convolutions.

    The rest of a detector (preprocessing, matching, sampling, suppression) depends on the data, and
    the wrapper's hooks would be compiled anew in each step. It is the ``forward`` of the instance
    that is compiled, so hooks, and what the wrapper puts in its place, work as before. It is
    compiled for each size of its input.

    Args:
        model: a detector, stock or self-distilled.

    Returns:
        Names of the parts.

    Raises:
        BenchmarkError: there is no compiler.
    """
    check_compiler(next(model.parameters()).device)
    student = getattr(model, "student", model)
    parts = {"backbone": student.backbone}
    if student is not model:
        parts["adapter"] = model.training_parts["distillation"].adapter
        for name, part in model.teacher.named_children():
            if any(isinstance(m, nn.Conv2d) for m in part.modules()):
                parts[f"teacher.{name}"] = part
    for part in parts.values():
        part.forward = torch.compile(part.forward, dynamic=False)
    return list(parts)
