"""Zip and tar archives as folders: what is in them, and reading a member without unpacking anything to disk.

A member is known by where its bytes lie, so that any worker reads any member without a table of contents of its own.
That needs an archive in which one can jump: zip and plain tar. A compressed tar can only be read from its beginning and
is refused, with a sentence that says what to do.

No member is ever written under its name, so a name with ".." does no harm. A decompression bomb ends at the size that
the archive declares for the member, and this at `MAX_MEMBER_BYTES` and the memory limit of the worker.
"""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from dinoct.data.header import Refused

MAX_MEMBER_BYTES = 2**31 + 2**24  # the largest pixel data that the reader takes, and a header
_SUFFIXES = (b".zip", b".tar")
_CHUNK = 2**18
_RAW_DEFLATE = -15  # zlib's word for a stream without a header of its own


class Member(NamedTuple):
    """Where a member lies. `trouble` says why it cannot be read; `crc` is None in a tar, which has no checksums."""

    archive: str
    offset: int  # of its local header (zip) or of its bytes (tar)
    packed: int  # bytes in the archive
    size: int
    deflated: bool = False
    crc: int | None = None
    trouble: str = ""


class BadArchive(Exception):
    """The archive cannot be listed, or not to its end."""


def is_archive(path: bytes) -> bool:
    return path.lower().endswith(_SUFFIXES)


def list_members(path: bytes) -> Iterator[tuple[bytes, Member]]:
    """Yield (name, member) of every file of an archive; of two members of one name the later gets its place behind it.

    Raises BadArchive, possibly after some members, where the archive is damaged.
    """
    seen: set[bytes] = set()
    try:
        for name, member in (_zip_members if path.lower().endswith(b".zip") else _tar_members)(os.fsdecode(path)):
            key = name.lstrip("/").encode("utf-8", "surrogateescape")
            if key in seen:
                key += b"@%d" % member.offset
            seen.add(key)
            yield key, member
    except BadArchive:
        raise
    except Exception as error:  # zipfile and tarfile raise many kinds for damage
        raise BadArchive from error


def _zip_members(path: str) -> Iterator[tuple[str, Member]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            trouble = ""
            if info.flag_bits & 1:
                trouble = "encrypted member of an archive"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                trouble = "member of a zip archive that is neither stored nor deflated: pack it again"
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            member = Member(path, info.header_offset, info.compress_size, info.file_size, deflated, info.CRC, trouble)
            yield info.filename, member


def _tar_members(path: str) -> Iterator[tuple[str, Member]]:
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            archive.members = []  # it would keep them all
            if info.isfile():
                trouble = "sparse member of a tar archive" if info.issparse() else ""
                yield info.name, Member(path, info.offset_data, info.size, info.size, trouble=trouble)
        archive.fileobj.seek(archive.offset)
        if not archive.fileobj.read(1):  # a whole archive ends with a block of zeros
            raise BadArchive


def open_member(handle: BinaryIO, member: Member, *, check: bool = False) -> BinaryIO:
    """Return the bytes of a member of the archive that is open in `handle`, as a file to read and seek in.

    With `check` a zip member is read through to its end first and compared with its checksum. Raises Refused.
    """
    if member.trouble:
        raise Refused(member.trouble)
    if member.size > MAX_MEMBER_BYTES:
        raise Refused("absurd size: more than 2 GiB in a member of an archive")
    offset = member.offset if member.crc is None else _zip_data(handle, member.offset)
    if offset + member.packed > os.fstat(handle.fileno()).st_size:
        raise Refused("its archive is cut")
    reader = (_Inflating if member.deflated else _Window)(handle, offset, member)
    if check and member.crc is not None:
        reader.verify(member.crc)
    return reader


def _zip_data(handle: BinaryIO, offset: int) -> int:
    """Return where the data behind a local file header begins (APPNOTE.TXT 4.3.7)."""
    handle.seek(offset)
    head = handle.read(30)
    if len(head) < 30 or not head.startswith(b"PK\x03\x04"):
        raise Refused("its archive is damaged")
    return offset + 30 + sum(struct.unpack("<2H", head[26:30]))


class _Reader(io.RawIOBase):
    """Reading and seeking over `_bytes(start, stop)`."""

    def __init__(self, handle: BinaryIO, offset: int, member: Member):
        self._handle, self._offset, self._packed, self.size = handle, offset, member.packed, member.size
        self._place = 0

    def _bytes(self, start: int, stop: int) -> bytes | memoryview:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence])
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        stop = self.size if size is None or size < 0 else min(self.size, self._place + size)
        if stop <= self._place:
            return b""
        data = bytes(self._bytes(self._place, stop))
        self._place += len(data)
        return data

    def verify(self, crc: int) -> None:
        found = 0
        for start in range(0, self.size, _CHUNK):
            found = zlib.crc32(self._bytes(start, min(self.size, start + _CHUNK)), found)
        if found != crc:
            raise Refused("damaged in its archive (checksum)")


class _Window(_Reader):
    """A part of a file."""

    def _bytes(self, start: int, stop: int) -> bytes:
        self._handle.seek(self._offset + start)
        data = self._handle.read(stop - start)
        if len(data) != stop - start:
            raise Refused("its archive is cut")
        return data


class _Inflating(_Reader):
    """A deflated part of a file, inflated as far as somebody reads: a header costs its first kilobytes."""

    def __init__(self, handle: BinaryIO, offset: int, member: Member):
        super().__init__(handle, offset, member)
        self._inflate = zlib.decompressobj(_RAW_DEFLATE)
        self._taken = 0
        self._data = bytearray()

    def _bytes(self, start: int, stop: int) -> bytes:
        while len(self._data) < stop:
            self._more()
        return bytes(memoryview(self._data)[start:stop])

    def _more(self) -> None:
        """Inflate the next piece: never more than the declared size plus one byte, which is one too many."""
        packed = self._inflate.unconsumed_tail
        if not packed:
            self._handle.seek(self._offset + self._taken)
            packed = self._handle.read(min(_CHUNK, self._packed - self._taken))
            self._taken += len(packed)
        try:
            piece = self._inflate.decompress(packed, min(2**24, self.size + 1 - len(self._data)))
        except zlib.error:
            raise Refused("damaged in its archive") from None
        self._data += piece
        if len(self._data) > self.size:
            raise Refused("larger than its archive says")
        if not piece and (self._inflate.eof or not packed):
            raise Refused("shorter than its archive says")
