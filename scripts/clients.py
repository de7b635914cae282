"""Asks a running server for everything that README shows, with each of several versions of gradio_client:

    python app.py &
    for v in 1.5.4 1.10.4 2.0.3; do python3 -m venv /tmp/client-$v && /tmp/client-$v/bin/pip install -q gradio_client==$v; done
    python scripts/clients.py http://127.0.0.1:7860 /tmp/client-*

A folder is a virtual environment whose only need is gradio_client. Each makes a video by /generate and follows it, submits
another, looks at it, cancels it and fetches what is finished. Ends with 1 if one of them could not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CALLS = """
import sys, time
from importlib.metadata import version
from pathlib import Path
from gradio_client import Client

client = Client(sys.argv[1], verbose=False)
assert any(preset["name"] == "pocket" for preset in client.predict(api_name="/presets"))

job = client.submit(prompt="a red circle bouncing on a navy background", seconds=2, seed=7, api_name="/generate")
told = [status["state"] for _, status in job]
assert told[-1] == "finished" and len(told) > 1, told
video, status = job.result()
assert Path(video).read_bytes()[4:8] == b"ftyp" and status["timings"]["total_s"] > 0, status

job_id = client.predict(prompt="a green square circling on a brown background", seconds=60, api_name="/submit")["job_id"]
def ask():
    return client.predict(job_id=job_id, api_name="/status")
deadline = time.monotonic() + 300
while not ask()["blocks"]:
    assert time.monotonic() < deadline, ask()
    time.sleep(0.3)
look, _ = client.predict(job_id=job_id, api_name="/look")
assert Path(look).read_bytes()[8:12] == b"WEBP"
client.predict(job_id=job_id, api_name="/cancel")
while ask()["state"] != "cancelled":
    assert time.monotonic() < deadline, ask()
    time.sleep(0.3)
video, _ = client.predict(job_id=job_id, api_name="/result")
assert Path(video).read_bytes()[4:8] == b"ftyp"
client.predict(job_id=job_id, api_name="/delete")
try:
    client.predict(prompt="a circle", seconds=-1, api_name="/submit")
except Exception as error:
    assert "seconds" in str(error), error
else:
    raise AssertionError("a bad value was taken")
print(version("gradio_client"), "does everything,", "Python", sys.version.split()[0])
"""


def main() -> None:
    """Run the calls under every environment's Python."""
    url, *environments = sys.argv[1:]
    failed = False
    for environment in environments:
        python = Path(environment) / "bin" / "python"
        done = subprocess.run([python, "-c", CALLS, url], check=False, capture_output=True, text=True, timeout=900)
        print(done.stdout.strip() if done.returncode == 0 else f"{environment}: {done.stderr}", flush=True)
        failed |= done.returncode != 0
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
