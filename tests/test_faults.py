"""Nothing finished is lost, and no row is wrong: kills, other settings, machines at fault."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

import faults
import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import ROOT
from faults import BLOCK_CLIPS

import encodec_tokenizer as script

CLIPS = BLOCK_CLIPS * 5 // 2
BLOCKS = 3
BAD = (1, 5, 6)  # empty files
STEM = "train_curated"
JSON = f"tokenized_{STEM}.json"
A_BLOCK = [faults.kill_after_a_block]  # the first block is there, and no other
OTHER = ("--aggregate", "none")  # gives other bytes from the same codes


class Data:
    """Two and a half blocks of short clips, and runs of the script on them."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root, self.log = folder, root, folder / "log.txt"
        self.audio, self.table = root / STEM, root / f"{STEM}.csv"

    def argv(self, *flags, out="out"):
        return ["--input_dir", self.root, "--output_dir", self.folder / out, *flags]

    def start(self, *flags, out="out", kill_at=None, before=(), log=None, **options):
        """kill_at: the step to the disk (faults.kill_at_step)."""
        kill = [] if kill_at is None else [partial(faults.kill_at_step, kill_at)]
        argv, log = self.argv(*flags, out=out), log or self.log
        return faults.start(argv, log, before=[*before, *kill], **options)

    def run(self, *flags, **options):
        """The exit status; -9 for a process that was killed. See `said`."""
        self.log.write_text("")
        return end(self.start(*flags, **options))

    @property
    def said(self):
        """What the last run printed."""
        return self.log.read_text()

    def csv(self, out="out"):
        return self.folder / out / f"tokenized_{STEM}.csv"

    def failed(self, out="out"):
        return self.folder / out / f"failed_{STEM}.csv"

    def rows(self, out="out"):
        return [self.csv(out).read_bytes(), self.failed(out).read_bytes()]

    def blocks(self, out="out"):
        return self.folder / out / f"tokenized_{STEM}.blocks"

    def block_files(self, out="out"):
        """Name of a block -> which file it is, and of when."""
        stats = {path.name: path.stat() for path in self.blocks(out).glob("[0-9]*-*.npz")}
        return {name: (status.st_ino, status.st_mtime_ns) for name, status in stats.items()}

    def snapshot(self):
        return {p: p.read_bytes() for p in (self.folder / "out").rglob("*") if p.is_file()}

    def record(self, out="out"):
        return json.loads((self.folder / out / JSON).read_text())

    def clip(self, number):
        return self.audio / f"{number:03d}.wav"

    def mend(self, *numbers):
        """Make good clips of them, with samples of their own."""
        for number in numbers:
            soundfile.write(self.clip(number), np.full(1600, (number + 1) / 16), 8_000)

    def ranks(self, size, *flags, options=None, **common):
        """Processes as torchrun starts them; `options` of some, by rank. See `rank_log`."""
        options = {rank: common | (options or {}).get(rank, {}) for rank in range(size)}
        for rank, own in options.items():
            own |= {"rank": (rank, size), "log": self.rank_log(rank)}
        return [self.start(*flags, **own) for own in options.values()]

    def rank_log(self, rank):
        return self.folder / f"log_{rank}.txt"

    def killed_at_each_step(self, *flags, made=None):
        """Names of outputs of runs, three at a time, each killed at a later step; ends after 0."""
        for first in count(0, 3):
            steps = {f"killed_at_{step}": step for step in range(first, first + 3)}
            for out in steps if made else ():
                shutil.copytree(self.folder / made, self.folder / out)
            killed = [self.start(*flags, out=out, kill_at=step) for out, step in steps.items()]
            statuses = ends(killed)
            assert set(statuses) <= {0, -9}
            yield steps
            if 0 in statuses:
                assert first > 20
                return


def end(process) -> int:
    """The exit status of a process; one that hangs is ended, and fails the test."""
    process.join(90)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the process hangs")
    return process.exitcode


def ends(processes) -> list[int]:
    return [end(process) for process in processes]


def wait_for(condition):
    for _ in range(6000):
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError("it never came")


def every(steps, slow_steps):
    """The parameter in two lengths: a short one for the suite, a long one marked slow."""
    return [steps, pytest.param(slow_steps, marks=pytest.mark.slow)]


