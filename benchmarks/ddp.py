"""
几个进程一起训练，代价有多大：每个进程的活儿相同，比一比各练各的时候慢多少。
What it costs that several processes train together: each has the same work, beside the same processes not speaking.

    not speaking    each trains alone, on its own data, at the same time as the others: all share the memory's bandwidth
    alone           one process, and the machine to itself
    plain DDP       gradients travel after each micro-batch, in buckets: copied into them, and back
    Run     as all scripts do it: they travel once a step (no_sync), and stay in the buckets (gradient_as_bucket_view)

one table           python -m benchmarks.ddp
more to send        python -m benchmarks.ddp --tokens 256 --accumulation 1
a picture           python -m benchmarks.ddp --picture ddp.png --json ddp.json
GPUs                python -m benchmarks.ddp --device cuda --processes 4 --tokens 16384 --dtype bfloat16

Li et al. 2020, "PyTorch Distributed", https://arxiv.org/abs/2006.15704, Sec. 3.2 (buckets, overlap, no_sync).

The clock on the wall counts here: who waits for the others works nothing, and yet it takes time. So run it on an idle
machine, with at least as many cores as processes times threads. Gradients that are not those of one process with all the
data stop the run.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, start_processes
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import PAGE, add_result_args, check_result_args, deviation, peak, reset_peak, write_results
from benchmarks.scaling import RandomSamples, run_args, silent_run, width_and_layers
from dataset.lm_dataset import MicroBatches
from model.config import LMConfig
from model.transformer import Transformer
from train_sft import train_epoch
from runtime.log import Clock
from runtime.precision import seed_everything
from runtime.processes import init_distributed_mode
from runtime.run import Run

START = "spawn"         # each process is a new one


# --------------------------------------------------------------------------------------------------------- the forms


class Ours(Run):
    """A run that leaves the gradient of its first step in a file. (A copy in memory would be a part of the peak.)"""

    saved = None

    def update(self, step):
        if self.saved and step == 0:
            torch.save({name: weight.grad for name, weight in self.modules["model"].named_parameters()}, self.saved)
        return super().update(step)


class Plain(Ours):
    """DDP as the first page about it has it."""

    def wrap(self, module):
        ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=False)

    def forward(self, last):
        return super().forward(last=True)


class Form(NamedTuple):
    several: bool           # processes, or one
    speaking: bool
    run: type[Run]
    all_data: bool = False  # one process with what the others would have had


FORMS = {
    "not speaking": Form(True, False, Ours),
    "alone": Form(False, False, Ours),
    "plain DDP": Form(True, True, Plain),
    "Run": Form(True, True, Ours),
}
TRUTH = Form(False, False, Ours, all_data=True)


# --------------------------------------------------------------------------------------------------- one measurement


class Case(NamedTuple):
    processes: int
    model: tuple[int, int]      # width and layers
    vocab: int
    tokens: int                 # of a micro-batch
    length: int                 # of a sample, tokens
    accumulation: int           # micro-batches of a step and process
    steps: int                  # timed, after one that is not
    device: str
    dtype: str
    threads: int


def measure(case: Case, form: Form, saved: Path | None) -> dict[str, list[float]]:
    """{"seconds": of each step, "peak": bytes of each process}. Gradients of the first step are `saved`.

    Raises MemoryError where a process was killed.
    """
    n = case.processes if form.several else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_processes(work, (n, port, case, form, saved, Path(folder)), n, start_method=START)
        except ProcessExitedException as error:
            raise MemoryError(f"{error}, most likely for its memory: {case}. Take a smaller case") from None
        told = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(n)]
    # The mean over processes: those that speak wait for each other and take the same time; how long one waits for another
    # is a part of the price, and not of what each takes by itself.
    return {"seconds": [statistics.mean(step) for step in zip(*(each["seconds"] for each in told))],
            "peak": [each["peak"] for each in told]}


def work(rank: int, n: int, port: int, case: Case, form: Form, saved: Path | None, folder: Path):
    """One of n processes, as torchrun would have started it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(case.threads)
    args = run_args(device=case.device, dtype=case.dtype, ddp=True)
    group = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)             # those that do not speak begin each step together
    world = group if form.speaking else group._replace(rank=0, size=1)
    seed_everything(0)
    model = Transformer(LMConfig(*case.model, vocab_size=case.vocab, max_seq_len=case.length)).train()

    reset_peak(group.device)
    before = peak(group.device)
    batch_size = case.tokens // case.length
    samples = RandomSamples(batch_size * case.accumulation * case.processes, case.length, case.vocab)
    # Each has its hand of the samples that all together would have. One process with all of them has all hands.
    data = (MicroBatches(samples, batch_size, case.accumulation * case.processes) if form.all_data else
            MicroBatches(samples, batch_size, case.accumulation, rank, case.processes))
    run = silent_run(form.run, args, world, model, data)
    run.saved = saved if rank == 0 else None
    clock, seconds = Clock(group.device), []
    for epoch in range(1 if form.all_data else 1 + case.steps):         # of one step each
        dist.barrier()
        start = clock.now()
        train_epoch(epoch, None, run, model, None, None)
        seconds.append(clock.now() - start)
    told = {"seconds": seconds[1:], "peak": max(PAGE, peak(group.device) - before)}
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.barrier()          # the first to leave would tear the others' connections


