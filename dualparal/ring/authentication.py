"""Ranks that have met make sure of each other: everybody proves to know the key that the front end gave to its own workers.

torch's stores and gloo ask nobody who calls. What listens does so for a moment at start-up, and another process of this host,
or of the network between hosts, might be quicker than the rank that is awaited. This finds it out before anything else is said.
It does not encrypt, and does not help against somebody who can change what travels.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any

import torch
import torch.distributed as dist

from dualparal.errors import WorkerFailed

NUM_BYTES = 32


def authenticate(group: Any, key: bytes, name: str) -> None:
    """Raise `WorkerFailed` unless every member of a gloo `group` knows `key`; a collective call. `name` tells groups apart, so
    that what is answered in one is of no use in another."""
    members = dist.get_process_group_ranks(group)
    nonces = _gathered(secrets.token_bytes(NUM_BYTES), group, len(members))
    said = b"".join([name.encode(), *nonces])

    def proof(rank: int) -> bytes:
        return hmac.digest(key, said + rank.to_bytes(4, "big"), hashlib.sha256)

    for rank, given in zip(members, _gathered(proof(dist.get_rank()), group, len(members)), strict=True):
        if not hmac.compare_digest(given, proof(rank)):
            raise WorkerFailed(
                f"something else answered in place of rank {rank}: it does not know this engine's key; is another program "
                "trying to reach the workers?"
            )


def _gathered(mine: bytes, group: Any, count: int) -> list[bytes]:
    found = [torch.empty(NUM_BYTES, dtype=torch.uint8) for _ in range(count)]
    dist.all_gather(found, torch.frombuffer(bytearray(mine), dtype=torch.uint8), group=group)
    return [bytes(x.tolist()) for x in found]
