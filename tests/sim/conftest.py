"""The simulated cluster's modules lie beside the tests, the policies in a folder of their own; none is a package."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "policies")]
