"""python -m services.prefill_worker"""

import sys

from services.worker.app import main

if __name__ == "__main__":
    sys.exit(main("prefill"))
