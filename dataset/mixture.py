"""
几类数据按份额混合：份额随训练步变化，评测之后可以重新分配；断点续训只需记下改过什么。
Several kinds of data in one stream, in shares that change from step to step and are divided anew after an evaluation.

    share of the domain    linear             cosine             steps
                   70 %              _.                _.-             ____
                                  _-                 .'            ____
                               _-                  .'          ____
                   30 %      .-                 .-'        ____
                          first    last      first    last    first       last step

A step of n samples lays a comb of n teeth over the shares, and each tooth takes a sample of the part it points at. How far the
comb is shifted is drawn at each step anew (systematic sampling: Madow & Madow 1944, On the Theory of Systematic Sampling, I):

    shares   |------- general 0.7 -------|-domain 0.3|
    n = 5        ^       ^       ^       ^       ^        general 3, domain 2
              ^       ^       ^       ^       ^           general 4, domain 1
                   ^       ^       ^       ^       ^      general 3, domain 2

So a step is never a whole sample away from its shares, where independent draws would stray by the root of n, and over many
steps none is lost to rounding.
"""

import functools
import hashlib

import numpy as np

from dataset.lm_dataset import Batch, MicroBatches, TokenDataset, packed_batch, permutation

# What is passed of the way from start to end, after the fraction t of the time.
GROWTHS = {"linear": lambda t: t,
           "cosine": lambda t: (1 - np.cos(np.pi * t)) / 2,         # slow, fast, slow
           "steps": lambda t: np.minimum(np.floor(4 * t), 3) / 3}   # four plateaus


def growth(kind: str, start: float, end: float, n_steps: int) -> np.ndarray:  # -> (n_steps,)
    """A share from `start` at the first step to `end` at the last; a single step has their mean.

    Raises ValueError for a kind that is not one of GROWTHS.
    """
    if kind not in GROWTHS:
        raise ValueError(f"growth {kind!r} is none of {', '.join(GROWTHS)}")
    passed = GROWTHS[kind](np.linspace(0.0, 1.0, n_steps)) if n_steps != 1 else np.array([0.5])
    return (1 - passed) * start + passed * end


class Joined(TokenDataset):
    """Several datasets, conversations and texts alike, as one: the samples of the first, then those of the second, ...

    Raises ValueError for datasets of several tokenizers, and where some are paired with a teacher and others are not.
    """

    def __init__(self, datasets: list[TokenDataset]):
        first = datasets[0]
        for other in datasets[1:]:
            if other.tokenizer.sha256 != first.tokenizer.sha256:
                raise ValueError(f"{first} and {other} are in the tokens of two vocabularies, and no model reads both; "
                                 "tokenise them with one tokenizer")
            if (other.teacher is None) != (first.teacher is None):
                raise ValueError(f"of {first} and {other} only one is paired with what a teacher reads; pair both, or neither")
        self.datasets, self.paths = datasets, [path for data in datasets for path in data.paths]
        self.tokenizer, self.word, self.flag = first.tokenizer, first.word, first.flag
        self.max_seq_len = max(data.max_seq_len for data in datasets)
        self.stream = JoinedStream([data.stream for data in datasets])
        self.ends = np.concatenate([data.ends + begin for data, begin in zip(datasets, self.stream.begins)])
        self.lengths = np.concatenate([data.lengths for data in datasets])
        self.n_targets = np.concatenate([data.n_targets for data in datasets])
        row_ends = np.cumsum([data.n_rows for data in datasets])
        self.rows = np.concatenate([data.rows + end - data.n_rows for data, end in zip(datasets, row_ends)])
        self.n_rows = int(row_ends[-1])
        self.teacher = Joined([data.teacher for data in datasets]) if first.teacher is not None else None

    @property
    def key(self) -> str:
        """Of the files, and of which of their samples these are: another split is another dataset."""
        digest = hashlib.sha256(" ".join(data.key for data in self.datasets).encode())
        digest.update(self.ends.astype(np.int64).tobytes())
        return f"{'+'.join(path.name for path in self.paths)}-{digest.hexdigest()[:16]}"

    def encode(self):
        return [sample for data in self.datasets for sample in data.encode()]


class JoinedStream:
    """Streams of tokens one behind the other, each where it lies, of which slices are read that lie within one of them."""

    def __init__(self, streams: list):
        self.streams = streams
        self.begins = np.cumsum([0, *map(len, streams)])

    def __len__(self):
        return int(self.begins[-1])

    def __getitem__(self, wanted: slice) -> np.ndarray:
        number = np.searchsorted(self.begins, wanted.start, side="right") - 1
        begin = self.begins[number]
        return self.streams[number][wanted.start - begin:wanted.stop - begin]


