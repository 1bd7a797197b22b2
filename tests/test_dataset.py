"""Which clips a command line names: FSDKaggle2019's layouts, any CSV, any folder."""

import errno
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import ROOT

import encodec_tokenizer
from encodec_tokenizer import (
    SAMPLE_DIR,
    Clip,
    Dataset,
    Settings,
    UserError,
    find_dataset,
    find_datasets,
    find_file,
    read_audio,
    read_clips,
)

pytestmark = pytest.mark.usefixtures("ready_made_codes")
META, AUDIO = "FSDKaggle2019.meta/", "FSDKaggle2019.audio_"
LAYOUTS = {  # where a table and its audio folder lie
    "Kaggle": ("train_curated.csv", "train_curated"),
    "Kaggle, renamed folder": ("train_curated.csv", "trn_curated"),
    "Kaggle, nested": ("freesound/train_curated.csv", "freesound/train_curated"),
    "Kaggle, folder in a folder": ("train_curated.csv", "train_curated/train_curated"),
    "Kaggle, test": ("sample_submission.csv", "test"),
    "Zenodo": (f"{META}train_curated_post_competition.csv", f"{AUDIO}train_curated"),
    "Zenodo, nested": (f"x/{META}train_curated_post_competition.csv", f"x/{AUDIO}train_curated"),
    "Zenodo, test": (f"{META}test_post_competition.csv", f"{AUDIO}test"),
}


