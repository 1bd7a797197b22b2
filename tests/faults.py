"""Runs of the script in processes of their own, to be killed, stopped and starved at will.

They are forked from a process that has the script loaded, so each starts at once. Blocks are of 4
clips, so 10 clips are three blocks. Codes come from `codes_of` rather than from a model, because
the tests are about the files. Each process writes "made block N" into its log.

As a program, `python faults.py FLAG...` is the script with such blocks and codes, for torchrun.
"""

import ctypes
import io
import multiprocessing
import os
import platform
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
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
BLOCK_CLIPS = 4
MODEL = SimpleNamespace()  # no test looks into it


def codes_of(chunks: torch.Tensor) -> np.ndarray:
    """[B, C, T] -> [B, 8, 150], numbers that depend on every chunk."""
    return ((chunks[:, 0, :1200].reshape(-1, 8, 150) * 1e4).abs().long() % 1024).numpy()


class Codes:
    """Stands in for Encoder: ready-made codes, and latents that are the same numbers."""

    slow_s = 0.0  # for a batch

    def __init__(self, model: object, settings: object) -> None:
        self.model, self.settings = model, settings

    def segments(self, chunk: torch.Tensor) -> list[torch.Tensor]:
        return [chunk]

    def convolve(self, segment: torch.Tensor) -> tuple[torch.Tensor, float]:
        return segment, 0.0

    def codes(self, convolved: Sequence) -> tuple[np.ndarray, torch.Tensor, float]:
        time.sleep(self.slow_s)
        codes = codes_of(torch.stack([future.result()[0] for future in convolved]))
        return codes, torch.from_numpy(codes).float(), 0.0


def use_small_blocks_and_ready_made_codes() -> None:
    script.BLOCK_CLIPS = BLOCK_CLIPS
    script.Encoder = Codes
    script.load_model = lambda settings, path: (MODEL, script.UNTRAINED if path is None else "x")
    write_block = script.write_block

    def write_and_tell(block: script.Block) -> None:
        write_block(block)
        script.say(f"made block {block.index}")

    script.write_block = write_and_tell


# ------------------------------------------------------------------------------ what can be done to
# a run before it starts: `before` of `start`, by functions that are pickled by name


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

    for name in ("fsync", "replace", "rename", "unlink", "mkdir"):  # pathlib and shutil call these
        setattr(os, name, after_a_step(getattr(os, name)))
    io.open = open_in_steps  # Path.open and its like


def kill_after_a_block() -> None:
    """SIGKILL for this process when its first block is in its place."""
    wrap("write_block", after=kill_me)


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(name: str, before: Callable = lambda: None, after: Callable = lambda: None) -> None:
    """Call `before` and `after` around a function of the script's."""
    function = getattr(script, name)

    def call(*args, **kwargs):
        before()
        result = function(*args, **kwargs)
        after()
        return result

    setattr(script, name, call)


def wait_before(name: str, sign: str, go_on: str) -> None:
    """A function of the script's leaves the file `sign` and waits for the file `go_on`."""

    def wait() -> None:
        Path(sign).touch()
        while not Path(go_on).exists():
            time.sleep(0.01)

    wrap(name, before=wait)


def at_clip(name: str, what: Callable[..., None], *args: object) -> None:
    """Call `what` in the thread that is about to load the clip of that name."""
    load_clip = script.load_clip

    def load(clip, *others):
        if clip.fname == name:
            what(*args)
        return load_clip(clip, *others)

    script.load_clip = load


def set_of_script(name: str, value: object) -> None:
    setattr(script, name, value)


def set_environment(**variables: str) -> None:
    os.environ.update(variables)


def other_version() -> None:
    script.version = lambda package: "0.0"


def limit_file_size(max_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))


def limit_memory(more_bytes: int) -> None:
    """So much more than now, and no more."""
    now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (now + more_bytes, now + more_bytes))


def drop_capabilities() -> None:
    """Root, too, has to heed the permission bits of files from here on."""
    libc = ctypes.CDLL(None, use_errno=True)
    version_3, this_process = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(version_3, this_process):
        raise OSError(ctypes.get_errno(), "capset")


def close_stream(number: int, path: str | None) -> None:
    """Close stdout (1) or stderr (2), as `>&-` does, or let it lead to `path`, as `> path`."""
    name = {1: "stdout", 2: "stderr"}[number]
    if path is None:
        os.close(number)
        setattr(sys, name, None)
    else:
        os.dup2(os.open(path, os.O_WRONLY), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))


def use_up_descriptors() -> None:
    """From here on each open() is EMFILE."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))


def move_away(folder: str, to: str) -> None:
    """Leave the folder empty, as an unmounted disk leaves its mount point."""
    Path(to).mkdir()
    for path in Path(folder).iterdir():
        path.rename(Path(to) / path.name)


def fail_reads(at_least: int, number: int) -> None:
    """From here on each read(2) of so many bytes in this thread is the error of that number.

    It reaches libraries too: a filter of the kernel's (seccomp) answers in place of the call.
    """
    read = {"x86_64": 0, "aarch64": 63}[platform.machine()]
    code = [  # (operation, jump if true, jump if false, operand): linux/bpf_common.h
        (0x20, 0, 0, 0),  # load the number of the call
        (0x15, 0, 3, read),
        (0x20, 0, 0, 32),  # load its third argument
        (0x35, 0, 1, at_least),
        (0x06, 0, 0, 0x50000 | number),  # SECCOMP_RET_ERRNO
        (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    ]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program):  # no new privileges; the filter
        raise OSError(ctypes.get_errno(), "prctl")


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

    io.open = open_bad


def fail_to_stat(end: str, number: int) -> None:
    """To ask for anything about a file whose name ends so is the error of that number."""
    os_stat = os.stat

    def stat(path, *args, **kwargs):
        if str(path).endswith(end):
            raise OSError(number, os.strerror(number), str(path))
        return os_stat(path, *args, **kwargs)

    os.stat = stat


def no_memory_to_decode() -> None:
    def read(*_, **__):
        raise MemoryError("std::bad_alloc")

    script.sf.SoundFile.read = read


# ------------------------------------------------------------------------------------ the processes


def child(argv: list[str], before: list[Callable], slow_s: float, rank: tuple, log: str) -> None:
    sys.stdout = sys.stderr = Path(log).open("a", buffering=1)
    use_small_blocks_and_ready_made_codes()
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

    before: functions called before it. slow_s: seconds of each batch. rank: (number, processes).
    """
    argv = ["--weights", "untrained", "--device", "cpu", *map(str, argv)]
    return start_process(child, argv, list(before), slow_s, rank, str(log))


def start_process(function: Callable, *args: object) -> CONTEXT.Process:
    # Python 3.11 does not tell the server where to find what it preloads.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(PATHS)):
        forkserver.ensure_running()
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def main() -> None:
    use_small_blocks_and_ready_made_codes()
    Codes.slow_s = float(os.environ.get("SLOW_S", 0))
    attempt, rank = (os.environ.get(key) for key in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    print(here := f"attempt {attempt}, rank {rank}", file=sys.stderr, flush=True)
    if os.environ.get("KILL") == here:
        wrap("find_datasets", before=kill_me)
    script.leave(script.main())


if __name__ == "__main__":
    main()
