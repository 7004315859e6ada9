#!/usr/bin/env bash
# 一条命令：装好环境，生成数据，训练教师，蒸馏学生，列表比较。
# One command: set up, generate the data, train a teacher, distil a student from it, and show what it bought.
#
#   bash quickstart.sh            about ten minutes on two cores; run again, it goes on where it stopped
#   bash quickstart.sh --fresh    forget what was trained here and start over
#   bash quickstart.sh --seeds 3  three students of each kind: mean and spread
#   bash quickstart.sh --moe      the teacher is a mixture of experts; a dense and a MoE student learn from it
#   bash quickstart.sh --smoke    a few steps of everything, to see that it runs
set -euo pipefail
cd "$(dirname "$0")"

seeds=1 fresh="" moe="" smoke=""
while [ $# -gt 0 ]; do
    case $1 in
        --seeds) seeds=${2:?--seeds needs a number}; shift ;;
        --fresh) fresh=1 ;;
        --moe)   moe=1 ;;
        --smoke) smoke=1 ;;
        *) echo "unknown option $1; known: --seeds N --fresh --moe --smoke" >&2; exit 2 ;;
    esac
    shift
done

# 1. Environment
[ -x .venv/bin/python ] || python3 -m venv .venv
if [ ! -e .venv/.installed ] || [ requirements.txt -nt .venv/.installed ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    touch .venv/.installed
fi
source .venv/bin/activate

# 2. Sizes. A tiny teacher has about 0.9 M parameters, a tiny student 0.16 M.
data=dataset out=out
teacher_pretrain=400 teacher_sft=2400 student_pretrain=300 student_sft=300 student_steps=1200
if [ $smoke ]; then
    data=out/smoke/data out=out/smoke
    teacher_pretrain=3 teacher_sft=3 student_pretrain=3 student_sft=3 student_steps=3
fi
if [ $fresh ]; then rm -rf "$out"/.done "$out"/*.resume* "$out"/*.pth "$out"/seed*; fi
mkdir -p "$out/.done"

# step OUTPUT "INPUT ..." COMMAND ...: run the command, unless OUTPUT is there, unchanged, and was made by the same
# command from the same inputs. A training run that was interrupted goes on (--resume); one of other settings does not.
step() {
    local output=$1 inputs=$2 mark key; shift 2
    mark="$out/.done/${output//\//_}"
    # shellcheck disable=SC2086
    key=$({ echo "$@"; cat $inputs; } | sha256sum | cut -c1-64)
    if [ -e "$output" ] && [ "$(cat "$mark" 2>/dev/null)" = "$key $(sha256sum < "$output")" ]; then
        echo "== $output is up to date"
        return
    fi
    if [ "$(cat "$mark.started" 2>/dev/null)" != "$key" ]; then rm -f "${output%.pth}".resume*; fi
    echo "$key" > "$mark.started"
    echo; echo "== $output: $*"
    "$@"
    echo "$key $(sha256sum < "$output")" > "$mark"
}

run="torchrun --nproc_per_node 2"
common="--ddp --resume --max_seq_len 128 --batch_size 24 --warmup_iters 20 --learning_rate 3e-3"
teacher="--dim 128 --n_layers 4"
student="--dim 64 --n_layers 2 --n_heads 4"
T=$out/full_sft_128.pth
if [ $moe ]; then teacher="$teacher --use_moe"; T=$out/full_sft_128_moe.pth; fi

# 3. Data
step $data/sft_data.jsonl dataset/miniworld.py python dataset/miniworld.py --out_dir $data ${smoke:+--smoke}

# 4. The teacher: pretrained on the world's text, fine-tuned on plenty of clean conversations
step ${T/full_sft/pretrain} "$data/pretrain_data.jsonl" $run train_pretrain.py $common $teacher \
    --out_dir $out --data_path $data/pretrain_data.jsonl --max_steps $teacher_pretrain
step $T "${T/full_sft/pretrain} $data/sft_teacher.jsonl" $run train_sft.py $common $teacher \
    --out_dir $out --data_path $data/sft_teacher.jsonl --max_steps $teacher_sft

