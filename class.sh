#!/usr/bin/env bash
# 上课用：几秒钟就把训练好的小模型放进 out/，人人从同一处开始；几个小组可以共用一台机器。
# For a class: trained models in out/ in seconds, so that all start at the same point; several
# groups can share a machine.
#
#     bash class.sh reset           out/ as after quickstart.py; what was there moves to out.1, out.2, ...
#     bash class.sh group blue      a copy of the repo in groups/blue, with an out/ of its own
#     bash class.sh pack            the teacher's computer: the models in out/ become those of model/tiny
set -euo pipefail
cd "$(dirname "$0")"
python=python3; [ -x .venv/bin/python ] && python=.venv/bin/python
models=(full_sft_128 full_sft_64 full_dist_64 sft_alone/full_sft_64)     # teacher, start, distilled, SFT

shopt -s dotglob nullglob

reset() {
    old=()
    for path in out/*; do
        [ "$path" = out/README.md ] || old+=("$path")
    done
    if [ ${#old[@]} -gt 0 ]; then
        n=1
        while [ -e "out.$n" ]; do n=$((n + 1)); done
        mkdir "out.$n"
        mv "${old[@]}" "out.$n"
        echo "what was in out/ is now in out.$n"
    fi
    cp -r model/tiny/. out/
    [ -e dataset/test.jsonl ] || "$python" dataset/miniworld.py > /dev/null
    echo "out/ has the teacher, the student's start, the distilled and the fine-tuned student"
}

case "${1:-}" in
reset) reset ;;
group)
    [[ "${2:-}" =~ ^[A-Za-z0-9_-]+$ ]] || { echo "bash class.sh group NAME" >&2; exit 1; }
    [ "$(git rev-parse --show-prefix)" = "" ] || { echo "run it in the repo, not in a group" >&2; exit 1; }
    [ ! -e "groups/$2" ] || { echo "groups/$2 exists already" >&2; exit 1; }
    mkdir -p "groups/$2/dataset"
    git ls-files -z | tar --null -T - -c | tar -x -C "groups/$2"
    ln -s "$PWD/.venv" "groups/$2/.venv"
    for file in dataset/*.jsonl; do cp "$file" "groups/$2/dataset/"; done
    bash "groups/$2/class.sh" reset
    echo "cd groups/$2; run long commands with nice, and serve with --port 0, which finds a free port"
    ;;
pack)
    for name in "${models[@]}"; do
        "$python" scripts/convert.py --weights "out/$name.pth" --dtype bfloat16 --out "model/tiny/$name.pth"
    done
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 1
    ;;
esac
