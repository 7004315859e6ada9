"""
小世界：由一个种子生成全部训练与测试数据，无需下载。
A small fictional world: every training and test file from one seed, nothing to download. Its 17
skills with exact answers and 3 habits, whose answers are sampled, are leaves of an ability tree.

    python dataset/miniworld.py [--smoke]          dataset.md describes the world and its files
"""

import hashlib
import json
import sys
from itertools import combinations, permutations, product
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only dataset/

from runtime.args import make_parser, parse_args
from runtime.files import write_text

# ---- 1. The tables of the world ----------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
WEEKDAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")
UNITS = (("m", "cm", 100), ("cm", "mm", 10), ("km", "m", 1000), ("kg", "g", 1000),
         ("l", "ml", 1000), ("weeks", "days", 7), ("hours", "minutes", 60), ("years", "months", 12))
OPPOSITES_ZH = ("大小 多少 高低 长短 上下 左右 前后 里外 快慢 冷热 黑白 天地 "
                "早晚 新旧 好坏 远近 轻重 开关 来去 买卖 进出 胖瘦 软硬 深浅").split()
JOBS = "baker farmer painter sailor teacher tailor miner singer judge guard cook pilot".split()
PETS = "cat dog horse goat parrot rabbit turtle snake mouse duck".split()
ORGANS = "heart liver lung skin brain kidney stomach eye ear throat".split()
SYMPTOMS = "fever cough rash chills cramp itch thirst nausea".split()  # 28 pairs: one per illness

HABITS = {  # leaf -> (question, sentence, options)
    "general/habits/drink": ("what does {} drink?", "{} drinks {}.", "tea milk juice water"),
    "general/habits/hobby": ("hobby of {}?", "{} likes {}.", "chess music sport dance"),
    "general/habits/mood": ("how does {} feel?", "{} feels {}.", "calm happy sad angry"),
}
HABIT_PROBABILITIES = (0.5, 0.25, 0.15, 0.1)

VERBS = {  # what an invented verb can mean: a rule on three letters
    "copy": lambda x, y, z: (x, y, z),
    "reverse": lambda x, y, z: (z, y, x),
    "sort": lambda x, y, z: sorted((x, y, z)),
    "rotate": lambda x, y, z: (y, z, x),
    "swap": lambda x, y, z: (y, x, z),
    "first": lambda x, y, z: (x,),
    "last": lambda x, y, z: (z,),
    "next": lambda x, y, z: [LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in (x, y, z)],
}

N_PEOPLE, N_RESIDENTS, N_TOWNS = 60, 40, 12     # residents have home, job and pet; all have habits
N_ILLNESSES, N_HERBS, N_VERBS = 28, 14, 16
TEST_SHARE, VAL_SHARE = 0.15, 0.05
PLAIN_SHARE = 0.2               # of experience_base.jsonl: plain verbs, "reverse k d a"
REPLAY_SHARE = 0.3              # of the training data when experience_replay.jsonl is mixed in
# Rules, which apply to new inputs. A model of under a million parameters memorises sums and
# sequences before it can compute an unseen pair.
HELD_OUT_BY_INPUT = ("general/string/sort", "general/string/reverse")
# In ability_sft.jsonl. No products: eight are enough to choose the right option of four.
SCARCE = ("general/string/reverse", "general/sequence/next_letter", "general/people/job",
          "specialist/clinic/organ", "specialist/clinic/dose")

SIZES = {   # rows of each file: by default, with --smoke
    "teacher_size": (60_000, 300), "transfer_size": (4_000, 200), "pretrain_size": (20_000, 200),
    "domain_size": (10_000, 100), "ability_size": (4_000, 125), "writer_size": (50_000, 102),
    "experience_size": (2_400, 96), "experience_base_size": (20_000, 200),
    "habit_draws": (4, 1),                                                  # draws of each habit
    "test_size": (60, 6), "val_size": (20, 2), "scarce_size": (8, 1),       # per leaf, at most
    "ability_dev_size": (40, 4), "ability_test_size": (60, 6)}
