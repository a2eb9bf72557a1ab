"""Reading a file of any kind that prepare takes: DICOM, a member of an archive, a volume."""

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dinoct.data import dicom, volumes
from dinoct.data.archive import Member, open_member
from dinoct.data.dicom import Rejected
from dinoct.data.header import Refused, SliceHeader
from dinoct.data.pixels import read_stored

_PICTURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, Zstandard
_COMPRESSED_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_RAW = (".raw", ".zraw")


class FileRef(NamedTuple):
    """A file as a worker is told of it; `path` of a member is its archive's with its name behind it."""

    path: str
    member: Member | None = None


class Source(NamedTuple):
    """One slice to decode. Size and time of the file guard against reading it with the header of another version."""

    path: str
    size: int
    mtime_ns: int
    header: SliceHeader
    member: Member | None = None


def read_headers(ref: FileRef) -> list[SliceHeader] | Rejected:
    """Read the headers of the slices of one file, or say why it gives none. Never raises for the content of a file."""
    if volumes.is_volume(ref.path):
        return _volume_headers(ref)
    found = dicom.read_headers(ref.path, ref.member)
    if found == dicom.NOT_DICOM:
        return _other(ref)
    return found


def _volume_headers(ref: FileRef) -> list[SliceHeader] | Rejected:
    try:
        if ref.member:
            raise Refused("a volume inside an archive is not read: unpack it")
        headers = volumes.read_headers(ref.path)
        for header in headers[:1]:
            dicom.h.check_axial(header.orientation)
        return headers
    except Refused as error:
        return Rejected("refused", str(error), True, retry=isinstance(error, volumes.NoSimpleItk))
    except Exception as error:
        retry = isinstance(error, OSError | MemoryError)
        return Rejected("refused", f"volume cannot be read ({type(error).__name__})", True, retry=retry)


def _other(ref: FileRef) -> Rejected:
    """Say what a file is that is not DICOM, where something follows from it for the user."""
    try:
        with dicom.opened(ref.path, ref.member) as handle:
            head = handle.read(512)
    except Refused:
        return dicom.NOT_DICOM
    except OSError:
        return dicom.NOT_DICOM._replace(retry=True)
    for magic, name in _PICTURES.items():
        if head.startswith(magic):
            reason = f"a picture ({name}) has no Hounsfield units: give the DICOM, MHD or NIfTI it was made from"
            return Rejected("not_dicom", reason, False)
    name = ref.path.lower()
    if head.startswith(_COMPRESSED) and name.endswith(_COMPRESSED_TAR):
        reason = "a compressed tar can only be read from its beginning: decompress it (gunzip) and give the .tar"
        return Rejected("refused", reason, True)
    if name.endswith((".zip", ".tar")):  # a good one is a folder and no file
        kind = "an archive inside an archive is not read: unpack it"
        return Rejected("refused", kind if ref.member else "the archive is damaged or cut: files are missing", True)
    if name.endswith(_RAW) and Path(ref.path).with_suffix(".mhd").is_file():
        return Rejected("not_dicom", "pixels of the .mhd of the same name", False)
    return dicom.NOT_DICOM


class OpenFiles:
    """Keeps the file of the last slice: one of many frames, and an archive, is opened once and not once per slice."""

    def __init__(self) -> None:
        self._path = self._real = ""
        self._handle: BinaryIO | None = None
        self._current: BinaryIO | np.ndarray | Refused | MemoryError | None = None

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    def stored(self, source: Source) -> np.ndarray:
        """Decode the stored values of a slice: int16 or uint16 [rows, cols]. Raises Refused, OSError, MemoryError."""
        if source.path != self._path:
            self._path, self._current = source.path, None  # the last volume goes before the next one comes
            try:
                self._current = self._open(source)
            except (Refused, MemoryError) as error:  # the same for all its slices
                self._current = error
            except OSError:
                self._path = ""
                raise
            except Exception as error:
                self._current = Refused(f"cannot be read ({type(error).__name__})")
        if isinstance(self._current, Exception):
            raise self._current
        if isinstance(self._current, np.ndarray):
            return self._current[source.header.frame]
        return read_stored(self._current, source.header)

    def _open(self, source: Source) -> BinaryIO | np.ndarray:
        real = source.member.archive if source.member else source.path
        if real != self._real:
            self._close()
            self._handle, self._real = open(real, "rb"), real  # noqa: SIM115  closed by __exit__
        state = os.fstat(self._handle.fileno())
        if source.member:
            self._require(state.st_mtime_ns == source.mtime_ns)
            return open_member(self._handle, source.member, check=True)
        self._require(volumes.state(source.path, state) == (source.size, source.mtime_ns))
        return volumes.read_volume(source.path) if source.header.transfer_syntax == volumes.VOLUME else self._handle

    def _require(self, unchanged: bool) -> None:
        if not unchanged:
            raise Refused("changed while it was read")

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.close()
        self._handle, self._real = None, ""
