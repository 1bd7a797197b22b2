"""Runs of the script in processes of their own, to be killed, stopped and starved at will.

They are forked from a process that has the script loaded, so that each starts at once, and blocks
are of 4 clips, so that 10 clips are a run of three. Codes come from `codes_of` rather than from a
model: what is tested is what becomes of them.

As a program, `python faults.py FLAG...` is the script with such blocks and codes, for torchrun.
"""

import ctypes
import io
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import stat
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

# What of a model is used beside its codes.
MODEL = SimpleNamespace(
    encoder=SimpleNamespace(hop_length=320), segment_length=None, segment_stride=None
)


def codes_of(chunks: torch.Tensor) -> np.ndarray:
    """[B, C, T] -> [B, 8, 150], numbers that depend on every chunk."""
    return ((chunks[:, 0, :1200].reshape(-1, 8, 150) * 1e4).abs().long() % 1024).numpy()


class Codes:
    """Encoder's place, with ready-made codes, and latents that are the same numbers."""

    slow_s = 0.0  # for a batch

    def __init__(self, model: object, settings: object) -> None:
        self.model = model

    def convolve(self, chunk: torch.Tensor) -> tuple[torch.Tensor, float]:
        return chunk, 0.0

    def codes(self, convolved: Sequence) -> tuple[np.ndarray, torch.Tensor, float]:
        time.sleep(self.slow_s)
        codes = codes_of(torch.stack([future.result()[0] for future in convolved]))
        return codes, torch.from_numpy(codes).float(), 0.0


def use_small_blocks_and_ready_made_codes() -> None:
    script.BLOCK_CLIPS = BLOCK_CLIPS
    script.Encoder = Codes
    script.load_model = lambda settings, path: (MODEL, script.UNTRAINED if path is None else "x")


# ------------------------------------------------------------------------------ what can be done to
# a run before it starts: `before` of `start`, by functions that are pickled by name


class Wrapped:
    """An open file, but for what a subclass does otherwise."""

    def __init__(self, file) -> None:
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def before_steps(step: Callable[[str], None]) -> None:
    """Calls `step` around each operation by which files come to the disk, change or go."""

    def between_steps(owner, name: str) -> None:
        function = getattr(owner, name)

        def call(*args, **kwargs):
            step(f"before {name}")
            result = function(*args, **kwargs)
            step(f"after {name}")
            return result

        setattr(owner, name, call)

    class TornWrites(Wrapped):
        """A file that is written in halves."""

        def writelines(self, pieces) -> None:
            data = b"".join(pieces)
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                step("before half a write")
                self.file.write(half)
                self.file.flush()
            step("after a write")

    path_open = Path.open

    def open_torn(path, mode="r", *args, **kwargs):
        file = path_open(path, mode, *args, **kwargs)
        return TornWrites(file) if mode == "wb" else file

    Path.open = open_torn
    between_steps(os, "fsync")
    for name in ("replace", "unlink", "mkdir"):
        between_steps(Path, name)
    between_steps(shutil, "rmtree")


def kill_at_step(number: int) -> None:
    """SIGKILL for this process at the `number`th step of files on their way to the disk."""

    def step(_: str) -> None:
        nonlocal number
        number -= 1
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    before_steps(step)


def kill_after_a_block() -> None:
    """SIGKILL for this process when its first block has come to its place."""
    replace = Path.replace

    def last(path, target):
        replace(path, target)
        if str(target).endswith(".block"):
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = last


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


def set_environment(**variables: str) -> None:
    os.environ.update(variables)


def close_stream(number: int, path: str | None) -> None:
    """Close stdout (1) or stderr (2), as `>&-` does, or let it lead to `path`, as `> path`."""
    name = {1: "stdout", 2: "stderr"}[number]
    if path is None:
        os.close(number)
        setattr(sys, name, None)
    else:
        os.dup2(os.open(path, os.O_WRONLY), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))


def delay(name: str, seconds: float) -> None:
    """Let a function of Output's begin late."""
    function = getattr(script.Output, name)

    def late(*args):
        time.sleep(seconds)
        return function(*args)

    setattr(script.Output, name, late)


def other_version() -> None:
    script.version = lambda package: "0.0"


def use_device(name: str) -> None:
    """As on a node with other hardware."""
    resolve = script.resolve_device
    script.resolve_device = lambda settings: script.replace(resolve(settings), device=name)


