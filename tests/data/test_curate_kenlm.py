"""Perplexity under a little model that is written out here, against its probabilities."""

from __future__ import annotations

import numpy
import pytest

from puna.core.errors import PunaError
from puna.data.curate.operator import apply_score, get_operator
from puna.data.curate.texts import Texts

pytest.importorskip("kenlm")
MODEL = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.0\t<unk>
0\t<s>\t-0.3
-0.7\t</s>
-0.5\ta\t-0.2
-0.6\tb\t-0.1

\\2-grams:
-0.2\t<s> a
-0.3\ta b
-0.4\tb </s>

\\end\\
"""


def perplexities(texts, model, **chosen):
    operator = get_operator("score", "kenlm.perplexity")
    return apply_score(operator, Texts(texts), operator.settings(model=str(model), **chosen))["perplexity"]


@pytest.fixture
def model(tmp_path):
    file = tmp_path / "model.arpa"
    file.write_text(MODEL)
    return file


def test_perplexity_is_by_tokens_and_lines(model):
    # a b: .2 + .3 + .4 of three; then a line "b" behind it: backing off, .3 + .6, and .4 for its end.
    found = perplexities(["a  b", "a b\nb", "", " \n"], model)
    assert found[:2] == pytest.approx([10 ** (0.9 / 3), 10 ** ((0.9 + 1.3) / 5)], rel=1e-5)
    assert numpy.isnan(found[2:]).all()


def test_pieces_of_a_tokenizer_are_the_tokens(model, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = perplexities(["a", "a-b"], model, tokenizer=str(tmp_path / "tokenizer.json"))
    # "a", "?", "b": .2, then an unknown one behind a (.2 + 1), b without a context (.6), and its end (.4).
    assert found == pytest.approx(
        [10 ** ((0.2 + 0.2 + 0.7) / 2), 10 ** ((0.2 + 1.2 + 0.6 + 0.4) / 4)], rel=1e-5
    )


def test_files_that_are_no_models_are_told(tmp_path, model):
    (tmp_path / "bad.arpa").write_text("hello")
    with pytest.raises(PunaError, match="not a model"):
        perplexities(["a"], tmp_path / "bad.arpa")
    with pytest.raises(PunaError, match="file not found"):
        perplexities(["a"], tmp_path / "none.arpa")
    with pytest.raises(PunaError, match=r"not a tokenizer\.json"):
        perplexities(["a"], model, tokenizer=str(tmp_path / "bad.arpa"))
