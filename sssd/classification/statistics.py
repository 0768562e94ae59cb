"""Running statistics of normalisation layers, held still for the length of a pass."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["statistics_held"]


@contextmanager
def statistics_held(network: nn.Module) -> Iterator[None]:
    """The network normalises as its mode says, and its running statistics stay as they are.

    For the passes that a method makes beside the one over the batch: without this, each would count
    as a further batch.
    """
    layers = [m for m in network.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    kept = [(m, m.running_mean, m.running_var, m.num_batches_tracked) for m in layers]
    # In training mode a layer without running statistics normalises by the batch. In evaluation
    # nothing moves.
    training = [entry for entry in kept if entry[0].training]
    for layer, _, _, count in training:
        layer.running_mean = layer.running_var = None
        layer.num_batches_tracked = count.clone()  # SyncBatchNorm counts, whatever there is to keep
    try:
        yield
    finally:
        for layer, mean, var, count in training:
            layer.running_mean, layer.running_var = mean, var
            layer.num_batches_tracked = count
