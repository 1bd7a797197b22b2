"""Nothing finished is lost, and no row is wrong: kills, changed files, machines at fault."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import faults
import numpy as np
import pytest
import soundfile
import torch

CLIPS = 10
BAD = (1, 5, 6)  # empty files
STEM = "train_curated"
OTHER = ("--bandwidth", "3")  # other codes


class Data:
    """Some short clips, and runs of the script on them."""

    def __init__(self, folder, root) -> None:
        self.folder, self.root, self.log = folder, root, folder / "log.txt"
        self.audio = root / STEM

    def start(self, *flags, out="out", log=None, **options):
        argv = ["--input_dir", self.root, "--output_dir", self.folder / out, *flags]
        return faults.start(argv, log or self.log, **options)

    def run(self, *flags, **options):
        """The exit status; -9 for a process that was killed. See `said`."""
        self.log.write_text("")
        return end(self.start(*flags, **options))

    @property
    def said(self):
        """What the last run printed."""
        return self.log.read_text()

    @property
    def encoded(self):
        """The clips that the last run encoded."""
        return re.findall(r"encoded (\S+\.wav)", self.said)

    def csv(self, out="out"):
        return self.folder / out / f"tokenized_{STEM}.csv"

    def failed(self, out="out"):
        return self.folder / out / f"failed_{STEM}.csv"

    def rows(self, out="out"):
        return [self.csv(out).read_bytes(), self.failed(out).read_bytes()]

    def stored(self, out="out"):
        """Path of a clip's codes -> their bytes."""
        return {path: path.read_bytes() for path in (self.folder / out).glob("codes_*/**/*.npz")}

    def clip(self, number):
        return self.audio / f"{number:03d}.wav"


def end(process) -> int:
    """The exit status of a process; one that hangs is ended, and fails the test."""
    process.join(90)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the process hangs")
    return process.exitcode


@pytest.fixture
def data(make_dataset, sound, tmp_path):
    """Clips of which some are bad."""
    noise = sound(3.0, 8_000)[:, 0]
    named = {f"{i:03d}.wav": (noise[i * 10 :][:1600], 8_000) for i in range(CLIPS)}
    made = Data(tmp_path, make_dataset(named))
    for i in BAD:
        made.clip(i).write_bytes(b"")
    return made


@pytest.fixture
def expected(data, stored={}):  # noqa: B006 - the clips are the same in every test
    """The rows of an undisturbed run."""
    if not stored:
        assert data.run(out="expected") == 0, data.said
        stored["rows"] = data.rows("expected")
    return stored["rows"]


# -------------------------------------------------------------------------------------------- kills


def killed_at_each_step(data, *flags, made=None):
    """Yield outputs of runs, each killed at a later step, until one ends before its step."""
    for step in count():
        out = f"killed_at_{step}"
        if made:
            shutil.copytree(data.folder / made, data.folder / out)
        status = data.run(*flags, out=out, before=[partial(faults.kill_at_step, step)])
        assert status in (0, -9), data.said
        yield out
        if status == 0:
            assert step > 10
            return


def test_a_kill_at_any_step_to_the_disk_loses_nothing(data):
    """Each run is killed at its step, again while it resumes, and then not."""
    few = ("--max_samples", "2")
    assert data.run(*few, out="whole") == 0
    expected = data.rows("whole")
    for number, out in enumerate(killed_at_each_step(data, *few)):
        before = data.stored(out)
        assert not data.csv(out).exists() or data.csv(out).read_bytes() == expected[0]
        kill = partial(faults.kill_at_step, number * 7 % 20)
        assert data.run(*few, out=out, before=[kill]) in (0, -9)
        assert data.run(*few, out=out) == 0 and data.rows(out) == expected
        assert before.items() <= data.stored(out).items()  # none is encoded again


