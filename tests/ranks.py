"""Two processes of one training, on this machine's CPU."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_two_ranks(function: Callable[[int, int, str], None], folder: Path) -> list[dict]:
    """Runs ``function(rank, port, folder)`` in two processes; each begins with :func:`join`.

    Returns:
        What each has saved as ``<rank>.pth`` in the folder.
    """
    mp.spawn(function, args=(free_port(), str(folder)), nprocs=2)
    files = [os.path.join(folder, f"{rank}.pth") for rank in range(2)]
    return [torch.load(path, weights_only=False) for path in files]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join(rank: int, port: int) -> None:
    """Makes this process one of the two. A minute is the longest that one waits for the other."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=1))
