"""
几类数据按比例混合：比例逐步变化，评测之后可以重新分配；断点续训只需记下改过什么。
Several kinds of data in one stream. The shares change from step to step, and an evaluation may
redistribute them. Systematic sampling (Madow & Madow 1944, On the Theory of Systematic Sampling,
I): a comb of n teeth over the shares, at a random offset, takes the n samples of a step. So a step
differs from its shares by less than one sample, and over many steps nothing is lost to rounding.

    shares   |------- general 0.7 -------|-domain 0.3|
    n = 5        ^       ^       ^       ^       ^        general 3, domain 2
              ^       ^       ^       ^       ^           general 4, domain 1
"""

import hashlib
from functools import lru_cache, partial

import numpy as np

from dataset.lm_dataset import Batch, MicroBatches, TokenDataset, packed_batch, permutation

def growth(start: float, end: float, n_steps: int) -> np.ndarray:  # -> (n_steps,)
    """A share from `start` at the first step to `end` at the last; a single step has their mean."""
    passed = np.linspace(0.0, 1.0, n_steps) if n_steps != 1 else np.array([0.5])
    return (1 - passed) * start + passed * end


class Joined(TokenDataset):
    """Several datasets of one tokenizer, conversations and texts, concatenated into one."""

    def __init__(self, datasets: list[TokenDataset]):
        first = datasets[0]
        self.datasets, self.paths = datasets, [path for data in datasets for path in data.paths]
        self.tokenizer, self.dtype, self.flag = first.tokenizer, first.dtype, first.flag
        self.max_seq_len = max(data.max_seq_len for data in datasets)
        begins = self.begins = np.cumsum([0, *(len(data.stream) for data in datasets)])
        row_begins = np.cumsum([0, *(data.n_rows for data in datasets)])
        for name, shifts in (("ends", begins), ("rows", row_begins), ("lengths", 0 * begins),
                             ("n_targets", 0 * begins), ("origins", row_begins)):
            setattr(self, name, np.concatenate([getattr(data, name) + shift for data, shift
                                                in zip(datasets, shifts)]))

    @property
    def key(self) -> str:
        """Identifies the files and the samples chosen from them: another split, another key."""
        digest = hashlib.sha256(" ".join(data.key for data in self.datasets).encode())
        digest.update(self.ends.astype(np.int64).tobytes())
        return f"{'+'.join(path.name for path in self.paths)}-{digest.hexdigest()[:16]}"

    def sample(self, i: int) -> np.ndarray:
        number = np.searchsorted(self.begins, self.ends[i]) - 1
        end = self.ends[i] - self.begins[number]
        return self.datasets[number].stream[end - self.lengths[i]:end]