def many(make_dataset, sound, folder, clips) -> Data:
    noise = sound(3.0, 8_000)[:, 0]
    named = {f"{i:03d}.wav": (noise[i * 10 :][:1600], 8_000) for i in range(clips)}
    return Data(folder, make_dataset(named))


@pytest.fixture
def data(make_dataset, sound, tmp_path):
    """Clips of which some are bad."""
    made = many(make_dataset, sound, tmp_path, CLIPS)
    for i in BAD:
        made.clip(i).write_bytes(b"")
    return made


@pytest.fixture
def expected(data, kept={}):  # noqa: B006 - the clips are the same in every test
    """The rows of an undisturbed run."""
    if not kept:
        assert data.run(out="expected") == 0, data.said
        kept["rows"] = data.rows("expected")
    return kept["rows"]


# -------------------------------------------------------------------------------------------- kills


def test_a_kill_at_any_step_to_the_disk_loses_nothing(data):
    """Each run of two blocks is killed at its step, again while it resumes, and then not."""
    few = ("--max_samples", "6")
    assert data.run(*few, out="whole") == 0
    expected = data.rows("whole")
    for steps in data.killed_at_each_step(*few):
        before = {out: data.block_files(out) for out in steps}
        for out in steps:
            assert not data.csv(out).exists() or data.csv(out).read_bytes() == expected[0]
        again = [data.start(*few, out=out, kill_at=n * 7 % 30) for out, n in steps.items()]
        assert set(ends(again)) <= {0, -9}
        assert ends([data.start(*few, out=out) for out in steps]) == [0] * 3
        for out in steps:
            assert data.rows(out) == expected and len(data.block_files(out)) == 2
            assert before[out].items() <= data.block_files(out).items()  # none is made again


@pytest.mark.parametrize("kills", every(12, 200))
def test_random_kills_over_resumed_runs_change_nothing(kills, data, expected):
    moments, rounds, done = random.Random(4), 0, 0
    while done < kills:
        out = f"round_{rounds}"
        process = data.start(out=out, slow_s=0.1)
        time.sleep(moments.uniform(0.05, 0.5))
        before = data.block_files(out)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        done += process.exitcode == -9
        assert before.items() <= data.block_files(out).items()
        rounds += process.exitcode == 0
    assert data.run(out=out) == 0
    for path in data.folder.glob("round_*"):
        assert data.rows(path.name) == expected


@pytest.mark.parametrize("times", every(2, 50))
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_and_says_how_many_clips_it_kept(
    number, status, times, data, expected
):
    moments = random.Random(2)
    for out in map(str, range(times)):
        data.log.write_text("")
        process = data.start(out=out, slow_s=0.5)
        wait_for(lambda: data.block_files(out))  # noqa: B023
        time.sleep(moments.uniform(0, 0.3))
        os.kill(process.pid, number)
        assert end(process) == status
        clips = BLOCK_CLIPS * len(data.block_files(out))
        kept = f"\n{clips} of {CLIPS} clips are kept; the same command resumes there\n"
        assert kept in data.said and "Traceback" not in data.said
        assert data.run(out=out) == 0 and data.rows(out) == expected


def test_overwrite_killed_at_any_step_keeps_old_or_new_rows(data):
    """Blocks of both settings are there, so that the steps are those of the outputs."""
    few = ("--max_samples", "4")
    assert data.run(*few, out="made") == data.run(*few, *OTHER, out="new") == 0
    old, new = data.csv("made").read_bytes(), data.csv("new").read_bytes()
    assert old != new
    shutil.copytree(data.blocks("new"), data.blocks("made"), dirs_exist_ok=True)
    flags = (*few, *OTHER, "--overwrite")
    for steps in data.killed_at_each_step(*flags, made="made"):
        for out in steps:
            if data.csv(out).exists():
                made = data.csv(out).read_bytes(), data.record(out)["aggregate"]
                assert made in [(old, "mean"), (new, "none")]
            else:
                assert new in [path.read_bytes() for path in data.blocks(out).glob("*.tmp")]
        assert ends([data.start(*flags, out=out) for out in steps]) == [0] * 3
        assert {data.csv(out).read_bytes() for out in steps} == {new}


