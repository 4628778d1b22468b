"""The command `condlr` as `python -m condlr_ext`."""

import sys

from .cli import main

sys.exit(main())
