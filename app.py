"""Opens the page: `python app.py`, or what a Hugging Face Space runs. All flags are those of `python -m dualparal serve`."""

import sys

from dualparal.cli.main import program

if __name__ == "__main__":
    sys.exit(program(["serve", *sys.argv[1:]]))
