"""Tokenizers inside GGUF files: built from the file's metadata, and written so that llama.cpp agrees.

Two kinds are read: ``gpt2`` (byte-level BPE with merges and a named pre-tokenizer) and ``llama``
(sentencepiece BPE with scores and byte fallback). The rules belonging to each pre-tokenizer name
follow llama.cpp's tokenizer (src/llama-vocab.cpp); a name that is not known here is refused rather
than guessed, because a wrong split changes the ids silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from puna.core.errors import PunaError, unknown_name
from puna.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from puna.text.template import Template

# The format's token types (gguf.TokenType).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}
_STOP_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp does with a file that names no pre-tokenizer.
_DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Rule:
    """What a pre-tokenizer name stands for in llama.cpp."""

    names: tuple[str, ...]  # the first is the one written
    build: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    adds_bos: bool = False


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _splits(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        parts: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns
        ]
        return pre_tokenizers.Sequence(
            [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    return build


RULES = (
    Rule(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"), _byte_level),
    Rule(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        _digits,
    ),
    Rule(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _splits(_LLAMA3_SPLIT),
        ignore_merges=True,
        adds_bos=True,
    ),
    Rule(("smaug-bpe", "dbrx"), _splits(_LLAMA3_SPLIT)),
    Rule(
        ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "kormo"),
        _splits(_QWEN2_SPLIT),
    ),
    Rule(("tekken",), _splits(_TEKKEN_SPLIT), ignore_merges=True, adds_bos=True),
    Rule(("default",), _splits(*_DEFAULT_SPLITS)),
)
_RULE_OF = {name: rule for rule in RULES for name in rule.names}


def tokenizer_from_metadata(metadata: Mapping[str, Any], *, where: object = None) -> Tokenizer:
    """The tokenizer that a GGUF file's ``tokenizer.*`` keys describe.

    ``metadata`` maps keys to Python values (lists for arrays). An unknown kind or pre-tokenizer
    name, a missing key or a duplicate token is a :class:`PunaError`.
    """
    kind = _need(metadata, "tokenizer.ggml.model", where)
    tokens = [str(token) for token in _need(metadata, "tokenizer.ggml.tokens", where)]
    types = [int(kind) for kind in metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))]
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise PunaError(
            "the vocabulary in this GGUF file is inconsistent",
            where=where,
            found=f"{len(tokens)} tokens, {len(set(tokens))} of them different, {len(types)} token types",
        )
    if kind == "gpt2":
        core, adds_bos = _byte_level_core(metadata, tokens, where)
    elif kind == "llama":
        core, adds_bos = _sentencepiece_core(metadata, tokens, types, where), True
    else:
        raise unknown_name("GGUF tokenizer kind", str(kind), ("gpt2", "llama"), where=where)
    _add_tokens(core, tokens, types)
    config: dict[str, Any] = {
        name: tokens[metadata[key]] for name, key in _ROLES.items() if _in_range(metadata.get(key), tokens)
    }
    config["add_bos_token"] = (
        bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)) and "bos_token" in config
    )
    config["chat_template"] = metadata.get("tokenizer.chat_template")
    stops = [tokens[metadata[key]] for key in _STOP_KEYS if _in_range(metadata.get(key), tokens)]
    return Tokenizer(core, config, stops)


def _byte_level_core(
    metadata: Mapping[str, Any], tokens: Sequence[str], where: object
) -> tuple[tokenizers.Tokenizer, bool]:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    if name not in _RULE_OF:
        raise unknown_name("GGUF pre-tokenizer", name, _RULE_OF, where=where)
    rule = _RULE_OF[name]
    merges = [_pair(merge, where) for merge in _need(metadata, "tokenizer.ggml.merges", where)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.ignore_merges))
    core.pre_tokenizer = rule.build()
    core.decoder = decoders.ByteLevel()
    return core, rule.adds_bos


def _sentencepiece_core(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: object
) -> tokenizers.Tokenizer:
    """llama.cpp's SPM tokenizer: repeatedly join the neighbours whose union scores best."""
    scores = _need(metadata, "tokenizer.ggml.scores", where)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    unknown = next((tokens[index] for index, kind in enumerate(types) if kind == UNKNOWN), None)
    merges = _merges_from_scores(tokens, types, scores)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    core = tokenizers.Tokenizer(model)
    core.normalizer = _spaces(prefix)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return core


