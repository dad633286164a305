"""`python -m pipeline` is `opd-stream`."""

from pipeline.cli import main

main()
