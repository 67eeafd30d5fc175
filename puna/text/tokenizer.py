"""A tokenizer that never adds or parses control tokens unless it is told to.

It wraps a Hugging Face ``tokenizers.Tokenizer``. Text from a corpus or a user becomes plain text
tokens whatever it contains; control tokens come from the ids of this class (``bos_id``,
``stop_ids``) and from a chat template's own markup (:meth:`Tokenizer.encode_markup`).
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tokenizers
from tokenizers import processors

from puna.core import files
from puna.core.errors import PunaError

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")
_KEPT_SETTINGS = ("model_max_length", "padding_side", "truncation_side")


class Piece(NamedTuple):
    """One token of an encoded text and the characters ``text[start:end]`` that it stands for."""

    id: int
    start: int
    end: int
    special: bool


class Tokenizer:
    """A vocabulary with its special tokens.

    ``core`` is taken over: padding, truncation and the post-processor (which would add special
    tokens) are switched off in it. ``config`` holds what a ``tokenizer_config.json`` holds;
    ``stop_tokens`` names tokens besides the EOS at which generation stops. ``stops_given`` says
    that whoever opened the model named all of them: no further one is to be added.
    """

    stops_given = False

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        stop_tokens: Sequence[str] = (),
    ) -> None:
        config = dict(config or {})
        self.core = core
        self.strings = {name: _token_text(config[name]) for name in NAMED_TOKENS if config.get(name)}
        self.chat_template = _default_template(config.get("chat_template"))
        self.settings = {name: config[name] for name in _KEPT_SETTINGS if config.get(name) is not None}
        self.stop_tokens = tuple(stop_tokens)
        core.no_padding()
        core.no_truncation()
        self._add_missing_specials(config)
        found = self.bos_id is not None and core.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]
        stated = config.get("add_bos_token")
        self.adds_bos = found if stated is None else bool(stated)
        if self.adds_bos and self.bos_id is None:
            raise PunaError("the tokenizer says it adds a BOS token but names none", expected="a bos_token")
        self._post_processor = core.post_processor if self.adds_bos == found else self._bos_processor()
        core.post_processor = None  # so that offsets stay untrimmed and nothing is added
        core.encode_special_tokens = True

    def _bos_processor(self) -> processors.TemplateProcessing | None:
        """What makes the tokenizers library put the BOS before a text, if it is to do so."""
        if not self.adds_bos:
            return None
        bos = self.strings["bos_token"]
        return processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:0", special_tokens=[(bos, self.id_of(bos))]
        )

    def _add_missing_specials(self, config: Mapping[str, Any]) -> None:
        """Mark every token that the configuration calls special, and add none to the vocabulary."""
        extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
        names = [_token_text(token) for token in (extra.values() if isinstance(extra, Mapping) else extra)]
        special = {token.content for token in self.core.get_added_tokens_decoder().values() if token.special}
        missing = []
        for name in dict.fromkeys([*self.strings.values(), *names]):
            if name in special:
                continue
            if self.core.token_to_id(name) is None:
                raise PunaError(
                    f"special token {name!r} is not in the vocabulary",
                    found=f"a vocabulary of {self.core.get_vocab_size()} tokens",
                    fix="restore the tokenizer's files; extend the vocabulary with the `extend` stage",
                )
            missing.append(tokenizers.AddedToken(name, special=True, normalized=False))
        if missing:
            self.core.add_special_tokens(missing)

    # ---- reading -------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """Read ``tokenizer.json`` and its configuration from a Hugging Face folder.

        A folder that has only a sentencepiece model is converted through transformers if that
        can be done here.
        """
        folder = Path(path)
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                config |= _object(folder / name)
        config["chat_template"] = _folder_template(folder) or config.get("chat_template")
        stops = _stop_ids_of(folder)
        if (folder / "tokenizer.json").is_file():
            core = _read_core(folder / "tokenizer.json")
        elif any((folder / name).is_file() for name in TOKENIZER_FILES):
            core = _convert_sentencepiece(folder)
        else:
            raise PunaError("no tokenizer in this folder", where=folder, expected="tokenizer.json")
        known = (core.id_to_token(token) for token in stops)
        return cls(core, config, [token for token in known if token is not None])

    @classmethod
    def from_gguf(cls, path: Path | str) -> Tokenizer:
        """Build the tokenizer from the metadata inside a GGUF file; its tensors are not read."""
        from puna.model.checkpoint import read_gguf_metadata
        from puna.text.gguf_vocabulary import tokenizer_from_metadata

        return tokenizer_from_metadata(read_gguf_metadata(path), where=path)

    # ---- text to ids ---------------------------------------------------------------------------

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of ``text``; nothing is added.

        The strings of special tokens are ordinary text unless ``allow_special`` is true.
        """
        if allow_special:
            return [piece.id for piece in self.encode_markup(text, [(0, len(text))])]
        return self._plain(self.core.encode(text, add_special_tokens=False).ids)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of ``text`` that goes on from other text: no space is put before its first word."""
        return self._plain(self._core_after("cut").encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of many texts, on every core the tokenizers library may use."""
        return [
            self._plain(encoding.ids)
            for encoding in self.core.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def encode_markup(
        self, text: str, markup: Iterable[tuple[int, int]], cuts: Sequence[int] = ()
    ) -> list[Piece]:
        """Encode ``text`` once; special tokens are recognised only inside the ranges ``markup``.

        The ranges are ordered and do not overlap. Everything else is plain text. No token
        reaches over one of the positions ``cuts``.
        """
        pieces: list[Piece] = []
        position = 0
        for start, end, token in self._special_matches(text, markup):
            left, right = start, end
            if token.lstrip:
                left = position + len(text[position:start].rstrip())
            if token.rstrip:
                right = len(text) - len(text[end:].lstrip())
            pieces += self._encode_run(text, position, max(left, position), cuts)
            pieces.append(Piece(self.id_of(token.content), start, end, True))
            position = right
        pieces += self._encode_run(text, position, len(text), cuts)
        return pieces

    def _special_matches(
        self, text: str, markup: Iterable[tuple[int, int]]
    ) -> Iterable[tuple[int, int, tokenizers.AddedToken]]:
        if not self._special_tokens:
            return
        for start, end in markup:
            for match in self._special_pattern.finditer(text, start, end):
                yield match.start(), match.end(), self._special_tokens[match.group()]

    def _encode_run(self, text: str, start: int, end: int, cuts: Sequence[int]) -> list[Piece]:
        """Encode the plain text ``text[start:end]``, cut where asked."""
        if start >= end:
            return []
        pieces: list[Piece] = []
        edges = [start, *(cut for cut in cuts if start < cut < end), end]
        for left, right in itertools.pairwise(edges):
            core = self._core_after("cut" if left > start else "special" if start > 0 else "nothing")
            encoding = core.encode(text[left:right], add_special_tokens=False)
            ids, places = encoding.ids, encoding.offsets
            if not self.special_ids.isdisjoint(ids):
                spelled = [
                    (plain, place) for t, place in zip(ids, places, strict=True) for plain in self._plain([t])
                ]
                ids, places = [plain for plain, _ in spelled], [place for _, place in spelled]
            pieces += [Piece(t, left + a, left + b, False) for t, (a, b) in zip(ids, places, strict=True)]
        return pieces

    def _core_after(self, before: Literal["nothing", "special", "cut"]) -> tokenizers.Tokenizer:
        """The core for a run of text after the beginning, a special token or a cut.

        Sentencepiece-like cores put a space before the first word; some of them after special
        tokens too; none may do so in the middle of a text.
        """
        return self.core if before == "nothing" else self._inner_cores[before == "cut"]

    def _plain(self, ids: list[int]) -> list[int]:
        """Spell out special ids that a model chose because their strings are in its vocabulary."""
        if self.special_ids.isdisjoint(ids):
            return ids
        plain: list[int] = []
        for token in ids:
            if token not in self.special_ids:
                plain.append(token)
                continue
            for character in str(self.core.id_to_token(token)):
                plain += [part.id for part in self.core.model.tokenize(character)]
        return plain

    # ---- ids to text ---------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; with ``skip_special`` the special tokens leave no trace."""
        return self.core.decode(list(ids), skip_special_tokens=skip_special)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's own spelling of each id; ``[id]`` for one beyond the vocabulary."""
        return [self.core.id_to_token(token) or f"[{token}]" for token in ids]

    def vocabulary(self) -> dict[str, int]:
        """Every token's spelling and id, special tokens too."""
        return self.core.get_vocab(with_added_tokens=True)

    # ---- facts ---------------------------------------------------------------------------------

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding must have."""
        return max(self.vocabulary().values()) + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special (control) tokens."""
        return frozenset(self.id_of(token) for token in self._special_tokens)

    @property
    def special_tokens(self) -> list[str]:
        """Strings of all special tokens, in the order of their ids."""
        return list(self._special_tokens)

    @property
    def template_strings(self) -> dict[str, Any]:
        """What a chat template needs to know: the named tokens, and the other special ones as a list."""
        named = set(self.strings.values())
        return {
            **self.strings,
            "additional_special_tokens": [t for t in self.special_tokens if t not in named],
        }

    @property
    def bos_id(self) -> int | None:
        """Id of the token before a document, or None if the tokenizer names none."""
        return self.core.token_to_id(self.strings["bos_token"]) if "bos_token" in self.strings else None

    @property
    def eos_id(self) -> int:
        """Id of the token after a document."""
        if "eos_token" not in self.strings:
            raise PunaError(
                "this tokenizer names no EOS token", expected="eos_token in tokenizer_config.json"
            )
        return self.id_of(self.strings["eos_token"])

    @property
    def pad_id(self) -> int:
        """Id that fills unused places; without a pad token the EOS (padding is never told by its id)."""
        return self.id_of(self.strings["pad_token"]) if "pad_token" in self.strings else self.eos_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: the EOS first, then the other stop tokens."""
        return tuple(dict.fromkeys([self.eos_id, *map(self.id_of, self.stop_tokens)]))

    def id_of(self, token: str) -> int:
        """Id of one token by the vocabulary's spelling; an unknown one is an error."""
        found = self.core.token_to_id(token)
        if found is None:
            raise PunaError(f"token {token!r} is not in the vocabulary")
        return found

    def with_stop_tokens(self, tokens: Iterable[str]) -> Tokenizer:
        """This tokenizer (sharing its vocabulary) with more stop tokens."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.stop_tokens = tuple(dict.fromkeys([*self.stop_tokens, *tokens]))
        return other

    def with_special_ids(self, given: Mapping[str, Any]) -> Tokenizer:
        """This tokenizer with other special ids: ``bos_id``, ``eos_ids`` and ``pad_id``, each if given.

        The first of ``eos_ids`` becomes the EOS, the others further stop tokens, and there are no
        more than these. None as ``bos_id`` or ``pad_id`` takes the token's role away.
        """
        names = {"bos_id": "bos_token", "pad_id": "pad_token"}
        strings: dict[str, str | None] = {
            names[key]: None if given[key] is None else self._spelling(given[key], key)
            for key in names
            if key in given
        }
        stops = [self._spelling(token, "eos_ids") for token in given.get("eos_ids", ())]
        if "eos_ids" in given and not stops:
            raise PunaError(
                "a model with a tokenizer needs a token to end with", where="eos_ids", found="none"
            )
        strings |= {"eos_token": stops[0]} if stops else {}
        if not strings:
            return self
        adds_bos = self.adds_bos and strings.get("bos_token", "") is not None
        config: dict[str, Any] = {**self.strings, **strings, **self.settings, "add_bos_token": adds_bos}
        core = tokenizers.Tokenizer.from_str(self.core.to_str() if "bos_id" in given else self.to_json())
        config["chat_template"] = self.chat_template
        other = type(self)(core, config, stops[1:] if stops else self.stop_tokens)
        other.stops_given = bool(stops) or self.stops_given
        return other

    def _spelling(self, token: Any, where: str) -> str:
        found = self.core.id_to_token(token) if isinstance(token, int) and token >= 0 else None
        if found is None:
            raise PunaError(
                "not a token of this tokenizer",
                where=where,
                found=token,
                expected=f"0 to {self.vocab_size - 1}",
            )
        return found

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the vocabulary, its rules or its special tokens."""
        return files.fingerprint([self.to_json(), self.strings, self.adds_bos])

    @functools.cached_property
    def _special_tokens(self) -> dict[str, tokenizers.AddedToken]:
        added = sorted(self.core.get_added_tokens_decoder().items())
        return {token.content: token for _, token in added if token.special}

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special_tokens.values(), key=lambda token: -len(token.content))
        return re.compile(
            "|".join(
                rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
                for token in longest_first
            )
        )

    @functools.cached_property
    def _inner_cores(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """The cores after a special token and after a cut; the core itself where it adds no prefix."""
        described = json.loads(self.core.to_str())
        cores: list[tokenizers.Tokenizer] = []
        for everywhere in (False, True):
            changed = [_drop_prefix(described[part], everywhere) for part in ("normalizer", "pre_tokenizer")]
            core = (
                tokenizers.Tokenizer.from_str(json.dumps(described))
                if any(changed)
                else (cores or [self.core])[-1]
            )
            core.encode_special_tokens = True
            cores.append(core)
        return cores[0], cores[1]

    # ---- writing -------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The whole ``tokenizer.json``, with the post-processor."""
        described = json.loads(self.core.to_str())
        if self._post_processor is not None:
            described["post_processor"] = json.loads(self._post_processor.__getstate__())
        return json.dumps(described, ensure_ascii=False)

    def save(self, folder: Path | str, template: str | None = None) -> None:
        """Write the files from which transformers' ``AutoTokenizer`` builds the same tokenizer.

        ``template`` is the source of the chat template; without it the one read with the tokenizer.
        """
        target = Path(folder)
        named = set(self.strings.values())
        extra = [token for token in self.special_tokens if token not in named]
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.strings,
            **self.settings,
        }
        files.write_text(target / "tokenizer.json", self.to_json())
        files.write_json(target / "tokenizer_config.json", config)
        files.write_json(
            target / "special_tokens_map.json", {**self.strings, "additional_special_tokens": extra}
        )
        source = template if template is not None else self.chat_template
        if source is not None:
            files.write_text(target / "chat_template.jinja", source)