def test_overwrite_keeps_the_old_rows_when_every_clip_fails(data):
    few = ("--max_samples", "1")
    assert data.run(*few) == 0
    before = data.snapshot()
    data.clip(0).write_bytes(b"")
    assert data.run(*few, "--overwrite") == 1
    assert "none of the 1 clips could be tokenized" in data.said and "stays as it is" in data.said
    assert before.items() <= data.snapshot().items()
    assert not data.failed().exists()  # it would belong to other rows


# -------------------------------------------------------------------------------- nothing gets lost


@pytest.mark.parametrize("failures", [0, len(BAD)])
@pytest.mark.parametrize("gone", ["files", "folder"])
def test_rows_stay_when_the_audio_of_a_finished_run_goes(gone, failures, data):
    if not failures:
        data.mend(*BAD)
    assert data.run() == 0
    csv, blocks = data.csv().read_bytes(), data.block_files()
    shutil.rmtree(data.audio)
    if gone == "files":
        data.audio.mkdir()
    assert data.run() == 0 and "finished already" in data.said
    assert data.run("--parquet") == 0, data.said
    assert re.search(r"note: \d+ clips' files are gone; their rows stay", data.said)
    assert data.csv().read_bytes() == csv and data.block_files() == blocks
    table = pd.read_parquet(data.folder / "out" / f"tokenized_{STEM}.parquet")
    assert len(table) == CLIPS - failures


def test_a_corrected_label_encodes_nothing(data, expected):
    assert data.run() == 0
    blocks = data.block_files()
    data.table.write_text(data.table.read_text().replace("Label_0", "Bark"))
    assert data.run() == 0 and data.block_files() == blocks
    assert data.rows()[0] == expected[0].replace(b"Label_0", b"Bark") != expected[0]


@pytest.mark.parametrize("what", ["csv", "all outputs", "blocks of a killed run"])
def test_what_went_away_comes_back(what, data, expected):
    """Outputs without encoding."""
    killed = what.startswith("blocks")
    assert data.run(before=A_BLOCK * killed) == -9 * killed
    for path in [*(data.folder / "out").iterdir()]:
        if path == data.csv() or (what != "csv" and path.is_file() != killed):
            path.rename(data.folder / path.name)
    assert data.run() == 0 and data.rows() == expected
    assert data.said.count("made block") == BLOCKS * killed


def test_a_finished_run_needs_no_blocks_but_for_other_outputs(data, expected):
    assert data.run() == 0
    shutil.rmtree(data.blocks())
    assert data.run() == 0
    counts = f"{CLIPS} clips: {CLIPS - len(BAD)} tokenized, {len(BAD)} failed"
    assert f"is finished already: {counts} (see {data.failed()})" in data.said
    assert "made block" not in data.said and not data.blocks().exists()
    assert data.run("--parquet") == 0
    assert data.said.count("made block") == BLOCKS and data.rows() == expected


@pytest.mark.parametrize("why", ["block deleted", "mended", "larger"])
def test_a_block_that_lost_a_clip_is_not_made_again(why, data):
    """Its row would be lost."""
    assert data.run(*["--max_samples", "6"] * (why == "larger")) == 0
    data.clip(4).unlink()
    if why == "mended":
        data.mend(5)
    elif why == "block deleted":
        shutil.rmtree(data.blocks())
    before = data.snapshot()
    assert data.run("--parquet") == 2
    assert "004.wav" in data.said and "--overwrite" not in data.said
    assert data.snapshot() == before


def test_foreign_files_among_the_blocks_are_left_alone(data, expected):
    assert data.run(before=A_BLOCK) == -9
    (block,) = data.blocks().iterdir()
    for name in (f"._{block.name}", "notes.txt", "._x.tmp"):
        (data.blocks() / name).write_text("foreign")
    for name in ("00001-folder.npz", "folder.tmp"):
        (data.blocks() / name).mkdir()
    (data.blocks() / "renamed meanwhile.tmp").symlink_to("nowhere")  # as by another process
    stale = data.blocks() / f"{'0' * 32}.tmp"
    stale.write_text("of a killed run")
    for path in (stale, data.blocks() / "folder.tmp"):
        os.utime(path, (1e9, 1e9))
    foreign = {path.name for path in data.blocks().iterdir()} - {stale.name}
    assert data.run() == 0, data.said
    assert data.rows() == expected
    assert foreign <= {path.name for path in data.blocks().iterdir()} and not stale.exists()
    assert data.said.count("made block") == 2 and f" {CLIPS} of {CLIPS} clips" in data.said  # bar


