"""`python -m services.coordinator`."""

import sys

from services.coordinator.app import main

if __name__ == "__main__":
    sys.exit(main())
