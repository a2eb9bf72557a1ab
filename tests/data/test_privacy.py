"""Keys, salt, private folder, CSV cells; and the canary: no identity outside `_private`."""

import csv
import sqlite3
import stat

import pytest
from synthetic_dicom import body, dataset, save, write_slice

from dinoct.config import TrackerConfig
from dinoct.data.pipeline import PrepareError, PrepareOptions, explain, prepare_dataset
from dinoct.data.privacy import Hasher, csv_cell, load_or_create_salt, write_salt
from dinoct.errors import DinoctError
from dinoct.tracking import JsonLines, Tracker, Wandb

CANARY = "Zq7Canary"


def test_keys_depend_on_salt_domain_and_parts():
    one, two = Hasher(b"a" * 32), Hasher(b"b" * 32)
    keys = [one.key("x", "ab", "c"), one.key("x", "a", "bc"), one.key("y", "ab", "c"), two.key("x", "ab", "c")]
    assert len(set(keys)) == 4
    assert all(len(key) == 16 and set(key) <= set("0123456789abcdef") for key in keys)
    assert one.patient(" P1 ") == one.patient("P1")


def test_the_salt_is_random_kept_and_never_replaced(tmp_path):
    salt = load_or_create_salt(tmp_path / "a")
    assert load_or_create_salt(tmp_path / "a") == salt
    assert load_or_create_salt(tmp_path / "b") != salt
    with pytest.raises(DinoctError, match="another salt"):
        write_salt(tmp_path / "a", b"x" * 32)
    write_salt(tmp_path / "c", salt)
    assert load_or_create_salt(tmp_path / "c") == salt
    (tmp_path / "a" / "_private" / "salt").write_bytes(b"short")
    with pytest.raises(DinoctError, match="32"):
        load_or_create_salt(tmp_path / "a")


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(A1)", "\t=1", "\n=1"])
def test_no_cell_begins_a_formula(text):
    assert csv_cell(text)[0] not in "=+-@\t\r\n"


def test_cells_keep_ordinary_kernels_and_lose_control_characters():
    assert csv_cell(" B30f ") == "B30f"
    assert csv_cell("GE MEDICAL SYSTEMS") == "GE MEDICAL SYSTEMS"
    assert csv_cell("a\x1b[31m\r\nb") == "a_[31m__b"
    assert len(csv_cell("x" * 1000)) == 64


def canary_tree(folder):
    """Good and bad files with the canary in every place that may hold a name."""
    for i in range(3):
        tags = {
            "PatientName": CANARY + "^Name",
            "PatientBirthDate": "19630412",
            "InstitutionName": CANARY + " Hospital",
            "StudyInstanceUID": "1.2.826.0.1.9999.1",
            "SeriesInstanceUID": "1.2.826.0.1.9999.2",
            "StudyDate": "20190417",
        }
        ds = dataset(z=float(i), PatientID=f"{CANARY}ID{i % 2}", **tags)
        ds.private_block(0x0099, CANARY, create=True).add_new(1, "LO", CANARY)
        save(ds, folder / f"{CANARY}_folder" / f"{CANARY}_{i}.dcm")
    # Where a reason, a cell or an exception might quote the header:
    write_slice(folder / f"{CANARY}_bad1", Modality=CANARY, PatientName=CANARY)
    write_slice(folder / f"{CANARY}_bad2", RescaleType=CANARY, PhotometricInterpretation=CANARY)
    path = write_slice(folder / f"{CANARY}_bad3", PixelSpacing=["0.123456789", "0.3"])
    path.write_bytes(path.read_bytes().replace(b"0.123456789", b"Zq7Canary00"))
    path = write_slice(folder / f"{CANARY}_bad4", PatientID=CANARY)
    path.write_bytes(path.read_bytes()[:700])
    (folder / f"{CANARY}.txt").write_text(CANARY)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_identity_outside_the_private_folder(tmp_path, workers, capfd):
    source, root = tmp_path / f"{CANARY}_source", tmp_path / "root"
    canary_tree(source)
    report = prepare_dataset([source], root, PrepareOptions(workers, max_reject_fraction=0.9))
    with pytest.raises(PrepareError) as caught:
        prepare_dataset([source], root, PrepareOptions(workers, max_reject_fraction=0.1))
    files = [path for path in root.rglob("*") if path.is_file() and "_private" not in path.parts]
    assert len(files) >= 6
    haystack = b"".join(path.read_bytes() + str(path.relative_to(root)).encode() for path in files)
    haystack += str(caught.value).encode() + repr(report.rejected).encode() + "".join(capfd.readouterr()).encode()
    for needle in (CANARY, "19630412", "20190417", "1.2.826.0.1.9999"):
        assert needle.encode() not in haystack, needle


