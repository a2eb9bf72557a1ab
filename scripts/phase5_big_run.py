"""The older training interface: flags become overrides of dinoct-train (see `dinoct.legacy`)."""

from dinoct.legacy import TRAIN_FLAGS, TRAIN_SWITCHES, run_legacy
from dinoct.train import cli

if __name__ == "__main__":
    run_legacy("dinoct-train", cli, TRAIN_FLAGS, TRAIN_SWITCHES)