def download_slowly(log: str) -> None:
    """A download that takes its time and leaves a line in `log`; any file is the right one."""

    def download(path: Path) -> bool:
        with Path(log).open("a") as file:
            file.write(f"rank {script.RANK}\n")
        time.sleep(0.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        return True

    script.download = download
    script.sha256_of = lambda path: "d7cc33bc"


def leave_sign_when(name: str, sign: str) -> None:
    """The file `sign` says that a function of Output's has been called, whatever came of it."""
    function = getattr(script.Output, name)

    def call(*args):
        try:
            return function(*args)
        finally:
            Path(sign).touch()

    setattr(script.Output, name, call)


def wait_before(name: str, sign: str) -> None:
    """A function of Output's begins only when the file `sign` is there."""
    function = getattr(script.Output, name)

    def call(*args):
        while not Path(sign).exists():
            time.sleep(0.01)
        return function(*args)

    setattr(script.Output, name, call)


def at_clip(name: str, what: Callable[..., None], *args: object) -> None:
    """Call `what` in the thread that is about to load the clip of that name."""
    load_clip = script.load_clip

    def load(clip, *others):
        if clip.fname == name:
            what(*args)
        return load_clip(clip, *others)

    script.load_clip = load


def use_up_descriptors() -> None:
    """From here on each open() is EMFILE."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))


def move_away(folder: str, to: str) -> None:
    """Leave the folder empty, as an unmounted disk leaves its mount point."""
    Path(to).mkdir()
    for path in Path(folder).iterdir():
        path.rename(Path(to) / path.name)


class BadReads(Wrapped):
    """An open file that the system fails to read."""

    def __init__(self, file, number: int) -> None:
        super().__init__(file)
        self.number = number

    def fail(self, *_) -> None:
        raise OSError(self.number, os.strerror(self.number))

    read = readinto = readline = fail


def fail_to_read(name: str, number: int) -> None:
    """The file of that name opens, and reading it is the error of that number."""
    io_open = io.open

    def open_bad(file, *args, **kwargs):
        opened = io_open(file, *args, **kwargs)
        return BadReads(opened, number) if str(file).endswith(name) else opened

    io.open = open_bad
    script.open = open_bad


def fail_to_stat(name: str, number: int) -> None:
    """To ask for anything about the file of that name is the error of that number."""
    os_stat, path_stat = os.stat, Path.stat

    def check(path) -> None:
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number), str(path))

    def stat(path, *args, **kwargs):
        check(path)
        return os_stat(path, *args, **kwargs)

    def stat_of(path, *args, **kwargs):
        check(path)
        return path_stat(path, *args, **kwargs)

    os.stat, Path.stat = stat, stat_of


def fail_to_sync_folders(number: int) -> None:
    """As a file system that cannot (EINVAL on SMB, ENOTSUP on some of FUSE's), or a broken disk."""
    fsync = os.fsync

    def sync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    os.fsync = sync


def no_flock() -> None:
    """As where the file system has none, and filelock, an older one, no other lock to offer."""

    def acquire(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    script.filelock.FileLock.acquire = acquire


def no_memory_to_decode() -> None:
    """As where a decoder asks for memory that is not there."""

    def decode(*_):
        raise MemoryError("std::bad_alloc")

    script.decode = decode


# ------------------------------------------------------------------------------------ the processes


def start_server() -> None:
    """The process to fork from. Python 3.11 does not tell it where to find what it preloads."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(PATHS)):
        forkserver.ensure_running()


def child(argv: list[str], before: list[Callable], slow_s: float, rank: tuple, log: str) -> None:
    sys.stdout = sys.stderr = Path(log).open("a", buffering=1)
    use_small_blocks_and_ready_made_codes()
    Codes.slow_s = slow_s
    if rank:
        number, size, port = rank
        script.RANK, script.WORLD_SIZE, script.LOCAL_RANK = number, size, number
        set_environment(RANK=str(number), WORLD_SIZE=str(size), LOCAL_RANK=str(number))
        set_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for function in before:
        function()
    try:
        status = script.main(argv)
    except SystemExit as stop:
        status = stop.code
    script.leave(status)


def start(argv, log: Path, before=(), slow_s=0.0, rank=()) -> CONTEXT.Process:
    """A run of `argv`, to whose log it appends all that it prints.

    before: what is called before it. slow_s: of each batch. rank: (number, processes, port).
    """
    argv = ["--weights", "untrained", "--device", "cpu", *map(str, argv)]
    return start_process(child, argv, list(before), slow_s, rank, str(log))


def start_process(function: Callable, *args: object) -> CONTEXT.Process:
    start_server()
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def run(argv, log: Path, **options) -> int:
    """The exit status; -9 for a process that was killed."""
    process = start(argv, log, **options)
    process.join(120)
    return process.exitcode


def hold_the_lock(folder: str, times: int) -> None:
    """Hold an output's lock so many times; status 1 where another process does at the same time."""
    dataset = script.Dataset("x", Path("x.csv"), Path(folder), [], [])
    output, sign = script.Output(Path(folder), dataset, {}), Path(folder, "sign")
    while times:
        try:
            with output.locked():
                times -= 1
                os.close(os.open(sign, os.O_CREAT | os.O_EXCL))
                output.blocks.mkdir(exist_ok=True)
                shutil.rmtree(output.blocks)  # as at the end of a run
                sign.unlink()
        except script.UserError:
            continue
        except FileExistsError:
            os._exit(1)
    os._exit(0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main() -> None:
    use_small_blocks_and_ready_made_codes()
    Codes.slow_s = float(os.environ.get("SLOW_S", 0))
    attempt, rank = (os.environ.get(key) for key in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    print(f"attempt {attempt}, rank {rank}", file=sys.stderr, flush=True)
    script.leave(script.main())


if __name__ == "__main__":
    main()
