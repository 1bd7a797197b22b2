#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11,<2.15", "torchaudio>=2.11,<2.12", "encodec>=0.1.1", "numpy", "pandas", "tqdm",
#     "soundfile",
# ]
# ///
"""Turn the clips of FSDKaggle2019 into discrete tokens with EnCodec, one CSV row per clip.

    python encodec_tokenizer.py --dataset sample                       # bundled clips, no dataset
    python encodec_tokenizer.py --dataset curated --max_samples 100    # a quick trial
    python encodec_tokenizer.py --dataset both --model encodec_48khz
    python encodec_tokenizer.py --dataset curated --whole --parquet    # one sequence per clip
    torchrun --nproc_per_node=4 encodec_tokenizer.py --dataset noisy   # one process per GPU

The file reads in the order that the data flows: command line -> dataset -> clips -> chunks ->
weights -> codes -> store -> outputs -> run. One idea holds it together: a small .npz file per clip
keeps the codes that EnCodec gave it, and everything else is a view of the dataset's table and these
files. A run encodes the clips that have no such file yet, and then writes all outputs anew. That is
how it resumes, and how several processes share the work without talking to each other.
"""

from __future__ import annotations

import argparse
import csv
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import stat
import sys
import textwrap
import threading
import time
import traceback
import unicodedata
import uuid
import warnings
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain, groupby, islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, NamedTuple, get_args, get_type_hints

__version__ = "3.0.0"


class ModelSpec(NamedTuple):
    """Facts about an EnCodec model that are needed before it is built (encodec/model.py)."""

    sample_rate: int  # Hz
    channels: int
    bandwidths_kbps: tuple[float, ...]
    checkpoint: str  # Meta's file; its name ends in the first 8 hex digits of its SHA-256


MODELS = {
    "encodec_24khz": ModelSpec(24_000, 1, (1.5, 3, 6, 12, 24), "encodec_24khz-d7cc33bc.th"),
    "encodec_48khz": ModelSpec(48_000, 2, (3, 6, 12, 24), "encodec_48khz-7e698e3e.th"),
}
STEMS = {  # the value of --dataset -> the stems of the output files
    "curated": ["train_curated"],
    "noisy": ["train_noisy"],
    "both": ["train_curated", "train_noisy"],
    "test": ["test"],
    "sample": ["sample"],
}
SAMPLE_DIR = Path(__file__).resolve().parent / "tests" / "sample"
AGGREGATES: dict[str, Callable[[Kept], np.ndarray]] = {  # the rows [R, K, F] of a clip
    # The mean of the chunks' codes, rounded: for several chunks the result is not a valid code.
    "mean": lambda kept: np.rint(kept.codes.mean(axis=0, keepdims=True)).astype(np.uint16),
    "latent": lambda kept: kept.latent[None],  # the codes of the mean of the chunks' latents
    "medoid": lambda kept: kept.codes[[kept.medoid]],  # the chunk nearest to that mean
    "none": lambda kept: kept.codes,  # a row for each chunk
}
DECODABLE = {"latent", "medoid", "none"}  # aggregates that keep real codes, which `decode` accepts
NUM_CODES = 1024  # entries of a codebook
UNTRAINED = "untrained (seed 0)"
UNTRAINED_WARNING = "These tokens are for testing only and have no meaning."
PACKAGES = ("torch", "torchaudio", "encodec", "soundfile", "numpy", "torchcodec")
KEPT_FORMAT = 1  # raise it when codes change: then all clips are encoded anew


def environment_number(name: str, default: int) -> int:
    """Read a number that torchrun sets for its processes; -1 stands for anything else."""
    text = os.environ.get(name) or str(default)
    return int(text) if text.isdecimal() else -1


RANK, WORLD_SIZE = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
LOCAL_RANK = environment_number("LOCAL_RANK", 0)

# cuDNN's LSTM is deterministic only with this setting (PyTorch's page on torch.nn.LSTM), which has
# to be there before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")


class UserError(Exception):
    """The user has to change something first: the message is printed as it is."""

    status = 2


class RunError(Exception):
    """The run cannot go on: the message is printed as it is."""

    status = 1


class BadClip(Exception):
    """A clip cannot be tokenized. The message is its reason in failed_<stem>.csv."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. The argument is the exit status: 128 + the signal's number."""


def is_out_of_memory(error: BaseException) -> bool:
    """Recognize the words of PyTorch, oneDNN, CUDA and the dynamic linker for too little memory."""
    words = "allocate memory(?! in static)|out of memory|alloc_failed|could not create a primitive"
    return bool(isinstance(error, MemoryError) or re.search(f"(?i){words}|map segment", str(error)))


# ------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Settings:
    """The command line: each field is a flag, with its type, its help, and its default.

    Raises UserError: see find_mistakes.
    """

    dataset: Annotated[str, "clips to tokenize; sample: twelve bundled ones"] = "curated"
    metadata: Annotated[Path | None, "CSV to read instead of --dataset"] = None
    audio_dir: Annotated[Path | None, "folder of --metadata's files; alone: all files in it"] = None
    input_dir: Annotated[Path, "folder of FSDKaggle2019, as unpacked"] = Path("input")
    output_dir: Annotated[Path, "folder to save the outputs in"] = Path("work/tokenized")
    model: Annotated[str, "24 kHz mono or 48 kHz stereo"] = "encodec_24khz"
    bandwidth: Annotated[float, "kbps: 1.5 (24 kHz only), 3, 6, 12 or 24"] = 6.0
    target_duration: Annotated[float, "length of a chunk in seconds"] = 2.0
    overlap: Annotated[float, "fraction of a chunk that the next one repeats"] = 0.1
    whole: Annotated[bool, "whole clips as one piece each, without padding or chunks"] = False
    aggregate: Annotated[str, "how a clip's chunks become one row; none: a row each"] = "mean"
    weights: Annotated[str, "pretrained, untrained, a checkpoint or its folder"] = "pretrained"
    device: Annotated[str, "auto (a GPU if there is one), cpu, cuda or cuda:N"] = "auto"
    batch_size: Annotated[int | None, "chunks per batch (default: 8 s of audio; GPU: 64 s)"] = None
    workers: Annotated[int | None, "groups of clips at work (default: 2; GPU: 8)"] = None
    max_duration: Annotated[float, "maximum length of a clip in seconds; longer ones fail"] = 600.0
    max_samples: Annotated[int | None, "number of clips, from the first (default: all)"] = None
    plot: Annotated[str | None, "picture of the tokens: PNG, PDF or SVG (matplotlib)"] = None
    parquet: Annotated[bool, "Parquet file besides the CSV, tokens in a list (pyarrow)"] = False
    overwrite: Annotated[bool, "replacement of a CSV that was made with other settings"] = False
    debug: Annotated[bool, "a line for every clip, and tracebacks"] = False

    def __post_init__(self) -> None:
        for name, (kind, _) in describe_settings().items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, kind(value))  # 6 and 6.0 are one bandwidth
        for mistake in find_mistakes(self):
            raise UserError(mistake)


CHOICES = {"dataset": STEMS, "model": MODELS, "aggregate": AGGREGATES}
RANGES = {  # both ends are allowed
    "target_duration": (0.1, 60),
    "overlap": (0, 0.9),
    "max_duration": (0.1, 10**6),
    "batch_size": (1, 10**9),
    "workers": (1, 1000),
    "max_samples": (1, 10**9),
}
DECIDE_CODES = ("model", "bandwidth", "whole", "target_duration", "overlap")
CHUNK_SETTINGS = ("target_duration", "overlap", "aggregate")  # without a meaning for whole clips


@lru_cache
def describe_settings() -> dict[str, tuple[type, str]]:
    """Return the type and the help text of every setting."""
    found = {}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        kind, text = get_args(hint)
        found[name] = (get_args(kind) or [kind])[0], text  # int of `int | None`
    return found


def find_mistakes(settings: Settings) -> Iterator[str]:
    """Yield what is wrong with the settings, in sentences."""
    for name, choices in CHOICES.items():
        if getattr(settings, name) not in choices:
            yield f"--{name}: choose from {', '.join(choices)}"
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:  # NaN is in no range
            yield f"--{name}: {value} is out of range ({low} to {high:,})"
    offered = MODELS[settings.model].bandwidths_kbps
    if settings.bandwidth not in offered:
        yield f"--bandwidth: {settings.model} offers {', '.join(map(str, offered))} kbps"
    if settings.metadata and not settings.audio_dir:
        yield "--metadata needs --audio_dir, the folder of its files"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", settings.device):
        yield "--device: choose from auto, cpu, cuda, cuda:N"
    for name in CHUNK_SETTINGS:
        if settings.whole and getattr(settings, name) != getattr(Settings, name):
            yield f"--{name} has no meaning with --whole, which does not cut clips into chunks"
    if settings.plot and Path(settings.plot).suffix not in ("", ".png", ".pdf", ".svg"):
        yield f"--plot {settings.plot}: the name must end in .png, .pdf or .svg"
    if settings.plot is not None and not find_spec("matplotlib"):
        yield "--plot needs matplotlib: pip install matplotlib"
    if settings.parquet and not find_spec("pyarrow"):
        yield "--parquet needs pyarrow: pip install pyarrow"
    if not 0 <= RANK < WORLD_SIZE:
        given = [f"{name}={os.environ.get(name)}" for name in ("RANK", "WORLD_SIZE")]
        yield f"{' and '.join(given)}: RANK counts from 0 to WORLD_SIZE - 1"


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Read the command line (default: the process's own). A mistake ends in exit status 2."""
    description, examples, _ = (__doc__ or "\n\n\n\n").split("\n\n", 2)  # python -OO has none
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # Settings holds the defaults
        allow_abbrev=False,
    )
    # One sentence; argparse would print the usage before it.
    parser.error = lambda text: parser.exit(2, f"error: {text}\n--help lists all flags.\n")
    parser.add_argument("--version", action="version", version=__version__)
    for name, (kind, text) in describe_settings().items():
        options = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": "store_true"}
        elif name == "plot":
            options = {"nargs": "?", "const": "", "metavar": "FILE"}
        elif name in CHOICES:
            options = {"choices": CHOICES[name]}
        if getattr(Settings, name):
            text += f" (default: {getattr(Settings, name)})"
        parser.add_argument(f"--{name}", help=text, **options)
        if "_" in name:  # hyphens are understood, too
            parser.add_argument("--" + name.replace("_", "-"), help=argparse.SUPPRESS, **options)
    given = parser.parse_args(argv)
    if "dataset" in given and "audio_dir" in given:
        parser.error("--dataset and --audio_dir each name a set of clips: give one of them")
    try:
        return Settings(**vars(given))
    except UserError as mistake:
        parser.error(str(mistake))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while Python imports
    SETTINGS = parse_settings()  # help and mistakes need no PyTorch, whose import takes seconds
    if RANK == 0 and sys.stderr and sys.stderr.isatty():
        print("loading PyTorch ...", file=sys.stderr, flush=True)

try:
    import numpy as np
    import soundfile as sf
    import torch
    import torch.nn.functional as F
    import torchaudio
    from encodec import EncodecModel
    from encodec.model import ROOT_URL
    from encodec.modules import SLSTM, SConv1d
    from encodec.modules.conv import pad1d
    from encodec.modules.seanet import SEANetResnetBlock
    from tqdm import tqdm
except (ImportError, OSError, RuntimeError, MemoryError) as error:
    # torchaudio does not load beside every torch, and fails with one of the first three.
    way_out = (
        "Install versions that work together, in an environment of their own, with\n"
        f"  {sys.executable} -m pip install -r requirements.txt"
    )
    if is_out_of_memory(error):
        way_out = (
            "There is too little memory: raise the limit (ulimit -v, the job's, the container's)."
        )
    sys.exit(f"error: a needed package does not load: {error} {error.__cause__ or ''}\n{way_out}")


def say(message: str) -> None:
    """Print to stderr without tearing the progress bar; a closed stderr is no error."""
    with suppress(OSError):
        tqdm.write(message, file=sys.stderr)