def test_overwrite_killed_at_any_step_keeps_old_or_new_rows(data):
    """Codes of both settings are there, so that the steps are those of the outputs."""
    few = ("--max_samples", "2")
    weights = data.folder / "w.th"
    weights.write_bytes(b"x")
    trained = (*few, "--weights", weights)
    assert data.run(*trained, *OTHER, out="made") == data.run(*trained, *OTHER, out="new") == 0
    assert data.run(*trained, "--overwrite", out="made") == 0
    assert data.run(*trained, "--aggregate", "none", "--overwrite", out="new") == 0
    old, new = data.csv("made").read_bytes(), data.csv("new").read_bytes()
    assert old != new
    flags = (*trained, "--aggregate", "none", "--overwrite")
    for out in killed_at_each_step(data, *flags, made="made"):
        assert data.csv(out).read_bytes() in (old, new)
        again = data.run(*trained, "--aggregate", "none", out=out)  # without --overwrite
        record = json.loads((data.folder / out / f"tokenized_{STEM}.json").read_text())
        if again == 0:
            assert data.csv(out).read_bytes() == new
        else:
            assert again == 2 and record["settings"]["aggregate"] == "mean"
        assert data.run(*flags, out=out) == 0 and data.csv(out).read_bytes() == new
        assert not data.encoded


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_random_kills_over_resumed_runs_change_nothing(kills, data, expected):
    moments, rounds, done = random.Random(4), 0, 0
    while done < kills:
        out = f"round_{rounds}"
        process = data.start(out=out, slow_s=0.05)
        time.sleep(moments.uniform(0.05, 0.5))
        before = data.stored(out)
        process.kill()
        process.join()
        done += process.exitcode == -9
        assert before.items() <= data.stored(out).items()
        rounds += process.exitcode == 0
    assert data.run(out=out) == 0
    for path in data.folder.glob("round_*"):
        assert data.rows(path.name) == expected


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_and_says_how_to_resume(number, status, data, expected):
    process = data.start(slow_s=0.3)
    while not data.stored():
        assert process.is_alive()
    os.kill(process.pid, number)
    assert end(process) == status
    assert re.search(r"\d of 10 clips finished; the same command resumes there", data.said)
    assert "interrupted" in data.said and "Traceback" not in data.said
    assert data.run() == 0 and data.rows() == expected


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_signals_to_a_stopped_process_end_it(numbers, data):
    """When it goes on, another thread than the main one may get them; its log is no terminal."""
    process = data.start(slow_s=1)
    while not data.stored():
        assert process.is_alive()
    for number in (signal.SIGSTOP, *numbers, signal.SIGCONT):
        os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode in (130, 143), data.said
    assert data.said.endswith("interrupted\n") and "Error" not in data.said


@pytest.mark.parametrize("place", range(5))
def test_a_signal_between_the_renames_loses_no_csv(place, data, expected):
    """The picture, which lies elsewhere, is the old or the new one, too."""
    flags = ("--plot", "../elsewhere/picture.svg")
    picture = data.folder / "elsewhere" / "picture.svg"
    assert data.run("--max_samples", "4", *flags) == 0
    old, old_picture = data.csv().read_bytes(), picture.read_text()
    assert data.run(*flags, before=[partial(faults.signal_at_rename, place)]) == 143
    assert data.csv().read_bytes() == old and data.failed().exists()
    assert picture.read_text().endswith("</svg>\n")
    assert (picture.read_text() == old_picture) == (place < 1)
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]
    assert data.run() == 0 and data.rows() == expected and not data.encoded


def test_the_list_of_failures_goes_after_the_csv_has_come(data):
    """When the bad clips are repaired: the run ends just before it renames the CSV."""
    assert data.run() == 0
    old = data.rows()
    for i in BAD:
        shutil.copy(data.clip(0), data.clip(i))
    assert data.run(before=[partial(faults.signal_at_rename, 2)]) == 143 and data.rows() == old
    assert data.run() == 0 and not data.failed().exists()


# ---------------------------------------------------------------------- what changes between runs


def change_content(data):
    """ctime shows what `cp -p`, `rsync -t` and unzip hide."""
    status = data.clip(0).stat()
    soundfile.write(data.clip(0), np.full(1600, 0.9), 8_000)
    os.utime(data.clip(0), ns=(status.st_atime_ns, status.st_mtime_ns))
    assert data.clip(0).stat().st_size == status.st_size


def swap_names(data):
    data.clip(0).rename(data.folder / "x")
    data.clip(2).rename(data.clip(0))
    (data.folder / "x").rename(data.clip(2))


@pytest.mark.parametrize("change", [change_content, swap_names])
def test_a_changed_file_is_encoded_anew_whatever_its_times_say(change, data):
    assert data.run() == 0
    change(data)
    assert data.run() == 0 and data.run(out="fresh") == 0 and data.rows() == data.rows("fresh")


def test_codes_of_another_content_never_come_back(data):
    assert data.run() == 0
    data.clip(0).write_bytes(b"broken")
    assert data.run("--overwrite") == 0 and b"000.wav" in data.rows()[1]
    data.clip(0).unlink()
    assert data.run("--overwrite") == 0 and b"000.wav,no such file" in data.rows()[1]


