"""The codes that are kept: when they are used again, what is refused, what a damaged file does."""

import json
import os
import random
import re
import shutil
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import encodec_tokenizer
from encodec_tokenizer import Kept, kept_path, read_kept, write_kept

pytestmark = pytest.mark.usefixtures("ready_made_codes")
CSV = "tokenized_train_curated.csv"


@pytest.fixture
def root(make_dataset, sound):
    """Three short clips."""
    return make_dataset({f"{i}.wav": (sound(0.3, 8_000, seed=i), 8_000) for i in range(3)})


@pytest.fixture
def again(run, tmp_path):
    """again(*flags): runs, and returns how many clips it encoded."""

    def command(*flags, **options):
        status, out, err = run("--target_duration", "0.5", *flags, **options)
        assert status == 0, err
        return int(re.search(r"\(([\d,]+) encoded now", out)[1])

    return command


def edit(root, change):
    table = root / "train_curated.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *change(rows)]) + "\n")


def copy_without_times(root):
    shutil.copytree(root / "train_curated", root / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(root / "train_curated")
    (root / "copy").rename(root / "train_curated")


def move(root):
    root.symlink_to(root.rename(root.with_name("moved")))


def add_in_front(root):
    shutil.copy(root / "train_curated" / "0.wav", root / "train_curated" / "a.wav")
    edit(root, lambda rows: ["a.wav,x", *rows])


CHANGES = {  # what is changed, by hand and by flags -> the number of clips that are encoded
    "nothing": (lambda root: None, [], 0),
    "clip added": (add_in_front, [], 1),
    "label corrected": (lambda root: edit(root, lambda rows: ["0.wav,Bark", *rows[1:]]), [], 0),
    "row dropped": (lambda root: edit(root, lambda rows: rows[:-1]), ["--overwrite"], 0),
    "table sorted": (lambda root: edit(root, lambda rows: rows[::-1]), [], 0),
    "copied without times": (copy_without_times, [], 0),
    "moved": (move, [], 0),
    "another aggregation": (lambda root: None, ["--aggregate", "none", "--overwrite"], 0),
    "another output": (lambda root: None, ["--parquet"], 0),
    "higher --max_duration": (lambda root: None, ["--max_duration", "900"], 0),
    "other batches": (lambda root: None, ["--batch_size", "3", "--workers", "1"], 0),
}


@pytest.mark.parametrize("change, flags, number", CHANGES.values(), ids=CHANGES)
def test_nothing_is_encoded_twice(change, flags, number, again, root, tmp_path):
    """And the rows are those of a run that starts anew."""
    assert again("--input_dir", root) == 3
    change(root)
    assert again("--input_dir", root, *flags) == number
    assert again("--input_dir", root, *flags) == 0
    assert again("--input_dir", root, *flags, "--output_dir", tmp_path / "fresh") > 0
    assert (tmp_path / "fresh" / CSV).read_bytes() == (tmp_path / "out" / CSV).read_bytes()


def test_rows_of_one_file_are_encoded_once(again, root, tmp_path):
    edit(root, lambda rows: ["0.wav,x", "./0.wav,y", "0,z", "1.wav,x"])
    assert again("--input_dir", root) == 2
    table = pd.read_csv(tmp_path / "out" / CSV)
    tokens = table.filter(regex=r"^token_").to_numpy()
    assert (tokens[0] == tokens[1]).all() and (tokens[0] == tokens[2]).all()
    assert (tokens[0] != tokens[3]).any()


def test_a_group_holds_so_many_seconds_of_audio_at_a_time(again, root, monkeypatch):
    """Clips of 0.3 s, of which two are less than the bound."""
    encode_clips, held = encodec_tokenizer.encode_clips, []

    def record(loaded, *others):
        held.append(len(loaded))
        encode_clips(loaded, *others)

    monkeypatch.setattr(encodec_tokenizer, "encode_clips", record)
    monkeypatch.setattr(encodec_tokenizer, "GROUP_SECONDS", 0.7)
    assert again("--input_dir", root) == 3 and held == [2, 1]


def test_a_lowered_max_duration_fails_a_clip_whose_codes_are_kept(again, run, root, tmp_path):
    assert again("--input_dir", root) == 3
    flags = ("--input_dir", root, "--target_duration", "0.5", "--max_duration", "0.2")
    for _ in range(2):  # also where the file is gone
        status, _, err = run(*flags, "--overwrite")
        assert status == 1 and "too long: 0.3 s (limit 0.2 s" in err and "stays as it is" in err
        shutil.rmtree(root / "train_curated", ignore_errors=True)


def test_names_that_differ_in_case_are_two_clips(again, root):
    """On a disk that tells them apart."""
    shutil.copy(root / "train_curated" / "1.wav", root / "train_curated" / "KICK.wav")
    shutil.copy(root / "train_curated" / "2.wav", root / "train_curated" / "kick.wav")
    edit(root, lambda rows: ["KICK.wav,x", "kick.wav,y"])
    assert again("--input_dir", root) == 2


def test_names_that_share_a_file_of_codes_stop_the_run(run, root, tmp_path, monkeypatch):
    """As Kick.wav and kick.wav on some disks: no clip gets the codes of the other."""
    monkeypatch.setattr(encodec_tokenizer, "kept_path", lambda folder, name: folder / "same.npz")
    status, _, err = run("--input_dir", root, "--workers", "1")
    assert status == 1 and "takes two names for one (Kick.wav, kick.wav)" in err
    assert not (tmp_path / "out" / CSV).exists()


def test_a_name_that_cannot_be_kept_fails_alone(run, root, tmp_path):
    (folder,) = kept_folders(run, root, tmp_path)
    (folder / "1.wav.npz").unlink()
    (folder / "1.wav.npz").mkdir()
    (folder / "1.wav.npz" / "mine").touch()
    status, out, _ = run("--input_dir", root, "--target_duration", "0.5", "--overwrite")
    assert status == 0 and "2 clips tokenized (0 encoded now, 2 already there), 1 failed" in out
    failed = pd.read_csv(tmp_path / "out" / "failed_train_curated.csv")
    assert failed["fname"].tolist() == ["1.wav"] and "cannot be kept" in failed["error"][0]
    assert not list(folder.glob("*.tmp"))


def kept_folders(run, root, tmp_path):
    assert run("--input_dir", root, "--target_duration", "0.5")[0] == 0
    return list((tmp_path / "out" / "codes_train_curated").iterdir())


def test_only_old_temporary_files_are_removed(run, root, tmp_path):
    (folder,) = kept_folders(run, root, tmp_path)
    out = tmp_path / "out"
    ours, drafts = out / f".unfinished-{'0a' * 16}", out / ".unfinished-drafts"
    names = [folder / "x.tmp", folder / "y.tmp", ours, drafts]
    for path in names[:2]:
        path.write_text("left")
    for path in names[2:]:
        path.mkdir()
    for path in (names[0], ours, drafts):
        os.utime(path, (time.time() - 90_000,) * 2)
    assert run("--input_dir", root, "--target_duration", "0.5")[0] == 0
    assert [path.exists() for path in names] == [False, True, False, True]


# --------------------------------------------------------------------------------------- refusals


@pytest.fixture
def weighed(run, tmp_path, monkeypatch):
    """weighed(*flags): a run with trained weights, for rows that may not be replaced."""
    monkeypatch.chdir(tmp_path)
    for name in ("trained.th", "other.th"):
        Path(name).touch()
    return partial(run, weights="trained.th")


REFUSALS = {
    "bandwidth": (["--bandwidth", "3"], "--bandwidth: 6.0 -> 3.0"),
    "aggregate": (["--aggregate", "none"], "--aggregate: mean -> none"),
    "whole": (["--whole"], "--whole: False -> True"),
    "weights": (["--weights", "other.th"], "--weights: trained. -> other.th"),
    "fewer": (["--max_samples", "2"], "3 clips -> 2 clips: rows would be lost"),
}


@pytest.mark.parametrize("flags, says", REFUSALS.values(), ids=REFUSALS)
def test_a_csv_of_other_settings_is_not_replaced(flags, says, weighed, root, tmp_path):
    assert weighed("--input_dir", root)[0] == 0
    paths = [tmp_path / "out" / CSV, (tmp_path / "out" / CSV).with_suffix(".json")]
    old = [path.read_bytes() for path in paths]
    status, _, err = weighed("--input_dir", root, *flags)
    assert status == 2 and says in err
    for way_out in ("Move the CSV elsewhere", "--overwrite", "another --output_dir"):
        assert way_out in err
    assert [path.read_bytes() for path in paths] == old
    assert weighed("--input_dir", root, *flags, "--overwrite")[0] == 0
    assert paths[1].read_bytes() != old[1]


def test_another_folder_of_the_same_name_is_not_replaced(weighed, root, tmp_path):
    for name in ("A", "B"):
        shutil.copytree(root / "train_curated", tmp_path / name / "audio")
    assert weighed("--audio_dir", tmp_path / "A" / "audio")[0] == 0
    status, _, err = weighed("--audio_dir", tmp_path / "B" / "audio")
    assert status == 2 and f"--audio_dir: {tmp_path / 'A' / 'audio'} -> " in err
    status, out, _ = weighed("--audio_dir", tmp_path / "B" / "audio", "--overwrite")
    assert status == 0 and "(0 encoded now" in out


def test_a_csv_that_is_not_ours_is_not_replaced(weighed, root, tmp_path):
    out = tmp_path / "out"
    assert weighed("--input_dir", root)[0] == 0
    record = (out / CSV).with_suffix(".json")
    content = record.read_text()
    wrong = [{"settings": 3}, {"total_samples_processed": None}, {"csv_bytes": 7}]
    edited = [json.dumps(json.loads(content) | one) for one in wrong]
    for text in ("", "{", "7", "[]", "null", *edited):
        record.write_text(text)
        status, _, err = weighed("--input_dir", root)
        assert status == 2 and f"{record.name} does not describe it" in err
    record.write_text(content)
    (out / CSV).write_text("mine")
    assert weighed("--input_dir", root)[0] == 2 and (out / CSV).read_text() == "mine"
    assert weighed("--input_dir", root, "--overwrite")[0] == 0


def test_rows_of_untrained_weights_may_be_replaced(again, weighed, root):
    assert again("--input_dir", root) == 3
    assert weighed("--input_dir", root, "--bandwidth", "3")[0] == 0


def test_a_refusal_names_the_clips_that_fail_and_why(weighed, root):
    assert weighed("--input_dir", root)[0] == 0
    (root / "train_curated" / "1.wav").write_bytes(b"")
    status, _, err = weighed("--input_dir", root)
    assert status == 2 and "3 clips -> 2 clips: rows would be lost" in err
    assert "  1.wav: empty file (0 bytes)" in err


def test_of_both_a_refusal_keeps_only_its_own_rows(weighed, make_dataset, sound, tmp_path):
    """After all clips are encoded, when it turns out that one of them fails now."""
    for stem in ("train_curated", "train_noisy"):
        clips = {f"{i}.wav": (sound(0.3, 8_000, seed=i), 8_000) for i in range(2)}
        root = make_dataset(clips, stem)
    assert weighed("--input_dir", root)[0] == 0
    (root / "train_curated" / "1.wav").write_bytes(b"")
    status, out, err = weighed("--input_dir", root, "--dataset", "both")
    assert status == 2 and "rows would be lost" in err and "tokenized_train_noisy.csv: 2" in out
    assert len((tmp_path / "out" / CSV).read_text().splitlines()) == 3


def test_both_is_refused_before_anything_is_encoded(weighed, make_dataset, sound, tmp_path):
    for stem in ("train_curated", "train_noisy"):
        root = make_dataset({"a.wav": (sound(0.3, 8_000), 8_000)}, stem)
    assert weighed("--input_dir", root, "--dataset", "noisy")[0] == 0
    assert weighed("--input_dir", root, "--dataset", "both", "--bandwidth", "3")[0] == 2
    assert not list((tmp_path / "out" / "codes_train_curated").rglob("*.npz"))


# ----------------------------------------------------------------------------------------- damage


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "encodec_24khz_6kbps_2s-0123abcd").mkdir()
    return tmp_path / "encodec_24khz_6kbps_2s-0123abcd"


