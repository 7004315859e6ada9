#!/usr/bin/env bash
# SeqKD：带经验提示的教师先写出答案，学生再在不带经验的问题上做 SFT。
# SeqKD of Qwen3-8B on all GPUs: the teacher writes the answers, unless they are there, and the student is fine-tuned on them.
# Flags are train_sft.py's and override the configs; a --config of yours takes their place. The teacher's side is given by
#
#   TEACHER       Qwen3-8B                  who answers
#   QUESTIONS     alfworld_student.jsonl    what the student will be asked
#   TOLD          alfworld_teacher.jsonl    the same rows as the teacher reads them, with the experience
#   ANSWERS       alfworld_answers.jsonl    where the answers lie, or are written
#   REPLAY                                  files that the student learns beside the answers, against forgetting
#
#   bash scripts/run_seqkd.sh --learning_rate 5e-6 --out_dir out/seqkd_exp1
#   TEACHER=out/experience/full_sft_96.pth QUESTIONS=dataset/experience_student.jsonl TOLD=dataset/experience_teacher.jsonl \
#       ANSWERS=out/experience/answers.jsonl REPLAY=dataset/experience_replay.jsonl \
#       bash scripts/run_seqkd.sh --config configs/seqkd_tiny.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/launch.sh

answers=${ANSWERS:-alfworld_answers.jsonl}
if [ -e "$answers" ]; then
    echo "the answers are there: $answers"
else
    launch scripts/generate_answers.py --teacher "${TEACHER:-Qwen3-8B}" --data_path "${QUESTIONS:-alfworld_student.jsonl}" \
        --teacher_data_path "${TOLD:-alfworld_teacher.jsonl}" --out "$answers"
fi

# REPLAY goes without quotes: a word for each file, none if there is none.
# shellcheck disable=SC2086
launch train_sft.py --config configs/base.yaml configs/seqkd.yaml --data_path "$answers" ${REPLAY:-} "$@"
