"""The older monitor interface: flags become overrides of dinoct-monitor (see `dinoct.legacy`)."""

from dinoct.legacy import MONITOR_FLAGS, run_legacy
from dinoct.monitor import cli

if __name__ == "__main__":
    run_legacy("dinoct-monitor", cli, MONITOR_FLAGS)
