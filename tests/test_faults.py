"""Nothing finished is lost, and no row is another run's: kills, full disks, machines at fault."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import faults
import numpy as np
import pytest
import soundfile
from conftest import ROOT
from faults import BLOCK_CLIPS

import encodec_tokenizer as script
from encodec_tokenizer import Clip, Dataset, Output, make_block

CLIPS = BLOCK_CLIPS * 5 // 2
BLOCKS = 3
BAD = (1, 5, 6)  # empty files
STEM = "train_curated"
A_BLOCK = [faults.kill_after_a_block]  # the first block is there, and no other


class Data:
    """Two and a half blocks of short clips, and runs of the script on them."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root, self.log = folder, root, folder / "log.txt"

    def argv(self, folder, *flags):
        return ["--input_dir", self.root, "--output_dir", self.folder / folder, *flags]

    def start(self, folder, *flags, kill_at=None, before=(), log=None, **options):
        """kill_at: the step to the disk (faults.kill_at_step)."""
        kill = [] if kill_at is None else [partial(faults.kill_at_step, kill_at)]
        argv, log = self.argv(folder, *flags), log or self.log
        return faults.start(argv, log, before=[*before, *kill], **options)

    def run(self, folder, *flags, **options):
        """The exit status; -9 for a process that was killed."""
        return end(self.start(folder, *flags, **options))

    def said(self, folder, *flags, **options):
        """The exit status, and what this run printed."""
        self.log.write_text("")
        return self.run(folder, *flags, **options), self.log.read_text()

    def path(self, folder, name, stem=STEM):
        return self.folder / folder / name.format(stem)

    def files(self, folder):
        """The CSV and the list of failures."""
        return [
            self.path(folder, name).read_bytes() for name in ("tokenized_{}.csv", "failed_{}.csv")
        ]

    def blocks(self, folder):
        return self.path(folder, "tokenized_{}.blocks")

    def block_times(self, folder, stem=STEM):
        """number of a block -> when it was written."""
        paths = self.path(folder, "tokenized_{}.blocks", stem).glob("*.block")
        return {int(path.name[:5]): path.stat().st_mtime_ns for path in paths}

    def record(self, folder, stem=STEM):
        return json.loads(self.path(folder, "tokenized_{}.json", stem).read_text())

    def owner(self, folder):
        try:
            return self.record(folder).get("owner", "")
        except FileNotFoundError:
            return ""

    def clip(self, number):
        return self.root / STEM / f"{number:03d}.wav"

    def mend(self, number):
        """Make a good clip of it, with samples of its own."""
        soundfile.write(self.clip(number), np.full(1600, (number + 1) / 16), 8_000)


def end(process) -> int:
    """The exit status of a process; one that hangs is ended, and fails the test."""
    process.join(90)
    hangs = process.exitcode is None
    if hangs:
        process.kill()
        process.join()
    assert not hangs, "the process hangs"
    return process.exitcode


def wait_for(condition, *args):
    for _ in range(6000):
        if result := condition(*args):
            return result
        time.sleep(0.01)
    raise AssertionError("it never came")


@pytest.fixture
def data(make_dataset, sound, tmp_path):
    """Clips of which some are bad."""
    noise = sound(3.0, 8_000)[:, 0]
    root = make_dataset({f"{i:03d}.wav": (noise[i * 100 :][:1600], 8_000) for i in range(CLIPS)})
    made = Data(tmp_path, root)
    for i in BAD:
        made.clip(i).write_bytes(b"")
    return made


@pytest.fixture
def whole(data, kept={}):  # noqa: B006 - the clips are the same in every test
    """The files of an undisturbed run."""
    if not kept:
        assert data.run("whole") == 0, data.log.read_text()
        kept["files"] = data.files("whole")
    return kept["files"]


def every(steps, slow_steps):
    """The parameter in two lengths: a short one for the suite, a long one marked slow."""
    return [steps, pytest.param(slow_steps, marks=pytest.mark.slow)]


# ------------------------------------------------------------------------------------ kills, damage


def test_a_kill_at_any_step_to_the_disk_loses_nothing(data, whole):
    """Three processes at a time, each killed at its step, again while going on, and then not."""
    first = 0
    while True:
        steps = {f"killed_at_{step}": step for step in range(first, first + 3)}
        started = {folder: data.start(folder, kill_at=step) for folder, step in steps.items()}
        statuses = {folder: end(process) for folder, process in started.items()}
        assert set(statuses.values()) <= {0, -9}
        killed = [folder for folder, status in statuses.items() if status == -9]
        before = {folder: data.block_times(folder) for folder in killed}
        for folder in killed:
            csv = data.path(folder, "tokenized_{}.csv")
            assert not csv.exists() or csv.read_bytes() == whole[0]  # never a torn one
        again = [data.start(folder, kill_at=steps[folder] * 7 % 40) for folder in killed]
        assert {end(process) for process in again} <= {0, -9}
        last = [data.start(folder) for folder in killed]
        assert [end(process) for process in last] == [0] * len(killed)
        for folder in steps:
            assert data.files(folder) == whole
            after = data.block_times(folder)
            assert len(after) == BLOCKS  # they stay for the failed clips
            assert before.get(folder, {}).items() <= after.items()  # what was there was left alone
            assert not list((data.folder / folder).rglob("*.tmp"))
        if len(killed) < 3:
            break
        first += 3
    assert first > 50


