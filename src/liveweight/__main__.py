"""`python -m liveweight` is the command line."""

import sys

from liveweight.cli import main

sys.exit(main())
