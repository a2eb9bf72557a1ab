"""Archives: the same data set as from the unpacked folder, and nothing that an archive can do to a run."""

import csv
import gzip
import os
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
from synthetic_dicom import body, write_series, write_slice

from dinoct.data.archive import list_members
from dinoct.data.index import SliceIndex
from dinoct.data.pipeline import PrepareError, PrepareOptions, explain, prepare_dataset
from dinoct.data.privacy import write_salt

SALT = bytes(range(32))


@pytest.fixture
def folder(tmp_path):
    for i, patient in enumerate("AB"):
        write_series(tmp_path / "plain" / patient, 3, patient=patient, seed=10 * i)
    (tmp_path / "plain" / "LICENSE").write_text("CC BY")
    return tmp_path / "plain"


def pack(folder: Path, path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as archive:
            for file in files:
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, str(file.relative_to(folder)))
    return path


def prepare(source, root, workers=0, **options):
    if not (root / "_private").exists():
        write_salt(root, SALT)
    return prepare_dataset([source], root, PrepareOptions(workers, **options))


def reasons(root):
    with open(root / "_index" / "rejects.csv", newline="") as handle:
        return {Path(explain(root, row["file_id"])["path"]).name: row["reason"] for row in csv.DictReader(handle)}


@pytest.mark.parametrize(("name", "method"), [("a.zip", 8), ("a.ZIP", 0), ("a.tar", 0), ("in/a.tar", 0)])
def test_an_archive_gives_the_same_slices_as_its_folder(tmp_path, folder, name, method):
    plain = SliceIndex.load(prepare(folder, tmp_path / "one").index_csv)
    (tmp_path / "in").mkdir()
    path = pack(folder, tmp_path / name.lower(), method).rename(tmp_path / name)
    report = prepare(tmp_path / "in" if "/" in name else path, tmp_path / "two", workers=int(method == 8))
    packed = SliceIndex.load(report.index_csv)
    assert packed.content_hash() == plain.content_hash()
    assert (report.files_seen, report.files_with_slices) == (7, 6)
    assert reasons(tmp_path / "two") == {"LICENSE": "not a DICOM file"}
    assert explain(tmp_path / "two", str(packed.slice_id[0]))["path"].startswith(f"{path.resolve()}/")
    assert not [file for file in (tmp_path / "two").rglob("*") if b"MAKER" in file.name.encode()]


def test_a_second_run_reads_only_what_is_new(tmp_path, folder):
    path, root = pack(folder, tmp_path / "a.zip"), tmp_path / "root"
    assert prepare(path, root).slices_new == 6
    again = prepare(path, root)
    assert (again.slices_new, again.bytes_in) == (0, 0)
    write_series(folder / "C", 2, patient="C", seed=50)
    os.utime(pack(folder, path), ns=(1, 1))
    assert prepare(path, root).slices_written == 8
    for file in (folder / "A").iterdir():
        file.unlink()
    os.utime(pack(folder, path), ns=(2, 2))
    assert prepare(path, root).slices_written == 5  # what went from the archive goes from the data set


def test_members_that_hang_are_rows_of_their_own(tmp_path, folder, monkeypatch):
    from synthetic_dicom import scan_misbehaving

    from dinoct.data import jobs

    write_slice(folder / "A" / "hang", body(3), z=100.0, PatientID="A")
    path = pack(folder, tmp_path / "a.tar")
    monkeypatch.setattr(jobs, "scan_files", scan_misbehaving)
    report = prepare(path, tmp_path / "root", workers=1, file_timeout_s=2.0)
    assert report.slices_written == 6
    assert reasons(tmp_path / "root")["hang"] == "took longer than 2 s"


