"""`python -m r2ec_fast` is `r2ec-fast`."""

import sys

from r2ec_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
