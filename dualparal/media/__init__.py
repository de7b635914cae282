"""From frames to files: segments, mp4, metadata."""
