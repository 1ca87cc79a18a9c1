"""`python -m data.prepare`: see data/prepare/command.py."""

import sys

from data.prepare.command import main

if __name__ == "__main__":
    sys.exit(main())
