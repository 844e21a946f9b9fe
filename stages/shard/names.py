"""By what name people are known: how two names are compared, and the file that gives names to numbers."""

import re
import unicodedata
from pathlib import Path

from stages.shard.errors import ShardError


def spellings(name: str) -> tuple[str, ...]:
    """A name as it is compared: without case, accents, vowel points, and all that is neither letter nor digit.

    More than one where some of its letters may be written as one of English's, or as two: Schröder is Schroder and
    Schroeder. None where nothing is left. Two names are the same if they have a spelling in common.
    """
    composed = unicodedata.normalize("NFKC", name).casefold()
    found = map(_letters, (composed, composed.translate(_TWO)))
    return tuple(dict.fromkeys(spelling for spelling in found if spelling))


_ONE = str.maketrans(
    {"æ": "ae", "ð": "d", "đ": "d", "ħ": "h", "ı": "i", "ł": "l", "ŋ": "n", "ø": "o", "œ": "oe", "þ": "th", "ŧ": "t"}
)
_TWO = str.maketrans({"ä": "ae", "å": "aa", "đ": "dj", "ö": "oe", "ø": "oe", "ü": "ue"})
_ACCENTS = re.compile("[\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670]")
"""Marks that a name may go without: of Latin, Greek and Cyrillic letters; the vowel points of Hebrew and Arabic. Those
of other scripts tell names apart, as the vowels of Devanagari do."""


def _letters(text: str) -> str:
    plain = _ACCENTS.sub("", unicodedata.normalize("NFKD", text)).translate(_ONE)
    return "".join(c for c in plain if unicodedata.category(c)[0] in "LMN")


def name_of(identity: str, called: dict[str, str]) -> tuple[str, ...]:
    """The spellings of the name of an identity of the training set; none where it has no name.

    What has no letter is a number that somebody gave: two sets that count from 0 do not share people for that. Unless
    `called`, of read_names, has it for a name.
    """
    if identity in called:
        return spellings(called[identity])
    return spellings(identity) if any(c.isalpha() for c in identity) else ()


def read_names(path: Path) -> dict[str, str]:
    """The names of identities that are numbers, `<identity> <name>` a line; a tab, if there is one, separates them.

    Raises:
        ShardError: there is no such file, a line has no name, or two give an identity different ones.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, read_lines(path, "shard.clean.names")), 1):
        if not line or line.startswith("#"):
            continue
        identity, *name = (part.strip() for part in line.split("\t" if "\t" in line else None, maxsplit=1))
        if not name:
            raise ShardError(f"{path}: line {number}: expected `<identity> <name>`, not {line!r}")
        if names.setdefault(identity, name[0]) != name[0]:
            raise ShardError(
                f"{path}: line {number}: {identity!r} would be {name[0]!r}, but is {names[identity]!r} by an earlier "
                "line; keep one of them, or put a tab behind each identity if they contain spaces"
            )
    return names


def check_names(called: dict[str, str], identities: list[str], origin: str) -> None:
    """Refuse names of another set, or of identities written otherwise; names of a larger set will do."""
    known = set(identities)
    for identity in identities:
        first, _, rest = identity.partition(" ")
        if rest and first not in known and f"{called.get(first, '')} ".startswith(f"{rest.strip()} "):
            raise ShardError(
                f"{origin}: {first!r} is called {called[first]!r}, but the training set has {identity!r}; put a tab "
                "behind an identity that contains spaces"
            )
    if called and called.keys().isdisjoint(known):
        raise ShardError(
            f"{origin}: the training set has none of its identities, such as {next(iter(called))!r}; the set's are "
            f"written as {identities[0]!r}. Set shard.clean.names in params.yaml to this set's list, or empty the file"
        )


def read_lines(path: Path, key: str) -> list[str]:
    """The lines of a text file that people write, UTF-8.

    Args:
        key: of params.yaml, which names the file.

    Raises:
        ShardError: there is no such file, or it is no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()  # with or without the mark that Windows puts first
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such file, though {key} in params.yaml names it") from error
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: not text in UTF-8: {error}") from error
