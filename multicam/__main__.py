"""`python -m multicam`."""

import sys

from multicam.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
