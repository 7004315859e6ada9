"""
几个进程一起训练，代价有多大：每个进程的活儿相同，比一比各练各的时候慢多少。
The cost of data-parallel training: processes that train one model, beside independent ones.

one table           python -m benchmarks.ddp
more to send        python -m benchmarks.ddp --tokens 256 --accumulation 1
GPUs                python -m benchmarks.ddp --device cuda --processes 4 --tokens 16384

Wall-clock time counts, as a process that waits for others uses no CPU: run it on an idle machine
with as many cores as processes times threads. Gradients that differ from those of one process with
all the data stop the run. Li et al. 2020, "PyTorch Distributed", https://arxiv.org/abs/2006.15704.
"""

import json
import os
import socket
import statistics
import tempfile
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import ProcessExitedException, start_processes
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import (add_result_args, deviation, parse, table, with_ratios,
                                write_json)
from benchmarks.scaling import add_step_args, random_batch
from model.config import LMConfig
from model.transformer import Transformer
from runtime.args import checking_input, make_parser
from runtime.log import Clock, peak_above
from runtime.optim import parameter_groups
from runtime.precision import autocast, seed_everything
from runtime.processes import init_distributed_mode, parallelize, sync_gradients

START = "spawn"         # each process is a new one
Case = namedtuple("Case", "processes model vocab tokens length accumulation steps device dtype "
                  "threads")        # as the flags


def plain_ddp(model, world):
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model.to(world.device), device_ids=ids)


def sync_always(modules, is_last):
    return nullcontext()


class Form(NamedTuple):
    several: bool               # processes, or one
    together: bool              # whether they train one model
    wrap: object = parallelize  # (model, world) -> what the loop calls
    sync: object = sync_gradients
    summed: bool = True         # the loss times the processes: DDP averages, the step needs the sum
    all_data: bool = False      # one process with the data of all


FORMS = {
    "independent": Form(True, False),       # at the same time: all share the memory bandwidth
    "alone": Form(False, False),            # with the machine to itself
    "plain DDP": Form(True, True, plain_ddp, sync_always),      # after each micro-batch
    "ours": Form(True, True),               # once per step; gradients stay in the buckets
}
TRUTH = Form(False, False, all_data=True)


def measure(case: Case, form: Form, saved: Path | None) -> dict[str, list[float]]:
    """{"seconds": of each step, "peak": bytes of each process}. Gradients of the first step are
    `saved`. Raises ValueError where a process was killed."""
    n = case.processes if form.several else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_processes(work, (n, port, case, form, saved, Path(folder)), n, start_method=START)
        except ProcessExitedException as error:
            raise ValueError(f"{error}, most likely for lack of memory: {case}") from None
        found = [json.loads((Path(folder) / f"{rank}.json").read_bytes()) for rank in range(n)]
    # The mean over processes: how long one waits for another is part of the cost.
    steps = zip(*(each["seconds"] for each in found))
    return {"seconds": [statistics.mean(step) for step in steps],
            "peak": [each["peak"] for each in found]}


