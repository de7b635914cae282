"""The quality bench: makes, measures, reports."""
