#!/usr/bin/env bash
# What docs/performance.md says about GPUs, in one command: the kernels' tests, the distance alone,
# and whole training steps at full size. Needs one GPU; liger-kernel is compared if it is installed.
#     tools/benchmark_gpu.sh [FOLDER]     tables (.md), numbers (.json) and pictures go there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-docs/results/performance/gpu}"
python="${PYTHON:-.venv/bin/python}"

if ! "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
    echo "error: torch finds no GPU here; for a CPU, see docs/performance.md." >&2
    exit 1
fi
mkdir -p "$folder"
"$python" -m pytest -q tests/losses/test_fused_triton.py tests/meta_arch/test_synchronisation.py

# The finest levels of Faster R-CNN and RetinaNet, 16 images of 800 x 1333.
for dtype in float32 float16 bfloat16; do
    "$python" tools/benchmark_distance.py --device cuda --dtype "$dtype" --mask \
        --shape 16 256 200 336 --shape 16 256 100 168 --shape 16 256 13 21 \
        --json "$folder/distance_$dtype.json" | tee "$folder/distance_$dtype.md"
done
for recipe in {faster_rcnn,retinanet,fcos}_R_{50,101}_FPN_1x; do
    "$python" tools/benchmark.py --device cuda --precision float16 --breakdown --inference \
        --image-size 800 1333 --batch 16 --objects 10 \
        --config-file configs/{Plain,LGD,SSSD,SSSD_efficient}/"$recipe.yaml" \
        --chart "$folder/$recipe.png" --json "$folder/$recipe.json" | tee "$folder/$recipe.md"
done
