"""Ask a running server (`python app.py`) for a video and save it:  python examples/save_video.py "a red circle" kite.mp4"""

import shutil
import sys

from gradio_client import Client

prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle bouncing on a navy background"
target = sys.argv[2] if len(sys.argv) > 2 else "video.mp4"
client = Client(sys.argv[3] if len(sys.argv) > 3 else "http://127.0.0.1:7860", verbose=False)

video, status = client.predict(prompt=prompt, seconds=4, seed=7, api_name="/generate")
shutil.move(video, target)
print(f"{target}: {status['message']}")
