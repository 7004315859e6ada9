#!/usr/bin/env bash
# 在策略蒸馏：学生自己采样回答，带经验提示的教师逐词元给出分布。
# On-policy KD of Qwen3-8B on all GPUs. Flags override the configs; your --config replaces them.
#
#   bash scripts/run_onpolicy_kd.sh --beta 0.5 --max_new_tokens 256 --out_dir out/onpolicy_exp1
#   bash scripts/run_onpolicy_kd.sh --config configs/onpolicy_tiny.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/launch.sh

launch train_onpolicy.py --config configs/base.yaml configs/onpolicy_kd.yaml "$@"
