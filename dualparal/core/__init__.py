"""Pure arithmetic of the method: no processes, no torch.distributed, no clock."""
