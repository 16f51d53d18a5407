"""`python -m fusecomp`: the command line."""

import sys

from fusecomp.cli import main

sys.exit(main())
