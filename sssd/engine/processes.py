"""Many processes: starting them, wrapping the model, and what only the main one has."""

import hashlib
import logging
import os
import re
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from .signals import signals_passed_on

__all__ = [
    "broadcast_buffers",
    "distributed",
    "file_of_main",
    "from_main",
    "gloo_group",
    "launch",
    "on_main",
]

logger = logging.getLogger("sssd")

_timeout: timedelta | None = None  # of a launch; None for torch's own
# What Gloo, NCCL and the store write of a process that is gone, or that does not answer.
_ENDED = re.compile("closed|reset|refused|broken pipe|remote process", re.IGNORECASE)
_SILENT = re.compile("timed? ?out", re.IGNORECASE)


def launch(
    main: Callable[..., Any],
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
    timeout: timedelta = timedelta(minutes=30),
) -> None:
    """Runs ``main(*args)`` in every process of a training.

    Under torchrun, which sets RANK and WORLD_SIZE, this process is one of them. Otherwise it starts
    ``num_processes`` on this machine. On a machine with GPUs each has one, and they talk by NCCL;
    elsewhere by Gloo. (Detectron2's own ``launch`` does not know torchrun, and v0.6's insists on
    GPUs.)

    Args:
        main: must be importable, as it is called in other processes.
        num_processes: on each machine.
        num_machines: that run this same call.
        machine_rank: of this one, from 0 on.
        dist_url: where the first process listens, such as "tcp://host:port"; "auto" for a free port
            of this machine, where it is the only one.
        args: of ``main``.
        timeout: after which a process that waits for another gives up.

    Raises:
        ValueError: the machines need a ``dist_url``, or there are fewer GPUs than processes.
        SystemExit: with the status of the process that ended first, if that is not 0. Each process
            says itself why it ends; one that others have left alone does it in a sentence.
    """
    of_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world_size = int(os.environ["WORLD_SIZE"]) if of_torchrun else num_processes * num_machines
    if world_size <= 1:
        main(*args)
        return
    if of_torchrun:
        local = int(os.environ.get("LOCAL_RANK", 0))
        on_each = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        with _ends_with_the_others(int(os.environ["RANK"]), world_size, timeout):
            _join({"init_method": "env://"}, local, on_each, timeout)
            main(*args)
        return
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError(
                f"{num_machines} machines have to find each other: give --dist-url "
                "tcp://<name of the first machine>:<a free port there> on all of them."
            )
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    gpus = torch.cuda.device_count()
    if 0 < gpus < num_processes:
        raise ValueError(
            f"{num_processes} processes need as many GPUs, and this machine has {gpus}: set "
            f"--num-gpus to at most {gpus}."
        )
    place = {"init_method": dist_url, "world_size": world_size}
    context = mp.start_processes(
        _start,
        nprocs=num_processes,
        args=(place, machine_rank * num_processes, num_processes, timeout, main, args),
        join=False,
        start_method="spawn",
    )
    with signals_passed_on(context.processes):
        try:
            while not context.join():
                pass
        except mp.ProcessExitedException as error:
            # A process that has said why, or that was killed.
            if error.exit_code < 0:
                logger.error(
                    "Process %d was ended by %s; go on with --resume.",
                    machine_rank * num_processes + error.error_index,
                    error.signal_name,
                )
            sys.exit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code)


def _start(local: int, place: dict, first: int, on_each: int, timeout, main, args) -> None:
    rank = first + local
    try:
        with _ends_with_the_others(rank, place["world_size"], timeout):
            _join({**place, "rank": rank}, local, on_each, timeout)
            main(*args)
    except Exception:
        # Here, because the process that has started this one hears of the first that ends, and
        # that may be one of the others.
        sys.stderr.write(f"Process {rank}: {traceback.format_exc()}")
        _leave()
        sys.exit(1)


