"""`python -m liveweight` is the command line."""

from liveweight.cli import main

main()
