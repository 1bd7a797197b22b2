"""A block's name: everything that decides its bytes changes it, and nothing else does."""

import errno
import os
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import encodec_tokenizer
from encodec_tokenizer import (
    NO_FILE,
    Clip,
    Dataset,
    Job,
    Settings,
    locate,
    read_block,
    read_stamp,
    write_block,
)

DECIDING = {
    "model": "encodec_48khz",
    "bandwidth": 3.0,
    "target_duration": 1.0,
    "overlap": 0.2,
    "whole": True,
    "aggregate": "none",
    "batch_size": 8,
    "max_duration": 10.0,
}


@pytest.fixture
def name_of(tmp_path):
    """name_of(settings, ...): the name of the block of two clips, whose files are made once."""
    for i, name in enumerate(("a.wav", "b.wav")):
        (tmp_path / name).write_bytes(b"x" * (i + 1))
        os.utime(tmp_path / name, (1_000_000_000 + i,) * 2)
    ours = Settings(device="cpu", batch_size=4, output_dir=tmp_path / "out")

    def name(digest="digest", clips=("a.wav", "b.wav"), labels="", extra=(), **changed):
        clips = [Clip(fname, labels, extra) for fname in clips]
        dataset = Dataset("x", tmp_path, (), clips)
        job = Job(replace(ours, **changed), dataset, digest)
        return job.blocks[0].path.name

    return name


def test_all_deciding_settings_are_tried_below():
    deciding = {f.name for f in fields(Settings) if f.metadata["decides"]}
    assert deciding == set(DECIDING)


@pytest.mark.parametrize("setting", DECIDING)
def test_a_setting_that_decides_codes_changes_the_name(setting, name_of):
    assert name_of() != name_of(**{setting: DECIDING[setting]})


@pytest.mark.parametrize("setting", ["target_duration", "overlap", "aggregate"])
def test_whole_clips_do_not_depend_on_how_chunks_are_cut(setting, name_of):
    assert name_of(whole=True) == name_of(whole=True, **{setting: DECIDING[setting]})


def test_settings_that_decide_nothing_do_not_change_the_name(name_of, tmp_path):
    others = {"dataset": "noisy", "input_dir": tmp_path, "output_dir": tmp_path / "elsewhere"}
    others |= {"metadata": tmp_path / "a.csv", "audio_dir": tmp_path, "weights": "elsewhere.th"}
    others |= {"workers": 7, "max_samples": 9, "plot": "", "parquet": True}
    others |= {"overwrite": True, "debug": True}
    deciding = {*DECIDING, "device"}  # of the device, its kind: see below
    assert {f.name for f in fields(Settings)} == deciding | set(others)
    for setting, value in others.items():
        assert name_of() == name_of(**{setting: value}), setting


def test_labels_and_further_columns_do_not_change_the_name(name_of):
    assert name_of() == name_of(labels="Bark") == name_of(extra=("1",))


def test_the_weights_digest_changes_the_name(name_of):
    assert name_of() != name_of(digest="another")


def test_the_kind_of_processor_changes_the_name(name_of, monkeypatch):
    names = []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)  # noqa: B023
        names.append(name_of())
    for gpu in ("H100", "T4"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)  # noqa: B023
        names.append(name_of(device="cuda:0"))
        assert name_of(device="cuda:1") == names[-1]
    assert len(set(names)) == 4


@pytest.mark.parametrize("package", [*encodec_tokenizer.PACKAGES, "script", "libsndfile"])
def test_each_version_changes_the_name(package, name_of, monkeypatch):
    before = name_of()
    if package == "script":
        monkeypatch.setattr(encodec_tokenizer, "__version__", "0")
    elif package == "libsndfile":
        monkeypatch.setattr(encodec_tokenizer.sf, "__libsndfile_version__", "0")
    else:
        version = encodec_tokenizer.version
        monkeypatch.setattr(
            encodec_tokenizer, "version", lambda name: "0" if name == package else version(name)
        )
    assert name_of() != before


def test_a_clips_name_and_its_place_change_the_name(name_of, tmp_path):
    before = name_of()
    (tmp_path / "a.wav").rename(tmp_path / "c.wav")
    assert len({before, name_of(clips=("c.wav", "b.wav")), name_of(clips=("b.wav", "c.wav"))}) == 3


def test_a_files_size_time_readability_and_absence_change_the_name(name_of, tmp_path, monkeypatch):
    path, names = tmp_path / "a.wav", [name_of()]
    os.utime(path, (1_000_000_001,) * 2)
    names.append(name_of())
    path.write_bytes(b"more")
    os.utime(path, (1_000_000_000,) * 2)
    names.append(name_of())
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_, **__: False)
        names.append(name_of())
    path.unlink()
    names.append(name_of())
    assert len(set(names)) == len(names)


