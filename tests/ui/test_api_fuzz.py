"""Bad requests by the thousand: no answer shows the inside of the server, nothing refused leaves anything behind.

1,000 requests, always the same ones. `DUALPARAL_FUZZ=20000` sends so many, drawn anew each time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.api_fuzz import Fuzzer
from tests.page_server import GRADIO_WARNINGS, Server

NUM_REQUESTS = int(os.environ.get("DUALPARAL_FUZZ", "1000"))
IS_DRAWN_ANEW = "DUALPARAL_FUZZ" in os.environ
AT_ONCE = 20

pytestmark = [*GRADIO_WARNINGS, pytest.mark.timeout(600 + NUM_REQUESTS)]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    server = Server(tmp_path_factory.mktemp("fuzz"), item_s=0.02, max_queue=10 * AT_ONCE)
    made = Fuzzer(server)
    yield made
    print(dict(made.counts.most_common()))
    made.close()
    server.close()


PHASES = [Phase.generate, Phase.shrink] if IS_DRAWN_ANEW else [Phase.generate]


@settings(
    max_examples=max(1, NUM_REQUESTS // AT_ONCE), derandomize=not IS_DRAWN_ANEW, database=None, deadline=None,
    suppress_health_check=list(HealthCheck), phases=PHASES,
)  # fmt: skip
@given(data=st.data())
def test_bad_requests(fuzzer: Fuzzer, data: st.DataObject) -> None:
    fuzzer.send(data.draw(fuzzer.drawn.batches(AT_ONCE)))


def test_the_server_is_well_afterwards(fuzzer: Fuzzer) -> None:
    made = fuzzer.server.client.predict(prompt="a kite", seconds=1, num_inference_steps=2, api_name="/generate")
    assert made[1]["state"] == "finished"
    assert fuzzer.counts["event: complete"] and fuzzer.counts["event: error"] and fuzzer.counts["422"]
    assert fuzzer.counts["refusals"] > NUM_REQUESTS // 10
