"""Personal data in texts: addresses (e-mail, IP, MAC), telephone numbers, accounts, cards; secret keys.

Patterns find candidates; what has check digits or a structure is then checked: accounts (IBAN) by their
country's length and the remainder modulo 97, cards by Luhn's digit and their first digit, IP addresses by
parsing. Telephone numbers have no check: those with a country's code and those written in three or four
groups are found, others are not, and a few numbers are taken for one that are none.

Secret keys are those that tell themselves: private keys in PEM, tokens in JSON (JWT) whose header is one,
and the keys of services that begin all theirs alike. A password is a word like any other.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import re
from collections.abc import Callable, Iterator
from typing import Literal

Kind = Literal["email", "iban", "card", "ip", "phone", "mac", "key"]
KINDS: tuple[Kind, ...] = ("email", "iban", "card", "ip", "phone", "mac", "key")
"""In the order that decides what characters are that two kinds claim from the same place on."""

_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
# Digits without spaces, in groups of four, or 4-6-5 and 4-6-4.
_CARD = re.compile(
    r"(?<![\d-])(?:\d{13,19}|\d{4}(?:[ -]\d{4}){3}(?:[ -]\d{1,3})?|\d{4}[ -]\d{6}[ -]\d{4,5})(?![\d-])"
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_PHONE = re.compile(
    r"(?<![\w+])(?:\+\d{1,3}[ .-]?)(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,5}(?![\w-])"
    r"|(?<![\w.+-])(?:\(\d{2,5}\) ?|\d{3}[ .-])\d{3,4}[ .-]\d{3,4}(?![\w-])"
)
_MAC = re.compile(r"(?<![\w:-])[0-9A-Fa-f]{2}([:-])(?:[0-9A-Fa-f]{2}\1){4}[0-9A-Fa-f]{2}(?![\w:-])")
_PRIVATE = re.compile(r"-----BEGIN ((?:[A-Z]+ ){0,3}PRIVATE KEY)-----[^-]{1,20000}-----END \1-----")
_TOKEN = re.compile(r"\b(eyJ[\w-]{5,})\.[\w-]{5,}\.[\w-]{5,}")
# Amazon, GitHub, GitLab, Slack, Google, Stripe, Hugging Face, OpenAI and Anthropic, in this order.
_SERVICES = re.compile(
    r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{40,255}|glpat-[\w-]{20,}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{35}|[rs]k_live_[A-Za-z0-9]{16,}|hf_[A-Za-z]{34}"
    r"|sk-(?:[a-z]+-)?[\w-]{32,})(?![\w-])"
)
# Lengths of account numbers by country, after the registry of IBAN (ISO 13616).
_REGISTRY = """
AD:24 AE:23 AL:28 AT:20 AZ:28 BA:20 BE:16 BG:22 BH:22 BR:29 BY:28 CH:21 CR:22 CY:28 CZ:24
DE:22 DK:18 DO:28 EE:20 EG:29 ES:24 FI:18 FO:18 FR:27 GB:22 GE:22 GI:23 GL:18 GR:27 GT:28
HR:21 HU:28 IE:22 IL:23 IQ:23 IS:26 IT:27 JO:30 KW:30 KZ:20 LB:28 LC:32 LI:21 LT:20 LU:20
LV:21 MC:27 MD:24 ME:22 MK:19 MR:27 MT:31 MU:30 NL:18 NO:15 PK:24 PL:28 PS:29 PT:25 QA:29
RO:24 RS:22 SA:24 SC:31 SE:24 SI:19 SK:24 SM:27 ST:25 SV:28 TL:23 TN:24 TR:26 UA:29 VA:22
VG:24 XK:20
"""
_LENGTHS = {part[:2]: int(part[3:]) for part in _REGISTRY.split()}


def is_iban(text: str) -> bool:
    """Whether an account number of a known country has its length and its check digits (ISO 7064)."""
    compact = text.replace(" ", "")
    if not re.fullmatch(r"[A-Z]{2}\d{2}[A-Z0-9]+", compact) or _LENGTHS.get(compact[:2]) != len(compact):
        return False
    moved = compact[4:] + compact[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def is_card(text: str) -> bool:
    """Whether 13 to 19 digits begin as those of cards do, are not all the same, and pass Luhn's test."""
    digits = [int(character) for character in text if character.isdigit()]
    if not 13 <= len(digits) <= 19 or digits[0] not in (2, 3, 4, 5, 6) or len(set(digits)) == 1:
        return False
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # Two names with a pair of colons between them stand in code more often than for an address.
    return address.version == 4 or len([part for part in text.split(":") if part]) >= 3


def _is_phone(text: str) -> bool:
    return 7 <= sum(character.isdigit() for character in text) <= 15


def _is_token(header: str) -> bool:
    """Whether the first part of a token is an object in JSON that names an algorithm (RFC 7519)."""
    try:
        told = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except ValueError:
        return False
    return isinstance(told, dict) and "alg" in told


def _keys(text: str) -> Iterator[tuple[int, int]]:
    if "PRIVATE KEY-----" in text:
        yield from (match.span() for match in _PRIVATE.finditer(text))
    if "eyJ" in text:
        yield from (match.span() for match in _TOKEN.finditer(text) if _is_token(match.group(1)))
    yield from (match.span() for match in _SERVICES.finditer(text))


def _checked(pattern: re.Pattern[str], check: Callable[[str], bool], text: str) -> Iterator[tuple[int, int]]:
    for match in pattern.finditer(text):
        if check(match.group()):
            yield match.span()


def _accounts(text: str) -> Iterator[tuple[int, int]]:
    """Candidates may run on into the next word: the country's length says where they end."""
    for match in _IBAN.finditer(text):
        length = _LENGTHS.get(match.group()[:2], 0)
        end, seen = match.start(), 0
        while end < match.end() and seen < length:
            seen += text[end] != " "
            end += 1
        if is_iban(text[match.start() : end]) and not text[end : end + 1].isalnum():
            yield match.start(), end


def _candidates(text: str, kind: Kind) -> Iterator[tuple[int, int]]:
    if kind == "email":
        return (match.span() for match in _EMAIL.finditer(text)) if "@" in text else iter(())
    if kind == "iban":
        return _accounts(text)
    if kind == "card":
        return _checked(_CARD, is_card, text)
    if kind == "ip":
        return _addresses(text)
    if kind == "mac":
        return (match.span() for match in _MAC.finditer(text))
    return _keys(text) if kind == "key" else _checked(_PHONE, _is_phone, text)


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    yield from _checked(_IPV4, _is_address, text)
    yield from _checked(_IPV6, _is_address, text)


def find(text: str, kinds: tuple[Kind, ...] = KINDS) -> list[tuple[int, int, Kind]]:
    """Start, end and kind of what is found, in order, none inside another: the earlier one has the place."""
    claimed = [
        (start, order, end)
        for order, kind in enumerate(KINDS)
        if kind in kinds
        for start, end in _candidates(text, kind)
    ]
    found: list[tuple[int, int, Kind]] = []
    done = 0
    for start, order, end in sorted(claimed):
        if start >= done:
            found.append((start, end, KINDS[order]))
            done = end
    return found