class Mixture(MicroBatches):
    """Micro-batches whose samples come from named parts of a dataset in changing shares.

    parts            {name: (samples,) their numbers in the dataset}
    shares           (n_steps, parts) of each step; rows sum to 1
    steps_per_epoch  default: as many as all samples of all parts fill
    groups           lists of names, each part once; each micro-batch then holds one group, so that
                     groups can have different losses. A step has accumulation_steps micro-batches
                     per group, and the same batch_size samples as without groups

    Each part is shuffled by its own name: its samples come without replacement, in an order that no
    other part affects, and are reshuffled when all were used. A step depends only on the seed, the
    shares and `history`, so a run resumes by restore(history).

    Raises ValueError for a share of an empty part, and fewer samples than micro-batches.
    """

    def __init__(self, dataset: TokenDataset, parts: dict[str, np.ndarray], shares: np.ndarray,
                 batch_size: int, accumulation_steps: int = 1, rank: int = 0, world_size: int = 1,
                 seed: int = 0, steps_per_epoch: int | None = None,
                 groups: list[list[str]] | None = None):
        super().__init__(dataset, batch_size, accumulation_steps, rank, world_size, seed)
        self.names = list(parts)
        self.parts = [np.asarray(part, dtype=np.int64) for part in parts.values()]
        groups = groups or [self.names]
        self.groups = [[self.names.index(name) for name in group] for group in groups]
        self.per_step = accumulation_steps * len(groups)

        n_samples = sum(map(len, self.parts))
        self.step_samples = min(self.step_samples, n_samples)
        if n_samples < self.hands:
            raise ValueError(f"the parts {', '.join(self.names)} of {dataset} have {n_samples} "
                             f"samples, fewer than the {self.hands} micro-batches of one step; "
                             "lower --accumulation_steps")
        self.steps_per_epoch = steps_per_epoch or n_samples // self.step_samples

        self.planned = np.array(shares, dtype=np.float64)               # (n_steps, parts)
        # fp32: n minus a 24-bit offset is exact in fp64, so the last tooth stays within the shares.
        random = np.random.default_rng([seed, 1])
        self.offsets = random.random(len(self.planned), dtype=np.float32)       # (n_steps,)
        # The latest two shuffles of each part: at every step anew, they would cost all samples.
        self.shuffles = [lru_cache(2)(partial(permutation, len(part), seed_of(name, seed)))
                         for name, part in zip(self.names, self.parts)]
        self.restore([])

    # -- how many samples of each part -----------------------------------------------------------

    def use(self, step: int, shares: np.ndarray):  # (n_steps - step, parts)
        """Use these shares from `step` on, and count the samples of each part before each step."""
        for name, part, column in zip(self.names, self.parts, shares.T):
            if not len(part) and column.any():
                raise ValueError(f"part {name!r} has no samples, but a share of "
                                 f"{column.max():.3g}; leave it out, or give it 0")
        self.shares[step:] = shares
        ends = np.cumsum(shares, axis=1)
        ends /= ends[:, -1:]            # exactly 1: a last part of share 0 gets no rounding error
        teeth = np.ceil(ends * self.step_samples - self.offsets[step:, None]).astype(np.int64)
        counts = np.diff(teeth, axis=1, prepend=0)                      # (n_steps - step, parts)
        self.taken[step + 1:] = self.taken[step] + np.cumsum(counts, axis=0)

    def reweigh(self, step: int, weights: dict[str, float]):
        """From `step` on, divide the total share of the named parts by weight; others keep theirs.

            shares  general 0.4  law 0.3  medicine 0.3      reweigh(step, {"law": 1, "medicine": 2})
                    general 0.4  law 0.2  medicine 0.4
        """
        weight = np.array(list(weights.values()), dtype=np.float64)
        columns = [self.names.index(name) for name in weights]
        shares = self.shares[step:].copy()
        total = shares[:, columns].sum(axis=1, keepdims=True)
        shares[:, columns] = total * weight / weight.sum()
        self.use(step, shares)
        self.history.append((step, dict(zip(weights, weight.tolist()))))

    def restore(self, history: list[tuple[int, dict[str, float]]]):
        """Reset to the planned shares, then repeat these calls of reweigh."""
        self.history = []
        self.shares = np.empty_like(self.planned)
        self.taken = np.zeros((len(self.planned) + 1, len(self.parts)), dtype=np.int64)
        self.use(0, self.planned)
        for step, weights in history:
            self.reweigh(step, weights)

    def counts(self, first: int, last: int) -> dict[str, int]:
        """Samples of each part in steps first ... last - 1."""
        return dict(zip(self.names, (self.taken[last] - self.taken[first]).tolist()))

    # -- which samples ---------------------------------------------------------------------------

    def __getitem__(self, j: int) -> Batch:
        """step_targets and step_samples count the group's in the whole step: all its micro-batches
        and processes. A micro-batch of a small group may be empty."""
        k, micro = divmod(j, self.per_step)
        group, micro = divmod(micro, self.accumulation_steps)
        samples = self.samples_of(k, self.groups[group])
        # Dealing continues where the group before ended: each process has equally many samples.
        earlier = sum(int(self.taken[k + 1, part] - self.taken[k, part])
                      for before in self.groups[:group] for part in before)
        first = (self.rank * self.accumulation_steps + micro - earlier) % self.hands
        hand = samples[first::self.hands]
        n_targets = int(self.dataset.n_targets[samples].sum())
        if len(hand):
            return self.dataset.batch(hand, n_targets, len(samples))
        none = np.empty(0, np.int64)
        return packed_batch(none, none.astype(bool), none, n_targets, len(samples))

    def samples_of_step(self, k: int) -> np.ndarray:  # -> (step_samples,) from short to long
        return self.samples_of(k, range(len(self.parts)))

    def samples_of(self, k: int, parts) -> np.ndarray:
        """The samples of these parts in step k, from short to long."""
        samples = np.concatenate([self.next_of(part, self.taken[k, part], self.taken[k + 1, part])
                                  for part in parts])
        return samples[np.argsort(self.dataset.lengths[samples], kind="stable")]

    def next_of(self, part: int, first: int, last: int) -> np.ndarray:  # -> (last - first,)
        """Samples first ... last - 1 of a part's endless stream, one shuffle after another."""
        if first == last:
            return np.empty(0, np.int64)
        size = len(self.parts[part])
        begin = first // size
        order = np.concatenate([self.shuffles[part](number)
                                for number in range(begin, (last - 1) // size + 1)])
        return self.parts[part][order[first - begin * size:last - begin * size]]


def seed_of(name: str, seed: int) -> int:
    """64 bits of a part's name and the run's seed; hash() differs between processes."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
