import sys
from importlib import import_module
from pathlib import Path

from . import report

import_module("recipes.riformer.run")
print(report([Path(p) for p in sys.argv[2:]], Path(sys.argv[1])))