def test_a_file_that_changes_while_it_is_read_fails_once(data, expected):
    touch = partial(faults.at_clip, "007.wav", os.utime, data.clip(7), (1e9, 1e9))
    assert data.run(before=[touch]) == 0
    assert b"007.wav,the file changed while it was read" in data.rows()[1]
    assert data.run() == 0 and data.rows() == expected and data.encoded == ["007.wav"]


# ----------------------------------------------------------------------------- the machine at fault

SEVENTH = partial(faults.at_clip, "007.wav")
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
CPU = RuntimeError("[enforce fail] . can't allocate memory: you tried to allocate 9 bytes.")
MACHINE = {
    "EMFILE": (partial(SEVENTH, faults.use_up_descriptors), "Too many open files"),
    "EIO": (partial(faults.fail_to_read, "007.wav", errno.EIO), "Input/output error: .*007.wav'"),
    "EIO at codes": (partial(faults.fail_to_read, ".npz", errno.EIO), "Input/output error: .*npz'"),
    "EIO at the JSON": (partial(faults.fail_to_read, ".json", errno.EIO), "Input/output error"),
    "full disk at codes": (partial(faults.limit_file_size, 3_000), "File too large: .*npz'"),
    "full disk at the CSV": (
        partial(faults.limit_file_size, 15_000),
        f"File too large: .*{STEM}.csv",
    ),
    "no memory": (partial(faults.no_memory, MemoryError("bad_alloc")), "out of memory: bad_alloc"),
    "no GPU memory": (partial(faults.no_memory, GPU), "out of memory: CUDA out of .*--batch_size"),
    "no CPU memory": (partial(faults.no_memory, CPU), "out of memory: .*you tried to allocate 9"),
}


@pytest.mark.parametrize("fault, says", MACHINE.values(), ids=MACHINE)
def test_a_fault_of_the_machine_stops_the_run(fault, says, data, expected):
    """No clip is marked as failed, the old outputs stay, and the same command resumes."""
    assert data.run("--max_samples", "3") == 0
    before = data.rows()
    assert data.run(before=[fault]) == 1, data.said
    assert re.search(says, data.said) and "Traceback" not in data.said
    assert data.rows() == before
    assert not list(data.folder.rglob(".unfinished*"))
    assert data.run() == 0 and data.rows() == expected


def test_codes_that_cannot_be_changed_are_no_fault_of_the_clip(data):
    refuse = partial(faults.refuse_to_change, ".npz")
    assert data.run(before=[refuse]) == 1 and "Permission denied" in data.said
    assert not data.failed().exists()
    assert data.run() == 0
    change_content(data)
    assert data.run(before=[refuse]) == 1
    assert re.search("Permission denied: .*000.wav.npz'", data.said)
    assert data.run() == 0 and data.encoded == ["000.wav"]


@pytest.mark.parametrize("when", ["before", "at work"])
def test_an_unmounted_audio_folder_stops_the_run(when, data, expected):
    away = data.folder / "away"
    move = partial(faults.move_away, data.audio, away)
    status = data.run(before=[move if when == "before" else partial(SEVENTH, move)], slow_s=0.05)
    assert status == (2 if when == "before" else 1), data.said
    assert "mounted" in data.said and not data.csv().exists() and not data.failed().exists()
    shutil.rmtree(data.audio, ignore_errors=True)
    away.rename(data.audio)
    assert data.run() == 0 and data.rows() == expected


IN_THE_WAY = {  # the output that cannot be written, and why
    "a file": ([], "file", f"file/tokenized_{STEM}.csv", "Not a directory"),
    "a file above": ([], "file/below", f"file/below/tokenized_{STEM}.csv", "Not a directory"),
    "a dangling link": ([], "dangling", f"dangling/tokenized_{STEM}.csv", "File exists"),
    "a folder for the CSV": ([], "csv", f"csv/tokenized_{STEM}.csv", "a folder is in its place"),
    "one for the JSON": ([], "json", f"json/tokenized_{STEM}.json", "a folder is in its place"),
    "one for the picture": (["--plot", "../csv"], "out", "out/../csv.png", "a folder is in its"),
    "one for failures": ([], "failed", f"failed/failed_{STEM}.csv", "a folder is in its place"),
    "a long name": (["--plot", 252 * "x"], "out", f"out/{252 * 'x'}.png", "File name too long"),
    "a full name": (["--metadata", f"{245 * 'x'}.csv", "--audio_dir", "."], "out", "", "too long"),
}