def _token_text(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _default_template(value: Any) -> str | None:
    """The template's source; of several named ones, the default."""
    if isinstance(value, list):
        named = {item["name"]: item["template"] for item in value}
        value = named.get("default")
    return None if value is None else str(value)


def _object(path: Path) -> dict[str, Any]:
    value = files.read_json(path)
    if not isinstance(value, dict):
        raise PunaError("not a JSON object", where=path, found=type(value).__name__)
    return value


def _folder_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return _default_template(_object(folder / "chat_template.json").get("chat_template"))
    return None


def _stop_ids_of(folder: Path) -> list[int]:
    """Stop ids of the generation config or, if it names none, of the model's config."""
    for name in ("generation_config.json", "config.json"):
        value = _object(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and token >= 0 for token in ids):
            raise PunaError(
                "eos_token_id holds something else than ids", where=folder / name, found=repr(value)
            )
        if ids:
            return ids
    return []


def _read_core(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault in the file
        raise PunaError("not a readable tokenizer.json", where=path, found=error) from None


def _convert_sentencepiece(folder: Path) -> tokenizers.Tokenizer:
    try:
        import transformers

        converted = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        core = converted.backend_tokenizer
    except Exception as error:  # transformers raises many kinds here, from ImportError to ValueError
        raise PunaError(
            "transformers could not convert this folder's sentencepiece model to a tokenizer.json",
            where=folder,
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="install sentencepiece and protobuf, or save the tokenizer as tokenizer.json first",
        ) from None
    return tokenizers.Tokenizer.from_str(core.to_str())


def _drop_prefix(part: Any, everywhere: bool) -> bool:
    """Stop a normalizer or pre-tokenizer from putting a space before the first word (or any run)."""
    if not isinstance(part, dict):
        return False
    changed = False
    if part["type"] == "Metaspace" and part["prepend_scheme"] in (
        ("first", "always") if everywhere else ("first",)
    ):
        part["prepend_scheme"] = "never"
        changed = True
    if everywhere and part["type"] == "ByteLevel" and part["add_prefix_space"]:
        part["add_prefix_space"] = False
        changed = True
    if everywhere and part["type"] == "Prepend":
        part["prepend"] = ""
        changed = True
    inner = [*part.get("pretokenizers", []), *part.get("normalizers", [])]
    return any([changed, *[_drop_prefix(each, everywhere) for each in inner]])
