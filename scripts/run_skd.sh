#!/usr/bin/env bash
# SKD：教师带经验提示，学生不带，逐词元对齐分布。
# SKD of Qwen3-8B on all GPUs. Flags override the configs; your --config replaces them.
#
#   bash scripts/run_skd.sh --learning_rate 5e-6 --out_dir out/skd_exp1
#   bash scripts/run_skd.sh --config configs/skd_tiny.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/launch.sh

launch train_distillation.py --config configs/base.yaml configs/skd.yaml "$@"
