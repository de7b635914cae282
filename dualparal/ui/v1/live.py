"""HLS: a playlist of the finished blocks that grows while the video is made, for any player. Follows RFC 8216.

The segments are ready for it as they lie: H.264 with a key frame first, clocks that run on.
"""

from __future__ import annotations

import math

from dualparal.request import TEMPORAL_FACTOR
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.v1.keys import LINK

MEDIA_TYPE = "application/vnd.apple.mpegurl"
FIRST_BLOCK_S = 8.0  # players that are given an empty list go away, so the answer waits for the first block a little


def playlist(found: Snapshot, link: str) -> str:
    """The playlist so far, with an end once the job has ended. Addresses are relative, each with `link`, so that a player which
    can send no key gets the segments too."""
    request = found.request
    # It has to be right before the blocks are known, and stay: the first one shows its context too.
    longest_s = (request.num_per_block + 2 * request.num_cat) * TEMPORAL_FACTOR / request.fps
    lines = [
        "#EXTM3U", "#EXT-X-VERSION:6", f"#EXT-X-TARGETDURATION:{math.ceil(longest_s)}", "#EXT-X-MEDIA-SEQUENCE:0",
        "#EXT-X-PLAYLIST-TYPE:EVENT", "#EXT-X-INDEPENDENT-SEGMENTS",
    ]  # fmt: skip
    for block in found.blocks:
        lines += [f"#EXTINF:{block.duration_s:.6f},", f"segments/{block.block}.ts?{LINK}={link}"]
    return "\n".join([*lines, *(["#EXT-X-ENDLIST"] if found.is_ended else []), ""])
