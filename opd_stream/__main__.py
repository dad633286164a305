"""`python -m opd_stream` is `opd-stream`."""

from opd_stream.launcher import main

if __name__ == "__main__":
    main()
