"""`python -m dualparal`."""

import sys

from dualparal.cli.main import program

if __name__ == "__main__":
    sys.exit(program())