GARBAGE = ["", "{", "[]", "{}", "null", "\0\xff", '{"clips": 1, "blocks": []}']


def test_an_edited_json_ends_in_a_sentence_and_loses_nothing(data, expected):
    assert data.run() == 0
    record, before = data.record(), data.snapshot()
    edited = [{name: record[name] for name in record if name != key} for key in record]
    edited += [
        record | {"clips": clips} for clips in ([["a"]], [[["a"], "b"]], record["clips"][1:])
    ]
    for text in [*GARBAGE, *map(json.dumps, edited)]:
        (data.folder / "out" / JSON).write_text(text, encoding="latin-1")
        status = data.run()
        assert status in (0, 2) and "Error" not in data.said, (text, data.said)
        if text in GARBAGE:
            assert status == 2 and f"{JSON} does not say what made it" in data.said
        assert data.snapshot().keys() == before.keys()
        assert data.csv().read_bytes() == before[data.csv()]
    (data.folder / "out" / JSON).unlink()
    data.csv().write_text("mine")
    assert data.run() == 2 and f"{JSON} does not say what made it" in data.said
    assert data.csv().read_text() == "mine"
    assert data.run("--overwrite") == 0 and data.rows() == expected


def test_a_clip_deleted_between_kill_and_resume_is_a_failure(data):
    assert data.run(before=A_BLOCK) == -9
    data.clip(0).unlink()
    assert data.run() == 0
    assert f"\n000.wav,no such file: {data.clip(0)}\n" in data.rows()[1].decode()
    assert b"\n000.wav," not in data.rows()[0]
    assert data.run() == 0 and "finished already" in data.said
    assert data.run(out="fresh") == 0 and data.rows() == data.rows("fresh")


# ----------------------------------------------------------------------------------------- refusals

