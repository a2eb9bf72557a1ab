"""Where other libraries keep what they want to find again."""

import atexit
import os
import shutil
import tempfile


def find_room_for_caches() -> None:
    """Give W&B and Matplotlib a folder until the process ends where the home folder cannot be written.

    The user of a container has often none, and both would say so at length.
    """
    if os.access(os.path.expanduser("~"), os.W_OK):
        return
    folder = tempfile.mkdtemp(prefix="dinoct-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for key in ("WANDB_CACHE_DIR", "MPLCONFIGDIR"):
        os.environ.setdefault(key, folder)
