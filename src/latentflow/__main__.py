"""`python -m latentflow`."""

from latentflow.cli import main

main()
