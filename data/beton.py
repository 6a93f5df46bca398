"""The .beton file format (FFCV 1.0, version 2): checking, reading and writing, without importing ffcv.

Layout: header | field descriptors | metadata, one row a sample | data region in pages | allocation table.
FFCV's own reader trusts all of it: a file cut short or damaged is read as if nothing were wrong. Here a file is checked
before it is used, and a file that is being written never has its final name.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
FIELD_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE, 3: np.dtype([("ptr", "<u8"), ("size", "<u8")])}
INT_FIELD, IMAGE_FIELD = 1, 2
JPG, RAW = 0, 1
MIN_PAGE_SIZE = 1 << 21
MAX_SIDE = 65535  # px, what the format can say


class EncodedImage(NamedTuple):
    mode: int  # JPG or RAW
    width: int
    height: int
    data: bytes


@dataclass(frozen=True)
class Beton:
    """A checked file: its tables in memory, its images in a read-only memory map."""

    path: Path
    images: np.ndarray  # (N,) IMAGE
    labels: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) uint64, bytes of each stored image
    data_start: int  # first byte of the data region
    data_end: int  # where the allocation table begins
    index_hash: str  # of everything outside the data region

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, index: int) -> EncodedImage:
        row = self.images[index]
        start = int(row["data_ptr"])
        content = self._map[start : start + int(self.sizes[index])]
        return EncodedImage(int(row["mode"]), int(row["width"]), int(row["height"]), content.tobytes())

    @property
    def _map(self) -> np.ndarray:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def data_hash(self) -> str:
        """XXH3 of the data region: reads the whole file."""
        digest = xxhash.xxh3_64()
        with open(self.path, "rb") as file:
            file.seek(self.data_start)
            left = self.data_end - self.data_start
            while left:
                block = file.read(min(left, 1 << 24))
                if not block:
                    raise ValueError(f"{self.path} became shorter while it was read")
                digest.update(block)
                left -= len(block)
        return digest.hexdigest()


def open_beton(path: str | Path, *, image_field: str = "image", label_field: str = "label") -> Beton:
    """Read the tables of a .beton and check that every one of them lies where it says.

    Raises ValueError, naming what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path} is not there; write it with scripts/prepare_data.py, or read class folders with data=folder"
        )
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = _read(file, HEADER, 1, size, path)[0]
        if header["version"] != VERSION:
            raise ValueError(f"{path} is not a .beton file of version {VERSION} (found {header['version']})")
        if header["alloc_table_ptr"] == 0:
            raise ValueError(f"{path} was never finished: its writing was interrupted; write it again")
        fields = _read(file, FIELD, int(header["num_fields"]), size, path)
        names = [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"]]
        unknown = [name for name, kind in zip(names, fields["type_id"]) if int(kind) not in FIELD_TYPES]
        if unknown:
            raise ValueError(f"{path} has fields of a kind that is not supported: {', '.join(unknown)}")
        for name, kind in ((image_field, IMAGE_FIELD), (label_field, INT_FIELD)):
            if name not in names or fields["type_id"][names.index(name)] != kind:
                raise ValueError(f"{path} has no field {name!r} of the right kind; it has {', '.join(names) or 'none'}")
        row_type = np.dtype([("", FIELD_TYPES[int(kind)]) for kind in fields["type_id"]], align=True)
        rows = _read(file, row_type, int(header["num_samples"]), size, path)
        tables_end = file.tell()
        table_start = int(header["alloc_table_ptr"])
        if table_start > size or (size - table_start) % ALLOCATION.itemsize:
            raise ValueError(_cut(path, size, "its allocation table is cut"))
        file.seek(table_start)
        table = _read(file, ALLOCATION, (size - table_start) // ALLOCATION.itemsize, size, path)
        file.seek(0)
        digest = xxhash.xxh3_64(file.read(tables_end))
        digest.update(table.tobytes())
    images = rows[f"f{names.index(image_field)}"]
    variable = sum(int(kind) in (2, 3) for kind in fields["type_id"])
    if len(table) != variable * len(rows):
        raise ValueError(_cut(path, size, f"it lists {len(table)} stored values for {len(rows)} samples"))
    sizes = _stored_sizes(path, images, table, tables_end, table_start)
    return Beton(
        path=path,
        images=images,
        labels=np.ascontiguousarray(rows[f"f{names.index(label_field)}"]),
        sizes=sizes,
        data_start=int(table["ptr"].min()),
        data_end=table_start,
        index_hash=digest.hexdigest(),
    )


def _read(file, dtype: np.dtype, count: int, size: int, path: Path) -> np.ndarray:
    if count * dtype.itemsize > size - file.tell():
        raise ValueError(_cut(path, size, "it ends before its tables do"))
    return np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype, count=count)


def _cut(path: Path, size: int, what: str) -> str:
    advice = "copy it again, or write it again with scripts/prepare_data.py --force"
    return f"{path} ({size} bytes) is damaged: {what}; {advice}"


def _stored_sizes(path: Path, images: np.ndarray, table: np.ndarray, start: int, end: int) -> np.ndarray:
    """Bytes of each image, after checking that all of it is inside the data region."""
    size = path.stat().st_size
    table = table[np.argsort(table["ptr"], kind="stable")]
    where = np.searchsorted(table["ptr"], images["data_ptr"])
    if len(images) == 0:
        raise ValueError(f"{path} holds no samples")
    if (where >= len(table)).any() or (table["ptr"][where] != images["data_ptr"]).any():
        raise ValueError(_cut(path, size, "a sample points to bytes that no entry of the allocation table describes"))
    stored = table["size"][where]
    # Compared without adding first: a damaged 64-bit pointer would wrap around.
    if (table["ptr"] < start).any() or (table["ptr"] > end).any() or (table["size"] > end - table["ptr"]).any():
        raise ValueError(_cut(path, size, "a stored value lies outside the data region"))
    pixels = images["width"].astype(np.uint64) * images["height"].astype(np.uint64)
    if (images["mode"] > RAW).any() or (pixels == 0).any() or (stored == 0).any():
        raise ValueError(_cut(path, size, "a sample has no pixels, no bytes or an unknown storage mode"))
    if (stored[images["mode"] == RAW] != 3 * pixels[images["mode"] == RAW]).any():
        raise ValueError(_cut(path, size, "the size of an uncompressed image is not 3 x width x height"))
    return stored


class BetonWriter:
    """Writes images in the order in which they are added, so that equal input makes equal files.

    The file grows under a partial name of its own and gets its name in `publish`; `discard` removes it.
    """

    def __init__(self, path: str | Path, *, max_samples: int, page_size: int = MIN_PAGE_SIZE):
        if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1) or page_size >= 1 << 32:
            raise ValueError(f"page size {page_size} has to be a power of two from {MIN_PAGE_SIZE} to {1 << 31} bytes")
        self.path = Path(path)
        self.partial = partial_path(self.path)
        self.page_size = page_size
        self.rows = np.zeros(max_samples, dtype=np.dtype([("", IMAGE), ("", "<i8")], align=True))
        self.table = np.zeros(max_samples, dtype=ALLOCATION)
        self.count = 0
        self.data_hash = xxhash.xxh3_64()
        self.index_hash = ""
        tables = HEADER.itemsize + 2 * FIELD.itemsize + self.rows.nbytes
        self.page_start = -(-tables // page_size) * page_size
        self.page = bytearray()
        self.file = open(self.partial, "xb")  # noqa: SIM115 (closed by complete and discard)
        self.file.seek(self.page_start)

    def add(self, image: EncodedImage, label: int) -> None:
        """Raises ValueError for an image that does not fit into a page."""
        if len(image.data) > self.page_size:
            raise ValueError(
                f"an image of {image.width}x{image.height} px takes {len(image.data)} bytes, "
                f"more than a page of {self.page_size}; give --max-resolution, or --write-mode jpg"
            )
        if len(self.page) + len(image.data) > self.page_size:
            self._write_page()
        pointer = self.page_start + len(self.page)
        self.rows[self.count] = ((image.mode, image.width, image.height, pointer), label)
        self.table[self.count] = (self.count, pointer, len(image.data))
        self.page += image.data
        self.count += 1

    def _write_page(self) -> None:
        self.page += bytes(self.page_size - len(self.page))
        self.file.write(self.page)
        self.data_hash.update(self.page)
        self.page_start += self.page_size
        self.page = bytearray()

    def complete(self) -> int:
        """Write the tables and make all of it durable, still under the partial name; returns the size in bytes."""
        if self.page:
            self._write_page()
        table = self.table[: self.count].tobytes()
        self.file.write(table)
        header = np.array((VERSION, 2, self.page_size, self.count, self.page_start), dtype=HEADER)
        fields = np.zeros(2, dtype=FIELD)
        for row, kind, name in zip(fields, (IMAGE_FIELD, INT_FIELD), (b"image", b"label")):
            row["type_id"] = kind
            row["name"][: len(name)] = np.frombuffer(name, dtype=np.uint8)
        index = header.tobytes() + fields.tobytes() + self.rows[: self.count].tobytes()
        self.index_hash = xxhash.xxh3_64(index + table).hexdigest()
        # The header makes the file valid, so it comes last.
        self.file.seek(HEADER.itemsize)
        self.file.write(index[HEADER.itemsize :])
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.seek(0)
        self.file.write(index[: HEADER.itemsize])
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.partial.stat().st_size

    def publish(self) -> None:
        """Give the completed file its name."""
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.file.close()


def partial_path(path: Path) -> Path:
    """A name to write `path` under, unlike any other writer's: of two, the last to publish wins whole."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{secrets.token_hex(4)}.partial")


def remove_leftovers(path: Path) -> None:
    """What killed writers of `path` and of its manifest left on this host: for one who knows that none is at work.

    A lock may not reach beyond its host, so the files of others stay.
    """
    host = f".{socket.gethostname()}-"
    for file in path.parent.glob("*.partial"):
        if file.name.startswith(f"{path.name}.") and host in file.name:
            file.unlink(missing_ok=True)
