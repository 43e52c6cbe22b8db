"""Says where the command of before is now."""

import sys

print("python -m common.datasets check is now: python -m tools.check_data", file=sys.stderr)
sys.exit(2)