def test_the_private_folder_is_closed_and_explains_keys(tmp_path):
    source, root = tmp_path / "in", tmp_path / "root"
    canary_tree(source)
    prepare_dataset([source], root, PrepareOptions(0, max_reject_fraction=0.9))
    private = root / "_private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    for path in private.iterdir():
        if path.name != "lock":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
    with open(root / "_index" / "index.csv", newline="") as handle:
        row = next(csv.DictReader(handle))
    for key, what in (("slice_id", "slice"), ("series", "series"), ("patient", "patient")):
        answer = explain(root, row[key])
        assert answer["what"] == what
        assert f"{CANARY}_folder" in str(answer)
    with open(root / "_index" / "rejects.csv", newline="") as handle:
        rejects = list(csv.DictReader(handle))
    answers = [explain(root, row["file_id"]) for row in rejects]
    assert [(a["kind"], a["reason"]) for a in answers] == [(row["kind"], row["reason"]) for row in rejects]
    assert {a["path"].rsplit("/", 1)[1] for a in answers} == {f"{CANARY}_bad{i}" for i in range(1, 5)} | {
        f"{CANARY}.txt"
    }
    with pytest.raises(DinoctError, match="not the key"):
        explain(root, "0" * 16)
    with pytest.raises(DinoctError, match="was not prepared here"):
        explain(tmp_path / "elsewhere", "0" * 16)


def test_a_patient_whose_link_was_deleted_leaves_nothing_either(tmp_path):
    source, root = tmp_path / "in", tmp_path / "root"
    source.mkdir()
    for patient in "ABC":
        write_slice(tmp_path / "lake" / f"folder_of_{patient}" / "slice", body(ord(patient)), PatientID=patient)
        (source / patient).symlink_to(tmp_path / "lake" / f"folder_of_{patient}")
    prepare_dataset([source], root, PrepareOptions(0))
    key = Hasher(load_or_create_salt(root)).patient("C")
    series = explain(root, key)["series"]
    (source / "C").unlink()
    report = prepare_dataset([source], root, PrepareOptions(0))
    assert (report.files_vanished, report.series_left) == (1, 1)
    for needle in (key, *series, "folder_of_C"):
        assert needle.encode() not in everything(root), needle
    for patient in "AB":
        (source / patient).unlink()
    with pytest.raises(PrepareError, match="had 2 files before and has none now"):
        prepare_dataset([source], root, PrepareOptions(0))


def test_a_catalog_of_an_earlier_version_learns_where_links_are(tmp_path):
    source, root = tmp_path / "in", tmp_path / "root"
    source.mkdir()
    for patient in "ABC":
        write_slice(tmp_path / "lake" / patient, body(ord(patient)), PatientID=patient)
        (source / patient).symlink_to(tmp_path / "lake" / patient)
    prepare_dataset([source], root, PrepareOptions(0))
    database = sqlite3.connect(root / "_private" / "catalog.sqlite")
    database.execute("ALTER TABLE files DROP COLUMN place")
    database.close()
    assert prepare_dataset([source], root, PrepareOptions(0)).slices_new == 0
    (source / "C").unlink()
    assert prepare_dataset([source], root, PrepareOptions(0)).slices_written == 2


def test_a_manufacturer_that_is_a_formula_is_disarmed_in_the_tables(tmp_path):
    for i in range(2):
        write_slice(tmp_path / "in" / str(i), PatientID=f"P{i}", Manufacturer="=HYPERLINK(1)", ConvolutionKernel="-B30")
    report = prepare_dataset([tmp_path / "in"], tmp_path / "root", PrepareOptions(0))
    for name in ("index.csv", "series.csv"):
        with open(report.index_csv.with_name(name), newline="") as handle:
            for row in csv.DictReader(handle):
                assert row["manufacturer"] == "'=HYPERLINK(1)"
                assert row["kernel"] == "'-B30"


def everything(root):
    return b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())


def test_header_values_enter_not_even_the_private_folder(tmp_path):
    for i in range(2):
        names = {"PatientName": CANARY, "PatientBirthDate": "19630412", "InstitutionName": CANARY, "StudyID": CANARY}
        uids = {"StudyInstanceUID": "1.2.826.0.1.9999.1", "SeriesInstanceUID": "1.2.826.0.1.9999.2"}
        write_slice(tmp_path / "in" / str(i), PatientID=f"{CANARY}{i}", SOPInstanceUID="1.2.9999.7", **names, **uids)
    prepare_dataset([tmp_path / "in"], tmp_path / "root", PrepareOptions(0))
    for needle in (CANARY, "19630412", "1.2.826.0.1.9999", "1.2.9999"):
        assert needle.encode() not in everything(tmp_path / "root"), needle


def test_a_deleted_patient_leaves_nothing_in_the_data_set(tmp_path):
    source, root = tmp_path / "in", tmp_path / "root"
    for patient in "ABC":
        write_slice(source / f"folder_of_{patient}" / "slice", body(ord(patient)), PatientID=patient)
    report = prepare_dataset([source], root, PrepareOptions(0))
    key = Hasher(load_or_create_salt(root)).patient("C")
    series = explain(root, key)["series"]
    assert key.encode() in report.split_manifest.read_bytes()
    (source / "folder_of_C" / "slice").unlink()
    prepare_dataset([source], root, PrepareOptions(0))
    for needle in (key, *series, "folder_of_C"):
        assert needle.encode() not in everything(root), needle
        assert not [path for path in root.rglob("*") if needle in path.name]


def test_pictures_of_slices_stay_here_unless_asked_for(tmp_path):
    class Service(Wandb):
        def __init__(self, asked):
            self.wants_images, self.sent = asked, []

        def images(self, step, pictures):
            self.sent.append(step)

    assert (TrackerConfig().images, TrackerConfig().wandb) == (False, "offline")
    for asked in (False, True):
        service = Service(asked)
        Tracker(JsonLines(tmp_path / "metrics.jsonl"), [service]).images(1, {"input": tmp_path / "input.png"})
        assert service.sent == [1] * asked
