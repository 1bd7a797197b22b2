"""Stored codes: when they are used again, what is refused, what a damaged file does."""

import errno
import io
import json
import os
import re
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

import encodec_tokenizer
from encodec_tokenizer import StoredCodes, codes_path, read_codes, write_codes

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


def kept_names(folder):
    """The files of codes below an output folder, without the settings' folder."""
    return sorted("/".join(path.relative_to(folder).parts[2:]) for path in folder.rglob("*.npz"))


@pytest.mark.parametrize("order", [1, -1])
def test_rows_of_one_name_are_encoded_once(order, again, root, tmp_path):
    """Each other spelling has codes of its own, so the order of rows makes no difference."""
    rows = ["0.wav,x", "./0.wav,y", "0,z", "1.wav,x"]
    edit(root, lambda _: rows[::order])
    assert again("--input_dir", root) == 4  # rows
    assert kept_names(tmp_path / "out") == ["0.npz", "0.wav.npz", "1.wav.npz"]
    table = pd.read_csv(tmp_path / "out" / CSV, index_col="fname")
    tokens = table.filter(regex=r"^token_").T
    assert (tokens["0.wav"] == tokens["./0.wav"]).all() and (tokens["0.wav"] == tokens["0"]).all()
    assert (tokens["0.wav"] != tokens["1.wav"]).any()
    edit(root, lambda _: rows[::-order])
    assert again("--input_dir", root) == 0


class EqualTimes:
    """What os.stat says of files that Linux has stamped within the same 4 ms."""

    def __init__(self, status):
        self.status = status

    def __getattr__(self, name):
        return 1 if name in ("st_mtime_ns", "st_ctime_ns") else getattr(self.status, name)


def test_swapped_folders_of_equal_times_are_told_apart(again, sound, tmp_path, monkeypatch):
    for i, kind in enumerate(("cat", "dog")):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        soundfile.write(tmp_path / "pets" / kind / "0.wav", sound(0.3, 8_000, seed=i), 8_000)
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: EqualTimes(stat(*args, **kwargs)))
    assert again("--audio_dir", tmp_path / "pets") == 2
    (tmp_path / "pets" / "cat").rename(tmp_path / "x")
    (tmp_path / "pets" / "dog").rename(tmp_path / "pets" / "cat")
    (tmp_path / "x").rename(tmp_path / "pets" / "dog")
    assert again("--audio_dir", tmp_path / "pets") == 2
    assert again("--audio_dir", tmp_path / "pets", "--output_dir", tmp_path / "fresh") == 2
    csvs = [tmp_path / out / "tokenized_pets.csv" for out in ("out", "fresh")]
    assert csvs[0].read_bytes() == csvs[1].read_bytes()


def test_kept_codes_win_over_guessing_what_a_name_means(run, root, sound, tmp_path):
    """Files in deeper folders come and go; only one with the row's own path is encoded anew."""
    audio, flags = root / "train_curated", ("--input_dir", root, "--target_duration", "0.5")
    edit(root, lambda rows: ["0.wav,x"])
    for folder in ("a/backup", "moved"):
        (audio / folder).mkdir(parents=True)
    (audio / "0.wav").rename(audio / "a" / "0.wav")
    assert run(*flags)[0] == 0
    first, codes = (tmp_path / "out" / CSV).read_bytes(), list((tmp_path / "out").rglob("*.npz"))
    other = partial(soundfile.write, data=sound(0.2, 8_000, seed=7), samplerate=8_000)
    steps = {  # what happens -> what is said of files that are gone
        "another file fits": (partial(other, audio / "a" / "backup" / "0.wav"), ""),
        "a third fits better": (partial(other, audio / "b.wav"), ""),
        "the first is gone": ((audio / "a" / "0.wav").unlink, "their codes are still there"),
        "all are gone": ((audio / "a" / "backup" / "0.wav").unlink, "their codes are still there"),
    }
    for step, says in steps.values():
        step()
        status, out, err = run(*flags)
        assert status == 0 and "(0 encoded now, 1 already there)" in out and says in err
        assert ("gone" in err) == bool(says)
        assert (tmp_path / "out" / CSV).read_bytes() == first and codes[0].exists()
    other(audio / "0.wav")
    assert "(1 encoded now" in run(*flags)[1]
    assert (tmp_path / "out" / CSV).read_bytes() != first