def write_wav(path: Path, seconds: float = 0.1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(os.fsencode(path), np.zeros(round(seconds * 8_000)), 8_000)


def lay_out(root, csv_name, folder_name, text="fname,labels\na.wav,Bark\n"):
    (root / csv_name).parent.mkdir(parents=True, exist_ok=True)
    (root / csv_name).write_text(text, encoding="utf-8")
    write_wav(root / folder_name / "a.wav")


def cells(clips):
    """(name, labels) of every clip."""
    return [(clip.fname, clip.labels) for clip in clips]


def read(tmp_path, content, keep_extra=False, **options):
    """The names of the further columns of a CSV with this content, and its clips."""
    path = tmp_path / "clips.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if keep_extra:
        options |= {"metadata": path, "audio_dir": tmp_path}
    clips = read_clips(path, Settings(**options))
    return tuple(clips[0].extra), clips


# -------------------------------------------------------------------------------- FSDKaggle2019


@pytest.mark.parametrize("csv_name, folder_name", LAYOUTS.values(), ids=LAYOUTS)
def test_both_layouts_are_found(csv_name, folder_name, tmp_path):
    """Kaggle lists its test clips in the sample submission, without labels."""
    labels = "" if "submission" in csv_name else "Bark"
    text = "fname,Bark\na.wav,0\n" if not labels else "fname,labels,license\na.wav,Bark,CC0\n"
    lay_out(tmp_path, csv_name, folder_name, text)
    stem = "test" if folder_name.endswith("test") else "train_curated"
    (tmp_path / stem).mkdir(exist_ok=True)  # a folder of that name without clips is passed over
    dataset = find_dataset(Settings(input_dir=tmp_path), stem)
    assert (dataset.stem, dataset.clips[0].extra) == (stem, {})
    assert dataset.audio_dir == tmp_path / folder_name
    assert cells(dataset.clips) == [("a.wav", labels)]


def test_an_audio_folder_is_not_taken_from_the_other_layout(tmp_path):
    lay_out(tmp_path, "sample_submission.csv", "elsewhere")
    lay_out(tmp_path, "test_post_competition.csv", "FSDKaggle2019.audio_test")
    dataset = find_dataset(Settings(input_dir=tmp_path), "test")
    assert dataset.audio_dir.name == "FSDKaggle2019.audio_test"


def test_the_competition_whose_clips_are_there_is_taken(tmp_path):
    """Every competition of Kaggle has a sample_submission.csv, and often a folder of that name."""
    lay_out(tmp_path, "birds/sample_submission.csv", "birds/test", "row_id,target\na,1\n")
    (tmp_path / "birds/test/a.wav").rename(tmp_path / "birds/test/soundscape.wav")
    lay_out(tmp_path, "freesound/sample_submission.csv", "freesound/test", "fname,Bark\nb.wav,0\n")
    write_wav(tmp_path / "freesound/test/b.wav")
    lay_out(tmp_path, "whales/sample_submission.csv", "whales/test", "fname,x\nc.wav,0\n")
    dataset = find_dataset(Settings(input_dir=tmp_path), "test")
    assert dataset.audio_dir == tmp_path / "freesound/test"
    assert cells(dataset.clips) == [("b.wav", "")]


def test_a_gone_audio_folder_of_a_finished_run_is_no_error(tmp_path, run):
    csv_name, folder = LAYOUTS["Zenodo"]
    lay_out(tmp_path, csv_name, folder)
    flags = ["--input_dir", tmp_path, "--target_duration", "0.5"]
    assert run(*flags)[0] == 0
    shutil.rmtree(tmp_path / folder)
    status, out, err = run(*flags)
    assert status == 0 and "(0 encoded now, 1 already there)" in out
    assert "note: the files of 1 clip are gone; their codes are still there" in err
    with (tmp_path / csv_name).open("a") as table:
        table.write("b.wav,Slam\n")
    status, _, err = run(*flags)
    assert status == 2 and "The first: b.wav: no such file" in err


def test_the_bundled_sample_is_what_its_generator_makes(tmp_path):
    subprocess.run([sys.executable, ROOT / "tests" / "make_sample.py", tmp_path], check=True)
    assert (tmp_path / "sample.csv").read_text() == (SAMPLE_DIR / "sample.csv").read_text()
    made, stored = sorted(tmp_path.glob("*.wav")), sorted(SAMPLE_DIR.glob("*.wav"))
    assert [path.name for path in made] == [path.name for path in stored]
    assert sum(path.stat().st_size for path in stored) < 1.5e6
    for a, b in zip(made, stored):
        (x, rate), (y, kept_rate) = (soundfile.read(path, dtype="int16") for path in (a, b))
        assert rate == kept_rate and np.abs(x.astype(int) - y).max() <= 1


# --------------------------------------------------------------------------------------- any CSV


OURS = ["chunk", "num_chunks", "start_sec", "token_7", "tokens"]  # columns of the output


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "lists no clips"),
        (b" \n\n", "lists no clips"),
        (b"fname,labels\n", "lists no clips"),
        (b"fname,labels\n  \n", "lists no clips"),
        (
            b"file,labels\na.wav,Bark\n",
            "no column fname or filename or file_name, only file, labels. --fname_column names",
        ),
        (b"client\tpath\tlabel\n1\ta.wav\tx\n", "only client, path, label"),
        (b"fname,labels\na.wav,Bark\nb.wav,Walk,Slam\n", "line 3: 3 cells, and 2 in the header"),
        (b'fname,label,text\na.wav,x,"open\nb.wav,y,fine\n', "line 2: a quote is never closed"),
        ("fname,labels\na.wav,x\né.wav,Bark\n".encode("latin-1"), "line 3: not UTF-8"),
        (b"RIFF\x00\x00\xff\xfe", "not UTF-8"),
        (b"fname,labels,x,y,labels,x\na,dog,1,2,cat,3\n", "rename the columns labels, x: twice"),
        (b"fname,labels,fname\na.wav,dog,b.wav\n", "rename the columns fname: twice there"),
        (f"fname,{','.join(OURS)}\n{'a,' * 6}\n", f"rename the columns {', '.join(OURS)}: twice"),
        (b'"a","b"\n"1",x,y\n"2",x,y\n', "no column fname or filename or file_name, only , a, b"),
        (b'"fname","b"\n"x","1",y\n"z","2",y\n', "(R's row names: row.names = FALSE)"),
        (b"PK\3\4\x14\0\6\0[Content_Types].xml", "is a spreadsheet or a ZIP archive: save it as"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "is a spreadsheet or"),
        (b"\x1f\x8b\x08\0\x91A", "is compressed: save it as a CSV file in UTF-8"),
        (b"PAR1\x15\4", "is a Parquet or Arrow file"),
        (b'{"file_name": "a.wav", "label": "x"}\n', "is a JSON file"),
        ("\ufeff \n[\n{}]".encode(), "is a JSON file"),
        ("fname,labels\na.wav,x\n".encode("utf-16"), "is in UTF-16"),
        ("fname,labels\na.wav,x\n".encode("utf-16-le"), "is in UTF-16, or not text"),
        (b"\n<!DOCTYPE html>\n", "is a web page or an XML file"),
    ],
)
def test_a_table_that_cannot_be_read_says_why_and_where(content, says, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, content, keep_extra=True)
    assert says in str(error.value) and "clips.csv" in str(error.value)


