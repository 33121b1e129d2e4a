"""`python -m arvision.cli`."""

from . import main

main()
