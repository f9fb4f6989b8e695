"""The built-in corpus: an endless, seeded grammar of small stories for language models that train from scratch.

    (seed, index, split) -> random numbers -> a teller tells stories -> the first one that belongs to the split

Two or three friends are somewhere with one or more things, and the things change hands. The teller knows who is
there, where they are and who holds what: only a holder gives, and what was given is then with the receiver.

The receiver of a giving can be worked out: of two people it is the other one; among three, the sentence before tells
who wants the thing, or the giving sentence opens with the pair. After the opening, people are picked by what they
hold, never by the order in which they were named, so the giver is first- or second-named equally often. The frame of
the indirect-object prompts ("When A and B went to the P, A gave the O to") is left out: no lead says "went to".
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from hashlib import sha256
from itertools import count as count_from
from random import Random
from typing import Literal, NamedTuple, TypedDict, TypeVar, get_args

from .story_words import (
    ANIMALS,
    ARRIVAL_LEADS,
    CHATS,
    DAYS,
    ENDINGS,
    FEELINGS,
    FINDS,
    FOODS,
    GIVES,
    GOODBYES,
    HE,
    INTRODUCTIONS,
    KEEPS,
    LEADS,
    LOOKS,
    LOSSES,
    MEALS,
    MOVES,
    OBJECTS,
    OPENINGS,
    OTHER_GIVES,
    PAIR_LEADS,
    PLACES,
    PUT_DOWNS,
    RETURNS,
    SHE,
    SHOWS,
    SPOTS,
    STOCKS,
    THANKS,
    THING_LOOKS,
    TOPICS,
    WEEKDAYS,
    WISHES,
)

Split = Literal["train", "validation"]
Entry = TypeVar("Entry")

MARKER = "<|endoftext|>"  # stands between two documents of the corpus

# ---- The teller ----------------------------------------------------------------------------------------------------


class Person(str):
    """A name that knows its pronouns, so that a template can say {giver} and {giver.he}."""

    he: str
    him: str
    his: str

    def __new__(cls, name: str, *pronouns: str) -> "Person":
        person = super().__new__(cls, name)
        person.he, person.him, person.his = pronouns
        return person


CAST = [Person(name, "he", "him", "his") for name in HE] + [Person(name, "she", "her", "her") for name in SHE]


class Told(NamedTuple):
    """A finished story, and the thing and the place that its last sentence speaks of."""

    sentences: list[str]
    obj: str
    place: str

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


class Teller:
    """Tells one story: knows who is there, where they are and who holds what, and keeps the sentences told."""

    def __init__(self, rng: Random) -> None:
        self.random = rng.random  # the one source: random() is stable over Python versions, choice() need not be
        self.sentences: list[str] = []
        self.words = 0
        self.here = self.sample(CAST, 2 if self.random() < 0.6 else 3)
        self.place = self.pick(PLACES)
        self.looks: dict[str, str] = {}  # of every thing that the story has named
        self.holder: dict[str, Person] = {}
        self.lender: dict[str, Person] = {}  # who gave the thing to its holder

    def tell(self) -> Told:
        """Opening, one giving, then events of the deck until the story is long enough, and an ending."""
        target = 50 + int(60 * self.random())  # words; what the last event runs over and the ending come on top
        a, *rest = self.here
        self.say(OPENINGS, a=a, rest=" and ".join(rest), day=self.pick(DAYS), weekday=self.pick(WEEKDAYS))
        self.introduce(INTRODUCTIONS)
        self.give()
        deck = [event for event, cards in EVENTS.items() for _ in range(cards)]
        while self.words < target:
            event = deck.pop(int(len(deck) * self.random()))
            event(self)
        obj, holder, other = self.held()
        self.say(ENDINGS, obj=self.the(obj), holder=holder, other=other)
        return Told(self.sentences, obj, self.place)

    # Picking

    def pick(self, table: Sequence[Entry]) -> Entry:
        return table[int(len(table) * self.random())]

    def sample(self, table: Sequence[Entry], size: int) -> list[Entry]:
        """Different entries in random order."""
        drawn: list[Entry] = []
        while len(drawn) < size:
            if (entry := self.pick(table)) not in drawn:
                drawn.append(entry)
        return drawn

    def held(self) -> tuple[str, Person, Person]:
        """Some thing of the story, its holder, and somebody else."""
        obj = self.pick(list(self.holder))
        return obj, self.holder[obj], self.pick([one for one in self.here if one is not self.holder[obj]])

    def new(self, table: Sequence[str]) -> str:
        """A thing that the story has not named yet."""
        while (obj := self.pick(table)) in self.looks:
            pass
        self.looks[obj] = self.pick(LOOKS if obj in FOODS else THING_LOOKS)
        return obj

    # Wording

    def say(self, table: Sequence[str], **fields: str) -> None:
        """Tell one line of the table."""
        everyone = listed(self.sample(self.here, len(self.here)))
        sentence = self.pick(table).format(all=everyone, place=self.place, spot=self.pick(SPOTS), **fields)
        self.words += sentence.count(" ") + 1
        self.sentences.append(sentence[0].upper() + sentence[1:])

    def the(self, obj: str) -> str:
        return f"the {self.looks[obj]} {obj}" if self.random() < 0.3 else f"the {obj}"

    # Events

    def introduce(self, table: Sequence[str] = FINDS) -> None:
        obj = self.new(OBJECTS)
        self.holder[obj] = self.pick(self.here)
        self.say(table, obj=with_article(f"{self.looks[obj]} {obj}"), holder=self.holder[obj])

    def hand_over(self, phrase: str, giver: Person, receiver: Person, leads: Sequence[str] | None = None) -> None:
        """A giving clause. Among three, a lead that names the pair or a wish always tells who will receive."""
        if leads is None:
            leads = PAIR_LEADS if self.random() < 0.4 else LEADS
        if leads is LEADS and (len(self.here) > 2 or self.random() < 0.5):
            self.say(WISHES, obj=phrase, giver=giver, receiver=receiver)
        clause = self.pick(GIVES if self.random() < 0.75 else OTHER_GIVES)
        p, q = self.sample((giver, receiver), 2)
        self.say((f"{self.pick(leads)} {clause}".lstrip(),), obj=phrase, giver=giver, receiver=receiver, p=p, q=q)

    def give(self, leads: Sequence[str] | None = None) -> None:
        obj, giver, receiver = self.held()
        self.hand_over(self.the(obj), giver, receiver, leads)
        self.holder[obj], self.lender[obj] = receiver, giver
        if self.random() < 0.5:
            self.say(THANKS, giver=giver, receiver=receiver)

    def give_back(self) -> None:
        obj, giver, _ = self.held()
        receiver = self.lender.pop(obj, None)
        if receiver is not None and receiver in self.here:
            self.holder[obj] = receiver
            self.say(RETURNS, obj=self.the(obj), giver=giver, receiver=receiver)
        else:
            self.give()

    def share(self) -> None:
        obj = self.new(FOODS)
        objs = obj + ("es" if obj.endswith("ch") else "s")
        giver, receiver = self.sample(self.here, 2)
        self.say(STOCKS, objs=objs, giver=giver)
        self.hand_over(with_article(obj), giver, receiver)
        self.say(KEEPS, objs=objs, giver=giver, receiver=receiver)

    def lose(self) -> None:
        obj, loser, other = self.held()
        finder = self.pick(self.here)
        self.say(LOSSES, obj=self.the(obj), loser=loser, other=other, finder=finder)
        if finder is not loser:
            self.say(RETURNS, obj=self.the(obj), giver=finder, receiver=loser)

    def put_down(self) -> None:
        obj, giver, receiver = self.held()
        self.say(PUT_DOWNS, obj=self.the(obj), giver=giver, receiver=receiver)
        self.holder[obj] = receiver
        self.lender.pop(obj, None)

    def move(self) -> None:
        old = self.place
        while self.place == old:
            self.place = self.pick(PLACES)
        if len(self.here) == 2 and self.random() < 0.6:  # these leads name two, and nobody is to be left behind
            self.give(ARRIVAL_LEADS)
        else:
            obj, holder, _ = self.held()
            self.say(MOVES, old=old, one=self.pick(self.here), obj=self.the(obj), holder=holder)

    def show(self) -> None:
        obj, holder, other = self.held()
        table = MEALS if obj in FOODS and self.random() < 0.5 else SHOWS
        self.say(table, obj=self.the(obj), holder=holder, other=other)

    def chat(self) -> None:
        one, other = self.sample(self.here, 2)
        topic, feeling, animal = self.pick(TOPICS), self.pick(FEELINGS), self.pick(ANIMALS)
        self.say(CHATS, one=one, other=other, topic=topic, feeling=feeling, animal=animal)

    def leave(self) -> None:
        free = [person for person in self.here if person not in self.holder.values()]
        if len(self.here) == 3 and free:
            one = self.pick(free)
            self.here = [person for person in self.here if person is not one]
            self.say(GOODBYES, one=one, others=listed(self.sample(self.here, 2)))
        else:
            self.give()


# The deck, with the number of cards of an event. A story does not put back what it draws, so that no event repeats too
# often; the shortest lines of all 21 cards have more words than the longest target, so the deck is never empty.
EVENTS: dict[Callable[[Teller], None], int] = {
    Teller.give: 6,
    Teller.give_back: 2,
    Teller.share: 2,
    Teller.show: 2,
    Teller.chat: 3,
    Teller.introduce: 1,
    Teller.lose: 1,
    Teller.put_down: 1,
    Teller.move: 2,
    Teller.leave: 1,
}


def listed(people: Sequence[str]) -> str:
    return f"{', '.join(people[:-1])} and {people[-1]}"


def with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


# ---- The corpus ----------------------------------------------------------------------------------------------------


def split_of(text: str) -> Split:
    """The split that a text belongs to, whoever drew it: one sixteenth of hash space is validation."""
    return "validation" if sha256(text.encode()).digest()[0] < 256 // 16 else "train"


def draw(seed: int, index: int, split: Split) -> Told:
    """The first story of the split among those that the random numbers of (seed, index, split) tell."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, not {split!r}")
    rng = Random(f"{seed}/{index}/{split}")  # a text seeds through SHA-512, never through Python's own hash
    while split_of((told := Teller(rng).tell()).text) != split:
        pass
    return told


