"""The bytes of a file, inflated where it is compressed: streamed, checked, never more held than was asked for."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from medseg_diff.errors import UserError

CHUNK = 1 << 20
GZIP = b"\x1f\x8b"
COPY_AGAIN = "The file was damaged on its way: copy, download or export it again."


class Payload:
    """Reads on from where `file` stands. Checksums and lengths of compressed data count as checked after `rest`.

    Attributes:
        compressed: the data are a gzip (or, if told so, zlib) stream; several members in a row read as one.
        junk: something that belongs to no stream follows the last one.

    """

    def __init__(self, path: Path, file: BinaryIO, compressed: bool | None = None) -> None:
        start = file.read(2)
        file.seek(-len(start), 1)
        self.compressed = start == GZIP if compressed is None else compressed
        self.junk = False
        self._path, self._file = path, file
        self._pieces = self._inflate() if self.compressed else iter(lambda: file.read(CHUNK), b"")
        self._ahead = bytearray()

    def read(self, count: int) -> bytearray:
        """The next `count` bytes, fewer only at the end."""
        while len(self._ahead) < count and (piece := next(self._pieces, None)) is not None:
            self._ahead += piece
        taken, self._ahead = self._ahead, self._ahead[count:]
        del taken[count:]
        return taken

    def rest(self, limit: int) -> int:
        """How many bytes are left, counted and dropped; stops early beyond `limit`."""
        count, self._ahead = len(self._ahead), bytearray()
        while count <= limit and (piece := next(self._pieces, None)) is not None:
            count += len(piece)
        return count

    def _inflate(self) -> Iterator[bytes]:
        raw, first = self._file.read(CHUNK), True
        while first or raw.startswith(GZIP):
            first, member = False, zlib.decompressobj(wbits=47)  # 47: gzip or zlib, by its header
            while not member.eof:
                if not raw:
                    raise UserError(self._path, "the compressed data end too early", COPY_AGAIN)
                try:
                    yield member.decompress(raw, CHUNK)
                except zlib.error as error:
                    raise UserError(self._path, f"the compressed data are damaged ({error})", COPY_AGAIN) from error
                raw = member.unconsumed_tail or (b"" if member.eof else self._file.read(CHUNK))
            raw = member.unused_data + self._file.read(CHUNK)
        self.junk = bool(raw.strip(b"\0"))