ROWS = [("a.wav", "Bark"), ("b.wav", "Walk,Slam")]
TABLES = {  # all list ROWS
    "commas": 'fname,labels\na.wav,Bark\nb.wav,"Walk,Slam"\n',
    "semicolons": "fname;label;seconds\na.wav;Bark;1,5\nb.wav;Walk,Slam;2,5\n",
    "tabs": "filename\tlabel\na.wav\tBark\nb.wav\tWalk,Slam\n",
    "bars": "fname|label\na.wav|Bark\nb.wav|Walk,Slam\n",
    "Windows' line ends": 'fname,labels\r\na.wav,Bark\r\nb.wav,"Walk,Slam"\r\n',
    "a byte order mark": '\ufeff"fname","labels"\na.wav,Bark\nb.wav,"Walk,Slam"\n',
    "Hugging Face's name column": 'file_name,label\na.wav,Bark\nb.wav,"Walk,Slam"\n',
    "capitals": 'FILENAME,Category\na.wav,Bark\nb.wav,"Walk,Slam"\n',
    "pandas' index": ',fname,labels\n0,a.wav,Bark\n1,b.wav,"Walk,Slam"\n',
    "Excel's empty columns": 'fname,labels,,\na.wav,Bark,,\nb.wav,"Walk,Slam",,\n',
    "spaces and blank lines": 'fname, labels \n  \na.wav, Bark\n\nb.wav, "Walk,Slam"\n , ,\n',
    "quotes within cells": 'fname\tlabel\tt\na.wav\tBark\tsay "no"\nb.wav\tWalk,Slam\t5" disk\n',
    # Tables separated by tabs are commonly not quoted.
    "a stray quote": 'fname\tlabel\ttext\na.wav\tBark\t"Hi," he said\nb.wav\tWalk,Slam\tx\n',
    "two stray quotes": 'fname\tlabel\tt\na.wav\tBark\t"open\nb.wav\tWalk,Slam\tclose"\n',
    # The most frequent separator need not be the right one.
    "commas in the header": "fname;label;of (a, b, c)\na.wav;Bark;a\nb.wav;Walk,Slam;b\n",
    "Excel's first line": "sep=;\nfname;labels\na.wav;Bark\nb.wav;Walk,Slam\n",
    "marks twice": '\ufeff\ufefffname,labels\na.wav,Bark\nb.wav,"Walk,Slam"\n',
    "a mark before and behind Excel's line": "\ufeffsep=,\n\ufefffname,labels\n"
    'a.wav,Bark\nb.wav,"Walk,Slam"\n',
    "comments": '# cut\n\n#fname, text\nfname,labels\na.wav,Bark\n# left out\nb.wav,"Walk,Slam"\n',
    "a header that is a comment": '# fname,labels\na.wav,Bark\nb.wav,"Walk,Slam"\n',
    "a column called #": '#,fname,labels\n1,a.wav,Bark\n2,b.wav,"Walk,Slam"\n',
    "R's tabs": '"fname"\t"labels"\t"s"\n"a.wav"\t"Bark"\t0.5\n"b.wav"\t"Walk,Slam"\t1\n',
    "R's row names": '"fname" "labels"\n"1" "a.wav" "Bark"\n"3" "b.wav" "Walk,Slam"\n'.replace(
        " ", "\t"
    ),
    "R's row names, commas": '"fname","labels"\n"1","a.wav","Bark"\n"2","b.wav","Walk,Slam"\n',
    "Excel's tabs": 'fname\tlabels\tt\r\na.wav\tBark\t"12"" drum"\r\nb.wav\t"Walk,Slam"\t\r\n',
    "Excel's lines in a cell": 'fname\tlabel\tt\na.wav\tBark\t"x\ny"\nb.wav\tWalk,Slam\t\n',
    "a tab in a quoted cell": 'fname\tlabel\tt\na.wav\tBark\t"x\ty"\nb.wav\tWalk,Slam\t\n',
    "old Macintosh line ends": 'fname,labels\ra.wav,Bark\rb.wav,"Walk,Slam"\r',
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_a_table_is_read_as_people_have_it(text, tmp_path):
    assert cells(read(tmp_path, text)[1]) == ROWS


def test_unicode_numbers_quotes_spaces_and_long_cells_are_kept(tmp_path):
    text = 'fname,labels,,embedding\n"приве́т 鳥.wav",NA,,' + "1 " * 80_000
    text += '\n007,"a ""quoted"" label",,x\n a.wav, "Slam",,x\n'
    columns, clips = read(tmp_path, text, keep_extra=True)
    expected = [("приве́т 鳥.wav", "NA"), ("007", 'a "quoted" label'), (" a.wav", "Slam")]
    assert cells(clips) == expected
    assert columns == ("embedding",)
    assert [len(clip.extra["embedding"]) for clip in clips] == [159_999, 1, 1]


COLUMNS = "path,clip_id,Label,annotator 2,fname\na.wav,1,x,Bark,\nb.wav,2,y,Walk,\n"


def test_flags_choose_the_columns_of_a_table(tmp_path):
    chosen = {"fname_column": "path", "label_column": "Annotator 2"}
    assert cells(read(tmp_path, COLUMNS, **chosen)[1]) == [("a.wav", "Bark"), ("b.wav", "Walk")]
    assert cells(read(tmp_path, COLUMNS.replace(",", "\t"), **chosen)[1])[0] == ("a.wav", "Bark")
    assert cells(read(tmp_path, COLUMNS, fname_column="PATH")[1])[0] == ("a.wav", "x")
    with pytest.raises(UserError, match="rename the columns fname: "):
        read(tmp_path, COLUMNS, keep_extra=True, **chosen)
    for name in chosen:
        with pytest.raises(UserError, match="has no column title, only path, clip_id, Label"):
            read(tmp_path, COLUMNS, **{name: "title"})


@pytest.mark.parametrize(
    "rows, expected, note",
    [
        # Two stray quotes swallow the rows between them.
        ('a,"x\nb,y\nc,z"', [("a", "x\nb,y\nc,z")], "1 row of several lines (the first: a). If"),
        ("a,x\nb,y\na,x\na,z", [("a", "x"), ("b", "y"), ("a", "z")], "repeats 1 row; duplicates"),
    ],
)
def test_rows_that_look_wrong_are_told(rows, expected, note, tmp_path, capsys):
    assert cells(read(tmp_path, f"fname,labels\n{rows}\n")[1]) == expected
    assert note in capsys.readouterr().err


def test_max_samples_takes_the_first_rows(tmp_path):
    text = "fname,labels\nb.wav,1\na.wav,2\nc.wav,3\n"
    _, clips = read(tmp_path, text, max_samples=2)
    assert [clip.fname for clip in clips] == ["b.wav", "a.wav"]


def test_any_csv_of_names_is_tokenized_and_keeps_its_columns(tmp_path, run):
    write_wav(tmp_path / "audio" / "1-100032-A-0.wav", 3)
    (tmp_path / "mine.csv").write_text("filename,fold,category\n1-100032-A-0.wav,4,dog\n")
    flags = ["--metadata", tmp_path / "mine.csv", "--audio_dir", tmp_path / "audio"]
    assert run(*flags, "--aggregate", "none")[0] == 0
    table = pd.read_csv(tmp_path / "out" / "tokenized_mine.csv")
    columns = [*encodec_tokenizer.COLUMNS, "chunk", "start_sec", "fold", "token_0"]
    assert table.columns[: len(columns)].tolist() == columns
    rows = table[["fname", "labels", "chunk", "start_sec", "fold"]].to_numpy().tolist()
    assert rows == [["1-100032-A-0.wav", "dog", 0, 0, 4], ["1-100032-A-0.wav", "dog", 1, 1, 4]]
    assert (tmp_path / "out" / "summary_mine.txt").exists()


NO_CLIPS = {  # flags -> what is said
    "--input_dir nowhere": ["nowhere", "there is no train_curated.csv and no train_curated_post_"],
    "--input_dir tables": ["https://zenodo.org/record/3612637", "--dataset sample"],
    "--dataset sample": ["the sample comes with the repository"],
    "--metadata none.csv --audio_dir audio": ["none.csv: No such file"],
    "--audio_dir nowhere": ["there is no such folder"],
    "--audio_dir audio/a.wav": ["audio/a.wav is a file: name the folder it lies in"],
    "--audio_dir tables": ["there are no sound files below it"],
    "--metadata tables/a.csv --audio_dir audio/a.wav": ["audio/a.wav is a file"],
    "--metadata tables/b.csv --audio_dir audio": ["C:\\x\\b.wav: no such file"],
    "--metadata tables/c.csv --audio_dir audio": ["no file of 1 clip is in audio: is the folder"],
}


@pytest.mark.parametrize("flags", NO_CLIPS)
def test_a_command_that_finds_no_clip_says_why(flags, tmp_path, run, monkeypatch):
    """Before any weights are looked for, or anything is written."""
    write_wav(tmp_path / "audio" / "a.wav")
    (tmp_path / "tables").mkdir()
    for name, fname in {"a": "a.wav", "b": "C:\\x\\b.wav", "c": "c.wav"}.items():
        (tmp_path / "tables" / f"{name}.csv").write_text(f"fname\n{fname}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("encodec_tokenizer.SAMPLE_DIR", tmp_path / "sample")
    status, _, err = run(*flags.split())
    assert status == 2 and all(part in err for part in NO_CLIPS[flags])
    assert "UNTRAINED" not in err and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- any folder


def test_a_folder_alone_gives_every_sound_file_below_it(tmp_path, capsys):
    """Sorted by path, with names relative to it, labelled by the folder that each lies in."""
    names = ["b/c/2.flac", "b/1.wav", "a.wav", "a/Z.WAV", "a/9.mp3", "a/10.ogg", "a/x.sph"]
    names += ["a/x.wave", "a/x.mp2", "a/E: low.m4a"]
    others = ["a/notes.txt", "clips.csv", "x.txt", "a/.hidden.wav", ".Trash/b.wav", "a/._10.ogg"]
    for name in [*others, *names]:
        (tmp_path / "birds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "birds" / name).touch()
    (tmp_path / "birds" / "folder.wav").mkdir()
    (dataset,) = find_datasets(Settings(audio_dir=tmp_path / "birds"))
    assert (dataset.stem, dataset.audio_dir) == ("birds", tmp_path / "birds")
    expected = [("a/10.ogg", "a"), ("a/9.mp3", "a"), ("a/E: low.m4a", "a"), ("a/Z.WAV", "a")]
    expected += [("a/x.mp2", "a"), ("a/x.sph", "a"), ("a/x.wave", "a"), ("a.wav", "birds")]
    assert cells(dataset.clips) == [*expected, ("b/1.wav", "b"), ("b/c/2.flac", "c")]
    note = "left out 3 files not known as sound: .csv, .txt"
    assert note in capsys.readouterr().err
    (first,) = find_datasets(Settings(audio_dir=tmp_path / "birds", max_samples=2))
    assert cells(first.clips) == cells(dataset.clips)[:2]


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    for kind in ("dog", "cat"):
        write_wav(tmp_path / "elsewhere" / kind / f"{kind}.wav")
        (tmp_path / "pets").mkdir(exist_ok=True)
        (tmp_path / "pets" / kind).symlink_to(tmp_path / "elsewhere" / kind)
    (tmp_path / "pets" / "loop").symlink_to(".")
    (tmp_path / "elsewhere" / "dog" / "up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pets" / "hound").symlink_to("dog")  # a second way to a folder is no circle
    (dataset,) = find_datasets(Settings(audio_dir=tmp_path / "pets"))
    names = ["cat/cat.wav", "dog/dog.wav", "dog/up/cat/cat.wav"]
    names += ["hound/dog.wav", "hound/up/cat/cat.wav"]
    assert cells(dataset.clips) == [(name, name.split("/")[-2]) for name in names]


def test_a_name_that_is_not_utf_8_fails_alone(tmp_path, run):
    for name in (b"a.wav", b"b\xff.wav", "b\N{REPLACEMENT CHARACTER}.wav".encode(), b"\xe9/c.wav"):
        write_wav(tmp_path / "pets" / os.fsdecode(name))
    status, _, _ = run("--audio_dir", tmp_path / "pets")
    assert status == 0
    done = pd.read_csv(tmp_path / "out" / "tokenized_pets.csv")["fname"]
    assert done.tolist() == ["a.wav", "b\N{REPLACEMENT CHARACTER}.wav"]
    failed = pd.read_csv(tmp_path / "out" / "failed_pets.csv")
    assert failed["fname"].tolist() == ["b\\xff.wav", "\\xe9/c.wav"]
    assert set(failed["error"]) == {"the name is not UTF-8: rename the file or its folder"}


def test_a_file_that_is_not_utf_8_can_be_read(tmp_path):
    path = tmp_path / os.fsdecode(b"b\xff.wav")
    write_wav(path)
    assert read_audio(path, 1, Settings())[0].shape == (1, 800)


@pytest.mark.parametrize("name", ["audio_dir", "output_dir", "metadata"])
def test_a_path_that_is_not_utf_8_is_refused_first(name, tmp_path):
    folder = tmp_path / os.fsdecode(b"pets\xff")
    write_wav(folder / "a.wav")
    write_wav(tmp_path / "pets" / "a.wav")
    (folder / "clips.csv").write_text("fname\na.wav\n")
    paths = {"audio_dir": tmp_path / "pets", "output_dir": tmp_path / "out", name: folder}
    if name == "metadata":
        paths[name] /= "clips.csv"
    with pytest.raises(UserError, match=r"pets\\xff.*: this name is not UTF-8: rename it"):
        find_datasets(Settings(**paths))


def test_outputs_below_the_audio_folder_are_not_counted(tmp_path, run):
    write_wav(tmp_path / "a.wav")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    for _ in range(2):
        status, _, err = run("--audio_dir", tmp_path, "--parquet")
        assert status == 0 and "left out 1 file not known as sound: .txt" in err


def test_matlab_files_are_no_sounds_and_no_rivals(tmp_path, run):
    write_wav(tmp_path / "pets" / "a.wav")
    soundfile.write(tmp_path / "pets" / "a.mat", np.zeros(800), 8_000, format="MAT5")
    (tmp_path / "clips.csv").write_text("fname\na\na.mat\n")
    flags = ["--audio_dir", tmp_path / "pets"]
    status, out, err = run(*flags)
    assert status == 0 and "1 clip tokenized" in out and "0 failed" in out
    assert "left out 1 file not known as sound: .mat" in err
    assert run(*flags, "--metadata", tmp_path / "clips.csv")[0] == 0
    (failed,) = pd.read_csv(tmp_path / "out" / "failed_clips.csv").itertuples(index=False)
    assert failed == ("a.mat", "a MATLAB matrix, not a sound file: save sound as WAV")


# ------------------------------------------------------------------------------- a clip's file

FILES = ["plain.wav", "64760.wav", "deep/er/one.wav", "x/two.wav", "y/two.wav", "x/3.flac"]
FILES += ["song.wav", "song/drums.wav", " lead.wav", "lead.wav", "C:maj/1.wav", "SA1.WAV"]
FILES += [unicodedata.normalize("NFD", "Gefühl.wav"), "one/two.mp3", "both.wav", "both.ogg"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"12345")
    os.mkfifo(folder / "pipe.wav")
    return Dataset("x", folder, [])


FOUND = {
    "plain.wav": "plain.wav",
    "./plain.wav": "plain.wav",
    "x/../plain.wav": "plain.wav",
    "64760": "64760.wav",
    "x/two.wav": "x/two.wav",
    "one.wav": "deep/er/one.wav",
    "er/one": "deep/er/one.wav",
    "3": "x/3.flac",
    "song": "song.wav",  # song/ is a folder
    " lead.wav": " lead.wav",
    "lead.wav": "lead.wav",
    "C:maj/1.wav": "C:maj/1.wav",
    "sa1": "SA1.WAV",
    "PLAIN.wav": "plain.wav",
    unicodedata.normalize("NFC", "Gefühl.wav"): unicodedata.normalize("NFD", "Gefühl.wav"),
    "x\\two.wav": "x/two.wav",
    " plain.wav ": "plain.wav",
    "{folder}/x/two.wav": "x/two.wav",
}


@pytest.mark.parametrize("fname", FOUND)
def test_a_name_finds_its_file(fname, dataset):
    clip = Clip(fname.replace("{folder}", str(dataset.audio_dir)))
    find_file(clip, dataset)
    assert (clip.path, clip.error) == (dataset.audio_dir / FOUND[fname], "")
    assert clip.stamp[0] == 5


REASONS = {
    "two.wav": "several files fit this name: x/two.wav, y/two.wav",
    "both": "several files fit this name: both.ogg, both.wav",
    "gone.wav": "no such file",
    "plain.wav/inside.wav": "no such file",
    "gone\\gone.wav": "no such file",
    "deep": "a folder, not a file",
    "pipe.wav": "a pipe or a device, not a file",
    "n" * 300: "cannot be opened: File name too long",
    "": "the name is empty",
    "  ": "the name is empty",
    "a\0b": "holds a NUL character",
    "/etc/hostname": "the path is outside the audio folder",
    "../x.wav": "the path is outside the audio folder",
    ".": "the path is outside the audio folder",
}


@pytest.mark.parametrize("fname", REASONS)
def test_a_name_without_a_file_says_why(fname, dataset):
    clip = Clip(fname)
    find_file(clip, dataset)
    assert REASONS[fname] in clip.error and clip.stamp is None


def test_a_name_in_a_closed_folder_means_no_other_file(tmp_path, monkeypatch):
    for folder in ("a", "backup/a"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.wav").write_bytes(b"12345")

    def closed(function):
        def call(path, *args, **kwargs):
            if str(path) in (str(tmp_path / "a"), str(tmp_path / "a" / "0.wav")):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return call

    clip = Clip("a/0.wav")
    for name in ("stat", "scandir"):
        monkeypatch.setattr(os, name, closed(getattr(os, name)))
    find_file(clip, Dataset("x", tmp_path, []))
    assert (clip.stamp, clip.error) == (None, "cannot be opened: Permission denied")


def test_the_machines_faults_are_no_reason(dataset, monkeypatch):
    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "stat", broken)
    with pytest.raises(OSError, match="Input/output error"):
        find_file(Clip("plain.wav"), dataset)
