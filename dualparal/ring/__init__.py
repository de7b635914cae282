"""The worker processes: rank 0, the other ranks, the codec."""
