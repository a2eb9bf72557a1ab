"""The older evaluation interface: flags become overrides of dinoct-eval (see `dinoct.legacy`)."""

from dinoct.eval import cli
from dinoct.legacy import EVAL_FLAGS, run_legacy

if __name__ == "__main__":
    run_legacy("dinoct-eval", cli, EVAL_FLAGS)
