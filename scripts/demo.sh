#!/bin/sh
# The whole way on invented patients: DICOM -> store -> trained encoder -> verdict -> pictures.
set -eu
data=data/phantom
run=outputs/demo/$(date +%Y%m%d_%H%M%S)

echo "== 1. prepare: phantom DICOM into $data"
dinoct-prepare source=phantom data.root="$data" phantom.patients=24 phantom.slices=32 split.val_fraction=0.25
echo "== 2. train: $run"
dinoct-train experiment=demo data.root="$data" run_dir="$run"
checkpoint=$(ls "$run"/checkpoint_final_*.pth)
echo "== 3. monitor"
dinoct-monitor checkpoint="$checkpoint" out="$run/monitor"
echo "== 4. evaluate on patients that it never saw"
dinoct-eval checkpoint="$checkpoint"
echo "pictures: $run/monitor/*.png"
