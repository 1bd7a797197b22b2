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


def cells(clips):
    """(name, labels) of every clip."""
    return [(clip.fname, clip.labels) for clip in clips]


def find(root, stem="train_curated"):
    return find_dataset(parse_settings(["--input_dir", str(root)]), stem)


@pytest.mark.parametrize("csv_name, folder_name", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_both_layouts_are_found(csv_name, folder_name, tmp_path):
    lay_out(tmp_path, csv_name, folder_name)
    dataset = find(tmp_path)
    assert dataset.csv_path == tmp_path / csv_name
    assert dataset.audio_dir == tmp_path / folder_name
    assert cells(dataset.clips) == [("a.wav", "Bark")]


def test_kaggles_test_set_is_listed_by_the_sample_submission(tmp_path):
    lay_out(tmp_path, "sample_submission.csv", "test", "fname,Bark,Meow\na.wav,0,0\n")
    dataset = find(tmp_path, "test")
    assert cells(dataset.clips) == [("a.wav", "")]


def test_zenodos_test_set_has_labels(tmp_path):
    lay_out(
        tmp_path,
        "FSDKaggle2019.meta/test_post_competition.csv",
        "FSDKaggle2019.audio_test",
        "fname,labels,usage,freesound_id,license\na.wav,Bark,Public,1,CC0\n",
    )
    dataset = find(tmp_path, "test")
    assert cells(dataset.clips) == [("a.wav", "Bark")] and dataset.columns == []


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
    columns, clips = read_clips(path, None)
    names, labels = zip(*cells(clips))
    assert names == ("приве́т 鳥.wav", "NA", "007")
    assert labels == ("Walk_and_footsteps,Slam", "", 'a "quoted" label')
    assert columns == [] and [clip.index for clip in clips] == [0, 1, 2]


def test_spaces_behind_the_commas_belong_to_no_name_and_no_label(tmp_path):
    """A header `fname, labels` gave clips without labels, in silence."""
    path = tmp_path / "clips.csv"
    path.write_text('fname, labels ,fold\na.wav, Bark, 1\nb.wav, "Walk, Slam", 2\n')
    columns, clips = read_clips(path, None, keep_extra=True)
    assert cells(clips) == [("a.wav", "Bark"), ("b.wav", "Walk, Slam")]
    assert columns == ["fold"] and [clip.extra for clip in clips] == [["1"], ["2"]]


def test_repeated_rows_are_used_once_and_told(tmp_path, capsys):
    path = tmp_path / "clips.csv"
    path.write_text("fname,labels\na.wav,Bark\nb.wav,Slam\na.wav,Bark\na.wav,Meow\n")
    _, clips = read_clips(path, None)
    assert [clip.fname for clip in clips] == ["a.wav", "b.wav", "a.wav"]  # another label: it stays
    assert "repeats 1 rows" in capsys.readouterr().err


def test_max_samples_takes_the_first_rows(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("fname,labels\nb.wav,1\na.wav,2\nc.wav,3\n")
    assert [clip.fname for clip in read_clips(path, 2)[1]] == ["b.wav", "a.wav"]
    assert len(read_clips(path, 9)[1]) == 3


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
FSD50K = 'fname,labels,mids,split\n64760,"Electric_guitar,Guitar","/m/02sgy,/m/0342h",train\n'


@pytest.fixture
def own(tmp_path, run):
    """Runs a CSV of one's own, given as text, over files of 0.1 s: (its table, stderr)."""

    def tokenize(text, files, *flags, name="mine", seconds=0.1):
        (tmp_path / "audio").mkdir()
        for file in files:
            soundfile.write(tmp_path / "audio" / file, np.zeros(round(seconds * 8_000)), 8_000)
        (tmp_path / f"{name}.csv").write_bytes(text.encode())
        flags = ["--audio_dir", tmp_path / "audio", *flags]
        status, _, err = run("--metadata", tmp_path / f"{name}.csv", *flags)
        assert status == 0, err
        path = tmp_path / "out" / f"tokenized_{name}.csv"
        return pd.read_csv(path, keep_default_na=False, dtype=str)

    return tokenize


FACTS = ["num_tokens", "token_shape", "num_chunks", "duration_sec"]


@pytest.mark.parametrize(
    "name, text, file, row",
    [
        (
            "esc50",
            ESC50,
            "1-100032-A-0.wav",
            {
                **{"fname": "1-100032-A-0.wav", "labels": "dog", **dict.fromkeys(FACTS)},
                **{"fold": "1", "target": "0", "esc10": "True"},
                **{"src_file": "100032", "take": "A"},
            },
        ),
        (
            "dev",
            FSD50K,
            "64760.wav",
            {
                **{"fname": "64760", "labels": "Electric_guitar,Guitar", **dict.fromkeys(FACTS)},
                **{"mids": "/m/02sgy,/m/0342h", "split": "train"},
            },
        ),
        ("mine", "filename\na.flac\n", "a.flac", {"fname": "a.flac", "labels": ""}),
    ],
)
def test_any_csv_of_file_names_is_a_dataset_and_keeps_its_columns(
    name, text, file, row, own, tmp_path
):
    """They stand between duration_sec and the tokens."""
    table = own(text, [file], name=name)
    before_tokens = table.loc[0, :"token_0"].drop("token_0")
    known = {key: value for key, value in row.items() if value is not None}
    assert before_tokens[list(known)].to_dict() == known
    assert list(before_tokens.index) == list(dict.fromkeys([*row, *FACTS]))
    assert (tmp_path / "out" / f"summary_{name}.txt").exists()


def test_columns_of_ones_own_follow_the_chunk_and_its_start(own):
    table = own("fname,fold\na.wav,4\n", ["a.wav"], "--aggregate", "none", seconds=3)
    columns = "fname labels num_tokens token_shape num_chunks duration_sec chunk start_sec fold"
    assert table.columns[:10].tolist() == [*columns.split(), "token_0"]
    assert table[["chunk", "start_sec", "fold"]].to_numpy().tolist() == [
        ["0", "0.0", "4"],
        ["1", "1.0", "4"],
    ]


@pytest.mark.parametrize(
    "header", ["num_chunks", "chunk", "start_sec", "token_7", "tokens", "fold,fold", "category"]
)
def test_columns_that_the_output_has_itself_are_refused(header, tmp_path, run):
    first = header.partition(",")[0]
    row = ",".join("1" * (1 + header.count(",")))
    (tmp_path / "mine.csv").write_text(f"filename,category,{header}\na.wav,dog,{row}\n")
    flags = ["--metadata", tmp_path / "mine.csv", "--audio_dir", tmp_path]
    status, _, err = run(*flags)
    assert status == 2 and "rename" in err and first in err
    assert not (tmp_path / "out").exists()


def test_a_lone_carriage_return_is_quoted(own):
    """Python 3.11's csv module leaves it bare, and pandas read four rows for three."""
    rows = ['"a\rb.wav",Bark,x', 'c.wav,"Walk\rSlam",y', 'd.wav,Meow,"1\r2"']
    names = ["a\rb.wav", "c.wav", "d.wav"]
    table = own("\n".join(["fname,labels,note", *rows]) + "\n", names)
    assert table["fname"].tolist() == names
    assert table["labels"].tolist() == ["Bark", "Walk\rSlam", "Meow"]
    assert table["note"].tolist() == ["x", "y", "1\r2"]


def test_a_carriage_return_in_the_name_of_a_bad_clip_is_quoted(tmp_path, run):
    (tmp_path / "mine.csv").write_bytes(b'fname\n"a\rb.wav"\nc.wav\n')
    soundfile.write(tmp_path / "c.wav", np.zeros(800), 8_000)
    flags = ["--metadata", tmp_path / "mine.csv", "--audio_dir", tmp_path]
    assert run(*flags)[0] == 0
    assert pd.read_csv(tmp_path / "out/failed_mine.csv")["fname"].tolist() == ["a\rb.wav"]


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


def test_the_script_alone_has_no_sample_and_says_so(tmp_path, monkeypatch, run):
    monkeypatch.setattr("encodec_tokenizer.SAMPLE_DIR", tmp_path / "sample")
    status, _, err = run("--dataset", "sample")
    assert status == 2
    assert "the sample comes with the repository" in err and "--audio_dir" not in err


@pytest.mark.parametrize("header", ["fname,labels,labels", "fname,labels,fname"])
def test_a_header_that_says_name_or_labels_twice_is_refused(header, tmp_path, run):
    """Which of the two is meant, nobody knows."""
    (tmp_path / "mine.csv").write_text(f"{header}\na.wav,dog,b.wav\n")
    status, _, err = run("--metadata", tmp_path / "mine.csv", "--audio_dir", tmp_path)
    assert status == 2 and "mine.csv" in err