def story(seed: int, index: int, split: Split) -> str:
    """The story at `index` of the endless corpus `seed`: a pure function of its arguments.

    The splits are disjoint by construction: `split_of` puts every possible text into exactly one of them, and a story
    is drawn again until it is in the one asked for. So no text of one split can occur in the other, whatever the seeds
    and indices. They share names, words and sentences, as any two halves of one grammar do. A train story costs 16/15
    candidates, a validation story 16.
    """
    return draw(seed, index, split).text


def stories(seed: int, split: Split, start: int = 0, count: int | None = None) -> Iterator[str]:
    """`count` stories from index `start` on; without a count they never end."""
    indices = count_from(start) if count is None else range(start, start + count)
    return (story(seed, index, split) for index in indices)


# ---- Multiple choice -----------------------------------------------------------------------------------------------


class ChoiceItem(TypedDict):
    """A story without its last sentence, four sentences that might end it, and the place of the one that does."""

    ctx: str
    endings: list[str]
    label: int


NAME = re.compile(rf"\b(?:{'|'.join(CAST)})\b")


def names_in(text: str) -> list[str]:
    """The different names of a text, in order of first mention."""
    return list(dict.fromkeys(NAME.findall(text)))


def recast(sentence: str, names: Sequence[str]) -> str:
    """The sentence told of other people, in order of first mention."""
    role = dict(zip(names_in(sentence), names, strict=True))
    return NAME.sub(lambda name: role[name[0]], sentence)


def choice_items(seed: int, count: int) -> Iterator[ChoiceItem]:
    """Multiple-choice items in HellaSwag's manner, from the validation stories of `seed`.

    Item i asks for the last sentence of story i. The wrong ones end the next stories: those that name as many people,
    and speak of a thing and a place that the context does not have. They are told with the names of the right ending,
    in its order of mention, so names give nothing away.
    """
    drawn = lru_cache(maxsize=256)(partial(draw, seed, split="validation"))  # neighbours share their wrong endings
    for index in range(count):
        *context, right = drawn(index).sentences
        ctx, names, ahead = " ".join(context), names_in(right), map(drawn, count_from(index + 1))
        endings: list[str] = []
        while len(endings) < 3:
            other = next(ahead)
            ending = other.sentences[-1]
            fits = len(names_in(ending)) == len(names) and other.obj not in ctx and other.place not in ctx
            if fits and (wrong := recast(ending, names)) not in endings:
                endings.append(wrong)
        label = int(4 * Random(f"{seed}/{index}/label").random())
        endings.insert(label, right)
        yield {"ctx": ctx, "endings": endings, "label": label}
