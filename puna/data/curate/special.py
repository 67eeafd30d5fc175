"""Classes of characters that Data-Juicer's and Setu's definitions speak of, as ranges of code points.

Sources: modelscope/data-juicer, ``ops/common/special_characters.py`` (Apache-2.0), whose emoji are those of
Unicode's ``emoji-test.txt`` that are a single code point; AI4Bharat/setu, ``filters.py`` (MIT); scripts
after Unicode's ``Scripts.txt``.
"""

from __future__ import annotations

import string
import unicodedata

import numpy

from puna.data.curate.characters import CODE_POINTS, Table, character_class, table_from, table_of

_SPECIAL = """
20 81-85 91-93 95-99 9c-9d a1-ab ad-b4 b7-bf d7 f7-f8 131 26a 2ba-2bc 2c8 2cc 2d0 2d8 2da 2dc 3c0 413 60c 647
66a 66c 6e9 93e 940 947 94d 97d 9be e51 2002-2003 2005 2008-200b 2010-2011 2013-2016 2018-201a 201c-2020 2022
2024 2026 202f-2030 2032-2033 2039-203a 203f 2043-2044 20a8 20aa 20ac 2103 2122 2190-2193 21d3 2206 2208 2212
221a 221e-221f 223c 2248 2256 2264-2265 2295 22c5 2550 25a0 25ac 25b2 25b4 25b7 25ba-25bc 25c6 25cf 25e6
2605-2606 261b 263b 2661 2665 266b 2713 2726 2731 2756 27a4 27a9 2800 3000-3002 300a-300d 3010-3011 309c 30b7
30c3-30c4 30f3 30fb-30fc 4e00 4e0a 58eb fd3e-fd3f feff ff01 ff08-ff09 ff0c ff0e ff11 ff1a-ff1b ff1f ff3e ff5e
fffc-fffd
"""
_EMOJI = """
a9 ae 203c 2049 2122 2139 2194-2199 21a9-21aa 231a-231b 2328 23cf 23e9-23f3 23f8-23fa 24c2 25aa-25ab 25b6 25c0
25fb-25fe 2600-2604 260e 2611 2614-2615 2618 261d 2620 2622-2623 2626 262a 262e-262f 2638-263a 2640 2642
2648-2653 265f-2660 2663 2665-2666 2668 267b 267e-267f 2692-2697 2699 269b-269c 26a0-26a1 26a7 26aa-26ab
26b0-26b1 26bd-26be 26c4-26c5 26c8 26ce-26cf 26d1 26d3-26d4 26e9-26ea 26f0-26f5 26f7-26fa 26fd 2702 2705
2708-270d 270f 2712 2714 2716 271d 2721 2728 2733-2734 2744 2747 274c 274e 2753-2755 2757 2763-2764 2795-2797
27a1 27b0 27bf 2934-2935 2b05-2b07 2b1b-2b1c 2b50 2b55 3030 303d 3297 3299 1f004 1f0cf 1f170-1f171 1f17e-1f17f
1f18e 1f191-1f19a 1f201-1f202 1f21a 1f22f 1f232-1f23a 1f250-1f251 1f300-1f321 1f324-1f393 1f396-1f397
1f399-1f39b 1f39e-1f3f0 1f3f3-1f3f5 1f3f7-1f4fd 1f4ff-1f53d 1f549-1f54e 1f550-1f567 1f56f-1f570 1f573-1f57a
1f587 1f58a-1f58d 1f590 1f595-1f596 1f5a4-1f5a5 1f5a8 1f5b1-1f5b2 1f5bc 1f5c2-1f5c4 1f5d1-1f5d3 1f5dc-1f5de
1f5e1 1f5e3 1f5e8 1f5ef 1f5f3 1f5fa-1f64f 1f680-1f6c5 1f6cb-1f6d2 1f6d5-1f6d9 1f6dc-1f6e5 1f6e9 1f6eb-1f6ec
1f6f0 1f6f3-1f6fc 1f7e0-1f7eb 1f7f0 1f90c-1f93a 1f93c-1f945 1f947-1f9ff 1fa70-1fa7c 1fa80-1fac6 1fac8
1facc-1fadd 1fadf-1faeb 1faef-1fafa
"""
_WHITE_SPACES = "9 20 84 a0 2000-200d 202f 205f-2060 3000 fffc"
# Setu's valid characters: digits, Latin, the Indic blocks, Arabic and its supplements.
_SETU_VALID = """
30-39 41-5a 61-7a 900-d7f 1c50-1c7f abc0-abff 600-6ff 750-77f 870-8ff fb50-fdff fe70-feff 10e60-10e7f
10ec0-10eff 1ec70-1ecbf 1ed00-1ed4f 1ee00-1eeff
"""
# And what is neither digit nor punctuation there.
_SETU_LETTERS = """
41-5a 61-7a 900-963 970-9e3 9f0-a65 a70-ae5 af0-aff b00-b65 b70-be5 bf0-bff c00-c65 c70-ce5 cf0-cff d00-d65
d70-d7f 1c5a-1c7f abc0-abed 600-65f 670-6ef 6fa-6ff 750-77f 870-8ff fb50-fdff fe70-feff 10ec0-10eff
"""
# The scripts that Setu lets pass, after Scripts.txt: Latin, Devanagari, Bengali, Gujarati, Gurmukhi, Kannada,
# Malayalam, Oriya, Tamil, Telugu, Meetei Mayek, Arabic, Dogra, Ol Chiki.
_SETU_SCRIPTS = """
41-5a 61-7a aa ba c0-d6 d8-f6 f8-2b8 2e0-2e4 1d00-1d25 1d2c-1d5c 1d62-1d65 1d6b-1d77 1d79-1dbe 1e00-1eff 2071
207f 2090-209c 212a-212b 2132 214e 2160-2188 2c60-2c7f a722-a787 a78b-a7cd a7d0-a7d1 a7d3 a7d5-a7dc a7f2-a7ff
ab30-ab5a ab5c-ab64 ab66-ab69 fb00-fb06 ff21-ff3a ff41-ff5a 10780-10785 10787-107b0 107b2-107ba 1df00-1df1e
1df25-1df2a
900-950 955-963 966-97f a8e0-a8ff 11b00-11b09
980-983 985-98c 98f-990 993-9a8 9aa-9b0 9b2 9b6-9b9 9bc-9c4 9c7-9c8 9cb-9ce 9d7 9dc-9dd 9df-9e3 9e6-9fe
a81-a83 a85-a8d a8f-a91 a93-aa8 aaa-ab0 ab2-ab3 ab5-ab9 abc-ac5 ac7-ac9 acb-acd ad0 ae0-ae3 ae6-af1 af9-aff
a01-a03 a05-a0a a0f-a10 a13-a28 a2a-a30 a32-a33 a35-a36 a38-a39 a3c a3e-a42 a47-a48 a4b-a4d a51 a59-a5c a5e
a66-a76
c80-c8c c8e-c90 c92-ca8 caa-cb3 cb5-cb9 cbc-cc4 cc6-cc8 cca-ccd cd5-cd6 cdd-cde ce0-ce3 ce6-cef cf1-cf3
d00-d0c d0e-d10 d12-d44 d46-d48 d4a-d4f d54-d63 d66-d7f
b01-b03 b05-b0c b0f-b10 b13-b28 b2a-b30 b32-b33 b35-b39 b3c-b44 b47-b48 b4b-b4d b55-b57 b5c-b5d b5f-b63
b66-b77
b82-b83 b85-b8a b8e-b90 b92-b95 b99-b9a b9c b9e-b9f ba3-ba4 ba8-baa bae-bb9 bbe-bc2 bc6-bc8 bca-bcd bd0 bd7
be6-bfa 11fc0-11ff1 11fff
c00-c0c c0e-c10 c12-c28 c2a-c39 c3c-c44 c46-c48 c4a-c4d c55-c56 c58-c5a c5d c60-c63 c66-c6f c77-c7f
aae0-aaf6 abc0-abed abf0-abf9
600-604 606-60b 60d-61a 61c-61e 620-63f 641-64a 656-66f 671-6dc 6de-6ff 750-77f 870-88e 890-891 897-8e1
8e3-8ff
fb50-fbc2 fbd3-fd3d fd40-fd8f fd92-fdc7 fdcf fdf0-fdff fe70-fe74 fe76-fefc
10e60-10e7e 10ec2-10ec4 10efc-10eff
1ee00-1ee03 1ee05-1ee1f 1ee21-1ee22 1ee24 1ee27 1ee29-1ee32 1ee34-1ee37 1ee39 1ee3b 1ee42 1ee47 1ee49 1ee4b
1ee4d-1ee4f 1ee51-1ee52 1ee54 1ee57 1ee59 1ee5b 1ee5d 1ee5f 1ee61-1ee62 1ee64 1ee67-1ee6a 1ee6c-1ee72
1ee74-1ee77 1ee79-1ee7c 1ee7e 1ee80-1ee89 1ee8b-1ee9b 1eea1-1eea3 1eea5-1eea9 1eeab-1eebb 1eef0-1eef1
11800-1183b
1c50-1c7f
"""