def counted(number: int, noun: str) -> str:
    """Return "1 clip" or "2 clips"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# Threads that encode on a CPU: this process's share of the cores that its affinity and its
# container's quota allow. torchrun sets OMP_NUM_THREADS to 1 unless the user has set it.
THREADS = environment_number("OMP_NUM_THREADS", 0)
if THREADS < 1 or (THREADS == 1 and WORLD_SIZE > 1):
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = len(affinity(0))
    with suppress(OSError, ValueError):  # cgroup v2: microseconds of a period, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    THREADS = max(1, cores // max(1, environment_number("LOCAL_WORLD_SIZE", 1)))


def resolve_device(settings: Settings) -> Settings:
    """Replace the device by "cpu" or "cuda:N", and fill in the defaults that depend on it.

    `auto` tries a small convolution first, because PyTorch sees GPUs that it has no kernels for.
    Raises UserError: there is no such GPU, or it cannot be used.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    device = settings.device
    if device in ("auto", "cuda"):
        gpu = LOCAL_RANK % max(1, torch.cuda.device_count())  # Slurm may show each task its own
        device = f"cuda:{gpu}" if device == "cuda" or torch.cuda.is_available() else "cpu"
    if device != "cpu":
        try:
            F.conv1d(torch.ones(1, 1, 8, device=device), torch.ones(1, 1, 3, device=device)).cpu()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            if settings.device != "auto":
                raise UserError(f"--device {settings.device} cannot be used: {reason}") from error
            say(f"note: this PyTorch cannot use the GPU, so the CPU does the work: {reason}")
            device = "cpu"
    # Batches are counted in seconds of audio, so that long chunks take no more memory; on a CPU see
    # CpuEncoder. Whole clips: the 48 kHz model cuts them into segments of 1 s, and at 24 kHz only
    # clips of one length share a batch, which is rare.
    batch_s, workers = (8, 2) if device == "cpu" else (64, 8)
    batch_size = max(1, round(batch_s / settings.target_duration))
    if settings.whole and settings.model == "encodec_24khz":
        batch_size = 1 if device == "cpu" else GROUP_CLIPS
    return replace(
        settings,
        device=device,
        batch_size=settings.batch_size or batch_size,
        workers=settings.workers or workers,
    )


# ------------------------------------------------------------------------------------------ dataset

NAME_COLUMNS = ("fname", "filename", "file_name")
LABEL_COLUMNS = ("labels", "label", "category")
SEPARATORS = ",;\t|"
# Endings of sound files: libsndfile's formats and their usual spellings, and what FFmpeg reads.
ENDINGS = {f".{name.lower()}" for name in sf.available_formats()} - {".raw"}
MORE_ENDINGS = """
wave bwf aif aifc snd sph iff 8svx sf mat oga opus spx mp1 mp2 mpga m4a m4b mp4 aac ac3 amr 3gp ape
wv tta wma webm weba mka mpc dsf"""
ENDINGS |= {f".{name}" for name in MORE_ENDINGS.split()}
# The system reports these errors about a file that is itself at fault. All others (no memory, too
# many open files, an I/O error, a stale mount) are the machine's: they stop the run.
CLIP_ERRNOS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EEXIST, errno.ENOTEMPTY,
}  # fmt: skip
NO_FILE = "no such file"
Stamp = list[int]  # a file's size in bytes, mtime and ctime in nanoseconds


@dataclass(eq=False, slots=True)
class Clip:
    """One row of the dataset's table, and how far it has come."""

    fname: str
    labels: str = ""
    extra: dict[str, str] = field(default_factory=dict)  # cells of --metadata's further columns
    name: str = ""  # fname as a path below the audio folder; names the file that keeps its codes
    path: Path | None = None  # its file
    stamp: Stamp | None = None  # of its file; None if there is none
    error: str = ""  # why it cannot be tokenized
    sha256: str = ""  # of the file whose codes are kept; empty as long as there are none
    encoded_s: float = 0.0  # seconds of audio that this process has encoded


@dataclass(frozen=True)
class Dataset:
    stem: str  # the middle of the output files' names
    audio_dir: Path
    clips: list[Clip]  # in the table's order

    @cached_property
    def index(self) -> dict[str, set[str]]:
        """The files of the audio folder by every name that may stand for them in a table.

        A name may lack an ending that sound files have, and the first folders of its path.
        """
        found = defaultdict(set)
        for file in list_files(self.audio_dir):
            stem, ending = os.path.splitext(file)
            for spelling in (file, stem) if ending.lower() in ENDINGS else (file,):
                parts = comparable(spelling).split("/")
                for i in range(len(parts)):
                    found["/".join(parts[i:])].add(file)
        return found


def find_datasets(settings: Settings) -> list[Dataset]:
    """Find the datasets that the command names, and their clips' files. Raises UserError."""
    if settings.metadata:
        clips = read_clips(settings.metadata, settings)
        datasets = [Dataset(settings.metadata.stem, settings.audio_dir, clips)]
    elif settings.audio_dir:
        datasets = [list_folder(settings.audio_dir, settings.max_samples)]
    elif settings.dataset == "sample":
        if not SAMPLE_DIR.is_dir():
            raise UserError(f"the sample comes with the repository: there is no {SAMPLE_DIR}")
        datasets = [Dataset("sample", SAMPLE_DIR, read_clips(SAMPLE_DIR / "sample.csv", settings))]
    else:
        datasets = [find_dataset(settings, stem) for stem in STEMS[settings.dataset]]
    for dataset in datasets:
        names = {}
        for clip in dataset.clips:
            find_file(clip, dataset)
            clip.name = names.setdefault(clip.path, clip.name)  # two spellings of a name are one
    return datasets


def find_dataset(settings: Settings, stem: str) -> Dataset:
    """Find a dataset's CSV and audio folder in `input_dir` or up to two folders below it.

    Kaggle lists its test clips in sample_submission.csv. A folder that is gone is no error yet:
    clips whose codes are kept do not need it.
    """

    def search(name: str) -> list[Path]:
        paths = []
        for depth in ("", "*/", "*/*/"):
            paths += sorted(settings.input_dir.glob(depth + name))
        return paths

    kaggle_table = "sample_submission.csv" if stem == "test" else f"{stem}.csv"
    layouts = {  # a table -> the names that its audio folder may have
        kaggle_table: [stem, stem.replace("train_", "trn_")],
        f"{stem}_post_competition.csv": [f"FSDKaggle2019.audio_{stem}"],  # Zenodo, record 3612637
    }
    found = []
    for table_name, folder_names in layouts.items():
        folders = [path for name in folder_names for path in search(name) if path.is_dir()]
        for table in search(table_name)[:1]:
            found.append((not folders, table, folders or [settings.input_dir / folder_names[0]]))
    if not found:
        raise UserError(
            f"the dataset {stem} is not in {settings.input_dir.resolve()} or up to two folders "
            f"below it: there is no {' and no '.join(layouts)}.\n"
            "Get FSDKaggle2019 from https://zenodo.org/record/3612637 or from the Kaggle "
            "competition freesound-audio-tagging-2019,\nand name the folder that holds it with "
            "--input_dir. To try the tool without it: --dataset sample"
        )
    _, table, folders = min(found)  # one with an audio folder, if there is one
    clips = read_clips(table, settings)

    def num_clips_in(folder: Path) -> int:
        return sum(os.path.exists(folder / clip.fname) for clip in clips[:100])

    # Some copies nest a folder in one of the same name: take the one with the clips.
    return Dataset(stem, max(folders, key=num_clips_in), clips)


def list_folder(folder: Path, max_samples: int | None) -> Dataset:
    """Take every sound file below a folder, sorted by path, labelled by the folder it lies in."""
    if not folder.is_dir():
        raise UserError(f"--audio_dir {folder}: there is no such folder")
    clips, left_out, absolute = [], [], folder.resolve()
    for name in list_files(folder):
        if os.path.splitext(name)[1].lower() in ENDINGS:
            clips.append(Clip(name, labels=(absolute / name).parent.name))
        else:
            left_out.append(os.path.splitext(name)[1] or "no ending")
    if left_out:
        endings = ", ".join(sorted(set(left_out))[:20])
        say(f"note: left out {counted(len(left_out), 'file')} not known as sound: {endings}")
    if not clips:
        raise UserError(f"--audio_dir {folder}: there are no sound files below it")
    return Dataset(absolute.name, folder, clips[:max_samples])


def list_files(folder: Path) -> list[str]:
    """List the files below a folder by their relative paths, sorted; hidden ones are passed over.

    Linked folders are followed. Each folder is listed once, for links may lead in circles. Bytes
    of a name that are not UTF-8 are replaced; such a file is not found then, and fails.
    """

    def report(error: OSError) -> None:
        if fault_of_file(error, folder) != NO_FILE:
            say(f"note: the folder {error.filename} is left out: {error.strerror}")

    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=report):
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                path = os.path.relpath(os.path.join(where, name), folder).replace(os.sep, "/")
                found.append(os.fsencode(path).decode(errors="replace"))
    return sorted(found, key=lambda path: path.split("/"))


def comparable(name: str) -> str:
    """Return a name in the form in which case, kind of Unicode, and slashes make no difference."""
    name = os.path.normpath(name.strip().replace("\\", "/")).replace(os.sep, "/")
    return unicodedata.normalize("NFC", name).casefold()


def find_file(clip: Clip, dataset: Dataset) -> None:
    """Fill in a clip's name, path and stamp, or the reason why it has none.

    The name is tried as it stands, then as that of the only file that it fits in the index.
    Raises OSError: the machine is at fault.
    """
    try:
        clip.name = name_below(dataset.audio_dir, clip.fname)
        clip.path = dataset.audio_dir / clip.name
        if not os.path.isfile(clip.path):
            key = comparable(clip.name)
            fitting = dataset.index.get(key, {clip.name})
            fitting = {file for file in fitting if file.count("/") == key.count("/")} or fitting
            if len(fitting) > 1:
                raise BadClip(f"several files fit this name: {', '.join(sorted(fitting)[:5])}")
            clip.path = dataset.audio_dir / next(iter(fitting))
        clip.stamp = look_at(clip.path)
    except BadClip as reason:
        clip.error = str(reason)
        if clip.error == NO_FILE and "\N{REPLACEMENT CHARACTER}" in clip.fname:
            clip.error += "; the name is not UTF-8: rename the file"


def name_below(folder: Path, fname: str) -> str:
    """Return a clip's name as a normal path below a folder. Raises BadClip: it is none."""
    if not fname.strip() or "\0" in fname:
        raise BadClip("the name is empty, or holds a NUL character")
    for root in (os.path.abspath(folder), os.path.realpath(folder)):
        path = os.path.normpath(os.path.join(root, fname))
        if path.startswith(os.path.join(root, "")):
            return os.path.relpath(path, root).replace(os.sep, "/")
    raise BadClip("the path is outside the audio folder (--audio_dir)")


def fault_of_file(error: OSError, path: Path) -> str:
    """Say what is wrong with a file. Raises the error itself: the machine is at fault."""
    error.filename = error.filename or str(path)  # an error of reading has none
    if error.errno not in CLIP_ERRNOS:
        raise error
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NO_FILE
    return f"cannot be opened: {error.strerror}"


def look_at(path: Path) -> Stamp:
    """Return a file's stamp; ctime, because `rsync -t`, `cp -p` and unzip set the mtime."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise BadClip(fault_of_file(error, path)) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise BadClip(f"{kind}, not a file")
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def find_separator(text: str) -> str:
    """Return the separator by which the header has a column of names, or the most frequent."""
    header = text.lstrip("\r\n ").partition("\n")[0]
    for separator in SEPARATORS:
        cells = {cell.strip(' "\r').lower() for cell in header.split(separator)}
        if cells & set(NAME_COLUMNS):
            return separator
    return max(SEPARATORS, key=header.count)


def read_table(csv_path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read the header of a table and its rows, by column. Raises UserError: it cannot be read."""
    line, rows = 1, []  # the line in which a row begins
    try:
        data = csv_path.read_bytes()
        text = re.sub(r"\Asep=.\r?\n", "\n", data.decode("utf-8-sig"))  # Excel's first line
        separator = find_separator(text)
        # A space before a quote would make the quote a part of the cell.
        text = re.sub(re.escape(separator) + ' +"(?!")', separator + '"', text)
        # Tables separated by tabs are commonly not quoted: two stray quotes would swallow rows.
        quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
        csv.field_size_limit(2**31 - 1)
        lines = io.StringIO(text, newline="")
        reader = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if rows and any(cell.strip() for cell in cells[len(rows[0]) :]):
                    raise csv.Error(
                        f"{len(cells)} cells, and {len(rows[0])} in the header; a cell with "
                        f"{separator!r} in it needs quotes"
                    )
                rows.append(cells)
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{csv_path}, line {line}: not UTF-8. Save it as UTF-8.") from error
    except csv.Error as error:
        reason = str(error).replace("unexpected end of data", "a quote is never closed")
        raise UserError(f"{csv_path}, line {line}: {reason}") from error
    except OSError as error:
        raise UserError(f"{csv_path}: {error.strerror}") from error
    if len(rows) < 2:
        raise UserError(f"{csv_path} lists no clips: it needs a header and rows")
    header = [cell.strip() for cell in rows[0]]
    return header, [dict(zip(header, cells)) for cells in rows[1:]]


