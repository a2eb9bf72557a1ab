"""Names out, keys in: salted hashes, the private folder, and CSV cells that no spreadsheet runs as a formula.

Patients, series, slices and file paths leave the reader only as keyed hashes. The key (a random salt) and the map back
to paths live in `ROOT/_private`, which only the owner can read. Without the salt a hash cannot be tested against a
guessed PatientID, which a plain hash would allow (there are few possible medical record numbers).
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinoct.console import console
from dinoct.errors import DinoctError
from dinoct.locking import NO_LOCKS, lock

SALT_BYTES = 32
KEY_PATTERN = re.compile(r"[0-9a-f]{16}")
_FORMULA_START = ("=", "+", "-", "@", "\t", "\r", "\n")
_UNPRINTABLE = re.compile(r"[^\w .,/()\[\]=+@:^-]")


def private_folder(root: Path) -> Path:
    """Create `ROOT/_private` with mode 0700 (or narrow an existing one) and return it."""
    folder = root / "_private"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep other processes from writing into `root`. Raises DinoctError where one is at it."""
    with os.fdopen(os.open(private_folder(root) / "lock", os.O_WRONLY | os.O_CREAT, 0o600), "w") as handle:
        try:
            if not lock(handle):
                console.print(f"WARNING: {NO_LOCKS % root}", markup=False)
        except BlockingIOError:
            raise DinoctError(f"another prepare is at work on {root}") from None
        yield


def load_or_create_salt(root: Path) -> bytes:
    """Return the salt of `root`, making a random one the first time. A salt that is already there is used as it is.

    Raises DinoctError where it is of another length, or gone from a root that has patients' keys already.
    """
    path = private_folder(root) / "salt"
    if not path.exists():
        if (root / "_index" / "index.csv").exists():
            raise DinoctError(
                f"{path} is gone, and {root} holds a data set made with it: put the copy of the salt there, or remove "
                "_index, _splits, _masks, store and _private to begin anew; each patient has another key then, so that "
                "no run of before can be judged there"
            )
        write_salt(root, secrets.token_bytes(SALT_BYTES))
    salt = path.read_bytes()
    if len(salt) != SALT_BYTES:
        raise DinoctError(f"the salt in {path.parent.name}/salt has {len(salt)} bytes, not {SALT_BYTES}: restore it")
    return salt


def write_salt(root: Path, salt: bytes) -> None:
    """Give `root` a salt of your own, so that two roots agree on every hash. Raises if another one is there."""
    if len(salt) != SALT_BYTES:
        raise DinoctError(f"a salt has {SALT_BYTES} bytes, not {len(salt)}")
    path = private_folder(root) / "salt"
    temporary = path.with_name(f".salt.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(salt)
        handle.flush()
        os.fsync(handle.fileno())
    try:
        os.link(temporary, path)  # atomic, and unlike a rename it never replaces a salt that hashes depend on
    except FileExistsError:
        if path.read_bytes() != salt:
            raise DinoctError("this root has another salt already: its hashes would no longer match") from None
    finally:
        temporary.unlink()


class Hasher:
    """Keyed BLAKE2b with one domain per kind of thing, so that a patient and a path of the same text differ."""

    def __init__(self, salt: bytes):
        self._salt = salt

    def key(self, domain: str, *parts: str) -> str:
        """Hash `parts` to 16 hex digits. Parts are length-prefixed: ("ab", "c") and ("a", "bc") differ."""
        digest = hashlib.blake2b(key=self._salt, person=domain.encode(), digest_size=8)
        for part in parts:
            data = part.encode("utf-8", "surrogateescape")  # file names may be any bytes
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    def patient(self, patient_id: str) -> str:
        return self.key("patient", patient_id.strip())


def csv_cell(text: str) -> str:
    """Make free text from a header safe in a CSV cell.

    Control and unusual characters go, the length is cut to 64, and a leading = + - @ is disarmed by an apostrophe
    (OWASP, "CSV Injection").
    """
    text = _UNPRINTABLE.sub("_", text.strip())[:64]
    return "'" + text if text.startswith(_FORMULA_START) else text