def ranges(text: str) -> list[tuple[int, int]]:
    """``"41-5a aa"`` as pairs of code points, both ends included."""
    bounds = (part.partition("-") for part in text.split())
    return [(int(first, 16), int(last or first, 16)) for first, _, last in bounds]


@character_class("data_juicer_special")
def _special() -> Table:
    """Data-Juicer's special characters: ASCII's punctuation, digits and white space, symbols, emoji."""
    ascii_ = string.punctuation + string.digits + string.whitespace
    return table_from(ascii_, *ranges(_SPECIAL), *ranges(_EMOJI))


@character_class("data_juicer_white_space")
def _white_spaces() -> Table:
    """What Data-Juicer makes a space: not the line break."""
    return table_from("", *ranges(_WHITE_SPACES))


@character_class("data_juicer_separator")
def _separator() -> Table:
    """What Data-Juicer splits words at."""
    return table_from(" \n\t")


@character_class("line_break")
def _line_break() -> Table:
    """Where ``str.splitlines`` breaks."""
    return table_from("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")


@character_class("setu_valid")
def _setu_valid() -> Table:
    """What Setu's symbol ratio does not count: its blocks, and the space and the line break."""
    return table_from(" \n", *ranges(_SETU_VALID))


@character_class("setu_letter")
def _setu_letter() -> Table:
    """What Setu's rule about numbers and punctuation does not count."""
    return table_from(" \n", *ranges(_SETU_LETTERS))


@character_class("unicode_punctuation")
def _unicode_punctuation() -> Table:
    r"""Unicode's categories P*, ``\p{P}``."""
    table = numpy.zeros(CODE_POINTS, dtype=bool)
    for code in range(0x20000):  # Beyond there is none.
        table[code] = unicodedata.category(chr(code))[0] == "P"
    return table


@character_class("setu_latin_indic")
def _latin_indic() -> Table:
    """Latin, the Indic scripts, Arabic, punctuation and white space."""
    return table_from("", *ranges(_SETU_SCRIPTS)) | table_of("unicode_punctuation") | table_of("white_space")
