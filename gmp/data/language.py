"""Which language a caption is written in, guessed from its letters and common words; no model, nothing to download.

CLIP's text towers have read English captions almost alone. A guess is made only where enough speaks for it: a name, two
words, or a tag that several languages have is "unknown", and unknown captions are not counted as foreign.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

UNKNOWN = "unknown"
NAMES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese",
    "nl": "Dutch", "pl": "Polish", "ru": "Russian or another Cyrillic language", "zh": "Chinese", "ja": "Japanese",
    "ko": "Korean", "other": "another script", UNKNOWN: "unknown",
}  # fmt: skip
LEAST = 1.0  # that has to speak for English: a word of its own, or several that other languages have too …
LEAST_FOREIGN = 1.5  # … and for another language: one word may be a name, or an English one that is not known here
AHEAD = 1.5  # times as much as for the next one
FEWEST = 3  # words; fewer in Latin letters are unknown unless all of them are known

# Function words, and the words that captions are made of. A word that k languages have counts 1/k for each.
_WORDS = {
    "en": """
        a about above across against all along also an and another are around as at back be behind being below beside
        between big black blue both brown building by car chair close cloudy colorful cute day dog down each eating
        face field filled flying from front girl glasses gray green grey group has hair hand hands hanging has have he
        her hill him his holding horse house in inside into is it its kitchen lady large laying leaning left light
        little long looking lots made man many men middle mirror near next night nobody of off old on one onto open or
        orange other out outdoors outside over painting parked people person photo photograph picture pink plate
        playing portrait purple red riding right road room running scene several she shirt showing side sign silver
        sitting sky sleeping small smiling snow some standing street striped surrounded table tall that the their them
        there these they thing this three through to together toward tower tree trees two under up view walking wall
        watching water wearing were what when where which while white who with without woman women wooden yellow young
        your background eyes dress simple door no not was war die met circle square triangle shape star above of style
        illustration drawing
        """,
    "de": """
        aber alle alte alten als am an auf aus bei beim bild blau blaue blauen braun das dem den der des die drei ein
        eine einem einen einer eines er es foto frau frauen für gegen gelb gelbe gelben gibt groß große großen großer
        grün grüne grünen haar haare hält hand hat hinter hund hunde ihr ihre im in ist junge junger katze kind kinder
        klein kleine kleinen kleiner kopf leute liegt links mädchen mann männer mehrere menschen mit nach nacht neben
        nicht noch oben ohne person rechts rot rote roten roter schwarz schwarze schwarzen schwarzer sehr sich sie
        sind sitzen sitzt spielt steht stehen straße tisch trägt über um und unter vom von vor wald wasser weiß weiße
        weißen weißer wird zu zum zur zwei zwischen auto haus blumen himmel
        """,
    "fr": """
        à assis assise au aux avec blanc blanche blancs bleu bleue brun ce cette chat cheveux chien ciel dans de
        debout derrière des deux devant du elle en enfant enfants entre est et femme femmes fille fleurs fond garçon
        gens grand grande gris groupe gros homme hommes il ils jaune jeune jouant joue la le les leur lui main maison
        marche mer montagne neige noir noire nuit ont ou par pendant personne personnes petit petite plage plusieurs
        portant porte pour près qui regarde rouge route rue sa sans se ses son sont sous sur table tenant tient trois
        un une vert verte vers vieux ville voiture
        """,
    "es": """
        a al amarillo amarilla anciano árbol azul bajo blanca blanco calle cerca chica chico cielo ciudad coche con
        cuatro de del delante desde detrás dos el ella ellos en encima entre es esta está están este flores foto gato
        gente grande gris grupo hombre hombres joven junto la las lleva llevando lo los mano mar mesa mientras montaña
        mujer mujeres muy negra negro niña niño niños noche o para pelo pequeña pequeño perro persona personas playa
        por que roja rojo se sentada sentado sin sobre sosteniendo su sus tiene tres un una unos varias varios verde
        viejo y
        """,
    "it": """
        a accanto al alla anziano auto bambina bambini bambino bianca bianco blu campo cane capelli casa che cielo
        città con da dal dalla davanti degli dei del della delle di dietro donna donne due e ed è fiori foto fra gatto
        giallo gialla gente giovane gli grande grigio gruppo i il in indossa insieme la le lo mano mare mentre
        montagna nel nella nera nero neve notte o parco per persona persone piccola piccolo piena ragazza ragazzo
        rossa rosso seduta seduto sono sopra sotto spiaggia strada su sua sul sulla suo tavolo tiene tra tre un una
        uno uomini uomo vecchio verde vicino volto
        """,
    "pt": """
        a à amarela amarelo ao aos árvore as até atrás azul branca branco cabelo cachorro campo cão carro casa céu
        cidade com crianças criança da das de dentro deitado do dois dos duas e ela ele em encima enquanto entre é
        está estão flores foto frente garota gato grande grupo há homem homens jovem junto lado mão mar menina menino
        mesa montanha muito mulher mulheres na não nas noite no nos o os ou para parque pela pelo pequena pequeno
        perto pessoa pessoas por praia preta preto que rapaz rua segurando sem sentada sentado seu sobre sua três um
        uma usando velho verde vermelha vermelho vestindo
        """,
    "nl": """
        aan achter als auto bij blauw blauwe bloemen boven bruin bruine daar dat de deze die dit door draagt drie een
        en er foto gele geel gras groen groene groep grote haar hand hebben heeft het hij hond huis hun ijs in is
        jonge jongen kat kind kinderen klein kleine langs ligt loopt lopen lucht man mannen meer meisje mensen met
        naar naast niet nog of om onder op over paard persoon rijdt rode rood sneeuw speelt spelen staan staat strand
        straat tafel te tegen terwijl tussen twee uit van veel vol voor vrouw vrouwen water waar wit witte zee zich
        zijn zit zitten zittende zonder zwart zwarte
        """,
    "pl": """
        a ale białą białe białego biały biała brązowy chłopiec chodzi czarna czarną czarne czarny czerwona czerwoną
        czerwone czerwony dla dom drzewo duża duży dwa dwaj dwie dwóch dziecko dzieci dziewczyna dziewczynka grupa i
        ich jadą jedzie jego jej jest kobieta kobiety kobietę koło koń kot kwiaty lub ludzi ludzie mała mały mężczyzna
        mężczyzny młoda młody morze morza na nad nie niebieska niebieski niebieskie niebo o obok od oraz osoba pies
        plaży pod podczas pole po przed przez przy samochód się siedzi siedzą stary stojąca stoi stoją stole stół
        śnieg śniegu trawie trzy trzyma ulicy ulica w we wodzie woda z za zdjęcie zielona zielony zielonej ze żółta
        żółty
        """,
}  # fmt: skip
# Letters that few of these languages have; one in a caption counts as much as a word of its own
_LETTERS = {"ß": "de", "ä": "de", "ö": "de", "ü": "de", "ñ": "es", "¿": "es", "¡": "es", "ã": "pt", "õ": "pt",
            "ł": "pl", "ą": "pl", "ę": "pl", "ś": "pl", "ż": "pl", "ź": "pl", "ń": "pl", "œ": "fr", "ê": "fr",
            "ij": "nl"}  # fmt: skip

_WORD = re.compile(r"[^\W\d_]+")
_SCRIPTS = (
    ("ja", re.compile("[\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9d]")),  # kana, which Chinese does not have
    ("ko", re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]")),
    ("zh", re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")),
    ("ru", re.compile("[\u0400-\u052f]")),
)
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")


def language(caption: str) -> str:
    """The code of a language, "other" for scripts that are not told apart, or "unknown". Codes are in `NAMES`.

    Han without kana is taken for Chinese, all Cyrillic for Russian.
    """
    text = unicodedata.normalize("NFC", caption).lower()
    script = _script(text)
    return _by_words(text) if script == "latin" else script


def _script(text: str) -> str:
    """The script of most letters; one ideogram says as much as two letters."""
    letters = sum(letter.isalpha() for letter in text)
    if not letters:
        return UNKNOWN
    latin = len(_LATIN.findall(text))
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS}
    rest = max(0, letters - latin - sum(counts.values()))
    if counts["ja"]:  # Japanese mixes kana and Han
        counts["ja"] += counts.pop("zh")
    weights = {"latin": latin, "other": rest} | {
        name: count * (1 if name == "ru" else 2) for name, count in counts.items()
    }
    return max(weights, key=weights.__getitem__)


def _by_words(text: str) -> str:
    words = _WORD.findall(text)
    scores: Counter[str] = Counter()
    for word in words:
        owners = _owners().get(word, ())
        for owner in owners:
            scores[owner] += 1 / len(owners)
    for owner in {_LETTERS[letter] for letter in set(text) & _LETTERS.keys()}:
        scores[owner] += 1
    if len(words) < FEWEST and sum(word in _owners() for word in words) < len(words):
        return UNKNOWN
    (best, most), (_, second) = (*scores.most_common(2), (UNKNOWN, 0.0), (UNKNOWN, 0.0))[:2]
    least = LEAST if best == "en" else LEAST_FOREIGN
    return best if most >= least and most >= AHEAD * second else UNKNOWN


@functools.lru_cache(maxsize=1)
def _owners() -> dict[str, tuple[str, ...]]:
    """The languages that have a word."""
    found: dict[str, tuple[str, ...]] = {}
    for code, words in _WORDS.items():
        for word in set(words.split()):
            found[word] = (*found.get(word, ()), code)
    return found


def languages(captions: Iterable[str]) -> dict[str, int]:
    """How many captions are in which language, the most frequent first."""
    return dict(Counter(map(language, captions)).most_common())
