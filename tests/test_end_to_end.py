"""Whole runs: rows against the plain reference, and what a run does where things go wrong."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import reference
import soundfile
from conftest import ROOT, main, write_dataset

import encodec_tokenizer
from encodec_tokenizer import BLOCK_CLIPS, MODELS, Clip, Dataset


def real_shapes(sound):
    """name -> (samples, rate): lengths, rates and channels as clips of Freesound have them."""
    shapes = [
        (0.3, 44_100, 1), (0.31, 48_000, 2), (1.0, 22_050, 1), (2.0, 44_100, 1), (2.0, 48_000, 1),
        (2.01, 44_100, 2), (3.8, 44_100, 1), (2.7, 16_000, 6), (5.0, 44_100, 1), (1.5, 96_000, 1),
    ]  # fmt: skip
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


STEM = "train_curated"
CSV = f"tokenized_{STEM}.csv"


@pytest.fixture(scope="session")
def real(tmp_path_factory, sound):
    """A dataset of real shapes, in Kaggle's layout."""
    return write_dataset(tmp_path_factory.mktemp("real"), real_shapes(sound), STEM)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, real, weights):
    """The CSV that a run with the defaults makes of it, at 24 kHz."""
    out = tmp_path_factory.mktemp("whole")
    flags = ["--weights", weights("encodec_24khz"), "--device", "cpu", "--output_dir", out]
    assert main("--input_dir", real, *flags) == 0
    return out / CSV


def equals_the_reference(path, model, real, count=None, target_s=2.0, overlap=0.1):
    clips = sorted((real / STEM).iterdir())[:count]
    expected = [reference.row(model, clip, target_s, overlap) for clip in clips]
    tokens = tokens_of(path)
    assert tokens.shape == (len(clips), expected[0].size)
    assert reference.agreement(tokens.reshape(-1, *expected[0].shape), expected) >= 0.999


def test_rows_equal_the_reference(whole, real, plain):
    equals_the_reference(whole, plain("encodec_24khz"), real)


@pytest.mark.parametrize(
    "name, count, target_s, overlap",
    [
        ("encodec_24khz", 7, 1.0, 0.5),  # the clips up to 3.8 s
        ("encodec_48khz", 10, 2.0, 0.1),
        ("encodec_48khz", 7, 3.0, 0.0),
    ],
)
def test_rows_equal_the_reference_at_other_settings(
    name, count, target_s, overlap, run, real, weights, plain, tmp_path
):
    flags = ["--model", name, "--target_duration", target_s, "--overlap", overlap]
    flags += ["--max_samples", count]
    assert run("--input_dir", real, *flags, weights=weights(name))[0] == 0
    equals_the_reference(tmp_path / "out" / CSV, plain(name), real, count, target_s, overlap)


@pytest.mark.parametrize("threads, workers", [(1, 1), (3, 5)])
def test_the_same_command_gives_the_same_bytes(
    threads, workers, run, real, whole, weights, tmp_path, monkeypatch
):
    """Whatever the number of cores, and of threads that read ahead."""
    monkeypatch.setattr(encodec_tokenizer, "THREADS", threads)
    flags = ["--input_dir", real, "--workers", workers]
    assert run(*flags, weights=weights("encodec_24khz"))[0] == 0
    assert (tmp_path / "out" / CSV).read_bytes() == whole.read_bytes()


def test_the_rows_of_a_trial_are_those_of_the_full_run(run, real, whole, weights, tmp_path):
    flags = ["--input_dir", real, "--max_samples", 6]
    assert run(*flags, weights=weights("encodec_24khz"))[0] == 0
    lines = (tmp_path / "out" / CSV).read_bytes().splitlines()
    assert lines == whole.read_bytes().splitlines()[:7]


