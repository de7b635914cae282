"""One pipeline over several hosts, under torchrun."""
