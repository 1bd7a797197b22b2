"""Runs of the script in processes of their own, to be killed, stopped and starved at will.

They are forked from a process that has the script loaded, so each starts at once. Groups are of 4
clips. Codes come from `codes_of` rather than from a model, because the tests are about the files.
Each process writes "encoded NAME" into its log for each clip that it encodes.

As a program, `python faults.py FLAG...` is the script with such groups and codes, for torchrun.
"""

import errno
import io
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a program
import encodec_tokenizer as script

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["encodec_tokenizer", "faults"])
PATHS = [str(Path(script.__file__).parent), str(Path(__file__).parent)]


def codes_of(chunk: torch.Tensor) -> np.ndarray:
    """[C, T] -> [8, 150], numbers that depend on the chunk."""
    return ((chunk[0, :1200].reshape(8, 150) * 1e4).abs().long() % 1024).numpy().astype(np.uint16)


class Codes:
    """Stands in for Encoder: ready-made codes, and latents that are the same numbers."""

    slow_s = 0.0  # for a chunk
    stopped = False

    def __init__(self, model: object, settings: object) -> None:
        self.settings = settings

    def encode(self, chunks: list[torch.Tensor]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        for chunk in chunks:
            time.sleep(self.slow_s)
            if self.stopped:
                raise script.RunError("the encoder was stopped")
            codes = codes_of(chunk)
            yield codes, torch.from_numpy(codes.astype(np.float32))

    def quantize(self, latents: torch.Tensor) -> np.ndarray:
        return latents.round().numpy().astype(np.uint16)


def load_model(settings: script.Settings, path: Path | None) -> tuple[SimpleNamespace, str]:
    """No model; the name of its file stands in for the checksum of the weights."""
    return SimpleNamespace(), script.UNTRAINED if path is None else path.name


def use_small_groups_and_ready_made_codes() -> None:
    script.GROUP_CLIPS, script.make_encoder, script.load_model = 4, Codes, load_model
    write_codes = script.write_codes

    def write_and_tell(folder: Path, name: str, stored: script.StoredCodes) -> None:
        is_new = not script.codes_path(folder, name).exists()
        write_codes(folder, name, stored)
        if is_new:
            script.say(f"encoded {name}")

    script.write_codes = write_and_tell


# ------------------------------------------------------------------------------ what can be done to
# a run before it starts: `before` of `start`, by functions that are pickled by name


def replace_function(module, name: str, function: Callable) -> None:
    """Replace io.open, or a function of os, for pathlib too: that of Python 3.10 has copies."""
    setattr(module, name, function)
    copies = getattr(pathlib, "_normal_accessor", None)
    if copies:
        setattr(copies, name, function)


class StepByStep:
    """An open file that calls `step` before each larger write, and leaves nothing in a buffer."""

    def __init__(self, file, step: Callable[[], None]) -> None:
        self.file, self.step = file, step

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data) -> int:
        if len(data) > 100:  # an archive's headers are no steps
            self.step()
        count = self.file.write(data)
        self.file.flush()
        return count


def kill_at_step(number: int) -> None:
    """SIGKILL for this process at the `number`th operation that changes a file or a folder."""
    io_open = io.open

    def step() -> None:
        nonlocal number
        number -= 1
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_a_step(function: Callable) -> Callable:
        def call(*args, **kwargs):
            step()
            return function(*args, **kwargs)

        return call

    def open_in_steps(file, mode="r", *args, **kwargs):
        if "w" not in mode:
            return io_open(file, mode, *args, **kwargs)
        step()
        return StepByStep(io_open(file, mode, *args, **kwargs), step)

    # pathlib and shutil call these
    for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
        replace_function(os, name, after_a_step(getattr(os, name)))
    replace_function(io, "open", open_in_steps)  # Path.open and its like


def signal_at_rename(number: int) -> None:
    """SIGTERM for this process before it renames the output of that number."""
    replace, numbers = Path.replace, iter(range(1000))

    def rename(path: Path, target: Path) -> Path:
        if ".unfinished" in str(path) and next(numbers) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return replace(path, target)

    Path.replace = rename


def at_clip(name: str, what: Callable[..., None], *args: object) -> None:
    """Call `what` in the thread that has begun to load the clip of that name."""
    read_audio = script.read_audio

    def read(path, *others):
        if path.name == name:
            what(*args)
        return read_audio(path, *others)

    script.read_audio = read


def limit_file_size(max_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))


def close_stream(number: int, path: str | None) -> None:
    """Close stdout (1) or stderr (2), as `>&-` does, or let it lead to `path`, as `> path`.

    "pipe" is one whose reader has ended, as in `| head -1`.
    """
    name = {1: "stdout", 2: "stderr"}[number]
    if path is None:
        os.close(number)
        setattr(sys, name, None)
    else:
        if path == "pipe":
            reader, writer = os.pipe()
            os.close(reader)
        else:
            writer = os.open(path, os.O_WRONLY)
        os.dup2(writer, number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))


def use_up_descriptors() -> None:
    """From here on each open() is EMFILE."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))


def move_away(folder: str, to: str) -> None:
    """Leave the folder empty, as an unmounted disk leaves its mount point."""
    Path(folder).rename(to)  # at once: the run may end before a second step
    Path(folder).mkdir()


def fail_to_read(end: str, number: int) -> None:
    """To read a file whose name ends so from Python is the error of that number."""
    io_open = io.open

    def fail(*_) -> None:
        raise OSError(number, os.strerror(number))

    def open_bad(file, *args, **kwargs):
        opened = io_open(file, *args, **kwargs)
        if not str(file).endswith(end):
            return opened
        bad = StepByStep(opened, step=fail)
        bad.read = fail
        return bad

    replace_function(io, "open", open_bad)


def refuse_to_change(end: str) -> None:
    """Nothing whose name ends so can be removed or put in place, as in a read-only folder."""

    def unless_it_ends_so(function: Callable) -> Callable:
        def call(*paths, **kwargs):
            if str(paths[-1]).endswith(end):
                raise PermissionError(errno.EACCES, "Permission denied", str(paths[-1]))
            function(*paths, **kwargs)

        return call

    for name in ("unlink", "replace"):
        replace_function(os, name, unless_it_ends_so(getattr(os, name)))


def no_memory(error: Exception) -> None:
    script.read_samples = mock.Mock(side_effect=error)


# ------------------------------------------------------------------------------------ the processes


def child(argv: list[str], before: list[Callable], slow_s: float, rank: tuple, log: str) -> None:
    sys.stdout = sys.stderr = Path(log).open("a", buffering=1)
    use_small_groups_and_ready_made_codes()
    Codes.slow_s = slow_s
    if rank:
        (script.RANK, script.WORLD_SIZE), script.LOCAL_RANK = rank, rank[0]
    for function in before:
        function()
    try:
        status = script.main(argv)
    except SystemExit as stop:
        status = stop.code
    script.leave(status)


def start(argv, log: Path, before=(), slow_s=0.0, rank=()) -> CONTEXT.Process:
    """Start a run of `argv`, which appends all that it prints to its log.

    before: functions called before it. slow_s: seconds of each chunk. rank: (number, processes).
    """
    argv = ["--weights", "untrained", "--device", "cpu", *map(str, argv)]
    # Python 3.11 does not tell the server where to find what it preloads.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(PATHS)):
        forkserver.ensure_running()
    process = CONTEXT.Process(target=child, args=(argv, list(before), slow_s, rank, str(log)))
    process.start()
    return process


def main() -> None:
    use_small_groups_and_ready_made_codes()
    Codes.slow_s = 0.05
    script.leave(script.main())


if __name__ == "__main__":
    main()