def read_clips(csv_path: Path, settings: Settings) -> list[Clip]:
    """Read the clips that a table lists, with the further columns of --metadata.

    Columns without a name are passed over. Repeated rows count once. Raises UserError.
    """
    header, rows = read_table(csv_path)
    columns = {name.lower(): name for name in reversed(header)}  # a capital is forgiven
    name_column = next((columns[name] for name in NAME_COLUMNS if name in columns), None)
    label_column = next((columns[name] for name in LABEL_COLUMNS if name in columns), None)
    if name_column is None:
        names, there = " or ".join(NAME_COLUMNS), ", ".join(header[:8])
        raise UserError(f"{csv_path} has no column {names}, only {there}: rename the right one")
    main = {name_column, label_column} - {None}
    extra = [name for name in header if settings.metadata and name and name not in main]
    for name in [*main, *extra]:
        if header.count(name) > 1:
            raise UserError(f"{csv_path}: the column {name!r} is there twice; rename one")
    for name in extra:
        if name in {*COLUMNS, *CHUNK_COLUMNS, "tokens"} or re.fullmatch(r"token_\d+", name):
            raise UserError(f"{csv_path}: column {name!r} clashes with an output column; rename it")
    clips, spanning = {}, []
    for row in rows:
        labels = row.get(label_column, "").strip()
        further = {name: row.get(name, "").strip() for name in extra}
        clip = Clip(row.get(name_column, ""), labels, further)
        clips.setdefault((clip.fname, labels, *further.values()), clip)
        if any("\n" in cell for cell in row.values()):
            spanning.append(clip.fname)
    if spanning:
        what = f"{counted(len(spanning), 'row')} of several lines (the first: {spanning[0]})"
        say(f"note: {csv_path} has {what}. If that is wrong, a quote is missing or one too many.")
    repeated = len(rows) - len(clips)
    if repeated:
        say(f"note: {csv_path} repeats {counted(repeated, 'row')}; duplicates are ignored")
    return list(clips.values())[: settings.max_samples]


# -------------------------------------------------------------------------------------------- clips

EXACT_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "AIFF", "AU")  # these give all that they promise
UNKNOWN_LENGTH = 2**40  # samples; a FLAC stream may say 2^48, an MP3 stream 2^63
PIPED = 2**31 - 2**24  # bytes; programs that write to a pipe give sizes from here on
LOUDEST = 100.0  # of samples that may be audio between -1 and 1


def read_audio(path: Path, channels: int, max_duration_s: float) -> tuple[torch.Tensor, int, str]:
    """Read a sound file: samples [channels, T] in float32, its sample rate in Hz, and its SHA-256.

    libsndfile decodes it, or torchaudio.load if libsndfile does not know the format.
    Raises BadClip: the file is at fault. OSError, MemoryError: the machine is at fault.
    """
    with path.open("rb") as file:  # raises what libsndfile would hide
        head = file.read(4096)
    if not head:
        raise BadClip("empty file (0 bytes)")
    if path.suffix.lower() == ".raw":
        raise BadClip("raw audio without a header has no sample rate: convert it to WAV")
    try:
        with sf.SoundFile(str(path)) as audio:
            if audio.format == "RAW":  # by its ending alone, libsndfile takes any bytes for samples
                raise BadClip("no header that says how to read the file: it may hold text")
            check_header(audio, max_duration_s)
            digest = sha256_of(path)  # before decoding: it raises the disk's I/O errors
            return decode(audio, channels, max_duration_s), audio.samplerate, digest
    except UnicodeEncodeError as error:
        raise BadClip("the name is not UTF-8: rename the file") from error
    except sf.LibsndfileError as error:
        digest = sha256_of(path)
        samples, rate = read_otherwise(path, error, head)
        check_duration(samples.shape[1] / rate, max_duration_s)
        return mix_channels(check_samples(samples), channels), rate, digest


def check_duration(duration_s: float, limit_s: float) -> None:
    if duration_s > limit_s:
        raise BadClip(f"too long: {duration_s:.1f} s (limit {limit_s:g} s, see --max_duration)")


def check_header(audio: sf.SoundFile, max_duration_s: float) -> None:
    """Raise BadClip if an open file's header cannot be right, or promises more than there is."""
    if not 1_000 <= audio.samplerate <= 1_000_000:
        raise BadClip(f"its header is damaged: a sample rate of {audio.samplerate} Hz")
    if audio.frames < UNKNOWN_LENGTH:
        check_duration(audio.frames / audio.samplerate, max_duration_s)
    # libsndfile reduces the size of WAV (data), AIFF (SSND) and AU to what is there, and says so in
    # its log alone. Of RF64 it logs the numbers of samples.
    sizes = r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)"
    samples = r"frame count (\d+) does not match value from 'ds64' chunk of (\d+)"
    for there, promised in re.findall(samples, audio.extra_info):
        if int(there) < int(promised):
            raise BadClip(f"truncated: {int(there):,} of {int(promised):,} samples are there")
    for promised, there in re.findall(sizes, audio.extra_info, re.MULTILINE):
        if int(there) < int(promised) < PIPED:
            raise BadClip(
                f"truncated, or its header is wrong: {int(there):,} of the {int(promised):,} bytes "
                "of audio that it promises are there"
            )


