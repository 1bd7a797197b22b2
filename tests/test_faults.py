"""Nothing finished is lost: kills, full disks, damaged blocks, runs beside each other."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import faults
import numpy as np
import pytest
import soundfile
from conftest import ROOT

from encodec_tokenizer import BLOCK_CLIPS, Clip, Output, block_rows

CLIPS = BLOCK_CLIPS * 5 // 2
BLOCKS = 3


@pytest.fixture
def data(make_dataset, sound, tmp_path):
    """Two and a half blocks of short clips, some bad, and runs of the script on them."""
    noise = sound(3.0, 8_000)[:, 0]
    root = make_dataset({f"{i:03d}.wav": (noise[i * 100 :][:1600], 8_000) for i in range(CLIPS)})
    for i in (3, 70, 71):
        (root / "train_curated" / f"{i:03d}.wav").write_bytes(b"")

    class Data:
        input_dir = root
        log = tmp_path / "log.txt"

        def argv(self, folder, *flags):
            return ["--input_dir", root, "--output_dir", tmp_path / folder, *flags]

        def run(self, folder, *flags, **options):
            return faults.run(self.argv(folder, *flags), self.log, **options)

        def start(self, folder, *flags, **options):
            return faults.start(self.argv(folder, *flags), self.log, **options)

        def files(self, folder):
            names = ("tokenized_train_curated.csv", "failed_train_curated.csv")
            return [(tmp_path / folder / name).read_bytes() for name in names]

        def blocks(self, folder):
            return tmp_path / folder / "tokenized_train_curated.blocks"

        def owner(self, folder):
            run = self.blocks(folder) / "run.json"
            return run.read_text() if run.exists() else ""

    made = Data()
    assert made.run("whole") == 0, made.log.read_text()
    made.whole = made.files("whole")
    return made


def every(steps, slow_steps):
    """The parameter in two lengths: a short one for the suite, a long one marked slow."""
    return [steps, pytest.param(slow_steps, marks=pytest.mark.slow)]


def test_a_kill_at_any_step_to_the_disk_loses_nothing(data, tmp_path):
    step = 0
    while True:
        folder = f"killed_at_{step}"
        status = data.run(folder, kill_at=step)
        there = sorted(data.blocks(folder).glob("*.block")) if status else []
        before = {path.name: path.stat().st_mtime_ns for path in there}
        if status == 0:
            break
        assert status == -9
        csv = tmp_path / folder / "tokenized_train_curated.csv"
        assert not csv.exists() or csv.read_bytes() == data.whole[0]  # never a torn one
        # A second kill, later on, while the blocks that are done must be left alone.
        data.run(folder, kill_at=12)
        for path in data.blocks(folder).glob("*.block"):
            assert before.get(path.name, 0) in (0, path.stat().st_mtime_ns)
        assert data.run(folder) == 0
        assert data.files(folder) == data.whole
        assert not data.blocks(folder).exists()
        step += 1
    assert step > 50


@pytest.mark.parametrize("kills", every(8, 200))
def test_random_kills_over_resumed_runs_change_nothing(kills, data, tmp_path):
    moments = random.Random(4)
    rounds, done = 0, 0
    while done < kills:
        folder = f"round_{rounds}"
        process = data.start(folder, "--batch_size", 8, slow_s=0.2)
        time.sleep(moments.uniform(0.2, 1.8))
        before = len(list(data.blocks(folder).glob("*.block")))
        process.kill()
        process.join()
        done += process.exitcode == -9
        if process.exitcode == -9 and data.blocks(folder).exists():
            assert len(list(data.blocks(folder).glob("*.block"))) >= before
        else:
            rounds += process.exitcode == 0
    assert data.run(folder, "--batch_size", 8) == 0
    for i in range(rounds + 1):
        if (tmp_path / f"round_{i}").exists():
            assert data.files(f"round_{i}") == data.whole


def test_every_damage_to_a_block_is_noticed(tmp_path, capsys):
    output = Output(tmp_path, "x")
    output.blocks.mkdir()
    clips = [Clip(i, f"{i}.wav", "a,b", num_chunks=1, duration_s=1.0) for i in range(4)]
    for clip in clips:
        clip.codes = [np.full((2, 3), clip.index)]
    clips[2].error = "empty"
    settings = faults.script.parse_settings(["--device", "cpu"])
    output.write_block(0, *block_rows(clips, settings, faults.MODEL))
    path = output.block(0)
    whole = path.read_bytes()
    facts, rows = output.read_block(0, 4)
    assert facts["failures"] == [["2.wav", "empty"]] and rows.count(b"\n") == 3
    assert output.read_block(0, 5) is None and path.exists()  # not damaged, of other clips

    chance = random.Random(1)
    damaged = [whole[: len(whole) * i // 100] for i in range(100)]
    for _ in range(1000):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(data))
    for data in damaged:
        path.write_bytes(data)
        assert output.read_block(0, 4) is None
        assert path.with_suffix(".damaged").read_bytes() == data and not path.exists()


def test_a_damaged_block_is_made_again(data):
    assert data.run("out", kill_at=45) == -9
    (first, *_) = sorted(data.blocks("out").glob("*.block"))
    first.write_bytes(first.read_bytes()[:-7])
    assert data.run("out") == 0
    assert data.files("out") == data.whole
    assert "00000.block was damaged; it is set aside" in data.log.read_text()


@pytest.mark.parametrize("max_bytes", [1_000, 3_000, 200_000, 700_000])
def test_a_full_disk_ends_in_one_sentence_and_the_rest_can_follow(max_bytes, data):
    data.log.write_text("")
    assert data.run("out", max_bytes=max_bytes) == 1
    text = data.log.read_text()
    assert "error: OSError: [Errno 27] File too large" in text and "Traceback" not in text
    assert data.run("out") == 0
    assert data.files("out") == data.whole


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("times", every(2, 50))
def test_a_signal_ends_the_run_within_ten_seconds_and_it_can_go_on(number, status, times, data):
    """The command itself, with a real encoder at work."""
    chance = random.Random(2)
    script = ROOT / "encodec_tokenizer.py"
    argv = [*data.argv("out"), "--weights", "untrained", "--device", "cpu"]
    for _ in range(times):
        process = subprocess.Popen(
            [sys.executable, script, *map(str, argv)], stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and f"process {process.pid} " not in data.owner("out"):
            time.sleep(0.02)  # Python itself answers a signal while it imports
        time.sleep(chance.uniform(0, 3))
        started = time.perf_counter()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if process.returncode in (0, -number) and not data.blocks("out").exists():
            continue  # all was done: the signal met Python on its way out, or nobody
        assert time.perf_counter() - started < 10
        assert process.returncode == status
        assert "the same command goes on" in err and "Traceback" not in err


def test_of_many_runs_at_once_one_wins_and_the_others_name_it(data):
    processes = [data.start("out", slow_s=2.0) for _ in range(20)]
    for process in processes:
        process.join(120)
    statuses = sorted(process.exitcode for process in processes)
    assert statuses == [0] + [2] * 19
    assert data.files("out") == data.whole
    assert (
        f"tokenized_train_curated.csv is being made by process {processes[0].pid} on"
        in (data.log.read_text())
        or "is being made by" in data.log.read_text()
    )


def test_the_lock_dies_with_its_process(data):
    process = data.start("out", slow_s=0.5)
    while not data.blocks("out").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert data.run("out") == 0
    assert data.files("out") == data.whole


CHANGES = [
    ("model", ["--model", "encodec_48khz"], "model: encodec_24khz -> encodec_48khz"),
    ("bandwidth", ["--bandwidth", "3"], "bandwidth_kbps: 6.0 -> 3.0"),
    ("duration", ["--target_duration", "1"], "target_duration_s: 2.0 -> 1.0"),
    ("overlap", ["--overlap", "0.5"], "overlap: 0.1 -> 0.5"),
    ("batch", ["--batch_size", "7"], "batch_size: 32 -> 7"),
    ("fewer", ["--max_samples", "70"], f"number of clips: {CLIPS} -> 70"),
]


@pytest.mark.parametrize("flags, says", [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_output_made_with_other_settings_is_left_alone(state, flags, says, data, tmp_path):
    assert data.run("out", kill_at=45 if state == "unfinished" else None) in (0, -9)
    files = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    data.log.write_text("")
    assert data.run("out", *flags) == 2
    text = data.log.read_text()
    assert says in text and "--overwrite" in text and "--output_dir" in text
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == files
    assert data.run("out", *flags, "--overwrite") == 0
    made_by = json.loads((tmp_path / "out" / "tokenized_train_curated.json").read_text())
    assert str(made_by.get(says.partition(":")[0], 70)) == says.split()[-1]


@pytest.mark.parametrize("change", ["dataset", "weights", "versions"])
def test_a_changed_dataset_file_checkpoint_or_library_is_noticed(change, run, make_dataset, sound,
                                                                 weights, monkeypatch):  # fmt: skip
    root = make_dataset({"a.wav": (sound(0.5), 44_100)})
    assert run("--input_dir", root)[0] == 0
    options = {}
    if change == "dataset":
        (root / "train_curated.csv").write_text("fname,labels\na.wav,Other\n")
    elif change == "weights":
        options["weights"] = weights("encodec_24khz")
    else:
        monkeypatch.setattr("encodec_tokenizer.version", lambda package: "0.0")
    status, _, err = run("--input_dir", root, **options)
    assert status == 2
    assert {"dataset": "dataset_csv_sha256", "weights": "untrained (seed 0) -> encodec_24khz.th",
            "versions": "'torch': '0.0'"}[change] in err  # fmt: skip
    assert run("--input_dir", root, "--overwrite", **options)[0] == 0


def test_a_trial_is_replaced_by_a_larger_run_and_not_the_reverse(data):
    assert data.run("out", "--max_samples", "70") == 0
    small = data.files("out")[0]
    assert data.whole[0].startswith(small)
    assert data.run("out") == 0
    assert data.files("out") == data.whole
    assert data.run("out", "--max_samples", "70") == 2
    assert data.files("out") == data.whole


def test_an_unfinished_trial_lends_its_full_blocks_to_a_larger_run(data):
    assert data.run("out", "--max_samples", "70", kill_at=45) == -9
    assert data.run("out") == 0
    assert data.files("out") == data.whole
    assert f"going on after {BLOCK_CLIPS} of {CLIPS} clips" in data.log.read_text()


def test_a_finished_command_is_not_run_again(data, tmp_path):
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "whole").iterdir()}
    assert data.run("whole") == 0
    assert "is finished already" in data.log.read_text()
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "whole").iterdir()} == before


def test_a_csv_of_unknown_origin_is_not_replaced(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenized_train_curated.csv").write_text("mine")
    assert data.run("out") == 2
    assert (tmp_path / "out" / "tokenized_train_curated.csv").read_text() == "mine"
    assert data.run("out", "--overwrite") == 0
    assert data.files("out") == data.whole


def test_a_name_or_label_that_a_spreadsheet_would_run_is_kept_and_told(
    run, make_dataset, sound, tmp_path
):
    names = ["=1+1.wav", "a.wav", "@b.wav"]
    clips = {name: (sound(0.2), 44_100) for name in names}
    root = make_dataset(clips, rows=list(zip(names, ["x", "=HYPERLINK(1)", "-y"])))
    assert run("--input_dir", root)[0] == 0
    text = (tmp_path / "out" / "tokenized_train_curated.csv").read_text()
    assert "\n=1+1.wav,x," in text and "\na.wav,=HYPERLINK(1)," in text and "\n@b.wav,-y," in text
    summary = (tmp_path / "out" / "summary_train_curated.txt").read_text()
    assert "WARNING: 3 rows have a name or label that begins with" in summary


MUTATE = """
import random, sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from encodec_tokenizer import BadClip, load_clip, resampler, split_chunks
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
    try:
        samples, rate, duration_s = load_clip(path, 1 + i % 2, 600)
        audio = resampler(rate, 24_000, "cpu")(samples)
        assert audio.isfinite().all() and split_chunks(audio, 48_000, 43_200)
        good += 1
    except BadClip as reason:
        assert str(reason) and "\\n" not in str(reason)
        bad += 1
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