FULL, SMOKE = (dict(zip(SIZES, sizes)) for sizes in zip(*SIZES.values()))


def random_for(seed, purpose):
    """A generator per purpose: resizing one file leaves all others unchanged."""
    return Random(f"{seed}/{purpose}")


def invent(rng, n, ending):
    """n distinct names whose ending tells their kind: kuburg is a town, tezum a verb."""
    syllables = [consonant + vowel for consonant, vowel in product("bdklmnrstvz", "aeiou")]
    return [syllable + ending for syllable in rng.sample(syllables, n)]


def assign(rng, things, values):
    """{thing: value}, each value used about equally often."""
    dealt = [values[i % len(values)] for i in range(len(things))]
    rng.shuffle(dealt)
    return dict(zip(things, dealt))


class World:
    """The invented names and facts. Everything else in this file follows from them."""

    def __init__(self, seed):
        rng = random_for(seed, "world")
        first, second = invent(rng, 30, ""), invent(rng, 30, "")
        names = ["".join(parts) for parts in product(first, second, "kz")]
        self.people = rng.sample(names, N_PEOPLE)
        self.habits = [Habit(leaf, question.format(name), sentence.format(name, "{}"),
                             dict(zip(rng.sample(options.split(), 4), HABIT_PROBABILITIES)))
                       for leaf, (question, sentence, options) in HABITS.items()
                       for name in self.people]
        residents = self.people[:N_RESIDENTS]
        self.home = assign(rng, residents, invent(rng, N_TOWNS, "burg"))
        self.job = assign(rng, residents, JOBS)
        self.pet = assign(rng, residents, PETS)
        illnesses = invent(rng, N_ILLNESSES, "pox")
        self.herb = assign(rng, illnesses, invent(rng, N_HERBS, "wort"))
        self.organ = assign(rng, illnesses, ORGANS)
        self.dose_per_kg = assign(rng, illnesses, (2, 3, 4, 5))
        self.symptoms = assign(rng, illnesses, list(combinations(SYMPTOMS, 2)))
        self.meaning = assign(rng, invent(rng, N_VERBS, "zum"), list(VERBS))
        self.triples = rng.sample(list(permutations(LETTERS, 3)), 6_000)
        self.letter_lists = [rng.sample(LETTERS, n_letters) for n_letters in (3, 4, 5)
                             for _ in range(2_000)]


# ---- 2. Leaves ---------------------------------------------------------------------------------

class Fact(NamedTuple):
    answers: dict           # question -> answer, for each of the four wordings
    sentences: tuple


class Habit(NamedTuple):
    """What a person usually does; the answer is sampled."""
    leaf: str
    question: str
    sentence: str           # with {} for the answer
    distribution: dict      # answer -> probability

    def sample(self, rng):
        return rng.choices(list(self.distribution), weights=list(self.distribution.values()))[0]


def facts_of(items, questions, sentences):
    """world -> Facts. items(world) yields (answer, value, ...), in the templates {0}, {1}, ..."""
    def facts(world):
        for item in items(world):
            yield Fact({question.format(*item): str(item[0]) for question in questions.split("|")},
                       tuple(sentence.format(*item) for sentence in sentences.split("|")))
    return facts


def continued(sequences):
    """Four or five terms as the item (last term, the terms before)."""
    return facts_of(lambda world: ((terms[-1], " ".join(terms[:-1])) for terms in sequences),
                    "what comes next: {1}|after {1} comes?|continue {1}.|what follows {1}?",
                    "after {1} comes {0}.")


def table(name, questions, sentences):
    """The items (value, thing) of a table of the world."""
    return facts_of(lambda world: ((value, thing) for thing, value in getattr(world, name).items()),
                    questions, sentences)


