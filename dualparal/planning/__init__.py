"""Bytes and seconds before the run."""
