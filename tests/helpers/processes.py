"""What programs that torchrun starts in several processes have in common."""

import json
import os
import sys

import torch.distributed as dist


def leave(found: dict) -> None:
    """Print what the first process found, and end this one.

    Not by the interpreter's end: DTensors keep gloo's threads alive beyond `destroy_process_group`, and a thread that
    frees a tensor while the interpreter ends aborts the process (pytorch/pytorch#190489).
    """
    if dist.get_rank() == 0:
        print("FOUND" + json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def found_in(printed: str) -> dict:
    """Return what `leave` printed."""
    return json.loads(printed.rsplit("FOUND", 1)[1].splitlines()[0])
