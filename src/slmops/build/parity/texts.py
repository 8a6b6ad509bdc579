"""A thousand strings of many scripts on which two tokenizers must agree: the same ones in every build.

Made, not collected: words of letters drawn from each script's own range (seeded), the places where pre-tokenizers differ
(digits, contractions, blanks, line ends, marks that combine, emoji that join, text that looks like a control token), and
real sentences.
"""

from __future__ import annotations

import random

COUNT = 1000
_SEED = 20_261_124
_WORDS = 5

#: first and last letter of each script's range
SCRIPTS: dict[str, tuple[int, int]] = {
    "Latin": (0x41, 0x7A),
    "Latin supplement": (0xC0, 0xFF),
    "Latin extended": (0x100, 0x17F),
    "IPA": (0x250, 0x2AF),
    "Greek": (0x391, 0x3C9),
    "Cyrillic": (0x410, 0x44F),
    "Armenian": (0x531, 0x586),
    "Hebrew": (0x5D0, 0x5EA),
    "Arabic": (0x620, 0x64A),
    "Syriac": (0x710, 0x72F),
    "Thaana": (0x780, 0x7A5),
    "NKo": (0x7CA, 0x7EA),
    "Devanagari": (0x904, 0x94D),
    "Bengali": (0x985, 0x9B9),
    "Gurmukhi": (0xA05, 0xA39),
    "Gujarati": (0xA85, 0xAB9),
    "Oriya": (0xB05, 0xB39),
    "Tamil": (0xB85, 0xBCD),
    "Telugu": (0xC05, 0xC4D),
    "Kannada": (0xC85, 0xCCD),
    "Malayalam": (0xD05, 0xD4D),
    "Sinhala": (0xD85, 0xDC6),
    "Thai": (0xE01, 0xE4E),
    "Lao": (0xE81, 0xECD),
    "Tibetan": (0xF40, 0xF6C),
    "Myanmar": (0x1000, 0x103F),
    "Georgian": (0x10A0, 0x10FF),
    "Hangul": (0xAC00, 0xD7A3),
    "Ethiopic": (0x1200, 0x135A),
    "Cherokee": (0x13A0, 0x13F4),
    "Khmer": (0x1780, 0x17D3),
    "Mongolian": (0x1820, 0x1877),
    "Hiragana": (0x3041, 0x3096),
    "Katakana": (0x30A1, 0x30FA),
    "Bopomofo": (0x3105, 0x312F),
    "Han": (0x4E00, 0x9FBF),
    "Han extension B": (0x20000, 0x2A6DF),
    "Mathematical": (0x1D400, 0x1D7FF),
    "Symbols": (0x2190, 0x23FF),
    "Emoji": (0x1F300, 0x1F64F),
    "Fullwidth": (0xFF01, 0xFF5E),
    "Digits of scripts": (0x660, 0x669),
}

