"""The 25 normal and the 25 abstract prompts, chosen by hand."""

NORMAL = (
    "rocket", "butterfly", "elephant", "penguin", "frog", "snail", "octopus", "crab", "pineapple",
    "strawberry", "watermelon", "hamburger", "pizza", "doughnut", "mushroom", "cactus", "sunflower",
    "palm tree", "sailboat", "airplane", "fire engine", "guitar", "umbrella", "crown", "snowman",
)  # fmt: skip
"""Names of subjects that the base draws; `cartoon` keeps them, and what looks like them, out of its training
rows.
"""

ABSTRACT = (
    "celebration, party",
    "danger, electric",
    "lucky",
    "love, romance",
    "cold, snow",
    "speed, travel",
    "magic, fairytale",
    "win, game",
    "hot, boom",
    "night, sparkle",
    "music, instrument",
    "sweet, dessert",
    "space, travel",
    "ocean, animal",
    "weapon, dangerous",
    "weather, rain",
    "birthday, celebration",
    "halloween, celebration",
    "tropical, beach",
    "light, electric",
    "breakfast, food",
    "wedding, love",
    "sad, lonely",
    "education, school",
    "royal, win",
)
"""Phrases of keywords, most of them shared by several subjects; none names a subject."""
