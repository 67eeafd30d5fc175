"""Languages: what detectors say, how they vote, and who decides a tie."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy
import pytest

from puna.core import assets
from puna.core.errors import PunaError
from puna.core.stage import validate
from puna.data.curate import languages
from puna.data.curate.languages import Detected, code_of, detect, vote
from puna.data.curate.operator import apply_map, apply_score, get_operator
from puna.data.curate.texts import Texts

LINES = {
    "en": "The committee will publish its report before the end of the year.",
    "nl": "De commissie zal haar verslag voor het einde van het jaar publiceren.",
    "hi": "समिति वर्ष के अंत से पहले अपनी रिपोर्ट प्रकाशित करेगी।",
    "ta": "குழு இந்த ஆண்டின் இறுதிக்குள் தனது அறிக்கையை வெளியிடும்.",
}
detectors = pytest.mark.parametrize("name", ["fasttext", "langid", "cld3"])


def said(*pairs: tuple[str, float]) -> list[Detected]:
    return [Detected([language], numpy.array([value])) for language, value in pairs]


@pytest.fixture(scope="module", autouse=True)
def with_models() -> None:
    for module in ("fasttext", "py3langid", "gcld3"):
        pytest.importorskip(module)
    try:
        assets.fetch(languages.LID)
    except PunaError as error:
        pytest.skip(f"lid.176 is not within reach: {error}")


@detectors
def test_detectors_know_plain_sentences(name):
    texts = Texts([*LINES.values(), "", " \n"])
    found = detect(texts, name)
    assert found.languages == [*LINES, "", ""]
    assert (found.probabilities[:4] > 0.5).all()
    assert (found.probabilities[4:] == 0).all()
    assert (found.probabilities <= 1).all()


@detectors
def test_a_batch_says_what_each_text_alone_says(name):
    together = detect(Texts(list(LINES.values())), name)
    for place, text in enumerate(LINES.values()):
        alone = detect(Texts([text]), name)
        assert alone.languages[0] == together.languages[place]
        assert alone.probabilities[0] == pytest.approx(together.probabilities[place])


def test_a_script_says_a_language_only_with_most_letters():
    found = detect(Texts(["தமிழ் a", "த aaaaaaaa", "abc", "123"]), "script")
    assert found.languages == ["ta", "", "", ""]
    assert found.probabilities[1:].tolist() == [0, 0, 0]


def test_the_gate_counts_only_sure_voices():
    # Released code adds a voice in both branches: hi would win. Inclusive at the gate.
    voices = said(("hi", 0.5), ("hi", 0.89), ("mr", 0.9))
    won = vote(voices, 0.9)
    assert (won.languages, won.voices.tolist()) == (["mr"], [1])
    assert vote(voices, 0.89).languages == ["mr"]  # One voice each: the larger sum decides.
    assert vote(voices, 0.5).languages == ["hi"]
    always = vote(voices, 0.9, [True, False, False])
    assert always.languages == ["mr"]  # One voice each again, 0.5 against 0.9.


def test_a_tie_goes_to_the_larger_sum_then_to_the_first_detector():
    assert vote(said(("hi", 0.95), ("mr", 0.97)), 0.9).languages == ["mr"]
    assert vote(said(("hi", 0.95), ("mr", 0.95)), 0.9).languages == ["hi"]
    assert vote(said(("mr", 0.95), ("hi", 0.95)), 0.9).languages == ["mr"]


def test_without_a_voice_there_is_no_language():
    won = vote(said(("hi", 0.1), ("", 0.0)), 0.9)
    assert (won.languages, won.voices.tolist()) == ([""], [0])
    assert math.isnan(won.probabilities[0])


def test_the_vote_names_the_documents_languages():
    operator = get_operator("map", "language.vote")
    texts = Texts([*LINES.values(), " "], languages=["", "", "", "", "xx"])
    made = apply_map(operator, texts, operator.settings(minimum=0.5, languages=["hi", "ta"]))
    assert made.texts == [None] * 5
    assert made.languages == ["en", "nl", "hi", "ta", None]
    assert made.signals["wanted"].tolist() == [0, 0, 1, 1, 0]
    assert made.signals["voices"][2] == 3
    with pytest.raises(PunaError, match="among the detectors"):
        validate(operator.settings, {"detectors": ["cld3"], "always": ["langid"]}, where="test")


def test_scores_tell_languages_as_numbers():
    operator = get_operator("score", "language.detected")
    signals = apply_score(operator, Texts(list(LINES.values())), operator.settings(languages=["nl"]))
    assert signals["wanted"].tolist() == [0, 1, 0, 0]
    assert signals["code"].tolist() == [code_of(name) for name in LINES]
    assert code_of("en") == 5 * 27 + 14
    assert math.isnan(code_of(""))
    shouted = Texts([LINES["nl"].upper()])
    juicer = get_operator("score", "data_juicer.language")
    lowered = apply_score(juicer, shouted, juicer.settings())
    plain = apply_score(juicer, Texts([LINES["nl"]]), juicer.settings())
    assert lowered["probability"] == pytest.approx(plain["probability"])


def test_each_script_stands_for_one_language():
    source = Path(languages.__file__).read_text(encoding="utf-8")
    assert len(re.findall(r'^    "\w+": \(0x', source, re.MULTILINE)) == len(languages._SCRIPTS)
