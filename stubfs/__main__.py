"""``python -m stubfs``."""

import sys

from stubfs.cli import main

sys.exit(main())
