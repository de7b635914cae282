"""Where a running engine of one host can be reached: nowhere but on the loopback."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import psutil
import pytest

from dualparal import Engine


def listening(pids: list[int]) -> list[str]:
    """The addresses on which these processes take connections."""
    found = [c for pid in pids for c in psutil.Process(pid).net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    return [c.laddr.ip for c in found]


def test_nobody_outside_reaches_an_engine_of_one_host(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves_nothing: None
) -> None:
    """Neither torch's store nor gloo, also where the environment names an interface (there is none of that name here)."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    before, others = listening([psutil.Process().pid]), set(psutil.Process().children(recursive=True))
    with Engine(tiny, ranks=2, device="cpu", threads=1, outputs=tmp_path) as engine:
        workers = [int(about["pid"]) for about in engine.workers.values()]
        assert len(workers) == 3
        addresses = listening(workers)
        assert len(addresses) >= 3, "the store, and gloo in both ranks"
        assert all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses
        family = [child.pid for child in set(psutil.Process().children(recursive=True)) - others]
        assert len(listening(family)) == len(addresses), "a helper process listens too"
        assert listening([psutil.Process().pid]) == before, "the front end listens too"
