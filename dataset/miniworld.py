"""
小世界：由一个种子生成全部训练与测试数据，无需下载。
A small fictional world: every training and test file from one seed, nothing to download.

The world has 20 skills, the leaves of an ability tree. 17 have one right answer (arithmetic, letters,
weekdays, forty invented people, an invented clinic); 3 are habits, whose answer is a draw from a known
distribution.

    what is 3 plus 4?         -> 7                                               general/math/add
    where does zizez live?    -> kuburg                                          general/people/home
    what does sanok drink?    -> juice 50 %, water 25 %, milk 15 %, tea 10 %     general/habits/drink

Questions are held out by a hash of their text: 15 % of each leaf for test, 5 % for validation. Sort
and reverse are held out by input (apply a rule to letters never seen in that order), all else by wording
(recognise a fact that was taught in at least two other wordings).

    pretrain_data.jsonl       {"text"}; plain sentences
    sft_teacher.jsonl         {"conversations", "leaf"}; many clean rows, for the teacher
    sft_data.jsonl            few rows, for the student; some have a wrong answer and "noisy": true
    sft_data_clean.jsonl      the same rows in the same order, all answers right
    alpaca_data.json          {"instruction", "input", "output"}; a slice of sft_teacher, one list
    general.jsonl             two domains for the curriculum, exact answers only
    specialist.jsonl
    mcq_train.jsonl           {"id", "question", "options", "answer_idx", "meta_info"}; multiple choice
    mcq_test.jsonl            test.jsonl as multiple choice
    mcq_ability.jsonl         {"id", "ability_path"}; the leaf of each of those questions
    ability_sft.jsonl         a student's start: five leaves are scarce in it, the others plenty
    ability_seeds.jsonl       eight of its questions on every leaf as multiple choice
    ability_dev.jsonl         the same from questions held out: which leaves are weak?
    ability_test.jsonl        and from test questions: did it help?
    ability_paths.jsonl       {"id", "ability_path"} of all three
    writer_data.jsonl         "new question: general/math/add" -> "what is 3 plus 4? => 7", for the teacher
    test.jsonl  val.jsonl     {"conversations", "leaf", "key"}; held-out questions
    test_habits.jsonl         {"conversations", "leaf", "distribution"}; the true distributions
    experience_base.jsonl     verbs whose meaning is drawn anew in every row, and plain verbs
    experience_teacher.jsonl  "tezum means reverse. tezum k d a": verbs whose meaning stays the same
    experience_student.jsonl  "tezum k d a": the same rows without the experience
    experience_replay.jsonl   plain verbs, and verbs that the prompt explains: mixed in, they are not forgotten
    experience_test.jsonl     the student's questions on held-out letters
    experience_kept.jsonl     not to be forgotten: the same kinds as the replay's, held out

"noisy" is for analysis only: no training script reads it. Habit prompts are seen in training by
design; test_habits.jsonl asks how close the model's probabilities come to the true ones.

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
from typing import NamedTuple

# --------------------------------------------------------------------------------------------------
# 1. The tables of the world
# --------------------------------------------------------------------------------------------------
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
SYMPTOMS = "fever cough rash chills cramp itch thirst nausea".split()      # 28 pairs: one per illness

HABITS = {  # leaf -> (question, sentence, options)
    "general/habits/drink": ("what does {} drink?", "{} drinks {}.", "tea milk juice water".split()),
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

N_PEOPLE, N_RESIDENTS, N_TOWNS = 60, 40, 12     # residents have a home, a job and a pet; all have habits
N_ILLNESSES, N_HERBS, N_VERBS = 28, 14, 16
TEST_SHARE, VAL_SHARE = 0.15, 0.05
PLAIN_SHARE = 0.2               # of experience_base.jsonl: rows that ask plain verbs, "reverse k d a"
REPLAY_SHARE = 0.3              # of what is learned, when experience_replay.jsonl is mixed in
# The leaves that are rules. Sums and sequences are not among them: a model of under a million parameters
# learns their tables by heart sooner than it works out a pair that it never saw.
HELD_OUT_BY_INPUT = ("general/string/sort", "general/string/reverse")
# The leaves that a student of ability_sft.jsonl hardly meets: rules and tables, general and special. Products are not among
# them: taught eight, a student still chose right among four options in two cases of three.
SCARCE = ("general/string/reverse", "general/sequence/next_letter", "general/people/job", "specialist/clinic/organ",
          "specialist/clinic/dose")

# Rows a file; test_size, val_size, scarce_size, ability_dev_size and ability_test_size are per leaf (a leaf that has
# held out fewer gives them all), habit_draws per habit.
FULL = dict(teacher_size=60_000, transfer_size=4_000, pretrain_size=20_000, domain_size=10_000,
            mcq_size=2_000, experience_size=2_400, experience_base_size=20_000,
            test_size=60, val_size=20, habit_draws=4,
            ability_size=4_000, scarce_size=8, ability_dev_size=40, ability_test_size=60, writer_size=50_000)
SMOKE = dict(teacher_size=300, transfer_size=200, pretrain_size=200, domain_size=100,
             mcq_size=102, experience_size=96, experience_base_size=200,
             test_size=6, val_size=2, habit_draws=1,
             ability_size=125, scarce_size=1, ability_dev_size=4, ability_test_size=6, writer_size=102)


def random_for(seed, purpose):
    """A generator for each purpose, so that resizing one file leaves every other file as it was."""
    return Random(f"{seed}/{purpose}")


def invent(rng, n, ending):
    """n distinct names whose ending tells what they name: kuburg is a town, tezum a verb."""
    syllables = [consonant + vowel for consonant, vowel in product("bdklmnrstvz", "aeiou")]
    return [syllable + ending for syllable in rng.sample(syllables, n)]


def assign(rng, n, values):
    """A value for each of n things, each value used about equally often."""
    dealt = [values[i % len(values)] for i in range(n)]
    rng.shuffle(dealt)
    return dealt


class World:
    """The invented names and who has what. Everything else in this file follows from it."""

    def __init__(self, seed):
        rng = random_for(seed, "world")
        first, second = invent(rng, 30, ""), invent(rng, 30, "")
        self.people = rng.sample(["".join(parts) for parts in product(first, second, "kz")], N_PEOPLE)
        self.habits = [Habit(leaf, question.format(name), sentence.format(name, "{}"),
                             dict(zip(rng.sample(options, 4), HABIT_PROBABILITIES)))
                       for leaf, (question, sentence, options) in HABITS.items()
                       for name in self.people]

        def give(things, values):
            return dict(zip(things, assign(rng, len(things), values)))

        residents = self.people[:N_RESIDENTS]
        self.home = give(residents, invent(rng, N_TOWNS, "burg"))
        self.job = give(residents, JOBS)
        self.pet = give(residents, PETS)

        illnesses = invent(rng, N_ILLNESSES, "pox")
        self.herb = give(illnesses, invent(rng, N_HERBS, "wort"))
        self.organ = give(illnesses, ORGANS)
        self.dose_per_kg = give(illnesses, (2, 3, 4, 5))
        self.symptoms = give(illnesses, list(combinations(SYMPTOMS, 2)))

        self.meaning = give(invent(rng, N_VERBS, "zum"), list(VERBS))
        self.triples = rng.sample(list(permutations(LETTERS, 3)), 6_000)
        self.letter_lists = [rng.sample(LETTERS, n_letters) for n_letters in (3, 4, 5)
                             for _ in range(2_000)]


# --------------------------------------------------------------------------------------------------
# 2. One small function per leaf
#
# A name never opens a text: with the space before it, it is the same tokens wherever it stands. (Teachers
# answered every question of the form "kodik works as?" wrong that no training text had asked.)
# --------------------------------------------------------------------------------------------------
class Fact(NamedTuple):
    """One thing to know: how it is asked and how it is told."""
    answers: dict           # question -> answer, one for each of the four wordings
    sentences: tuple


class Habit(NamedTuple):
    """What somebody usually does: the answer is a draw."""
    leaf: str
    question: str
    sentence: str           # with {} where the answer goes
    distribution: dict      # answer -> probability


def same_answer(answer, *questions):
    return dict.fromkeys(questions, str(answer))


def add(world):
    for a, b in product(range(1, 13), repeat=2):
        yield Fact(same_answer(a + b, f"{a} + {b} = ?", f"what is {a} plus {b}?",
                               f"add {a} and {b}.", f"{a} and {b} make?"),
                   (f"{a} + {b} = {a + b}.", f"{a} plus {b} is {a + b}."))


def sub(world):
    for a, b in product(range(1, 13), repeat=2):
        if b <= a:
            yield Fact(same_answer(a - b, f"{a} - {b} = ?", f"what is {a} minus {b}?",
                                   f"take {b} from {a}.", f"{a} less {b} is?"),
                       (f"{a} - {b} = {a - b}.", f"{a} minus {b} is {a - b}."))


def mul(world):
    for a, b in product(range(2, 13), range(2, 10)):
        yield Fact(same_answer(a * b, f"{a} x {b} = ?", f"what is {a} times {b}?",
                               f"multiply {a} by {b}.", f"product of {a} and {b}?"),
                   (f"{a} x {b} = {a * b}.", f"{a} times {b} is {a * b}."))


def sort(world):
    for given in map(" ".join, dict.fromkeys(map(tuple, world.letter_lists))):
        answer = " ".join(sorted(given.split()))
        yield Fact(same_answer(answer, f"sort these letters: {given}", f"what is {given} in order?",
                               f"put {given} in order.", f"alphabetical order: {given}"),
                   (f"{given} sorted is {answer}.",))


def reverse(world):
    for given in map(" ".join, world.triples):
        answer = given[::-1]
        yield Fact(same_answer(answer, f"write backwards: {given}", f"what is {given} backwards?",
                               f"flip {given}.", f"from the end: {given}"),
                   (f"{given} turned around is {answer}.",))


def next_number(world):
    for start, step, n_terms in product(range(1, 13), range(1, 6), (3, 4)):
        yield from continued([str(start + i * step) for i in range(n_terms + 1)])


def next_letter(world):
    for start, step, n_terms in product(range(26), (-1, 1, 2, 3), (3, 4)):
        if 0 <= start + n_terms * step < 26:
            yield from continued([LETTERS[start + i * step] for i in range(n_terms + 1)])


def continued(terms):
    given, answer = " ".join(terms[:-1]), terms[-1]
    yield Fact(same_answer(answer, f"what comes next: {given}", f"after {given} comes?",
                           f"continue {given}.", f"what follows {given}?"),
               (f"after {given} comes {answer}.",))


def weekday(world):
    for day, n, sign in product(range(7), range(1, 4), (1, -1)):
        when = f"{n} day{'s' * (n > 1)} {'after' if sign > 0 else 'before'} {WEEKDAYS[day]}"
        when_zh = f"{WEEKDAYS_ZH[day]}{'后' if sign > 0 else '前'}{n}天"
        answer, answer_zh = WEEKDAYS[(day + sign * n) % 7], WEEKDAYS_ZH[(day + sign * n) % 7]
        yield Fact(same_answer(answer, f"what day is {when}?", f"{when} is?")
                   | same_answer(answer_zh, f"{when_zh}是星期几？", f"{when_zh}是哪天？"),
                   (f"{when} comes {answer}.", f"{when_zh}是{answer_zh}。"))


def units(world):
    for (big, small, factor), n in product(UNITS, range(2, 10)):
        yield Fact(same_answer(n * factor, f"how many {small} in {n} {big}?", f"{n} {big} = ? {small}",
                               f"convert {n} {big} to {small}.", f"{n} {big} make how many {small}?"),
                   (f"{n} {big} = {n * factor} {small}.",))


def chinese(world):
    for word, opposite in [pair for both in OPPOSITES_ZH for pair in (both, both[::-1])]:
        yield Fact(same_answer(opposite, f"{word}的反义词是什么？", f"和{word}相反的字？",
                               f"{word}的反面是？", f"{word}对什么？"),
                   (f"{word}的反义词是{opposite}。", f"{word}和{opposite}相反。"))


def home(world):
    for name, town in world.home.items():
        yield Fact(same_answer(town, f"where does {name} live?", f"home of {name}?",
                               f"in which town is {name}?", f"请问 {name} 住在哪里？"),
                   (f"{name} lives in {town}.", f"那位 {name} 住在 {town} 。"))


def job(world):
    for name, work in world.job.items():
        yield Fact(same_answer(work, f"what is the job of {name}?", f"what work does {name} do?",
                               f"how does {name} earn money?", f"which job does {name} do?"),
                   (f"{name} works as a {work}.", f"the job of {name} is {work}."))


def pet(world):
    for name, animal in world.pet.items():
        yield Fact(same_answer(animal, f"which pet does {name} have?", f"pet of {name}?",
                               f"what animal does {name} keep?", f"what lives with {name}?"),
                   (f"{name} keeps a {animal}.", f"the pet of {name} is a {animal}."))


def herb(world):
    for illness, plant in world.herb.items():
        yield Fact(same_answer(plant, f"which herb heals {illness}?", f"herb for {illness}?",
                               f"what do you give for {illness}?", f"请问 {illness} 用什么草药？"),
                   (f"{plant} heals {illness}.", f"那种 {illness} 要用 {plant} 。"))


def organ(world):
    for illness, part in world.organ.items():
        yield Fact(same_answer(part, f"which organ does {illness} harm?", f"organ of {illness}?",
                               f"where does {illness} sit?", f"what does {illness} attack?"),
                   (f"{illness} harms the {part}.", f"{illness} sits in the {part}."))


def diagnosis(world):
    for illness, (s, t) in world.symptoms.items():
        yield Fact(same_answer(illness, f"which illness has {s} and {t}?", f"{s} and {t} mean?",
                               f"diagnose {t} with {s}.", f"what causes {t} and {s}?"),
                   (f"{illness} causes {s} and {t}.", f"{t} with {s} means {illness}."))


def dose(world):
    for (illness, per_kg), kg in product(world.dose_per_kg.items(), range(2, 10)):
        mg = per_kg * kg
        yield Fact(same_answer(mg, f"dose for {illness} at {kg} kg?", f"how much for {illness} at {kg} kg?",
                               f"mg for {kg} kg with {illness}?",
                               f"how many mg for {illness}, {kg} kg?"),
                   (f"{illness} needs {per_kg} mg per kg.", f"{kg} kg with {illness} need {mg} mg."))


LEAVES = {
    "general/math/add": add, "general/math/sub": sub, "general/math/mul": mul,
    "general/string/sort": sort, "general/string/reverse": reverse,
    "general/sequence/next_number": next_number, "general/sequence/next_letter": next_letter,
    "general/everyday/weekday": weekday, "general/everyday/units": units,
    "general/everyday/chinese": chinese,
    "general/people/home": home, "general/people/job": job, "general/people/pet": pet,
    "specialist/clinic/herb": herb, "specialist/clinic/organ": organ,
    "specialist/clinic/diagnosis": diagnosis, "specialist/clinic/dose": dose,
}


# --------------------------------------------------------------------------------------------------
# 3. Hold-out: which questions nobody may train on
# --------------------------------------------------------------------------------------------------
class Ask(NamedTuple):
    """One question with its right answer."""
    leaf: str
    question: str
    answer: str
    pool: tuple             # every answer to this wording of this leaf: wrong ones come from here


def fingerprint(*parts):
    """A hash to sort by, the same in every run (Python's own hash() of a string is not)."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def split_groups(groups, n):
    """Cut a list: the first 15 % of n are for test, the next 5 % for validation, the rest to train on."""
    n_test, n_val = round(TEST_SHARE * n), round(VAL_SHARE * n)
    held_out = n_test + n_val
    return {"test": groups[:n_test], "val": groups[n_test:held_out], "train": groups[held_out:]}


def split_leaf(seed, leaf, facts):
    """{question: "train" | "val" | "test"} for one leaf."""
    def order(group):
        return fingerprint(seed, leaf, *group)

    if leaf in HELD_OUT_BY_INPUT:       # the four wordings of an input go together
        groups = split_groups(sorted((tuple(fact.answers) for fact in facts), key=order), len(facts))
    else:       # a wording goes alone, and half of those with the same answer stay: "friday" is no help
        may_leave, stay = [], []        # to a model that is asked in Chinese and must answer 星期五
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


# --------------------------------------------------------------------------------------------------
# 4. Rows
# --------------------------------------------------------------------------------------------------
def deal(items, n, rng):
    """n of the items in random order; none comes a second time before all came once."""
    dealt = []
    while len(dealt) < n:
        dealt += rng.sample(items, min(len(items), n - len(dealt)))
    return dealt


def deal_evenly(asks, n, rng):
    """n questions from {leaf: [Ask]}, each leaf as often as every other (give or take one)."""
    share, rest = divmod(n, len(asks))
    return [ask for i, leaf in enumerate(asks) for ask in deal(asks[leaf], share + (i < rest), rng)]


def sample_answer(distribution, rng):
    return rng.choices(list(distribution), weights=list(distribution.values()))[0]


def chat(question, answer, leaf, **more):
    conversations = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": conversations, "leaf": leaf, **more}


def clean_rows(asks):
    return [chat(ask.question, ask.answer, ask.leaf) for ask in asks]


def shuffled(rows, rng):
    return rng.sample(rows, len(rows))


def habit_rows(habits, rng):
    """One draw for each habit in the list, so a habit that is listed 4 times is answered 4 times."""
    return [chat(habit.question, sample_answer(habit.distribution, rng), habit.leaf)
            for habit in habits]


def pretrain_rows(facts, train, habits, n, seed):
    """n texts of 2 to 5 sentences, each from a leaf drawn at random; held-out inputs do not appear."""
    rng = random_for(seed, "pretrain")
    taught = {ask.question for asks in train.values() for ask in asks}
    sayings = [[fact for fact in leaf_facts if not taught.isdisjoint(fact.answers)]
               for leaf_facts in facts.values()]
    sayings += [[habit for habit in habits if habit.leaf == leaf] for leaf in HABITS]

    def sentence():
        said = rng.choice(rng.choice(sayings))
        if isinstance(said, Habit):
            return said.sentence.format(sample_answer(said.distribution, rng))
        return rng.choice(said.sentences)

    return [{"text": " ".join(sentence() for _ in range(rng.randint(2, 5)))} for _ in range(n)]


def teacher_rows(train, habits, n, seed):
    """n clean rows, the 17 exact leaves and the 3 habits all equally often: 15 % are habits."""
    rng = random_for(seed, "teacher")
    n_habit = round(n * len(HABITS) / (len(HABITS) + len(LEAVES)))
    exact = clean_rows(deal_evenly(train, n - n_habit, rng))
    return shuffled(exact + habit_rows(deal(habits, n_habit, rng), rng), rng)


def transfer_rows(train, habits, n, habit_draws, label_noise, seed):
    """(rows with wrong answers among them, the same rows with right answers), aligned row by row."""
    rng = random_for(seed, "transfer")
    pairs = []
    for ask in deal_evenly(train, n, rng):
        clean = chat(ask.question, ask.answer, ask.leaf)
        if rng.random() < label_noise:
            wrong = next(answer for answer in rng.sample(ask.pool, 2) if answer != ask.answer)
            pairs.append((chat(ask.question, wrong, ask.leaf, noisy=True), clean))
        else:
            pairs.append((clean, clean))
    pairs += [(row, row) for row in habit_rows(habits * habit_draws, rng)]  # a draw is never wrong
    given, right = zip(*shuffled(pairs, rng))
    return given, right


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
    """Three wrong answers of the right kind: other orders of the letters, or other facts' answers."""
    if ask.leaf.startswith("general/string/"):
        candidates = [" ".join(order) for order in permutations(ask.answer.split())]
    else:
        candidates = ask.pool
    return [answer for answer in rng.sample(candidates, 4) if answer != ask.answer][:3]


def mcq_rows(asks, split, seed):
    """Multiple choice. The right letter goes round A, B, C, D, so that no letter is a good guess."""
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


def lopsided(train, n, n_scarce, seed):
    """About n questions: n_scarce of each leaf of SCARCE, the others even. [Ask]"""
    rng = random_for(seed, "ability")
    scarce = {leaf: train[leaf] for leaf in SCARCE}
    plenty = {leaf: asks for leaf, asks in train.items() if leaf not in SCARCE}
    asks = deal_evenly(scarce, n_scarce * len(SCARCE), rng)
    asks += deal_evenly(plenty, max(len(plenty), n - len(asks)), rng)
    return shuffled(asks, rng)


def first_of_each_leaf(asks, n):
    """The first n different ones of each leaf."""
    by_leaf = {}
    for ask in dict.fromkeys(asks):
        by_leaf.setdefault(ask.leaf, []).append(ask)
    return [ask for of_leaf in by_leaf.values() for ask in of_leaf[:n]]


def writer_rows(train, n, seed):
    """n rows that ask for a question of a leaf, and get one with its answer; every leaf equally often."""
    rng = random_for(seed, "writer")
    return shuffled([chat(f"new question: {ask.leaf}", f"{ask.question} => {ask.answer}", ask.leaf)
                     for ask in deal_evenly(train, n, rng)], rng)


def experience_files(world, n_pairs, n_base, n_test, seed):
    """The experience files: {file: rows}.

    In the base rows the meaning of an invented verb is drawn anew each time, so only the experience in
    the prompt can tell it. In the paired rows each verb keeps its meaning and can be learnt by heart.
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

    def plain(triple, rng=rng):
        meaning = rng.choice(list(VERBS))
        return chat(question(meaning, triple), apply(meaning, triple), "experience/plain")

    def redefined(triple, avoid, rng=rng):
        verb = rng.choice(list(world.meaning))
        meaning = rng.choice([meaning for meaning in VERBS if meaning != avoid.get(verb)])
        return chat(question(verb, triple, meaning), apply(meaning, triple), "experience/redefined")

    def paired(split, n):
        verbs = deal(list(world.meaning), n, rng)
        return [(verb, world.meaning[verb], triple)
                for verb, triple in zip(verbs, deal(triples[split], n, rng))]

    def rows(pairs, with_experience=False):
        return [chat(question(verb, triple, meaning if with_experience else None), apply(meaning, triple),
                     f"experience/{meaning}") for verb, meaning, triple in pairs]

    base = [plain(triple) if rng.random() < PLAIN_SHARE else redefined(triple, avoid={})
            for triple in deal(triples["train"], n_base, rng)]
    pairs = paired("train", n_pairs)
    kept = [plain(triple) if i % 2 else redefined(triple, avoid=world.meaning)
            for i, triple in enumerate(rng.sample(triples["val"], n_test))]
    draw = random_for(seed, "experience replay")
    replay = [plain(triple, draw) if i % 2 else redefined(triple, world.meaning, draw)
              for i, triple in enumerate(deal(triples["train"], round(n_pairs * REPLAY_SHARE / (1 - REPLAY_SHARE)), draw))]
    return {
        "experience_base.jsonl": base,
        "experience_teacher.jsonl": rows(pairs, with_experience=True),
        "experience_student.jsonl": rows(pairs),
        "experience_replay.jsonl": replay,
        "experience_test.jsonl": rows(paired("test", n_test)),
        "experience_kept.jsonl": kept,
    }


# --------------------------------------------------------------------------------------------------
# 5. Files
# --------------------------------------------------------------------------------------------------
def build(seed, label_noise, *, teacher_size, transfer_size, pretrain_size, domain_size, mcq_size,
          experience_size, experience_base_size, test_size, val_size, habit_draws,
          ability_size, scarce_size, ability_dev_size, ability_test_size, writer_size):
    """Every file of the world as {file: [row]}; nothing is written. Sizes as in FULL."""
    world = World(seed)
    facts = {leaf: list(make(world)) for leaf, make in LEAVES.items()}
    splits = split_questions(seed, facts)
    train = splits["train"]

    teacher = teacher_rows(train, world.habits, teacher_size, seed)
    given, right = transfer_rows(
        train, world.habits, transfer_size, habit_draws, label_noise, seed)
    domains = {}
    for domain in ("general", "specialist"):
        rng = random_for(seed, domain)
        leaves = {leaf: asks for leaf, asks in train.items() if leaf.startswith(domain)}
        domains[domain] = shuffled(clean_rows(deal_evenly(leaves, domain_size, rng)), rng)
    test = held_out_sample(splits["test"], test_size, seed, "test")
    val = held_out_sample(splits["val"], val_size, seed, "val")
    mcq_train = mcq_rows(deal_evenly(train, mcq_size, random_for(seed, "mcq")), "train", seed)
    mcq_test = mcq_rows(test, "test", seed)
    taught = lopsided(train, ability_size, scarce_size, seed)
    seeds = mcq_rows(first_of_each_leaf(taught, scarce_size), "ability_seeds", seed)
    dev, exam = (mcq_rows(held_out_sample(splits[split], size, seed, name), name, seed)
                 for split, size, name in (("val", ability_dev_size, "ability_dev"),
                                           ("test", ability_test_size, "ability_test")))

    def with_key(ask):
        return chat(ask.question, ask.answer, ask.leaf, key=f"{ask.leaf}|{ask.question}")

    return {
        "pretrain_data.jsonl": pretrain_rows(facts, train, world.habits, pretrain_size, seed),
        "sft_teacher.jsonl": teacher,
        "sft_data.jsonl": given,
        "sft_data_clean.jsonl": right,
        "alpaca_data.json": [alpaca_row(row) for row in teacher[:teacher_size // 10]],
        "general.jsonl": domains["general"],
        "specialist.jsonl": domains["specialist"],
        "mcq_train.jsonl": mcq_train,
        "mcq_test.jsonl": mcq_test,
        "mcq_ability.jsonl": [ability_row(mcq) for mcq in mcq_train + mcq_test],
        "ability_sft.jsonl": clean_rows(taught),
        "ability_seeds.jsonl": seeds,
        "ability_dev.jsonl": dev,
        "ability_test.jsonl": exam,
        "ability_paths.jsonl": [ability_row(mcq) for mcq in seeds + dev + exam],
        "writer_data.jsonl": writer_rows(train, writer_size, seed),
        "test.jsonl": [with_key(ask) for ask in test],
        "val.jsonl": [with_key(ask) for ask in val],
        "test_habits.jsonl": [{"conversations": [{"role": "user", "content": habit.question}],
                               "leaf": habit.leaf, "distribution": habit.distribution}
                              for habit in world.habits],
        **experience_files(world, experience_size, experience_base_size, 4 * test_size, seed),
    }


def write(path, rows):
    """JSONL, or one list for .json. Written beside its place and then renamed: never half a file."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if path.suffix == ".json":
        text = "[\n" + ",\n".join(lines) + "\n]\n"
    else:
        text = "\n".join(lines) + "\n"
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)


