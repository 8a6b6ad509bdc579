"""What a home's commands talk about: rooms, devices, numbers, things to buy, things to play.

The intent templates name lists (``{area}``, ``{name}``, ``{message}``) that the intents package leaves to
each home. This file fills them with large productive lists, in two halves that share no word of their own:
``train`` and ``eval``. A model that memorises values instead of copying them fails on the eval half.

Two rules keep the task answerable from the text alone: the last word of a name tells its kind (a *sconce* is
a light, a *deadbolt* a lock), and rooms, floors, persons and devices share no such last word.
"""

from __future__ import annotations

import random
from collections.abc import Callable

Chooser = Callable[[random.Random], str]


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return [" ".join(phrase.split()) for phrase in text.split("|")]


_MODIFIERS = _words(
    """
    amber ash aspen autumn azure basalt bamboo birch brass breeze bronze canvas cedar cherry chestnut
    cinder clover cobalt copper coral cosmic cotton crimson crystal daisy dawn denim desert dragon dusk
    eagle ebony echo elm ember emerald falcon fern fig flint forest fox garnet ginger glacier granite
    harbor hazel heron holly honey indigo iris iron island ivory ivy jade jasmine juniper lagoon lark
    lava lavender lemon lilac linen lotus lunar magnolia maple marble meadow mellow midnight mint misty
    moss nautilus nebula nickel nordic oak oasis ocean olive onyx opal orchid otter owl panda paper
    pearl pebble pepper pine plum polar poppy prairie quartz quiet raven retro river robin rose ruby
    rustic saffron sage sapphire sierra silk silver sky slate solar spruce star stone storm summer sunny
    teal thistle thunder tiger timber topaz tulip tundra twilight valley velvet vintage violet walnut
    willow winter wolf zen zinc alder badger beacon beaver bison cactus caramel carbon cliff comet
    condor cricket cypress delta dune fjord fossil gecko gravel hawk heather kiwi koala larch lichen
    lynx mango marsh merlin mosaic myrtle nectar nova oyster parrot peach pelican phoenix pixel puffin
    quail reef rowan salmon sequoia shadow sparrow swift sycamore tango tempest truffle turtle umber
    vapor wave yarrow zephyr
    """
)
_PERSONS = _words(
    """
    alice ben carla david emma felix grace henry isla jack kate liam mia noah olivia paul quinn rosa sam
    tina ursula victor wendy xavier yara zoe anna boris chloe dylan elena frank gina hugo ines jonas
    karen leo maria nico oscar petra ralph sofia tom una vera walter amir bianca chen dina ewan fatima
    goran hana ivan julia kofi lena marco nadia omar priya rafael sven tariq yuki aisha bruno celine
    dmitri esther farah george hiro ingrid jamal kira lars
    """
)
_ROOMS = _phrases(
    """
    kitchen|bedroom|bathroom|garage|office|hallway|living room|dining room|pantry|laundry room|study|
    nursery|library|den|workshop|conservatory|porch|patio|playroom|guest room|utility room|cellar|entryway|
    corridor|lounge|sunroom|gym|studio|closet|mudroom|family room|game room|powder room|sauna|balcony|
    terrace|shed|greenhouse|foyer|breakfast room
    """
)
_FLOORS = _words(
    """
    first second third fourth fifth sixth seventh eighth ninth tenth ground upper lower top bottom main
    middle basement attic mezzanine upstairs downstairs
    """
)
_FLOOR_HEADS = ["level", "storey", "wing", "deck"]
_HEADS = {
    "light": "sconce pendant chandelier spotlight bulb lantern uplighter downlight floodlight "
    "nightlight|led strip|neon sign",
    "switch": "outlet socket plug relay dehumidifier kettle|coffee maker|power strip|heated "
    "blanket|espresso machine",
    "fan": "ventilator blower extractor circulator|air purifier|range hood",
    "media_player": "speaker tv soundbar stereo receiver projector radio television boombox|record "
    "player|streaming box",
    "input_boolean": "mode toggle override flag",
    "climate": "thermostat radiator heater boiler|heat pump|air conditioner|hvac|mini split",
    "cover": "skylight pergola louvre canopy drape venetian marquee portiere|roof hatch|sun sail",
    "valve": "valve sprinkler stopcock faucet hydrant|drip line|water main",
    "lock": "deadbolt padlock latch bolt keypad|smart lock",
    "binary_sensor": "sensor detector contact beam tripwire",
    "sensor": "meter gauge probe barometer hygrometer thermometer",
    "scene": "mood ambience vibe atmosphere theme",
    "script": "routine sequence automation procedure",
    "button": "bell buzzer reset chime trigger",
    "lawn_mower": "automower lawnbot grasscutter|grass robot|lawn robot",
    "vacuum": "vacuum vac sweeper roomba|robot cleaner|floor robot",
}
_TODO = _words(
    """
    chores homework hardware party packing wedding camping holiday office garden groceries reading
    travel birthday moving renovation pharmacy errands project work baking cleaning school recipe repair
    bucket wish movie craft fitness
    """
)
_ZONES = _phrases(
    """
    work|school|university|church|park|airport|hospital|stadium|museum|mall|cinema|beach|marina|cabin|farm|
    pool|bakery|train station|college|pharmacy|zoo|theater|courthouse|dentist|clinic|harbor|market|
    supermarket|barber|kindergarten|bank|cafe|warehouse|embassy|ski resort|campground
    """
)
_PLACES = _words(
    """
    oslo lisbon tampere chicago berlin kyoto nairobi lima dublin prague seattle toronto madrid vienna
    helsinki bergen warsaw athens boston denver mumbai jakarta cairo quito zagreb geneva porto malmo
    utrecht leeds osaka perth dallas bristol antwerp gdansk tallinn riga vilnius sofia tirana ankara
    tbilisi hanoi manila santiago bogota havana
    """
)
_FOODS = _phrases(
    """
    milk|eggs|bread|butter|cheese|rice|pasta|flour|sugar|salt|apples|bananas|onions|garlic|carrots|yogurt|
    coffee|tea|jam|tofu|tomatoes|cucumbers|spinach|lettuce|potatoes|chicken|beef|noodles|beans|lentils|
    cereal|oats|almonds|walnuts|crackers|olive oil|vinegar|mustard|ketchup|mayonnaise|toilet paper|
    dish soap|batteries|sponges|napkins|light bulbs|toothpaste|shampoo|dog food|cat litter|trash bags|
    birthday candles|ice cream|orange juice|sparkling water|baking powder
    """
)
_FOOD_MODIFIERS = _words(
    """
    organic fresh frozen dried smoked ripe unsalted large small sliced canned spicy sweet vegan crunchy
    cheap local two three four five six some
    """
)
_ERRANDS = _phrases(
    """
    call {p}|email {p}|pay the rent|water the plants|fix the faucet|clean the gutters|book a table for {p}|
    return the books|renew the passport|walk the dog|paint the fence|iron the shirts|order {f}|pick up {f}|
    cook dinner for {p}|buy a {m} vase|wash the car|visit {p}|study {m} chemistry|plan the {m} trip|
    sort the mail|charge the camera|print the tickets
    """
)
_TIMER_NAMES = _words(
    """
    pizza pasta laundry homework egg tea cake bread yoga workout nap meditation chicken roast rice dough
    reading shower steak cookie oven break piano medicine soup turkey brownie study plank stretching
    barbecue potato lasagna coffee
    """
)
_MESSAGES = _phrases(
    """
    dinner is ready|it is time for bed|{p} is home|the {m} show is starting|we are leaving in a minute|
    please come downstairs|the taxi is here|{p} needs help|somebody is at the door|breakfast is served|
    do not forget the {f}|{p} called|the laundry is done|school starts in ten minutes|
    there is cake in the kitchen|i am going to bed|{p} has the {m} keys|the guests have arrived|
    homework first then games|feed the cat|lunch will be late|put on your shoes|we need {f}
    """
)
_TITLES = _phrases(
    """
    the {m} {n}|{m} {n}|{n} of {m}|{m} and {m2}|{p} and the {n}s|{m} {n} {n2}|ballads for {p}|{p} {m}|
    dancing with {m2}
    """
)
_TITLE_NOUNS = _words(
    """
    dream road heart train dancer mirror garden fire ocean letter window engine ghost kingdom rebel
    bridge signal circus orchestra paradise horizon satellite revolution symphony cathedral carousel
    lighthouse machine stranger wanderer
    """
)
_ONSETS = _words("b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t tr v w y z")
_VOWELS = _words("a e i o u ai ea io oo ou")
_CODAS = ["", "", "l", "n", "r", "s", "t", "x", "nd", "rk", "sh", "m"]


