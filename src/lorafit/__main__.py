"""`python -m lorafit` is `lorafit`."""

from lorafit.cli.main import main

main()