def generate(out_dir, seed=0, label_noise=0.3, **sizes):
    """Write every file of the world into out_dir (made if absent).

    out_dir      a folder, str or Path
    seed         int; the same seed and sizes give the same bytes
    label_noise  share of wrong answers in sft_data.jsonl, 0 to 1
    sizes        any of the keys of FULL, in rows; what is not named has its value there
    returns      {file name: number of rows}
    raises       ValueError for a size that does not exist, a size below 1, or a share outside 0..1
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
    files = build(seed, label_noise, **{**FULL, **sizes})
    for name, rows in files.items():
        write(out_dir / name, rows)
    return {name: len(rows) for name, rows in files.items()}


def example(path):
    """The first row of a file, cut to the width of a terminal."""
    with open(path, encoding="utf-8") as lines:
        line = next(lines)
        row = next(lines) if path.suffix == ".json" else line
    return row.rstrip(",\n")[:110]


def main():
    parser = argparse.ArgumentParser(description="Generate the embedded data.")
    arg = parser.add_argument
    # where and how
    arg("--out_dir", default="dataset", help="folder of the files; made if absent")
    arg("--seed", type=int, default=0, help="another seed is another world: other names, other facts")
    arg("--label_noise", type=float, default=0.3, help="wrong share of sft_data.jsonl, 0..1")
    # sizes, in rows
    arg("--teacher_size", type=int, default=FULL["teacher_size"], help="of sft_teacher.jsonl")
    arg("--transfer_size", type=int, default=FULL["transfer_size"],
        help="of sft_data.jsonl, not counting its habits (4 draws of each of 180)")
    arg("--pretrain_size", type=int, default=FULL["pretrain_size"], help="of pretrain_data.jsonl")
    arg("--smoke", action="store_true", help="a few hundred rows a file, whatever the sizes above say")
    args = parser.parse_args()

    sizes = SMOKE if args.smoke else {
        name: vars(args)[name] for name in ("teacher_size", "transfer_size", "pretrain_size")}
    n_rows = generate(args.out_dir, args.seed, args.label_noise, **sizes)
    print(f"{'file':26} {'rows':>6}  first row")
    for name, n in n_rows.items():
        print(f"{name:26} {n:6d}  {example(Path(args.out_dir) / name)}")


if __name__ == "__main__":
    main()
