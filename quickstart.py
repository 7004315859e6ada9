"""
一条命令：安装环境，生成数据，训练教师，蒸馏学生，列表比较。
One command: set up, generate the data, train a teacher, distil a student from it, compare them.

    python quickstart.py            four minutes on two cores; run it again to resume
    python quickstart.py --fresh    train everything again
    python quickstart.py --seeds 3  three students of each kind: mean and standard deviation
    python quickstart.py --moe      a mixture of experts (MoE) teaches a dense and an MoE student
    python quickstart.py --smoke    a few steps of everything, to check that it runs
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

sys.stdout.reconfigure(errors="replace")        # a console without Chinese characters
parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seeds", type=int, default=1)
for flag in ("--fresh", "--moe", "--smoke"):
    parser.add_argument(flag, action="store_true")
args = parser.parse_args()
os.chdir(Path(__file__).resolve().parent)
signal.signal(signal.SIGINT, lambda *_: None)       # Ctrl-C is the command's: it saves and stops

# 1. Environment
PYTHON = Path(".venv", "Scripts/python.exe" if os.name == "nt" else "bin/python").absolute()
os.environ |= {"OMP_NUM_THREADS": "1",  # one thread per process: two processes use two cores
               "USE_LIBUV": "0"}        # torchrun on Windows


def say(line: str):
    """In one piece: two threads print."""
    print(f"{line}\n", end="", flush=True)


def run(words: list[str], log: Path | None = None):
    """Print a command and run it in the environment. Ends the script if it fails.

    log: a file for what it prints, where another command has the terminal
    """
    say(shlex.join(words) + (f" >> {log}" if log else ""))
    python = {"python": [PYTHON], "torchrun": [PYTHON, "-m", "torch.distributed.run"]}
    output = log and log.open("a", encoding="utf-8")
    status = subprocess.Popen([*python[words[0]], *words[1:]], stdout=output, stderr=output).wait()
    if status:
        say("\n== stopped here; the same command continues")
        sys.exit(status if status > 0 else 128 - status)


if not PYTHON.exists():
    subprocess.run([sys.executable, "-m", "venv", ".venv"], check=True)
installed, needed = Path(".venv/.installed"), Path("requirements.txt")
if not installed.exists() or needed.stat().st_mtime > installed.stat().st_mtime:
    run("python -m pip install --quiet --disable-pip-version-check -r requirements.txt".split())
    installed.touch()

# 2. Sizes (a teacher of 0.87 M parameters, a student of 0.16 M) and numbers of training steps
out = "out" + "/smoke" * args.smoke + "/moe" * args.moe
data, _moe = "out/smoke/dataset" if args.smoke else "dataset", "_moe" * args.moe
teacher = ("--dim 128 --n_layers 4 --batch_size 24 --learning_rate 3e-3 --warmup_iters 20"
           + " --use_moe" * args.moe)
student = "--dim 64 --n_layers 2 --n_heads 4 --learning_rate 5e-3 --warmup_iters 20"
steps = {"teacher_pretrain": 150, "teacher_sft": 1250, "student_pretrain": 200, "student_sft": 200}
last = ""
if args.smoke:
    steps, last = dict.fromkeys(steps, 3), "--max_steps 3"
kinds = ["", _moe] if args.moe else [""]
done, began = Path(out, ".done"), time.time()
number_of, n_steps = count(1), 3 + 7 * len(kinds) * args.seeds + 2
if args.fresh:
    shutil.rmtree(done, ignore_errors=True)
done.mkdir(parents=True, exist_ok=True)


def heading(what: str):
    minutes = (time.time() - began) / 60
    say(f"\n== {next(number_of)} of {n_steps}, after {minutes:.1f} min: {what}")


def checksum(*files) -> str:
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def step(output: str, inputs: list[str], command: str, log: Path | None = None):
    """Run the command, unless OUTPUT exists unchanged and was made by this command from these
    inputs. An interrupted training run resumes, unless its settings have changed."""
    words = shlex.split(command)
    mark, key = done / output.replace("/", "_"), f"{shlex.join(words)} {checksum(*inputs)}"
    was = mark.read_text(encoding="utf-8") if mark.exists() else ""
    if Path(output).exists() and was == f"{key} {checksum(output)}":
        heading(f"{output} is up to date")
        return
    if not was.startswith(key):
        for path in Path(output).parent.glob(f"{Path(output).stem}.resume*"):
            path.unlink()
    mark.write_text(key, encoding="utf-8")
    heading(output)
    run(words, log)
    mark.write_text(f"{key} {checksum(output)}", encoding="utf-8")


both_cores = "torchrun --nproc_per_node 2 train_{}.py --ddp"
common = "--resume --max_seq_len 128 --eval_interval 0"

# 3. Data
step(f"{data}/sft_data.jsonl", ["dataset/miniworld.py"],
     f"python dataset/miniworld.py --out_dir {data} {'--smoke' * args.smoke}")

# 4. The teacher: pretrained on the world's text, then fine-tuned on 60,000 clean conversations
the_teacher, pretrained = f"{out}/full_sft_128{_moe}.pth", f"{out}/pretrain_128{_moe}.pth"
step(pretrained, [f"{data}/pretrain_data.jsonl"],
     f"{both_cores.format('pretrain')} {common} {teacher} --out_dir {out}"
     f" --data_path {data}/pretrain_data.jsonl --max_steps {steps['teacher_pretrain']}")
step(the_teacher, [pretrained, f"{data}/sft_teacher.jsonl"],
     f"{both_cores.format('sft')} {common} {teacher} --out_dir {out}"
     f" --data_path {data}/sft_teacher.jsonl --max_steps {steps['teacher_sft']}")

# 5. The students. Each is pretrained, then fine-tuned for 200 steps on a small set of
#    conversations with 30 % noisy labels. From this checkpoint two students train on the same data
#    for the same steps: SFT on the labels, distillation on the teacher's distribution. The same
#    with clean labels ("right labels"), for comparison, runs beside it on the other core.
def train_students(folder: str, rows: str, number: str, kind: str, log: Path | None = None):
    start = f"{folder}/full_sft_64{kind}.pth"
    step(start, [pretrained, rows],
         f"python train_sft.py {common} {student} --batch_size 48 {number} --out_dir {folder}"
         f" --data_path {rows} --weights {pretrained} --max_steps {steps['student_sft']}", log)
    step(f"{folder}/sft_alone/full_sft_64{kind}.pth", [start, rows],
         f"python train_sft.py {common} {number} --out_dir {folder}/sft_alone --data_path {rows}"
         f" --weights {start} --batch_size 24 --epochs 16 --learning_rate 5e-3 {last}", log)
    # The main job. For the models in out/ the script's defaults are the same hyperparameters.
    distil = "python train_distillation.py --batch_size 24 --resume"
    if folder + kind != "out":
        distil += (f" {number} --out_dir {folder} --data_path {rows} --size tiny"
                   f" --teacher {the_teacher} --student {start} {last}")
    step(f"{folder}/full_dist_64{kind}.pth", [the_teacher, start, rows], distil, log)


for seed in range(args.seeds, 0, -1):
    to, number = out if seed == 1 else f"{out}/seed{seed}", f"--seed {1336 + seed}"
    Path(to, "right").mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        pretrained = f"{to}/pretrain_64{kind}.pth"
        step(pretrained, [f"{data}/pretrain_data.jsonl"],
             f"{both_cores.format('pretrain')} {common} {student} --batch_size 24 {number}"
             f" {'--use_moe' if kind else ''} --out_dir {to}"
             f" --data_path {data}/pretrain_data.jsonl --max_steps {steps['student_pretrain']}")
        say(f"\n== {to} and, beside it, {to}/right with its lines in {to}/right/log.txt")
        with ThreadPoolExecutor() as pool:
            beside = pool.submit(train_students, f"{to}/right", f"{data}/sft_data_clean.jsonl",
                                 number, kind, Path(to, "right", "log.txt"))
            train_students(to, f"{data}/sft_data.jsonl", number, kind)
            beside.result()


# 6. Compare
def of_all_seeds(file: str) -> str:
    """That file of each seed, separated by commas."""
    return ",".join([f"{out}/{file}", *(f"{out}/seed{seed}/{file}"
                                        for seed in range(2, args.seeds + 1))])


models = [f"teacher={the_teacher}"]
for kind in kinds:
    for labels, folder in (("", ""), (", right labels", "right/")):
        models += [f"SFT{kind}{labels}={of_all_seeds(f'{folder}sft_alone/full_sft_64{kind}.pth')}",
                   f"distilled{kind}{labels}={of_all_seeds(f'{folder}full_dist_64{kind}.pth')}"]
heading(f"evaluating {len(models)} models")
tests = ["--data", *(f"{data}/{name}.jsonl" for name in ("test", "mcq_test", "test_habits"))]
run(["python", "scripts/evaluate.py", "--weights", *models, "--json", f"{out}/scores.json",
     "--report", f"{out}/report.md", *tests])
heading("the report card of the student")
run(["python", "scripts/report.py", "--teacher", models[0], "--student",
     *(f"distilled{kind}={out}/full_dist_64{kind}.pth" for kind in kinds),
     "--out", f"{out}/report_card.md", *tests])
scores = json.loads(Path(out, "scores.json").read_bytes())
sft, distilled = (scores[f"{name}{_moe}"][0]["exact_match"] for name in ("SFT", "distilled"))
with open(f"{out}/full_dist_64{_moe}.jsonl", encoding="utf-8") as rows:
    log = list(map(json.loads, rows))
ce, val_ce = ([f"{row[key]:.2f}" for row in log if key in row] for key in ("ce", "val_ce"))
print(f"""
What it shows: with 30 % of the labels wrong, SFT answers {sft:.1f} % of the test questions exactly,
the distilled student {distilled:.1f} %. Its loss on the correct labels of the validation data went
from {val_ce[0]} to {val_ce[-1]}, on the labels of the training data from {ce[0]} to {ce[-1]}.
The table is in {out}/report.md, the picture in {out}/report.png. Chat with the student:
    {PYTHON.relative_to(Path.cwd())} scripts/chat.py""")