def torchrun(data, folder, processes, *flags, restarts=0, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    argv = [*data.argv(folder, *flags), "--weights", "untrained", "--device", "cpu"]
    script = ROOT / "encodec_tokenizer.py"
    return subprocess.Popen(
        [*map(str, command), str(script), *map(str, argv)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


@pytest.fixture
def whole(data):
    """What one process makes of the data with the real encoder."""
    argv = [*data.argv("one"), "--weights", "untrained", "--device", "cpu"]
    script = ROOT / "encodec_tokenizer.py"
    assert subprocess.run([sys.executable, script, *map(str, argv)]).returncode == 0
    return data.files("one")


def test_two_processes_make_the_bytes_of_one(data, whole):
    _, err = (process := torchrun(data, "two", 2)).communicate(timeout=300)
    assert process.returncode == 0, err
    assert data.files("two") == whole
    assert err.count("UNTRAINED WEIGHTS") == 1  # one of them speaks


def kill_second_rank(data, folder, parent):
    """SIGKILL for rank 1 once a block is there."""
    while not list(data.blocks(folder).glob("*.block")) and parent.poll() is None:
        time.sleep(0.05)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)


def test_a_killed_rank_is_restarted_by_torchrun(data, whole):
    process = torchrun(data, "two", 2, restarts=2)
    kill_second_rank(data, "two", process)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert data.files("two") == whole


@pytest.mark.slow
def test_a_rerun_goes_on_with_another_number_of_processes(data, whole):
    for processes in (2, 1, 3):
        process = torchrun(data, "many", processes)
        if processes != 3:
            kill_second_rank(data, "many", process) if processes == 2 else process.send_signal(15)
            process.communicate(timeout=300)
            assert process.returncode != 0
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert data.files("many") == whole


@pytest.mark.slow
def test_tokens_do_not_depend_on_the_number_of_threads(data, whole):
    process = torchrun(data, "three", 3, OMP_NUM_THREADS="2")
    process.communicate(timeout=300)
    assert data.files("three") == whole


def test_an_hour_long_clip_is_refused_and_takes_no_memory(run, make_dataset, tmp_path):
    root = make_dataset(
        {"short.wav": (np.ones(100), 44_100)}, rows=[("hour.wav", "x"), ("short.wav", "y")]
    )
    path = root / "train_curated" / "hour.wav"
    with soundfile.SoundFile(path, "w", 44_100, 1, "PCM_U8", format="WAV") as file:
        for _ in range(60):
            file.write(np.zeros(44_100 * 60, dtype="int16"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run("--input_dir", root)[0] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6
    failed = (tmp_path / "out" / "failed_train_curated.csv").read_text()
    assert 'hour.wav,"3600 s long, --max_duration is 600 s"' in failed


def test_json_names_what_made_the_file(data, tmp_path):
    facts = json.loads((tmp_path / "whole" / "tokenized_train_curated.json").read_text())
    assert (facts["num_clips"], facts["tokenized"], facts["failed"]) == (CLIPS, CLIPS - 3, 3)