def test_a_bomb_ends_at_its_declared_size_and_at_the_memory_limit(tmp_path, folder):
    good = next(file for file in (folder / "A").iterdir())
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, patient in enumerate("AB"):
            archive.write(folder / patient / "0000", f"{patient}{i}")
        with archive.open("bomb", "w", force_zip64=True) as member:  # 1 GiB behind a header, in a megabyte
            head = good.read_bytes()
            pixels = head.index(b"\xe0\x7f\x10\x00")
            member.write(head[:pixels] + b"\x0b\x00\x0b\x00OB\0\0" + (2**30 - 2**20).to_bytes(4, "little"))
            for _ in range(64):
                member.write(bytes(2**24))
    report = prepare(tmp_path / "a.zip", tmp_path / "root", workers=1, memory_mb=256, max_reject_fraction=0.5)
    assert report.slices_written == 2
    assert reasons(tmp_path / "root")["bomb"] in ("out of memory", "cannot be read (MemoryError)")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    place = data.index(b"PK\x01\x02")  # the first entry of the central directory: a smaller size than the truth
    data[place + 24 : place + 28] = (5000).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(PrepareError):
        prepare(tmp_path / "a.zip", tmp_path / "root", workers=1, memory_mb=256, max_reject_fraction=0.0)
    assert reasons(tmp_path / "root")["A0"] in (
        "file is cut: pixel data shorter than it says",
        "larger than its archive says",
    )


def test_damage_is_named_and_takes_only_what_it_hits(tmp_path, folder):
    path, root = pack(folder, tmp_path / "a.zip"), tmp_path / "root"
    members = dict(list_members(os.fsencode(path)))
    hit = members[b"A/0001"]
    data = bytearray(path.read_bytes())
    data[hit.offset + 30 + 6 + hit.packed // 2] ^= 0x40
    path.write_bytes(data)
    assert prepare(path, root).slices_written == 5
    assert reasons(root)["0001"] in ("damaged in its archive (checksum)", "damaged in its archive")
    whole = pack(folder, tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 512 * 20])
    with pytest.raises(PrepareError):
        prepare(tmp_path / "cut.tar", tmp_path / "tar", max_reject_fraction=1.0)
    found = reasons(tmp_path / "tar")
    assert found["cut.tar"] == "the archive is damaged or cut: files are missing"
    junk = tmp_path / "junk" / "x.zip"
    junk.parent.mkdir()
    junk.write_bytes(b"PK\x03\x04 but no archive")
    with pytest.raises(PrepareError, match="the archive is damaged or cut"):
        prepare(junk.parent, tmp_path / "junk_root")


def test_a_flipped_bit_anywhere_never_changes_pixels_silently(tmp_path, folder):
    path = pack(folder, tmp_path / "a.zip")
    good = set(SliceIndex.load(prepare(path, tmp_path / "good").index_csv).checksum.tolist())
    data, rng = path.read_bytes(), random.Random(0)
    for i in range(12):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        root = tmp_path / f"bad{i}"
        try:
            prepare(path, root, max_reject_fraction=1.0)
        except PrepareError:
            continue
        assert set(SliceIndex.load(root / "_index" / "index.csv").checksum.tolist()) <= good


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_cannot_be_read_says_what_to_do(tmp_path, folder):
    tar = pack(folder, tmp_path / "a.tar")
    source = tmp_path / "in"
    source.mkdir()
    (source / "scans.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    with zipfile.ZipFile(source / "nested.zip", "w") as archive:
        archive.write(pack(folder, tmp_path / "inner.zip"), "inner.zip")
        archive.writestr(zipfile.ZipInfo("bz"), b"x", compress_type=zipfile.ZIP_BZIP2)
        for _ in range(2):  # two members of one name are two files
            archive.writestr("../../evil\0/notes", "x")
    write_series(source / "A", 2, patient="A")
    write_series(source / "B", 2, patient="B")
    report = prepare(source, tmp_path / "root", max_reject_fraction=0.9)
    assert report.files_seen == 4 + 1 + 4
    found = reasons(tmp_path / "root")
    assert "decompress it (gunzip) and give the .tar" in found["scans.tar.gz"]
    assert found["inner.zip"] == "an archive inside an archive is not read: unpack it"
    assert "neither stored nor deflated" in found["bz"]
    assert not (tmp_path.parent / "evil").exists()
    with pytest.raises(PrepareError, match="decompress it"):
        prepare(source / "scans.tar.gz", tmp_path / "other")
