"""Is a JPEG whole? Pillow decodes damaged ones without a word; libjpeg's warnings, read natively, tell."""

from __future__ import annotations

import ctypes
import logging
from functools import cache

from data.native_library import NativeUnavailable, load_library

logger = logging.getLogger(__name__)
REASONS = {1: "not a JPEG that can be decoded", 2: "damaged: JPEG data missing or invalid"}


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return load_library()
    except NativeUnavailable as error:
        logger.warning("damage inside JPEGs that Pillow decodes regardless cannot be noticed here: %s", error)
        return None


def jpeg_damage(content: bytes) -> str:
    """What is wrong with the bytes of an image; empty where nothing is, for other formats and without a compiler.

    Damage that leaves a valid stream (a flipped bit may) changes pixels unnoticed: only a checksum finds that.
    """
    if not content.startswith(b"\xff\xd8") or (library := _library()) is None:
        return ""
    buffer = ctypes.create_string_buffer(content, len(content))
    return REASONS.get(library.loader_decode_whole(ctypes.addressof(buffer), len(content)), "")
