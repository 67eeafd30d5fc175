"""Links that carry their own permission."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from urllib.parse import parse_qs, quote, urlencode

_PASS_SECONDS = 3600


class Passes:
    """Links that open a report without a header, since a browser's link carries none: signed, for an hour."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)  # of this process: a restart ends every link

    def link(self, path: str) -> str:
        """The address of ``path`` with a pass."""
        until = str(int(time.time()) + _PASS_SECONDS)
        return f"{quote(path)}?{urlencode({'until': until, 'pass': self._sign(path, until)})}"

    def holds(self, path: str, query: bytes) -> bool:
        """Whether the pass in ``query`` is one for ``path`` and still holds."""
        given = parse_qs(query.decode("latin-1"))
        until, signature = given.get("until", [""])[0], given.get("pass", [""])[0]
        if not until.isdigit() or not signature.isascii() or int(until) < time.time():
            return False
        return hmac.compare_digest(signature, self._sign(path, until))

    def _sign(self, path: str, until: str) -> str:
        return hmac.new(self._secret, f"{until} {path}".encode(), hashlib.sha256).hexdigest()