def test_the_tail_of_a_long_clip_changes_its_row(run, make_dataset, sound, tmp_path, weights):
    """A well-known script of this name dropped it."""
    whole = sound(2.5)
    other = whole.copy()
    other[-4_000:] = sound(1.0, seed=9)[:4_000]
    root = make_dataset({"a.wav": (whole, 44_100), "b.wav": (other, 44_100)})
    run("--input_dir", root, weights=weights("encodec_24khz"))
    table = pd.read_csv(tmp_path / "out" / "tokenized_train_curated.csv")
    assert table["num_chunks"].tolist() == [2, 2]
    a, b = tokens_of(tmp_path / "out" / CSV)
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
    assert out.startswith(f"{path}: 2 clips: 2 tokenized. Summary: ")
    data = path.read_bytes()
    assert b"\r" not in data and data.endswith(b"\n") and not data.startswith(b"\xef\xbb\xbf")
    header, first, second = read_rows(path)
    facts = ["fname", "labels", "num_tokens", "token_shape", "num_chunks", "duration_sec"]
    assert header == facts + [f"token_{i}" for i in range(1200)]
    assert first[:6] == ["b é.wav", "Walk,Slam", "1200", "(8, 150)", "1", "1.5"]
    assert second[:6] == ["a.wav", 'a "b"', "1200", "(8, 150)", "3", "4.0"]
    tokens = np.array([first[6:], second[6:]]).astype(int)
    assert tokens.min() >= 0 and tokens.max() <= 1023
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    tokenized = [f"tokenized_{STEM}.{kind}" for kind in ("blocks", "csv", "json")]
    assert names == [f"summary_{STEM}.txt", *tokenized]
    (block,) = (tmp_path / "out" / tokenized[0]).iterdir()
    assert re.fullmatch(r"00000-[0-9a-f]{16}\.npz", block.name)


def test_bad_clips_are_recorded_and_passed_over(run, make_dataset, sound, tmp_path):
    clips = {f"{name}.wav": (sound(0.4), 44_100) for name in "abc"}
    names = ["a.wav", "missing.wav", "b.wav", "../up.wav", "c.wav"]
    root = make_dataset(clips, rows=[(name, "x") for name in names])
    soundfile.write(root / "up.wav", sound(0.4), 44_100)
    (root / STEM / "b.wav").write_bytes(b"")
    status, out, _ = run("--input_dir", root)
    assert status == 0 and "5 clips: 2 tokenized, 3 failed (see " in out
    assert read_rows(tmp_path / "out" / f"failed_{STEM}.csv") == [
        ["fname", "error"],
        ["missing.wav", f"no such file: {root / STEM / 'missing.wav'}"],
        ["b.wav", "empty file (0 bytes)"],
        ["../up.wav", "the name leads outside the audio folder; not opened"],
    ]
    assert pd.read_csv(tmp_path / "out" / CSV)["fname"].tolist() == ["a.wav", "c.wav"]
    summary = (tmp_path / "out" / f"summary_{STEM}.txt").read_text()
    assert "Samples processed: 2" in summary and f"Failures: 3 (see failed_{STEM}.csv)" in summary


def test_a_run_in_which_every_clip_fails_ends_with_status_1(run, make_dataset, tmp_path):
    root = make_dataset({"c.wav": (np.zeros(0), 8_000)}, rows=[("a.wav", "x"), ("b.wav", "y")])
    for _ in range(2):  # it is not finished
        status, out, err = run("--input_dir", root)
        assert status == 1
        assert out == "" and "none of the 2 clips could be tokenized" in err
        assert len(read_rows(tmp_path / "out" / f"failed_{STEM}.csv")) == 3
        assert not (tmp_path / "out" / CSV).exists()
        assert not (tmp_path / "out" / f"summary_{STEM}.txt").exists()


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
        "  bandwidth: 3.0",
        f"  device: {encodec_tokenizer.processor('cpu')}",
    ):
        assert line in summary.splitlines()
    for stage in ("loading and resampling", "encoding"):
        assert re.search(rf"^  {stage}: \d+\.\d\d$", summary, re.MULTILINE)
    assert "untrained" not in summary
    facts = json.loads((tmp_path / "out" / "tokenized_train_curated.json").read_text())
    for flag in ("model", "bandwidth", "target_duration", "overlap", "aggregate", "max_duration"):
        assert facts[flag] == getattr(encodec_tokenizer.parse_settings(["--bandwidth", "3"]), flag)
    assert re.fullmatch("[0-9a-f]{64}", facts["weights"]) and facts["weights_file"] == path.name
    assert facts["versions"]["torch"] == encodec_tokenizer.version("torch")
    assert facts["versions"]["script"] == encodec_tokenizer.__version__
    assert (facts["num_clips"], facts["tokenized"], facts["failed"]) == (2, 2, 0)
    assert [clip[0] for clip in facts["clips"]] == ["a.wav", "b.wav"]
    assert len(facts["codes_in_use"]) == len(facts["perplexity"]) == 4 and facts["machine"]


