"""The words and sentence templates of the built-in stories, which `llm.data.stories` tells."""

# ---- Words ---------------------------------------------------------------------------------------------------------

HE = "John Tom James Dan Sam Ben Max Leo Jack Peter Adam Luke Paul Oscar Harry George".split()
SHE = "Mary Emily Amy Anna Lucy Kate Sara Lily Ella Nina Ruth Jane Molly Sophie Clara Alice".split()
PLACES = (  # each goes with "at the", "to the" and "from the"
    "shops park beach lake school zoo farm river market library playground museum station pool castle bakery harbour "
    "pond theatre stables mill bridge fair lighthouse campsite fountain"
).split()
THINGS = (
    "ball bag kite book hat cup box key torch umbrella drum doll basket map scarf camera bell lamp rope whistle puzzle "
    "boat spoon bucket blanket flag flute letter shell mask robot brush"
).split()
FOODS = "apple drink pear sandwich biscuit cake orange banana pie peach plum bun".split()
OBJECTS = THINGS + FOODS
LOOKS = "big small nice lovely strange pretty".split()
THING_LOOKS = LOOKS + "red blue green yellow white black old new shiny".split()
DAYS = "sunny cold rainy windy warm quiet bright foggy".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SPOTS = ("bench", "wall", "big tree", "steps", "door", "fence", "gate", "old table")
ANIMALS = "dog cat bird duck rabbit squirrel goat mouse frog pony".split()
TOPICS = ("brave tiger", "lost ship", "kind dragon", "old king", "flying fish", "sleepy bear", "funny clown", "giant")
FEELINGS = "happy sad tired proud hungry cold shy brave lonely excited".split()

# ---- Templates, a table an event. {obj} comes with its article: "the kite", "the red kite", "an apple". -------------

