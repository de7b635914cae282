"""One rank's part of Wan; knows no rank and no queue."""
