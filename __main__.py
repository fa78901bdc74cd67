"""Run the command line as ``python -m normswap``."""

from .cli import main

main()
