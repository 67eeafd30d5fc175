from __future__ import annotations

import pytest

from puna.core.errors import PunaError
from puna.core.stage import validate
from puna.evaluate import translation
from puna.evaluate.stages import Translation

HYPOTHESES = ["De kat zit op de mat.", "Een hond blaft in de nacht.", "Dit is fout.", "Goedemorgen allemaal."]
REFERENCES = [
    "De kat zat op de mat.",
    "Een hond blafte in de nacht.",
    "Dat klopt niet.",
    "Goedemorgen allemaal.",
]


@pytest.mark.parametrize("name", ["chrf", "bleu"])
def test_scores_are_sacrebleus_own(name: str) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    own = {"chrf": CHRF(), "bleu": BLEU()}[name].corpus_score(HYPOTHESES, [REFERENCES]).score
    scored = translation.score(HYPOTHESES, REFERENCES)
    interval = scored.interval(name, draws=200, seed=0)
    assert interval.value == pytest.approx(own)
    assert interval.low < own < interval.high
    assert "version:" in scored.signature(name)


def test_gains_are_paired() -> None:
    better = translation.score(HYPOTHESES, REFERENCES)
    worse = translation.score([text[:-6] for text in HYPOTHESES], REFERENCES)
    gain = better.difference(worse, "chrf", draws=200, seed=0)
    assert gain.low > 0
    nothing = better.difference(better, "chrf", draws=50, seed=0)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    with pytest.raises(PunaError, match="same references"):
        better.difference(translation.score(["a"], ["b"]), "chrf", draws=10, seed=0)


def test_chinese_is_not_split_at_white_space() -> None:
    pair = (["我喜欢猫和狗"], ["我喜欢狗和猫"])
    chinese = translation.score(*pair, target_language="zh").interval("bleu", draws=10, seed=0)
    assert chinese.value > translation.score(*pair).interval("bleu", draws=10, seed=0).value
    assert not chinese.known  # one sentence gives no interval


def test_prompts_are_filled_in_and_the_reference_cannot_be() -> None:
    row = {
        "source_text": "a {cat}",
        "target_text": "een kat",
        "source_language": "en",
        "target_language": "nl",
    }
    assert translation.prompts([row], "{source_language}>{target_language}: {source_text}", chat=False) == [
        "en>nl: a {cat}"
    ]
    assert translation.prompts([row], "{source_text}", chat=True) == [
        [{"role": "user", "content": "a {cat}"}]
    ]
    for text, message in (
        ("{source_text} = {target_text}", "none of the places"),
        ("Translate!", "no place"),
    ):
        with pytest.raises(PunaError, match=message):
            validate(Translation, {"format": text}, where="test")


def test_as_many_hypotheses_as_references_are_needed() -> None:
    with pytest.raises(PunaError, match="one reference"):
        translation.score(["a"], [])
