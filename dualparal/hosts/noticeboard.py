"""`python -m dualparal.hosts.noticeboard put|get|look ADDRESS PORT SECONDS`: one notice in the store of torchrun's agents.

A process of its own because the store speaks only through torch. `put` reads the notice from standard input, `get` waits for
one and prints it, `look` prints the one that has to be there.
"""

from __future__ import annotations

import datetime
import sys

KEY = "dualparal/front_end"


def main(verb: str, address: str, port: str, seconds: str) -> None:
    """Raises torch's own errors when the store cannot be reached in time."""
    from torch.distributed import TCPStore

    timeout = datetime.timedelta(seconds=float(seconds))
    store = TCPStore(address, int(port), is_master=False, timeout=timeout, wait_for_workers=False)
    if verb == "put":
        store.set(KEY, sys.stdin.read())
    elif verb == "look" and not store.check([KEY]):
        sys.exit("it is a new one, because torchrun's first host was started again")
    else:
        sys.stdout.write(store.get(KEY).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
