"""Whole runs: rows against the plain reference, and what a run does where things go wrong."""

import csv
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import reference
import soundfile
import standin
from conftest import ROOT

import encodec_tokenizer
from encodec_tokenizer import BLOCK_CLIPS, MODELS


def real_shapes(sound):
    """name -> (samples, rate): lengths, rates and channels as clips of Freesound have them."""
    shapes = [
        (0.3, 44_100, 1),
        (0.31, 48_000, 2),
        (1.0, 22_050, 1),
        (2.0, 44_100, 1),
        (2.0, 48_000, 1),
        (2.01, 44_100, 2),
        (3.8, 44_100, 1),
        (4.7, 16_000, 6),
        (6.0, 44_100, 1),
        (9.3, 96_000, 1),
    ]
    return {
        f"clip_{i}.wav": (sound(s, rate, channels, seed=i), rate)
        for i, (s, rate, channels) in enumerate(shapes)
    }


def read_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def tokens_of(path):
    table = pd.read_csv(path)
    return table.filter(regex=r"^token_\d+$").to_numpy()


@pytest.mark.parametrize(
    "name, flags, target_s, overlap",
    [
        ("encodec_24khz", [], 2.0, 0.1),
        ("encodec_24khz", ["--target_duration", "1.0", "--overlap", "0.5"], 1.0, 0.5),
        ("encodec_48khz", [], 2.0, 0.1),
        ("encodec_48khz", ["--target_duration", "3.0", "--overlap", "0"], 3.0, 0.0),
    ],
)
def test_rows_equal_the_reference(
    name, flags, target_s, overlap, run, make_dataset, sound, weights, tmp_path
):
    clips = real_shapes(sound)
    root = make_dataset(clips)
    status, _, _ = run("--input_dir", root, "--model", name, *flags, weights=weights(name))
    assert status == 0
    plain = standin.plain_model(name, weights(name))
    plain.set_target_bandwidth(6.0)
    folder = root / "train_curated"
    expected = [reference.row(plain, folder / clip, target_s, overlap) for clip in clips]
    tokens = tokens_of(tmp_path / "out" / "tokenized_train_curated.csv")
    assert tokens.shape == (len(clips), expected[0].size)
    assert reference.agreement(tokens.reshape(-1, *expected[0].shape), expected) >= 0.999


def test_the_tail_of_a_long_clip_changes_its_row(run, make_dataset, sound, tmp_path, weights):
    """A well-known script of this name dropped it."""
    whole = sound(2.5)
    other = whole.copy()
    other[-4_000:] = sound(1.0, seed=9)[:4_000]
    root = make_dataset({"a.wav": (whole, 44_100), "b.wav": (other, 44_100)})
    run("--input_dir", root, weights=weights("encodec_24khz"))
    table = pd.read_csv(tmp_path / "out" / "tokenized_train_curated.csv")
    assert table["num_chunks"].tolist() == [2, 2]
    a, b = tokens_of(tmp_path / "out" / "tokenized_train_curated.csv")
    assert (a != b).any()


def test_the_model_flag_is_heeded(run, make_dataset, sound, tmp_path):
    """A well-known script of this name ignored it, and kept the first 48 kHz segment only."""
    root = make_dataset({"a.wav": (sound(1.0), 44_100)})
    out = tmp_path / "out" / "tokenized_train_curated.csv"
    for name, shape in {"encodec_24khz": "(8, 150)", "encodec_48khz": "(4, 303)"}.items():
        assert run("--input_dir", root, "--model", name, "--overwrite")[0] == 0
        assert pd.read_csv(out)["token_shape"].tolist() == [shape]
        assert json.loads(out.with_suffix(".json").read_text())["model"] == name


def test_csv_is_as_the_contract_says(run, make_dataset, sound, tmp_path):
    clips = {"b é.wav": (sound(1.5, 22_050), 22_050), "a.wav": (sound(4.0), 44_100)}
    root = make_dataset(clips, rows=[("b é.wav", "Walk,Slam"), ("a.wav", 'a "b"')])
    status, out, _ = run("--input_dir", root)
    path = tmp_path / "out" / "tokenized_train_curated.csv"
    assert status == 0
    assert f"{path}: 2 clips." in out
    data = path.read_bytes()
    assert b"\r" not in data and data.endswith(b"\n") and not data.startswith(b"\xef\xbb\xbf")
    header, first, second = read_rows(path)
    facts = ["fname", "labels", "num_tokens", "token_shape", "num_chunks", "duration_sec"]
    assert header == facts + [f"token_{i}" for i in range(1200)]
    assert first[:6] == ["b é.wav", "Walk,Slam", "1200", "(8, 150)", "1", "1.5"]
    assert second[:6] == ["a.wav", 'a "b"', "1200", "(8, 150)", "3", "4.0"]
    tokens = np.array([first[6:], second[6:]]).astype(int)
    assert tokens.min() >= 0 and tokens.max() <= 1023
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    stem = "train_curated"
    assert names == [f"summary_{stem}.txt", f"tokenized_{stem}.csv", f"tokenized_{stem}.json"]