def test_debug_shows_every_clip(run, make_dataset, sound, tmp_path):
    root = make_dataset({"a.wav": (sound(4.0, 22_050), 22_050), "b.wav": (sound(1.0), 44_100)})
    (root / "train_curated" / "b.wav").write_bytes(b"")
    _, _, err = run("--input_dir", root, "--debug", "--aggregate", "none")
    middle = tokens_of(tmp_path / "out" / CSV)[1].reshape(8, 150)[0, 75:83]  # of the middle chunk
    codes = " ".join(map(str, middle))
    assert (
        "a.wav [Label_0,Slam] 22050 Hz, 4.000 s, chunks: 3, "
        f"codes of the first codebook from the middle: {codes} ..., loaded in "
    ) in err
    assert "(its share of its batches)" in err
    assert "b.wav [Label_1,Slam] FAILED: empty file (0 bytes)" in err


def test_a_break_is_one_sentence_and_with_debug_a_traceback(run, make_dataset, sound, monkeypatch):
    root = make_dataset({"a.wav": (sound(1.0), 44_100)})

    def broken_disk(block):
        raise OSError(28, "No space left on device", str(block.path))

    monkeypatch.setattr(encodec_tokenizer, "write_block", broken_disk)
    status, _, err = run("--input_dir", root)
    assert status == 1 and "No space left on device" in err and "Traceback" not in err
    assert "0 of 1 clips are kept; the same command resumes there" in err
    assert "Traceback" in run("--input_dir", root, "--debug")[2]


@pytest.mark.parametrize("rank, sizes", [(0, [12, 4, 10]), (1, [10, 12, 4])])
def test_batches_stay_within_their_block(rank, sizes, run, make_dataset, sound, monkeypatch):
    """Else what is encoded together would depend on where a run was cut, and by whom."""
    seen = []
    codes = encodec_tokenizer.Encoder.codes

    def watch(self, convolved):
        seen.append(len(convolved))
        return codes(self, convolved)

    monkeypatch.setattr(encodec_tokenizer.Encoder, "codes", watch)
    monkeypatch.setattr(encodec_tokenizer, "THREADS", 1)  # so that they come in order
    monkeypatch.setattr(encodec_tokenizer, "RANK", rank)
    monkeypatch.setattr(encodec_tokenizer, "WORLD_SIZE", 2)
    clips = {f"{i}.wav": (sound(0.2, 8_000), 8_000) for i in range(BLOCK_CLIPS + 10)}
    flags = ["--batch_size", "12", "--target_duration", "0.2"]
    assert run("--input_dir", make_dataset(clips), *flags)[0] == 0
    assert seen == sizes


def test_both_makes_the_files_of_curated_and_noisy(run, make_dataset, sound, tmp_path):
    make_dataset({"a.wav": (sound(0.5), 44_100)})
    root = make_dataset({"b.wav": (sound(0.5), 44_100)}, stem="train_noisy")
    assert run("--input_dir", root, "--dataset", "both")[0] == 0
    for stem, name in {"train_curated": "a.wav", "train_noisy": "b.wav"}.items():
        table = pd.read_csv(tmp_path / "out" / f"tokenized_{stem}.csv")
        assert table["fname"].tolist() == [name]