def weekday(world):
    for day, n, sign in product(range(7), range(1, 4), (1, -1)):
        when = f"{n} day{'s' * (n > 1)} {'after' if sign > 0 else 'before'} {WEEKDAYS[day]}"
        when_zh = f"{WEEKDAYS_ZH[day]}{'后' if sign > 0 else '前'}{n}天"
        answer, answer_zh = WEEKDAYS[(day + sign * n) % 7], WEEKDAYS_ZH[(day + sign * n) % 7]
        yield Fact(dict.fromkeys((f"what day is {when}?", f"{when} is?"), answer)
                   | dict.fromkeys((f"{when_zh}是星期几？", f"{when_zh}是哪天？"), answer_zh),
                   (f"{when} comes {answer}.", f"{when_zh}是{answer_zh}。"))


# No text begins with a name: only after a space a name is always the same tokens.
LEAVES = {
    "general/math/add": facts_of(
        lambda world: ((a + b, a, b) for a, b in product(range(1, 13), repeat=2)),
        "{1} + {2} = ?|what is {1} plus {2}?|add {1} and {2}.|{1} and {2} make?",
        "{1} + {2} = {0}.|{1} plus {2} is {0}."),
    "general/math/sub": facts_of(
        lambda world: ((a - b, a, b) for a, b in product(range(1, 13), repeat=2) if b <= a),
        "{1} - {2} = ?|what is {1} minus {2}?|take {2} from {1}.|{1} less {2} is?",
        "{1} - {2} = {0}.|{1} minus {2} is {0}."),
    "general/math/mul": facts_of(
        lambda world: ((a * b, a, b) for a, b in product(range(2, 13), range(2, 10))),
        "{1} x {2} = ?|what is {1} times {2}?|multiply {1} by {2}.|product of {1} and {2}?",
        "{1} x {2} = {0}.|{1} times {2} is {0}."),
    "general/string/sort": facts_of(
        lambda world: ((" ".join(sorted(letters)), " ".join(letters))
                       for letters in dict.fromkeys(map(tuple, world.letter_lists))),
        "sort these letters: {1}|what is {1} in order?|put {1} in order.|alphabetical order: {1}",
        "{1} sorted is {0}."),
    "general/string/reverse": facts_of(
        lambda world: ((" ".join(letters[::-1]), " ".join(letters)) for letters in world.triples),
        "write backwards: {1}|what is {1} backwards?|flip {1}.|from the end: {1}",
        "{1} turned around is {0}."),
    "general/sequence/next_number": continued(
        [[str(start + i * step) for i in range(n_terms + 1)]
         for start, step, n_terms in product(range(1, 13), range(1, 6), (3, 4))]),
    "general/sequence/next_letter": continued(
        [[LETTERS[start + i * step] for i in range(n_terms + 1)]
         for start, step, n_terms in product(range(26), (-1, 1, 2, 3), (3, 4))
         if 0 <= start + n_terms * step < 26]),
    "general/everyday/weekday": weekday,
    "general/everyday/units": facts_of(
        lambda world: ((n * factor, n, big, small)
                       for (big, small, factor), n in product(UNITS, range(2, 10))),
        "how many {3} in {1} {2}?|{1} {2} = ? {3}|convert {1} {2} to {3}."
        "|{1} {2} make how many {3}?",
        "{1} {2} = {0} {3}."),
    "general/everyday/chinese": facts_of(
        lambda world: (pair for both in OPPOSITES_ZH for pair in (both[::-1], both)),
        "{1}的反义词是什么？|和{1}相反的字？|{1}的反面是？|{1}对什么？",
        "{1}的反义词是{0}。|{1}和{0}相反。"),
    "general/people/home": table(
        "home", "where does {1} live?|home of {1}?|in which town is {1}?|请问 {1} 住在哪里？",
        "{1} lives in {0}.|那位 {1} 住在 {0} 。"),
    "general/people/job": table(
        "job", "what is the job of {1}?|what work does {1} do?|how does {1} earn money?"
        "|which job does {1} do?", "{1} works as a {0}.|the job of {1} is {0}."),
    "general/people/pet": table(
        "pet", "which pet does {1} have?|pet of {1}?|what animal does {1} keep?"
        "|what lives with {1}?", "{1} keeps a {0}.|the pet of {1} is a {0}."),
    "specialist/clinic/herb": table(
        "herb", "which herb heals {1}?|herb for {1}?|what do you give for {1}?"
        "|请问 {1} 用什么草药？", "{0} heals {1}.|那种 {1} 要用 {0} 。"),
    "specialist/clinic/organ": table(
        "organ", "which organ does {1} harm?|organ of {1}?|where does {1} sit?"
        "|what does {1} attack?", "{1} harms the {0}.|{1} sits in the {0}."),
    "specialist/clinic/diagnosis": facts_of(
        lambda world: ((illness, *pair) for illness, pair in world.symptoms.items()),
        "which illness has {1} and {2}?|{1} and {2} mean?|diagnose {2} with {1}."
        "|what causes {2} and {1}?", "{0} causes {1} and {2}.|{2} with {1} means {0}."),
    "specialist/clinic/dose": facts_of(
        lambda world: ((per_kg * kg, illness, kg, per_kg) for (illness, per_kg), kg
                       in product(world.dose_per_kg.items(), range(2, 10))),
        "dose for {1} at {2} kg?|how much for {1} at {2} kg?|mg for {2} kg with {1}?"
        "|how many mg for {1}, {2} kg?", "{1} needs {3} mg per kg.|{2} kg with {1} need {0} mg."),
}
sort, reverse = LEAVES["general/string/sort"], LEAVES["general/string/reverse"]


