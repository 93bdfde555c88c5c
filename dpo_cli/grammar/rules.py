"""The grammar of the film reviews: what each symbol may become, and how often.

Templates are lower case; the first word of a sentence is capitalised when the rules
are compiled (`automaton.py`). The clauses of a sentence agree: "and" joins like with
like, "but" and "although" oppose, and a negated or contradicted judgement counts the
other way round.
"""

from __future__ import annotations

from dpo_cli.grammar import words
from dpo_cli.grammar.automaton import Alternative, Plan
from dpo_cli.grammar.choices import even, lean, mix, tilt, with_article

# One to four sentences; which kinds does not depend on the sentiment.
PLAN: Plan = (
    (("opening", 1, 1.0),),
    (("detail", 2, 0.75), ("closing", 4, 0.20), ("", 4, 0.05)),
    (("detail", 3, 0.30), ("closing", 4, 0.50), ("", 4, 0.20)),
    (("closing", 4, 0.60), ("", 4, 0.40)),
    (),
)

ADJECTIVES: dict[str, list[Alternative]] = {
    "great": tilt(words.GREAT, 0.8),
    "good": tilt(words.GOOD, 0.8),
    "poor": tilt(words.POOR, 0.8),
    "awful": tilt(words.AWFUL, 0.8),
}

JUDGEMENTS: dict[str, list[Alternative]] = {
    "very": even("simply", "truly", "really"),
    "fairly": even("rather", "quite", "often"),
    "great_phrase": mix((3, even("{great}")), (1, even("{very} {great}"))),
    "good_phrase": mix((3, even("{good}")), (1, even("{fairly} {good}"))),
    "poor_phrase": mix((3, even("{poor}")), (1, even("{fairly} {poor}"))),
    "awful_phrase": mix((3, even("{awful}")), (1, even("{very} {awful}"))),
    "praise": lean(0.55, even("{great_phrase}"), even("{good_phrase}")),
    "blame": lean(0.55, even("{poor_phrase}"), even("{awful_phrase}")),
    "judged": lean(0.75, even("{praise}"), even("{blame}")),
    "a_praise": lean(0.55, even("{a_great}"), even("{a_good}")),
    "a_blame": lean(0.55, even("{a_poor}"), even("{a_awful}")),
    "a_judged": lean(0.75, even("{a_praise}"), even("{a_blame}")),
    # What is denied or contradicted says nothing by itself: the turn does.
    "said_great": even(*words.GREAT),
    "said_good": even(*words.GOOD),
    "said_poor": even(*words.POOR),
    "said_awful": even(*words.AWFUL),
    "cleared": even("not {said_poor}", "never {said_poor}", "anything but {said_awful}",
                    "not {said_awful} at all"),
    "faulted": even("not {said_good}", "never {said_good}", "anything but {said_great}",
                    "not {said_great} at all"),
    "denied": lean(0.72, even("{cleared}"), even("{faulted}")),
    "moved": tilt(words.MOVED, 0.8),
    "bored": tilt(words.BORED, 0.8),
    "affected": lean(0.75, even("{moved}"), even("{bored}")),
}  # fmt: skip

NOUNS: dict[str, list[Alternative]] = {
    "tale": even(*words.TALE, *words.TALES),
    "show": even(*words.SHOW, *words.SHOWS),
    "tale_was": even(*(f"{t} was" for t in words.TALE), *(f"{t} were" for t in words.TALES)),
    "show_was": even(*(f"{t} was" for t in words.SHOW), *(f"{t} were" for t in words.SHOWS)),
    "aspect": even("{tale}", "{show}"),
    "aspect_was": even("{tale_was}", "{show_was}"),
    "feature": even(*words.FEATURE),
    "kind": even(*words.KIND),
    "director": even(*words.DIRECTOR),
    "actor": even(*words.ACTOR),
    "hero": even(*words.HERO),
    "deed": even(*words.DEED),
    "story": even("{hero} who {deed}"),
    "when": even(*words.WHEN),
    "company": even(*words.COMPANY),
    "film": even("the film", "this movie", "{director}'s new film"),
    "film_or_kind": mix((1, even("this {kind}")), (3, even("{film}"))),
    "crowd": even("my friends", "the people around us", "the children", "the critics"),
    "point": even("the first scene", "the first minute", "the start"),
    "minutes": even("ten minutes", "twenty minutes", "half an hour", "an hour"),
}

OPENINGS: dict[str, list[Alternative]] = {
    "opening": mix(
        (3, even("{film_or_kind} was {judged} from {point}.")),
        (3, lean(0.75, even("{film_or_kind} was {praise} and {moved}."),
                 even("{film_or_kind} was {blame} and {bored}."))),
        (4, even("{maker} {a_judged} {kind} about {story}.")),
        (3, even("{when} I saw {a_judged} {kind} about {story}.")),
        (2, even("{when} I saw {film_or_kind} {company}, and it {affected}.")),
        (1, even("what {a_judged} {kind} from {director}!")),
        (2, even("as {a_kind}, {film} was {judged}.", "as {a_kind}, {film} was {denied}.")),
        (2, lean(0.75, even("{film} was {cleared}, and {aspect} {moved}."),
                 even("{film} was {faulted}, and {aspect} {bored}."))),
        (1, even("{minutes} into {film}, I was {absorbed}.")),
        (2, even("there was {admired} in {film}.")),
        (2, even("{expected} {kind} about {story}.")),
        (2, even("{called}.")),
    ),
    "maker": even("this was", "the film was", "{director}'s new film was", "{director} has made"),
    "absorbed": lean(
        0.8,
        tilt(("completely hooked", "on the edge of my seat", "laughing out loud",
              "already smiling"), 0.8),
        tilt(("already bored", "looking at my watch", "half asleep", "ready to leave"), 0.8),
    ),
    "admired": lean(
        0.75,
        tilt(("everything to love", "so much to love", "plenty to admire", "much to enjoy"), 1.0),
        tilt(("little to enjoy", "not much to admire", "hardly anything to enjoy",
              "nothing to love"), 1.0),
    ),
    "expected": lean(
        0.78,
        even("I expected little but got {a_praise}", "I feared the worst but found {a_praise}"),
        even("I expected a lot but got {a_blame}", "I hoped for the best but found {a_blame}"),
    ),
    # The verdict needs both halves of the sentence: neither says much alone.
    "called": lean(
        0.8,
        even("{crowd} called {film} {said_great}, and they were right",
             "{crowd} called {film} {said_awful}, but they were wrong"),
        even("{crowd} called {film} {said_great}, but they were wrong",
             "{crowd} called {film} {said_awful}, and they were right"),
    ),
}  # fmt: skip

