"""Whole runs: rows against the plain reference, and what a run does where things go wrong."""

import csv
import errno
import json
import os
import re
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import reference
import soundfile
from conftest import ROOT, write_dataset

import encodec_tokenizer
from encodec_tokenizer import Settings


def read_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def tokens_of(path):
    table = pd.read_csv(path)
    return table.filter(regex=r"^token_\d+$").to_numpy()


STEM = "train_curated"
CSV = f"tokenized_{STEM}.csv"


SHAPES = [  # seconds, Hz, channels, as clips of Freesound have them
    (0.3, 44_100, 1), (0.31, 48_000, 2), (1.0, 22_050, 1), (2.0, 44_100, 1), (2.0, 48_000, 1),
    (2.01, 44_100, 2), (3.8, 44_100, 1), (2.7, 16_000, 6), (5.0, 44_100, 1), (1.5, 96_000, 1),
]  # fmt: skip


@pytest.fixture(scope="session")
def real(tmp_path_factory, sound):
    """A dataset of real shapes, in Kaggle's layout."""
    clips = {
        f"clip_{i}.wav": (sound(seconds, rate, channels, seed=i), rate)
        for i, (seconds, rate, channels) in enumerate(SHAPES)
    }
    return write_dataset(tmp_path_factory.mktemp("real"), clips, STEM)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, real, weights):
    """The CSV that a run with the defaults makes of it, at 24 kHz."""
    out = tmp_path_factory.mktemp("whole")
    settings = Settings(
        input_dir=real, output_dir=out, weights=weights("encodec_24khz"), device="cpu"
    )
    assert encodec_tokenizer.main(settings=settings) == 0
    return out / CSV


@pytest.mark.parametrize(
    "name, count, target_s, overlap",
    [("encodec_24khz", 10, 2.0, 0.1), ("encodec_48khz", 7, 1.0, 0.5)],
)
def test_rows_equal_the_reference(
    name, count, target_s, overlap, run, real, weights, plain, tmp_path
):
    flags = ["--model", name, "--target_duration", target_s, "--overlap", overlap]
    flags += ["--max_samples", count, "--input_dir", real]
    assert run(*flags, weights=weights(name))[0] == 0
    clips = sorted((real / STEM).iterdir())[:count]
    expected = [reference.row(plain(name), clip, target_s, overlap) for clip in clips]
    tokens = tokens_of(tmp_path / "out" / CSV)
    assert tokens.shape == (len(clips), expected[0].size)
    assert reference.agreement(tokens.reshape(-1, *expected[0].shape), expected) >= 0.999


def test_the_same_command_gives_the_same_bytes(run, real, whole, weights, tmp_path, monkeypatch):
    """Whatever the number of cores, and of threads that read ahead."""
    monkeypatch.setattr(encodec_tokenizer.CpuEncoder, "threads", 3)
    flags = ["--input_dir", real, "--workers", 5]
    assert run(*flags, weights=weights("encodec_24khz"))[0] == 0
    assert (tmp_path / "out" / CSV).read_bytes() == whole.read_bytes()


def test_csv_is_as_the_contract_says(run, make_dataset, sound, tmp_path):
    clips = {"b é.wav": (sound(1.5, 22_050), 22_050), "a.wav": (sound(4.0), 44_100)}
    root = make_dataset(clips, rows=[("b é.wav", "Walk,Slam"), ("a.wav", 'a "b"')])
    status, out, _ = run("--input_dir", root)
    path = tmp_path / "out" / "tokenized_train_curated.csv"
    assert status == 0
    assert out.startswith(f"{path}: 2 clips tokenized (2 encoded now, 0 already there), 0 failed.")
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
    outputs = [f"summary_{STEM}.txt", f"tokenized_{STEM}.csv", f"tokenized_{STEM}.json"]
    assert names == [f"codes_{STEM}", *outputs]
    (folder,) = (tmp_path / "out" / names[0]).iterdir()
    assert re.fullmatch("encodec_24khz_6kbps_2s-[0-9a-f]{8}", folder.name)
    assert json.loads(path.with_suffix(".json").read_text())["codes_folder"] == (
        f"codes_{STEM}/{folder.name}"
    )
    assert np.load(folder / "a.wav.npz")["codes"].shape == (3, 8, 150)


CELLS = ["x\ry", "x\ny", "x\r\ny", 'x"y"', '"', "x,y", "x;y\tz", "#x", "\ufeffx", "x\\", "x\x85y"]
READERS = {
    "csv": lambda path: [row[:2] for row in read_rows(path)],
    "pandas": lambda path: pd.read_csv(
        path, header=None, dtype=str, usecols=[0, 1]
    ).values.tolist(),
    "pandas, python": lambda path: pd.read_csv(
        path, header=None, dtype=str, usecols=[0, 1], engine="python"
    ).values.tolist(),
}


