"""Which clips a command line names: FSDKaggle2019's layouts, any CSV, any folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import ROOT

from encodec_tokenizer import (
    SAMPLE_DIR,
    Settings,
    UserError,
    find_dataset,
    find_datasets,
    read_clips,
    row_cells,
)

LAYOUTS = {
    "Kaggle": ("train_curated.csv", "train_curated"),
    "Kaggle, renamed folder": ("train_curated.csv", "trn_curated"),
    "Kaggle, nested": ("freesound/train_curated.csv", "freesound/train_curated"),
    "Kaggle, folder in a folder": ("train_curated.csv", "train_curated/train_curated"),
    "Zenodo": (
        "FSDKaggle2019.meta/train_curated_post_competition.csv",
        "FSDKaggle2019.audio_train_curated",
    ),
    "Zenodo, nested": (
        "x/FSDKaggle2019.meta/train_curated_post_competition.csv",
        "x/FSDKaggle2019.audio_train_curated",
    ),
}


def write_wav(path: Path, seconds: float = 0.1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(seconds * 8_000)), 8_000)


def lay_out(root, csv_name, folder_name, text="fname,labels\na.wav,Bark\n"):
    (root / csv_name).parent.mkdir(parents=True, exist_ok=True)
    (root / csv_name).write_text(text, encoding="utf-8")
    write_wav(root / folder_name / "a.wav")


def cells(clips):
    """(name, labels) of every clip."""
    return [(clip.fname, clip.labels) for clip in clips]


def find(root, stem="train_curated"):
    return find_dataset(Settings(input_dir=root), stem)


def read(tmp_path, content, settings=None, keep_extra=False):
    """What read_clips makes of a CSV's content: the names of the further columns, and the clips."""
    path = tmp_path / "clips.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_clips(path, settings or Settings(), keep_extra)


# -------------------------------------------------------------------------------- FSDKaggle2019


@pytest.mark.parametrize("csv_name, folder_name", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_both_layouts_are_found(csv_name, folder_name, tmp_path):
    lay_out(tmp_path, csv_name, folder_name)
    dataset = find(tmp_path)
    assert (dataset.stem, dataset.columns) == ("train_curated", ())
    assert dataset.audio_dir == tmp_path / folder_name
    assert cells(dataset.clips) == [("a.wav", "Bark")]


def test_kaggles_test_set_is_listed_by_the_sample_submission(tmp_path):
    lay_out(tmp_path, "sample_submission.csv", "test", "fname,Bark,Meow\na.wav,0,0\n")
    assert cells(find(tmp_path, "test").clips) == [("a.wav", "")]


def test_zenodos_test_set_has_labels(tmp_path):
    meta, folder = "FSDKaggle2019.meta/test_post_competition.csv", "FSDKaggle2019.audio_test"
    lay_out(tmp_path, meta, folder, "fname,labels,usage,license\na.wav,Bark,Public,CC0\n")
    dataset = find(tmp_path, "test")
    assert cells(dataset.clips) == [("a.wav", "Bark")] and dataset.columns == ()


def test_an_audio_folder_is_not_taken_from_the_other_layout(tmp_path):
    lay_out(tmp_path, "sample_submission.csv", "elsewhere")
    lay_out(tmp_path, "test_post_competition.csv", "FSDKaggle2019.audio_test")
    assert find(tmp_path, "test").audio_dir.name == "FSDKaggle2019.audio_test"


def test_a_missing_dataset_is_told_with_the_places_and_the_ways_on(tmp_path, run):
    status, _, err = run("--input_dir", tmp_path / "nowhere")
    assert status == 2
    for part in ("train_curated.csv", "FSDKaggle2019.audio_train_curated", "--dataset sample"):
        assert part in err
    assert str(tmp_path / "nowhere") in err and "https://zenodo.org/record/3612637" in err
    assert "UNTRAINED" not in err  # found out before any weights are looked for


def test_a_missing_audio_folder_is_an_error_before_the_run(tmp_path, run):
    (tmp_path / "train_curated.csv").write_text("fname,labels\na.wav,Bark\n")
    status, _, err = run("--input_dir", tmp_path)
    assert status == 2 and f"audio folder {tmp_path / 'train_curated'} does not exist" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["Kaggle", "Zenodo"])
def test_a_gone_audio_folder_with_a_finished_csv_is_no_error(layout, tmp_path, run):
    csv_name, folder = LAYOUTS[layout]
    lay_out(tmp_path, csv_name, folder)
    flags = ["--input_dir", tmp_path, "--target_duration", "0.5"]
    assert run(*flags)[0] == 0
    shutil.rmtree(tmp_path / folder)
    status, _, err = run(*flags)
    assert status == 0 and "is finished already: 1 clips: 1 tokenized\n" in err
    assert "1 clips' files are gone; their rows stay: a.wav" in err


