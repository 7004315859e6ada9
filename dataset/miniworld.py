"""
小世界：由一个种子生成全部训练与测试数据，无需下载。
A small fictional world: every training and test file from one seed, nothing to download.

The world has 20 skills, the leaves of an ability tree. 17 have one correct answer (arithmetic,
letters, weekdays, forty invented people, an invented clinic). 3 are habits, whose answer is sampled
from a known distribution.

    what is 3 plus 4?         -> 7                                           general/math/add
    where does zizez live?    -> kuburg                                      general/people/home
    what does sanok drink?    -> juice 50 %, water 25 %, milk 15 %, tea 10 % general/habits/drink

A hash of the question holds out 15 % of each leaf for test and 5 % for validation. Sort and reverse
are held out by input (apply a rule to new letters), all others by wording (recall a fact that at
least two other wordings teach). Habit prompts occur in training by design: test_habits.jsonl
measures how close the model's probabilities come to the true ones.

dataset.md lists the files. "noisy" marks wrong answers for analysis; no training script reads it.

    python dataset/miniworld.py                    default sizes, about 2 seconds
    python dataset/miniworld.py --smoke            a few hundred rows, for trying the scripts out
"""

import argparse
import hashlib
import json
import os
from itertools import combinations, permutations, product
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

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
    "general/habits/drink": ("what does {} drink?", "{} drinks {}.",
                             "tea milk juice water".split()),
    "general/habits/hobby": ("hobby of {}?", "{} likes {}.", "chess music sport dance".split()),
    "general/habits/mood": ("how does {} feel?", "{} feels {}.", "calm happy sad angry".split()),
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
# Rules, learned from other inputs. Sums and sequences are no rules here: a model of under a million
# parameters memorises their tables before it can compute an unseen pair.
HELD_OUT_BY_INPUT = ("general/string/sort", "general/string/reverse")
# Scarce in ability_sft.jsonl: rules and tables, general and special. No products: after eight of
# them a student already chose correctly among four options in two cases of three.
SCARCE = ("general/string/reverse", "general/sequence/next_letter", "general/people/job",
          "specialist/clinic/organ", "specialist/clinic/dose")

# Rows per file. test_size, val_size, scarce_size, ability_dev_size and ability_test_size are per
# leaf, or all that the leaf has; habit_draws is per habit.
FULL = dict(teacher_size=60_000, transfer_size=4_000, pretrain_size=20_000, domain_size=10_000,
            mcq_size=2_000, experience_size=2_400, experience_base_size=20_000,
            test_size=60, val_size=20, habit_draws=4, ability_size=4_000, scarce_size=8,
            ability_dev_size=40, ability_test_size=60, writer_size=50_000)
SMOKE = dict(teacher_size=300, transfer_size=200, pretrain_size=200, domain_size=100,
             mcq_size=102, experience_size=96, experience_base_size=200,
             test_size=6, val_size=2, habit_draws=1, ability_size=125, scarce_size=1,
             ability_dev_size=4, ability_test_size=6, writer_size=102)


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
                             dict(zip(rng.sample(options, 4), HABIT_PROBABILITIES)))
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


def weekday(world):
    for day, n, sign in product(range(7), range(1, 4), (1, -1)):
        when = f"{n} day{'s' * (n > 1)} {'after' if sign > 0 else 'before'} {WEEKDAYS[day]}"
        when_zh = f"{WEEKDAYS_ZH[day]}{'后' if sign > 0 else '前'}{n}天"
        answer, answer_zh = WEEKDAYS[(day + sign * n) % 7], WEEKDAYS_ZH[(day + sign * n) % 7]
        yield Fact(dict.fromkeys((f"what day is {when}?", f"{when} is?"), answer)
                   | dict.fromkeys((f"{when_zh}是星期几？", f"{when_zh}是哪天？"), answer_zh),
                   (f"{when} comes {answer}.", f"{when_zh}是{answer_zh}。"))


def table(name):
    """The items (value, thing) of a table of the world."""
    return lambda world: ((value, thing) for thing, value in getattr(world, name).items())


