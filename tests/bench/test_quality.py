"""The bench's methods: what their names say is what they ask for."""

from __future__ import annotations

import re

from dualparal.bench.quality import all_methods


def test_names_say_what_is_asked_for() -> None:
    for name, method in all_methods().items():
        assert name == method.name
        if found := re.match(r"(paper|preview) (\d+)\+(\d+), (\w+)", name):
            assert (method.schedule, method.num_per_block, method.num_cat, method.context) == (
                found[1], int(found[2]), int(found[3]), found[4],
            )  # fmt: skip
        apart = re.search(r"(\d+) x (\d+)", name)
        assert (method.max_in_flight, method.stagger) == (tuple(map(int, apart.groups())) if apart else (None, None))
        assert (method.schedule == "preview") == (apart is not None), "what is chosen by ranks is named"
        refresh = re.search(r"refresh (\d+)", name)
        assert method.refresh == (int(refresh[1]) if refresh else None)
