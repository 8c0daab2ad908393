"""`python -m aggregator.cli` is the command `aggregator`."""

import sys

from aggregator.cli.main import main

sys.exit(main())
