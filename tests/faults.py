"""Runs of the script in processes of their own, to be killed at will.

They are forked from a process that has the script loaded, so that each starts at once. Codes come
from `codes_of` rather than from a model: what is tested is what becomes of them.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import encodec_tokenizer as script

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["encodec_tokenizer", "faults"])


# What of a model is used beside its codes.
MODEL = SimpleNamespace(
    encoder=SimpleNamespace(hop_length=320), segment_length=None, segment_stride=None
)


def codes_of(chunks: torch.Tensor) -> torch.Tensor:
    """[B, 1, T] -> [B, 8, 150], numbers that depend on every chunk."""
    return (chunks[:, 0, :1200].reshape(-1, 8, 150) * 1e4).abs().long() % 1024


def kill_at_step(number: int) -> None:
    """SIGKILL for this process at the `number`th step of files on their way to the disk."""

    def step() -> None:
        nonlocal number
        number -= 1
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def between_steps(function):
        def call(*args, **kwargs):
            step()
            result = function(*args, **kwargs)
            step()
            return result

        return call

    class TornWrites:
        """A file that is written in halves."""

        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def writelines(self, pieces) -> None:
            data = b"".join(pieces)
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                step()
                self.file.write(half)
                self.file.flush()
            step()

    path_open = Path.open

    def open_torn(path, mode="r", *args, **kwargs):
        file = path_open(path, mode, *args, **kwargs)
        return TornWrites(file) if mode == "wb" else file

    Path.open = open_torn
    os.fsync = between_steps(os.fsync)
    Path.replace = between_steps(Path.replace)
    Path.unlink = between_steps(Path.unlink)
    shutil.rmtree = between_steps(shutil.rmtree)


def child(
    argv: list[str], kill_at: int | None, max_bytes: int | None, slow_s: float, log: str
) -> None:
    sys.stdout = sys.stderr = Path(log).open("a", buffering=1)

    def encode(chunks: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(slow_s)
        return codes_of(chunks), None

    script.load_model = lambda *_: MODEL
    script.make_encode = lambda *_: encode
    if kill_at is not None:
        kill_at_step(kill_at)
    if max_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    status = script.main(argv)
    sys.stdout.flush()
    os._exit(status)


def start(argv, log: Path, kill_at=None, max_bytes=None, slow_s=0.0) -> CONTEXT.Process:
    argv = ["--weights", "untrained", "--device", "cpu", *map(str, argv)]
    process = CONTEXT.Process(target=child, args=(argv, kill_at, max_bytes, slow_s, str(log)))
    process.start()
    return process


def run(argv, log: Path, **options) -> int:
    """The exit status; -9 for a process that was killed."""
    process = start(argv, log, **options)
    process.join(120)
    return process.exitcode
