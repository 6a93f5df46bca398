"""Whether two data sets number their classes alike: the same number of classes says nothing about that."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest


def class_names(classes: Sequence[str]) -> list[str] | None:
    """The names of classes in the order of their numbers; None where the names are these numbers and say nothing."""
    if all(name.isdecimal() and int(name) == number for number, name in enumerate(classes)):
        return None
    return list(classes)


def first_difference(before: Sequence[str] | None, now: Sequence[str] | None) -> str:
    """`class 3 was 'cat', is 'dog'`; empty where they agree, and where one of them is not known."""
    if before is None or now is None:
        return ""
    for number, (one, other) in enumerate(zip_longest(before, now)):
        if one != other:
            return f"class {number} was {one!r}, is {other!r}"
    return ""


def renumbered(before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether a class of both has two numbers. Without that, differing names may be new names of the same classes."""
    number = {name: index for index, name in enumerate(before)}
    return any(number.get(name, index) != index for index, name in enumerate(now))
