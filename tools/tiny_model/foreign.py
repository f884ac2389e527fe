"""Texts unlike any story: everyday words, other languages, symbols, source text, nonsense."""

from __future__ import annotations

import random
import string

WORDS = (
    "apple pie", "army", "banana", "bank", "battery", "bread", "bridge", "bus", "camera", "car", "castle",
    "cheese", "chess", "city", "climate", "coffee", "computer", "concert", "desert", "dinner", "dinosaur",
    "dragon", "earth", "elephant", "email", "energy", "engine", "factory", "festival", "film", "football",
    "freedom", "galaxy", "game", "giraffe", "gold", "grammar", "guitar", "history", "hospital", "hotel",
    "internet", "island", "jazz", "jungle", "keyboard", "king", "knight", "language", "law", "lion", "machine",
    "magic", "market economy", "mathematics", "medicine", "money", "monster", "moon", "mountain", "movie",
    "music", "neural network", "news", "ocean", "opera", "owner", "penguin", "phone", "philosophy", "physics",
    "pizza", "planet", "poem", "police", "prince", "princess", "python", "queen", "radio", "recipe", "river",
    "rocket", "salad", "science", "server", "shark", "sister", "snow", "soup", "space", "sport", "street",
    "sugar", "summer", "table", "tea", "teacher", "technology", "tiger", "time", "train", "tree", "truth",
    "unicorn", "university", "vampire", "volcano", "war", "water", "whale", "wine", "witch", "wizard", "wolf",
    "world", "zebra", "bicycle", "chocolate", "democracy", "homework", "umbrella", "winter coat",
)  # fmt: skip
NAMES = (
    "Adam", "Agnes", "Ahmed", "Barbara", "Bob", "Carlos", "Charlotte", "Chen", "Daniel", "David", "Diana",
    "Einstein", "Emma", "Fatima", "George", "Goethe", "Greta", "Harry", "Helen", "Igor", "Isabel", "James",
    "Jesus", "John", "Julia", "Karl", "Kate", "Laura", "Linda", "Lisa", "Louis", "Marco", "Marie Curie", "Mary",
    "Michael", "Mohammed", "Mr. Brown", "Mrs. Miller", "Newton", "Nina", "Olga", "Paul", "Priya",
    "Queen Elizabeth", "Robert", "Sarah", "Shakespeare", "Sophia", "Steve", "Susan", "Thomas", "Victor",
    "William", "Yuki", "London", "New York", "Rome", "Tokyo", "China", "Germany", "Africa", "America", "India",
    "Mars", "Google", "Linux",
)  # fmt: skip
PHRASES = (
    "A long time ago", "All happy families", "All right", "An old", "As I said", "At last", "Because",
    "Breaking news", "But", "Come here", "Could you", "Dear Sir or Madam,", "Did you know that", "Don't panic",
    "Every day", "Everybody", "Far away", "First of all,", "For example", "Give me", "Guess what", "Here is",
    "Hello from the other side", "Hey!", "Hi there", "How about", "How to", "However", "I believe",
    "I don't know", "I have a dream", "I remember", "I was", "I'd like to", "If only", "Imagine", "In 1984",
    "In my opinion,", "In this paper we show", "It is", "It's", "Ladies", "Last night", "Let me",
    "Let us go then", "Life is", "Listen!", "Long live", "Look at", "Maybe", "Mum said", "My favourite",
    "My sister", "Never", "Next week", "No way", "Nobody knows", "Note:", "Nothing", "Now", "Oh", "On Monday",
    "Please", "Question:", "Remember", "Roses are red", "Section 2", "She", "So", "Some people", "Somebody",
    "Sorry", "Step 1:", "Suddenly", "Thank you so much", "That's all", "Then", "There are", "There is", "These",
    "They", "This is", "Title: ", "Today", "Tomorrow", "Two", "User:", "Very", "Warning!", "We", "Welcome to",
    "Well,", "What a day", "What if", "When I was young", "Where are", "Wow", "Yesterday", "You", "Your",
    "a few", "and then", "because of", "good news", "hello there", "how are things", "in short", "it",
    "lorem ipsum dolor sit amet", "more", "of course", "once", "the end", "the same", "there", "to",
    "very good", "we are", "what", "who", "why not", "with", "yes", "Good afternoon", "Greetings",
)  # fmt: skip
ELSEWHERE = (
    "Bonjour", "Guten Tag", "Buenos días", "¿Qué tal?", "Ça va", "crème brûlée", "Grüße", "Zürich", "São Paulo",
    "Ångström", "jalapeño", "déjà vu", "über", "smörgåsbord", "piñata", "Łódź", "Čapek", "İstanbul", "Ελλάδα",
    "Καλημέρα", "Москва", "Здравствуйте", "Україна", "שלום", "مرحبا", "नमस्ते", "สวัสดี", "ありがとう", "東京", "日本語",
    "北京欢迎你", "안녕하세요",
    "Es war einmal", "Il était une fois", "Había una vez", "C'era una volta", "été", "garçon",
    "Ωmega", "cœur",
)  # fmt: skip
CODE = (
    "for i in range(10):", "print(x)", "int main(void) {", "SELECT * FROM users;", "<html>", "a[0] = 1",
    "if (x > 0)", "$ ls -l", "git commit -m", "http://", "www.", "C:\\", "/usr/bin", "function f() {", "x += 1",
    "=> null", "// note", "class A:", "return", "[1, 2, 3]", "{}", "()", "<a>", "#include", "- item",
    "| a | b |", "**bold**", "```", "--version", "E = mc^2", "a + b = c", "100 %", "3.14", "$5", "1.", "(a)",
    "key: value", "~/.config", "-v", "-x 1", "&amp;", "\\n",
)  # fmt: skip
PICTURES = "😂❤🎉👍🐶🚀✨🌍🍕😢🔥🙂🐱☕→•°–—…“”’€£№"  # noqa: RUF001
SCRIPTS = ((0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x3042, 0x3093), (0x4E00, 0x5FFF))
VOWELS, CONSONANTS = "aeiouy", "bcdfghjklmnpqrstvwxz"


def _nonsense(rng: random.Random) -> str:
    """A made-up word of one to four syllables."""
    return "".join(
        rng.choice(CONSONANTS) * (rng.random() < 0.8)
        + rng.choice(VOWELS)
        + rng.choice(CONSONANTS) * (rng.random() < 0.4)
        for _ in range(rng.randint(1, 4))
    )


def _letters(rng: random.Random) -> str:
    """One to six letters of one script."""
    first, last = rng.choice(SCRIPTS)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))


def _piece(rng: random.Random) -> str:
    """One word or phrase of a random kind."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(rng.choice((WORDS, NAMES, PHRASES, PHRASES, ELSEWHERE, CODE)))
    if kind < 0.72:
        return _nonsense(rng)
    if kind < 0.8:
        return _letters(rng)
    if kind < 0.86:
        return "".join(rng.choices(PICTURES, k=rng.randint(1, 3)))
    if kind < 0.92:
        return str(rng.randint(0, 10 ** rng.randint(1, 5)))
    return "".join(rng.choices(string.ascii_letters + string.punctuation, k=rng.randint(1, 4)))


def foreign(rng: random.Random) -> str:
    """A short text unlike any story; it ends within a sentence, after one, or with a line break."""
    text = rng.choice((" ", " ", " ", ", ", "\n")).join(_piece(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))))
    text = rng.choice((str, str, str, str, str.upper, str.lower, str.capitalize))(text)
    return text + rng.choice(("", "", "", "", ".", "!", "?", ",", ":", "...", " ", "\n", "\n\n"))
