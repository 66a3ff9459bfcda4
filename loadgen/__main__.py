"""`python -m loadgen` is `loadgen`."""

from loadgen.cli import main

raise SystemExit(main())