@pytest.mark.parametrize("kills", every(8, 200))
def test_random_kills_over_resumed_runs_change_nothing(kills, data, whole):
    moments = random.Random(4)
    rounds, done = 0, 0
    while done < kills:
        folder = f"round_{rounds}"
        process = data.start(folder, slow_s=0.1)
        time.sleep(moments.uniform(0.05, 0.5))
        before = data.block_times(folder)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        done += process.exitcode == -9
        assert before.items() <= data.block_times(folder).items()
        rounds += process.exitcode == 0
    assert data.run(folder) == 0
    for i in range(rounds + 1):
        if (data.folder / f"round_{i}").exists():
            assert data.files(f"round_{i}") == whole


def test_every_damage_to_a_block_is_noticed(tmp_path):
    clips = [Clip(f"{i}.wav", labels="a,b", index=i, num_chunks=1) for i in range(4)]
    for clip in clips:
        clip.codes = np.full((1, 2, 3), clip.index)
    clips[2].error = "empty"

    def output_of(clips, **run):
        dataset = Dataset("x", tmp_path / "x.csv", tmp_path, [], clips)
        return Output(tmp_path, dataset, {"aggregate": "mean", **run})

    output = output_of(clips)
    output.blocks.mkdir()
    settings = script.parse_settings(["--device", "cpu"])
    output.write_block(0, make_block(clips, settings, faults.MODEL))
    (path,) = output.blocks.iterdir()
    whole = path.read_bytes()
    block = output.read_block(0)
    assert [(r.fname, r.error) for r in block.records if r.error] == [("2.wav", "empty")]
    assert block.lines.count(b"\n") == 3
    for other in (output_of(clips[:3]), output_of(clips, aggregate="none")):
        assert other.read_block(0) is None and path.exists()  # not damaged, but none of its own
    # Its name alone does not make it a block of a run.
    (tmp_path / "x.blocks").mkdir()
    stranger = output_of(clips, aggregate="none")
    stranger.write_block(0, make_block(clips, settings, faults.MODEL))
    (theirs,) = set(output.blocks.iterdir()) - {path}
    theirs.write_bytes(whole)
    assert stranger.read_block(0) is None

    chance = random.Random(1)
    damaged = [whole[: len(whole) * i // 100] for i in range(100)]
    for _ in range(1000):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(data))
    for data in damaged:
        path.write_bytes(data)
        assert output.read_block(0) is None
        assert path.with_suffix(".damaged").read_bytes() == data and not path.exists()


def test_a_damaged_block_is_made_again(data, whole):
    assert data.run("out", before=A_BLOCK) == -9
    (first,) = data.blocks("out").glob("*.block")
    first.write_bytes(first.read_bytes()[:-7])
    status, said = data.said("out")
    assert status == 0
    assert data.files("out") == whole
    assert f"{first.name} was damaged; it is set aside" in said


@pytest.mark.parametrize("max_bytes, blocks", [(700, 0), (20_000, 0), (None, BLOCKS)])
def test_a_full_disk_ends_in_one_sentence_and_the_rest_can_follow(max_bytes, blocks, data, whole):
    """At the record, at a block, and at the CSV, which is larger than any block."""
    limit = partial(faults.limit_file_size, max_bytes or len(whole[0]) - 1)
    status, said = data.said("out", before=[limit])
    assert status == 1
    assert "error: OSError: [Errno 27] File too large" in said and "Traceback" not in said
    assert "the same command goes on" in said
    assert len(data.block_times("out")) == blocks
    assert data.run("out") == 0
    assert data.files("out") == whole


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_a_folder_is_used_and_a_broken_one_is_not(
    number, data, whole
):
    status, said = data.said("out", before=[partial(faults.fail_to_sync_folders, number)])
    assert status == (number == errno.EIO)
    if status:
        assert "error: OSError: [Errno 5] Input/output error" in said
        assert data.run("out") == 0
    assert data.files("out") == whole


@pytest.mark.parametrize("times", every(1, 25))
def test_a_signal_ends_the_run_within_ten_seconds_and_it_can_go_on(
    times, make_dataset, sound, tmp_path
):
    """The command itself, with a real encoder at work: of each signal one at a time."""
    noise = sound(3.0, 8_000)[:, 0]
    root = make_dataset({f"{i:03d}.wav": (noise[i * 10 :][:1600], 8_000) for i in range(160)})
    chance, data = random.Random(2), Data(tmp_path, root)
    command = [sys.executable, ROOT / "encodec_tokenizer.py", "--device", "cpu"]
    command += ["--weights", "untrained"]
    expected = {signal.SIGTERM: 143, signal.SIGINT: 130}
    for _ in range(times):
        processes = {
            number: subprocess.Popen(
                [*map(str, [*command, *data.argv(number.name)])], stderr=subprocess.PIPE, text=True
            )
            for number in expected
        }
        for number, process in processes.items():
            wait_for(lambda n, p: f"process {p.pid} " in data.owner(n.name) or p.poll() is not None,
                     number, process)  # fmt: skip
        time.sleep(chance.uniform(0, 3))
        for number, process in processes.items():
            before = data.block_times(number.name)
            process.send_signal(number)
            started = time.perf_counter()
            _, err = process.communicate(timeout=60)
            if data.record(number.name)["finished"]:
                assert times > 1  # all was done: the signal met Python on its way out, or nobody
                continue
            assert time.perf_counter() - started < 10
            assert process.returncode == expected[number]
            assert "the same command goes on" in err and "Traceback" not in err
            assert before.items() <= data.block_times(number.name).items()


def test_of_many_runs_at_once_one_wins_and_the_others_name_it(data, whole):
    logs = [data.folder / f"log_{i}.txt" for i in range(20)]
    processes = [data.start("out", slow_s=2.0, log=log) for log in logs]
    owner = wait_for(data.owner, "out")
    late = data.folder / "late.txt"
    latecomer = data.start("out", log=late)  # when the winner has surely signed
    statuses = [end(process) for process in processes]
    assert sorted(statuses) == [0] + [2] * 19
    winner = processes[statuses.index(0)]
    assert owner.startswith(f"process {winner.pid} on ")
    assert data.files("out") == whole
    csv = data.path("out", "tokenized_{}.csv")
    assert end(latecomer) == 2
    assert f"error: {csv} is being made by {owner}: " in late.read_text()
    for log, status in zip(logs, statuses):
        if status == 2:  # before the winner has signed there is no name to say
            says = [f"error: {csv} is being made by {who}: " for who in (owner, "another process")]
            assert any(text in log.read_text() for text in says)


def test_who_is_refused_is_not_told_of_a_process_that_died(data):
    dead = data.start("out", before=A_BLOCK)
    assert end(dead) == -9 and f"process {dead.pid} on" in data.owner("out")
    process = data.start("out", before=[partial(faults.delay, "begin", 2.0)])
    wait_for(lambda: f"process {process.pid} on" in data.owner("out"))
    status, said = data.said("out")
    assert status == 2 and "is being made by" in said
    assert f"process {dead.pid} on" not in said
    assert end(process) == 0


def test_the_lock_dies_with_its_process(data, whole):
    process = data.start("out", slow_s=0.5)
    wait_for(data.owner, "out")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert data.run("out") == 0
    assert data.files("out") == whole


@pytest.mark.parametrize("times", every(200, 2_000))
def test_two_processes_never_hold_the_lock_at_once(times, tmp_path):
    """Each removes the folder of blocks while it holds the lock, as at the end of a run."""
    holders = [faults.start_process(faults.hold_the_lock, str(tmp_path), times) for _ in range(3)]
    assert [end(holder) for holder in holders] == [0] * 3


def test_the_lock_lies_beside_the_blocks(data):
    process = data.start("out", slow_s=20.0)
    wait_for(data.owner, "out")
    shutil.rmtree(data.blocks("out"), ignore_errors=True)
    assert data.run("out") == 2
    process.kill()
    process.join()


# ----------------------------------------------------------------------------------- other settings

CHANGES = [
    ("model", ["--model", "encodec_48khz"], "--model: encodec_24khz -> encodec_48khz"),
    ("bandwidth", ["--bandwidth", "3"], "--bandwidth: 6.0 -> 3.0"),
    ("duration", ["--target_duration", "1"], "--target_duration: 2.0 -> 1.0"),
    ("overlap", ["--overlap", "0.5"], "--overlap: 0.1 -> 0.5"),
    ("aggregate", ["--aggregate", "medoid"], "--aggregate: mean -> medoid"),
    ("batch", ["--batch_size", "7"], "--batch_size: 4 -> 7"),
    ("fewer", ["--max_samples", "7"], f"--max_samples: {CLIPS} -> 7"),
]


@pytest.mark.parametrize("flags, says", [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_output_made_with_other_settings_is_left_alone(state, flags, says, data):
    killed = state == "unfinished"
    assert data.run("out", before=A_BLOCK if killed else []) == -9 * killed
    files = {p: p.read_bytes() for p in (data.folder / "out").rglob("*") if p.is_file()}
    status, said = data.said("out", *flags)
    assert status == 2
    assert says in said and "--overwrite" in said and "--output_dir" in said
    assert {p: p.read_bytes() for p in (data.folder / "out").rglob("*") if p.is_file()} == files
    assert data.run("out", *flags, "--overwrite") == 0
    assert data.run("fresh", *flags) == 0
    assert data.files("out") == data.files("fresh")
    name, value = says[2:].partition(":")[0], says.split()[-1]
    assert str(data.record("out")[name if name != "max_samples" else "num_clips"]) == value


@pytest.mark.parametrize("change", ["dataset", "weights", "versions"])
def test_a_changed_dataset_file_checkpoint_or_library_is_noticed(change, data):
    assert data.run("out") == 0
    flags, options = [], {}
    if change == "dataset":
        path = data.root / f"{STEM}.csv"
        path.write_text(path.read_text().replace("Label_0", "Other"))
    elif change == "weights":
        (data.folder / "weights.th").write_bytes(b"x")
        flags = ["--weights", data.folder / "weights.th"]
    else:
        options["before"] = [faults.other_version]
    status, said = data.said("out", *flags, **options)
    assert status == 2
    assert {"dataset": "dataset_csv_sha256", "weights": "--weights: untrained (seed 0) -> x",
            "versions": "'torch': '0.0'"}[change] in said  # fmt: skip
    assert data.run("out", "--overwrite", *flags, **options) == 0


def test_a_trial_is_replaced_by_a_larger_run_and_not_the_reverse(data, whole):
    assert data.run("out", "--max_samples", "7") == 0
    small = data.files("out")[0]
    assert whole[0].startswith(small)
    assert data.run("out") == 0
    assert data.files("out") == whole
    assert data.run("out", "--max_samples", "7") == 2
    assert data.files("out") == whole


def test_an_unfinished_trial_lends_its_full_blocks_to_a_larger_run(data, whole):
    assert data.run("out", "--max_samples", "7", before=A_BLOCK) == -9
    status, said = data.said("out")
    assert status == 0
    assert data.files("out") == whole
    assert f"going on after {BLOCK_CLIPS} of {CLIPS} clips" in said


def test_a_larger_run_while_files_are_away_keeps_the_finished_rows(data, whole):
    assert data.run("out", "--max_samples", "7") == 0
    away = data.folder / "away"
    faults.move_away(data.root / STEM, away)
    for name in ("008.wav", "009.wav"):
        shutil.copy2(away / name, data.root / STEM)
    before = {p: p.read_bytes() for p in (data.folder / "out").rglob("*") if p.is_file()}
    status, said = data.said("out")
    assert status == 2 and "000.wav" in said and "--overwrite" in said
    assert {p: p.read_bytes() for p in (data.folder / "out").rglob("*") if p.is_file()} == before
    for path in away.iterdir():
        shutil.copy2(path, data.root / STEM)
    assert data.run("out") == 0
    assert data.files("out") == whole


def test_a_finished_command_is_not_run_again(data):
    assert data.run("out") == 0
    before = {p.name: p.stat().st_mtime_ns for p in (data.folder / "out").iterdir()}
    status, said = data.said("out")
    assert status == 0 and "is finished already" in said
    after = {p.name: p.stat().st_mtime_ns for p in (data.folder / "out").iterdir()}
    lock = f".tokenized_{STEM}.lock"
    assert {**after, lock: 0} == {**before, lock: 0}


def test_the_blocks_go_when_every_clip_is_done(data):
    for i in BAD:
        data.mend(i)
    assert data.run("out") == 0
    names = ["tokenized_{}.csv", "tokenized_{}.json", "summary_{}.txt", ".tokenized_{}.lock"]
    there = {path.name for path in (data.folder / "out").iterdir()}
    assert there - {names[-1].format(STEM)} == {name.format(STEM) for name in names[:-1]}


def test_a_csv_of_unknown_origin_is_not_replaced(data, whole):
    csv = data.path("out", "tokenized_{}.csv")
    csv.parent.mkdir()
    csv.write_text("mine")
    assert data.run("out") == 2
    assert csv.read_text() == "mine"
    assert data.run("out", "--overwrite") == 0
    assert data.files("out") == whole


# -------------------------------------------------------------------------------------- other clips


@pytest.mark.parametrize("sizes", ["equal", "other"])
def test_another_folder_with_the_same_csv_is_not_finished_already(sizes, data):
    assert data.run("out") == 0
    rows = data.files("out")
    other = data.folder / "other"
    shutil.copytree(data.root, other)
    data.root = other
    length = 1600 if sizes == "equal" else 2000
    soundfile.write(data.clip(7), np.full(length, 0.25), 8_000)
    status, said = data.said("out")
    assert status == 2 and "007.wav" in said and "finished already" not in said
    assert data.files("out") == rows
    assert data.run("out", "--overwrite") == 0
    assert data.run("fresh") == 0
    assert data.files("out") == data.files("fresh") != rows


def test_a_copy_of_the_folder_is_the_same_clips(data):
    assert data.run("out") == 0
    copy = data.folder / "copy"
    shutil.copytree(data.root, copy, copy_function=shutil.copy)
    for path in copy.rglob("*.wav"):
        os.utime(path, (1e9, 1e9))
    data.root = copy
    status, said = data.said("out")
    assert status == 0 and "is finished already" in said


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_clip_that_was_mended_during_an_unfinished_run_is_made_again(flags, data):
    assert data.run("out", *flags, before=A_BLOCK) == -9
    assert set(data.block_times("out")) == {0}
    data.mend(2)
    assert data.run("out", *flags) == 0
    assert data.run("fresh") == 0
    assert data.files("out") == data.files("fresh")


def test_a_failed_clip_that_came_back_is_made_by_the_same_command(data, whole):
    """And only its block is made anew; a clip that still fails is no reason to do more."""
    assert data.run("out") == 0
    before = data.block_times("out")
    data.mend(5)
    assert data.run("out") == 0
    after = data.block_times("out")
    assert {number for number in after if after[number] != before[number]} == {1}
    assert data.run("fresh") == 0
    assert data.files("out") == data.files("fresh") != whole
    assert b"005.wav" not in data.files("out")[1]
    status, said = data.said("out")
    assert status == 0 and "is finished already" in said


def make_noisy(data):
    """A second dataset, of the first one's clips."""
    shutil.copytree(data.root / STEM, data.root / "train_noisy")
    shutil.copy(data.root / f"{STEM}.csv", data.root / "train_noisy.csv")


def test_both_anew_does_not_make_curated_twice(data):
    make_noisy(data)
    both = ("out", "--dataset", "both")
    assert data.run(*both) == 0
    times = {stem: data.path("out", "tokenized_{}.csv", stem).stat().st_mtime_ns
             for stem in (STEM, "train_noisy")}  # fmt: skip
    process = data.start(*both, "--overwrite", slow_s=0.8)
    wait_for(lambda: f"process {process.pid} " in data.owner("out"))
    wait_for(lambda: data.record("out")["finished"] and data.block_times("out", "train_noisy"))
    process.kill()
    process.join()
    assert not data.record("out", "train_noisy")["finished"]
    curated = data.path("out", "tokenized_{}.csv").stat().st_mtime_ns
    noisy = data.block_times("out", "train_noisy")
    assert curated != times[STEM]
    status, said = data.said(*both, "--overwrite")
    assert status == 0, said
    assert data.path("out", "tokenized_{}.csv").stat().st_mtime_ns == curated
    assert noisy.items() <= data.block_times("out", "train_noisy").items()
    assert data.run(*both, "--overwrite") == 0  # nothing was interrupted: anew once more
    assert data.path("out", "tokenized_{}.csv").stat().st_mtime_ns != curated


def test_both_anew_makes_both_anew_wherever_it_is_interrupted(data):
    """Killed at each step until both records say what is being made."""
    make_noisy(data)
    assert data.run("made", "--dataset", "both", "--max_samples", "4") == 0
    for step in range(0, 60, 4):
        folders = [f"out_{i}" for i in range(step, step + 4)]
        for folder in folders:
            shutil.copytree(data.folder / "made", data.folder / folder)
        flags = ("--dataset", "both", "--max_samples", "4", "--overwrite")
        killed = [data.start(folder, *flags, kill_at=step + i) for i, folder in enumerate(folders)]
        assert [end(process) for process in killed] == [-9] * 4
        again = [data.start(folder, *flags) for folder in folders]
        assert [end(process) for process in again] == [0] * 4
        for i, folder in enumerate(folders):
            for stem in (STEM, "train_noisy"):
                old, new = (
                    data.path(where, "tokenized_{}.csv", stem) for where in ("made", folder)
                )
                assert new.stat().st_mtime_ns != old.stat().st_mtime_ns, (stem, step + i)
                assert new.read_bytes() == old.read_bytes()


def leave_extras(folder):
    """What --plot, --listen and --parquet leave, by name."""
    (folder / f"listen_{STEM}").mkdir()
    paths = [f"listen_{STEM}/000_heard.wav", f"summary_{STEM}.png", f"tokenized_{STEM}.parquet"]
    for path in paths:
        (folder / path).write_text("old")
    return [folder / f"listen_{STEM}", *(folder / path for path in paths)]


@pytest.mark.parametrize("how", ["overwrite", "larger"])
def test_old_pictures_and_wavs_do_not_survive_new_rows(how, data):
    assert data.run("out", "--max_samples", "7") == 0
    extras = leave_extras(data.folder / "out")
    assert (
        data.run("out", *(["--max_samples", "7", "--overwrite"] if how == "overwrite" else [])) == 0
    )
    assert not [path for path in extras if path.exists()]


def test_a_run_anew_in_which_every_clip_fails_leaves_no_old_rows(data):
    assert data.run("out") == 0
    leave_extras(data.folder / "out")
    for i in range(CLIPS):
        data.clip(i).write_bytes(b"")
    status, said = data.said("out", "--overwrite")
    assert status == 1 and f"none of the {CLIPS} clips" in said
    kept = {f".tokenized_{STEM}.lock", f"failed_{STEM}.csv"}
    kept |= {f"tokenized_{STEM}.json", f"tokenized_{STEM}.blocks"}
    assert {path.name for path in (data.folder / "out").iterdir()} <= kept
    assert not data.record("out")["finished"]
    for flags in ([], ["--overwrite"]):
        status, said = data.said("out", *flags)
        assert status == 1 and "finished already" not in said


def test_a_kill_at_any_step_of_a_run_in_which_every_clip_fails_finishes_nothing(data):
    """Four processes at a time. Old rows and new failures never stand side by side as one run's."""
    few = ("--max_samples", "4")
    assert data.run("made", *few) == 0
    leave_extras(data.folder / "made")
    old = data.files("made")
    for i in range(CLIPS):
        data.clip(i).write_bytes(b"")
    first, statuses = 0, [-9] * 4
    while statuses == [-9] * 4:
        folders = [f"out_{i}" for i in range(first, first + 4)]
        for folder in folders:
            shutil.copytree(data.folder / "made", data.folder / folder)
        processes = [data.start(folder, *few, "--overwrite", kill_at=first + i)
                     for i, folder in enumerate(folders)]  # fmt: skip
        statuses = [end(process) for process in processes]
        assert set(statuses) <= {-9, 1}
        for folder in folders:
            if data.record(folder)["finished"]:
                assert data.files(folder) == old
        direct = [f"{folder}_direct" for folder in folders]
        for folder, copy in zip(folders, direct):
            shutil.copytree(data.folder / folder, data.folder / copy)
        logs = [data.folder / f"{folder}.txt" for folder in folders]
        again = [data.start(folder, *few, log=log) for folder, log in zip(folders, logs)]
        assert {end(process) for process in again} <= {1, 2}  # 2: the clips changed, nothing else
        assert "finished already" not in "".join(log.read_text() for log in logs)
        finals = [*folders, *direct]
        last = [data.start(folder, *few, "--overwrite") for folder in finals]
        assert [end(process) for process in last] == [1] * 8
        old_names = ("tokenized_{}.csv", "tokenized_{}.parquet", "summary_{}.txt", "summary_{}.png")
        for folder in finals:
            names = {path.name for path in (data.folder / folder).iterdir()}
            assert not names & {name.format(STEM) for name in (*old_names, "listen_{}")}
        first += 4
    assert first > 20


# ----------------------------------------------------------------------------- the machine at fault


def test_an_error_in_reading_the_record_stops_the_run_and_deletes_nothing(data, whole):
    assert data.run("out", before=A_BLOCK) == -9
    before = {p: p.read_bytes() for p in (data.folder / "out").rglob("*") if p.is_file()}
    for flags in ([], ["--overwrite"]):
        fault = partial(faults.fail_to_read, f"tokenized_{STEM}.json", errno.EIO)
        status, said = data.said("out", *flags, before=[fault])
        assert status == 1 and "Input/output error" in said and "Traceback" not in said
        assert {
            p: p.read_bytes() for p in (data.folder / "out").rglob("*") if p.is_file()
        } == before
    blocks = data.block_times("out")
    assert data.run("out") == 0
    assert data.files("out") == whole
    assert blocks.items() <= data.block_times("out").items()


SEVENTH = "007.wav"
MACHINE = {
    "EMFILE": (partial(faults.at_clip, SEVENTH, faults.use_up_descriptors), "Too many open files"),
    "EIO": (partial(faults.fail_to_read, SEVENTH, errno.EIO), "Input/output error"),
    "ENOMEM": (partial(faults.fail_to_read, SEVENTH, errno.ENOMEM), "Cannot allocate memory"),
    "MemoryError": (faults.no_memory_to_decode, "MemoryError"),
    "ESTALE": (partial(faults.fail_to_stat, SEVENTH, errno.ESTALE), "Stale file handle"),
}


@pytest.mark.parametrize("fault, says", MACHINE.values(), ids=MACHINE)
def test_a_fault_of_the_machine_stops_the_run_and_blames_no_clip(fault, says, data, whole):
    assert data.run("out", before=A_BLOCK) == -9
    blocks = data.block_times("out")
    status, said = data.said("out", before=[fault])
    assert status == 1 and says in said and "Traceback" not in said
    assert "the same command goes on" in said
    assert not data.path("out", "failed_{}.csv").exists()
    assert blocks.items() <= data.block_times("out").items()
    assert data.run("out") == 0
    assert data.files("out") == whole
    assert blocks.items() <= data.block_times("out").items()


@pytest.mark.parametrize("how", ["emptied", "gone"])
def test_an_audio_folder_that_is_unmounted_halfway_stops_the_run(how, data, whole):
    folder, away = data.root / STEM, data.folder / "away"
    what = [faults.move_away, str(folder), str(away)] if how == "emptied" else [folder.rename, away]
    status, said = data.said("out", before=[partial(faults.at_clip, SEVENTH, *what)])
    assert status == 1 and "the same command goes on" in said
    assert not data.path("out", "failed_{}.csv").exists()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(away, folder)
    assert data.run("out") == 0
    assert data.files("out") == whole


@pytest.mark.parametrize("place", ["/dev/null", "/proc"])
def test_a_home_that_cannot_be_written_ends_in_a_sentence_or_untrained_weights(place, data):
    home = partial(faults.set_environment, HOME=place, TORCH_HOME=f"{place}/torch",
                   XDG_CACHE_HOME=f"{place}/cache", HF_HUB_OFFLINE="1")  # fmt: skip
    status, said = data.said("out", "--weights", "pretrained", before=[home])
    assert status == 2 and "error: the pretrained weights could not be downloaded" in said
    assert "--weights" in said and "Traceback" not in said
    argv = ("out", "--weights", "pretrained", "--dataset", "sample")
    status, said = data.said(*argv, before=[home])
    assert status == 0 and "UNTRAINED" in said


@pytest.mark.parametrize("what", ["a file", "under a file", "a dangling link", "read-only",
                                  "a read-only output", "without locks"])  # fmt: skip
def test_an_output_folder_that_cannot_be_used_is_refused_in_a_sentence(what, data):
    """As root too: the process gives up what lets root ignore permissions."""
    place = data.folder / "place"
    folder = place
    if what.startswith("a read-only"):
        assert data.run("place") == 0
    if "file" in what:
        place.write_text("mine")
        folder = place / "out" if what == "under a file" else place
    elif what == "a dangling link":
        place.symlink_to(data.folder / "nowhere" / "at all")
    elif what == "read-only":
        place.mkdir()
        folder = place / "out"
    if "read-only" in what:
        for path in [place, *place.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = [faults.drop_capabilities, *[faults.no_flock] * (what == "without locks")]
    status, said = data.said(folder.relative_to(data.folder), "--overwrite", before=before)
    place.is_symlink() or place.chmod(0o755)
    assert status == 2, said
    assert f"error: --output_dir {folder} cannot be used" in said and "Traceback" not in said
    assert "blocks are kept" not in said


STREAMS = {
    "stdout closed": [(1, None)],
    "stdout full": [(1, "/dev/full")],
    "stderr closed": [(2, None)],
    "both closed": [(1, None), (2, None)],
    "both full": [(1, "/dev/full"), (2, "/dev/full")],
}


@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
def test_a_run_that_nobody_can_read_is_finished_all_the_same(streams, data, whole):
    before = [partial(faults.close_stream, *stream) for stream in streams]
    status, said = data.said("out", "--debug", before=before)
    assert status == 0, said
    assert data.files("out") == whole and data.record("out")["finished"]
    assert "blocks are kept" not in said and "Traceback" not in said
    assert data.run("out", before=before) == 0  # finished already
    assert data.run("out", "--overlap", "0.5", before=before) == 2
    assert data.files("out") == whole


def test_the_command_itself_ends_well_without_its_streams(tmp_path):
    command = f'"{sys.executable}" "{ROOT / "encodec_tokenizer.py"}" --dataset sample --device cpu '
    command += '--max_samples 2 --weights untrained --output_dir "{}" {}'
    ends = {"closed": ">&-", "full": ">/dev/full 2>/dev/full", "none": ">&- 2>&-"}
    processes = {
        name: subprocess.Popen(
            ["sh", "-c", command.format(tmp_path / name, end)], stderr=subprocess.PIPE, text=True
        )
        for name, end in ends.items()
    }
    for name, process in processes.items():
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "Error" not in err and "blocks are kept" not in err
        assert json.loads((tmp_path / name / "tokenized_sample.json").read_text())["finished"]


def test_a_folder_whose_name_is_not_utf8_can_miss_a_clip(data):
    folder = data.folder / os.fsdecode(b"clips\xff")
    shutil.copytree(data.root / STEM, folder)
    (folder / "007.wav").unlink()
    argv = ("out", "--metadata", data.root / f"{STEM}.csv", "--audio_dir", folder)
    status, said = data.said(*argv)
    assert status == 0, said
    failed = data.files("out")[1]
    assert failed.count(b"\n") == 1 + len(BAD) + 1 and b"\n007.wav,no such file in clips" in failed
    status, said = data.said(*argv)
    assert status == 0 and "finished already" in said


# ------------------------------------------------------------------------------------- many at once


def ranks(data, folder, *flags, more_of_second=(), before_second=(), slow_s=0.0):
    """Two of torchrun's processes, whose logs are log_0.txt and log_1.txt."""
    port, processes = faults.free_port(), []
    for number in (0, 1):
        log = data.folder / f"log_{number}.txt"
        log.write_text("")
        flags = [*flags, *(more_of_second if number else ())]
        before = before_second if number else ()
        rank = (number, 2, port)
        started = data.start(folder, *flags, before=before, slow_s=slow_s, rank=rank, log=log)
        processes.append(started)
    return processes


def test_two_ranks_make_the_bytes_of_one_process(data, whole):
    assert [end(process) for process in ranks(data, "out")] == [0, 0]
    assert data.files("out") == whole
    said = "".join((data.folder / f"log_{i}.txt").read_text() for i in (0, 1))
    assert said.count("UNTRAINED WEIGHTS") == 1  # one of them speaks


DISAGREEMENTS = {
    "aggregate": (["--aggregate", "medoid"], [], "--aggregate: "),
    "duration": (["--target_duration", "1"], [], "--target_duration: "),
    "clips": (["--max_samples", "7"], [], "--max_samples: "),
    "device": ([], [partial(faults.use_device, "cuda:0")], "device: "),
    "library": ([], [faults.other_version], "versions: "),
    "datasets": (["--dataset", "both"], [], "dataset"),
    "output": (["--output_dir", "elsewhere"], [], "output_dir"),
}


@pytest.mark.parametrize("flags, before, says", DISAGREEMENTS.values(), ids=DISAGREEMENTS)
def test_ranks_with_other_settings_are_refused_before_anything_starts(flags, before, says, data):
    make_noisy(data)
    flags = [data.folder / flag if flag == "elsewhere" else flag for flag in flags]
    processes = ranks(data, "out", more_of_second=flags, before_second=before)
    assert [end(process) for process in processes] == [2, 2]
    said = [(data.folder / f"log_{i}.txt").read_text() for i in (0, 1)]
    assert says in said[0] and said[0].count("error: ") == 1
    assert "error" not in said[1]
    for folder in ("out", "elsewhere"):
        assert not list((data.folder / folder).glob("[!.]*"))


def test_a_refusal_on_the_first_rank_is_every_ranks_refusal(data):
    assert data.run("out") == 0
    processes = ranks(data, "out", "--overlap", "0.5")
    assert [end(process) for process in processes] == [2, 2]
    said = [(data.folder / f"log_{i}.txt").read_text() for i in (0, 1)]
    assert "--overlap: 0.1 -> 0.5" in said[0] and said[0].count("error: ") == 1
    assert "error" not in said[1] and "blocks are kept" not in said[1]


@pytest.mark.parametrize("change", ["settings", "clip", "clip, going on"])
def test_an_orphan_of_a_dead_job_leaves_no_row_in_a_new_run(change, data):
    """Rank 1 is held in its block, rank 0 killed; rank 1 goes on while a new run is at work."""
    sign, wrote, go_on, end_now = (
        data.folder / name for name in ("sign", "wrote", "go on", "end now")
    )
    at_work = partial(faults.at_clip, "007.wav", sign.touch)
    held = partial(faults.wait_before, "write_block", str(go_on))
    writes = partial(faults.leave_sign_when, "write_block", str(wrote))
    dead, orphan = ranks(data, "out", before_second=[at_work, held, writes])
    wait_for(sign.exists)
    dead.kill()
    dead.join()
    assert 1 not in data.block_times("out")
    flags = ["--aggregate", "none"] if change == "settings" else []
    if change.startswith("clip"):
        data.mend(4)
    anew = [] if change.endswith("going on") else ["--overwrite"]
    at_work = partial(faults.wait_before, "join", str(end_now))
    new = data.start("out", *flags, *anew, before=[at_work])
    wait_for(lambda: f"process {new.pid} " in data.owner("out") and 1 in data.block_times("out"))
    assert not wrote.exists()
    go_on.touch()
    assert end(orphan) == 1 and wrote.exists()
    assert not data.path("out", "tokenized_{}.csv").exists()  # the new run is still at work
    end_now.touch()
    assert end(new) == 0
    assert data.run("fresh", *flags) == 0
    assert data.files("out") == data.files("fresh")


def test_the_weights_are_downloaded_once_a_node(data):
    cache, log = data.folder / "cache", data.folder / "downloads.txt"
    home = partial(faults.set_environment, TORCH_HOME=str(cache))
    download = partial(faults.download_slowly, str(log))
    port = faults.free_port()
    processes = [
        data.start("out", "--weights", "pretrained", before=[home, download], rank=(i, 3, port))
        for i in range(3)
    ]
    assert [end(process) for process in processes] == [0, 0, 0]
    assert log.read_text() == "rank 0\n"


def test_cores_are_those_of_the_affinity_and_of_the_container(monkeypatch):
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(ours)})
    try:
        assert script.available_cores() == 1
    finally:
        os.sched_setaffinity(0, ours)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    texts = {"max 100000\n": 16, "150000 100000\n": 2, "50000 100000\n": 1, "9900000 100000": 16}
    for text, cores in texts.items():
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert script.available_cores() == cores

    def gone(path, *_, **__):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", gone)
    assert script.available_cores() == 16


def torchrun(data, folder, processes, *flags, restarts=0, program=None, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    command += [program or Path(faults.__file__), *data.argv(folder, *flags)]
    return subprocess.Popen(
        [*map(str, command), "--weights", "untrained", "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


def kill_second_rank(data, folder, parent):
    """SIGKILL for rank 1 of torchrun's once a block is there."""
    wait_for(lambda: data.block_times(folder) or parent.poll() is not None)
    for path in Path("/proc").glob("[0-9]*"):
        try:
            its_parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if its_parent == parent.pid and b"RANK=1" in environment:
            os.kill(int(path.name), signal.SIGKILL)
            return
    raise AssertionError("there is no rank 1")


def test_a_killed_rank_is_restarted_by_torchrun(data, whole):
    process = torchrun(data, "two", 2, restarts=2, SLOW_S="0.5")
    kill_second_rank(data, "two", process)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "attempt 1, rank 1" in err
    assert data.files("two") == whole


@pytest.mark.slow
def test_a_rerun_goes_on_with_another_number_of_processes(data, whole):
    for processes in (2, 1, 3):
        process = torchrun(data, "many", processes, SLOW_S="0.5" if processes < 3 else "0")
        if processes == 2:
            kill_second_rank(data, "many", process)
        elif processes == 1:
            wait_for(lambda p: f"process {p.pid}" not in data.owner("many"), process)
            process.send_signal(15)
        _, err = process.communicate(timeout=300)
        assert (process.returncode == 0) == (processes == 3), err
    assert data.files("many") == whole


@pytest.mark.slow
def test_tokens_do_not_depend_on_the_number_of_threads_or_processes(make_dataset, sound, tmp_path):
    """The command itself with its own blocks, so that each process has some."""
    noise = sound(3.0, 8_000)[:, 0]
    root = make_dataset({f"{i:03d}.wav": (noise[i * 10 :][:1600], 8_000) for i in range(160)})
    data, program = Data(tmp_path, root), ROOT / "encodec_tokenizer.py"
    for folder, count, threads in (("one", 1, 1), ("two", 2, 1), ("three", 3, 2)):
        process = torchrun(data, folder, count, program=program, OMP_NUM_THREADS=str(threads))
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    rows = [
        data.path(folder, "tokenized_{}.csv").read_bytes() for folder in ("one", "two", "three")
    ]
    assert rows[0] == rows[1] == rows[2]


# -------------------------------------------------------------------------------------- odd content


def test_a_name_or_label_that_a_spreadsheet_would_run_is_kept_and_told(
    make_dataset, sound, tmp_path
):
    names = ["=1+1.wav", "a.wav", "@b.wav"]
    clips = {name: (sound(0.2), 44_100) for name in names}
    root = make_dataset(clips, rows=list(zip(names, ["x", "=HYPERLINK(1)", "-y"])))
    data = Data(tmp_path, root)
    assert data.run("out") == 0
    text = data.path("out", "tokenized_{}.csv").read_text()
    assert "\n=1+1.wav,x," in text and "\na.wav,=HYPERLINK(1)," in text and "\n@b.wav,-y," in text
    summary = data.path("out", "summary_{}.txt").read_text()
    assert "WARNING: 4 names or labels begin with" in summary


MUTATE = """
import random, sys
from pathlib import Path
sys.path[:0] = [{root!r}]
import encodec_tokenizer as script
settings = [script.resolve_device(script.parse_settings(["--device", "cpu", *flags]))
            for flags in ([], ["--model", "encodec_48khz"])]
seeds, count = [Path(p).read_bytes() for p in {files!r}], {count}
chance = random.Random(7)
good = bad = 0
for i in range(count):
    data = bytearray(seeds[i % len(seeds)])
    kind = chance.randrange(4)
    if kind == 0:
        for _ in range(chance.randrange(1, 9)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[chance.randrange(len(data)):]
    elif kind == 2:  # sizes, rates and channel counts of the header
        at = chance.randrange(4, 60)
        data[at:at + 4] = chance.choice([b"\\0" * 4, b"\\xff" * 4, chance.randbytes(4)])
    else:
        at = chance.randrange(min(len(data), 200))
        data[at:at + chance.randrange(8)] = chance.randbytes(chance.randrange(8))
    path = Path({folder!r}) / "clip"
    path.write_bytes(data)
    clip = script.load_clip(script.Clip("clip"), settings[i % 2], path.parent)
    if clip.error:
        assert "\\n" not in clip.error and not clip.chunks
        bad += 1
    else:
        assert clip.chunks and all(chunk.isfinite().all() for chunk in clip.chunks)
        good += 1
print(good, bad)
"""


@pytest.mark.parametrize("count", every(1_000, 10_000))
def test_mutated_files_are_honest_rows_or_honest_failures(count, tmp_path, sound):
    files = []
    for name, channels in (("a.wav", 1), ("b.wav", 2), ("c.flac", 1), ("d.ogg", 2), ("e.mp3", 1)):
        soundfile.write(tmp_path / name, sound(0.3, 44_100, channels), 44_100)
        files.append(str(tmp_path / name))
    (tmp_path / "m").mkdir()
    code = MUTATE.format(root=str(ROOT), files=files, count=count, folder=str(tmp_path / "m"))
    limit = 4 * 2**30  # of memory: an absurd header must not reserve it

    def limited():
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=1200,
        preexec_fn=limited,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    good, bad = map(int, done.stdout.split())
    assert good + bad == count and good > count // 20 and bad > count // 20


def test_an_hour_long_clip_is_refused_and_takes_no_memory(make_dataset, tmp_path):
    root = make_dataset(
        {"short.wav": (np.ones(100), 44_100)}, rows=[("hour.wav", "x"), ("short.wav", "y")]
    )
    path = root / STEM / "hour.wav"
    with soundfile.SoundFile(path, "w", 44_100, 1, "PCM_U8", format="WAV") as file:
        for _ in range(60):
            file.write(np.zeros(44_100 * 60, dtype="int16"))
    data = Data(tmp_path, root)
    # 3600 s in float32 are 635 MB.
    status, said = data.said("out", before=[partial(faults.limit_memory, 400 * 2**20)])
    assert status == 0, said
    assert b'hour.wav,"3600 s long, --max_duration is 600 s"' in data.files("out")[1]


def test_json_names_what_made_the_file(data):
    assert data.run("out") == 0
    facts = data.record("out")
    made = (facts["num_clips"], facts["tokenized"], facts["failed"])
    assert made == (CLIPS, CLIPS - len(BAD), len(BAD)) and facts["finished"]
