"""Special tokens put into a tokenizer that exists, without a change to how it spells text.

System S65, 1.5-Pints (arXiv:2408.03506), does this to Mistral's tokenizer before pre-training: the id of the
end of a text gets another spelling, ``<|im_end|>``, so that what was learnt to end a document ends a
turn of a conversation too; the old spelling moves to a new id; padding gets a token of its own, which is
not the end; templates' markers and reserved tokens follow, up to a multiple that suits the hardware.
Simplified: the paper's list of markers is not printed in full, so that theirs are a recipe's to name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from puna.core.errors import PunaError
from puna.text.tokenizer import Tokenizer

RESERVED = "<|reserved_{}|>"


def operate(
    base: Tokenizer, *, end: str, pad: str, tokens: Sequence[str] = (), reserved: int = 0, multiple: int = 1
) -> Tokenizer:
    """``base`` with ``end`` in its EOS's place, and the old EOS, ``pad``, ``tokens`` and reserved ones new.

    There are at least ``reserved`` of the last, and as many more as make the size a multiple of
    ``multiple``. Every id that ``base`` had stands for the same text, but that of its EOS. Raises for a token
    that is there twice, and for an ``end`` that ``base`` spells already.
    """
    _check_names(base, end, pad, tokens)
    old_end = base.strings["eos_token"]
    described = json.loads(base.to_json())
    if end != old_end:
        _respell(described, old_end, end)
    core = tokenizers.Tokenizer.from_str(json.dumps(described))
    known = base.vocabulary()
    wanted = [*([old_end] if end != old_end else []), pad, *tokens]
    wanted = [token for token in dict.fromkeys(wanted) if token == old_end or token not in known]
    size = base.vocab_size + len(wanted) + reserved
    wanted += [RESERVED.format(number) for number in range(reserved + -size % multiple)]
    core.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in wanted]
    )
    config: dict[str, Any] = {
        **base.settings,
        # Where the EOS begins texts too, as GPT-2's does, both roles stay with the id.
        **{role: end if token == old_end else token for role, token in base.strings.items()},
        "pad_token": pad,
        "additional_special_tokens": [*tokens, *wanted],
        "chat_template": base.chat_template,
        "add_bos_token": base.adds_bos,
    }
    return Tokenizer(core, config, [token for token in base.stop_tokens if token != old_end])


def _check_names(base: Tokenizer, end: str, pad: str, tokens: Sequence[str]) -> None:
    named = [end, pad, *tokens]
    twice = next((token for token in named if named.count(token) > 1), None)
    if twice is not None:
        raise PunaError("a special token is named twice", where="special_tokens", found=repr(twice))
    if "eos_token" not in base.strings:
        raise PunaError("this tokenizer names no EOS, whose id the new end would take", where="in.tokenizer")
    if end != base.strings["eos_token"] and end in base.vocabulary():
        raise PunaError(
            "the end of a text would have two ids",
            where="end",
            found=f"{end!r} is token {base.id_of(end)} already",
            expected="a spelling that the tokenizer does not have, or its EOS",
        )


def _respell(described: dict[str, Any], old: str, new: str) -> None:
    """Give the token ``old`` another spelling in all of a tokenizer.json; its id stays."""
    model = described["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {new if token == old else token: index for token, index in vocabulary.items()}
    else:  # Unigram: pairs of a piece and its score
        model["vocab"] = [[new if piece == old else piece, score] for piece, score in vocabulary]
    if "merges" in model:  # the old spelling is text from now on: nothing may be merged into its id
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) != old]
    for token in described["added_tokens"]:
        token["content"] = new if token["content"] == old else token["content"]
    described["post_processor"] = _renamed(described.get("post_processor"), old, new)


def _merged(merge: str | Sequence[str]) -> str:
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)


def _renamed(part: Any, old: str, new: str) -> Any:
    """``part`` of a JSON document with the string ``old`` replaced wherever it stands alone, keys too."""
    if isinstance(part, dict):
        return {_renamed(key, old, new): _renamed(value, old, new) for key, value in part.items()}
    if isinstance(part, list):
        return [_renamed(value, old, new) for value in part]
    return new if part == old else part


def compare(old: Tokenizer, new: Tokenizer, texts: Iterable[str]) -> dict[str, float]:
    """What the operation promises, counted; texts that hold a special token's string are left out.

    Both are asked as puna asks them and as the tokenizers library alone does, out of what :meth:`~Tokenizer.
    save` writes.
    """
    marks = {*old.special_tokens, *new.special_tokens}
    plain = [text for text in texts if not any(mark in text for mark in marks)]
    libraries = [tokenizers.Tokenizer.from_str(each.to_json()) for each in (old, new)]
    before, after = (library.encode_batch(plain, add_special_tokens=False) for library in libraries)
    encoded = [one.ids == other.ids for one, other in zip(before, after, strict=True)]
    as_puna = [one == two for one, two in zip(old.encode_batch(plain), new.encode_batch(plain), strict=True)]
    decoded = [old.decode(one.ids) == new.decode(one.ids) for one in before]
    same = [all(each) for each in zip(encoded, as_puna, decoded, strict=True)]
    return {
        "texts": float(len(plain)),
        "tokens": float(sum(len(one.ids) for one in before)),
        "texts_changed": float(same.count(False)),
        "specials": float(len(new.special_tokens)),
        "specials_split": float(sum(not _is_one(new, libraries[1], token) for token in new.special_tokens)),
        "pad_is_end": float(new.pad_id == new.eos_id),
        "end_moved": float(new.eos_id != old.eos_id),
    }


def _is_one(tokenizer: Tokenizer, library: tokenizers.Tokenizer, token: str) -> bool:
    """Whether a special token is one id, by itself and between words, and is written as it was read."""
    own = tokenizer.id_of(token)
    inside = tokenizer.encode(f"one{token}two", allow_special=True)
    return (
        tokenizer.encode(token, allow_special=True) == [own]
        and library.encode(token, add_special_tokens=False).ids == [own]
        and inside.count(own) == 1
        and tokenizer.decode([own], skip_special=False) == token
    )
