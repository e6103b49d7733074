"""librdkafka's settings as an operator gives them: from a properties file, and with the secret ones never shown.

# as for Java's clients, with librdkafka's names
security.protocol=SASL_SSL
sasl.mechanism=SCRAM-SHA-512
sasl.username=bellwether
sasl.password=...
ssl.ca.location=/etc/ssl/shop-ca.pem
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

REGISTRY_URL: Final = "schema.registry.url"  # ours to use, not librdkafka's
SHOWN: Final = "***"  # in place of a secret

BACKSLASH, NEWLINE = "\\", "\n"
_ESCAPED: Final = {"\\": BACKSLASH, "n": NEWLINE}
_SECRET: Final = re.compile(
    r"(^|\.)(password|secret|passphrase|jaas\.config|user\.info|key\.pem|key)$|oauthbearer\.config$"
)
_USER_OF_URL: Final = re.compile(r"(?<=://)[^/\s@]+@")
_JAVA_ONLY: Final = {
    "sasl.jaas.config": "sasl.username and sasl.password",
    "ssl.truststore.location": "ssl.ca.location, a PEM file",
    "ssl.truststore.password": "ssl.ca.location, a PEM file",
    "ssl.truststore.type": "ssl.ca.location, a PEM file",
    "ssl.truststore.certificates": "ssl.ca.pem",
    "ssl.keystore.certificate.chain": "ssl.certificate.pem",
    "ssl.keystore.key": "ssl.key.pem",
    "ssl.keystore.type": "ssl.keystore.location (PKCS#12), or ssl.certificate.location and ssl.key.location (PEM)",
}


def read_settings(path: str | Path) -> dict[str, str]:
    """The settings in a properties file: `key=value` or `key: value`, `#` or `!` begins a comment.

    A line that ends in a backslash goes on in the next; in a value `\\n` is a new line, and `\\\\` a backslash.
    Raises: OSError; ValueError naming file, line and key, never a value.
    """
    settings: dict[str, str] = {}
    for number, line in _logical_lines(Path(path).read_text(encoding="utf-8").splitlines()):
        found = re.match(r"([\w.\-]+)\s*[=:]\s*(.*)$", line)
        if found is None:
            raise ValueError(f"{path} line {number} is no `key=value`")
        key, value = found.groups()
        if key in _JAVA_ONLY:
            raise ValueError(f"{path} line {number}: {key} is for Java's clients only; use {_JAVA_ONLY[key]}")
        if key in settings:
            raise ValueError(f"{path} line {number}: {key} is there twice")
        settings[key] = re.sub(r"\\([\\n])", lambda escaped: _ESCAPED[escaped[1]], value)
    return settings


def write_settings(path: Path, settings: Mapping[str, str]) -> None:
    """A new file for `read_settings`, which nobody but us can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        for key, value in settings.items():
            file.write(f"{key}={value.replace(BACKSLASH, 2 * BACKSLASH).replace(NEWLINE, f'{BACKSLASH}n')}\n")


def _logical_lines(lines: Iterable[str]) -> Iterable[tuple[int, str]]:
    """(number of the first line, text) of each setting."""
    began, text = 0, ""
    for number, line in enumerate(lines, 1):
        part = line.strip()
        if not text and (not part or part[0] in "#!"):
            continue
        began = began or number
        goes_on = (len(part) - len(part.rstrip(BACKSLASH))) % 2 == 1
        text += part[:-1] if goes_on else part
        if not goes_on:
            yield began, text
            began, text = 0, ""
    if text:
        yield began, text


def is_secret(key: str) -> bool:
    """Whether the setting's value must not be shown.

    >>> [is_secret(key) for key in ("sasl.password", "ssl.key.pem", "ssl.key.location", "sasl.username")]
    [True, True, False, False]
    """
    return _SECRET.search(key) is not None


class Mask:
    """Takes the values of secret settings out of texts, and whoever is named in a URL before its host."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        values = {value for key, value in settings.items() if is_secret(key) and value}
        # as they are, and line by line: an error may quote a part of a PEM
        parts = {line for value in values for line in value.splitlines() if line} | values
        # a secret of two letters would take every text apart
        self._secrets = sorted((part for part in parts if len(part) > 2), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """The text with *** in place of each.

        >>> Mask({"sasl.password": "hunter2"})("refused: hunter2 at https://me:pw@registry:8081/x")
        'refused: *** at https://***@registry:8081/x'
        """
        for secret in self._secrets:
            text = text.replace(secret, SHOWN)
        return _USER_OF_URL.sub(f"{SHOWN}@", text)
