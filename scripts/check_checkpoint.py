"""Print what one or more checkpoints hold: step, centre, weights, entropy hints.

python scripts/check_checkpoint.py outputs/runs/ID/checkpoint_*.pth
"""

import argparse
import sys

from dinoct.errors import DinoctError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="CHECKPOINT")
    status = 0
    files = parser.parse_args().files

    from dinoct.evals.inspect import checkpoint_summary

    for path in files:
        try:
            print("\n".join(checkpoint_summary(path)))
        except DinoctError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
