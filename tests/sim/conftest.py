"""The simulated cluster's modules lie beside the tests, the policies and samples of messages in folders of
their own; none is a package."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS / "policies"), str(TESTS / "samples")]