OPENINGS = (
    "One {day} morning, {all} went to the {place}.",
    "When {all} went to the {place}, it was a {day} day.",
    "{a} met {rest} at the {place}.",
    "{all} were good friends, and they often played at the {place}.",
    "It was a {day} day, and {a} was at the {place} with {rest}.",
    "On {weekday}, {a} took {rest} to the {place}.",
    "Once there were some friends, {all}, who liked to play at the {place}.",
    "{a} and {a.his} mother were at the {place} on {weekday}, and {rest} came along.",
    "There was no school on {weekday}, so {all} could be at the {place} all day.",
)
INTRODUCTIONS = (
    "{holder} had {obj}.",
    "{holder} had brought {obj} from home.",
    "{holder} was holding {obj}.",
    "{holder} bought {obj} there.",
    "That day, {holder} had {obj} with {holder.him}.",
    "When {all} went to the {place}, {holder} took {obj} along.",
)
FINDS = (
    "{holder} looked behind the {spot} and found {obj}.",
    "Near the {spot}, {holder} found {obj} that nobody wanted.",
    "{holder} looked around for something to do and found {obj} by the {spot}.",
)
WISHES = (  # these come before a giving clause and tell who will receive
    "{receiver} asked for {obj}.",
    "{receiver} wanted to hold {obj}.",
    '"May I have {obj}?" asked {receiver}.',
    "{receiver} looked at {obj} and smiled at {giver}.",
    "Now it was {receiver}'s turn to have {obj}.",
    "{receiver} had waited a long time for {obj}.",
    "{receiver} said that {receiver.he} needed {obj}.",
    "{giver} saw that {receiver} wanted {obj}.",
)
LEADS = ("", "", "", "Then", "Soon", "After a while,", "At the {place},", "With a smile on {giver.his} face,")
PAIR_LEADS = (
    "While {p} and {q} were at the {place},",
    "When {p} and {q} sat down at the {place},",
    "After {p} and {q} had played for a while,",
    "When {p} and {q} stopped to rest by the {spot},",
    "As {p} and {q} stood near the {spot},",
    "Because {p} and {q} were good friends,",
    "After {p} and {q} looked around the {place},",
)
ARRIVAL_LEADS = (
    "When {p} and {q} got to the {place},",
    "When {p} and {q} came to the {place},",
    "After {p} and {q} got to the {place},",
    "As soon as {p} and {q} reached the {place},",
    "After {p} and {q} walked to the {place},",
)
GIVES = (
    "{giver} gave {obj} to {receiver}.",
    "{giver} handed {obj} to {receiver}.",
    "{giver} passed {obj} to {receiver}.",
)
OTHER_GIVES = (
    "{giver} gave {receiver} {obj}.",
    "{giver} handed {receiver} {obj}.",
    "{giver} let {receiver} have {obj}.",
    "{giver} nodded and gave {obj} to {receiver}.",
    "{giver} held out {obj}, and {receiver} took it.",
    "{receiver} got {obj} from {giver}.",
    "{giver} brought {obj} over to {receiver}.",
)
THANKS = (
    "{receiver} thanked {giver}.",
    "{receiver} thanked {giver} for it.",
    '"Thank you, {giver}," said {receiver}.',
    '"Thank you," said {receiver} to {giver}.',
    "{receiver} told {giver} how kind that was.",
    "{giver} was happy that {receiver} liked it.",
)
RETURNS = (
    "After a while, {giver} gave {obj} back to {receiver}.",
    "{receiver} wanted {obj} back, so {giver} gave it back to {receiver.him}.",
    "Then {receiver} took {obj} back from {giver}.",
    "{giver} did not want to keep {obj}, so {giver.he} handed it back to {receiver}.",
    "But {receiver} missed {obj} and took it back from {giver}.",
)
STOCKS = (
    "{giver} had two {objs}.",
    "{giver} bought two {objs} at the {place}.",
    "{giver} had brought two {objs} from home.",
)
KEEPS = (
    "{giver} kept the other one.",
    "{giver} and {receiver} liked their {objs}.",
    "{receiver} thanked {giver}, who kept the other one.",
)
LOSSES = (
    "But then {loser} lost {obj} at the {place}. {all} looked for it, and {finder} found {obj} behind the {spot}.",
    "{loser} dropped {obj} and could not see it anywhere. At last, {finder} found {obj} under the {spot}.",
    'Suddenly {obj} was gone. "Where can it be?" asked {loser}. It was {finder} who found {obj} near the {spot}.',
    "{loser} looked for {obj} everywhere, and {other} helped. By the {spot}, {finder} found {obj} again.",
)
PUT_DOWNS = (
    "{giver} left {obj} by the {spot} for a moment. Soon {receiver} picked up {obj}.",
    "{giver} was tired and put {obj} down next to the {spot}. {receiver} went over and picked up {obj}.",
    "When {giver} looked away, {receiver} took {obj}. {giver} did not mind.",
)
MOVES = (
    "Then {all} went to the {place}, and {holder} took {obj} along.",
    "{one} wanted to leave the {old}, so they all went to the {place}. {holder} carried {obj} all the way.",
    'They left the {old}. "Let us go to the {place}!" said {one}. Of course {holder} did not forget {obj}.',
)
SHOWS = (
    "{holder} showed {obj} to {other}.",
    "{holder} looked at {obj} from all sides.",
    "{other} said that {obj} was beautiful, and {holder} smiled.",
    '{other} asked where {obj} came from. "I will tell you later," said {holder}.',
    "{holder} hid {obj}, but {other} saw it at once, and {holder} laughed.",
)
MEALS = (
    "{holder} tasted {obj} and liked it.",
    "{holder} was hungry, but {holder.he} kept {obj} for later.",
    "{other} looked at {obj} and felt very hungry.",
)
CHATS = (
    "{one} told {other} a story about the {topic}. {other} wanted to know where the {topic} lived.",
    '"Did you dream of the {topic} again?" asked {other}. "Yes," said {one}, "and the {topic} was singing!"',
    "A cold wind began to blow at the {place}, so {one} sat close to {other}.",
    "It began to rain, and {all} stood under a roof until the rain was over.",
    "Dark clouds came over the {place}, but {one} was not afraid of the rain.",
    "{one} felt {feeling}, and {other} could see it.",
    '"I am {feeling}," said {one}. {other} was {feeling} too.',
    "A {animal} came by. {one} wanted to touch the {animal}, but it ran away.",
    '"Look, a {animal}!" said {other}. The {animal} sat by the {spot} and looked at {one}.',
)
GOODBYES = (
    "{one} had to go home early and waved to {others}.",
    "Then {one}'s father came and took {one.him} home, so only {others} were left.",
)
ENDINGS = (  # no he or she: a multiple-choice item tells them with the names of another story
    "In the evening, {holder} carried {obj} home from the {place}.",
    "At the end of the day, {holder} left the {place} with {obj}.",
    "When it grew dark, {other} and {holder} left the {place}, and {holder} took {obj} home.",
    "{other} waved to {holder}, who walked away from the {place} with {obj}.",
    "That night, {holder} put {obj} next to the bed and dreamed of the {place}.",
    "On the way home from the {place}, {holder} held {obj} and {other} sang a song.",
    "So the day at the {place} was over, and {obj} stayed with {holder}.",
    "{other} was glad that {holder} still had {obj} when they left the {place}.",
    "Before they left the {place}, {other} looked once more at {obj} in the hands of {holder}.",
    "The next day, {holder} went back to the {place} with {obj}, and {other} came too.",
)