class Mixture(MicroBatches):
    """Micro-batches whose samples come from named parts of a dataset, in shares that change from step to step.

    parts            {name: (samples,) their numbers in the dataset}
    shares           (n_steps, parts) of each step; rows sum to 1
    steps_per_epoch  default: as many as all samples of all parts would fill
    groups           lists of names. A micro-batch is then of one group only, so that groups can have losses of their own: a
                     step has accumulation_steps micro-batches of the first group, then as many of the second, ... They are
                     smaller, batch_size samples over all groups; together the same samples as without

    Each part is shuffled by its own name: its samples come without replacement in an order that depends on no other part, and
    begin a new shuffle when all were seen, whether or not those of the others were. What a step holds depends on the
    seed, the shares and `history`, and on nothing else: a run resumes by restore(history).

    Raises ValueError for shares that are none, a share of a part without samples, groups that leave out a part or have it
    twice, and fewer samples than one step takes.
    """

    def __init__(self, dataset: TokenDataset, parts: dict[str, np.ndarray], shares: np.ndarray, batch_size: int,
                 accumulation_steps: int = 1, rank: int = 0, world_size: int = 1, seed: int = 0,
                 steps_per_epoch: int | None = None, groups: list[list[str]] | None = None):
        super().__init__(dataset, batch_size, accumulation_steps, rank, world_size, seed)
        self.names, self.parts = list(parts), [np.asarray(part, dtype=np.int64) for part in parts.values()]
        groups = groups or [self.names]
        if sorted(name for group in groups for name in group) != sorted(self.names):
            raise ValueError(f"groups {groups} must have each of the parts {', '.join(self.names)} once")
        self.groups = [[self.names.index(name) for name in group] for group in groups]
        self.per_step = accumulation_steps * len(groups)

        n_samples = sum(map(len, self.parts))
        if n_samples < self.step_samples:
            raise ValueError(f"the parts {', '.join(self.names)} of {dataset} have {n_samples} samples, fewer than the "
                             f"{self.step_samples} of one step; lower --batch_size")
        self.steps_per_epoch = steps_per_epoch or n_samples // self.step_samples

        self.planned = np.array(shares, dtype=np.float64)               # (n_steps, parts)
        self.check_shares()
        # 24 bits: n minus such an offset is exact, and the last tooth of a comb never falls off its end.
        self.offsets = np.random.default_rng([seed, 1]).random(len(self.planned), dtype=np.float32)     # (n_steps,)
        self.passes = [(-1, None)] * len(self.parts)                    # of each part the shuffle that was last asked for
        self.restore([])

    def check_shares(self):
        if self.planned.ndim != 2 or self.planned.shape[1] != len(self.names):
            raise ValueError(f"shares of shape {self.planned.shape} must be (n_steps, {len(self.names)}): a column for each of "
                             f"{', '.join(self.names)}")
        # The comparison is so turned that a NaN is refused as well.
        wrong = np.flatnonzero(~((abs(self.planned.sum(axis=1) - 1) < 1e-6) & (self.planned >= 0).all(axis=1)))
        if len(wrong):
            row = self.planned[wrong[0]]
            raise ValueError(f"shares of row {wrong[0]}, {dict(zip(self.names, row.tolist()))}, sum to {row.sum():.6g}; they "
                             "must sum to 1, and none may be less than 0")

    # -- how many samples of each part -------------------------------------------------------------------------------

    def use(self, step: int, shares: np.ndarray):  # (n_steps - step, parts)
        """Take these shares from `step` on, and count what each step has of each part, and what all before it had."""
        for name, part, column in zip(self.names, self.parts, shares.T):
            if not len(part) and column.any():
                raise ValueError(f"part {name!r} has no samples, but a share of {column.max():.3g}; leave it out, or give it 0")
        self.shares[step:] = shares
        reach = np.cumsum(shares, axis=1)
        reach /= reach[:, -1:]                  # to exactly 1: behind it, a part of share 0 must not get the rounding error
        teeth = np.ceil(reach * self.step_samples - self.offsets[step:, None]).astype(np.int64)    # up to there
        self.taken[step + 1:] = self.taken[step] + np.cumsum(np.diff(teeth, axis=1, prepend=0), axis=0)

    def reweigh(self, step: int, weights: dict[str, float]):
        """From `step` on, divide what the named parts have together among them by weight; the others keep their shares.

            shares  general 0.4  law 0.3  medicine 0.3      reweigh(step, {"law": 1, "medicine": 2})
                    general 0.4  law 0.2  medicine 0.4

        Worker processes of a DataLoader have copies that do not hear of it: make a new one. Raises ValueError for a name
        that is no part, a step that is none, and weights that divide nothing.
        """
        unknown = [name for name in weights if name not in self.names]
        if unknown:
            raise ValueError(f"no part is called {unknown[0]!r}; there are {', '.join(self.names)}")
        if not 0 <= step <= len(self.shares):
            raise ValueError(f"step {step} of reweigh must lie in 0 ... {len(self.shares)}")
        weight = np.array(list(weights.values()), dtype=np.float64)
        if not np.isfinite(weight).all() or not weight.sum() > 0 or weight.min() < 0:
            raise ValueError(f"weights {weights} must be 0 or more, and one of them more than 0")
        columns = [self.names.index(name) for name in weights]
        shares = self.shares[step:].copy()
        shares[:, columns] = shares[:, columns].sum(axis=1, keepdims=True) * weight / weight.sum()
        self.use(step, shares)
        self.history.append((step, dict(zip(weights, weight.tolist()))))

    def restore(self, history: list[tuple[int, dict[str, float]]]):
        """Become what the planned shares and these calls of reweigh, in their order, make."""
        self.history = []
        self.shares = np.empty_like(self.planned)
        self.taken = np.zeros((len(self.planned) + 1, len(self.parts)), dtype=np.int64)     # before each step
        self.use(0, self.planned)
        for step, weights in history:
            self.reweigh(step, weights)

    def counts(self, first: int, last: int) -> dict[str, int]:
        """How many samples of each part steps first ... last - 1 have: the shares as they came out."""
        return dict(zip(self.names, (self.taken[last] - self.taken[first]).tolist()))

    # -- which ones --------------------------------------------------------------------------------------------------

    def __getitem__(self, j: int) -> Batch:
        """Its step_targets and step_samples are those of its group in the whole step: all its micro-batches, all processes. A
        group may have fewer samples than there are hands; an empty one is a Batch of no samples (and no teacher's side)."""
        k, micro = divmod(j, self.per_step)
        group, micro = divmod(micro, self.accumulation_steps)
        samples = self.drawn(k, self.groups[group])
        # Where the group before it ended, dealing goes on: over all groups, every hand has batch_size samples.
        earlier = sum(int(self.taken[k + 1, part] - self.taken[k, part]) for each in self.groups[:group] for part in each)
        hand = samples[(self.rank * self.accumulation_steps + micro - earlier) % self.hands::self.hands]
        n_targets = int(self.dataset.n_targets[samples].sum())
        if not len(hand):
            return packed_batch(np.empty(0, np.int64), np.empty(0, bool), np.empty(0, np.int64), n_targets, len(samples))
        return self.dataset.batch(hand, n_targets, len(samples))

    def samples_of_step(self, k: int) -> np.ndarray:  # -> (step_samples,), from short to long
        return self.drawn(k, range(len(self.parts)))

    def drawn(self, k: int, parts) -> np.ndarray:
        """The samples that step k has of these parts, from short to long."""
        samples = np.concatenate([self.next_of(part, self.taken[k, part], self.taken[k + 1, part]) for part in parts])
        return samples[np.argsort(self.dataset.lengths[samples], kind="stable")]

    def next_of(self, part: int, first: int, last: int) -> np.ndarray:  # -> (last - first,)
        """The samples at places first ... last - 1 of a part's stream: shuffle after shuffle of all it has."""
        if first == last:
            return np.empty(0, np.int64)
        size = len(self.parts[part])
        begin = first // size
        order = np.concatenate([self.shuffle(part, number) for number in range(begin, (last - 1) // size + 1)])
        return self.parts[part][order[first - begin * size:last - begin * size]]

    def shuffle(self, part: int, number: int) -> np.ndarray:
        # Kept for each part: with dozens of them, making it at every step would cost all samples instead of a batch.
        if self.passes[part][0] != number:
            seed = seed_of(self.names[part], self.seed)
            self.passes[part] = number, permutation(len(self.parts[part]), seed, number)
        return self.passes[part][1]


@functools.cache
def seed_of(name: str, seed: int) -> int:
    """64 bits of a part's name and the run's seed, the same in each process (Python's hash() of a text is not)."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "big")