@contextmanager
def _ends_with_the_others(rank: int, world_size: int, timeout: timedelta) -> Iterator[None]:
    """Ends this process with a sentence, when another has ended or does not answer any more.

    Raises:
        SystemExit: instead of what Gloo, NCCL or the store raise, or what was made of that.
    """
    training = logging.getLogger("detectron2.engine.train_loop")
    training.addFilter(_says_more_than_the_sentence)  # else it writes the traceback of Gloo's error
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = _lost_connection(error)
        if reason is None:
            raise
        if _SILENT.search(reason):
            what = f"has not answered within {timeout}"
            fix = "see what keeps it, and give a longer --timeout where it only needs the time"
        else:
            what = "has ended"
            fix = "look for its last lines, here or in the logs of OUTPUT_DIR (log.txt.rank1, ...)"
        _leave()
        sys.exit(
            f"error: Process {rank} of {world_size} stops, because another one {what} ({reason}): "
            f"{fix}; then go on with --resume."
        )
    finally:
        training.removeFilter(_says_more_than_the_sentence)


def _leave() -> None:
    """Takes Gloo's groups down; else their threads often abort a program that ends in failure."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def _says_more_than_the_sentence(record: logging.LogRecord) -> bool:
    return not record.exc_info or _lost_connection(record.exc_info[1]) is None


def _lost_connection(error: BaseException | None) -> str | None:
    """The line that says how the connection to another process was lost, if that is the cause."""
    of_torch = getattr(dist, "DistError", ())  # NCCL's and the store's; Gloo's are RuntimeErrors
    while error is not None:
        text = str(error)
        if isinstance(error, of_torch) or (isinstance(error, RuntimeError) and "/gloo/" in text):
            for line in text.splitlines():
                if _ENDED.search(line) or _SILENT.search(line):
                    return re.sub(r"^\[[^]]*\] *", "", line).rstrip(" .")
        error = error.__cause__ or error.__context__
    return None


def _join(place: dict[str, Any], local: int, on_each: int, timeout: timedelta) -> None:
    """Makes this process one of the training."""
    global _timeout
    _timeout = timeout
    gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timeout, **place)
    if gpus:
        torch.cuda.set_device(local)
        everyone = gloo_group()  # Detectron2's own would wait for half an hour
        comm._get_global_gloo_group = lambda: everyone
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(on_each)
    else:  # v0.6: its launch sets it
        for first in range(0, comm.get_world_size(), on_each):
            group = dist.new_group(list(range(first, first + on_each)))
            if first <= comm.get_rank() < first + on_each:
                comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()


def gloo_group() -> Any:
    """A new group of all processes, which talks by Gloo and has the timeout of the launch."""
    return dist.new_group(backend="gloo", timeout=_timeout)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def distributed(
    model: nn.Module,
    *,
    broadcast_buffers: bool = False,
    fp16_compression: bool = False,
    **options: Any,
) -> nn.Module:
    """The model in DistributedDataParallel, where there are several processes.

    Detectron2's ``create_ddp_model``, also on CPUs.

    Args:
        broadcast_buffers: before each pass.
        fp16_compression: of gradients on their way.
        options: of DistributedDataParallel.
    """
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(
        model, device_ids=ids, broadcast_buffers=broadcast_buffers, **options
    )
    if fp16_compression:
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return model


def broadcast_buffers(model: nn.Module) -> None:
    """Buffers are afterwards those of the main process."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def from_main(value: Any) -> Any:
    """What the main process has in ``value``, in every process."""
    if comm.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=comm._get_global_gloo_group())
    return box[0]


def on_main(check: Callable[[], object]) -> None:
    """Lets the main process check something; what that raises, is raised in every process."""
    error = None
    if comm.is_main_process():
        try:
            check()
        except Exception as raised:
            error = raised
    error = from_main(error)
    if error is not None:
        raise error


@contextmanager
def file_of_main(path: str) -> Iterator[str]:
    """The path of a file with the content that ``path`` has for the main process.

    Machines without a common disk get a copy for the time inside; where the main process has no
    such file, nor does any other.
    """
    if comm.get_world_size() == 1 or len(set(comm.all_gather(_digest(path)))) == 1:
        yield path
        return
    content = None
    if comm.is_main_process() and os.path.isfile(path):
        with open(path, "rb") as file:
            content = file.read()
    content = from_main(content)
    if comm.is_main_process():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, os.path.basename(path))
        if content is not None:
            with open(copy, "wb") as file:
                file.write(content)
        yield copy


def _digest(path: str) -> bytes | None:
    """Of the content, since checkpoints of two runs have the same size; None without a file."""
    if not os.path.isfile(path):
        return None
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            content.update(chunk)
    return content.digest()
