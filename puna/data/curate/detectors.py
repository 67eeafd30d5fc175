"""Names of the detectors of languages, for settings: their work is in :mod:`puna.data.curate.languages`."""

from typing import Literal

Detector = Literal["fasttext", "langid", "cld3", "script"]
