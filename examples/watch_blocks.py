"""Watch a video's blocks arrive from a running server:  python examples/watch_blocks.py "a red circle" [address]"""

import sys

from gradio_client import Client

prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle bouncing on a navy background"
client = Client(sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:7860", verbose=False)

seen = 0
for _, status in client.submit(prompt=prompt, seconds=8, api_name="/generate"):
    for block in status["blocks"][seen:]:
        last = block["first_frame"] + block["num_frames"] - 1
        print(f"block {block['block'] + 1}: frames {block['first_frame']} to {last} are ready", flush=True)
    seen = len(status["blocks"])
    print(status["message"], flush=True)
