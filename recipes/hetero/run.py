"""Between families: ViT to CNN, Swin to RIFormer; teacher, baseline, student, one table.

accelerate launch recipes/hetero/run.py [CONFIG.yaml …] [key=value …]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that `recipes` and kdlib are found when this file is a script

from kdlib import conclude, launch  # noqa: E402
from recipes.riformer import model  # noqa: E402, F401  registers RIFormer with timm

if __name__ == "__main__":
    sys.exit(launch.main(conclude.make, default=HERE / "configs" / "default.yaml"))
