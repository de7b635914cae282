"""As a script for diffusers' WanPipeline would do it, on two processes:  python examples/diffusers_style.py pocket.mp4"""

import sys

from diffusers.utils import export_to_video

from dualparal import DualParalPipeline

target = sys.argv[1] if len(sys.argv) > 1 else "video.mp4"

with DualParalPipeline.from_pretrained("pocket", ranks=2) as pipe:
    output = pipe(
        "a red circle bouncing on a navy background",
        num_frames=65,
        num_inference_steps=12,
        generator=7,
    )

export_to_video(output.frames[0], target, fps=16)  # needs imageio; output.paths[0] is an mp4 already
print(f"{target}: {len(output.frames[0])} frames, seed {output.seeds[0]}; {output.paths[0]}")
