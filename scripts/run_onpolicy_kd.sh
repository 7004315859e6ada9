#!/usr/bin/env bash
# 在策略蒸馏：学生自己写，带经验提示的教师逐词元打分。
# On-policy KD of Qwen3-8B on all GPUs. Flags override the configs; a --config of yours takes their place.
#
#   bash scripts/run_onpolicy_kd.sh --beta 0.5 --max_new_tokens 256 --out_dir out/onpolicy_exp1
#   bash scripts/run_onpolicy_kd.sh --config configs/onpolicy_tiny.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/launch.sh

launch train_onpolicy.py --config configs/base.yaml configs/onpolicy_kd.yaml "$@"
