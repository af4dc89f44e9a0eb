"""`python -m tcbench` is `tcbench`."""

import sys

from tcbench.cli import main

sys.exit(main())
