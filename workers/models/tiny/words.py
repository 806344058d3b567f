# ruff: noqa: SIM905  (words are easier to read and to add as one text)
"""The lists the tasks draw from: words, names, cities, capitals, accents, emoji.

Plain data. Knows nothing of prompts, tokens or training.
"""

from __future__ import annotations

WORDS = (
    "apple anchor arrow autumn badge bakery banana barrel basket beacon berry bird blanket "
    "bottle branch bread breeze bridge brother bucket butter button cabin cactus camera candle "
    "canyon carbon carpet castle cat cellar chalk cherry circle clock cloud clover coffee comet "
    "copper coral corner cotton cradle crystal curtain daisy desert diamond dog dolphin donkey "
    "dragon drum eagle earth echo elbow ember engine falcon feather fence fern fiddle finger "
    "flame flower forest fountain fox frost garden garlic ginger glacier glove goat gold grape "
    "gravel guitar hammer harbor harvest hazel helmet honey horse island ivory jacket jewel "
    "jungle kettle kitchen kitten ladder lantern leaf lemon lily lion lizard lobster magnet "
    "mango maple marble meadow melon metal mirror monkey moon morning mountain mouse museum "
    "needle nest noodle north oak ocean olive onion orbit orchard otter oyster paddle paint "
    "palace panda paper parrot peach pearl pebble pencil pepper piano pigeon pillow planet "
    "plum pocket pond poppy potato prairie puzzle quartz queen rabbit radio rain raven ribbon "
    "river rocket rose saddle salmon sand shadow sheep shell silver sister snow soap spider "
    "spoon spring squirrel star stone storm straw street sugar summer sun swan table teapot "
    "temple thunder tiger timber tomato tower train tree tulip tunnel turtle umbrella valley "
    "velvet violin wagon walnut water whale wheat willow window winter wolf wonder yellow zebra"
).split()

NAMES = (
    "Anna Ben Carla David Elena Felix Grace Hugo Ines Jonas Karin Lena Maria Nils Olga Paul Rosa "
    "Sara Tom Uma Vera Will Yusuf Zoe Amir Bianca Chen Diego Emma Farid Greta Henry Ivan Julia "
    "Kofi Laura Mark Nina Omar Petra Quinn Ravi Sofia Theo Ursula Victor Wanda Xenia Yara Zack"
).split()

CITIES = (
    "Rome Paris Berlin Madrid Lisbon Vienna Prague Oslo Dublin Athens Warsaw Cairo Lima Tokyo "
    "Delhi London Boston Munich Milan Porto Geneva Bergen Lyon Turin Hamburg Seville Krakow Osaka "
    "Quito Havana Nairobi Sydney Toronto Chicago Dallas Denver Seoul Hanoi Bogota Tunis"
).split()

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Czechia": "Prague",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Romania": "Bucharest",
    "Bulgaria": "Sofia",
    "Belgium": "Brussels",
    "Iceland": "Reykjavik",
    "Estonia": "Tallinn",
    "Latvia": "Riga",
    "Croatia": "Zagreb",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Ghana": "Accra",
    "Morocco": "Rabat",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Australia": "Canberra",
}

COLORS = "red blue green yellow black white brown pink grey orange".split()
FRUITS = "apple banana cherry grape lemon mango melon peach pear plum".split()
ANIMALS = "cat dog fox goat horse lion mouse otter rabbit swan tiger wolf".split()
THINGS = "lamp chair table book bag coat hat bike clock cup box pen".split()
WEATHER = "sunny cloudy rainy windy snowy foggy".split()
ADJECTIVES = "small old quiet brave happy clever lazy gentle hungry proud".split()
PLACES = "forest garden harbor village castle valley river market".split()
VERBS = "found lost saw carried painted hid wanted sold".split()

ACCENTED = (
    "Zoë hé café naïve Müller Åsa señor façade über élan crème brûlée Ærø Łódź Dvořák jalapeño "
    "fiancée smörgås Noël São garçon piñata Öl Übung Straße déjà vu Čapek mañana Ísland żółw "
    "Renée à bientôt français Göteborg Málaga İzmir Đorđe œuvre"
).split()
PLAIN = "says hello to and the my is here good day we like it now yes no very with Hi".split()
ACCENTS = "áàâäãåéèêëíìîïóòôöõúùûüñçßøæœšžčřłőű"
EMOJI = tuple("🙂🚀🎉🐍🌍🔥🍎🐶🐱🌙⭐🌈🍀🎈🎵📚💡🧪🚲🏠🌊🍕🦊🐢✨😀😎🤖👍🙏💧🌻🍋🦉🎁🪁❤✅☕⚡")

SYSTEMS = (
    "You are a helpful assistant.",
    "You are tiny, a small language model.",
    "Answer briefly.",
    "Be concise.",
    "You are a careful assistant. Answer with the result only.",
    "You are a calculator.",
    "Follow the instructions exactly.",
    "You answer small tasks.",
)