class HomeValues:
    """The lists of one half.

    Args:
        half: 0 for training, 1 for evaluation; a word of the open lists belongs to exactly one of them.
        seed: of the division.
    """

    def __init__(self, half: int, seed: int) -> None:
        """Divide every open list: three quarters to training, one quarter to evaluation."""
        self._half = half
        self._seed = seed
        self._modifiers = self._mine(_MODIFIERS)
        self._rooms = self._mine(_ROOMS)
        self._floors = self._mine(_FLOORS)
        self._persons = self._mine(_PERSONS)
        self._todo = self._mine(_TODO)
        self._zones = self._mine(_ZONES)
        self._places = self._mine(_PLACES)
        self._foods = self._mine(_FOODS)
        self._errands = self._mine(_ERRANDS)
        self._timer_names = self._mine(_TIMER_NAMES)
        self._messages = self._mine(_MESSAGES)
        self._nouns = self._mine(_TITLE_NOUNS)

    def _mine(self, words: list[str]) -> list[str]:
        order = list(words)
        random.Random(f"{self._seed}/{order[0]}/{len(order)}").shuffle(order)
        cut = len(order) * 3 // 4
        return order[cut:] if self._half else order[:cut]

    def coined(self, rng: random.Random) -> str:
        """Return a word that nobody has seen: copying is the only way to get it right."""
        while True:
            word = "".join(
                rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
                for _ in range(rng.choice((1, 2, 2, 3)))
            )
            if len(word) > 3 and sum(map(ord, word)) % 4 // 3 == self._half:
                return word

    def modifier(self, rng: random.Random) -> str:
        """Return the word that tells one device of a kind from another."""
        pick = rng.random()
        if pick < 0.25:
            return self.coined(rng)
        if pick < 0.4:
            return rng.choice(self._persons) + "'s"
        return rng.choice(self._modifiers)

    def area(self, rng: random.Random) -> str:
        """Return a room."""
        if rng.random() < 0.5:
            return rng.choice(self._rooms)
        return f"{self.modifier(rng)} {rng.choice(_ROOMS)}"

    def floor(self, rng: random.Random) -> str:
        """Return a floor."""
        if rng.random() < 0.5:
            return rng.choice(self._floors)
        return f"{self.modifier(rng)} {rng.choice(_FLOOR_HEADS)}"

    def name(self, domain: str, rng: random.Random) -> str:
        """Return the name of a device (or person, place, list) of a domain."""
        if domain == "person":
            return rng.choice(self._persons)
        if domain == "weather":
            return rng.choice(self._places) if rng.random() < 0.6 else self.coined(rng)
        if domain == "todo":
            own = rng.choice(self._todo)
            return own if rng.random() < 0.5 else f"{self.modifier(rng)} {own}"
        heads = _HEADS[domain].split("|")
        head = rng.choice([*heads[0].split(), *heads[1:]])
        words = [self.modifier(rng) for _ in range(rng.choice((1, 1, 1, 2)))]
        return " ".join([*dict.fromkeys(words), head])

    def domains(self) -> frozenset[str]:
        """Return every domain that ``name`` knows."""
        return frozenset(_HEADS) | {"person", "weather", "todo"}

    def _filled(self, pattern: str, rng: random.Random) -> str:
        return pattern.format(
            p=rng.choice(self._persons),
            m=rng.choice(self._modifiers),
            m2=self.coined(rng),
            f=self.food(rng),
            n=rng.choice(self._nouns),
            n2=rng.choice(self._nouns),
        )

    def food(self, rng: random.Random) -> str:
        """Return something to buy."""
        food = rng.choice(self._foods)
        return food if rng.random() < 0.4 else f"{rng.choice(_FOOD_MODIFIERS)} {food}"

    def item(self, rng: random.Random) -> str:
        """Return an entry of a list of things to do."""
        return self.food(rng) if rng.random() < 0.4 else self._filled(rng.choice(self._errands), rng)

    def title(self, rng: random.Random) -> str:
        """Return something to play."""
        return self._filled(rng.choice(_TITLES), rng)

    def message(self, rng: random.Random) -> str:
        """Return something to tell everybody."""
        return self._filled(rng.choice(self._messages), rng)

    def timer_name(self, rng: random.Random) -> str:
        """Return what a timer is for."""
        name = rng.choice(self._timer_names)
        return name if rng.random() < 0.4 else f"{self.modifier(rng)} {name}"

    def zone(self, rng: random.Random) -> str:
        """Return a place outside the home."""
        return rng.choice(self._zones)

    def command(self, rng: random.Random) -> str:
        """Return a command to be carried out later."""
        device = self.name(rng.choice(("light", "switch", "fan", "media_player")), rng)
        pattern = rng.choice(
            (
                "turn on the {d}",
                "turn off the {d}",
                "switch off {d}",
                "switch on {d}",
                "turn off the lights",
                "turn off the {a} lights",
                "turn on the {a} fan",
                "open the {c}",
                "close the {c}",
                "lock the {l}",
                "unlock the {l}",
                "turn off all lights",
                "start the {v}",
                "dim the {a} lights",
                "activate the {s}",
            )
        )
        return pattern.format(
            d=device,
            a=self.area(rng),
            c=self.name("cover", rng),
            l=self.name("lock", rng),
            v=self.name("vacuum", rng),
            s=self.name("scene", rng),
        )

    def wildcard(self, list_name: str) -> Chooser:
        """Return the chooser of a list that the templates leave open.

        Raises:
            KeyError: a list that this file does not know: the intents package has a new one.
        """
        return {
            "message": self.message,
            "search_query": self.title,
            "zone": self.zone,
            "timer_name": self.timer_name,
            "timer_command": self.command,
            "shopping_list_item": self.food,
            "todo_list_item": self.item,
        }[list_name]