def test_bad_clips_are_recorded_and_passed_over(run, make_dataset, sound, tmp_path):
    clips = {f"{name}.wav": (sound(0.4), 44_100) for name in "abc"}
    rows = [
        ("a.wav", "x"),
        ("missing.wav", "x"),
        ("b.wav", "x"),
        ("../up.wav", "x"),
        ("c.wav", "x"),
    ]
    root = make_dataset(clips, rows=rows)
    soundfile.write(root / "up.wav", sound(0.4), 44_100)
    (root / "train_curated" / "b.wav").write_bytes(b"")
    status, out, _ = run("--input_dir", root)
    assert status == 0 and "2 clips, 3 failed (see " in out
    failed = read_rows(tmp_path / "out" / "failed_train_curated.csv")
    assert failed == [
        ["fname", "error"],
        ["missing.wav", "no such file in train_curated/"],
        ["b.wav", "empty file (0 bytes)"],
        ["../up.wav", "the name leads outside the audio folder; not opened"],
    ]
    assert pd.read_csv(tmp_path / "out" / "tokenized_train_curated.csv")["fname"].tolist() == [
        "a.wav",
        "c.wav",
    ]
    summary = (tmp_path / "out" / "summary_train_curated.txt").read_text()
    assert "Samples processed: 2" in summary and "Failures: 3" in summary
    # Once the clips are mended, nothing failed any more.
    for name in ("missing.wav", "b.wav"):
        soundfile.write(root / "train_curated" / name, sound(0.4), 44_100)
    run("--input_dir", root, "--overwrite")
    assert len(read_rows(tmp_path / "out" / "failed_train_curated.csv")) == 2


def test_a_run_in_which_every_clip_fails_ends_with_status_1(run, make_dataset, tmp_path):
    root = make_dataset({}, rows=[("a.wav", "x"), ("b.wav", "y")])
    status, out, err = run("--input_dir", root)
    assert status == 1
    assert out == "" and "none of the 2 clips could be tokenized" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["failed_train_curated.csv"]


def test_summary_and_json_tell_what_made_the_file(run, make_dataset, sound, tmp_path, weights):
    root = make_dataset({"a.wav": (sound(1.0), 44_100), "b.wav": (sound(4.0), 44_100)})
    path = weights("encodec_24khz")
    run("--input_dir", root, "--bandwidth", "3", weights=path)
    summary = (tmp_path / "out" / "summary_train_curated.txt").read_text()
    for line in (
        "Samples processed: 2",
        "Failures: 0",
        "Average tokens per sample: 600.0",
        "Average duration: 2.50 s",
        "Total duration: 5.0 s (0.00 h)",
        "Average chunks per sample: 2.00",
        "  (4, 150): 2 rows",
        "  model: encodec_24khz",
        "  bandwidth_kbps: 3.0",
        "  device: cpu",
    ):
        assert line in summary.splitlines()
    for stage in ("loading", "resampling", "encoding", "writing"):
        assert f"  {stage}: " in summary
    assert "untrained" not in summary
    facts = json.loads((tmp_path / "out" / "tokenized_train_curated.json").read_text())
    assert facts["weights_sha256"] == encodec_tokenizer.sha256_of(path)
    assert facts["versions"]["torch"] and facts["num_clips"] == 2


def test_debug_shows_every_clip(run, make_dataset, sound):
    root = make_dataset({"a.wav": (sound(4.0, 22_050), 22_050), "b.wav": (sound(1.0), 44_100)})
    (root / "train_curated" / "b.wav").write_bytes(b"")
    _, _, err = run("--input_dir", root, "--debug")
    assert "a.wav [Label_0,Slam] 22050 Hz, 4.000 s, chunks: 3, tokens of the first: " in err
    assert "loaded in" in err and "encoded in" in err
    assert "b.wav [Label_1,Slam] FAILED: empty file (0 bytes)" in err


