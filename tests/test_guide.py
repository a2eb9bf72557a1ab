"""The guide's commands as typed, shortened to one real step each on the CPU. Minutes, and gigabytes of checkpoints."""

import json
import subprocess
import sys

import pytest
from commands import REPOSITORY, metrics

SHORT = "--max-steps 1 --batch-size 1 --accumulation-steps 1 --device cpu".split()  # noqa: SIM905  as typed
COMMANDS = {
    "phase5a": "--config vit-large --max-steps 384 --num-workers 8 --batch-size 64 "
    "--accumulation-steps 4 --grad-checkpoint",
    "phase5a_512": "--config vit-large --vit-patch 16 --img-size 512 --max-steps 384 --batch-size 16 "
    "--accumulation-steps 16 --grad-checkpoint",
    "custom": "--config custom --vit-patch 16 --vit-dim 768 --vit-depth 12 --vit-heads 12",
}


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_guide_takes_a_real_step(name, phantom_root, workplace):
    typed = [*COMMANDS[name].split(), *SHORT, f"data.root={phantom_root}", "run_dir=run"]
    script = REPOSITORY / "scripts" / "phase5_big_run.py"
    done = subprocess.run([sys.executable, script, *typed], cwd=workplace, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "equivalent: dinoct-train model=" in done.stdout
    (row,) = metrics(workplace / "run")
    assert row["step"] == 1
    assert row["Train/gradient_norm"] > 0
    config = json.loads((workplace / "run" / "config.json").read_text())
    assert config["parameters"] / 1e6 == pytest.approx({"custom": 86}.get(name, 303), rel=0.02)
    assert (workplace / "run" / "checkpoint_final_00000001.pth").samefile(workplace / "run" / "checkpoint_00000001.pth")
    for file in (workplace / "run").glob("*.pth"):
        file.unlink()  # 4.9 GB
