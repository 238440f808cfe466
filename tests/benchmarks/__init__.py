import sys
from pathlib import Path

# The benchmarks use the examples' data, which is not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