def test_another_folder_has_its_own_files_by_the_same_names(run, sound, tmp_path):
    """Also where they have other paths; a moved folder is the same one."""
    (tmp_path / "mine.csv").write_text("fname\n0\n")
    for i, name in enumerate(("A/x/0.wav", "B/y/0.flac")):
        (tmp_path / name).parent.mkdir(parents=True)
        soundfile.write(tmp_path / name, sound(0.3, 8_000, seed=i), 8_000)
    flags = ("--metadata", tmp_path / "mine.csv", "--target_duration", "0.5", "--overwrite")
    assert "(1 encoded now" in run(*flags, "--audio_dir", tmp_path / "A")[1]
    assert "(1 encoded now" in run(*flags, "--audio_dir", tmp_path / "B")[1]
    (tmp_path / "B").rename(tmp_path / "moved")
    (tmp_path / "moved" / "y" / "0.flac").unlink()
    shutil.copy(tmp_path / "A" / "x" / "0.wav", tmp_path / "moved" / "0.wav")
    _, out, err = run(*flags, "--audio_dir", tmp_path / "moved")
    assert "(0 encoded now" in out and "their codes are still there" in err


def test_codes_written_during_a_comparison_are_not_removed(again, root, tmp_path, monkeypatch):
    """By another process, which has encoded the new content."""
    assert again("--input_dir", root) == 3
    shutil.copy(root / "train_curated" / "1.wav", root / "train_curated" / "0.wav")
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    assert again("--input_dir", root) == 1
    (new,) = (tmp_path / "out").rglob("0.wav.npz")
    (old,) = (tmp_path / "before").rglob("0.wav.npz")
    content = new.read_bytes()
    sha256_of = encodec_tokenizer.sha256_of

    def compare(path):
        new.write_bytes(content)
        return sha256_of(path)

    new.write_bytes(old.read_bytes())
    monkeypatch.setattr(encodec_tokenizer, "sha256_of", compare)
    assert again("--input_dir", root) == 0 and new.read_bytes() == content


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
    monkeypatch.setattr(encodec_tokenizer, "codes_path", lambda folder, name: folder / "same.npz")
    status, _, err = run("--input_dir", root, "--workers", "1")
    assert status == 1 and "takes two names for one (Kick.wav, kick.wav)" in err
    assert not (tmp_path / "out" / CSV).exists()


def test_a_name_that_cannot_be_kept_fails_alone(run, root, tmp_path):
    (folder,) = codes_folders(run, root, tmp_path)
    (folder / "1.wav.npz").unlink()
    (folder / "1.wav.npz").mkdir()
    (folder / "1.wav.npz" / "mine").touch()
    status, out, _ = run("--input_dir", root, "--target_duration", "0.5", "--overwrite")
    assert status == 0 and "2 clips tokenized (0 encoded now, 2 already there), 1 failed" in out
    failed = pd.read_csv(tmp_path / "out" / "failed_train_curated.csv")
    assert failed["fname"].tolist() == ["1.wav"] and "cannot be stored" in failed["error"][0]
    assert not list(folder.glob("*.tmp"))


def codes_folders(run, root, tmp_path):
    assert run("--input_dir", root, "--target_duration", "0.5")[0] == 0
    return list((tmp_path / "out" / "codes_train_curated").iterdir())


OURS = f"{0:032x}.tmp"
LEFT = {  # name below the folder of codes -> (days ago, is removed)
    OURS: (2, True),
    f"{1:032x}.tmp": (0, False),
    "x.tmp": (2, False),
    "drums.tmp/": (2, False),
    f"{2:032x}.tmp/": (2, False),
    f"drums/{OURS}": (2, False),
}


