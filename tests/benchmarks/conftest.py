"""The benchmarks are no installed package: they are found in the root of the clone."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # at the end, so that nothing of the root shadows a package
