"""Many file names in little memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np


class Names(Sequence[str]):
    """Many names in one buffer. Of a list, every forked worker that reads it gets a copy, page by page.

    It is the reference count in each string that is written: about 80 bytes a name, 100 MiB for ImageNet's.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self.content = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)  # (N + 1,) from 0 on

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        position = range(len(self))[index]
        return os.fsdecode(self.content[self.ends[position] : self.ends[position + 1]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)
