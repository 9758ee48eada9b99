"""Nothing is lost on the CPU: processes are spawned and joined by gloo. Accelerators' back ends are."""

import os
import socket

import torch
import torch.distributed as dist


def _run_rank(rank: int, function, arguments: tuple, world_size: int, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int):
    """`run_distributed(2)(function)(*arguments)` runs `function(rank, *arguments)` in each of two processes."""

    def launcher(function):
        def launch(*arguments):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            torch.multiprocessing.spawn(_run_rank, (function, arguments, world_size, port), nprocs=world_size)

        return launch

    return launcher
