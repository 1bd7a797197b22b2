import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import ROOT

from encodec_tokenizer import SAMPLE_DIR, UserError, find_dataset, parse_settings, read_clips

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


def lay_out(root, csv_name, folder_name, text="fname,labels\na.wav,Bark\n"):
    (root / csv_name).parent.mkdir(parents=True, exist_ok=True)
    (root / csv_name).write_text(text, encoding="utf-8")
    (root / folder_name).mkdir(parents=True, exist_ok=True)
    soundfile.write(root / folder_name / "a.wav", np.zeros(100), 44_100)


def find(root, stem="train_curated"):
    return find_dataset(parse_settings(["--input_dir", str(root)]), stem)


@pytest.mark.parametrize("csv_name, folder_name", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_both_layouts_are_found(csv_name, folder_name, tmp_path):
    lay_out(tmp_path, csv_name, folder_name)
    dataset = find(tmp_path)
    assert dataset.csv_path == tmp_path / csv_name
    assert dataset.audio_dir == tmp_path / folder_name
    assert dataset.clips.to_dict("list") == {"fname": ["a.wav"], "labels": ["Bark"]}


def test_kaggles_test_set_is_listed_by_the_sample_submission(tmp_path):
    lay_out(tmp_path, "sample_submission.csv", "test", "fname,Bark,Meow\na.wav,0,0\n")
    dataset = find(tmp_path, "test")
    assert dataset.clips.to_dict("list") == {"fname": ["a.wav"], "labels": [""]}


def test_zenodos_test_set_has_labels(tmp_path):
    lay_out(
        tmp_path,
        "FSDKaggle2019.meta/test_post_competition.csv",
        "FSDKaggle2019.audio_test",
        "fname,labels,usage,freesound_id,license\na.wav,Bark,Public,1,CC0\n",
    )
    assert find(tmp_path, "test").clips["labels"].tolist() == ["Bark"]


def test_an_audio_folder_is_not_taken_from_the_other_layout(tmp_path):
    lay_out(tmp_path, "sample_submission.csv", "elsewhere")
    lay_out(tmp_path, "test_post_competition.csv", "FSDKaggle2019.audio_test")
    assert find(tmp_path, "test").csv_path.name == "test_post_competition.csv"


def test_missing_dataset_tells_where_it_was_sought_and_the_ways_on(tmp_path, run):
    status, _, err = run("--input_dir", tmp_path / "nowhere")
    assert status == 2
    for part in (
        str(tmp_path / "nowhere"),
        "train_curated.csv",
        "FSDKaggle2019.audio_train_curated",
    ):
        assert part in err
    assert "https://zenodo.org/record/3612637" in err and "--dataset sample" in err
    assert "UNTRAINED" not in err  # found out before any weights are looked for


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "is not a comma-separated table"),
        (b"fname,labels\n", "lists no clips"),
        (b"file,labels\na.wav,Bark\n", "has no column fname or filename, only 'file', 'labels'"),
        (b"fname;labels\na.wav;Bark\n", "semicolons"),
        (b"fname,labels\na.wav,Walk,Slam\n", "is not a comma-separated table"),
        (b"fname,labels\na.wav,Bark\nb.wav,Walk,Slam\n", "is not a comma-separated table"),
        ("fname,labels\né.wav,Bark\n".encode("latin-1"), "in UTF-8"),
        (b"RIFF\x00\x00\xff\xfe", "is not a comma-separated table"),
    ],
)
def test_a_csv_that_lists_no_clips_ends_at_once(content, says, tmp_path, run):
    lay_out(tmp_path, *LAYOUTS["Kaggle"])
    (tmp_path / "train_curated.csv").write_bytes(content)
    status, _, err = run("--input_dir", tmp_path)
    assert status == 2
    assert says in err and "train_curated.csv" in err
    assert "Traceback" not in err


