"""Processes and messages; knows no maths."""