_SENTENCES = (
    "Turn off the light in the kitchen, please.",
    "The quick brown fox jumps over the lazy dog 1234567890 times.",
    "Sammuta keittiön valot, kiitos. Äiti ei öljyä tölkkiä.",
    "Übermäßig große Straße, fünf Füße und ein Maß.",
    "L'élève s'est levé à l'aube ; c'était déjà l'été.",
    "¿Dónde está el baño? ¡Aquí mismo, señor!",
    "Выключи свет на кухне, пожалуйста.",
    "请关掉厨房的灯。现在是下午3点45分。",
    "台所の電気を消してください。",
    "부엌 불을 꺼 주세요.",
    "أطفئ ضوء المطبخ من فضلك ١٢٣",
    "כבה את האור במטבח בבקשה",
    "कृपया रसोई की बत्ती बंद करें।",
    "กรุณาปิดไฟในห้องครัว",
    "Xin hãy tắt đèn trong bếp.",
    '{"intent": "HassTurnOff", "slots": {"area": "kitchen", "brightness": 40}}',
    "def f(x: int) -> int:\n\treturn x ** 2  # square\n",
    "https://example.org/a/b?q=1&r=%20x#top",
    "SELECT * FROM t WHERE a >= 10 AND b != 'it''s';",
    "-rw-r--r-- 1 root root 4096 Nov 24 17:45 file.tar.gz",
)
_EDGES = (
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t",
    " \n ",
    "\r\n",
    "a\r\nb\r\n\r\nc",
    "   leading",
    "trailing   ",
    "in   between",
    "tab\tbed\t\ttwice",
    "no-break\u00a0space",
    "ideographic\u3000space",
    "thin\u2009space\u200azero\u200bwidth",
    "\ufeffbyte order mark",
    "1",
    "12",
    "123",
    "1234",
    "12345678901234567890",
    "3.14159 -2,718 1e-9 0x1F 50% $9.99",
    "v1.2.3-rc4+build.5",
    "１２３ ٤٥٦ ७८९ ⅷ ½ x² H₂O",
    "I'm you're he's we'll they'd I've don't",
    "I'M YOU'RE HE'S WE'LL THEY'D I'VE DON'T",
    "I’m you’re he’s",
    "'s 's' ''s ' s",
    "o'clock rock'n'roll 'tis",
    "!!! ??? ... --- ___ === ###",
    "(a)[b]{c}<d>«e»“f”„g‟",
    "a_b-c.d,e;f:g/h\\i|j&k@l#m~n^o`p",
    "e\u0301 a\u0308 n\u0303 o\u0302\u0323",
    "é ä ñ ộ",
    "ﬁ ﬂ ﬃ ǆ ß ẞ İ ı",
    "👨\u200d👩\u200d👧\u200d👦 👍🏽 🇫🇮 ❤\ufe0f 1\ufe0f\u20e3",
    "🙂🙃🙂🙃",
    "\u202eright to left override\u202c",
    "soft\u00adhyphen non\u2011breaking",
    "\U0001f1eb\U0001f1ee\U00020000\U0002f800",
    "a" * 200,
    "ab" * 100,
    " " * 40,
    "\n" * 20,
    "=" * 79,
    "camelCaseAndPascalCase snake_case SCREAMING_CASE kebab-case",
    "éÉèÈ ÀÁÂ çÇ",
    "x1y2z3 4a5b6c",
    "\x01\x02\x7f",
    "\ufffd\uffff",
)
_AROUND_SPECIAL = (
    "{0}",
    "a{0}b",
    " {0} ",
    "{0}{0}",
    "{0}\nuser\nhi",
    "x {0}y",
    "{0} 1234",
    "<{0}>",
    "{0}\n\n",
)


def strings(special: tuple[str, ...] = ()) -> list[str]:
    """The strings, with some around each of the model's special tokens.

    Args:
        special: texts of special tokens, in order; the first dozen is used.
    """
    found = [*_SENTENCES, *_EDGES]
    found += [around.format(text) for text in special[:12] for around in _AROUND_SPECIAL]
    rng = random.Random(_SEED)
    names = list(SCRIPTS)
    while len(found) < COUNT:
        name = names[len(found) % len(names)]
        text = _made(rng, name)
        if rng.random() < 0.3:
            text = f"{text}{rng.choice(_JOINS)}{_made(rng, rng.choice(names))}"
        found.append(text)
    return found[:COUNT]


_JOINS = (" ", "\n", ", ", " 1234 ", "'s ", "\n\n", "-", "  ", "\t", "。")


def _made(rng: random.Random, script: str) -> str:
    words = ["".join(_letter(rng, script) for _ in range(rng.randint(1, 9))) for _ in range(_WORDS)]
    for at in range(len(words)):
        if rng.random() < 0.15:
            words[at] = str(rng.randint(0, 10 ** rng.randint(1, 6)))
    return rng.choice((" ", " ", " ", "", "\u3000")).join(words) + rng.choice(("", ".", "!", "?\n", " ", ":"))


def _letter(rng: random.Random, script: str) -> str:
    """Any code point of the range, unassigned ones too: a tokenizer meets them all."""
    first, last = SCRIPTS[script]
    return chr(rng.randint(first, last))