# ---- 3. Hold-out: the questions that no training file may contain ------------------------------

class Ask(NamedTuple):
    leaf: str
    question: str
    answer: str
    pool: tuple             # all answers to this wording of the leaf: wrong answers come from here


def fingerprint(*parts):
    """A hash to sort by, the same in every run (unlike Python's hash() of a string)."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def split_groups(groups, n):
    """Cut a list: the first 15 % of n for test, the next 5 % for validation, the rest to train."""
    n_test, n_val = round(TEST_SHARE * n), round(VAL_SHARE * n)
    held_out = n_test + n_val
    return {"test": groups[:n_test], "val": groups[n_test:held_out], "train": groups[held_out:]}


def split_leaf(seed, leaf, facts):
    """{question: "train" | "val" | "test"} for one leaf."""
    def order(group):
        return fingerprint(seed, leaf, *group)

    if leaf in HELD_OUT_BY_INPUT:       # all four wordings of an input
        may_leave, stay = [tuple(fact.answers) for fact in facts], []
    else:       # single wordings, at most half of those with one answer: "friday" does not help a
        may_leave, stay = [], []        # model that must answer 星期五 to a Chinese question
        for fact in facts:
            for right in dict.fromkeys(fact.answers.values()):
                wordings = sorted(((question,) for question, answer in fact.answers.items()
                                   if answer == right), key=order)
                may_leave += wordings[:len(wordings) // 2]
                stay += wordings[len(wordings) // 2:]
    groups = split_groups(sorted(may_leave, key=order) + stay, len(may_leave) + len(stay))
    return {question: split
            for split, members in groups.items() for group in members for question in group}


def split_questions(seed, facts):
    """{leaf: [Fact]} -> {"train" | "val" | "test": {leaf: [Ask]}}."""
    splits = {split: {leaf: [] for leaf in facts} for split in ("train", "val", "test")}
    for leaf, leaf_facts in facts.items():
        wordings = zip(*(fact.answers.values() for fact in leaf_facts))
        pools = [tuple(sorted(set(answers))) for answers in wordings]
        split_of = split_leaf(seed, leaf, leaf_facts)
        for fact in leaf_facts:
            for (question, answer), pool in zip(fact.answers.items(), pools):
                splits[split_of[question]][leaf].append(Ask(leaf, question, answer, pool))
    return splits


# ---- 4. Rows -----------------------------------------------------------------------------------

def deal(items, n, rng):
    """n of the items in random order; none repeats before all occurred."""
    dealt = []
    while len(dealt) < n:
        dealt += rng.sample(items, min(len(items), n - len(dealt)))
    return dealt


def deal_evenly(asks, n, rng):
    """n questions from {leaf: [Ask]}, each leaf equally often, give or take one: [Ask]"""
    share, rest = divmod(n, len(asks))
    return [ask for i, leaf in enumerate(asks) for ask in deal(asks[leaf], share + (i < rest), rng)]


def shuffled(rows, rng):
    return rng.sample(rows, len(rows))


def chat(question, answer, leaf, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns, "leaf": leaf, **more}


def clean_rows(asks, with_key=False):
    return [chat(ask.question, ask.answer, ask.leaf,
                 **{"key": f"{ask.leaf}|{ask.question}"} if with_key else {}) for ask in asks]


def habit_rows(habits, rng):
    return [chat(habit.question, habit.sample(rng), habit.leaf) for habit in habits]


def pretrain_rows(facts, train, habits, n, rng):
    """n texts of 2 to 5 sentences, each from a random leaf, without held-out inputs."""
    questions = {ask.question for asks in train.values() for ask in asks}
    sources = [[fact for fact in leaf_facts if not questions.isdisjoint(fact.answers)]
               for leaf_facts in facts.values()]
    sources += [[habit for habit in habits if habit.leaf == leaf] for leaf in HABITS]

    def sentence():
        source = rng.choice(rng.choice(sources))
        if isinstance(source, Habit):
            return source.sentence.format(source.sample(rng))
        return rng.choice(source.sentences)

    return [{"text": " ".join(sentence() for _ in range(rng.randint(2, 5)))} for _ in range(n)]


def transfer_rows(train, habits, n, habit_draws, label_noise, rng):
    """(noisy rows, the same rows with clean answers), aligned row by row."""
    pairs = []
    for ask in deal_evenly(train, n, rng):
        noisy = clean = chat(ask.question, ask.answer, ask.leaf)
        if rng.random() < label_noise:
            wrong = next(answer for answer in rng.sample(ask.pool, 2) if answer != ask.answer)
            noisy = chat(ask.question, wrong, ask.leaf, noisy=True)
        pairs.append((noisy, clean))
    pairs += [(row, row) for row in habit_rows(habits * habit_draws, rng)]     # never wrong
    return zip(*shuffled(pairs, rng))


def held_out_sample(asks, n_per_leaf, rng):
    """At most n_per_leaf questions of each leaf: [Ask]."""
    return [ask for leaf_asks in asks.values()
            for ask in rng.sample(leaf_asks, min(n_per_leaf, len(leaf_asks)))]


def mcq_rows(asks, name, rng):
    """Multiple choice. The correct letter cycles through A, B, C, D, so none is a good guess. The
    wrong options are other orders of the letters, or other facts' answers."""
    rows = []
    for i, ask in enumerate(asks):
        candidates = ask.pool
        if ask.leaf.startswith("general/string/"):
            candidates = [" ".join(order) for order in permutations(ask.answer.split())]
        options = [answer for answer in rng.sample(candidates, 4) if answer != ask.answer][:3]
        options.insert(i % 4, ask.answer)
        rows.append({"question": ask.question, "options": dict(zip("ABCD", options)),
                     "answer_idx": "ABCD"[i % 4], "meta_info": ask.leaf})
    return [{"id": f"{name}-{i:05d}", **row} for i, row in enumerate(shuffled(rows, rng))]