def work(rank: int, n: int, port: int, case: Case, form: Form, saved: Path | None, folder: Path):
    """One of n processes, as torchrun would start it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(case.threads)
    group = init_distributed_mode(True, case.device, dtype=case.dtype)
    world = group if form.together else group._replace(rank=0, size=1)
    seed_everything(0)
    model = Transformer(LMConfig(*case.model, vocab_size=case.vocab, max_seq_len=case.length))
    n_all, n_own = case.processes * case.accumulation, case.accumulation
    per_step = n_all if form.together or form.all_data else n_own
    numbers = range(n_all) if form.all_data else range(rank * n_own, (rank + 1) * n_own)
    batches = [random_batch(case.tokens // case.length, case.length, case.vocab, number, per_step)
               for number in numbers]
    clock, seconds = Clock(group.device), []
    with peak_above(group.device) as above:
        modules = {"model": form.wrap(model, world)}
        optimizer = torch.optim.AdamW(parameter_groups(modules, 0.1), lr=1e-4, fused=True)
        for step in range(1 if form.all_data else 1 + case.steps):
            dist.barrier()                                  # the independent start steps together
            start = clock.now()
            for batch in batches:
                batch, is_last = batch.to(world.device), batch is batches[-1]
                with autocast(world.device, world.dtype), form.sync(modules, is_last):
                    logits = modules["model"](batch.tokens, batch.lengths, at=batch.at).logits
                    ce = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
                loss = ce / batch.step_targets
                (loss * (world.size if form.summed else 1)).backward()
            if saved and step == rank == 0:
                torch.save({name: weight.grad for name, weight in model.named_parameters()}, saved)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(clock.now() - start)
    found = json.dumps({"seconds": seconds[1:], "peak": above()})
    (folder / f"{rank}.json").write_text(found, encoding="utf-8")
    dist.barrier()          # the first to leave would break the others' connections


COLUMNS = {"form": "{form}", "processes": "{processes}", "seconds": "{seconds:.3g}",
           "time / independent": "{time_ratio:.2f}", "tokens/s of all": "{tokens_per_s:,.0f}",
           "peak MB of each": "{peak_mb:,.0f}", "deviation": "{shown}"}


def rows_of(case: Case, repeats: int) -> list[dict]:
    """A row for each form. Raises ValueError where a gradient is wrong."""
    measured, deviations = {name: [] for name in FORMS}, {}
    with tempfile.TemporaryDirectory() as folder:
        truth, saved = Path(folder) / "truth.pt", Path(folder) / "saved.pt"
        measure(case, TRUTH, truth)
        for repeat in range(repeats):
            for name, form in FORMS.items():
                checked = form.together and repeat == 0
                measured[name].append(measure(case, form, saved if checked else None))
                if checked:
                    deviations[name] = deviation(name, saved, "one process with all data", truth)
    figures = {name: {figure: statistics.median(each for run in runs for each in run[figure])
                      for figure in ("seconds", "peak")} for name, runs in measured.items()}
    rows = with_ratios(figures)
    for row in rows:
        name = row["form"]
        row["processes"] = case.processes if FORMS[name].several else 1
        row["tokens_per_s"] = case.tokens * case.accumulation * row["processes"] / row["seconds"]
        row["deviation"] = deviations.get(name)
        row["shown"] = f"{deviations[name]:.1g}" if name in deviations else ""
    return rows


def main(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--processes", type=int, default=2, help="2 or more; on GPUs one each")
    add_step_args(parser, model=(512, 8), tokens=512, steps=3)
    add("--accumulation", type=int, default=4, help="micro-batches per step and process")
    add_result_args(parser)
    args = parse(parser, argv, "model", "vocab", "tokens", "length", "accumulation", "steps")
    if args.processes < 2:
        parser.error(f"--processes {args.processes} must be 2 or more")
    if args.tokens % args.length:
        parser.error(f"--tokens {args.tokens} is not a multiple of --length {args.length}")
    if args.device not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: cpu or cuda; each process takes a GPU of its own")
    if args.device == "cuda" and torch.cuda.device_count() < args.processes:
        parser.error(f"--processes {args.processes}: there are {torch.cuda.device_count()} GPUs")
    with checking_input():
        rows = rows_of(Case(*(vars(args)[field] for field in Case._fields)), args.repeats)
    print(f"{args.model[0]} x {args.model[1]}; per step and process {args.accumulation} "
          f"micro-batches of {args.tokens:,} tokens; {args.dtype}, {args.device}, threads of each: "
          f"{args.threads}\n\n{table(rows, COLUMNS)}\n\n"
          f"seconds: wall-clock time of a step, median of {args.steps} in {args.repeats} runs;\n"
          "peak: above the weights; deviation: relative, the largest of all gradients of a step")
    write_json(args, rows)


if __name__ == "__main__":
    main()
