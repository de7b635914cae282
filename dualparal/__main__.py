"""`python -m dualparal`."""

import sys

from dualparal.cli import main

if __name__ == "__main__":
    sys.exit(main())