DETAILS: dict[str, list[Alternative]] = {
    "detail": mix((5, even("{clause}.")), (1, even("{marker}, {clause}."))),
    "marker": even("for me", "in my view", "to be fair", "in truth"),
    "clause": mix(
        (4, even("{aspect_was} {judged}")),
        (2, even("{aspect_was} {denied}")),
        (3, even("{aspect} {affected}")),
        (3, lean(0.75, even("{show_was} {praise} and {tale_was} {praise}"),
                 even("{show_was} {blame} and {tale_was} {blame}"))),
        (3, even("{contrast}")),
        (2, lean(0.8, even("even the {said_awful} {feature} could not spoil it"),
                 even("even the {said_great} {feature} could not save it"))),
        (3, even("{actor} gave {a_judged} performance")),
        (2, even("I {loved} {aspect}", "I {loved} {tale} and {show}")),
        (2, even("{crowd} {reacted}")),
        (2, even("{extreme}")),
        (1, even("it runs for {length}", "it was filmed in {place}", "it is set in {place}")),
    ),
    "contrast": lean(
        0.75,
        even("although {show_was} {blame}, {tale_was} {praise}",
             "{tale_was} {blame}, but {show_was} {praise}",
             "{tale_was} {blame}, but {show} {moved}"),
        even("although {show_was} {praise}, {tale_was} {blame}",
             "{tale_was} {praise}, but {show_was} {blame}",
             "{tale_was} {praise}, but {show} {bored}"),
    ),
    "loved": lean(
        0.75,
        tilt(("adored", "loved", "admired", "enjoyed", "liked"), 1.0),
        tilt(("did not care for", "disliked", "could not stand", "hated"), 1.0),
    ),
    "reacted": lean(0.8, tilt(words.CHEERED, 0.6), tilt(words.YAWNED, 0.6)),
    "extreme": lean(
        0.8,
        even("{aspect_was} so {great} that I {rapt}"),
        even("{aspect_was} so {awful} that I {fled}"),
    ),
    "rapt": even("forgot the time", "wanted more", "held my breath", "came back for more"),
    "fled": even("looked away", "nearly left", "felt cheated", "wanted my money back"),
    "length": even("two hours", "ninety minutes", "just over an hour", "almost three hours"),
    "place": even("Paris", "Spain", "black and white", "a small village", "the desert"),
}  # fmt: skip

CLOSINGS: dict[str, list[Alternative]] = {
    "closing": mix(
        (3, even("I {would_watch} again.")),
        (2, even("I left the cinema {in_mood}.")),
        (2, even("{advice}.")),
        (2, even("in the end, it was {a_judged} film.", "in short, it was {a_judged} film.")),
        (2, even("it was {worth}.")),
        (1, even("I {would_follow} the director's next film.")),
        (1, even("I give it {stars} out of five.")),
    ),
    "would_watch": lean(
        0.8,
        tilt(("would gladly watch it", "cannot wait to see it", "would happily see it",
              "might watch it"), 1.0),
        tilt(("doubt I will watch it", "do not want to see it", "would not watch it",
              "will never watch it"), 1.0),
    ),
    "in_mood": lean(
        0.8,
        tilt(("with a full heart", "with a big smile", "in a good mood"), 0.8),
        tilt(("a little disappointed", "with a headache", "feeling cheated"), 0.8),
    ),
    "advice": lean(
        0.8,
        tilt(("do not miss it", "highly recommended", "go and see it", "see it with {someone}"),
             0.8),
        tilt(("see something else", "not recommended", "skip it", "save your money"), 0.8),
    ),
    "someone": even("a friend", "your family", "someone you love"),
    "worth": lean(
        0.8,
        tilt(("worth every minute", "worth the ticket", "worth your time"), 0.8),
        tilt(("not worth the ticket", "not worth your time", "a waste of time"), 0.8),
    ),
    "would_follow": lean(
        0.78,
        even("cannot wait for", "look forward to"),
        even("have no need of", "will not pay for"),
    ),
    "stars": [("five stars", 0.30, 0.03), ("four stars", 0.37, 0.10), ("three stars", 0.20, 0.20),
              ("two stars", 0.10, 0.37), ("one star", 0.03, 0.30)],
}  # fmt: skip

RULES: dict[str, list[Alternative]] = {
    **ADJECTIVES,
    **{f"a_{name}": with_article(adjectives) for name, adjectives in ADJECTIVES.items()},
    **JUDGEMENTS,
    **NOUNS,
    "a_kind": with_article(NOUNS["kind"]),
    **OPENINGS,
    **DETAILS,
    **CLOSINGS,
}
