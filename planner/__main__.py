"""`python -m planner`."""

import sys

from planner.app import main

if __name__ == "__main__":
    sys.exit(main())