CHANGES = {
    "bandwidth": (["--bandwidth", "3"], "--bandwidth: 6.0 -> 3.0"),
    "whole": (["--whole"], "--whole: False -> True"),
    "weights": (["--weights", __file__], "--weights: untrained (seed 0) -> x"),
    "versions": ([], "versions: torch: "),
    "fewer": (["--max_samples", "7"], f"--max_samples: {CLIPS} clips -> 7 clips; rows would be "
                                      "lost: 007.wav, 008.wav, 009.wav"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_would_change_are_left_alone(change, data):
    flags, says = CHANGES[change]
    before = [faults.other_version] if change == "versions" else []
    assert data.run() == 0
    made = data.snapshot()
    assert data.run(*flags, before=before) == 2
    assert says in data.said and "--output_dir" in data.said
    assert ("--overwrite" in data.said) == (change != "fewer")  # it would lose rows
    assert data.snapshot() == made
    assert data.run(*flags, "--overwrite", before=before) == 0
    assert data.run(*flags, out="fresh", before=before) == 0
    assert data.rows() == data.rows("fresh")


@pytest.mark.parametrize("how", ["time", "size", "gone, other settings"])
def test_changed_files_are_named_and_their_rows_stay(how, data):
    assert data.run() == 0
    before, flags = data.snapshot(), []
    if how == "time":
        os.utime(data.clip(7), (1e9, 1e9))
    elif how == "size":
        soundfile.write(data.clip(7), np.full(2000, 0.25), 8_000)
    else:
        data.clip(7).unlink()
        flags = ["--overlap", "0.5"]
    assert data.run(*flags) == 2
    assert "files that have changed or gone since: 007.wav\n" in data.said
    assert ("--overwrite" in data.said) == (how in ("time", "size"))  # it would lose the row
    assert data.snapshot() == before


@pytest.mark.parametrize("change", ["larger", "mended", "returned", "chmod"])
def test_new_clips_make_only_their_blocks_again(change, data):
    flags, away = ["--max_samples", "8"] * (change == "larger"), data.folder / "away.wav"
    data.clip(4).chmod(0 if change == "chmod" else 0o644)
    if change == "returned":
        data.clip(4).rename(away)
    assert data.run(*flags, before=[faults.drop_capabilities]) == 0
    before = data.block_files()
    if change == "mended":
        data.mend(5)
    if change == "returned":
        away.rename(data.clip(4))
    data.clip(4).chmod(0o644)
    assert data.run() == 0
    assert before.items() <= data.block_files().items()
    again = re.findall(r"made block (\d)", data.said)
    assert again == (["2"] if change == "larger" else ["1"])
    assert data.run(out="fresh") == 0 and data.rows() == data.rows("fresh")
    assert data.run() == 0 and "finished already" in data.said


def test_a_run_that_finished_meanwhile_is_not_replaced(data, expected):
    """Both began without a CSV, so neither was refused then."""
    sign, go_on = (data.folder / name for name in ("sign", "go on"))
    wait = partial(faults.wait_before, "write_outputs", str(sign), str(go_on))
    late = data.start(*OTHER, before=[wait], log=data.folder / "late.txt")
    wait_for(sign.exists)
    assert data.run() == 0
    go_on.touch()
    assert end(late) == 2
    assert "--aggregate: mean -> none" in (data.folder / "late.txt").read_text()
    assert data.rows() == expected


@pytest.mark.parametrize("how", ["touched", "rewritten", "gone"])
def test_a_file_that_changes_before_it_is_read_stops_the_run(how, data):
    what = {
        "touched": [os.utime, data.clip(7), (1e9, 1e9)],
        "rewritten": [shutil.copy, data.table, data.clip(7)],
        "gone": [os.unlink, data.clip(7)],
    }[how]
    assert data.run(before=[partial(faults.at_clip, "007.wav", *what)]) == 1
    assert f"{data.clip(7)} changed or disappeared during the run" in data.said
    assert not data.csv().exists()
    assert data.run() == data.run(out="fresh") == 0
    assert data.rows() == data.rows("fresh")


def test_a_file_that_changes_after_it_is_read_is_told_later(data, expected):
    touch = partial(faults.at_clip, "009.wav", os.utime, data.clip(0), (1e9, 1e9))
    assert data.run(before=[touch]) == 0 and data.rows() == expected
    assert data.run() == 2 and "changed or gone since: 000.wav\n" in data.said


# ------------------------------------------------------------------------------------------- damage


def contents(block):
    clips, counts = script.read_block(block)
    facts = [[getattr(clip, name) for name in script.KEPT_FACTS] for clip in clips]
    return facts, [clip.rows.tolist() for clip in clips], counts.tolist()


@pytest.mark.parametrize("flips", every(1_000, 10**9))
def test_damage_to_a_block_is_noticed_or_harmless(flips, tmp_path):
    """Truncations, and a sample of the single-bit flips (slow: all of them)."""
    clips, path = (
        [script.Clip("a.wav"), script.Clip("b.wav", error="empty")],
        tmp_path / "block.npz",
    )
    clips[0].codes = clips[0].rows = np.arange(12).reshape(1, 2, 6)
    block = script.Block(0, clips, path)
    script.write_block(block)
    data, expected, noticed = path.read_bytes(), contents(block), 0
    damaged = [data[:size] for size in range(0, len(data), 7)]
    for bit in random.Random(1).sample(range(8 * len(data)), min(flips, 8 * len(data))):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for bad in damaged:
        path.write_bytes(bad)
        try:
            assert contents(block) == expected
        except script.RunError as error:
            assert str(path) in str(error) and not path.exists()
            noticed += 1
    assert noticed > len(damaged) / 2


def test_a_damaged_block_is_made_again(data, expected):
    assert data.run(before=A_BLOCK) == -9
    (block,) = data.blocks().glob("0*.npz")
    block.write_bytes(block.read_bytes()[:-7])
    assert data.run() in (0, 1)
    assert f"{block} was damaged" in data.said and "Traceback" not in data.said
    assert data.run() == 0 and data.rows() == expected


BAD_READS = {"block": (".npz", ["--parquet"]), "json": (JSON, []), "over": (JSON, ["--overwrite"])}


@pytest.mark.parametrize("end, flags", BAD_READS.values(), ids=BAD_READS)
def test_an_io_error_at_a_block_or_the_json_deletes_nothing(end, flags, data):
    assert data.run() == 0
    before = data.snapshot()
    assert data.run(*flags, before=[partial(faults.fail_to_read, end, errno.EIO)]) == 1
    assert "Input/output error" in data.said and "damaged" not in data.said
    assert data.snapshot() == before


# ---------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("size", range(1, 6))
def test_each_process_passes_each_block_once_its_own_first(size, monkeypatch):
    blocks = [script.Block(i, []) for i in range(11)]
    monkeypatch.setattr(script, "WORLD_SIZE", size)
    for rank in range(size):
        monkeypatch.setattr(script, "RANK", rank)
        order = [block.index for block in script.in_own_order(blocks)]
        own = list(range(rank, 11, size))
        assert order[: len(own)] == own and sorted(order) == list(range(11))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_make_the_bytes_of_one(size, data, expected):
    assert ends(data.ranks(size)) == [0] * size
    assert data.rows() == expected and len(data.block_files()) == BLOCKS
    logs = [data.rank_log(rank).read_text() for rank in range(size)]
    assert [log.count("Summary: ") for log in logs] == [1, *[0] * (size - 1)]  # process 0 writes


@pytest.mark.parametrize("first, second", [(0, 1), (1, 0)])
def test_processes_one_after_the_other_make_the_bytes_of_one(first, second, data, expected):
    assert data.run(rank=(first, 2)) == 0
    assert data.said.count("made block") == BLOCKS
    assert data.csv().exists() == (first == 0)
    assert data.run(rank=(second, 2)) == 0
    assert "made block" not in data.said and data.rows() == expected


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_the_blocks_of_a_killed_process_are_made_by_the_others(killed, data, expected):
    statuses = ends(data.ranks(3, options={killed: {"before": A_BLOCK}}, slow_s=0.2))
    assert statuses[killed] == -9 and statuses.count(0) == 2
    assert len(data.block_files()) == BLOCKS
    assert data.csv().exists() == (killed != 0)
    assert data.run() == 0
    assert "made block" not in data.said and data.rows() == expected


def test_a_slow_process_is_helped(make_dataset, sound, tmp_path):
    """With blocks of 16 clips, for as many are read ahead as two small ones hold."""
    data = many(make_dataset, sound, tmp_path, 256)
    larger = [partial(faults.set_of_script, "BLOCK_CLIPS", 16)]
    assert ends(data.ranks(2, before=larger, options={1: {"slow_s": 1.0}})) == [0, 0]
    logs = [data.rank_log(rank).read_text() for rank in (0, 1)]
    fast, slow = (re.findall(r"made block (\d+)", log) for log in logs)
    assert len({*fast, *slow}) == 16 and len(slow) < 8 < len(fast)


def test_a_process_with_other_settings_spoils_nothing(data, expected):
    stray = data.start(*OTHER, rank=(1, 2), slow_s=0.1)
    assert ends([*data.ranks(1, slow_s=0.1), stray]) == [0, 0]
    assert data.rows() == expected and len(data.block_files()) == 2 * BLOCKS


def torchrun(data, out, processes, restarts=0, program=faults.__file__, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}", program]
    command += [*data.argv(out=out), "--weights", "untrained", "--device", "cpu"]
    env = {**os.environ, **env}
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=env)


def test_a_killed_rank_is_restarted_by_torchrun(data, expected):
    process = torchrun(data, "out", 2, restarts=1, SLOW_S="0.2", KILL="attempt 0, rank 1")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "attempt 1, rank 1" in err and data.rows() == expected


@pytest.mark.slow
def test_tokens_depend_on_no_number_of_threads_or_processes(make_dataset, sound, tmp_path):
    """The command itself, with its encoder and its own blocks."""
    data, program = many(make_dataset, sound, tmp_path, 72), ROOT / "encodec_tokenizer.py"
    for out, size, threads in (("one", 1, 1), ("two", 2, 1), ("three", 3, 2)):
        process = torchrun(data, out, size, program=program, OMP_NUM_THREADS=str(threads))
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    one, two, three = (data.csv(out).read_bytes() for out in ("one", "two", "three"))
    assert one == two == three


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


# ----------------------------------------------------------------------------- the machine at fault


SEVENTH = partial(faults.at_clip, "007.wav")
STALE = partial(faults.fail_to_stat, "007.wav", errno.ESTALE)
EIO, ENOMEM = "Input/output error", "Cannot allocate memory"
MACHINE = {
    "EMFILE": (partial(SEVENTH, faults.use_up_descriptors), "Too many open files"),
    "EIO, first read": (partial(SEVENTH, faults.fail_reads, 1, errno.EIO), EIO),
    "EIO, later": (partial(SEVENTH, faults.fail_reads, 1000, errno.EIO), EIO),
    "ENOMEM": (partial(SEVENTH, faults.fail_reads, 1, errno.ENOMEM), ENOMEM),
    "ESTALE": (STALE, "Stale file handle"),
    "full disk at a block": (partial(faults.limit_file_size, 2_000), "File too large"),
    "full disk at the CSV": (partial(faults.limit_file_size, 20_000), "File too large"),
    "ESTALE, later": (partial(SEVENTH, STALE), "Stale file handle"),
    "no memory": (faults.no_memory_to_decode, "MemoryError"),
}


@pytest.mark.parametrize("fault, says", MACHINE.values(), ids=MACHINE)
def test_a_fault_of_the_machine_stops_the_run_and_blames_no_clip(fault, says, data, expected):
    assert data.run(before=A_BLOCK) == -9
    blocks = data.block_files()
    assert data.run(before=[fault]) == 1, data.said
    assert says in data.said and "Traceback" not in data.said
    assert not data.failed().exists() and not list(data.blocks().glob("*.tmp*"))
    assert data.run() == 0 and data.rows() == expected
    assert blocks.items() <= data.block_files().items()


@pytest.mark.parametrize("when", ["before", "at work"])
def test_an_unmounted_audio_folder_stops_the_run(when, data, expected):
    away = data.folder / "away"
    move = partial(faults.move_away, data.audio, away)
    status = data.run(before=[move if when == "before" else partial(SEVENTH, move)])
    assert status == (2 if when == "before" else 1)
    assert ("unmounted" if when == "before" else "changed or disappeared") in data.said
    assert not data.failed().exists()
    data.audio.rmdir()
    away.rename(data.audio)
    assert data.run() == 0 and data.rows() == expected


PLACES = ["a file", "under a file", "a dangling link"]
PLACES += ["read-only", "a read-only output", "read-only above"]


@pytest.mark.parametrize("what", PLACES)
def test_an_output_folder_that_cannot_be_used_is_refused(what, data):
    """As root too: the process gives up what lets root ignore permissions."""
    place = data.folder / "place"
    out = "place/out" if what in ("under a file", "read-only") else "place"
    if "file" in what:
        place.write_text("mine")
    elif what == "a dangling link":
        place.symlink_to(data.folder / "nowhere" / "at all")
    elif what == "read-only":
        place.mkdir()
    else:
        assert data.run(out="place") == 0
    if "read-only" in what:
        locked = [place] if what == "read-only above" else [place, *place.rglob("*")]
        for path in locked:
            path.chmod(0o555 if path.is_dir() else 0o444)
    status = data.run(*OTHER, "--overwrite", out=out, before=[faults.drop_capabilities])
    place.is_symlink() or place.chmod(0o755)
    assert status == 2 and "made block" not in data.said, data.said
    assert f"error: --output_dir {data.folder / out} cannot be used" in data.said


STREAMS = {
    "stdout full": [(1, "/dev/full")],
    "both closed": [(1, None), (2, None)],
    "both full": [(1, "/dev/full"), (2, "/dev/full")],
}


@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
def test_a_run_that_nobody_can_read_finishes_all_the_same(streams, data, expected):
    before = [partial(faults.close_stream, *stream) for stream in streams]
    assert data.run("--debug", before=before) == 0, data.said
    assert data.rows() == expected and "Traceback" not in data.said
    assert data.run("--overlap", "0.5", before=before) == 2


def test_the_command_itself_ends_well_without_its_streams(tmp_path):
    command = f'"{sys.executable}" "{ROOT / "encodec_tokenizer.py"}" --dataset sample --device cpu '
    command += f'--max_samples 1 --weights untrained --output_dir "{tmp_path}" >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], timeout=120).returncode == 0
    assert (tmp_path / "tokenized_sample.csv").exists()


def test_processes_may_download_at_once_and_be_killed_at_it(data, expected):
    """torch.hub writes to another name first, so part of a download is never used."""
    cache, name = data.folder / "cache", "w-2d711642.th"  # the beginning of the SHA-256 of "x"
    (data.folder / name).write_bytes(b"x")
    spec = script.replace(script.MODELS["encodec_24khz"], checkpoint=name)
    before = [
        partial(faults.set_environment, TORCH_HOME=str(cache)),
        partial(faults.set_of_script, "ROOT_URL", data.folder.as_uri() + "/"),
        partial(faults.set_of_script, "MODELS", {"encodec_24khz": spec}),
    ]
    left = [[]]  # after a kill at each step
    while left[-1] != [name]:
        shutil.rmtree(cache, ignore_errors=True)
        assert data.run("--weights", "pretrained", kill_at=len(left), before=before) == -9
        left.append([path.name for path in cache.rglob("*") if path.is_file()])
    assert left[-2] and name not in left[-2]  # killed at the rename
    shutil.rmtree(cache)
    assert ends(data.ranks(2, "--weights", "pretrained", before=before)) == [0, 0]
    assert data.rows() == expected


# -------------------------------------------------------------------------------------- odd content


def test_a_folder_whose_name_is_not_utf8_can_miss_a_clip(data):
    folder = data.folder / os.fsdecode(b"clips\xff")
    shutil.copytree(data.audio, folder)
    (folder / "007.wav").unlink()
    argv = ("--metadata", data.table, "--audio_dir", folder)
    assert data.run(*argv) == 0, data.said
    assert rb"no such file: " in data.rows()[1] and rb"/clips\udcff/007.wav" in data.rows()[1]
    assert data.run(*argv) == 0 and "finished already" in data.said


def check_mutated(seeds: list[bytes], path: Path, count: int) -> None:
    """In a process of its own, whose memory no absurd header may reserve."""
    resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, 4 * 2**30))
    argvs = ["--device", "cpu"], ["--device", "cpu", "--model", "encodec_48khz"]
    settings = [script.resolve_device(script.parse_settings(argv)) for argv in argvs]
    chance, good = random.Random(7), 0
    for i in range(count):
        data = bytearray(seeds[i % len(seeds)])
        kind = chance.randrange(4)
        if kind == 0:
            for _ in range(chance.randrange(1, 9)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[chance.randrange(len(data)) :]
        elif kind == 2:  # sizes, rates and channel counts of the header
            at = chance.randrange(4, 60)
            data[at : at + 4] = chance.choice([b"\0" * 4, b"\xff" * 4, chance.randbytes(4)])
        else:
            at = chance.randrange(min(len(data), 200))
            data[at : at + chance.randrange(8)] = chance.randbytes(chance.randrange(8))
        path.write_bytes(data)
        clip = script.Clip("clip", path=path, stamp=script.read_stamp(path))
        clip = script.load_clip(clip, settings[i % 2])
        assert bool(clip.error) != bool(clip.chunks) and "\n" not in clip.error
        assert all(chunk.isfinite().all() for chunk in clip.chunks)
        good += not clip.error
    assert count // 20 < good < count - count // 20


@pytest.mark.parametrize("count", every(1_000, 10_000))
def test_mutated_files_are_honest_rows_or_honest_failures(count, tmp_path, sound):
    paths = [tmp_path / name for name in ("a1.wav", "b2.wav", "c1.flac", "d2.ogg", "e1.mp3")]
    for path in paths:
        soundfile.write(path, sound(0.3, 44_100, int(path.stem[1])), 44_100)
    seeds = [path.read_bytes() for path in paths]
    process = faults.start_process(check_mutated, seeds, tmp_path / "clip", count)
    process.join(1200)
    assert process.exitcode == 0


def test_an_hour_long_clip_is_refused_and_takes_no_memory(make_dataset, tmp_path):
    rows = [("hour.wav", "x"), ("short.wav", "y")]
    data = Data(tmp_path, make_dataset({"short.wav": (np.ones(1600), 8_000)}, rows=rows))
    with soundfile.SoundFile(data.audio / "hour.wav", "w", 44_100, 1, "PCM_U8") as file:
        for _ in range(60):
            file.write(np.zeros(44_100 * 60, dtype="int16"))
    # 3600 s in float32 are 635 MB.
    assert data.run(before=[partial(faults.limit_memory, 400 * 2**20)]) == 0, data.said
    assert b'hour.wav,"3600 s long, --max_duration is 600 s"' in data.rows()[1]
