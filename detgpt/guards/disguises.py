"""What a text says behind a disguise: base64, leetspeak, spaced-out letters, odd alphabets.

A reasoner may see through these, so a guard must too. Only such disguises are read as leave ordinary words as they are;
ciphers that turn every text into another (rot13, Morse) are left out.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata

LAYERS = 3  # of base64 within base64
_BASE64 = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{12,}={0,2}")
_SPACED = re.compile(r"(?<!\w)(?:[^\W\d_][ .\-*_]){3,}[^\W\d_](?!\w)")  # four single letters or more
_WORD = re.compile(r"[\w@$!|+]*[^\W\d_][\w@$!|+]*")  # with a letter in it
_LEET = str.maketrans("013457@$!|+", "oieastasiit")


def undisguised(text: str) -> str:
    """`text` with its disguises taken off; a text without any comes back as it is."""
    shown = "".join(letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter) != "Cf")
    for _ in range(LAYERS):
        decoded = _BASE64.sub(_decoded, shown)
        if decoded == shown:
            break
        shown = decoded
    shown = _SPACED.sub(lambda run: re.sub(r"[ .\-*_]", "", run[0]), shown)
    return _WORD.sub(_letters, shown)


def _decoded(run: re.Match[str]) -> str:
    """What a run of base64 says; itself where that is no text."""
    code = run[0].rstrip("=").replace("-", "+").replace("_", "/")
    try:
        text = base64.b64decode(code + "=" * (-len(code) % 4), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return run[0]
    return text if all(letter.isprintable() or letter.isspace() for letter in text) else run[0]


def _letters(word: re.Match[str]) -> str:
    """A word with digits and signs among its letters; marks at its end are punctuation, and "B12" is no word."""
    core = word[0].rstrip("!|+")
    if len(core) < 3 or 2 * sum(letter.isalpha() for letter in core) < len(core):
        return word[0]
    return core.translate(_LEET) + word[0][len(core) :]
