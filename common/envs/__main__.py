"""Says where the command of before is now."""

import sys

print("python -m common.envs render is now: python -m tools.render", file=sys.stderr)
sys.exit(2)