@pytest.fixture
def kept():
    codes = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    return Kept(codes, codes[0], 1, [0.0, 1.8], 2.5, False, [5, 6, 7], "a" * 64, "0123abcd")


def values(kept):
    return [np.asarray(getattr(kept, field.name)).tolist() for field in fields(Kept)]


def test_what_is_kept_comes_back(kept, folder):
    for name in ("a.wav", "b/c/d.wav", "n" * 250 + ".wav"):
        write_kept(folder, name, kept)
        assert values(read_kept(folder, name)) == values(kept)
    assert read_kept(folder, "gone.wav") is None and not list(folder.glob("*.tmp"))


def test_damage_is_noticed_or_harmless(kept, folder):
    """Truncations, and a sample of the single-bit flips."""
    write_kept(folder, "a.wav", kept)
    path, noticed = kept_path(folder, "a.wav"), 0
    data = path.read_bytes()
    damaged = [data[:size] for size in range(0, len(data), 29)]
    for bit in random.Random(1).sample(range(8 * len(data)), 1000):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for bad in damaged:
        path.write_bytes(bad)
        found = read_kept(folder, "a.wav")
        assert found is None or values(found) == values(kept)
        noticed += found is None
    assert noticed > len(damaged) / 2


WRONG = {
    "no chunks": {"codes": np.zeros((0, 3, 4), np.uint16), "start_sec": []},
    "other frames": {"codes": np.zeros((2, 3, 5), np.uint16)},
    "a chunk too few": {"start_sec": [0.0]},
    "a scalar": {"start_sec": 1.0},
    "medoid out of range": {"medoid": 2},
    "no duration": {"duration_sec": float("nan")},
    "starts at NaN": {"start_sec": [0.0, float("nan")]},
    "codes too large": {"codes": np.full((2, 3, 4), 1024, np.uint16)},
    "codes of another type": {"codes": np.zeros((2, 3, 4))},
    "other settings": {"made_with": "ffffffff"},
    "no checksum": {"sha256": ""},
    "no stamp": {"stamp": [5, 6]},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_readable_file_that_cannot_be_right_is_absent(wrong, kept, folder):
    for name, value in wrong.items():
        setattr(kept, name, value)
    write_kept(folder, "a.wav", kept)
    assert read_kept(folder, "a.wav") is None