def test_the_bundled_sample_is_what_its_generator_makes(tmp_path):
    subprocess.run([sys.executable, ROOT / "tests" / "make_sample.py", tmp_path], check=True)
    assert (tmp_path / "sample.csv").read_text() == (SAMPLE_DIR / "sample.csv").read_text()
    made, kept = sorted(tmp_path.glob("*.wav")), sorted(SAMPLE_DIR.glob("*.wav"))
    assert [path.name for path in made] == [path.name for path in kept]
    assert sum(path.stat().st_size for path in kept) < 1.5e6
    for a, b in zip(made, kept):
        (x, rate), (y, kept_rate) = (soundfile.read(path, dtype="int16") for path in (a, b))
        assert rate == kept_rate and np.abs(x.astype(int) - y).max() <= 1


def test_the_script_alone_has_no_sample_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("encodec_tokenizer.SAMPLE_DIR", tmp_path / "sample")
    with pytest.raises(UserError, match="the sample comes with the repository"):
        find_datasets(Settings(dataset="sample"))


# --------------------------------------------------------------------------------------- any CSV


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "is not a comma-separated table in UTF-8: it is empty"),
        (b" \n  ,\n", "it is empty"),
        (b"fname,labels\n", "lists no clips"),
        (b"fname,labels\n  \n", "lists no clips"),
        (b"file,labels\na.wav,Bark\n", "has no column fname or filename, only 'file', 'labels'"),
        (b"fname;labels\na.wav;Bark\n", "separated by commas"),
        (b"fname\tlabels\na.wav\tBark\n", "separated by commas"),
        (b"fname,labels\na.wav,Bark\nb.wav,Walk,Slam\n", "3 in the row of b.wav (a comma in a"),
        ("fname,labels\né.wav,Bark\n".encode("latin-1"), "in UTF-8"),
        (b"RIFF\x00\x00\xff\xfe", "is not a comma-separated table"),
    ],
)
def test_a_csv_that_lists_no_clips_is_told_by_its_name(content, says, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert says in str(error.value) and "clips.csv" in str(error.value)


def test_bom_unicode_and_quoted_labels_are_read(tmp_path):
    text = (
        '\ufefffreesound_id,fname,labels\n1,"приве́т 鳥.wav","Walk_and_footsteps,Slam"\n'
        '2,NA,\n3,007,"a ""quoted"" label"\n'
    )
    columns, clips = read(tmp_path, text)
    assert cells(clips) == [
        ("приве́т 鳥.wav", "Walk_and_footsteps,Slam"),
        ("NA", ""),
        ("007", 'a "quoted" label'),
    ]
    assert columns == ()


def test_spaces_and_blank_lines_belong_to_no_name_and_no_label(tmp_path):
    text = 'fname, labels ,fold\n  \na.wav , Bark, 1\n\nb.wav, "Walk, Slam", 2\n , ,\n'
    columns, clips = read(tmp_path, text, keep_extra=True)
    assert cells(clips) == [("a.wav", "Bark"), ("b.wav", "Walk, Slam")]
    assert columns == ("fold",) and [clip.extra for clip in clips] == [("1",), ("2",)]


@pytest.mark.parametrize("header", ["Fname,Labels", "FILENAME,Category", "fname,LABEL"])
def test_a_capital_in_a_columns_name_is_forgiven(header, tmp_path):
    assert cells(read(tmp_path, f"{header}\na.wav,Bark\n")[1]) == [("a.wav", "Bark")]


def test_repeated_rows_are_used_once_and_told(tmp_path, capsys):
    text = "fname,labels\na.wav,Bark\nb.wav,Slam\na.wav,Bark\na.wav,Meow\n"
    _, clips = read(tmp_path, text)
    assert cells(clips) == [("a.wav", "Bark"), ("b.wav", "Slam"), ("a.wav", "Meow")]
    assert "repeats 1 rows" in capsys.readouterr().err


def test_max_samples_takes_the_first_rows(tmp_path):
    text = "fname,labels\nb.wav,1\na.wav,2\nc.wav,3\n"
    _, clips = read(tmp_path, text, Settings(max_samples=2))
    assert [clip.fname for clip in clips] == ["b.wav", "a.wav"]
    assert len(read(tmp_path, text, Settings(max_samples=9))[1]) == 3


ESC50 = (
    "filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,dog,True,100032,A\n"
)
FSD50K = 'fname,labels,mids,split\n64760,"Electric_guitar,Guitar","/m/02sgy,/m/0342h",train\n'


@pytest.mark.parametrize(
    "text, name, labels, extra",
    [
        (
            ESC50,
            "1-100032-A-0.wav",
            "dog",
            {"fold": "1", "target": "0", "esc10": "True", "src_file": "100032", "take": "A"},
        ),
        (
            FSD50K,
            "64760",
            "Electric_guitar,Guitar",
            {"mids": "/m/02sgy,/m/0342h", "split": "train"},
        ),
        ("filename\na.flac\n", "a.flac", "", {}),
    ],
    ids=["ESC-50", "FSD50K", "names alone"],
)
def test_any_csv_of_names_is_a_dataset_and_keeps_its_columns(text, name, labels, extra, tmp_path):
    """The further ones stand after all of ours."""
    (tmp_path / "mine.csv").write_text(text)
    settings = Settings(metadata=tmp_path / "mine.csv", audio_dir=tmp_path, aggregate="none")
    (dataset,) = find_datasets(settings)
    assert (dataset.stem, dataset.audio_dir) == ("mine", tmp_path)
    found = row_cells(dataset.clips[0], 0, settings, dataset.columns)
    facts = ["num_tokens", "token_shape", "num_chunks", "duration_sec", "chunk", "start_sec"]
    assert list(found) == ["fname", "labels", *facts, *extra]
    assert found["fname"] == name and found["labels"] == labels
    assert {column: found[column] for column in extra} == extra


def test_a_csv_of_ones_own_is_tokenized(tmp_path, run):
    write_wav(tmp_path / "audio" / "a.wav", 3)
    (tmp_path / "mine.csv").write_text("fname,fold\na.wav,4\n")
    flags = ["--metadata", tmp_path / "mine.csv", "--audio_dir", tmp_path / "audio"]
    assert run(*flags, "--aggregate", "none")[0] == 0
    table = pd.read_csv(tmp_path / "out" / "tokenized_mine.csv", keep_default_na=False)
    columns = "fname labels num_tokens token_shape num_chunks duration_sec chunk start_sec fold"
    assert table.columns[:10].tolist() == [*columns.split(), "token_0"]
    assert table[["chunk", "start_sec", "fold"]].to_numpy().tolist() == [[0, 0, 4], [1, 1, 4]]
    assert (tmp_path / "out" / "summary_mine.txt").exists()


@pytest.mark.parametrize(
    "header", ["num_chunks", "chunk", "start_sec", "token_7", "tokens", "fold,fold", "category"]
)
def test_columns_that_the_output_has_itself_are_refused(header, tmp_path):
    name = header.partition(",")[0]
    row = ",".join("1" * (1 + header.count(",")))
    text = f"filename,category,{header}\na.wav,dog,{row}\n"
    with pytest.raises(UserError, match=f"clips.csv: rename .{name}.: the output has such columns"):
        read(tmp_path, text, keep_extra=True)


@pytest.mark.parametrize("header", ["fname,labels,labels", "fname,labels,fname"])
def test_a_header_that_says_name_or_labels_twice_is_refused(header, tmp_path):
    """Which of the two is meant, nobody knows."""
    with pytest.raises(UserError, match="the output has such columns"):
        read(tmp_path, f"{header}\na.wav,dog,b.wav\n")


def test_a_csv_that_is_not_there_ends_at_once(run):
    status, _, err = run("--metadata", "none.csv", "--audio_dir", ".")
    assert status == 2 and "none.csv" in err and "No such file" in err


# ------------------------------------------------------------------------------------- any folder


def test_a_folder_alone_gives_every_audio_file_below_it(tmp_path):
    """Sorted by path, with names relative to it, labelled by the folder that each lies in."""
    names = ["b/c/2.flac", "b/1.wav", "a.wav", "a/Z.WAV", "a/9.mp3", "a/10.ogg"]
    for name in ["a/notes.txt", "clips.csv", *names]:
        (tmp_path / "birds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "birds" / name).touch()
    (tmp_path / "birds" / "folder.wav").mkdir()
    (dataset,) = find_datasets(Settings(audio_dir=tmp_path / "birds"))
    assert (dataset.stem, dataset.audio_dir) == ("birds", tmp_path / "birds")
    assert cells(dataset.clips) == [
        ("a/10.ogg", "a"),
        ("a/9.mp3", "a"),
        ("a/Z.WAV", "a"),
        ("a.wav", "birds"),
        ("b/1.wav", "b"),
        ("b/c/2.flac", "c"),
    ]
    (first,) = find_datasets(Settings(audio_dir=tmp_path / "birds", max_samples=2))
    assert cells(first.clips) == cells(dataset.clips)[:2]


def test_a_folder_without_audio_or_not_there_is_told(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="no audio file lies below it"):
        find_datasets(Settings(audio_dir=tmp_path))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_datasets(Settings(audio_dir=tmp_path / "nowhere"))


def test_a_folder_is_tokenized(tmp_path, run):
    for name in ("dog/a.wav", "cat/a.wav"):
        write_wav(tmp_path / "pets" / name)
    assert run("--audio_dir", tmp_path / "pets", "--target_duration", "0.5")[0] == 0
    table = pd.read_csv(tmp_path / "out" / "tokenized_pets.csv")
    rows = table[["fname", "labels", "num_chunks"]].to_numpy().tolist()
    assert rows == [["cat/a.wav", "cat", 1], ["dog/a.wav", "dog", 1]]


def test_an_unnamed_column_of_numbers_is_no_label(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text(",fname,duration\n0,a.wav,1.5\n")  # as pandas writes its index
    _, (clip,) = read_clips(path, Settings())
    assert (clip.fname, clip.labels) == ("a.wav", "")
