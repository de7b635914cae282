"""Jobs on disk and in line."""
