"""`python -m aggregator.cli` runs the command `aggregator`."""

import sys

from aggregator.cli.main import main

sys.exit(main())