def test_bom_unicode_extra_columns_and_quoted_labels_are_read(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_bytes(
        '\ufefffreesound_id,fname,labels\n1,"приве́т 鳥.wav","Walk_and_footsteps,Slam"\n'
        '2,NA,\n3,007,"a ""quoted"" label"\n'.encode()
    )
    clips = read_clips(path, None)
    assert clips["fname"].tolist() == ["приве́т 鳥.wav", "NA", "007"]
    assert clips["labels"].tolist() == ["Walk_and_footsteps,Slam", "", 'a "quoted" label']


def test_repeated_rows_are_used_once_and_told(tmp_path, capsys):
    path = tmp_path / "clips.csv"
    path.write_text("fname,labels\na.wav,Bark\nb.wav,Slam\na.wav,Bark\na.wav,Meow\n")
    clips = read_clips(path, None)
    assert clips["fname"].tolist() == ["a.wav", "b.wav", "a.wav"]  # with another label it stays
    assert "repeats 1 rows" in capsys.readouterr().err


def test_max_samples_takes_the_first_rows(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("fname,labels\nb.wav,1\na.wav,2\nc.wav,3\n")
    assert read_clips(path, 2)["fname"].tolist() == ["b.wav", "a.wav"]
    assert len(read_clips(path, 9)) == 3


def test_missing_folder_is_an_error(tmp_path):
    (tmp_path / "train_curated.csv").write_text("fname,labels\na.wav,Bark\n")
    with pytest.raises(UserError, match="no train_curated dataset"):
        find(tmp_path)


def test_bundled_sample_is_what_its_generator_makes(tmp_path):
    subprocess.run([sys.executable, ROOT / "tests" / "make_sample.py", tmp_path], check=True)
    assert (tmp_path / "sample.csv").read_text() == (SAMPLE_DIR / "sample.csv").read_text()
    made, kept = sorted(tmp_path.glob("*.wav")), sorted(SAMPLE_DIR.glob("*.wav"))
    assert [path.name for path in made] == [path.name for path in kept]
    assert sum(path.stat().st_size for path in kept) < 1.5e6
    for a, b in zip(made, kept):
        (x, rate), (y, kept_rate) = (soundfile.read(path, dtype="int16") for path in (a, b))
        assert rate == kept_rate and np.abs(x.astype(int) - y).max() <= 1


ESC50 = (
    "filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,dog,True,100032,A\n"
)
FSD50K = 'fname,labels,mids,split\n64760,"Electric_guitar,Guitar",/m/02sgy,train\n'


@pytest.mark.parametrize(
    "name, text, file, row",
    [
        ("esc50", ESC50, "1-100032-A-0.wav", ["1-100032-A-0.wav", "dog"]),
        ("dev", FSD50K, "64760.wav", ["64760", "Electric_guitar,Guitar"]),
        ("mine", "filename\na.flac\n", "a.flac", ["a.flac", ""]),
    ],
)
def test_any_csv_of_file_names_is_a_dataset(name, text, file, row, tmp_path, run):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / file, np.zeros(4_410), 44_100)
    (tmp_path / f"{name}.csv").write_text(text)
    flags = ["--metadata", tmp_path / f"{name}.csv", "--audio_dir", tmp_path / "audio"]
    assert run(*flags)[0] == 0
    table = pd.read_csv(
        tmp_path / "out" / f"tokenized_{name}.csv", keep_default_na=False, dtype=str
    )
    assert table.iloc[0, :2].tolist() == row
    assert (tmp_path / "out" / f"summary_{name}.txt").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--metadata", "a.csv"], "--metadata and --audio_dir go together"),
        (["--metadata", "none.csv", "--audio_dir", "."], "none.csv"),
        (["--metadata", "none.csv", "--audio_dir", "no/where"], "no/where: no such folder"),
    ],
)
def test_a_dataset_of_ones_own_that_is_not_there_ends_at_once(flags, says, run):
    status, _, err = run(*flags)
    assert status == 2 and says in err
