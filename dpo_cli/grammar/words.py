"""The words of the film reviews.

Lists of judgements run from the most to the least favourable: a word's place in its
list sets how much it says about the reviewer's sentiment (`choices.tilt`).
"""

GREAT = (
    "superb", "brilliant", "stunning", "wonderful", "excellent", "terrific", "delightful",
    "remarkable", "beautiful", "gripping",
)  # fmt: skip
GOOD = (
    "moving", "charming", "clever", "engaging", "graceful", "fresh", "warm", "sharp", "lively",
    "solid", "pleasant", "decent",
)  # fmt: skip
POOR = (
    "uneven", "thin", "ordinary", "tired", "forgettable", "clumsy", "bland", "flat", "shallow",
    "weak", "dull", "boring",
)  # fmt: skip
AWFUL = (
    "lifeless", "tedious", "painful", "lazy", "hopeless", "dismal", "awful", "dreadful",
    "terrible", "horrible",
)  # fmt: skip

# What a review judges, in two halves, so that a sentence never judges one thing twice.
TALE = (
    "the plot", "the story", "the script", "the dialogue", "the pacing", "the ending",
    "the second act", "the humour", "the central romance", "the first hour", "the final scene",
)  # fmt: skip
TALES = ("the characters", "the jokes", "the quiet moments", "its big ideas")
SHOW = ("the acting", "the score", "the camera work", "the editing", "the cast", "its mood")
SHOWS = (
    "the songs", "the action scenes", "the two leads", "the costumes", "the supporting actors",
)  # fmt: skip
# What fits after "even the brilliant ...".
FEATURE = ("script", "score", "cast", "camera work", "final scene", "dialogue")

KIND = ("drama", "comedy", "thriller", "western", "romance", "mystery")
DIRECTOR = ("Stone", "Rivera", "Tanaka", "Cole", "Novak", "Larsen")
HERO = (
    "two brothers", "a young widow", "a retired teacher", "three old friends",
    "a small-town doctor", "a lonely painter", "an honest thief", "a mother and her son",
)  # fmt: skip
DEED = (
    "lost everything", "robbed a bank", "went to sea", "found an old map", "fell in love",
    "opened a bakery", "could not sleep", "never came home",
)  # fmt: skip
ACTOR = (
    "the lead", "the young lead", "the lead actor", "the villain", "the older actor", "the child",
)  # fmt: skip
WHEN = (
    "last night", "on Sunday", "on a long flight", "at a small festival", "in a half empty theatre",
)  # fmt: skip
COMPANY = ("with my sister", "with two friends", "with my father", "alone", "with my class")

# What an aspect did to the reviewer; past tense, so that number never matters.
MOVED = (
    "took my breath away", "moved me to tears", "stayed with me", "won me over",
    "worked beautifully", "kept me guessing", "made me smile", "held my attention", "rang true",
)  # fmt: skip
BORED = (
    "left me cold", "felt too long", "lost me", "fell flat", "went nowhere", "wore me out",
    "made no sense", "fell apart", "put me to sleep",
)  # fmt: skip
CHEERED = (
    "stood up and clapped", "cheered at the end", "laughed out loud", "wiped away tears",
    "stayed for the credits", "loved every minute",
)  # fmt: skip
YAWNED = (
    "looked at their phones", "kept yawning", "began to talk", "fell asleep", "left early",
    "asked for their money back",
)  # fmt: skip