@pytest.mark.parametrize("flags, out, path, reason", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_what_is_in_the_way_is_told_first(flags, out, path, reason, data, monkeypatch):
    monkeypatch.chdir(data.folder)
    (data.folder / f"{245 * 'x'}.csv").write_text(f"fname,label\n{data.clip(0)},x\n")
    (data.folder / "file").write_text("mine")
    (data.folder / "dangling").symlink_to(data.folder / "nowhere" / "at all")
    for name in ("csv.png", f"csv/tokenized_{STEM}.csv", f"json/tokenized_{STEM}.json"):
        (data.folder / name).mkdir(parents=True)
    (data.folder / "failed" / f"failed_{STEM}.csv").mkdir(parents=True)
    assert data.run(*flags, out=out) == 2 and not data.encoded
    assert f"error: {data.folder / path}" in data.said and "cannot be written: " in data.said
    assert reason in data.said
    assert not list(data.folder.rglob(".unfinished*"))


@pytest.mark.usefixtures("ready_made_codes")
def test_a_read_only_folder_is_told_first(run, data, monkeypatch):
    read_only = OSError(errno.EROFS, "Read-only file system", "out")
    monkeypatch.setattr(Path, "touch", Mock(side_effect=read_only))
    status, _, err = run("--input_dir", data.root)
    assert status == 2 and "cannot be written: [Errno 30] Read-only" in err and not data.stored()


STREAMS = {
    "stdout full": [(1, "/dev/full")],
    "stderr full": [(2, "/dev/full")],
    "stderr unread": [(2, "pipe")],
    "both unread": [(1, "pipe"), (2, "pipe")],
    "both closed": [(1, None), (2, None)],
}


@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
def test_a_run_that_nobody_can_read_finishes_all_the_same(streams, data, expected):
    before = [partial(faults.close_stream, *stream) for stream in streams]
    assert data.run("--debug", before=before) == 0, data.said
    assert data.rows() == expected and "Traceback" not in data.said


@pytest.mark.usefixtures("ready_made_codes")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("is_closed", [False, True])
def test_a_stream_of_a_programs_own_does_not_end_the_run(name, is_closed, run, data, monkeypatch):
    """One that was closed, or has only `write`, as those that lead to a logger."""
    stream = open(os.devnull, "w")
    stream.close()
    monkeypatch.setattr(sys, name, stream if is_closed else SimpleNamespace(write=len))
    assert run("--input_dir", data.root)[0] == 0


# ---------------------------------------------------------------------------------------- processes


def ranks(data, size, options=None, **common):
    """Processes as torchrun starts them; `options` of some, by rank."""
    started = []
    for rank in range(size):
        own = common | (options or {}).get(rank, {})
        log = data.folder / f"log_{rank}.txt"
        started.append(data.start(rank=(rank, size), log=log, **own))
    return [end(process) for process in started]


@pytest.mark.parametrize("size", [2, 3])
def test_processes_write_the_bytes_of_one(size, data, expected):
    assert ranks(data, size) == [0] * size
    assert data.rows() == expected and len(data.stored()) == CLIPS - len(BAD)
    logs = [(data.folder / f"log_{rank}.txt").read_text() for rank in range(size)]
    assert [log.count("Summary: ") for log in logs] == [1, *[0] * (size - 1)]
    assert all("Process 0 writes the outputs" in log for log in logs[1:])


@pytest.mark.parametrize("first, second", [(0, 1), (1, 0)])
def test_processes_one_after_the_other_write_the_bytes_of_one(first, second, data, expected):
    assert data.run(rank=(first, 2)) == 0 and len(data.encoded) == CLIPS - len(BAD)
    assert data.csv().exists() == (first == 0)
    assert data.run(rank=(second, 2)) == 0
    assert not data.encoded and data.rows() == expected


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_the_others_encode_what_a_killed_process_has_not(killed, data, expected):
    kill = {killed: {"before": [partial(faults.kill_at_step, 6)]}}  # at its first clip
    statuses = ranks(data, 3, options=kill, slow_s=0.3)
    assert statuses[killed] == -9 and statuses.count(0) == 2
    assert len(data.stored()) == CLIPS - len(BAD) and data.csv().exists() == (killed != 0)
    assert data.run() == 0 and not data.encoded and data.rows() == expected


def test_torchrun_writes_the_bytes_of_one_process(data, expected):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [faults.__file__, "--input_dir", data.root, "--output_dir", data.folder / "out"]
    command += ["--weights", "untrained", "--device", "cpu"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert data.rows() == expected
