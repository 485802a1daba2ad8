"""``python -m lococo``: the command line."""

import sys

from lococo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
