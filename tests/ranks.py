"""Two processes of one training, on this machine's CPU."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp


def run_two_ranks(function: Callable[[int, int, str], None], folder: Path) -> list[dict]:
    """Runs ``function(rank, port, folder)`` in two processes.

    Returns:
        What each has saved as ``<rank>.pth`` in the folder.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(function, args=(port, str(folder)), nprocs=2)
    files = [os.path.join(folder, f"{rank}.pth") for rank in range(2)]
    return [torch.load(path, weights_only=False) for path in files]
