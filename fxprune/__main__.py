"""`python -m fxprune`."""

from fxprune.cli import main

main()