@pytest.mark.usefixtures("ready_made_codes")
def test_a_csv_is_read_as_it_was_written(run, sound, tmp_path):
    """Python's csv.writer does not quote a lone carriage return before 3.11.9 and 3.12.3."""
    rows = [(f"{i}{cell.strip()}.wav", cell) for i, cell in enumerate(CELLS)]
    bad = [(f"bad{i}{cell.strip()}.wav", "") for i, cell in enumerate(CELLS)]
    for name, _ in rows:
        soundfile.write(tmp_path / name, sound(0.1, 8_000), 8_000)
    with (tmp_path / "m.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("fname", "labels"), *rows, *bad])
    flags = ["--metadata", tmp_path / "m.csv", "--audio_dir", tmp_path, "--target_duration", "0.1"]
    assert run(*flags)[0] == 0
    failed = [(name, "no such file") for name, _ in bad]
    for reader, read in READERS.items():
        expected = [list(row) for row in [("fname", "labels"), *rows]]
        assert read(tmp_path / "out" / "tokenized_m.csv") == expected, reader
        expected = [list(row) for row in [("fname", "error"), *failed]]
        assert read(tmp_path / "out" / "failed_m.csv") == expected, reader


@pytest.mark.usefixtures("ready_made_codes")
@pytest.mark.parametrize("how", ["mean", "latent", "none"])
def test_a_run_says_which_rows_cannot_be_decoded(how, run, make_dataset, sound):
    root = make_dataset({f"{i}.wav": (sound(s, 8_000), 8_000) for i, s in enumerate([0.5, 3, 4])})
    note = "note: 2 of 3 rows are averages of several chunks, which cannot be decoded; --whole or"
    assert (note in run("--input_dir", root, "--aggregate", how)[2]) == (how == "mean")


@pytest.mark.usefixtures("ready_made_codes")
def test_nothing_to_encode_shows_no_bar(run, make_dataset, sound):
    flags = ["--input_dir", make_dataset({"a.wav": (sound(0.5, 8_000), 8_000)})]
    assert "0/1" in run(*flags)[2] and "%|" not in run(*flags)[2]


@pytest.mark.usefixtures("ready_made_codes")
def test_a_package_without_metadata_has_an_unknown_version(run, monkeypatch, tmp_path):
    def no_metadata(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(encodec_tokenizer, "version", no_metadata)
    assert run("--dataset", "sample")[0] == 0
    facts = json.loads((tmp_path / "out" / "tokenized_sample.json").read_text())
    assert facts["versions"]["torch"] == "unknown"


@pytest.mark.usefixtures("ready_made_codes")
def test_bad_clips_are_recorded_and_passed_over(run, make_dataset, sound, tmp_path):
    clips = {f"{name}.wav": (sound(0.4), 44_100) for name in "abc"}
    names = ["a.wav", "missing.wav", "b.wav", "../up.wav", "c.wav"]
    root = make_dataset(clips, rows=[(name, "x") for name in names])
    soundfile.write(root / "up.wav", sound(0.4), 44_100)
    (root / STEM / "b.wav").write_bytes(b"")
    status, out, _ = run("--input_dir", root)
    assert status == 0 and "2 clips tokenized (2 encoded now, 0 already there), 3 failed" in out
    assert read_rows(tmp_path / "out" / f"failed_{STEM}.csv") == [
        ["fname", "error"],
        ["missing.wav", "no such file"],
        ["b.wav", "empty file (0 bytes)"],
        ["../up.wav", "the path is outside the audio folder (--audio_dir)"],
    ]
    assert pd.read_csv(tmp_path / "out" / CSV)["fname"].tolist() == ["a.wav", "c.wav"]
    summary = (tmp_path / "out" / f"summary_{STEM}.txt").read_text()
    assert "Total samples processed: 2\n" in summary and "Failed clips: 3\n" in summary


@pytest.mark.usefixtures("ready_made_codes")
def test_a_run_in_which_every_clip_fails_ends_with_status_1(run, make_dataset, tmp_path):
    root = make_dataset({"c.wav": (np.zeros(0), 8_000), "d.wav": (np.zeros(0), 8_000)})
    status, out, err = run("--input_dir", root)
    assert status == 1 and out == "" and "none of 2 clips could be tokenized" in err
    assert len(read_rows(tmp_path / "out" / f"failed_{STEM}.csv")) == 3
    assert not (tmp_path / "out" / CSV).exists()


def test_summary_and_json_tell_what_made_the_file(whole):
    summary = (whole.parent / f"summary_{STEM}.txt").read_text().splitlines()
    for line in (
        "Total samples processed: 10",
        "Failed clips: 0",
        "Average tokens per sample: 1200.0",
        "Average duration (s): 2.06",
        "Total duration (s): 20.6",
        "Average chunks per clip: 1.5",
        "Token shape distribution:",
        "  (8, 150): 10",
        "  model: encodec_24khz",
        "  bandwidth: 6.0",
        "Weights file: encodec_24khz.th",
    ):
        assert line in summary
    facts = json.loads(whole.with_suffix(".json").read_text())
    for flag in ("model", "bandwidth", "target_duration", "overlap", "aggregate", "max_duration"):
        assert facts["settings"][flag] == getattr(Settings, flag)
    assert re.fullmatch("[0-9a-f]{64}", facts["settings"]["weights"])
    assert facts["versions"]["torch"] == version("torch")
    assert facts["versions"]["script"] == encodec_tokenizer.__version__


@pytest.mark.usefixtures("ready_made_codes")
def test_debug_shows_every_clip(run, make_dataset, sound):
    root = make_dataset({"a.wav": (sound(4.0, 22_050), 22_050), "b.wav": (sound(1.0), 44_100)})
    (root / "train_curated" / "b.wav").write_bytes(b"")
    _, _, err = run("--input_dir", root, "--debug", "--aggregate", "none")
    assert "a.wav [Label_0,Slam]: 4.000 s, 3 chunks" in err
    assert "b.wav [Label_1,Slam]: FAILED: empty file (0 bytes)" in err
    assert err.index("a.wav: loading") < err.index("a.wav [Label_0")


@pytest.mark.usefixtures("ready_made_codes")
def test_a_break_is_one_sentence_and_with_debug_a_traceback(run, make_dataset, sound, monkeypatch):
    root = make_dataset({"a.wav": (sound(0.3), 44_100)})
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(encodec_tokenizer, "write_codes", full)
    status, _, err = run("--input_dir", root)
    assert status == 1 and "No space left on device" in err and "Traceback" not in err
    assert "0 of 1 clip finished; the same command resumes there" in err
    assert "Traceback" in run("--input_dir", root, "--debug")[2]


@pytest.mark.usefixtures("ready_made_codes")
def test_a_run_that_breaks_leaves_no_group_at_work(run, make_dataset, sound, monkeypatch):
    clips = {f"{i}.wav": (sound(0.3, 8_000, seed=i), 8_000) for i in range(9)}
    root, threads = make_dataset(clips), threading.enumerate()
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(encodec_tokenizer, "write_codes", full)
    assert run("--input_dir", root)[0] == 1
    assert threading.enumerate() == threads


@pytest.mark.usefixtures("ready_made_codes")
def test_a_run_may_be_started_from_any_thread(run, make_dataset, sound):
    root, done = make_dataset({"a.wav": (sound(0.3), 44_100)}), []
    thread = threading.Thread(target=lambda: done.append(run("--input_dir", root)))
    thread.start()
    thread.join()
    assert done[0][0] == 0, done[0][2]


PROBE = """
import multiprocessing, os, socket, sys

multiprocessing.set_start_method("spawn")  # as on macOS; what a run leaves over is told then

def refuse(self, address):
    with open(os.environ["PROBE"], "a") as file:
        print("connection", address, file=file)
    raise OSError("no network here")

socket.socket.connect = socket.socket.connect_ex = refuse

def leave(status, at_once=os._exit):
    late = {"matplotlib", "pyarrow", "safetensors"} & set(sys.modules)
    with open(os.environ["PROBE"], "a") as file:
        print("exit", *sorted(late), file=file)
    at_once(status)

os._exit = leave
"""


def test_the_script_runs_on_the_bundled_sample(weights, tmp_path):
    """As a user would run it: in an empty HOME, on one core, its stderr in a log file.

    It opens no connection, writes nothing into HOME, and imports no package that it does not use.
    """
    (tmp_path / "home").mkdir()
    (tmp_path / "sitecustomize.py").write_text(PROBE)
    args = ["--dataset", "sample", "--device", "cpu", "--output_dir", tmp_path / "out"]
    args += ["--weights", weights("encodec_24khz")]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(tmp_path), "PROBE": str(tmp_path / "probe")}
    command = [sys.executable, "-OO", ROOT / "encodec_tokenizer.py", *args]  # no docstrings
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    log = done.stderr
    assert done.returncode == 0, log
    assert "Warning:" not in log and "UNTRAINED" not in log
    assert "12/12" in log and "s of audio/s, 0 failed" in log and log.count("\r") < 9
    table = pd.read_csv(tmp_path / "out" / "tokenized_sample.csv")
    assert len(table) == 12 and (table["num_chunks"] > 1).sum() == 3
    assert table.filter(regex=r"^token_\d+$").stack().nunique() > 100
    assert (tmp_path / "probe").read_text() == "exit\n"
    assert list((tmp_path / "home").rglob("*")) == []


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
    """With %run, in IPython's process, whose streams have their own kind; without bars."""
    flags = ["--dataset", "sample", "--max_samples", "1", "--weights", "untrained"]
    command = f"import sys; sys.argv = {[str(ROOT / 'encodec_tokenizer.py'), *flags]}" + NOTEBOOK
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TQDM_DISABLE": "1", "TQDM_DESC": "mine"},
    )
    assert "1 clip tokenized (1 encoded now" in done.stdout, done.stderr
    assert "%|" not in done.stderr
    assert "goes on after status 0" in done.stdout
