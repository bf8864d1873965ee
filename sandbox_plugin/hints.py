"""What somebody probably meant who wrote a word that is not allowed. Pure."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'run'?)`, to stand behind the wrong word; empty if it is like none of these.

    Capitals, and `_` for `-`, count as no difference.
    """
    import difflib  # here: a program that is given what it knows need not wait for it

    plain = {_plain(each): each for each in allowed}
    near = difflib.get_close_matches(_plain(word), plain, n=1)
    return f" (did you mean {plain[near[0]]!r}?)" if near else ""


def not_one_of(word: str, allowed: Iterable[str]) -> str:
    """Why this word is refused: what is allowed, and which of these was perhaps meant."""
    words = list(allowed)
    return f"{word!r}{did_you_mean(word, words)} is not one of {', '.join(words)}"


def _plain(word: str) -> str:
    return word.lower().replace("_", "-")