def test_a_fraction_of_a_second_does_not_change_the_name(name_of, tmp_path):
    """tar and zip drop it."""
    before = name_of()
    os.utime(tmp_path / "a.wav", ns=(0, 1_000_000_000 * 10**9 + 999_999_999))
    assert name_of() == before


def test_the_place_among_the_blocks_is_part_of_the_name(tmp_path):
    clips = [Clip(f"{i % 16}.wav") for i in range(40)]  # two equal blocks and a partial one
    settings = Settings(device="cpu", batch_size=4, output_dir=tmp_path)
    job = Job(settings, Dataset("x", tmp_path, (), clips), "digest")
    names = [block.path.name for block in job.blocks]
    assert [name[:6] for name in names] == ["00000-", "00001-", "00002-"]
    assert names[0][6:] == names[1][6:] != names[2][6:]
    assert [i for i, clip in enumerate(clips) if clip.ends_block] == [15, 31, 39]


# ------------------------------------------------------------------------- a clip's file, its stamp


@pytest.fixture
def folder(tmp_path):
    for name in ("plain.wav", "64760.wav", "deep/er/one.wav", "x/two.wav", "y/two.wav", "x/3.flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    return tmp_path


@pytest.mark.parametrize(
    "fname, found",
    [
        ("plain.wav", "plain.wav"),
        ("64760", "64760.wav"),
        ("x/two.wav", "x/two.wav"),
        ("one.wav", "deep/er/one.wav"),
        ("one", "deep/er/one.wav"),
        ("3", "x/3.flac"),
    ],
)
def test_a_name_finds_its_file(fname, found, folder):
    """With its path or bare, with its extension or without."""
    path, stamp = locate(Dataset("x", folder, (), []), fname)
    assert path == folder / found and stamp == read_stamp(path) and stamp.startswith("5 ")


@pytest.mark.parametrize(
    "fname, path, reason",
    [
        ("two.wav", None, "lies in several folders: x/two.wav, y/two.wav"),
        ("two", None, "lies in several folders: x/two.wav, y/two.wav"),
        ("gone.wav", "gone.wav", NO_FILE),
        ("plain.wav/inside.wav", "plain.wav/inside.wav", NO_FILE),
        ("deep", "deep", "not a plain file"),
        ("n" * 300, "n" * 300, "cannot be opened: File name too long"),
        ("", None, "the name is empty"),
        ("a\0b", None, "the name holds a NUL character"),
        *((name, None, "leads outside") for name in ("/etc/x", "../x", "a\\..\\x", "c:x", "\\x")),
    ],
)
def test_a_name_without_a_file_says_why(fname, path, reason, folder):
    found, stamp = locate(Dataset("x", folder, (), []), fname)
    assert found == (path and folder / path) and reason in stamp


def test_the_machines_faults_are_no_stamp(tmp_path, monkeypatch):
    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "stat", broken)
    with pytest.raises(OSError, match="Input/output error"):
        read_stamp(tmp_path)


# --------------------------------------------------------------------------------- what it holds


def test_a_block_gives_back_what_was_written(tmp_path):
    """Codes of several shapes, a failed clip, and counts of the chunks' codes."""
    clips = [Clip(f"{i}.wav", labels=f"label {i}") for i in range(3)]
    settings = Settings(device="cpu", batch_size=4, output_dir=tmp_path)
    job = Job(settings, Dataset("x", tmp_path, (), clips), "digest")
    rng = np.random.default_rng(0)
    for clip, shape in zip((clips[0], clips[2]), ((1, 8, 150), (3, 8, 7))):
        clip.codes = clip.rows = rng.integers(0, 1024, shape)
        clip.starts, clip.duration_s, clip.silent = [0] * shape[0], 1.25, True
    clips[1].error = "no such file"
    (block,) = job.blocks
    block.path.parent.mkdir()
    write_block(block)
    found, counts = read_block(block)
    assert [clip.error for clip in found] == ["", "no such file", ""]
    assert [clip.num_chunks for clip in found] == [1, 0, 3]
    assert [clip.labels for clip in found] == ["label 0", "label 1", "label 2"]
    assert found[0].duration_s == 1.25 and found[0].silent and not found[1].silent
    for clip, kept in zip(clips, found):
        assert len(kept.rows) == 0 if clip.error else np.array_equal(kept.rows, clip.rows)
    first = np.concatenate([clip.codes[:, 0].ravel() for clip in (clips[0], clips[2])])
    assert counts.shape == (8, 1024)
    assert np.array_equal(counts[0], np.bincount(first, minlength=1024))
