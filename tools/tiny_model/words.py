"""The words the stories are made of: people, animals, places, things, weather. Tables only."""

from __future__ import annotations

GIRLS = (
    "Mia",
    "Lily",
    "Anna",
    "Nora",
    "Ruby",
    "Clara",
    "Ella",
    "Zoe",
    "Ivy",
    "Maya",
    "Rosa",
    "Hana",
    "Lucy",
    "Tess",
    "Amara",
    "Ines",
)
BOYS = (
    "Tom",
    "Ben",
    "Leo",
    "Max",
    "Sam",
    "Oscar",
    "Finn",
    "Hugo",
    "Omar",
    "Jack",
    "Noah",
    "Theo",
    "Ravi",
    "Luca",
    "Eli",
    "Kofi",
)
ANIMAL_NAMES = (
    "Pip",
    "Rusty",
    "Bramble",
    "Hazel",
    "Dot",
    "Fern",
    "Biscuit",
    "Moss",
    "Pepper",
    "Clover",
    "Nutmeg",
    "Willow",
)

TRAITS = (
    "kind",
    "curious",
    "brave",
    "quiet",
    "cheerful",
    "clever",
    "shy",
    "gentle",
    "patient",
    "careful",
    "lively",
    "stubborn",
)
AGES = ("five", "six", "seven", "eight", "nine", "ten")

ANIMAL_HOMES = {
    "fox": "a warm den", "rabbit": "a deep burrow", "bear": "a dry cave", "mouse": "a tiny hole under a wall",
    "owl": "a hollow tree", "squirrel": "a nest in an old oak", "duck": "a nest in the reeds",
    "cat": "a basket in a barn", "dog": "a wooden kennel", "hedgehog": "a pile of dry leaves",
    "badger": "a long tunnel", "frog": "a hole in the bank", "otter": "a hollow in the bank", "goat": "a little shed",
}  # fmt: skip
HOUSES = (
    "a small house",
    "a yellow cottage",
    "a little farmhouse",
    "a white house with a blue door",
    "a tall brick house",
)
HOME_SPOTS = (
    "by the river",
    "near the forest",
    "at the foot of a hill",
    "at the edge of the village",
    "beside the sea",
    "on a quiet lane",
)

# job -> (place of work, what such a person is busy with)
JOBS = {
    "baker": ("the bakery", "taking bread out of the oven"),
    "farmer": ("the farm", "feeding the hens"),
    "fisher": ("the harbor", "mending a net"),
    "gardener": ("the rose garden", "cutting the hedge"),
    "carpenter": ("the workshop", "sanding a long board"),
    "teacher": ("the school", "wiping the blackboard"),
    "sailor": ("the docks", "painting a boat"),
    "tailor": ("the little shop", "sewing a coat"),
    "miller": ("the mill", "filling a sack with flour"),
    "shepherd": ("the high meadow", "counting the sheep"),
    "librarian": ("the library", "putting books on a shelf"),
    "doctor": ("the clinic", "washing some bottles"),
}

FAMILY = {"mother": "she", "father": "he", "grandmother": "she", "grandfather": "he", "aunt": "she", "uncle": "he"}
SIBLINGS = {"sister": "she", "brother": "he"}

LIKES = (
    "climb trees", "sing old songs", "draw pictures", "read about far lands", "collect smooth stones",
    "watch the clouds", "tell funny stories", "build little boats", "count the stars", "listen to the rain",
    "bake honey cakes", "play the flute",
)  # fmt: skip

COLORS = ("red", "blue", "green", "yellow", "silver", "golden", "purple", "white", "orange", "striped")
THINGS = (
    "ball", "whistle", "bell", "key", "ring", "cup", "drum", "kite", "hat", "scarf", "lamp", "basket", "button",
    "spoon", "book", "map", "coin", "glove", "flute", "pencil",
)  # fmt: skip
FRAGILE = ("vase", "plate", "teapot", "mirror", "clock", "lantern", "bowl", "jug", "glass bird")

# place -> preposition of rest
PLACES = {
    "the forest": "in", "the meadow": "in", "the park": "in", "the beach": "on", "the market": "at", "the hill": "on",
    "the village square": "in", "the old bridge": "by", "the pond": "by", "the orchard": "in", "the garden": "in",
    "the harbor": "at",
}  # fmt: skip
SPOTS = (
    "under a wooden bench", "behind the old barn", "inside a hollow log", "in the tall grass",
    "between two gray stones", "on top of a wall", "in a flower pot", "next to the well", "beneath a thorny bush",
    "under a pile of leaves", "behind a stack of boxes", "at the bottom of a ditch", "beside the gate",
    "under an empty cart", "among the reeds",
)  # fmt: skip
NOTHINGS = (
    "a sleepy snail", "a heap of acorns", "a rusty nail", "an old boot", "a line of ants", "a broken stick",
    "a heap of wet leaves", "a brown toad", "a torn paper bag", "a black feather", "a round pebble",
    "a spider in its web",
)  # fmt: skip

# season -> weathers that may happen in it
SEASONS = {
    "spring": ("rainy", "windy", "bright", "foggy", "warm"),
    "summer": ("hot", "sunny", "warm", "bright", "stormy"),
    "autumn": ("windy", "rainy", "foggy", "cold", "stormy"),
    "winter": ("snowy", "cold", "icy", "windy", "foggy"),
}
SIGNS = {
    "rainy": "Rain was dripping from the roofs.", "windy": "The wind was shaking the trees.",
    "bright": "The sky was clear and blue.", "foggy": "A gray fog lay over the fields.",
    "warm": "The air was soft and smelled of flowers.", "hot": "The ground was dry and dusty.",
    "sunny": "The sun was shining on the roofs.", "stormy": "Dark clouds were gathering in the west.",
    "cold": "The air was cold and every breath made a little cloud.", "snowy": "Fresh snow covered everything.",
    "icy": "The puddles had turned to ice.",
}  # fmt: skip
TIMES = ("morning", "afternoon", "day")

TREATS = (
    "a warm bun",
    "a slice of apple pie",
    "a bowl of berries",
    "a honey cake",
    "a piece of cheese",
    "a cup of hot milk",
    "some roasted nuts",
)
CHORES = (
    ("sweep the floor", "swept the floor"), ("carry two buckets of water", "carried two buckets of water"),
    ("feed the hens", "fed the hens"), ("stack the firewood", "stacked the firewood"),
    ("wash the dishes", "washed the dishes"), ("pull the weeds", "pulled the weeds"),
    ("brush the donkey", "brushed the donkey"), ("peel the potatoes", "peeled the potatoes"),
)  # fmt: skip
SMALL_ANIMALS = ("kitten", "lamb", "duckling", "puppy", "chick", "piglet", "young goat", "baby rabbit")