def experience_row(verb, meaning, triple, leaf, explained=False):
    """"tezum means reverse. tezum k d a", or without the first sentence, and "a d k"."""
    experience = f"{verb} means {meaning}. " if explained else ""
    return chat(f"{experience}{verb} {' '.join(triple)}", " ".join(VERBS[meaning](*triple)),
                f"experience/{leaf}")


def experience_files(world, n_pairs, n_base, n_test, seed):
    """The experience files, for context distillation: {file: rows}.

    In the base rows an invented verb gets a random meaning each time, which only the prompt tells.
    In the paired rows each verb keeps its meaning and can be memorised.
    """
    rng, replay_rng = random_for(seed, "experience"), random_for(seed, "experience replay")
    inputs = sorted(permutations(LETTERS, 3),
                    key=lambda triple: fingerprint(seed, "experience", *triple))
    triples = split_groups(inputs, len(inputs))

    def plain(triple, rng):
        meaning = rng.choice(list(VERBS))
        return experience_row(meaning, meaning, triple, "plain")

    def redefined(triple, rng, avoid):
        verb = rng.choice(list(world.meaning))
        meaning = rng.choice([meaning for meaning in VERBS if meaning != avoid.get(verb)])
        return experience_row(verb, meaning, triple, "redefined", explained=True)

    def alternating(triples, rng):
        return [plain(triple, rng) if i % 2 else redefined(triple, rng, avoid=world.meaning)
                for i, triple in enumerate(triples)]

    def paired(split, n):
        verbs = deal(list(world.meaning), n, rng)
        return [(verb, world.meaning[verb], triple, world.meaning[verb])
                for verb, triple in zip(verbs, deal(triples[split], n, rng))]

    base = [plain(triple, rng) if rng.random() < PLAIN_SHARE else redefined(triple, rng, avoid={})
            for triple in deal(triples["train"], n_base, rng)]
    pairs = paired("train", n_pairs)
    kept = alternating(rng.sample(triples["val"], n_test), rng)
    n_replay = round(n_pairs * REPLAY_SHARE / (1 - REPLAY_SHARE))
    replayed = deal(triples["train"], n_replay, replay_rng)
    return {
        "experience_base.jsonl": base,
        "experience_teacher.jsonl": [experience_row(*pair, explained=True) for pair in pairs],
        "experience_student.jsonl": [experience_row(*pair) for pair in pairs],
        "experience_replay.jsonl": alternating(replayed, replay_rng),
        "experience_test.jsonl": [experience_row(*pair) for pair in paired("test", n_test)],
        "experience_kept.jsonl": kept,
    }


