"""Guesses of a caption's language: right or "unknown", and English captions are never taken for foreign ones."""

from __future__ import annotations

import pytest

from gmp.data.language import NAMES, UNKNOWN, language, languages
from gmp.world.scenes import draw_scenes

SENTENCES = {
    "en": """A man in a hat sits on a bench.
        a photo of a dog
        Two children are playing soccer in the park.
        The kitchen has wooden cabinets and a white refrigerator.
        1girl, solo, long hair, blue eyes, simple background
        a red circle above a blue square
        masterpiece, best quality, a portrait of an old woman with glasses
        Several people standing on a platform waiting for the train
        an aerial view of the city at night
        Close up of a sandwich on a plate
        surfer riding a wave in the ocean
        A large passenger airplane flying through a cloudy blue sky""",
    "de": """Ein Mann sitzt auf einer Bank im Park.
        Zwei Kinder spielen Fußball auf der Wiese.
        Die Küche hat weiße Schränke und einen großen Tisch.
        Eine Frau mit langen Haaren hält einen Hund.
        Das Bild zeigt eine Straße in der Nacht.
        ein rotes Auto vor einem alten Haus
        Mehrere Menschen stehen neben dem Zug""",
    "fr": """Un homme est assis sur un banc dans le parc.
        Deux enfants jouent au football.
        Une femme avec des cheveux longs tient un chien.
        Une rue de la ville pendant la nuit
        un chat noir sur une table
        Plusieurs personnes debout devant le train""",
    "es": """Un hombre está sentado en un banco del parque.
        Dos niños juegan al fútbol en la calle.
        Una mujer con el pelo largo sostiene un perro.
        una calle de la ciudad por la noche
        un gato negro sobre la mesa
        Varias personas cerca del tren""",
    "it": """Un uomo è seduto su una panchina nel parco.
        Due bambini giocano a calcio sulla spiaggia.
        Una donna con i capelli lunghi tiene un cane.
        una strada della città di notte
        un gatto nero sul tavolo
        Gruppo di persone davanti al treno""",
    "pt": """Um homem está sentado em um banco no parque.
        Duas crianças jogam futebol na rua.
        Uma mulher com cabelo comprido segurando um cachorro.
        uma rua da cidade à noite
        um gato preto em cima da mesa
        Várias pessoas perto do trem não olham""",
    "nl": """Een man zit op een bank in het park.
        Twee kinderen spelen voetbal op straat.
        Een vrouw met lang haar en een hond naast haar
        een straat in de stad met veel mensen
        een zwarte kat op de tafel
        De keuken heeft witte kasten en een grote tafel""",
    "pl": """Mężczyzna siedzi na ławce w parku.
        Dwoje dzieci gra w piłkę na ulicy.
        Kobieta z długimi włosami trzyma psa.
        czarny kot leży na stole
        Grupa ludzi stoi przy pociągu
        ulica w mieście, na której jest samochód""",
    "ru": """Мужчина сидит на скамейке в парке.
        чёрная кошка на столе
        улица ночью""",
    "zh": """一个男人坐在公园的长凳上
        桌子上的黑猫
        城市夜景, 4k""",
    "ja": """公園のベンチに座っている男性
        テーブルの上の黒い猫
        夜の街""",
    "ko": """공원 벤치에 앉아 있는 남자
        테이블 위의 검은 고양이""",
    "other": """رجل يجلس على مقعد في الحديقة
        ένας άνδρας κάθεται σε ένα παγκάκι
        एक आदमी पार्क में बैठा है""",
}  # fmt: skip
KNOWN = [(code, line.strip()) for code, text in SENTENCES.items() for line in text.splitlines()]


@pytest.mark.parametrize(("code", "caption"), KNOWN)
def test_a_sentence_is_in_its_language(code, caption):
    assert language(caption) == code


@pytest.mark.parametrize(
    "caption", ["", "42", "!!!", "🙂🙂", "Berlin", "XJ-900", "Mona Lisa", "art nouveau", "IMG_2041.JPG", "de la", "en"]
)
def test_what_says_too_little_is_unknown(caption):
    assert language(caption) == UNKNOWN


def test_no_caption_of_the_small_world_is_foreign():
    captions = {caption for scene, _ in draw_scenes(200, 0) for caption in scene.captions()}
    assert {language(caption) for caption in captions} <= {"en", UNKNOWN}
    assert sum(language(caption) == "en" for caption in captions) > 0.9 * len(captions)


def test_a_name_in_another_script_does_not_make_an_english_caption_foreign():
    assert language("a poster with the word 猫 written on it") == "en"
    assert language("a photo of Красная Square in Moscow at night with people") == "en"


def test_accents_may_be_composed_or_not():
    assert language("Mężczyzna siedzi na ławce") == language("Me\u0328z\u0307czyzna siedzi na ławce") == "pl"


def test_languages_are_counted_and_all_have_names():
    counts = languages([caption for _, caption in KNOWN])
    assert sum(counts.values()) == len(KNOWN)
    assert counts.keys() <= NAMES.keys() and next(iter(counts)) == "en"
