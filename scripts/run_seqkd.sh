#!/usr/bin/env bash
# SeqKD：带经验提示的教师先写出答案，学生再在不带经验的问题上做 SFT。
# SeqKD of Qwen3-8B on all GPUs: the teacher generates the answers, unless the file exists, and the
# student is fine-tuned on them. Flags are train_sft.py's and override the configs; your --config
# replaces them. --temperature, --top_p, --top_k, --max_new_tokens and --num_samples are those of
# scripts/generate_answers.py. Variables with their defaults:
#
#   TEACHER       Qwen3-8B                  weights of the teacher
#   QUESTIONS     alfworld_student.jsonl    questions as the student reads them
#   TOLD          alfworld_teacher.jsonl    the same rows with the experience, for the teacher
#   ANSWERS       alfworld_answers.jsonl    file of the answers
#   REPLAY                                  further training files, against forgetting
#
#   bash scripts/run_seqkd.sh --learning_rate 5e-6 --out_dir out/seqkd_exp1
#   TEACHER=out/experience/full_sft_96.pth QUESTIONS=dataset/experience_student.jsonl \
#       TOLD=dataset/experience_teacher.jsonl ANSWERS=out/experience/answers.jsonl \
#       REPLAY=dataset/experience_replay.jsonl \
#       bash scripts/run_seqkd.sh --config configs/seqkd_tiny.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/launch.sh

answers=${ANSWERS:-alfworld_answers.jsonl} sampling=() training=()
while [ $# -gt 0 ]; do
    case $1 in
        --temperature | --top_p | --top_k | --max_new_tokens | --num_samples)
            sampling+=("$1" "${2:?is the value of $1}"); shift ;;
        *) training+=("$1") ;;
    esac
    shift
done
if [ -e "$answers" ]; then
    echo "the answers exist: $answers${sampling[0]:+; remove them for other ${sampling[*]}}"
else
    launch scripts/generate_answers.py --teacher "${TEACHER:-Qwen3-8B}" \
        --data_path "${QUESTIONS:-alfworld_student.jsonl}" \
        --teacher_data_path "${TOLD:-alfworld_teacher.jsonl}" --out "$answers" \
        ${sampling[@]+"${sampling[@]}"}
fi

# REPLAY without quotes: each file becomes an argument of its own.
# shellcheck disable=SC2086
launch train_sft.py --config configs/base.yaml configs/seqkd.yaml \
    --data_path "$answers" ${REPLAY:-} ${training[@]+"${training[@]}"}
