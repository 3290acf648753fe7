"""``python -m kdlib`` is ``kdlib``."""

import sys

from .cli import main

sys.exit(main())
