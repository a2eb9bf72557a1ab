"""Commands answer at once: neither --help nor a mistyped key waits for torch or another large library.

And what starts often, a run and its loader workers, imports nothing large that it does not use.
"""

import json
import subprocess
import sys

import pytest

HEAVY = "torch", "torchvision", "timm", "wandb", "tensorboard", "matplotlib", "sklearn", "scipy", "cv2", "pydicom"

# Typed as a user does, in a fresh interpreter; prints the exit statuses and what of HEAVY was imported.
TYPED = """
import json, sys
from importlib import import_module
command, wrong, heavy = sys.argv[1], sys.argv[2], sys.argv[3:]
statuses = []
for argument in ("--help", wrong):
    sys.argv = [f"dinoct-{command}", argument]
    try:
        import_module(f"dinoct.{command}").cli()
    except SystemExit as end:
        statuses.append(end.code or 0)
print()
print(json.dumps([statuses, [name for name in heavy if name in sys.modules]]))
"""


@pytest.mark.parametrize(
    ("command", "wrong", "says"),
    [
        ("train", "optim.lrr=1", "did you mean optim.lr?"),
        ("eval", "probe.seeed=1", "did you mean probe.seed?"),
        ("prepare", "sourc=x", "did you mean source?"),
        ("monitor", "slise_id=1", "did you mean slice_id?"),
        ("export", "fromat=timm", "did you mean format?"),
        ("embed", "uot=x", "did you mean out?"),
        ("doctor", "run_dirr=x", "did you mean run_dir?"),
        ("runs", "--srt=loss", "error: "),
    ],
)
def test_help_and_a_mistyped_key_import_nothing_large(workplace, command, wrong, says):
    done = subprocess.run([sys.executable, "-c", TYPED, command, wrong, *HEAVY], capture_output=True, text=True)
    statuses, imported = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [0, 1]
    assert says in done.stderr
    assert imported == []


@pytest.mark.parametrize(
    ("module", "unused"),
    [
        ("dinoct.data.dataset", {"timm", "torchvision", "torch._dynamo", "wandb", "matplotlib", "sklearn", "scipy"}),
        ("dinoct.run", {"matplotlib", "sklearn", "scipy", "tensorboard"}),
    ],
)
def test_a_loader_worker_and_a_run_import_nothing_large_that_they_do_not_use(module, unused):
    """A worker that is not forked off the run imports the first: timm alone would be another 130 MB in each."""
    code = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert unused.isdisjoint(json.loads(done.stdout))
