"""`python -m cluster`: the `breakeven` command from a bare checkout."""

import sys

from cluster.cli import main

sys.exit(main())