PROBE = """
import atexit, multiprocessing, os, socket, sys

multiprocessing.set_start_method("spawn")  # as on macOS; what a run leaves over is told then

def refuse(self, address):
    with open(os.environ["PROBE"], "a") as file:
        print("connection", address, file=file)
    raise OSError("no network here")

socket.socket.connect = socket.socket.connect_ex = refuse

def report():
    late = {"matplotlib", "pyarrow", "safetensors"} & set(sys.modules)
    with open(os.environ["PROBE"], "a") as file:
        print("exit", *sorted(late), file=file)

def leave(status, at_once=os._exit):
    report()
    at_once(status)

atexit.register(report)
os._exit = leave
"""


LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d %s: 12 of 12 clips, .*17 chunks, \d+ s of audio/s, 0 failed"


@pytest.mark.parametrize("name", MODELS)
def test_the_script_runs_on_the_bundled_sample(name, weights, tmp_path):
    """As a user would run it: in an empty HOME, on one core, its stderr in a log file.

    It opens no connection, writes nothing into HOME, and imports no package that it does not use.
    """
    (tmp_path / "home").mkdir()
    (tmp_path / "sitecustomize.py").write_text(PROBE)
    args = ["--dataset", "sample", "--model", name, "--device", "cpu"]
    args += ["--weights", weights(name), "--output_dir", tmp_path / "out"]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(tmp_path), "PROBE": str(tmp_path / "probe")}
    command = [sys.executable, ROOT / "encodec_tokenizer.py", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    log = done.stderr
    assert done.returncode == 0, log
    assert "Warning:" not in log and "UNTRAINED" not in log
    assert "\r" not in log and "\x1b" not in log and "%|" not in log  # lines, and no bar
    assert re.fullmatch(LINE % "sample", log.splitlines()[-1])
    table = pd.read_csv(tmp_path / "out" / "tokenized_sample.csv")
    assert len(table) == 12 and (table["num_chunks"] > 1).sum() == 3
    assert table.filter(regex=r"^token_\d+$").stack().nunique() > 100
    assert (tmp_path / "probe").read_text() == "exit\n"
    assert list((tmp_path / "home").rglob("*")) == []


def test_untrained_weights_are_told_loudly(run, tmp_path):
    status, _, err = run("--dataset", "sample", "--max_samples", "1")
    assert status == 0 and "WARNING: UNTRAINED WEIGHTS" in err
    assert "WARNING: untrained weights" in (tmp_path / "out/summary_sample.txt").read_text()


NOTEBOOK = """
import io, runpy, sys, types

class OutStream(io.TextIOBase):
    def __init__(self, stream):
        self.write, self.flush = stream.write, stream.flush

sys.modules["IPython"] = types.ModuleType("IPython")
sys.stdout, sys.stderr = OutStream(sys.stdout), OutStream(sys.stderr)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("goes on after status", stop.code)
"""


def test_a_notebook_can_run_it_and_goes_on(tmp_path):
    """With %run, in IPython's process, whose streams have their own kind."""
    flags = ["--dataset", "sample", "--max_samples", "1", "--weights", "untrained"]
    command = f"import sys; sys.argv = {[str(ROOT / 'encodec_tokenizer.py'), *flags]}" + NOTEBOOK
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, cwd=tmp_path
    )
    assert "1 clips: 1 tokenized. Summary" in done.stdout, done.stderr
    assert "goes on after status 0" in done.stdout


def test_of_many_processes_a_line_names_its_rank(monkeypatch, capfd):
    monkeypatch.setattr(encodec_tokenizer, "RANK", 3)
    monkeypatch.setattr(encodec_tokenizer, "WORLD_SIZE", 4)
    clips = [Clip(f"{i}.wav", starts=[0, 1] if i < 5 else [0]) for i in range(12)]
    settings = encodec_tokenizer.parse_settings(["--device", "cpu"])
    job = SimpleNamespace(settings=settings, dataset=Dataset("sample", Path(), (), clips))
    progress = encodec_tokenizer.Progress(job, 0)
    for clip in clips:
        progress.update(clip)
    progress.bar.close()
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(LINE % r"sample \[rank 3\]", last)
