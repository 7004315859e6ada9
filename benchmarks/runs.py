"""
各方法的对比：在自己的进程里跑脚本，计处理器时间；几个种子的结果排成一张表；许多次运行，各只做一遍。
What the comparisons of methods share: a script of the repo in a process of its own, and a table over several seeds; many
scripts, a few at a time, each once and for all.
"""

import functools
import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from runtime.files import file_sha256
from runtime.files import read_lines, write_atomic
from runtime.log import Logger

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, flags: str) -> float:
    """A script of the repo, in a process of its own. Returns the processor's seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, script, *flags.split()]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\n{ended.stdout}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(results: dict[str, list[dict]], columns) -> str:
    """Markdown: a line per method, of whose seeds each has these figures; mean ± standard deviation over the seeds. Steps and
    seconds are whole numbers without a spread; a figure that a method does not have is left empty."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, seeds in results.items():
        cells = []
        for column in columns:
            values = [seed[column] for seed in seeds if column in seed]
            if not values or column in ("steps", "seconds"):
                cells.append(f"{statistics.mean(values):.0f}" if values else "")
            else:
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(out: Path, results: dict[str, list[dict]], columns):
    """Print the table, and write it as table.md, with all figures in table.json."""
    text = table(results, columns)
    print(text)
    write_atomic(ROOT / out / "table.md", lambda file: file.write(f"{text}\n".encode()))
    write_atomic(ROOT / out / "table.json", lambda file: file.write(json.dumps(results, indent=2).encode()))


# ------------------------------------------------------------------------------- many runs, each of them once and for all

OUT = "<out>"           # in a job's command: the folder of its own that all it makes goes into


class Job(NamedTuple):
    """A command to be run: `scripts/evaluate.py --weights out/full_sft_64.pth --json <out>/scores.json`."""

    name: str           # in the log
    command: str
    makes: str          # the file that it is run for, such as <out>/scores.json
    work: float = 1.0   # how long it takes beside the others, in any unit: of the time left


class Jobs:
    """Runs jobs, several at a time, each with one thread in a process of its own. What is done stays done:

    FOLDER/trials.jsonl     a line for each job that came to its end: {key, name, command, made, seconds, peak_mb}
    FOLDER/trials/NAME-KEY  its files, and log.txt

    The key is a checksum of the command and of the files that it names, so that another command, or another teacher under the
    same name, is another job. Seconds are those of the processor, the job's own children among them; peak_mb is the most
    memory that one of its processes held.

        with Jobs(folder, processes=2, n_jobs=3, work=3) as jobs:
            jobs.run([first, second])       -> their lines of trials.jsonl. Any number of threads may call it.

    n_jobs, work    of all that is to come, for the time left

    A job that fails exits with the end of its log. At whatever ends the block too early, the children are ended, as Ctrl-C would
    end them, or killed if they have not after twenty seconds.
    """

    def __init__(self, folder: Path, processes: int, n_jobs: int, work: float):
        self.folder, self.n_jobs, self.work_left = folder, n_jobs, work
        self.ledger = ROOT / folder / "trials.jsonl"
        self.records = {record["key"]: record for record in map(json.loads, read_lines(self.ledger))}
        self.n_done, self.work_done, self.start = 0, 0.0, time.monotonic()
        self.pool, self.lock = ThreadPoolExecutor(processes), threading.RLock()
        self.futures, self.children, self.stopping = {}, set(), False
        self.bar = tqdm(total=n_jobs, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.lock:
            self.stopping = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + 20
        self.send(signal.SIGTERM)
        while self.children and time.monotonic() < end:
            time.sleep(0.02)
        self.send(signal.SIGKILL)
        self.pool.shutdown()
        self.bar.close()

    def send(self, number: int):
        with self.lock:
            for pid in self.children:
                os.kill(pid, number)

    def run(self, jobs: list[Job]) -> list[dict]:
        """Their lines of trials.jsonl, in the order of `jobs`, when all are done. The same job is never run twice."""
        futures = []
        for job in jobs:
            key = key_of(job)
            with self.lock:
                if key not in self.futures:
                    self.futures[key] = self.pool.submit(self.once, key, job)
                futures.append(self.futures[key])
        return [future.result() for future in futures]

    def once(self, key: str, job: Job) -> dict:
        if key not in self.records or not (ROOT / self.records[key]["made"]).exists():
            self.do(key, job)
        with self.lock:
            self.n_done += 1
            self.work_left -= job.work
            self.bar.update()
        return self.records[key]

    def do(self, key: str, job: Job):
        folder = self.folder / "trials" / f"{re.sub(r'[^a-z0-9.]+', '_', job.name.lower())}-{key}"
        made, command = (text.replace(OUT, str(folder)) for text in (job.makes, job.command))
        shutil.rmtree(ROOT / folder, ignore_errors=True)        # of a run that was broken off: its seconds would not be whole
        (ROOT / folder).mkdir(parents=True)
        with open(ROOT / folder / "log.txt", "w") as log, self.lock:
            if self.stopping:
                raise KeyboardInterrupt
            # A session of its own: Ctrl-C on the terminal comes to us alone, and is handed on.
            child = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                     env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
            self.children.add(child.pid)
        _, status, used = os.wait4(child.pid, 0)                # of this child alone, whatever else runs
        with self.lock:
            self.children.remove(child.pid)
        child.returncode = os.waitstatus_to_exitcode(status)
        if self.stopping:
            raise KeyboardInterrupt
        if child.returncode or not (ROOT / made).exists():
            said = (ROOT / folder / "log.txt").read_text().splitlines()[-15:]
            why = f"ended with status {child.returncode}" if child.returncode else f"did not write {made}"
            sys.exit("\n".join([f"{job.name} {why}:", f"python {command}", *said]))

        for path in (ROOT / folder).rglob("*.resume*"):         # what only a broken run would need: most of the disk
            path.unlink()
        unit = 1 if sys.platform == "darwin" else 1024          # of ru_maxrss, in bytes
        record = {"key": key, "name": job.name, "command": job.command, "made": made,
                  "seconds": round(used.ru_utime + used.ru_stime, 2), "peak_mb": round(used.ru_maxrss * unit / 2 ** 20)}
        with self.lock:
            with open(self.ledger, "a") as file:
                file.write(json.dumps(record) + "\n")
            self.records[key] = record
            self.work_done += job.work
            left = (self.work_left - job.work) * (time.monotonic() - self.start) / self.work_done
            Logger(f"[{self.n_done + 1:3d}/{self.n_jobs}]  {job.name}: {record['seconds']:.0f} s, {record['peak_mb']} MB; "
                   f"{max(0, left) / 60:.0f} min left")


def key_of(job: Job) -> str:
    """A checksum of the command, and of the contents of all files that are named in it behind the script."""
    words = shlex.split(job.command)[1:]
    paths = {path for word in words for path in word.rpartition("=")[2].split(",")}
    contents = {path: checksum(ROOT / path, (ROOT / path).stat().st_mtime_ns) for path in sorted(paths)
                if (ROOT / path).is_file()}
    return hashlib.sha256(json.dumps([job.command, contents]).encode()).hexdigest()[:10]


@functools.cache
def checksum(path: Path, mtime: int) -> str:
    return file_sha256(path)
