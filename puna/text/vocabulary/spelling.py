"""What bytes a token stands for, and how an old tokenizer spells the bytes of a new token.

Vocabularies write the same text differently: byte-level BPE writes a space as "Ġ" and every byte as a
character of its own, sentencepiece writes it as "▁" and odd bytes as "<0xAB>". Bytes are what they share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from puna.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (as GPT-2 does), to the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary spells bytes with one character each, as GPT-2's does."""
    return "ByteLevel" in _types(json.loads(tokenizer.core.to_str())["decoder"])


def _types(part: Any) -> list[str]:
    if not isinstance(part, Mapping):
        return []
    inner: Sequence[Any] = part.get("decoders") or part.get("pretokenizers") or ()
    return [str(part.get("type")), *(name for child in inner for name in _types(child))]


class Spelling:
    """A tokenizer's vocabulary as bytes.

    ``bytes_of[i]`` are the bytes that token ``i`` stands for, or None for special tokens and ids
    without a token; ``id_of`` finds the token for some bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._byte_level = is_byte_level(tokenizer)
        self.bytes_of: list[bytes | None] = [None] * tokenizer.vocab_size
        self.id_of: dict[bytes, int] = {}
        for token, index in sorted(tokenizer.vocabulary().items(), key=lambda item: item[1]):
            if index not in tokenizer.special_ids:
                self.bytes_of[index] = self._bytes(token)
                self.id_of.setdefault(self._bytes(token), index)

    def _bytes(self, token: str) -> bytes:
        if self._byte_level and all(character in BYTE_OF for character in token):
            return bytes(BYTE_OF[character] for character in token)
        match = _BYTE_TOKEN.fullmatch(token)
        if match and not self._byte_level:
            return bytes([int(match.group(1), 16)])
        return token.encode() if self._byte_level else token.replace("▁", " ").encode()

    def pieces(self, data: bytes) -> list[int]:
        """Ids that spell ``data`` inside a word; none where the vocabulary has no token for a byte.

        The model is asked directly, so that no space is put before the text.
        """
        model = self.tokenizer.core.model
        if self._byte_level:
            return [part.id for part in model.tokenize("".join(CHARACTER_OF[byte] for byte in data))]
        try:
            return [part.id for part in model.tokenize(data.decode().replace(" ", "▁"))]
        except UnicodeDecodeError:
            found = [self.tokenizer.core.token_to_id(f"<0x{byte:02X}>") for byte in data]
            return [index for index in found if index is not None]
