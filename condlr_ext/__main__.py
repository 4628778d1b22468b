"""`python -m condlr_ext` is the command `condlr`."""

import sys

from .cli import main

sys.exit(main())