def test_only_old_temporary_files_of_ours_are_removed(run, root, tmp_path):
    (codes,) = codes_folders(run, root, tmp_path)
    there = {}
    for name, (days, removed) in LEFT.items():
        path = codes / name
        (path if name.endswith("/") else path.parent).mkdir(exist_ok=True)
        if not name.endswith("/"):
            path.touch()
        os.utime(path, (time.time() - days * 90_000,) * 2)
        there[path] = not removed
    assert run("--input_dir", root, "--target_duration", "0.5")[0] == 0
    assert {path: path.exists() for path in there} == there


def test_only_old_folders_of_ours_are_removed(run, root, tmp_path):
    out = tmp_path / "out"
    ours, drafts = out / f".unfinished-{'0a' * 16}", out / ".unfinished-drafts"
    for path in (ours, drafts):
        path.mkdir(parents=True)
        os.utime(path, (time.time() - 90_000,) * 2)
    assert run("--input_dir", root, "--target_duration", "0.5")[0] == 0
    assert [path.exists() for path in (ours, drafts)] == [False, True]


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
def stored():
    codes = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    arrays = {
        "codes": codes,
        "mean_latent_codes": codes[0],
        "medoid": 1,
        "start_sec": np.array([0.0, 1.8]),
    }
    return StoredCodes(
        file="a.wav",
        folder=4,
        stamp=[5, 6, 7, 8],
        sha256="a" * 64,
        duration_sec=2.5,
        silent=False,
        num_chunks=2,
        made_with="0123abcd",
        arrays=arrays,
    )


def test_what_is_kept_comes_back(stored, folder):
    many = np.zeros((70_000, 1, 1), np.uint16)  # a zip's comment has at most 65,535 bytes
    long = replace(stored, arrays=stored.arrays | {"codes": many, "start_sec": np.arange(70_000.0)})
    names = {"a.wav": stored, "b/c/d.wav": stored, "n" * 250 + ".wav": stored, "long.wav": long}
    for name, written in names.items():
        write_codes(folder, name, written)
        found = read_codes(folder, name)
        assert found == stored == read_codes(folder, name, with_arrays=False)
        for array in written.arrays:
            assert np.array_equal(getattr(found, array), getattr(written, array))
        assert np.array_equal(np.load(codes_path(folder, name))["codes"], written.codes)
    assert read_codes(folder, "gone.wav") is None and not list(folder.glob("*.tmp"))


def test_any_damage_counts_as_absent(stored, folder):
    """Truncations, all flips of a bit, bytes behind the end, and numpy's own file."""
    write_codes(folder, "a.wav", stored)
    path = codes_path(folder, "a.wav")
    data = path.read_bytes()
    damaged = [data[:size] for size in range(0, len(data), 29)]
    damaged += [data + b"x", data + data, bytes(len(data))]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(flipped)
    for bad in damaged:
        path.write_bytes(bad)
        assert read_codes(folder, "a.wav") is None
    np.savez(path, **stored.arrays)
    assert read_codes(folder, "a.wav") is None


def test_codes_of_other_settings_or_versions_count_as_absent(stored, folder, monkeypatch):
    write_codes(folder, "a.wav", replace(stored, made_with="ffffffff"))
    assert read_codes(folder, "a.wav") is None
    monkeypatch.setattr(encodec_tokenizer, "FACTS", encodec_tokenizer.FACTS[:-1])
    write_codes(folder, "a.wav", stored)
    assert read_codes(folder, "a.wav") is None


def test_a_disk_that_only_appends_keeps_codes(stored, folder, monkeypatch):
    class AppendOnly(io.FileIO):
        def seek(self, *_):
            raise OSError(errno.ENOTSUP, "Operation not supported")

        tell = seekable = truncate = seek

    writes = []

    def append_only(file, mode="r", *args, **kwargs):
        if "w" not in mode:
            return path_open(file, mode, *args, **kwargs)
        opened = AppendOnly(file, mode)
        writes.append(file)
        return opened

    path_open = Path.open
    monkeypatch.setattr(Path, "open", append_only)
    write_codes(folder, "a.wav", stored)
    assert read_codes(folder, "a.wav") == stored and len(writes) == 1