def _spaces(prefix: bool) -> normalizers.Normalizer:
    """Spaces become "▁", and one stands before every run of text if ``prefix``."""
    replaced = normalizers.Replace(" ", "▁")
    return normalizers.Sequence([normalizers.Prepend("▁"), replaced] if prefix else [replaced])


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score first."""
    usable = {
        token: index for index, token in enumerate(tokens) if types[index] in (NORMAL, USER_DEFINED, UNUSED)
    }
    ranked = []
    for token, index in usable.items():
        for cut in range(1, len(token)):
            left, right = usable.get(token[:cut]), usable.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], index, left, right))
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(ranked)]


def _add_tokens(core: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Mark control tokens as special, and user-defined ones as always taken whole."""
    marked = [
        tokenizers.AddedToken(token, special=kind in (CONTROL, UNKNOWN), normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    core.add_special_tokens([token for token in marked if token.special])
    core.add_tokens([token for token in marked if not token.special])


# ---- writing ----------------------------------------------------------------------------------

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# Whether llama.cpp is to prefix a space, by what a tokenizer does with spaces.
_SPACES = {json.dumps([json.loads(_spaces(prefix).__getstate__()), None]): prefix for prefix in (True, False)}


def gguf_metadata(
    tokenizer: Tokenizer, template: Template | None = None, *, rows: int | None = None
) -> dict[str, Any]:
    """The ``tokenizer.*`` keys with which llama.cpp tokenises as ``tokenizer`` does.

    ``rows`` is the number of rows of the embedding; ids beyond the vocabulary become unused
    tokens. Written are byte-level BPE whose pre-tokenizer llama.cpp knows by a name, and
    sentencepiece BPE with byte fallback; everything else is refused. The NFC normalisation of
    Qwen's tokenizers is accepted although llama.cpp leaves it out (it differs on text that is not
    in NFC).
    """
    described = json.loads(tokenizer.core.to_str())
    spelled = {index: token for token, index in tokenizer.vocabulary().items()}
    count = max(tokenizer.vocab_size, rows or 0)
    tokens = [spelled.get(index, f"[PAD{index}]") for index in range(count)]
    types = [NORMAL if index in spelled else UNUSED for index in range(count)]
    for index, added in tokenizer.core.get_added_tokens_decoder().items():
        types[index] = CONTROL if added.special else USER_DEFINED
    if described["model"].get("byte_fallback"):
        metadata = _sentencepiece_keys(described, tokens, types)
    else:
        metadata = _byte_level_keys(described)
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
    }
    for role, key in _ROLES.items():
        if role in tokenizer.strings:
            metadata[key] = tokenizer.id_of(tokenizer.strings[role])
    metadata.update(zip(_STOP_KEYS, _more_stops(tokenizer), strict=False))
    if template is not None:
        metadata["tokenizer.chat_template"] = template.source
    return metadata


def _byte_level_keys(described: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _name_of(described),
        "tokenizer.ggml.merges": [" ".join(_pair(merge, None)) for merge in described["model"]["merges"]],
        "tokenizer.ggml.add_space_prefix": False,
    }


def _sentencepiece_keys(
    described: Mapping[str, Any], tokens: Sequence[str], types: list[int]
) -> dict[str, Any]:
    """Scores that order the merges, and the types of the byte and unknown tokens (set in ``types``).

    llama.cpp joins whatever makes a token, so the merges must be all the ways to make each token.
    """
    model = described["model"]
    unknown = model.get("unk_token")
    for index, token in enumerate(tokens):
        if token == unknown:
            types[index] = UNKNOWN
        elif _BYTE_TOKEN.fullmatch(token):
            types[index] = BYTE
    merges = [_pair(merge, None) for merge in model["merges"]]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(left + right for left, right in merges))}
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    implied = _merges_from_scores(tokens, types, scores)
    in_order = [ranks[left + right] for left, right in merges]
    prefix = _SPACES.get(json.dumps([described["normalizer"], described["pre_tokenizer"]]))
    if (
        model["type"] != "BPE"
        or set(implied) != set(merges)
        or in_order != sorted(in_order)
        or prefix is None
    ):
        raise PunaError(
            "llama.cpp would tokenise otherwise than this sentencepiece-like tokenizer",
            found=f"a {model['type']} model with {len(merges):,} merges, "
            f"normalizer {(described['normalizer'] or {}).get('type')}, "
            f"pre-tokenizer {' + '.join(_types_in(described['pre_tokenizer'])) or None}",
            expected=f"{len(implied):,} merges in the order of their scores, spaces replaced by a normalizer",
            fix="save the model with format='hf'",
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _more_stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    more = tokenizer.stop_ids[1:]
    if len(more) > len(_STOP_KEYS):
        raise PunaError(
            "a GGUF file has room for three stop tokens",
            found=", ".join(tokenizer.tokens(tokenizer.stop_ids)),
        )
    return more


def _name_of(described: Mapping[str, Any]) -> str:
    """The pre-tokenizer name under which llama.cpp splits and merges as this tokenizer does."""
    model = described["model"]
    splits = _types_in(described["pre_tokenizer"])
    if model["type"] != "BPE" or splits[-1:] != ["ByteLevel"]:
        raise PunaError(
            "only BPE tokenizers that spell all bytes can be written into a GGUF file",
            found=f"a {model['type']} model after {' + '.join(splits) or 'no splitting'}",
            fix="save the model with format='hf'",
        )
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    normalizer = (described["normalizer"] or {}).get("type")
    if odd or normalizer not in (None, "NFC"):
        raise PunaError(
            "llama.cpp has no counterpart of a setting of this tokenizer",
            found=", ".join([*odd, *([f"normalizer {normalizer}"] if normalizer else [])]),
            fix="save the model with format='hf'",
        )
    wanted = _comparable(described["pre_tokenizer"])
    for rule in RULES:
        built = json.loads(rule.build().__getstate__())
        if _comparable(built) == wanted and rule.ignore_merges == bool(model.get("ignore_merges")):
            return rule.names[0]
    raise PunaError(
        "llama.cpp knows no name for this tokenizer's way of splitting text",
        found=json.dumps(described["pre_tokenizer"], ensure_ascii=False),
        expected=f"that of one of {', '.join(rule.names[0] for rule in RULES)}",
        fix="save the model with format='hf'",
    )


def _types_in(pre_tokenizer: Any) -> list[str]:
    if pre_tokenizer is None:
        return []
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [str(part["type"]) for part in parts]


def _comparable(pre_tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a pre-tokenizer without what does not change ids."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]


def _pair(merge: Any, where: object) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else list(merge)
    if len(parts) != 2 or " " in parts[0] + parts[1]:
        raise PunaError("a merge is not two tokens", where=where, found=repr(merge))
    return parts[0], parts[1]


def _in_range(index: Any, tokens: Sequence[str]) -> bool:
    return isinstance(index, int) and 0 <= index < len(tokens)


def _need(metadata: Mapping[str, Any], key: str, where: object) -> Any:
    if key not in metadata:
        raise PunaError(f"this GGUF file lacks the key {key!r}", where=where, fix="convert the model again")
    return metadata[key]
