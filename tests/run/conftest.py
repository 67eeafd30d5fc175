"""Makes the little stages and their fixtures known to the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from little_fixtures import executed, little, quick_garbage, recipe

__all__ = ["executed", "little", "quick_garbage", "recipe"]