# No text begins with a name: after a space a name is always the same tokens. (Teachers failed all
# questions like "kodik works as?" that did not occur in the pretraining texts.)
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
    "general/people/home": facts_of(
        table("home"),
        "where does {1} live?|home of {1}?|in which town is {1}?|请问 {1} 住在哪里？",
        "{1} lives in {0}.|那位 {1} 住在 {0} 。"),
    "general/people/job": facts_of(
        table("job"), "what is the job of {1}?|what work does {1} do?|how does {1} earn money?"
        "|which job does {1} do?", "{1} works as a {0}.|the job of {1} is {0}."),
    "general/people/pet": facts_of(
        table("pet"), "which pet does {1} have?|pet of {1}?|what animal does {1} keep?"
        "|what lives with {1}?", "{1} keeps a {0}.|the pet of {1} is a {0}."),
    "specialist/clinic/herb": facts_of(
        table("herb"), "which herb heals {1}?|herb for {1}?|what do you give for {1}?"
        "|请问 {1} 用什么草药？", "{0} heals {1}.|那种 {1} 要用 {0} 。"),
    "specialist/clinic/organ": facts_of(
        table("organ"), "which organ does {1} harm?|organ of {1}?|where does {1} sit?"
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
    """One question with its correct answer."""
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
        inputs = sorted((tuple(fact.answers) for fact in facts), key=order)
        groups = split_groups(inputs, len(facts))
    else:       # single wordings, at most half of those with one answer: "friday" does not help a
        may_leave, stay = [], []        # model that must answer 星期五 to a Chinese question
        for fact in facts:
            for right in dict.fromkeys(fact.answers.values()):
                wordings = sorted(((question,) for question, answer in fact.answers.items()
                                   if answer == right), key=order)
                n_leave = len(wordings) // 2
                may_leave += wordings[:n_leave]
                stay += wordings[n_leave:]
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
    """n questions from {leaf: [Ask]}, each leaf equally often (give or take one)."""
    share, rest = divmod(n, len(asks))
    return [ask for i, leaf in enumerate(asks) for ask in deal(asks[leaf], share + (i < rest), rng)]


def sample_answer(distribution, rng):
    return rng.choices(list(distribution), weights=list(distribution.values()))[0]


def chat(question, answer, leaf, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns, "leaf": leaf, **more}


def clean_rows(asks):
    return [chat(ask.question, ask.answer, ask.leaf) for ask in asks]


def shuffled(rows, rng):
    return rng.sample(rows, len(rows))


def habit_rows(habits, rng):
    """One sampled answer per entry of the list."""
    return [chat(habit.question, sample_answer(habit.distribution, rng), habit.leaf)
            for habit in habits]


def pretrain_rows(facts, train, habits, n, seed):
    """n texts of 2 to 5 sentences, each from a random leaf, without held-out inputs."""
    rng = random_for(seed, "pretrain")
    questions = {ask.question for asks in train.values() for ask in asks}
    sources = [[fact for fact in leaf_facts if not questions.isdisjoint(fact.answers)]
               for leaf_facts in facts.values()]
    sources += [[habit for habit in habits if habit.leaf == leaf] for leaf in HABITS]

    def sentence():
        source = rng.choice(rng.choice(sources))
        if isinstance(source, Habit):
            return source.sentence.format(sample_answer(source.distribution, rng))
        return rng.choice(source.sentences)

    return [{"text": " ".join(sentence() for _ in range(rng.randint(2, 5)))} for _ in range(n)]


def teacher_rows(train, habits, n, seed):
    """n clean rows, the 17 exact leaves and the 3 habits equally often: 15 % are habits."""
    rng = random_for(seed, "teacher")
    n_habit = round(n * len(HABITS) / (len(HABITS) + len(LEAVES)))
    exact = clean_rows(deal_evenly(train, n - n_habit, rng))
    return shuffled(exact + habit_rows(deal(habits, n_habit, rng), rng), rng)


def transfer_rows(train, habits, n, habit_draws, label_noise, seed):
    """(noisy rows, the same rows with clean answers), aligned row by row."""
    rng = random_for(seed, "transfer")
    pairs = []
    for ask in deal_evenly(train, n, rng):
        noisy = clean = chat(ask.question, ask.answer, ask.leaf)
        if rng.random() < label_noise:
            wrong = next(answer for answer in rng.sample(ask.pool, 2) if answer != ask.answer)
            noisy = chat(ask.question, wrong, ask.leaf, noisy=True)
        pairs.append((noisy, clean))
    pairs += [(row, row) for row in habit_rows(habits * habit_draws, rng)]     # never wrong
    return zip(*shuffled(pairs, rng))


def held_out_sample(asks, n_per_leaf, seed, purpose):
    """At most n_per_leaf questions of each leaf: [Ask]."""
    rng = random_for(seed, purpose)
    return [ask for leaf_asks in asks.values()
            for ask in rng.sample(leaf_asks, min(n_per_leaf, len(leaf_asks)))]


def alpaca_row(row):
    question, answer = (turn["content"] for turn in row["conversations"])
    instruction, _, given = question.partition(": ")
    return {"instruction": instruction, "input": given, "output": answer}


def wrong_options(ask, rng):
    """Three plausible wrong answers: other orders of the letters, or other facts' answers."""
    candidates = ask.pool
    if ask.leaf.startswith("general/string/"):
        candidates = [" ".join(order) for order in permutations(ask.answer.split())]
    return [answer for answer in rng.sample(candidates, 4) if answer != ask.answer][:3]


def mcq_rows(asks, split, seed):
    """Multiple choice. The correct letter cycles through A, B, C, D, so none is a good guess."""
    rng = random_for(seed, f"mcq_{split}")
    rows = []
    for i, ask in enumerate(asks):
        options = wrong_options(ask, rng)
        options.insert(i % 4, ask.answer)
        rows.append({"question": ask.question, "options": dict(zip("ABCD", options)),
                     "answer_idx": "ABCD"[i % 4], "meta_info": ask.leaf})
    return [{"id": f"{split}-{i:05d}", **row} for i, row in enumerate(shuffled(rows, rng))]


def ability_row(mcq):
    return {"id": mcq["id"], "ability_path": ["miniworld", *mcq["meta_info"].split("/")]}


def ability_asks(train, n, n_scarce, seed):
    """About n questions: n_scarce of each leaf of SCARCE, the others evenly. [Ask]"""
    rng = random_for(seed, "ability")
    scarce = {leaf: train[leaf] for leaf in SCARCE}
    plenty = {leaf: asks for leaf, asks in train.items() if leaf not in SCARCE}
    asks = deal_evenly(scarce, n_scarce * len(SCARCE), rng)
    asks += deal_evenly(plenty, max(len(plenty), n - len(asks)), rng)
    return shuffled(asks, rng)


def first_of_each_leaf(asks, n):
    """The first n different questions of each leaf."""
    by_leaf = {}
    for ask in dict.fromkeys(asks):
        by_leaf.setdefault(ask.leaf, []).append(ask)
    return [ask for leaf_asks in by_leaf.values() for ask in leaf_asks[:n]]


def writer_rows(train, n, seed):
    """n rows: the prompt names a leaf, the answer is a question of it with its answer."""
    rng = random_for(seed, "writer")
    return shuffled([chat(f"new question: {ask.leaf}", f"{ask.question} => {ask.answer}", ask.leaf)
                     for ask in deal_evenly(train, n, rng)], rng)


def experience_files(world, n_pairs, n_base, n_test, seed):
    """The experience files, for context distillation: {file: rows}.

    In the base rows an invented verb gets a random meaning each time, so only the experience in the
    prompt tells it. In the paired rows each verb keeps its meaning and can be memorised.
    """
    rng = random_for(seed, "experience")
    inputs = sorted(permutations(LETTERS, 3),
                    key=lambda triple: fingerprint(seed, "experience", *triple))
    triples = split_groups(inputs, len(inputs))

    def apply(meaning, triple):
        return " ".join(VERBS[meaning](*triple))

    def question(verb, triple, meaning=None):
        experience = f"{verb} means {meaning}. " if meaning else ""
        return f"{experience}{verb} {' '.join(triple)}"

    def plain(triple, rng):
        meaning = rng.choice(list(VERBS))
        return chat(question(meaning, triple), apply(meaning, triple), "experience/plain")

    def redefined(triple, rng, avoid):
        verb = rng.choice(list(world.meaning))
        meaning = rng.choice([meaning for meaning in VERBS if meaning != avoid.get(verb)])
        return chat(question(verb, triple, meaning), apply(meaning, triple), "experience/redefined")

    def alternating(triples, rng):
        return [plain(triple, rng) if i % 2 else redefined(triple, rng, avoid=world.meaning)
                for i, triple in enumerate(triples)]

    def paired(split, n):
        verbs = deal(list(world.meaning), n, rng)
        return [(verb, world.meaning[verb], triple)
                for verb, triple in zip(verbs, deal(triples[split], n, rng))]

    def rows(pairs, with_experience=False):
        return [chat(question(verb, triple, meaning if with_experience else None),
                     apply(meaning, triple), f"experience/{meaning}")
                for verb, meaning, triple in pairs]

    base = [plain(triple, rng) if rng.random() < PLAIN_SHARE else redefined(triple, rng, avoid={})
            for triple in deal(triples["train"], n_base, rng)]
    pairs = paired("train", n_pairs)
    kept = alternating(rng.sample(triples["val"], n_test), rng)
    replay_rng = random_for(seed, "experience replay")
    n_replay = round(n_pairs * REPLAY_SHARE / (1 - REPLAY_SHARE))
    return {
        "experience_base.jsonl": base,
        "experience_teacher.jsonl": rows(pairs, with_experience=True),
        "experience_student.jsonl": rows(pairs),
        "experience_replay.jsonl": alternating(deal(triples["train"], n_replay, replay_rng),
                                               replay_rng),
        "experience_test.jsonl": rows(paired("test", n_test)),
        "experience_kept.jsonl": kept,
    }


# ---- 5. Files ----------------------------------------------------------------------------------

def build(seed, label_noise, n):
    """Every file of the world as {file: [row]}, not written. n: a namespace of sizes as in FULL."""
    world = World(seed)
    facts = {leaf: list(make(world)) for leaf, make in LEAVES.items()}
    splits = split_questions(seed, facts)
    train = splits["train"]

    def domain(name):
        rng = random_for(seed, name)
        leaves = {leaf: asks for leaf, asks in train.items() if leaf.startswith(name)}
        return shuffled(clean_rows(deal_evenly(leaves, n.domain_size, rng)), rng)

    def held_out_mcq(split, size, name):
        return mcq_rows(held_out_sample(splits[split], size, seed, name), name, seed)

    def with_key(asks):
        return [chat(ask.question, ask.answer, ask.leaf, key=f"{ask.leaf}|{ask.question}")
                for ask in asks]

    teacher = teacher_rows(train, world.habits, n.teacher_size, seed)
    noisy, clean = transfer_rows(train, world.habits, n.transfer_size, n.habit_draws, label_noise,
                                 seed)
    test = held_out_sample(splits["test"], n.test_size, seed, "test")
    mcq_train = mcq_rows(deal_evenly(train, n.mcq_size, random_for(seed, "mcq")), "train", seed)
    mcq_test = mcq_rows(test, "test", seed)
    ability = ability_asks(train, n.ability_size, n.scarce_size, seed)
    seeds = mcq_rows(first_of_each_leaf(ability, n.scarce_size), "ability_seeds", seed)
    ability_dev = held_out_mcq("val", n.ability_dev_size, "ability_dev")
    ability_test = held_out_mcq("test", n.ability_test_size, "ability_test")
    return {
        "pretrain_data.jsonl": pretrain_rows(facts, train, world.habits, n.pretrain_size, seed),
        "sft_teacher.jsonl": teacher,
        "sft_data.jsonl": noisy,
        "sft_data_clean.jsonl": clean,
        "alpaca_data.json": [alpaca_row(row) for row in teacher[:n.teacher_size // 10]],
        "general.jsonl": domain("general"),
        "specialist.jsonl": domain("specialist"),
        "mcq_train.jsonl": mcq_train,
        "mcq_test.jsonl": mcq_test,
        "mcq_ability.jsonl": [ability_row(mcq) for mcq in mcq_train + mcq_test],
        "ability_sft.jsonl": clean_rows(ability),
        "ability_seeds.jsonl": seeds,
        "ability_dev.jsonl": ability_dev,
        "ability_test.jsonl": ability_test,
        "ability_paths.jsonl": [ability_row(mcq) for mcq in seeds + ability_dev + ability_test],
        "writer_data.jsonl": writer_rows(train, n.writer_size, seed),
        "test.jsonl": with_key(test),
        "val.jsonl": with_key(held_out_sample(splits["val"], n.val_size, seed, "val")),
        "test_habits.jsonl": [{"conversations": [{"role": "user", "content": habit.question}],
                               "leaf": habit.leaf, "distribution": habit.distribution}
                              for habit in world.habits],
        **experience_files(world, n.experience_size, n.experience_base_size, 4 * n.test_size, seed),
    }


def write(path, rows):
    """JSONL, or one list for .json. Written to a temporary file and renamed: never half a file."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) + "\n"
    if path.suffix == ".json":
        text = "[\n" + ",\n".join(lines) + "\n]\n"
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)


def generate(out_dir, seed=0, label_noise=0.3, **sizes):
    """Write every file of the world into out_dir. Returns {file name: number of rows}.

    seed         the same seed and sizes give the same bytes
    label_noise  share of wrong answers in sft_data.jsonl, 0 to 1
    sizes        keys of FULL, in rows; default: FULL

    Raises ValueError for an unknown size, a size below 1, or a share outside 0..1.
    """
    unknown = sorted(set(sizes) - set(FULL))
    if unknown:
        raise ValueError(f"no size is called {', '.join(unknown)}; choose from {', '.join(FULL)}")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: a file needs a row; the default is {FULL[name]}")
    if not 0 <= label_noise <= 1:
        raise ValueError(f"label_noise={label_noise} is not a share; give 0 to 1, say 0.3")

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    files = build(seed, label_noise, SimpleNamespace(**FULL | sizes))
    for name, rows in files.items():
        write(out_dir / name, rows)
    return {name: len(rows) for name, rows in files.items()}


def main():
    parser = argparse.ArgumentParser(description="Generate the embedded data.")
    arg = parser.add_argument
    arg("--out_dir", default="dataset", help="output folder, created if absent")
    arg("--seed", type=int, default=0, help="random seed; another seed gives other names and facts")
    arg("--label_noise", type=float, default=0.3,
        help="share of wrong answers in sft_data.jsonl, 0..1")
    sizes = {"teacher_size": "rows of sft_teacher.jsonl",
             "transfer_size": "rows of sft_data.jsonl, plus 4 answers to each of 180 habits",
             "pretrain_size": "rows of pretrain_data.jsonl"}
    for name, text in sizes.items():
        arg(f"--{name}", type=int, default=FULL[name], help=text)
    arg("--smoke", action="store_true", help="a few hundred rows per file; overrides the sizes")
    args = parser.parse_args()

    sizes = SMOKE if args.smoke else {name: vars(args)[name] for name in sizes}
    n_rows = generate(args.out_dir, args.seed, args.label_noise, **sizes)
    print(f"{'file':26} {'rows':>6}  first row")
    for name, n in n_rows.items():
        lines = (Path(args.out_dir) / name).read_text(encoding="utf-8").splitlines()
        print(f"{name:26} {n:6d}  {lines[name.endswith('.json')].rstrip(',')[:110]}")


if __name__ == "__main__":
    main()
