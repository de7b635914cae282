"""Opens the page: `python app.py`, or what a Hugging Face Space runs. All flags are those of `python -m dualparal serve`."""

import sys

from dualparal.ui.serve import main

if __name__ == "__main__":
    sys.exit(main())