def decode(audio: sf.SoundFile, channels: int, max_duration_s: float) -> torch.Tensor:
    """Read the promised samples of an open file, and none behind them: [channels, T].

    It reads in pieces, so that no wrong header reserves memory.
    """
    most = audio.frames
    size = re.search(r"(?s)Block Align +: (\d+)\n.*\ndata : (\d+)", audio.extra_info)
    if size and audio.format == "W64" and audio.subtype.startswith(("PCM", "FLOAT", "DOUBLE")):
        most = min(most, (int(size[2]) - 24) // int(size[1]))  # libsndfile reads to the file's end
    if most >= UNKNOWN_LENGTH:
        most = int(max_duration_s * audio.samplerate) + 1
        if audio.format == "FLAC":
            audio.seekable = lambda: False  # soundfile would seek, which is libsndfile's error 39
    if audio.seekable():
        audio.seek(0)  # as soundfile.read: an Opus stream then skips its first samples, as it must
    pieces, length = [], 0
    while length < most:
        frames = min(2**25 // audio.channels, most - length)
        # Zeros, because a decoder may leave memory unwritten where a file is damaged.
        piece = audio.read(out=np.zeros((frames, audio.channels), dtype=np.float32))
        if not len(piece):
            break
        pieces.append(mix_channels(check_samples(torch.from_numpy(piece.T)), channels))
        length += len(piece)
    if length == 0:
        raise BadClip("no samples: its header says 0 bytes of audio, or none follow it")
    check_duration(length / audio.samplerate, max_duration_s)
    exact = audio.format in EXACT_FORMATS and not audio.subtype.startswith("MPEG")
    if exact and length < audio.frames < UNKNOWN_LENGTH:
        raise BadClip(f"truncated or damaged: {length:,} of {most:,} samples could be read")
    return torch.cat(pieces, dim=1)


def check_samples(samples: torch.Tensor) -> torch.Tensor:
    """Return samples [C, T]. Raises BadClip: there are none, or they are no audio in -1 to 1."""
    if not samples.numel():
        raise BadClip("no samples")
    peak = max(abs(samples.min().item()), abs(samples.max().item()))
    if not math.isfinite(peak):
        raise BadClip("NaN or infinite samples")
    if peak > LOUDEST:
        raise BadClip(
            f"samples up to {peak:g}, but audio lies between -1 and 1: divide them by the full "
            "scale (32768 for 16 bits), or save the file as 16-bit PCM"
        )
    return samples


def mix_channels(samples: torch.Tensor, channels: int) -> torch.Tensor:
    """Return [C, T] as it is if C is `channels`, else the mean of all: [channels, T]."""
    if samples.shape[0] == channels:
        return samples
    return samples.mean(dim=0, keepdim=True).repeat(channels, 1)


def read_otherwise(
    path: Path, failure: sf.LibsndfileError, head: bytes
) -> tuple[torch.Tensor, int]:
    """Read a file that begins with `head` by torchaudio, if libsndfile does not know its format.

    torchaudio needs TorchCodec and FFmpeg since 2.9. FFmpeg plays what is left of a damaged file.
    Returns samples [C, T], and the rate in Hz. For errors see read_audio.
    """
    words = failure.error_string.strip()
    if failure.code == 17:  # libsndfile's malloc failed
        raise MemoryError(words) from failure
    if failure.code == 2:  # a system call failed, although the file can be read
        raise OSError(errno.EIO, words, str(path)) from failure
    is_utf_16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    has_controls = re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]", head)
    if is_utf_16 or (len(set(head)) > 1 and not has_controls):
        raise BadClip("not audio: the file holds text") from failure
    if re.match(rb"ID3|APETAGEX|TAG", head):  # FFmpeg would play what is left of it
        raise BadClip("no audio behind the file's tag could be decoded") from failure
    if failure.code == 24:  # "SF_INFO struct incomplete"
        raise BadClip(
            "its header is damaged: a sample rate or a number of channels of 0"
        ) from failure
    if failure.code not in (1, 4, 7):  # the format or the encoding; 7: it is named MP3, and is none
        raise BadClip(f"damaged, or not a sound file (libsndfile: {words})") from failure
    try:
        return torchaudio.load(path)
    except MemoryError:
        raise
    except Exception as error:  # any decoder's, or TorchCodec's absence
        if getattr(error, "errno", None) not in {None, *CLIP_ERRNOS}:
            raise
        if "allocate memory" in str(error):  # PyTorch's words for no memory
            raise MemoryError(str(error)) from error
        words = "it is no MP3." if failure.code == 7 else words
        reasons = " ".join(f"soundfile: {words} torchaudio: {error}".split())
        raise BadClip(f"not audio that can be read ({reasons})") from error


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


RESAMPLERS = threading.Lock()


@lru_cache(maxsize=8)
def make_resampler(rate: int, model_rate: int, device: str) -> torchaudio.transforms.Resample:
    """Make torchaudio's resampler, with its defaults, as in EnCodec's convert_audio.

    Its kernel has as many entries as the product of the reduced rates: 4 GB for 44,101 Hz. Ratios
    of more than 2^25 entries are met by the nearest one of fewer.
    """
    ratio = Fraction(rate, model_rate)
    nearest = ratio.limit_denominator(max(1, int(math.sqrt(2**25 / ratio))))
    if nearest != ratio:
        say(f"note: the sample rate {rate} Hz is met to within 0.01 %: an exact filter is too big")
    return torchaudio.transforms.Resample(nearest.numerator, nearest.denominator).to(device)


def resample(samples: torch.Tensor, rate: int, settings: Settings) -> torch.Tensor:
    """Resample [C, T] from `rate` in Hz to the model's rate, on the settings' device."""
    with RESAMPLERS:  # a kernel is made once, and its note printed once
        resampler = make_resampler(rate, MODELS[settings.model].sample_rate, settings.device)
    return resampler(samples.to(settings.device))


# ------------------------------------------------------------------------------------------- chunks


def split_chunks(audio: torch.Tensor, settings: Settings) -> tuple[list[int], list[torch.Tensor]]:
    """Cut audio [C, T] into chunks [C, chunk], and say at which samples they start.

    Audio of at most one chunk is zero-padded at its end. Longer audio is cut every hop, and the
    last chunk is aligned to its end: it is not padded, and every sample is in a chunk. A whole clip
    is one chunk, as long as it is.
    """
    if settings.whole:
        return [0], [audio]
    length, rate = audio.shape[1], MODELS[settings.model].sample_rate
    chunk = round(settings.target_duration * rate)
    starts = list(range(0, max(1, length - chunk + 1), round(chunk * (1 - settings.overlap))))
    if starts[-1] + chunk < length:
        starts.append(length - chunk)
    audio = F.pad(audio, (0, max(0, chunk - length)))
    return starts, [audio[:, start : start + chunk] for start in starts]


# ------------------------------------------------------------------------------------------ weights


def find_weights(settings: Settings) -> Path | None:
    """Find the file to load, and download it if need be; None for untrained weights.

    `pretrained` is Meta's file in torch hub's cache, where EncodecModel's own loader keeps it too.
    The names of Meta's files end in the first 8 hex digits of their SHA-256.

    Raises UserError: there is no such file, the download fails, or the SHA-256 is another one.
    """
    spec, path = MODELS[settings.model], Path(settings.weights).expanduser()
    if settings.weights == "untrained":
        return None
    if settings.weights == "pretrained":
        path = Path(torch.hub.get_dir(), "checkpoints", spec.checkpoint)
        if not path.exists() and not download(path):
            if settings.dataset == "sample" and not settings.audio_dir:
                return None
            raise UserError(
                f"the pretrained weights could not be downloaded from {ROOT_URL}{path.name}\n"
                f"Download that file elsewhere and copy it to {path},\n"
                "or name it with --weights FILE. To test a run without them: --weights untrained"
            )
    elif path.is_dir():
        path /= "model.safetensors"
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file (nor is it pretrained or untrained)")
    metas = [spec.checkpoint for spec in MODELS.values()]
    if path.name in metas and not sha256_of(path).startswith(path.stem[-8:]):
        raise UserError(
            f"{path} is damaged: its SHA-256 does not begin with the 8 digits that end its name. "
            "Delete it, and run again or download it elsewhere."
        )
    return path


def download(path: Path) -> bool:
    """Download one of Meta's checkpoints to `path`. Says why, and returns False, if that fails."""
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a cluster's firewall may swallow the request
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        url, checksum = ROOT_URL + path.name, path.stem[-8:]
        # It writes to a temporary name and renames, so several processes may download at once.
        torch.hub.download_url_to_file(url, str(path), checksum, progress=LOCAL_RANK == 0)
        return True
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        say(f"{ROOT_URL}{path.name} could not be downloaded: {getattr(error, 'reason', error)}")
        return False
    finally:
        socket.setdefaulttimeout(previous_timeout)


def build_model(name: str) -> EncodecModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")
        build = getattr(EncodecModel, name.replace("encodec_", "encodec_model_"))
        return build(pretrained=False)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint. Raises UserError: the file holds none."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        mmap = zipfile.is_zipfile(path)  # reads only what is used; not for files before torch 1.6
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except ImportError as error:
        raise UserError(f"{path} needs safetensors:  pip install safetensors") from error
    except Exception as error:  # torch.load documents no list of its errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is not a PyTorch checkpoint ({reason})") from error
    return state if isinstance(state, dict) else {}


def transformers_names(name: str) -> list[str]:
    """The names that transformers gives a tensor of EnCodec's: weight norm has old and new ones."""
    for meta, theirs in (
        (r"^(encoder|decoder)\.model", r"\1.layers"),
        (r"\.(conv|convtr)\.\1\.", ".conv."),
        (r"\.(conv|convtr)\.norm\.", ".norm."),
        (r"^quantizer\.vq\.layers\.(\d+)\._codebook", r"quantizer.layers.\1.codebook"),
    ):
        name = re.sub(meta, theirs, name)
    newer = name.replace("weight_g", "parametrizations.weight.original0")
    return [name, newer.replace("weight_v", "parametrizations.weight.original1")]


def fitting(state: dict, model: EncodecModel) -> dict[str, torch.Tensor] | None:
    """Rename `state` to EnCodec's own names; None if it belongs to another model."""
    named = {}
    for name, wanted in model.state_dict().items():
        for key in (name, *transformers_names(name)):
            if getattr(state.get(key), "shape", None) == wanted.shape:
                named[name] = state[key]
    return named if len(named) == len(state) == len(model.state_dict()) else None


def load_model(settings: Settings, path: Path | None) -> tuple[EncodecModel, str]:
    """Load the weights of `path` (None: untrained ones) into EnCodec at the chosen bandwidth.

    Returns the model, and the SHA-256 of the tensors that decide the codes, which is the same for
    every form of checkpoint. Raises UserError: another model's, NaN, or all-zero codebooks.
    """
    if path is None:
        model = untrained_model(settings.model)
    else:
        model = build_model(settings.model)
        state = read_state(path)
        named = fitting(state, model)
        if named is None:
            others = [name for name in MODELS if fitting(state, build_model(name))]
            hint = "of no EnCodec model"
            if others:
                hint = f"those of {others[0]}: add --model {others[0]}"
            raise UserError(f"the weights in {path} are not {settings.model}'s; they are {hint}")
        model.load_state_dict(named)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("encoder.") or name.endswith("_codebook.embed"):
            if not tensor.isfinite().all() or (name.endswith(".embed") and not tensor.any()):
                raise UserError(f"the weights in {path} are unusable: {name} has NaN or is all 0")
            digest.update(name.encode() + tensor.numpy().tobytes())
    model.set_target_bandwidth(settings.bandwidth)
    return model, UNTRAINED if path is None else digest.hexdigest()


@torch.no_grad()
def untrained_model(name: str) -> EncodecModel:
    """Build a model with seeded random weights, to test runs: its tokens have no meaning.

    A fresh EnCodec's codebooks are all zero, and so would be its tokens. Here each codebook is
    drawn around the residuals that the codebooks before it leave of some noise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(name)
        noise = torch.randn(1, model.channels, 4 * model.sample_rate)
        noise *= torch.linspace(-8, 0, noise.shape[-1]).exp()  # from near silence to full scale
        residual = model.encoder(noise)[0].T  # [F, D]
        for layer in model.quantizer.vq.layers:
            layer.codebook.copy_(residual.mean(0) + residual.std(0) * torch.randn(1024, 128))
            residual = residual - layer.codebook[layer.encode(residual.T[None])[0]]
    return model


# -------------------------------------------------------------------------------------------- codes


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def elu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """ELU as max(x, exp(min(x, 0)) - 1).

    torch's own uses an expm1 that is several times slower for minutes at a time on some hosts. On
    Linux with AVX-512, NumPy's expm1 is Intel's SVML, which is faster than torch's exp.
    """
    out = torch.clamp(x, max=0, out=out)
    if AVX512 and sys.platform == "linux":
        np.expm1(out.numpy(), out=out.numpy())
    else:
        out.exp_().sub_(1)
    return torch.maximum(x, out, out=out)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear; oneDNN computes it on CPUs with AVX-512, which MKL, the default, ignores on AMD."""
    if AVX512 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@lru_cache
def one_core_pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return this process's threads that encode, one core each: no sum depends on their number.

    `process` is os.getpid(): a forked process has none of its parent's threads.
    """
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


class Encoder:
    """Turns chunks into the codes that EncodecModel.encode gives, by EnCodec's modules on batches.

    This is the encoder for GPUs. An encoder can be pickled, and used in forked processes.
    """

    threads = 1  # they feed the GPU

    def __init__(self, model: EncodecModel, settings: Settings) -> None:
        for module in model.encoder.modules():
            if hasattr(module, "weight_g"):  # fold the norm into the weight once, not every call
                torch.nn.utils.remove_weight_norm(module)
        self.model, self.settings = model, settings
        model.encoder.to(settings.device)
        model.quantizer.to(settings.device)
        count = model.quantizer.get_num_quantizers_for_bandwidth(model.frame_rate, model.bandwidth)
        books = [layer.codebook for layer in model.quantizer.vq.layers[:count]]  # [1024, D] each
        self.codebooks = [(book, 2 * book, -book.pow(2).sum(1)) for book in books]

    def encode(self, chunks: list[torch.Tensor]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Encode chunks [C, T]; yields the codes [K, F], uint16, and the latents [D, F] of each.

        Segments are sorted by length, the longest first. Each is convolved on a core of its own,
        and batches of one length go through the LSTM and the codebooks. The pool is first in, first
        out, and a batch is queued after the convolutions of the next one (of more, if batches are
        smaller than 4): it rarely waits for its own then, and the LSTM, which is bound by memory,
        runs beside convolutions, which are bound by the cores.
        """
        segments = [(number, part) for number, c in enumerate(chunks) for part in self.segments(c)]
        segments.sort(key=lambda segment: -segment[1].shape[1])  # those of a chunk stay in order
        pool, size, batches = one_core_pool(self.threads, os.getpid()), self.settings.batch_size, []
        for _, same in groupby(segments, key=lambda segment: segment[1].shape[1]):
            same = list(same)
            batches += [same[first : first + size] for first in range(0, len(same), size)]
        results, waiting, ahead = [[] for _ in chunks], deque(), max(1, 4 // size)
        for batch in [*batches, *[[]] * ahead]:  # the empty ones let the last batches through
            convolved = [pool.submit(self.convolve, samples) for _, samples in batch]
            waiting.append((batch, convolved))
            if len(waiting) > ahead:
                oldest, convolved = waiting.popleft()
                future = pool.submit(self.quantize_batch, convolved)
                for place, (number, _) in enumerate(oldest):
                    results[number].append((future, place))
        for parts in results:
            done = [(*future.result(), place) for future, place in parts]
            codes = np.concatenate([codes[place] for codes, _, place in done], axis=1)
            yield codes, torch.cat([latents[place] for _, latents, place in done], dim=1)

    def segments(self, chunk: torch.Tensor) -> list[torch.Tensor]:
        """Cut a chunk [C, T] as EncodecModel.encode does; its segments' codes follow each other.

        The 24 kHz model takes it whole, the 48 kHz model in segments of 1 s that overlap by 1 %.
        """
        length = self.model.segment_length or chunk.shape[1]
        starts = range(0, chunk.shape[1], self.model.segment_stride or length)
        return [chunk[:, start : start + length] for start in starts]

    @torch.inference_mode()
    def convolve(self, segment: torch.Tensor) -> torch.Tensor:
        """Divide a segment [C, T] by its loudness, as EncodecModel does. A GPU convolves later."""
        if not self.model.normalize:
            return segment
        return segment / (1e-8 + segment.mean(dim=0).pow(2).mean().sqrt())

    def latents(self, convolved: list[torch.Tensor]) -> torch.Tensor:
        """Turn the results of `convolve` for B segments into the encoder's output [B, D, F]."""
        return self.model.encoder(torch.stack(convolved))

    @torch.inference_mode()
    def quantize_batch(self, convolved: list[Future]) -> tuple[np.ndarray, torch.Tensor]:
        """Return the codes [B, K, F] and the latents [B, D, F] of B segments of one length."""
        latents = self.latents([future.result() for future in convolved])
        return self.quantize(latents), latents.cpu()

    @torch.inference_mode()
    def quantize(self, latents: torch.Tensor) -> np.ndarray:
        """[B, D, F] -> codes [B, K, F]: the nearest code to what the codebooks before it left."""
        rows = latents.transpose(1, 2).reshape(-1, latents.shape[1])  # [B * F, D]
        rows = rows.to(self.codebooks[0][0].device)
        parts = []
        for residual in rows.split(8192):
            codes = []
            for book, doubled, minus_squared in self.codebooks:
                # |x - e|^2 is least where 2 x.e - |e|^2 is greatest.
                codes.append(linear(residual, doubled, minus_squared).max(dim=1).indices)
                residual = residual - book[codes[-1]]
            parts.append(torch.stack(codes))
        codes = torch.cat(parts, dim=1).view(len(self.codebooks), len(latents), -1).transpose(0, 1)
        return codes.cpu().numpy().astype(np.uint16)


# The last `left` frames [left, C] of each convolution's input, for the next piece of the audio.
Tails = dict["FastConv", torch.Tensor]


class FastConv:
    """EnCodec's SConv1d, and the ELU before it where there is one, on one chunk as [T, C].

    It computes the same sums in a layout for CPUs: with a frame's channels side by side, a kernel
    of 1 is a matrix product, and a kernel of twice the stride (all strided convolutions of EnCodec)
    is two, over a view of the input. The ELU writes into the padded input.
    """

    def __init__(self, module: SConv1d, after_elu: bool) -> None:
        conv, norm = module.conv.conv, module.conv.norm
        self.kernel, self.stride, self.after_elu = conv.kernel_size[0], conv.stride[0], after_elu
        self.weight, self.bias = conv.weight.detach(), conv.bias.detach()  # [C', C, kernel], [C']
        self.norm = norm if isinstance(norm, torch.nn.GroupNorm) else None
        if self.kernel == 1:
            self.weight = self.weight[:, :, 0].contiguous()  # [C', C]
        elif self.kernel == 2 * self.stride:
            halves = self.weight.transpose(1, 2).reshape(len(self.bias), 2, -1)
            self.weight = halves.transpose(0, 1).contiguous()  # [2, C', stride * C]
        else:
            self.weight = self.weight[:, :, None].contiguous(memory_format=torch.channels_last)
        # SConv1d pads in this way: a causal model all to the left, another the odd sample.
        total = self.kernel - self.stride
        self.right = 0 if module.causal else total // 2
        self.left = total - self.right

    def pad(self, x: torch.Tensor, tails: Tails) -> torch.Tensor:
        """[T, C] after its ELU, reflected at both ends, to whole strides."""
        length, left, right = len(x), self.left, self.right + -len(x) % self.stride
        tail = tails.get(self)
        if tail is None and length <= max(left, right):  # too short: EnCodec appends zeros first
            x = elu(x) if self.after_elu else x
            return pad1d(x.T[None], (left, right), "reflect")[0].T.contiguous()
        padded = x.new_empty(left + length + right, x.shape[1])
        body = padded[left : left + length]
        elu(x, out=body) if self.after_elu else body.copy_(x)
        padded[:left] = body[1 : left + 1].flip(0) if tail is None else tail
        padded[left + length :] = body[length - 1 - right : length - 1].flip(0)
        tails[self] = body[length - left :].clone()
        return padded

    def __call__(self, x: torch.Tensor, tails: Tails) -> torch.Tensor:
        """[T, C] -> [ceil(T / stride), C']; `tails`: see CpuEncoder.convolve."""
        if self.kernel == 1:
            y = linear(elu(x) if self.after_elu else x, self.weight, self.bias)
        elif self.kernel == 2 * self.stride:
            strides = self.pad(x, tails).view(-1, self.stride * x.shape[1])
            y = linear(strides[:-1], self.weight[0], self.bias)
            y += linear(strides[1:], self.weight[1])
        else:
            y = F.conv2d(self.pad(x, tails).T[None, :, None], self.weight, self.bias)[0, :, 0].T
        if self.norm is None:
            return y
        mean, flat = y.mean(), y.reshape(-1)  # GroupNorm of one group
        variance = (flat.dot(flat) / len(flat) - mean * mean).clamp(min=0)
        scale = self.norm.weight * torch.rsqrt(variance + self.norm.eps)
        return torch.addcmul(self.norm.bias - mean * scale, y, scale, out=y)


def residual_block(
    shortcut: FastConv, wide: FastConv, narrow: FastConv, x: torch.Tensor, tails: Tails
) -> torch.Tensor:
    return shortcut(x, tails).add_(narrow(wide(x, tails), tails))


class CpuEncoder(Encoder):
    """EnCodec's encoder for a CPU: the convolutions segment by segment, the LSTM over a batch.

    A segment's activations fit the cache, and a batch's do not; the LSTM reads all its weights at
    every step, which the segments of a batch share. A batch is filled up with zeros to one fixed
    shape, so that codes do not depend on what they are encoded with. Batches of 4 x 2 s are as fast
    as larger ones.
    """

    threads = THREADS
    lstm_frames = 1500  # a longer segment goes through the LSTM in pieces, to save memory

    def __init__(self, model: EncodecModel, settings: Settings) -> None:
        super().__init__(model, settings)
        self.hop, self.causal = int(model.encoder.hop_length), model.encoder.model[0].causal
        self.layers: list[Callable[[torch.Tensor, Tails], torch.Tensor]] = []
        after_elu = False
        for module in model.encoder.model[:-1]:
            if isinstance(module, SConv1d):
                self.layers.append(FastConv(module, after_elu))
            elif isinstance(module, SEANetResnetBlock):
                shortcut = FastConv(module.shortcut, after_elu=False)
                wide, narrow = (FastConv(module.block[i], after_elu=True) for i in (1, 3))
                self.layers.append(partial(residual_block, shortcut, wide, narrow))
            elif isinstance(module, SLSTM):
                self.lstm = module.lstm
            after_elu = isinstance(module, torch.nn.ELU)
        # EnCodec's own module: it rounds less over 3,584 terms a sum, and costs little.
        self.last = model.encoder.model[-1]

    @torch.inference_mode()
    def convolve(self, segment: torch.Tensor) -> torch.Tensor:
        """Turn [C, T] into the LSTM's input [F, 512].

        A causal model takes pieces of 50 frames or more, which fit the cache and need no more
        memory for longer segments; `tails` holds the inputs that each convolution needs from the
        piece before. The 48 kHz model looks ahead and normalizes over time: it takes one piece.
        """
        x, tails = super().convolve(segment).T.contiguous(), {}  # [T, C]
        piece = 50 * self.hop if self.causal else len(x)
        sizes = [piece] * (len(x) // piece - 1)
        pieces = []
        for y in x.split([*sizes, len(x) - sum(sizes)]):
            for layer in self.layers:
                y = layer(y, tails)
            pieces.append(y)
        return torch.cat(pieces)

    def latents(self, convolved: list[torch.Tensor]) -> torch.Tensor:
        """Turn B convolved segments [F, 512] of one length into the encoder's output [B, D, F]."""
        num_frames, fill = len(convolved[0]), self.settings.batch_size - len(convolved)
        x, state = convolved[0].new_empty(len(convolved), 512, num_frames), None
        for at in range(0, num_frames, self.lstm_frames):
            part = slice(at, at + self.lstm_frames)
            piece = torch.stack([segment[part] for segment in convolved], dim=1)  # [F, B, 512]
            piece = F.pad(piece, (0, 0, 0, fill))
            y, state = self.lstm(piece, state)
            x[:, :, part] = elu(y.add_(piece)).permute(1, 2, 0)[: len(convolved)]
        return torch.cat([self.last(one[None]) for one in x])


def make_encoder(model: EncodecModel, settings: Settings) -> Encoder:
    """Return the encoder for the device of settings from resolve_device."""
    return CpuEncoder(model, settings) if settings.device == "cpu" else Encoder(model, settings)


def load_encoder(settings: Settings) -> Encoder:
    """Find, load and set up the weights, for `tokenize`. Raises UserError: see find_weights."""
    settings = resolve_device(settings)
    model, weights = load_model(settings, find_weights(settings))
    if weights == UNTRAINED:
        warnings.warn(f"untrained weights. {UNTRAINED_WARNING}", stacklevel=2)
    return make_encoder(model, settings)


def tokenize(sound: object, encoder: Encoder, rate: int | None = None) -> object:
    """Tokenize a sound, or a list of sounds together.

    A sound is the path of a file, or an array or tensor of samples between -1 and 1, [T] or [C, T],
    at the sample rate `rate` in Hz.

    Returns codes [N, K, F], int64 within 0..1023: N chunks (1 with Settings(whole=True)), K
    codebooks, F frames; 75 frames are a second at 24 kHz. A list gives a list.

    Raises BadClip: a file is missing, damaged, or no audio, or samples are not between -1 and 1.
    ValueError: the shape or the rate of samples is wrong. OSError: the machine is at fault.
    """
    sounds = sound if isinstance(sound, (list, tuple)) else [sound]
    chunks = []
    for one in sounds:
        audio = load_sound(one, rate, encoder.settings)
        chunks.append(split_chunks(audio, encoder.settings)[1])
    encoded = encoder.encode([chunk for parts in chunks for chunk in parts])
    codes = []
    for parts in chunks:
        codes_of_one = [next(encoded)[0] for _ in parts]
        codes.append(np.stack(codes_of_one).astype(np.int64))
    return codes if isinstance(sound, (list, tuple)) else codes[0]


def load_sound(sound: object, rate: int | None, settings: Settings) -> torch.Tensor:
    """Read or check a sound, and resample it: [C, T]. See tokenize for arguments and errors."""
    channels = MODELS[settings.model].channels
    if isinstance(sound, (str, os.PathLike)):
        try:
            look_at(Path(sound))
            samples, rate, _ = read_audio(Path(sound), channels, settings.max_duration)
        except BadClip as reason:
            raise BadClip(f"{sound}: {reason}") from reason
        return resample(samples, rate, settings)
    if rate is None or not 1_000 <= rate <= 1_000_000:
        raise ValueError(f"rate={rate}: samples need their sample rate in Hz")
    samples = torch.as_tensor(sound)
    if not samples.is_floating_point():
        raise BadClip(f"{samples.dtype} samples: divide them by their full scale, to -1 to 1")
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and len(samples) > samples.shape[1]):
        raise ValueError(f"samples of shape {tuple(samples.shape)} are neither [T] nor [C, T]")
    samples = torch.atleast_2d(samples.float())
    check_duration(samples.shape[1] / rate, settings.max_duration)
    return resample(mix_channels(check_samples(samples), channels), rate, settings)


# -------------------------------------------------------------------------------------------- store

GROUP_CLIPS = 16  # clips that are loaded and encoded together, at most
GROUP_SECONDS = 120  # of audio that a group holds at a time, but at least one clip


@dataclass(eq=False, slots=True)
class Kept:
    """All that is kept of a clip: an .npz of the two arrays and, as JSON, of the other `facts`."""

    codes: np.ndarray  # [N, K, F] of the clip's N chunks, uint16
    latent: np.ndarray  # [K, F], uint16: the codes of the mean of the chunks' latents
    medoid: int  # the chunk whose latents are nearest to that mean (Euclidean)
    start_sec: list[float]  # [N]: where the chunks start
    duration_sec: float  # of the file, before padding or resampling
    silent: bool  # all samples are zero
    stamp: Stamp  # of the file
    sha256: str  # of the file
    made_with: str  # the hash at the end of the folder's name


FACTS = [field.name for field in fields(Kept)][2:]


def kept_path(folder: Path, name: str) -> Path:
    """Return where the codes of the clip of that name are kept, or will be."""
    above, _, last = name.rpartition("/")
    if len(os.fsencode(last)) > 240:
        last = hashlib.sha256(os.fsencode(last)).hexdigest()
    return folder / above / f"{last}.npz"


def read_kept(folder: Path, name: str) -> Kept | None:
    """Read what is kept of a clip. All that is not whole counts as absent."""
    path = kept_path(folder, name)
    try:
        data = path.read_bytes()
    except OSError as error:
        fault_of_file(error, path)  # raises the machine's
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            # ZipFile.read checks the CRC of a whole member; np.load on a path does not always.
            names = ("codes.npy", "latent.npy", "facts.npy")
            codes, latent, facts = (np.load(io.BytesIO(members.read(name))) for name in names)
        kept = Kept(codes, latent, **json.loads(facts.item()))
        is_whole = (
            kept.made_with == folder.name.rpartition("-")[2]
            and kept.codes.dtype == kept.latent.dtype == np.uint16
            and kept.codes.shape == (len(kept.start_sec), *kept.latent.shape)
            and max(kept.codes.max(), kept.latent.max()) < NUM_CODES  # fails without codes
            and 0 <= kept.medoid < len(kept.codes)
            and 0 < kept.duration_sec < math.inf
            and all(0 <= start < math.inf for start in kept.start_sec)
            and len(kept.stamp) == 3
            and len(kept.sha256) == 64
        )
    except MemoryError:
        raise
    except Exception:  # a damaged archive raises a dozen kinds
        return None
    return kept if is_whole else None


def write_kept(folder: Path, name: str, kept: Kept) -> None:
    """Write what is kept of a clip in one atomic step.

    Raises BadClip: the file system does not take the clip's name. OSError: any other fault.
    """
    path, temporary = kept_path(folder, name), folder / f"{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            facts = json.dumps({name: getattr(kept, name) for name in FACTS})
            np.savez_compressed(file, codes=kept.codes, latent=kept.latent, facts=facts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
        except OSError as error:
            if error.errno not in CLIP_ERRNOS - {errno.EACCES, errno.EPERM}:
                raise
            raise BadClip(f"its codes cannot be kept under its name: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def find_kept(dataset: Dataset, folder: Path, max_duration_s: float) -> int:
    """Give each clip the checksum of the codes that are kept of it; count the files that are gone.

    Codes of a file that has other times or another size now do not count yet: see take_kept.
    """
    num_gone = 0
    for clip in show_progress(dataset.clips, f"{dataset.stem}: looking for codes", delay=2):
        kept = read_kept(folder, clip.name)
        is_gone = clip.error.startswith(NO_FILE)
        if kept and (is_gone or clip.stamp == kept.stamp):
            num_gone += is_gone
            try:
                check_duration(kept.duration_sec, max_duration_s)
                clip.sha256, clip.error = kept.sha256, ""
            except BadClip as reason:
                clip.error = str(reason)
    return num_gone


def show_progress(clips: list[Clip], what: str, **options: object) -> tqdm:
    """Return a bar over clips: it moves on a terminal, and writes a line a minute to a log file."""
    options |= {"mininterval": 0.1 if sys.stderr.isatty() else 60, "miniters": 0}
    return tqdm(clips, what, unit="clip", position=LOCAL_RANK, **options)


def take_kept(clip: Clip, folder: Path) -> Kept | None:
    """Look again for a clip's codes, which another process may have made meanwhile.

    Where only the file's stamp differs, as after a copy, its content decides. Codes of another
    content are removed, so that they never come back. Raises OSError.
    """
    kept = read_kept(folder, clip.name)
    if kept and clip.stamp != kept.stamp:
        if sha256_of(clip.path) != kept.sha256:
            kept_path(folder, clip.name).unlink(missing_ok=True)
            return None
        kept.stamp = clip.stamp
        with suppress(OSError, BadClip):  # it only saves the next run this comparison
            write_kept(folder, clip.name, kept)
    return kept


def load_clip(clip: Clip, folder: Path, settings: Settings) -> tuple[dict, list[torch.Tensor]]:
    """Read a clip's file: returns the facts of Kept besides its codes, and the chunks [C, T].

    For a clip whose codes are kept: only the checksum, and no chunks.
    Raises BadClip: the clip is at fault. OSError, with a path: the machine is at fault.
    """
    spec, chunks = MODELS[settings.model], []
    try:
        kept = take_kept(clip, folder)
        if kept:
            check_duration(kept.duration_sec, settings.max_duration)
            facts = {"sha256": kept.sha256}
        else:
            samples, rate, digest = read_audio(clip.path, spec.channels, settings.max_duration)
            starts, chunks = split_chunks(resample(samples, rate, settings), settings)
            facts = {
                "start_sec": [start / spec.sample_rate for start in starts],
                "duration_sec": samples.shape[1] / rate,
                "silent": not samples.any(),
                "stamp": clip.stamp,
                "sha256": digest,
                "made_with": folder.name.rpartition("-")[2],
            }
        if look_at(clip.path) != clip.stamp:
            raise BadClip("the file changed while it was read; the next run tries it again")
    except OSError as error:
        if error.filename not in (None, str(clip.path)):  # of the codes
            raise
        raise BadClip(fault_of_file(error, clip.path)) from error
    return facts, chunks


def encode_group(group: list[Clip], folder: Path, encoder: Encoder) -> None:
    """Load, encode and keep some clips. Each ends with its file's checksum, or with an error.

    The codes of GROUP_SECONDS of audio are made together.
    Raises RunError: a file is gone. OSError: the machine is at fault.
    """
    loaded, seconds = [], 0.0
    for clip in group:
        if encoder.settings.debug:
            say(f"{clip.fname}: loading")
        try:
            facts, chunks = load_clip(clip, folder, encoder.settings)
        except BadClip as reason:
            clip.error = str(reason)
            if clip.error == NO_FILE:
                raise RunError(
                    f"{clip.path} was there when the run began, and is gone now. Is its folder "
                    "still mounted? The same command resumes."
                ) from reason
            if encoder.settings.debug:
                say(f"{clip.fname} [{clip.labels}]: FAILED: {reason}")
            continue
        if not chunks:
            clip.sha256 = facts["sha256"]
            continue
        seconds += facts["duration_sec"]
        if seconds > GROUP_SECONDS:
            encode_clips(loaded, folder, encoder)
            loaded, seconds = [], facts["duration_sec"]
        loaded.append((clip, facts, chunks))
    encode_clips(loaded, folder, encoder)


def encode_clips(
    loaded: list[tuple[Clip, dict, list[torch.Tensor]]], folder: Path, encoder: Encoder
) -> None:
    """Encode clips of load_clip together, and keep their codes. Raises OSError: see write_kept."""
    encoded = encoder.encode([chunk for _, _, chunks in loaded for chunk in chunks])
    for clip, facts, chunks in loaded:
        codes, latents = zip(*(next(encoded) for _ in chunks))
        latent, medoid = codes[0], 0
        if len(chunks) > 1:
            latents = torch.stack(latents)  # [N, D, F]
            mean = latents.mean(dim=0, keepdim=True)
            latent = encoder.quantize(mean)[0]
            medoid = int((latents - mean).pow(2).sum(dim=(1, 2)).argmin())
        try:
            write_kept(folder, clip.name, Kept(np.stack(codes), latent, medoid, **facts))
            clip.sha256, clip.encoded_s = facts["sha256"], facts["duration_sec"]
        except BadClip as reason:
            clip.error = str(reason)
        if encoder.settings.debug:
            what = f"{facts['duration_sec']:.3f} s, {counted(len(chunks), 'chunk')} {clip.error}"
            say(f"{clip.fname} [{clip.labels}]: {what}")


def encode_dataset(dataset: Dataset, folder: Path, encoder: Encoder) -> None:
    """Encode the clips that have no codes yet. Raises what encode_group raises."""
    clips, settings, started = dataset.clips, encoder.settings, time.monotonic()
    first_rows = {}  # rows of one file share its codes
    for clip in clips:
        if not clip.sha256 and not clip.error:
            first_rows.setdefault(clip.name, clip)
    files = list(first_rows.values())
    if not files:  # no bar that stays at 0 %
        return
    # Few clips are shared evenly: by the two groups at work, or by all processes.
    shares, fewest = (2, 4) if WORLD_SIZE == 1 else (8 * WORLD_SIZE, 1)
    size = max(fewest, min(GROUP_CLIPS, len(files) // shares))
    groups = [files[i : i + size] for i in range(0, len(files), size)]
    # Its own share comes first. Then it helps the others, beginning with the end of the share
    # before its own, so that it meets that owner late.
    first, end = len(groups) * RANK // WORLD_SIZE, len(groups) * (RANK + 1) // WORLD_SIZE
    groups = groups[first:end] + groups[:first][::-1] + groups[end:][::-1]
    bar = show_progress(None, dataset.stem, total=len(clips))
    pool = ThreadPoolExecutor(settings.workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        at_work = {pool.submit(encode_group, group, folder, encoder) for group in groups}
        while at_work:  # Python sees a signal only when the wait ends, if another thread gets it
            done, at_work = wait(at_work, 1, FIRST_EXCEPTION)
            for future in done:
                future.result()
            speed = sum(clip.encoded_s for clip in clips) / (time.monotonic() - started)
            failed = sum(bool(clip.error) for clip in clips)
            bar.set_postfix_str(f"{speed:.0f} s of audio/s, {failed} failed", refresh=False)
            bar.update(failed + sum(bool(clip.sha256) for clip in clips) - bar.n)
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)
    for clip in clips:
        if not clip.sha256 and not clip.error:
            encoded = first_rows[clip.name]
            clip.sha256, clip.error = encoded.sha256, encoded.error


# ------------------------------------------------------------------------------------------ outputs


@dataclass(frozen=True)
class Job:
    """One dataset under the run's settings and weights: where its codes and its outputs go."""

    settings: Settings
    dataset: Dataset
    weights: str  # see load_model
    weights_file: str | None

    def output(self, kind: str, ending: str) -> Path:
        return self.settings.output_dir / f"{kind}_{self.dataset.stem}.{ending}"

    @property
    def csv_path(self) -> Path:
        return self.output("tokenized", "csv")

    @cached_property
    def made_with(self) -> dict[str, object]:
        """Settings that must match before a CSV may be replaced."""
        names = [*DECIDE_CODES, "aggregate"]
        if self.settings.whole:  # then it does not matter how chunks are cut
            names = [name for name in names if name not in CHUNK_SETTINGS]
        found = {name: getattr(self.settings, name) for name in names}
        found["weights"] = self.weights
        for name in ("metadata", "audio_dir"):
            path = getattr(self.settings, name)
            found[name] = str(path.resolve()) if path else None
        return found

    @cached_property
    def codes_dir(self) -> Path:
        """The folder of the kept codes; its name ends in a hash of all that decides codes."""
        settings, decides = self.settings, {"weights": self.weights, "format": KEPT_FORMAT}
        decides |= {name: self.made_with.get(name) for name in DECIDE_CODES}
        digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]
        length = "whole" if settings.whole else f"{settings.target_duration:g}s"
        name = f"{settings.model}_{settings.bandwidth:g}kbps_{length}-{digest}"
        return settings.output_dir / f"codes_{self.dataset.stem}" / name

    def read_record(self) -> dict:
        """Read the JSON of the last run; it counts as empty if there is none, or it is unusable."""
        try:
            record = json.loads(self.output("tokenized", "json").read_text(encoding="utf-8"))
            return record if isinstance(record, dict) else {}
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
            return {}


def refuse_to_lose_rows(job: Job, num_clips: int) -> None:
    """Refuse to replace a CSV that holds other rows than this run's, or more than `num_clips`.

    Raises UserError: it names what differs, and the ways out.
    """
    if job.settings.overwrite or not job.csv_path.exists():
        return
    record = job.read_record()
    changes = []
    try:
        settings, num_before = record["settings"], int(record["total_samples_processed"])
        if job.csv_path.stat().st_size not in record["csv_bytes"]:
            raise ValueError
        if settings["weights"] == UNTRAINED:
            return
        for name, value in job.made_with.items():
            before = settings.get(name)
            if before != value:
                if name == "weights":  # 8 digits of a SHA-256 are enough to tell them apart
                    before, value = before[:8], value if value == UNTRAINED else value[:8]
                changes.append(f"--{name}: {before} -> {value}")
        if num_before > num_clips:
            changes.append(f"{num_before} clips -> {num_clips} clips: rows would be lost")
            failed = [clip for clip in job.dataset.clips if clip.error]
            changes += [f"  {clip.fname}: {clip.error}" for clip in failed[:3]]
    except (KeyError, TypeError, ValueError, AttributeError):
        name = job.output("tokenized", "json").name
        changes = [f"{name} does not describe it: it was edited, or another tool made it"]
    if changes:
        raise UserError(
            "\n  ".join([f"{job.csv_path} is there, and this run would change it:", *changes])
            + "\nMove the CSV elsewhere, replace it with --overwrite, or choose\n"
            "another --output_dir, for which all clips are encoded anew."
        )


# The columns before the tokens. A new one is added here.
COLUMNS: dict[str, Callable[[Clip, Kept, int], object]] = {
    "fname": lambda clip, kept, row: clip.fname,
    "labels": lambda clip, kept, row: clip.labels,
    "num_tokens": lambda clip, kept, row: kept.latent.size,
    "token_shape": lambda clip, kept, row: str(kept.latent.shape),
    "num_chunks": lambda clip, kept, row: len(kept.codes),
    "duration_sec": lambda clip, kept, row: round(kept.duration_sec, 6),
}
CHUNK_COLUMNS: dict[str, Callable[[Clip, Kept, int], object]] = {  # with --aggregate none
    "chunk": lambda clip, kept, row: row,
    "start_sec": lambda clip, kept, row: round(kept.start_sec[row], 6),
}
Row = tuple[dict[str, object], np.ndarray]  # the cells by column, and the codes [K, F]


def rows_of(job: Job) -> Iterator[tuple[Clip, Kept, list[Row]]]:
    """Yield the tokenized clips in the table's order, each with what is kept of it and its rows.

    Raises RunError: what is kept is not of the content that this run has seen.
    """
    columns = COLUMNS | (CHUNK_COLUMNS if job.settings.aggregate == "none" else {})
    clips = [clip for clip in job.dataset.clips if clip.sha256]
    for clip in show_progress(clips, f"{job.dataset.stem}: writing", delay=2):
        kept = read_kept(job.codes_dir, clip.name)
        if kept is None or kept.sha256 != clip.sha256:
            raise RunError(
                f"{kept_path(job.codes_dir, clip.name)} does not hold the codes of {clip.path}: "
                "another run has replaced it, or this disk takes two names for one (Kick.wav, "
                "kick.wav). The same command tries again."
            )
        rows = []
        for row, codes in enumerate(AGGREGATES[job.settings.aggregate](kept)):
            cells = {name: cell(clip, kept, row) for name, cell in columns.items()}
            rows.append((cells | clip.extra, codes))
        yield clip, kept, rows


class ClipFacts(NamedTuple):
    """What the summary and the picture need of each clip."""

    clip: Clip
    duration_sec: float
    num_chunks: int
    silent: bool


class Totals:
    """Counts over all rows of the CSV."""

    def __init__(self) -> None:
        self.clips: list[ClipFacts] = []
        self.shapes: Counter[tuple[int, ...]] = Counter()  # (K, F) of the rows
        self.code_counts = 0  # [K, 1024]: how often the chunks have each code

    def add(self, clip: Clip, kept: Kept, num_rows: int) -> None:
        self.clips.append(ClipFacts(clip, kept.duration_sec, len(kept.codes), kept.silent))
        self.shapes[kept.latent.shape] += num_rows
        books = kept.codes.swapaxes(0, 1)  # [K, N, F]
        counts = [np.bincount(book.ravel(), minlength=NUM_CODES) for book in books]
        self.code_counts += np.array(counts)


def csv_writer(file: io.TextIOBase) -> object:
    r"""Return a csv.writer whose lines end in "\n".

    It gets its default line ending, "\r\n", because csv.writer of Python before 3.11.9 quotes a
    cell with a lone "\r" only then. Readers take an unquoted "\r" for the end of the row.
    """

    def write_line(line: str) -> None:
        file.write(line.removesuffix("\r\n") + "\n")

    return csv.writer(SimpleNamespace(write=write_line))


def write_csv(job: Job, totals: Totals, path: Path) -> None:
    """Write the rows, and fill in the totals. With --whole, all tokens are in one column."""
    whole, has_header = job.settings.whole, False
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv_writer(file)
        for clip, kept, rows in rows_of(job):
            totals.add(clip, kept, len(rows))
            for cells, codes in rows:
                if not has_header:
                    names = ["tokens"] if whole else [f"token_{i}" for i in range(codes.size)]
                    writer.writerow([*cells, *names])
                    has_header = True
                tokens = codes.ravel().tolist()
                if whole:
                    tokens = [" ".join(map(str, tokens))]
                writer.writerow([*cells.values(), *tokens])
        file.flush()
        os.fsync(file.fileno())


def write_failures(job: Job, _: Totals, path: Path) -> None:
    """Write the failed clips and their reasons."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv_writer(file)
        writer.writerow(["fname", "error"])
        for clip in job.dataset.clips:
            if clip.error:
                writer.writerow([clip.fname, clip.error])


def write_parquet(job: Job, _: Totals, path: Path) -> None:
    """Write the rows with their tokens as one list column of uint16, further columns as numbers."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {}
    for name in job.dataset.clips[0].extra:
        kinds[name] = column_type([clip.extra[name] for clip in job.dataset.clips])
    types = {int: pa.int64(), float: pa.float64(), str: pa.string()}
    types[np.ndarray] = pa.list_(pa.uint16())
    lines = parquet_lines(job, kinds)
    first = next(lines)
    schema = []
    for name, cell in first.items():
        kind = kinds.get(name, type(cell))
        schema.append((name, types[kind]))
    schema = pa.schema(schema)
    lines = chain([first], lines)
    with parquet.ParquetWriter(path, schema) as writer:
        while batch := list(islice(lines, 1000)):
            writer.write_table(pa.Table.from_pylist(batch, schema))


def parquet_lines(job: Job, kinds: dict[str, type]) -> Iterator[dict[str, object]]:
    """Yield the rows as Parquet takes them; `kinds` are the types of the further columns."""
    for clip, _, rows in rows_of(job):
        further = {}
        for name, kind in kinds.items():
            cell = clip.extra[name]
            further[name] = kind(cell) if cell or kind is str else None
        for cells, codes in rows:
            yield cells | further | {"tokens": codes.ravel()}


def column_type(cells: list[str]) -> type:
    """Return int or float if all cells of a further column are such numbers (007 is text)."""
    cells = set(cells) - {""}
    decimal = r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][-+]?\d+)?"  # float64 has 15 digits
    for kind, pattern in {int: r"0|-?[1-9]\d{0,17}", float: decimal}.items():
        if cells and all(re.fullmatch(pattern, cell) for cell in cells):
            return kind
    return str


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # it was copied here without its metadata
        return "unknown"


def summarize(job: Job, totals: Totals) -> dict[str, object]:
    """Collect what the JSON and the text summary say."""
    clips, settings = totals.clips, job.settings
    shares = totals.code_counts / totals.code_counts.sum(axis=1, keepdims=True)
    logs = np.log(np.where(shares > 0, shares, 1))
    lengths = sorted(math.prod(shape) for shape in totals.shapes.elements())
    seconds = np.array([clip.duration_sec for clip in clips])
    chunk_s = 0 if settings.whole else settings.target_duration
    padding = np.maximum(0, chunk_s - seconds)
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if settings.device != "cpu":
        machine = torch.cuda.get_device_name(settings.device)
    versions = {"script": __version__, "libsndfile": sf.__libsndfile_version__}
    versions |= {name: package_version(name) for name in PACKAGES if find_spec(name)}
    return {
        "dataset": job.dataset.stem,
        "total_samples_processed": len(clips),
        "failed_clips": sum(bool(clip.error) for clip in job.dataset.clips),
        "rows": len(lengths),
        "average_tokens_per_sample": round(sum(lengths) / len(clips), 1),
        "tokens_per_row": {"least": lengths[0], "median": median(lengths), "most": lengths[-1]},
        "tokens_in_all": sum(lengths),
        "average_duration_sec": round(seconds.mean(), 2),
        "total_duration_sec": round(seconds.sum(), 1),
        "average_chunks_per_clip": round(np.mean([clip.num_chunks for clip in clips]), 2),
        "padded_clips": int((padding > 0).sum()),
        "total_padding_sec": round(float(padding.sum()), 1),
        "silent_clips": [clip.clip.fname for clip in clips if clip.silent],
        "token_shape_distribution": {str(shape): n for shape, n in totals.shapes.most_common()},
        "codes_in_use_are_counted_in": "all chunks, before they become rows",
        "codes_in_use_per_codebook": (totals.code_counts > 0).sum(axis=1).tolist(),
        # This many codes, used equally often, would have the same entropy.
        "perplexity_per_codebook": np.exp(-(shares * logs).sum(axis=1)).round(1).tolist(),
        "codes_folder": job.codes_dir.relative_to(settings.output_dir).as_posix(),
        "settings": job.made_with | {"max_duration": settings.max_duration},
        "weights_file": job.weights_file,
        "device": settings.device,
        "machine": machine,
        "versions": versions,
    }


def write_record(job: Job, totals: Totals, path: Path) -> None:
    """Write the JSON: what made this CSV.

    It knows the size of the old and the new CSV, because a run may be killed between the renames.
    """
    new_csv = path.with_name(job.csv_path.name)  # both have temporary names in the same folder
    sizes = [file.stat().st_size for file in (new_csv, job.csv_path) if file.exists()]
    record = summarize(job, totals) | {"csv_bytes": sizes}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_summary(job: Job, totals: Totals, path: Path) -> None:
    """Write the facts of `summarize` for people, a line each."""
    facts = summarize(job, totals)
    lines = [f"EnCodec tokens of {facts['dataset']}", ""]
    if job.weights == UNTRAINED:
        lines += [f"WARNING: untrained weights. {UNTRAINED_WARNING}", ""]
    for name, fact in facts.items():
        label = name.replace("_sec", "_(s)").replace("_", " ").capitalize()
        if isinstance(fact, dict):
            items = [f"  {key}: {value}" for key, value in fact.items()]
            more = [f"  and {len(items) - 15:,} more"] if len(items) > 15 else []
            lines += [f"{label}:", *items[:15], *more]
        else:
            items = fact if isinstance(fact, list) else [fact]
            lines.append(f"{label}: {', '.join(map(str, items)) or 'none'}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Output(NamedTuple):
    """A file, or a folder, that a run writes."""

    path: Path
    temporary: Path  # where it is written, in a folder of its own beside its place
    write: Callable[[Job, Totals, Path], None]
    needs: str | None = None  # the package of an optional output; it may fail, the others may not
    is_wanted: bool = True  # False: nobody asked for it, but one of an earlier run is there
    is_folder: bool = False


UNFINISHED = ".unfinished-" + "[0-9a-f]" * 32  # the folders of temporary outputs, as a glob pattern


def outputs_of(job: Job, with_failures: bool = True) -> list[Output]:
    """List the outputs in the order in which they are written. A new one is added here.

    The CSV is written first, because the others tell what was counted on the way. They are put in
    place in the reverse order: the JSON first, and the CSV last.
    """
    folder = f".unfinished-{uuid.uuid4().hex}"

    def output(path: Path, *others: object) -> Output:
        return Output(path, path.parent / folder / path.name, *others)

    outputs = [output(job.csv_path, write_csv)]
    parquet, wants_parquet = job.output("tokenized", "parquet"), job.settings.parquet
    if wants_parquet or os.path.isfile(parquet):
        outputs.append(output(parquet, write_parquet, "pyarrow", wants_parquet))
    pictures = {job.output("summary", "png"): False}
    pictures[picture_path(job)] = job.settings.plot is not None
    for picture, is_wanted in pictures.items():
        if is_wanted or os.path.isfile(picture):
            outputs.append(output(picture, write_picture, "matplotlib", is_wanted))
    if with_failures:
        outputs.append(output(job.output("failed", "csv"), write_failures))
    outputs.append(output(job.output("summary", "txt"), write_summary))
    outputs.append(output(job.output("tokenized", "json"), write_record))
    return outputs


def check_outputs(job: Job) -> None:
    """Make sure that all outputs can be written, by creating each. Raises UserError."""
    for output in outputs_of(job):
        if not output.is_wanted:
            continue
        try:
            if output.path.is_dir() and not output.is_folder:
                raise IsADirectoryError(errno.EISDIR, "a folder is in its place", str(output.path))
            output.temporary.parent.mkdir(parents=True, exist_ok=True)
            output.temporary.touch()
        except OSError as error:
            raise UserError(
                f"{output.path} cannot be written: {error}. Change that, or choose another place "
                "with --output_dir (for a picture, with --plot)."
            ) from error
        finally:
            shutil.rmtree(output.temporary.parent, ignore_errors=True)


def write_output(output: Output, job: Job, totals: Totals) -> None:
    """Write an output under its temporary name. Raises OSError, with a path."""
    if not output.is_wanted and not find_spec(output.needs):
        raise ImportError(f"{output.needs} is not installed")
    output.temporary.parent.mkdir(parents=True, exist_ok=True)
    output.write(job, totals, output.temporary)


def put_in_place(output: Output) -> None:
    """Rename an output from its temporary name. An old folder, unlike a file, has to go first."""
    if output.is_folder and output.path.is_dir():
        output.path.rename(output.temporary.with_name("old"))
    output.temporary.replace(output.path)


def succeeds(output: Output, step: Callable[..., None], *others: object) -> bool:
    """Do a step for an output. If that fails, say so if it is optional; raise the error if not."""
    try:
        step(output, *others)
        return True
    except Exception as error:
        if not output.needs:
            if isinstance(error, OSError) and not error.filename:  # as errors of writing are
                raise OSError(error.errno, error.strerror, str(output.path)) from error
            raise
        old = " The file is of an earlier run." if output.path.exists() else ""
        reason = str(error) or type(error).__name__
        say(f"note: {output.path} could not be written: {reason}.{old}")
        return False


def write_outputs(job: Job) -> int:
    """Write every output under a temporary name, and put them in place when all are complete.

    Returns the exit status: 1 if no clip could be tokenized, or an optional output not be written.
    """
    clips = job.dataset.clips
    num_failed = sum(bool(clip.error) for clip in clips)
    if num_failed == len(clips):
        return tell_that_all_failed(job)
    outputs, totals = outputs_of(job, with_failures=num_failed > 0), Totals()
    for folder in {output.path.parent for output in outputs}:
        remove_old(folder, UNFINISHED)
    try:
        written, status = [], 0
        for output in outputs:
            if succeeds(output, write_output, job, totals):
                written.append(output)
            elif output.is_wanted or find_spec(output.needs):
                status = 1
        refuse_to_lose_rows(job, len(totals.clips))  # another run may have finished meanwhile
        for output in reversed(written):
            if not succeeds(output, put_in_place):
                status = 1
        if not num_failed:
            job.output("failed", "csv").unlink(missing_ok=True)
    finally:
        for output in outputs:
            shutil.rmtree(output.temporary.parent, ignore_errors=True)
    tell_what_was_done(job, totals)
    return status


def tell_that_all_failed(job: Job) -> int:
    """Say why no clip could be tokenized; the old outputs stay. Returns the exit status."""
    clips, failed = job.dataset.clips, job.output("failed", "csv")
    more = f"{job.csv_path} stays as it is"
    if not job.csv_path.exists():
        write_failures(job, Totals(), failed)
        more = f"all reasons: {failed}"
    reason = f"{clips[0].fname}: {clips[0].error}"
    say(f"error: none of {counted(len(clips), 'clip')} could be tokenized. {reason}; {more}")
    return 1


def tell_what_was_done(job: Job, totals: Totals) -> None:
    num_done, num_rows = len(totals.clips), totals.shapes.total()
    num_failed = len(job.dataset.clips) - num_done
    num_new = sum(clip.encoded_s > 0 for clip in job.dataset.clips)
    counts = f"{num_new:,} encoded now, {num_done - num_new:,} already there"
    see = f" (see {job.output('failed', 'csv')})" if num_failed else ""
    print(
        f"{job.csv_path}: {counted(num_done, 'clip')} tokenized ({counts}), {num_failed:,} "
        f"failed{see}. Summary: {job.output('summary', 'txt')}",
        flush=True,
    )
    averages = sum(clip.num_chunks > 1 for clip in totals.clips)
    if averages and job.settings.aggregate not in DECODABLE:
        say(
            f"note: {averages:,} of {counted(num_rows, 'row')} are averages of several chunks, "
            "which cannot be decoded; --whole or --aggregate none keep the codes"
        )


def remove_old(folder: Path, pattern: str) -> None:
    """Remove what killed runs have left for a day; younger things may belong to a living one."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ------------------------------------------------------------------------------------- the picture


def picture_path(job: Job) -> Path:
    """Return where --plot puts the picture, by default or under its name, below --output_dir."""
    settings, default = job.settings, job.output("summary", "png")
    if not settings.plot:
        return default
    path = settings.output_dir / settings.plot
    if settings.dataset == "both":
        path = path.with_name(f"{path.stem}_{job.dataset.stem}{path.suffix}")
    return path if path.suffix else path.with_suffix(".png")


def write_picture(job: Job, totals: Totals, path: Path) -> None:
    """Draw durations, chunks and codes in use; below, a short, a median and a long clip.

    The figure is as wide as a page (7.2 in), with text of 8 pt, and PDFs hold TrueType fonts.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [["durations", "chunks", "books"], ["wave 0", "wave 1", "wave 2"]]
    if job.settings.whole:  # each clip is one chunk
        names[0][1] = "durations"
    names.append(["codes 0", "codes 1", "codes 2"])
    with rc_context({"font.size": 8, "axes.titlesize": 8, "pdf.fonttype": 42}):
        figure = Figure(figsize=(7.2, 6.4), layout="constrained")
        title = f"{job.dataset.stem}: {job.codes_dir.name}, {job.weights_file or job.weights}"
        figure.suptitle(title, parse_math=False)
        panels = figure.subplot_mosaic(names, height_ratios=(2, 1, 2))
        draw_totals(job, totals, panels)
        by_duration = sorted(totals.clips, key=lambda clip: clip.duration_sec)
        last = len(by_duration) - 1
        # The shortest and the longest clip of many are often odd ones.
        for column, at in enumerate((int(0.1 * last), last // 2, math.ceil(0.9 * last))):
            draw_clip(
                job, by_duration[at].clip, panels[f"wave {column}"], panels[f"codes {column}"]
            )
        what = "each as a whole" if job.settings.whole else "each with the codes of its first chunk"
        figure.supxlabel(
            f"A short, a median and a long clip, {what}.\n"
            "Grey is zero padding. Colours tell codes apart and have no order.",
            fontsize=8,
        )
        figure.savefig(path, dpi=300)


def draw_totals(job: Job, totals: Totals, panels: dict[str, object]) -> None:
    """Draw durations, chunks, and how many of its codes each codebook uses."""
    seconds = [clip.duration_sec for clip in totals.clips]
    edges = np.geomspace(0.95 * min(seconds), 1.05 * max(seconds), 41)
    draw_histogram(panels["durations"], seconds, edges, "duration of a clip (s)")
    if not job.settings.whole:
        chunks = [clip.num_chunks for clip in totals.clips]
        edges = np.unique(np.geomspace(1, max(chunks) + 1, 41).round()) - 0.5
        draw_histogram(panels["chunks"], chunks, edges, "chunks of a clip")
    facts, books = summarize(job, totals), panels["books"]
    books.plot(facts["codes_in_use_per_codebook"], "o", label="in use")
    books.plot(facts["perplexity_per_codebook"], "o", label="perplexity")
    books.set(xlabel="codebook", ylabel=f"of {NUM_CODES} codes", ylim=(0, None))
    books.legend(frameon=False)


def draw_histogram(panel: object, values: list[float], edges: np.ndarray, label: str) -> None:
    """Draw a histogram over a log axis: one clip of minutes would flatten a linear one."""
    from matplotlib.ticker import LogLocator

    panel.hist(values, bins=edges)
    panel.set(xscale="log", xlabel=label, ylabel="clips")
    subs = (1, 2, 5) if edges[-1] < 300 * edges[0] else (1,)
    panel.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("")


def shorten(text: str, width: int) -> str:
    """Cut a long text at its beginning: the end of a path tells more."""
    return text if len(text) <= width else "\N{HORIZONTAL ELLIPSIS}" + text[1 - width :]


def draw_clip(job: Job, clip: Clip, wave: object, tokens: object) -> None:
    """Draw a clip's first chunk, and below it the codes of that chunk; padding is grey."""
    settings, kept = replace(job.settings, device="cpu"), read_kept(job.codes_dir, clip.name)
    chunk_s = kept.duration_sec if settings.whole else settings.target_duration
    try:
        chunk = split_chunks(load_sound(clip.path, None, settings), settings)[1][0]
        wave.plot(np.linspace(0, chunk_s, chunk.shape[1]), chunk[0], color="black", linewidth=0.4)
    except (BadClip, OSError) as reason:
        say(f"note: the picture shows no waveform of {clip.fname}: {reason}")
    name = f"{shorten(clip.fname, 20)}, {kept.duration_sec:.2f} s"
    title = f"{name}\n{shorten(clip.labels, 30)}"
    wave.set_title(title, parse_math=False)
    wave.set(xlim=(0, chunk_s), ylim=(-1, 1), ylabel="full scale")
    codes = kept.codes[0]  # [K, F]
    extent = (0, chunk_s, len(codes) - 0.5, -0.5)
    look = {"cmap": "nipy_spectral", "vmin": 0, "vmax": NUM_CODES - 1, "interpolation": "nearest"}
    tokens.imshow(codes, aspect="auto", extent=extent, **look)
    tokens.set(xlabel="time (s)", ylabel="codebook")
    for panel in (wave, tokens):
        panel.axvspan(min(kept.duration_sec, chunk_s), chunk_s, color="0.5", alpha=0.4, linewidth=0)


# ---------------------------------------------------------------------------------------------- run


class SafeStream:
    """A stream whose errors do not end the run: a full disk, or a reader that has gone."""

    def __init__(self, stream: io.TextIOBase | None) -> None:
        self.stream = stream or open(os.devnull, "w")  # None if it was closed
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is none
            with suppress(OSError):  # it flushes
                stream.reconfigure(errors="backslashreplace")  # for names that are not UTF-8

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: the stream has been closed
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def run(settings: Settings) -> int:
    """Do all that the command asks for. Returns the exit status."""
    torch.set_num_threads(1)  # for every thread: no sum depends on the number of cores
    settings = resolve_device(settings)
    datasets = find_datasets(settings)
    path = find_weights(settings)
    model, weights = load_model(settings, path)
    jobs = [Job(settings, dataset, weights, path.name if path else None) for dataset in datasets]
    for job in jobs:
        prepare(job)
    if weights == UNTRAINED:
        warning = f"WARNING: UNTRAINED WEIGHTS. {UNTRAINED_WARNING}"
        say("\n".join(["=" * len(warning), warning, "=" * len(warning)]))
    encoder = make_encoder(model, settings)
    clips = [clip for job in jobs for clip in job.dataset.clips]
    try:
        for job in jobs:
            encode_dataset(job.dataset, job.codes_dir, encoder)
    except (Exception, Interrupted):
        done = sum(bool(clip.sha256) for clip in clips)
        say(f"{done:,} of {counted(len(clips), 'clip')} finished; the same command resumes there")
        raise
    if RANK > 0:
        encoded = sum(clip.encoded_s > 0 for clip in clips)
        say(f"process {RANK}: {counted(encoded, 'clip')} encoded. Process 0 writes the outputs.")
        return 0
    status = 0
    for job in jobs:
        try:
            status = max(status, write_outputs(job))
        except UserError as refusal:  # the other dataset is written all the same
            say(f"error: {refusal}")
            status = refusal.status
    return status


def prepare(job: Job) -> None:
    """Find the clips that are finished, and make sure that the others can be. Raises UserError."""
    clips = job.dataset.clips
    num_gone = find_kept(job.dataset, job.codes_dir, job.settings.max_duration)
    num_missing = sum(clip.error.startswith(NO_FILE) for clip in clips)
    if num_missing and not any(clip.stamp for clip in clips):
        first = next(clip for clip in clips if clip.error)  # others may have codes
        raise UserError(
            f"no file of {counted(num_missing, 'clip')} is in {job.dataset.audio_dir}: is the "
            f"folder mounted, and the right one? The first: {first.fname}: {first.error}"
        )
    if num_gone:
        say(f"note: the files of {counted(num_gone, 'clip')} are gone; their codes are still there")
    check_outputs(job)
    refuse_to_lose_rows(job, sum(not clip.error for clip in clips))
    try:
        job.codes_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{job.codes_dir} cannot be used: {error}") from error
    remove_old(job.codes_dir, "*.tmp")


def interrupt(number: int, _: object) -> None:
    """End the run at SIGINT or SIGTERM. Later ones are ignored: torchrun sends a second one."""
    for other in (signal.SIGINT, signal.SIGTERM):
        # Not SIG_IGN: Python reports an error if the other signal has arrived, too.
        signal.signal(other, lambda *_: None)
    raise Interrupted(128 + number)


def main(argv: list[str] | None = None, settings: Settings | None = None) -> int:
    """Run a command line (default: the process's own), or its settings. Returns the exit status.

    0: finished, failed clips are listed. 1: nothing could be tokenized, an optional output could
    not be written, or the run broke. 2: usage, dataset or weights not found, a CSV would lose rows.
    130, 143: interrupted.
    """
    settings = settings or parse_settings(argv)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which macOS reports as leaked
    previous = {}
    with redirect_stdout(SafeStream(sys.stdout)), redirect_stderr(SafeStream(sys.stderr)):
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, interrupt)
            return run_and_report(settings)
        except Interrupted as interrupted:
            say("interrupted")
            return interrupted.args[0]
        finally:
            torch.set_num_threads(THREADS)
            for number, handler in previous.items():
                signal.signal(number, handler)


def run_and_report(settings: Settings) -> int:
    """Run the settings, and print what went wrong in a sentence. Returns the exit status."""
    try:
        return run(settings)
    except (UserError, RunError) as error:
        say(f"error: {error}")
        return error.status
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        if is_out_of_memory(error):
            reason = textwrap.shorten(str(error), 160)
            ways_out = "Lower --batch_size, --workers or --max_duration; the same command resumes."
            say(f"error: out of memory: {reason}. {ways_out}")
        else:
            say(f"error: {type(error).__name__}: {error} (--debug tells more)")
        return 1


def leave(status: int) -> None:
    """End the process at once, after all output.

    PyTorch takes most of a second to tidy up, and threads may encode for longer. With %run the
    process is a notebook's, which has to live on.
    """
    if "IPython" in sys.modules:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # it is None if it was closed
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main(settings=SETTINGS))