# --------------------------------------------------------------------------------------------------------------- results


def rows_of(case: Case, repeats: int) -> list[dict]:
    """A row for each form. Raises ValueError where a gradient is wrong."""
    measured, deviations = {name: [] for name in FORMS}, {}
    with tempfile.TemporaryDirectory() as folder:
        truth, saved = Path(folder) / "truth.pt", Path(folder) / "saved.pt"
        measure(case, TRUTH, truth)
        for repeat in range(repeats):
            for name, form in FORMS.items():
                checked = form.speaking and repeat == 0
                measured[name].append(measure(case, form, saved if checked else None))
                if checked:
                    deviations[name] = deviation(name, saved, "one process with all data", truth)
    seconds = {name: statistics.median(step for run in runs for step in run["seconds"]) for name, runs in measured.items()}
    peaks = {name: statistics.median(each for run in runs for each in run["peak"]) for name, runs in measured.items()}
    first, tokens = next(iter(FORMS)), case.tokens * case.accumulation
    return [{"group": f"{case.processes} processes", "form": name, "processes": case.processes if form.several else 1,
             "seconds": seconds[name], "time_ratio": seconds[name] / seconds[first],
             "tokens_per_s": tokens * (case.processes if form.several else 1) / seconds[name],
             "peak_mb": peaks[name] / 2 ** 20, "peak_ratio": peaks[name] / peaks[first],
             "deviation": deviations.get(name)} for name, form in FORMS.items()]


def table(rows) -> str:
    lines = ["| form | processes | seconds | time / not speaking | tokens/s of all | peak MB of each | deviation |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    return "\n".join(lines + [
        f"| {row['form']} | {row['processes']} | {row['seconds']:.3g} | {row['time_ratio']:.2f} | {row['tokens_per_s']:,.0f} "
        f"| {row['peak_mb']:,.0f} | {'' if row['deviation'] is None else format(row['deviation'], '.1g')} |" for row in rows])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--processes", type=int, default=2, help="2 or more; on GPUs one each")
    add("--model", type=width_and_layers, default=(512, 8), metavar="WIDTHxLAYERS", help="what is trained")
    add("--vocab", type=int, default=6400, help="vocabulary size, words")
    add("--tokens", type=int, default=512, help="of a micro-batch and process, a multiple of --length")
    add("--length", type=int, default=256, help="tokens of a sample")
    add("--accumulation", type=int, default=4, help="micro-batches of a step and process")
    add("--steps", type=int, default=3, help="steps timed in each run, after one that is not; the median counts")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the matrix products; gradients travel in fp32")
    add_result_args(parser)
    args = parser.parse_args(argv)
    check_result_args(parser, args)
    if min(args.processes - 1, *args.model, args.vocab, args.tokens, args.length, args.accumulation, args.steps) < 1:
        parser.error("--model, --vocab, --tokens, --length, --accumulation and --steps are counts: 1 or more; --processes: 2 "
                     "or more")
    if args.tokens % args.length:
        parser.error(f"--tokens {args.tokens} are not whole samples of --length {args.length}")
    if args.device not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: cpu or cuda; each process takes a GPU of its own")
    if args.device == "cuda" and torch.cuda.device_count() < args.processes:
        parser.error(f"--processes {args.processes} need a GPU each; here are {torch.cuda.device_count()}")
    case = Case(args.processes, args.model, args.vocab, args.tokens, args.length, args.accumulation, args.steps, args.device,
                args.dtype, args.threads)
    try:
        parameters = Transformer(LMConfig(*case.model, vocab_size=case.vocab)).n_parameters()
        rows = rows_of(case, args.repeats)
    except (ValueError, MemoryError) as error:
        sys.exit(str(error))

    setting = (f"{args.model[0]} x {args.model[1]}, {parameters / 1e6:.1f} M parameters; per step and process {args.accumulation} "
               f"micro-batches of {args.tokens:,} tokens; {args.dtype}, "
               + (f"gloo, threads of each: {args.threads}" if args.device == "cpu" else "nccl"))
    print(f"{setting}\n\n{table(rows)}\n")
    print(f"seconds: on the clock, of a step, median of {args.steps} in each of {args.repeats} runs; peak: above the weights, "
          "PyTorch's own code included;\ndeviation: relative, the largest of all gradients of a step, from those of one process "
          "with all data")
    write_results(args, rows, setting, {"time_ratio": "time of a step / that of processes not speaking"})


if __name__ == "__main__":
    main()