def test_a_break_is_one_sentence_and_with_debug_a_traceback(run, make_dataset, sound, monkeypatch):
    root = make_dataset({"a.wav": (sound(1.0), 44_100)})

    def broken_disk(path, pieces):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(encodec_tokenizer, "write_file", broken_disk)
    status, _, err = run("--input_dir", root)
    assert status == 1 and "No space left on device" in err and "Traceback" not in err
    assert "Traceback" in run("--input_dir", root, "--debug")[2]


def test_batches_stay_within_their_block(run, make_dataset, sound, monkeypatch):
    """Else what is encoded together would depend on where a run was cut."""
    seen = []
    make_batches = encodec_tokenizer.make_batches

    def watch(*args):
        for batch in make_batches(*args):
            seen.append(({clip.index // BLOCK_CLIPS for clip in batch.clips}, len(batch.clips)))
            yield batch

    monkeypatch.setattr(encodec_tokenizer, "make_batches", watch)
    clips = {f"{i}.wav": (sound(0.2, 8_000), 8_000) for i in range(BLOCK_CLIPS + 10)}
    assert run("--input_dir", make_dataset(clips), "--batch_size", "40")[0] == 0
    assert seen == [({0}, 40), ({0}, BLOCK_CLIPS - 40), ({1}, 10)]


@pytest.fixture
def big_dataset(make_dataset, sound):
    """Two and a half blocks of short clips, some of them bad."""
    clips = {
        f"{i:03d}.wav": (sound(0.2, 8_000, seed=i), 8_000) for i in range(BLOCK_CLIPS * 5 // 2)
    }
    root = make_dataset(clips)
    for i in (3, 70, 71):
        (root / "train_curated" / f"{i:03d}.wav").write_bytes(b"")
    return root


def test_an_interrupted_run_goes_on_after_its_finished_blocks(
    run, big_dataset, tmp_path, monkeypatch
):
    assert run("--input_dir", big_dataset, "--output_dir", tmp_path / "whole")[0] == 0
    write_block = encodec_tokenizer.Output.write_block
    written, kills = [], [143]

    def fail_at_second(self, index, *args):
        if index == 1 and kills:
            raise encodec_tokenizer.Interrupted(kills.pop())
        written.append(index)
        write_block(self, index, *args)

    monkeypatch.setattr(encodec_tokenizer.Output, "write_block", fail_at_second)
    status, _, err = run("--input_dir", big_dataset)
    assert status == 143 and "the same command goes on" in err
    blocks = tmp_path / "out" / "tokenized_train_curated.blocks"
    assert [p.name for p in blocks.glob("*.block")] == ["00000.block"]
    (blocks / "00001.block.tmp").write_text("torn")

    status, _, err = run("--input_dir", big_dataset)
    assert status == 0 and f"going on after {BLOCK_CLIPS} of {BLOCK_CLIPS * 5 // 2} clips" in err
    assert written == [0, 1, 2]
    assert not blocks.exists()
    for name in ("tokenized_train_curated.csv", "failed_train_curated.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_same_command_gives_the_same_bytes(run, make_dataset, sound, tmp_path, weights):
    root = make_dataset(real_shapes(sound))
    for folder, flags in {"a": [], "b": ["--workers", "5"]}.items():
        flags = [*flags, "--output_dir", tmp_path / folder]
        run("--input_dir", root, *flags, weights=weights("encodec_24khz"))
    first, second = (tmp_path / f / "tokenized_train_curated.csv" for f in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_both_makes_the_files_of_curated_and_noisy(run, make_dataset, sound, tmp_path):
    make_dataset({"a.wav": (sound(0.5), 44_100)})
    root = make_dataset({"b.wav": (sound(0.5), 44_100)}, stem="train_noisy")
    assert run("--input_dir", root, "--dataset", "both")[0] == 0
    for stem, name in {"train_curated": "a.wav", "train_noisy": "b.wav"}.items():
        table = pd.read_csv(tmp_path / "out" / f"tokenized_{stem}.csv")
        assert table["fname"].tolist() == [name]


@pytest.mark.parametrize("name", MODELS)
def test_the_script_runs_on_the_bundled_sample(name, tmp_path):
    script = ROOT / "encodec_tokenizer.py"
    args = ["--dataset", "sample", "--weights", "untrained", "--model", name, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, script, *args, "--output_dir", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING: UNTRAINED WEIGHTS" in done.stderr and "Warning:" not in done.stderr
    table = pd.read_csv(tmp_path / "tokenized_sample.csv")
    assert len(table) == 12 and (table["num_chunks"] > 1).sum() == 3
    assert table.filter(regex=r"^token_\d+$").stack().nunique() > 100