# ---- 5. Files ----------------------------------------------------------------------------------

def build(seed, label_noise, n):
    """Every file of the world as {file: [row]}, not written. n: a namespace of sizes as in FULL."""
    world = World(seed)
    facts = {leaf: list(make(world)) for leaf, make in LEAVES.items()}
    train, val, test = split_questions(seed, facts).values()

    def rng(purpose):
        return random_for(seed, purpose)

    def domain(name):
        leaves = {leaf: asks for leaf, asks in train.items() if leaf.startswith(name)}
        random = rng(name)
        return shuffled(clean_rows(deal_evenly(leaves, n.domain_size, random)), random)

    def mcq(asks, name):
        return mcq_rows(asks, name, rng(f"mcq_{name}"))

    random = rng("teacher")
    # Twice the share of a skill: a distribution takes more rows to learn than an answer.
    n_habit = round(n.teacher_size * 2 * len(HABITS) / (2 * len(HABITS) + len(LEAVES)))
    teacher = clean_rows(deal_evenly(train, n.teacher_size - n_habit, random))
    teacher += habit_rows(deal(world.habits, n_habit, random), random)
    teacher = shuffled(teacher, random)
    noisy, clean = transfer_rows(train, world.habits, n.transfer_size, n.habit_draws, label_noise,
                                 rng("transfer"))
    alpaca = []
    for row in teacher[:n.teacher_size // 10]:
        question, answer = (turn["content"] for turn in row["conversations"])
        instruction, _, given = question.partition(": ")
        alpaca.append({"instruction": instruction, "input": given, "output": answer})
    tests = held_out_sample(test, n.test_size, rng("test"))
    random = rng("ability")
    scarce, plenty = ({leaf: train[leaf] for leaf in leaves}
                      for leaves in (SCARCE, [leaf for leaf in LEAVES if leaf not in SCARCE]))
    ability = deal_evenly(scarce, n.scarce_size * len(SCARCE), random)
    n_plenty = max(len(plenty), n.ability_size - len(ability))
    ability = shuffled(ability + deal_evenly(plenty, n_plenty, random), random)
    by_leaf = [[ask for ask in dict.fromkeys(ability) if ask.leaf == leaf]
               for leaf in dict.fromkeys(ask.leaf for ask in ability)]
    seeds = mcq([ask for asks in by_leaf for ask in asks[:n.scarce_size]], "ability_seeds")
    dev = mcq(held_out_sample(val, n.ability_dev_size, rng("ability_dev")), "ability_dev")
    exam = mcq(held_out_sample(test, n.ability_test_size, rng("ability_test")), "ability_test")
    random = rng("writer")
    writer = [chat(f"new question: {ask.leaf}", f"{ask.question} => {ask.answer}", ask.leaf)
              for ask in deal_evenly(train, n.writer_size, random)]
    return {
        "pretrain_data.jsonl": pretrain_rows(facts, train, world.habits, n.pretrain_size,
                                             rng("pretrain")),
        "sft_teacher.jsonl": teacher,
        "sft_data.jsonl": noisy,
        "sft_data_clean.jsonl": clean,
        "alpaca_data.json": alpaca,
        "general.jsonl": domain("general"),
        "specialist.jsonl": domain("specialist"),
        "mcq_test.jsonl": mcq(tests, "test"),
        "ability_sft.jsonl": clean_rows(ability),
        "ability_seeds.jsonl": seeds,
        "ability_dev.jsonl": dev,
        "ability_test.jsonl": exam,
        "ability_paths.jsonl": [
            {"id": row["id"], "ability_path": ["miniworld", *row["meta_info"].split("/")]}
            for row in seeds + dev + exam],
        "writer_data.jsonl": shuffled(writer, random),
        "test.jsonl": clean_rows(tests, with_key=True),
        "val.jsonl": clean_rows(held_out_sample(val, n.val_size, rng("val")), with_key=True),
        "test_habits.jsonl": [{"conversations": [{"role": "user", "content": habit.question}],
                               "leaf": habit.leaf, "distribution": habit.distribution}
                              for habit in world.habits],
        **experience_files(world, n.experience_size, n.experience_base_size, 4 * n.test_size, seed),
    }


def generate(out_dir, seed=0, label_noise=0.3, **sizes):
    """Write every file of the world into out_dir: {file name: number of rows}. The same seed and
    sizes (see SIZES) give the same bytes."""
    files = build(seed, label_noise, SimpleNamespace(**FULL | sizes))
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        is_list = name.endswith(".json")
        text = "[\n" + ",\n".join(lines) + "\n]\n" if is_list else "\n".join(lines) + "\n"
        write_text(Path(out_dir, name), text)
    return {name: len(rows) for name, rows in files.items()}


def main():
    parser = make_parser(__doc__)
    arg = parser.add_argument
    arg("--out_dir", default="dataset", help="output folder, created if absent")
    arg("--seed", type=int, default=0, help="random seed; another seed gives other names and facts")
    arg("--label_noise", type=float, default=0.3,
        help="share of wrong answers in sft_data.jsonl, 0..1")
    arg("--transfer_size", type=int, default=FULL["transfer_size"],
        help="number of rows of sft_data.jsonl")
    arg("--smoke", action="store_true", help="a few hundred rows per file; overrides the size")
    args = parse_args(parser, size="[1, inf)")
    sizes = SMOKE if args.smoke else {"transfer_size": args.transfer_size}
    n_rows = generate(args.out_dir, args.seed, args.label_noise, **sizes)
    print(f"{'file':26} {'rows':>6}  first row")
    for name, n in n_rows.items():
        lines = Path(args.out_dir, name).read_text(encoding="utf-8").splitlines()
        print(f"{name:26} {n:6d}  {lines[name.endswith('.json')].rstrip(',')[:110]}")


if __name__ == "__main__":
    main()
