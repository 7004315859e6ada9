#!/usr/bin/env bash
# 一条命令：安装环境，生成数据，训练教师，蒸馏学生，列表比较。
# One command: set up, generate the data, train a teacher, distil a student from it, compare them.
#
#   bash quickstart.sh            about ten minutes on two cores; run it again to resume
#   bash quickstart.sh --fresh    delete what was trained here and start again
#   bash quickstart.sh --seeds 3  three students of each kind: mean and standard deviation
#   bash quickstart.sh --moe      the teacher is a mixture of experts (MoE), with a dense and an MoE student
#   bash quickstart.sh --smoke    a few steps of everything, to check that it runs
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

# 2. Sizes (a teacher of 0.87 M parameters, a student of 0.16 M) and numbers of training steps
out=out${smoke:+/smoke}${moe:+/moe} data=${smoke:+out/smoke/}dataset _moe=${moe:+_moe}
teacher="--dim 128 --n_layers 4 --batch_size 24 --learning_rate 3e-3 --warmup_iters 20 ${moe:+--use_moe}"
student="--dim 64 --n_layers 2 --n_heads 4 --batch_size 24 --learning_rate 3e-3 --warmup_iters 20"
teacher_pretrain=300 teacher_sft=2400 student_pretrain=300 student_sft=300 last=""
if [ $smoke ]; then teacher_pretrain=3 teacher_sft=3 student_pretrain=3 student_sft=3 last="--max_steps 3"; fi
if [ $fresh ]; then rm -rf "$out"/.done "$out"/*.pth "$out"/*.resume* "$out"/{sft_alone,right,seed*}; fi
mkdir -p "$out/.done"

# step OUTPUT "INPUT ..." COMMAND ...: run the command, unless OUTPUT exists unchanged and was made by
# this command from these inputs. An interrupted training run resumes, unless its settings have changed.
step() {
    local output=$1 inputs=$2; shift 2
    local mark="$out/.done/${output//\//_}" key
    # shellcheck disable=SC2086
    key=$({ echo "$@"; cat $inputs; } | cksum)
    if [ -e "$output" ] && [ "$(cat "$mark" 2>/dev/null)" = "$key $(cksum < "$output")" ]; then
        echo "== $output is up to date"
        return
    fi
    if [ "$(cat "$mark.begun" 2>/dev/null)" != "$key" ]; then rm -f "${output%.pth}".resume*; fi
    echo "$key" > "$mark.begun"
    printf '\n== %s\n%s\n' "$output" "$*"
    "$@"
    echo "$key $(cksum < "$output")" > "$mark"
}

export OMP_NUM_THREADS=1        # one thread per process: two processes already use two cores
run="torchrun --nproc_per_node 2"
common="--ddp --resume --max_seq_len 128 --eval_interval 0"

# 3. Data
step $data/sft_data.jsonl dataset/miniworld.py python dataset/miniworld.py --out_dir $data ${smoke:+--smoke}

# 4. The teacher: pretrained on the world's text, then fine-tuned on 60,000 clean conversations
the_teacher=$out/full_sft_128$_moe.pth
step $out/pretrain_128$_moe.pth $data/pretrain_data.jsonl \
    $run train_pretrain.py $common $teacher --out_dir $out --data_path $data/pretrain_data.jsonl \
    --max_steps $teacher_pretrain
step $the_teacher "$out/pretrain_128$_moe.pth $data/sft_teacher.jsonl" \
    $run train_sft.py $common $teacher --out_dir $out --data_path $data/sft_teacher.jsonl --max_steps $teacher_sft

# 5. The students. Each is pretrained, then fine-tuned for 300 steps on a small set of conversations
#    with 30 % noisy labels. From this checkpoint two students train on the same data for the same
#    steps: SFT on the labels, distillation on the teacher's distribution. The same with clean labels
#    ("right labels") comes first, for comparison.
for ((seed = seeds; seed >= 1; seed--)); do
    to=$out number="--seed $((1336 + seed))"
    if [ "$seed" -gt 1 ]; then to=$out/seed$seed; fi
    for kind in "" $_moe; do
        pretrained=$to/pretrain_64$kind.pth
        step $pretrained $data/pretrain_data.jsonl \
            $run train_pretrain.py $common $student ${kind:+--use_moe} $number --out_dir $to \
            --data_path $data/pretrain_data.jsonl --max_steps $student_pretrain

        for labels in right noisy; do
            there=$to rows=$data/sft_data.jsonl
            if [ $labels = right ]; then there=$to/right rows=$data/sft_data_clean.jsonl; fi
            start=$there/full_sft_64$kind.pth
            step $start "$pretrained $rows" \
                $run train_sft.py $common $student $number --out_dir $there --data_path $rows \
                --weights $pretrained --max_steps $student_sft
            step $there/sft_alone/full_sft_64$kind.pth "$start $rows" \
                $run train_sft.py $common $number --out_dir $there/sft_alone --data_path $rows \
                --weights $start --batch_size 12 --epochs 16 --learning_rate 5e-3 $last

            # The main job. For the models in out/ the script's defaults are the same hyperparameters.
            distil="$run train_distillation.py --ddp"
            if [ $there$kind != out ]; then
                distil="$distil --resume $number --out_dir $there --data_path $rows --size tiny"
                distil="$distil --teacher $the_teacher --student $start $last"
            fi
            step $there/full_dist_64$kind.pth "$the_teacher $start $rows" $distil
        done
    done
done

# 6. Compare
of_all_seeds() {  # FILE -> that file of each seed, separated by commas
    printf %s "$out/$1"
    for ((seed = 2; seed <= seeds; seed++)); do printf %s ",$out/seed$seed/$1"; done
}
models=("teacher=$the_teacher")
for kind in "" $_moe; do
    models+=("SFT$kind=$(of_all_seeds sft_alone/full_sft_64$kind.pth)")
    models+=("distilled$kind=$(of_all_seeds full_dist_64$kind.pth)")
    models+=("SFT$kind, right labels=$(of_all_seeds right/sft_alone/full_sft_64$kind.pth)")
    models+=("distilled$kind, right labels=$(of_all_seeds right/full_dist_64$kind.pth)")
done
printf '\n== evaluating %s models\n' ${#models[@]}
python scripts/evaluate.py --weights "${models[@]}" --json $out/scores.json --report $out/report.md \
    --data $data/test.jsonl $data/mcq_test.jsonl $data/test_habits.jsonl
echo
echo "The table is in $out/report.md, the picture in $out/report.png. Chat with the student: python scripts/chat.py"
