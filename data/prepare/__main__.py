"""`python -m data.prepare`: see data/prepare/command.py."""

import sys

from data.output import make_printing_safe
from data.prepare.command import main

if __name__ == "__main__":
    make_printing_safe(BrokenPipeError)
    sys.exit(main())
