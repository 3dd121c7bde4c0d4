"""Where the processes of one start of ``torchrun`` meet, and none of those before."""

from __future__ import annotations

import time
import uuid

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL = 0.01  # seconds


def init_process_group(backend: str) -> None:
    """``torch.distributed.init_process_group`` for processes that ``torchrun`` may have started anew.

    ``torchrun`` keeps its store when it restarts its processes. What those before wrote to it, such as the address
    they could be reached at, is still there, and a process that is quicker than the others would try that.
    """
    store, rank, size = next(iter(rendezvous("env://")))
    token = _welcome(store, size) if rank == 0 else _ask(store, rank)
    dist.init_process_group(backend, store=PrefixStore(token, store), rank=rank, world_size=size)


def _welcome(store: Store, size: int) -> str:
    """Name a new place, and tell everyone who asks for it that it is this one."""
    token = uuid.uuid4().hex
    store.set("l2l_fast/place", token)
    for rank in range(1, size):
        nonce = store.get(f"{token}/{rank}/asks")  # waits
        store.set(f"{token}/{rank}/answer", nonce.decode())
    return token


def _ask(store: Store, rank: int) -> str:
    """The place of the first process; one whose answer is not meant for this process is an old one."""
    nonce = uuid.uuid4().hex
    while True:
        token = store.get("l2l_fast/place").decode()
        store.set(f"{token}/{rank}/asks", nonce)
        answer = f"{token}/{rank}/answer"
        while store.get("l2l_fast/place").decode() == token:
            if store.check([answer]) and store.get(answer).decode() == nonce:
                return str(token)
            time.sleep(_POLL)
