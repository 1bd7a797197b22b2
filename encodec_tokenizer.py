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
stores the codes that EnCodec gave it. Everything else is a view of the dataset's table and these
files. A run encodes the clips that have no such file yet, and then writes all outputs anew. That is
how it resumes, and how several processes share the work without talking to each other.
"""

from __future__ import annotations

import argparse
import codecs
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
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain, groupby, islice, product
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
# How a clip's chunks become its rows [R, K, F]; StoredCodes is what an .npz file holds (see store).
AGGREGATES: dict[str, Callable[[StoredCodes], np.ndarray]] = {
    # The chunks' codes are averaged and rounded, so for several chunks they are not valid codes.
    "mean": lambda stored: np.rint(stored.codes.mean(axis=0, keepdims=True)).astype(np.uint16),
    "latent": lambda stored: stored.mean_latent_codes[None],  # codes of the mean of the latents
    "medoid": lambda stored: stored.codes[[stored.medoid]],  # the chunk nearest to that mean
    "none": lambda stored: stored.codes,  # a row for each chunk
}
DECODABLE = {"latent", "medoid", "none"}  # aggregates that keep real codes, which `decode` accepts
NUM_CODES = 1024  # entries of a codebook
UNTRAINED = "untrained (seed 0)"
UNTRAINED_WARNING = "These tokens are for testing only and have no meaning."
PACKAGES = ("torch", "torchaudio", "encodec", "soundfile", "numpy", "torchcodec")
CODES_FORMAT = 2  # increase it when codes or their files change, so that all clips are encoded anew


def environment_number(name: str, default: int) -> int:
    """Read a number that torchrun sets for its processes; -1 if it is not a number."""
    text = os.environ.get(name) or str(default)
    return int(text) if text.isdecimal() else -1


RANK = environment_number("RANK", 0)
WORLD_SIZE = environment_number("WORLD_SIZE", 1)
LOCAL_RANK = environment_number("LOCAL_RANK", 0)


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
    """Recognize how PyTorch, oneDNN, CUDA and the dynamic linker report too little memory."""
    words = "allocate memory(?! in static)|out of memory|alloc_failed"
    words += "|could not create a primitive|map segment"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error), re.IGNORECASE))


# ------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Settings:
    """The command line: each field is a flag with its help. Raises UserError: a value is wrong."""

    dataset: Annotated[str, "clips to tokenize; sample: twelve bundled ones"] = "curated"
    metadata: Annotated[Path | None, "CSV to read instead of --dataset"] = None
    audio_dir: Annotated[Path | None, "folder of --metadata's files; alone: all files in it"] = None
    fname_column: Annotated[str | None, "name column (default: fname, filename, file_name)"] = None
    label_column: Annotated[str | None, "label column (default: labels, label, category)"] = None
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
    batch_size: Annotated[int | None, "chunks (48 kHz: seconds) a batch (4; on a GPU 32)"] = None
    workers: Annotated[int | None, "groups of clips at work (default: cores / 8, min. 2)"] = None
    # Another limit on a clip's length needs a field here, its range below, and check_duration.
    max_duration: Annotated[float, "maximum length of a clip in seconds; longer ones fail"] = 600.0
    max_samples: Annotated[int | None, "number of clips, from the first (default: all)"] = None
    plot: Annotated[str | None, "picture of the tokens: PNG, PDF or SVG (matplotlib)"] = None
    parquet: Annotated[bool, "Parquet file besides the CSV, tokens in a list (pyarrow)"] = False
    overwrite: Annotated[bool, "replace a CSV made with other settings"] = False
    debug: Annotated[bool, "a line for every clip, and tracebacks"] = False

    def __post_init__(self) -> None:
        for name in describe_settings():
            # `self.name = ` is not allowed, because it is frozen.
            object.__setattr__(self, name, convert_setting(name, getattr(self, name)))
        check_settings(self)


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
CHUNK_SETTINGS = ("target_duration", "overlap", "aggregate")  # not allowed with --whole


@lru_cache
def describe_settings() -> dict[str, tuple[type, str]]:
    """Return the type and the help text of every setting."""
    found = {}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        kind, text = get_args(hint)
        if get_args(kind):
            kind, _ = get_args(kind)  # int and None of `int | None`
        found[name] = kind, text
    return found


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return the end of a message: a question about the most similar word, or nothing."""
    matches = get_close_matches(word, words, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def convert_setting(name: str, value: object) -> object:
    """Return a setting's value in its own type: 6 and 6.0 are one bandwidth. Raises UserError."""
    kind, _ = describe_settings()[name]
    if value is None and getattr(Settings, name) is None:
        return None
    try:
        if isinstance(value, (str, os.PathLike)) and name != "plot" and not os.fspath(value):
            raise UserError(f"--{name} is empty: is a shell variable unset?")
        if kind is Path or name in ("weights", "plot"):  # the shell leaves ~ in --weights=~/x
            value = os.path.expanduser(os.fspath(value))
        if kind is bool and value not in (True, False):  # bool("false") is True
            raise ValueError
        if kind is int and isinstance(value, float) and not value.is_integer():  # int(2.5) is 2
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"--{name}: invalid {kind.__name__} value: {value!r}") from error


def check_settings(settings: Settings) -> None:
    """Raise UserError if a setting is wrong, or two do not go together."""
    for name, choices in CHOICES.items():
        value = getattr(settings, name)
        if value not in choices:
            question = did_you_mean(value, choices)
            raise UserError(f"--{name} {value}: choose from {', '.join(choices)}{question}")
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:  # NaN is in no range
            raise UserError(f"--{name}: {value} is out of range ({low} to {high:,})")
    offered = MODELS[settings.model].bandwidths_kbps
    if settings.bandwidth not in offered:
        kbps = ", ".join(map(str, offered))
        raise UserError(f"--bandwidth {settings.bandwidth:g}: {settings.model} offers {kbps} kbps")
    if settings.metadata and not settings.audio_dir:
        raise UserError("--metadata needs --audio_dir, the folder of its files")
    for name in ("fname_column", "label_column"):
        if getattr(settings, name) and settings.audio_dir and not settings.metadata:
            raise UserError(f"--{name} names a column of a table: give the table with --metadata")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", settings.device):
        raise UserError(f"--device {settings.device}: choose from auto, cpu, cuda, cuda:N")
    for name in CHUNK_SETTINGS:
        if settings.whole and getattr(settings, name) != getattr(Settings, name):
            raise UserError(f"--{name} is not allowed with --whole, which cuts no chunks")
    if settings.plot and Path(settings.plot).suffix not in ("", ".png", ".pdf", ".svg"):
        raise UserError(f"--plot {settings.plot}: the name must end in .png, .pdf or .svg")
    if settings.plot is not None and not find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    if settings.parquet and not find_spec("pyarrow"):
        raise UserError("--parquet needs pyarrow: pip install pyarrow")
    if not 0 <= RANK < WORLD_SIZE:
        given = f"RANK={os.environ.get('RANK')} and WORLD_SIZE={os.environ.get('WORLD_SIZE')}"
        raise UserError(f"{given}: RANK counts from 0 to WORLD_SIZE - 1")


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Read the command line (default: the process's own). A mistake ends in exit status 2."""
    description, _, rest = (__doc__ or "").partition("\n\n")  # python -OO removes docstrings
    examples, _, _ = rest.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # Settings holds the defaults
        allow_abbrev=False,
    )
    # argparse would print the usage before the sentence.
    parser.error = lambda text: parser.exit(2, f"error: {text}\n--help lists all flags.\n")
    parser.add_argument("--version", action="version", version=__version__)
    for name, (kind, text) in describe_settings().items():
        options = {"metavar": kind.__name__.upper()}  # Settings converts and checks the values
        if kind is bool:
            options = {"action": "store_true"}
        elif name == "plot":
            options = {"nargs": "?", "const": "", "metavar": "FILE"}
        elif name in CHOICES:
            options = {"metavar": "{" + ",".join(CHOICES[name]) + "}"}
        if getattr(Settings, name):
            text += f" (default: {getattr(Settings, name)})"
        parser.add_argument(f"--{name}", help=text, **options)
        if "_" in name:  # hyphens are understood, too
            parser.add_argument("--" + name.replace("_", "-"), help=argparse.SUPPRESS, **options)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{name}" for name in describe_settings()]
        question = did_you_mean(unknown[0].partition("=")[0], flags)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{question}")
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
    from encodec.modules import SConv1d
    from encodec.modules.conv import pad1d
    from encodec.modules.seanet import SEANetResnetBlock
    from tqdm import tqdm
except (ImportError, OSError, RuntimeError, MemoryError) as error:
    # torchaudio fails with one of the first three if it is not made for this torch.
    way_out = "Install versions that work together, in an environment of their own, with\n"
    way_out += f"  {sys.executable} -m pip install -r requirements.txt"
    if is_out_of_memory(error):
        way_out = "There is too little memory: raise the limit (ulimit, the job or the container)."
    sys.exit(f"error: a needed package does not load: {error} {error.__cause__ or ''}\n{way_out}")


def say(message: str) -> None:
    """Print to stderr without tearing the progress bar; a closed stderr is no error."""
    with suppress(Exception):
        tqdm.write(message, file=sys.stderr)


def counted(number: int, noun: str) -> str:
    """Return "1 clip" or "2 clips"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# Threads that encode on a CPU: this process's share of the cores that its affinity and its
# container's quota allow. torchrun sets OMP_NUM_THREADS to 1 unless the user has set it.
THREADS = environment_number("OMP_NUM_THREADS", 0)
if THREADS < 1 or (THREADS == 1 and WORLD_SIZE > 1):
    THREADS = os.cpu_count() or 1
    with suppress(AttributeError):  # macOS and Windows have no such function
        THREADS = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # cgroup v2: microseconds of a period, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        THREADS = min(THREADS, math.ceil(int(quota) / int(period)))
    THREADS = max(1, THREADS // max(1, environment_number("LOCAL_WORLD_SIZE", 1)))


def resolve_device(settings: Settings) -> Settings:
    """Set the device to "cpu" or "cuda:N", and fill in the defaults that depend on it."""
    device = find_device(settings.device)
    batch_size = 4
    workers = max(2, THREADS // 8)
    if device != "cpu":
        batch_size = 32
        workers = 8
    elif settings.whole and settings.model == "encodec_24khz":
        batch_size = 1  # the LSTM gains nothing from a batch of clips that differ in length
    batch_size = settings.batch_size or batch_size
    workers = settings.workers or workers
    return replace(settings, device=device, batch_size=batch_size, workers=workers)


def find_device(name: str) -> str:
    """Return the device that --device names: "cpu" or "cuda:N". Raises UserError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    device = name
    if name in ("auto", "cuda"):
        device = f"cuda:{LOCAL_RANK % max(1, torch.cuda.device_count())}"
    # Both must be set before CUDA starts. cuDNN's LSTM is deterministic only with the first one
    # (PyTorch's page on torch.nn.LSTM). The second one limits the number of plans for convolutions,
    # which take 200 KiB of host memory each (Conv_v8.cpp).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    os.environ.setdefault("TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT", "1000")
    try:  # a small convolution, because PyTorch also sees GPUs that it has no kernels for
        F.conv1d(torch.ones(1, 1, 8, device=device), torch.ones(1, 1, 3, device=device)).cpu()
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if name != "auto":
            raise UserError(f"--device {name} cannot be used: {reason}") from error
        say(f"note: this PyTorch cannot use the GPU, so the CPU does the work: {reason}")
        return "cpu"


# ------------------------------------------------------------------------------------------ dataset

USUAL_COLUMNS = {
    "fname_column": ["fname", "filename", "file_name"],
    "label_column": ["labels", "label", "category"],
}
SEPARATORS = ",;\t|"
OTHER_FILES = {  # kinds of files that are mistaken for a CSV, and their first bytes
    "a spreadsheet or a ZIP archive": (b"PK\3\4", b"\xd0\xcf\x11\xe0"),  # .xlsx, .ods; .xls
    "compressed": (b"\x1f\x8b", b"BZh9", b"\xfd7zXZ", b"(\xb5/\xfd"),  # gzip, bzip2, xz, zstd
    "a Parquet or Arrow file": (b"PAR1", b"ARROW1"),
    "in UTF-16": (b"\xff\xfe", b"\xfe\xff"),
    "a JSON file": (b"{", b"["),
    "a web page or an XML file": (b"<",),
}
# Endings of the sound files that libsndfile or FFmpeg reads.
ENDINGS = """.3gp .8svx .aac .ac3 .aif .aifc .aiff .amr .ape .au .avr .bwf .caf .dsf .flac .htk .iff
.ircam .m4a .m4b .mka .mp1 .mp2 .mp3 .mp4 .mpc .mpc2k .mpga .nist .oga .ogg .opus .paf .pvf .rf64
.sd2 .sds .sf .snd .sph .spx .svx .tta .voc .w64 .wav .wave .wavex .weba .webm .wma .wv .wve .xi"""
ENDINGS = frozenset(ENDINGS.split())
# Errnos that mean the clip's own file is bad. All others (no memory, too many open files, an I/O
# error, a stale mount) are the machine's and stop the run.
CLIP_ERRNOS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EEXIST, errno.ENOTEMPTY,
}  # fmt: skip
NO_FILE = "no such file"
# A file's size in bytes, mtime and ctime in nanoseconds, and inode. The mtime is not enough: copies
# may keep it (`rsync -t`, `cp -p`), and Linux gives equal times to files written within 4 ms.
Stamp = list[int]


@dataclass(eq=False, slots=True)
class Clip:
    """A row of the dataset's table. find_file, find_codes and encode_group fill in its progress."""

    fname: str
    labels: str = ""
    extra: dict[str, str] = field(default_factory=dict)  # cells of --metadata's further columns
    name: str = ""  # fname as a normal path below the audio folder; names the stored codes
    file: str = ""  # path of the file that the name means, below the audio folder
    path: Path | None = None  # full path of the file
    folder: int = 0  # inode of the audio folder
    stamp: Stamp | None = None  # None if there is no such file
    error: str = ""  # why the clip cannot be tokenized
    sha256: str = ""  # SHA-256 of the encoded content; empty until encoded
    encoded_s: float = 0.0  # seconds of audio that this process has encoded


@dataclass(frozen=True)
class Dataset:
    stem: str  # the middle of the output files' names
    audio_dir: Path
    clips: list[Clip]  # in the table's order

    @cached_property
    def inode(self) -> int:
        """Inode of the audio folder, which stays the same after a move; 0 if there is none."""
        with suppress(OSError):
            return os.stat(self.audio_dir).st_ino
        return 0

    @cached_property
    def files_by_name(self) -> dict[str, set[str]]:
        """The files of the audio folder by every name that a table may give them."""
        found = defaultdict(set)
        for file in list_files(self.audio_dir):
            names = [file]
            stem, ending = os.path.splitext(file)
            if ending.lower() in ENDINGS:
                names.append(stem)
            for name in names:
                parts = normalized_name(name).split("/")
                for i in range(len(parts)):  # with all of its folders, then with fewer
                    found["/".join(parts[i:])].add(file)
        return found


def find_datasets(settings: Settings) -> list[Dataset]:
    """Find the datasets that the command names, and their clips' files. Raises UserError."""
    if settings.audio_dir and os.path.isfile(settings.audio_dir):
        raise UserError(f"--audio_dir {settings.audio_dir} is a file: name the folder it lies in")
    if settings.metadata:
        clips = read_clips(settings.metadata, settings)
        datasets = [Dataset(settings.metadata.stem, settings.audio_dir, clips)]
    elif settings.audio_dir:
        datasets = [list_folder(settings)]
    elif settings.dataset == "sample":
        if not SAMPLE_DIR.is_dir():
            raise UserError(f"the sample comes with the repository: there is no {SAMPLE_DIR}")
        datasets = [Dataset("sample", SAMPLE_DIR, read_clips(SAMPLE_DIR / "sample.csv", settings))]
    else:
        datasets = [find_dataset(settings, stem) for stem in STEMS[settings.dataset]]
    for dataset in datasets:
        for path in filter(None, (dataset.audio_dir, settings.output_dir, settings.metadata)):
            name = os.path.realpath(path)
            if name != printable(name):  # the outputs hold it as text
                raise UserError(f"{printable(name)}: this name is not UTF-8: rename it")
        for clip in dataset.clips:
            if not clip.error:
                find_file(clip, dataset)
    return datasets


def find_dataset(settings: Settings, stem: str) -> Dataset:
    """Find a dataset's CSV and audio folder in `input_dir` or up to two folders below it."""

    def search(name: str) -> list[Path]:
        paths = []
        for depth in ("", "*/", "*/*/"):
            paths += sorted(settings.input_dir.glob(depth + name))
        return paths

    kaggle_table = f"{stem}.csv"
    if stem == "test":
        kaggle_table = "sample_submission.csv"  # Kaggle lists its test clips there
    layouts = {  # a table -> the names that its audio folder may have
        kaggle_table: [stem, stem.replace("train_", "trn_")],
        f"{stem}_post_competition.csv": [f"FSDKaggle2019.audio_{stem}"],  # Zenodo, record 3612637
    }
    candidates = []
    for table_name, folder_names in layouts.items():
        folders = []
        for name in folder_names:
            folders += filter(Path.is_dir, search(name))
        if not folders:  # no error: clips whose codes are stored do not need it
            folders = [settings.input_dir / folder_names[0]]
        candidates += product(search(table_name), folders)
    if not candidates:
        raise UserError(
            f"the dataset {stem} is not in {settings.input_dir.resolve()} or up to two folders "
            f"below it: there is no {' and no '.join(layouts)}.\n"
            "Get FSDKaggle2019 from https://zenodo.org/record/3612637 or from the Kaggle "
            "competition freesound-audio-tagging-2019,\nand name the folder that holds it with "
            "--input_dir. To try the tool without it: --dataset sample"
        )
    # Every competition of Kaggle has a sample_submission.csv, and some copies nest a folder in one
    # of the same name. So take the table and the folder that belong together.
    table, folder = max(candidates, key=lambda pair: count_clips_there(*pair, settings))
    return Dataset(stem, folder, read_clips(table, settings))


def count_clips_there(table: Path, folder: Path, settings: Settings) -> int:
    """Count how many of a table's first 100 clips are in a folder; -1 if either is unusable."""
    if not folder.is_dir():
        return -1
    try:
        header, rows = read_table(table, settings)
        name_column = find_column(table, header, settings, "fname_column")
    except UserError:
        return -1
    return sum(os.path.exists(folder / row.get(name_column, "")) for row in rows[:100])


def list_folder(settings: Settings) -> Dataset:
    """Take every sound file below --audio_dir, sorted by path, labelled by its own folder."""
    folder = settings.audio_dir.resolve()
    if not folder.is_dir():
        raise UserError(f"--audio_dir {settings.audio_dir}: there is no such folder")
    output_dir = settings.output_dir.resolve()  # it may be below the audio folder
    kinds = ("tokenized_", "summary_", "failed_", "codes_")
    outputs = tuple(str(output_dir / kind) for kind in kinds)
    clips = []
    other_endings = []
    for name in list_files(settings.audio_dir):
        path = folder / name
        if path.suffix.lower() in ENDINGS:
            clip = Clip(printable(name), labels=printable(path.parent.name))
            if clip.fname != name:
                clip.error = "the name is not UTF-8: rename the file or its folder"
            clips.append(clip)
        elif not str(path).startswith(outputs):
            other_endings.append(path.suffix or "no ending")
    if other_endings:
        endings = ", ".join(sorted(set(other_endings))[:20])
        say(f"note: left out {counted(len(other_endings), 'file')} not known as sound: {endings}")
    if not clips:
        raise UserError(f"--audio_dir {settings.audio_dir}: there are no sound files below it")
    return Dataset(folder.name, settings.audio_dir, clips[: settings.max_samples])


def printable(name: str) -> str:
    """Replace the bytes of a file's name that are not UTF-8 by \\xff and the like."""
    return os.fsencode(name).decode(errors="backslashreplace")


def list_files(folder: Path) -> list[str]:
    """List the files below a folder by their relative paths, sorted; hidden files are skipped."""

    def report(error: OSError) -> None:
        if reason_or_raise(error, folder) != NO_FILE:
            say(f"note: the folder {error.filename} is left out: {error.strerror}")

    found = []
    ancestors = {}  # folder -> the devices and inodes of the folders above it, and its own
    for where, folders, names in os.walk(folder, followlinks=True, onerror=report):
        status = os.stat(where)
        identity = (status.st_dev, status.st_ino)
        above = ancestors.get(os.path.dirname(where), [])
        if identity in above:  # a link leads back to a folder above it
            folders.clear()
            continue
        ancestors[where] = [*above, identity]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                path = os.path.relpath(os.path.join(where, name), folder)
                found.append(path.replace(os.sep, "/"))
    return sorted(found, key=lambda path: path.split("/"))


def normalized_name(name: str) -> str:
    """Remove differences of case, Unicode normalization and slashes from a file's name."""
    name = os.path.normpath(name.strip().replace("\\", "/")).replace(os.sep, "/")
    return unicodedata.normalize("NFC", name).casefold()


def find_file(clip: Clip, dataset: Dataset, file: str | None = None) -> None:
    """Set a clip's name, file, path and stamp, or the reason why it has no file.

    `file` is its path below the audio folder. If it is not given, the clip's name decides.
    """
    clip.folder = dataset.inode
    clip.stamp = None
    clip.error = ""
    try:
        clip.name = name_below(dataset.audio_dir, clip.fname)
        clip.file = file or file_of_name(clip.name, dataset)
        clip.path = dataset.audio_dir / clip.file
        clip.stamp = file_stamp(clip.path)
    except BadClip as reason:
        clip.error = str(reason)


def file_of_name(name: str, dataset: Dataset) -> str:
    """Return the file that a name means, or the name itself if none fits. Raises BadClip."""
    try:
        if stat.S_ISREG(os.stat(dataset.audio_dir / name).st_mode):
            return name
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            return name  # its folder may be closed: another file is not meant
    key = normalized_name(name)
    files = sorted(dataset.files_by_name.get(key, [name]))
    full_paths = [file for file in files if file.count("/") == key.count("/")]
    files = full_paths or files  # a file whose whole path fits comes first
    if len(files) > 1:
        raise BadClip(f"several files fit this name: {', '.join(files[:5])}")
    return files[0]


def name_below(folder: Path, fname: str) -> str:
    """Return a clip's name as a normal path below a folder. Raises BadClip: it lies elsewhere."""
    if not fname.strip() or "\0" in fname:
        raise BadClip("the name is empty, or holds a NUL character")
    for root in (os.path.abspath(folder), os.path.realpath(folder)):
        path = os.path.normpath(os.path.join(root, fname))
        if path.startswith(os.path.join(root, "")):
            return os.path.relpath(path, root).replace(os.sep, "/")
    raise BadClip("the path is outside the audio folder (--audio_dir)")


def reason_or_raise(error: OSError, path: Path) -> str:
    """Return what is wrong with a file. Raises OSError, with its path: the machine is at fault."""
    if error.errno not in CLIP_ERRNOS:
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(path))
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NO_FILE
    return f"cannot be opened: {error.strerror}"


def file_stamp(path: Path) -> Stamp:
    """Return a file's stamp. Raises BadClip: it is not a file, or cannot be reached."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise BadClip(reason_or_raise(error, path)) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise BadClip(f"{kind}, not a file")
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def read_lines(csv_path: Path) -> list[str]:
    """Read the lines of a text file in UTF-8. Raises UserError: it is another kind of file."""
    try:
        data = csv_path.read_bytes()
        start = data[:1000].lstrip(codecs.BOM_UTF8 + b"\r\n ")
        for kind, beginnings in OTHER_FILES.items():
            if start.startswith(beginnings):
                raise UserError(f"{csv_path} is {kind}: save it as a CSV file in UTF-8")
        if b"\0" in start[:2]:
            raise UserError(f"{csv_path} is in UTF-16, or not text: save it as a CSV file in UTF-8")
        # Remove byte-order marks: Excel and PowerShell may each add one, before or after "sep=;".
        text = re.sub(r"\A\ufeff*(sep=.\r?\n)?\ufeff*", r"\1", data.decode())
    except UnicodeDecodeError as error:
        where = f"{csv_path}, line {1 + data[: error.start].count(10)}"  # 10 is "\n"
        raise UserError(f"{where}: not UTF-8. Save it as a CSV file in UTF-8") from error
    except OSError as error:
        raise UserError(f"{csv_path}: {error.strerror}") from error
    return list(io.StringIO(text, newline=""))


def find_header(lines: list[str], settings: Settings) -> tuple[int, str]:
    """Return the index of the header's line, and its separator."""
    wanted = set(USUAL_COLUMNS["fname_column"])
    if settings.fname_column:
        wanted = {settings.fname_column.lower()}
    found = None  # the last line with a column of names, which may be a comment
    for index, line in enumerate(lines):
        for separator in SEPARATORS:
            cells = {cell.strip('# "\r\n').lower() for cell in line.split(separator)}
            if cells & wanted:
                found = index, separator
                break
        if line.strip() and not line.startswith(("#", "sep=")):  # Excel writes "sep=;"
            return found or (index, max(SEPARATORS, key=line.count))
    return found or (0, ",")


def parse_rows(lines: list[str], separator: str, **options: object) -> list[tuple[int, list[str]]]:
    """Return the rows of a table, each with the line in which it begins. Raises csv.Error."""
    csv.field_size_limit(2**31 - 1)
    # Remove spaces before a quote, which would make it a part of the cell. csv's skipinitialspace
    # would remove all spaces, but names of files may begin with one.
    spaces = re.compile(re.escape(separator) + ' +"(?!")')
    lines = [spaces.sub(separator + '"', line) for line in lines]
    reader = csv.reader(lines, delimiter=separator, strict=True, **options)
    rows = []
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        reason = str(error).replace("unexpected end of data", "a quote is never closed")
        raise csv.Error(f"line {line}: {reason}") from error
    return rows


def parse_tabs(lines: list[str]) -> list[tuple[int, list[str]]]:
    """Parse a table with tabs. Excel and R quote cells in it; for others a quote is a character."""
    unquoted = parse_rows(lines, "\t", quoting=csv.QUOTE_NONE)
    try:
        quoted = parse_rows(lines, "\t")
    except csv.Error:
        return unquoted
    lengths = {len(cells) for _, cells in unquoted}
    if len(quoted) < len(unquoted) and len(lengths) == 1:  # quotes would join regular rows
        return unquoted
    return quoted


def read_table(csv_path: Path, settings: Settings) -> tuple[list[str], list[dict[str, str]]]:
    """Read a table: the names of its columns, and its rows by column. Raises UserError."""
    lines = read_lines(csv_path)
    index, separator = find_header(lines, settings)
    lines[:index] = ["\n"] * index  # blank lines keep the line numbers in messages right
    try:
        rows = parse_tabs(lines) if separator == "\t" else parse_rows(lines, separator)
    except csv.Error as error:
        raise UserError(f"{csv_path}, {error}") from error
    if len(rows) < 2:
        raise UserError(f"{csv_path} lists no clips: it needs a header and rows")
    _, names = rows.pop(0)
    header = [name.strip() for name in names]
    # R's row names are numbers in a first column that the header does not have.
    is_numbered = all(len(cells) == len(header) + 1 and cells[0].isdecimal() for _, cells in rows)
    if is_numbered and any(cells[-1].strip() for _, cells in rows):
        header.insert(0, "")
    found = []
    for line, cells in rows:
        if any(cell.strip() for cell in cells[len(header) :]):
            raise UserError(
                f"{csv_path}, line {line}: {len(cells)} cells, and {len(header)} in the header. A "
                f"cell with {separator!r} in it needs quotes (R's row names: row.names = FALSE)"
            )
        is_comment = len(cells) == 1 < len(header) and cells[0].startswith("#")
        if not is_comment:
            found.append(dict(zip(header, cells)))
    return header, found


def find_column(csv_path: Path, header: list[str], settings: Settings, flag: str) -> str | None:
    """Return the column that a flag chooses, or one of a usual name. Raises UserError."""
    chosen = getattr(settings, flag)
    wanted = [chosen] if chosen else USUAL_COLUMNS[flag]
    columns = {name.lower().lstrip("# "): name for name in reversed(header)}
    for name in wanted:
        if name in header:
            return name
        if name.lower() in columns:
            return columns[name.lower()]
    if chosen or flag == "fname_column":
        present = ", ".join(header[:20])
        missing = " or ".join(wanted)
        hint = f"--{flag} names the column to use"
        raise UserError(f"{csv_path} has no column {missing}, only {present}. {hint}.")
    return None  # a table needs no labels


def read_clips(csv_path: Path, settings: Settings) -> list[Clip]:
    """Read the clips of a table, with the further columns of --metadata. Raises UserError."""
    header, rows = read_table(csv_path, settings)
    used = [find_column(csv_path, header, settings, flag) for flag in USUAL_COLUMNS]
    name_column, label_column = used
    further = []
    if settings.metadata:
        further = [name for name in header if name and name not in used]
    ambiguous = {name for name in [*used, *further] if header.count(name) > 1}
    for name in further:
        if name in (*COLUMNS, *CHUNK_COLUMNS, "tokens") or re.fullmatch(r"token_\d+", name):
            ambiguous.add(name)
    if ambiguous:
        names = ", ".join(sorted(ambiguous))
        raise UserError(f"{csv_path}: rename the columns {names}: twice there, or the output's own")
    clips = {}  # repeated rows count once
    joined = []  # names of clips whose row has several lines
    for row in rows:
        labels = row.get(label_column, "").strip()
        extra = {name: row.get(name, "").strip() for name in further}
        clip = Clip(row.get(name_column, ""), labels, extra)
        clips.setdefault((clip.fname, labels, *extra.values()), clip)
        if any("\n" in cell for cell in row.values()):
            joined.append(clip.fname)
    if joined:
        what = f"{counted(len(joined), 'row')} of several lines (the first: {joined[0]})"
        say(f"note: {csv_path} has {what}. If that is wrong, a quote is missing or one too many.")
    repeated = len(rows) - len(clips)
    if repeated:
        say(f"note: {csv_path} repeats {counted(repeated, 'row')}; duplicates are ignored")
    return list(clips.values())[: settings.max_samples]


# -------------------------------------------------------------------------------------------- clips

EXACT_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "AIFF", "AU")  # their headers state the length
UNKNOWN_FORMAT = (1, 4, 7)  # libsndfile's errors: format, encoding, a file that is MP3 by name only
RATES = (100, 1_000_000)  # Hz
UNKNOWN_LENGTH = 2**40  # samples; a FLAC stream declares up to 2^48, an MP3 stream 2^63
PIPED = 2**31 - 2**24  # bytes; programs that write to a pipe declare at least as many
LOUDEST = 100.0  # absolute sample value; some recordings exceed 1 a little


class SoundFile(sf.SoundFile):
    """An open sound file. soundfile would seek in a FLAC stream of unknown length, which fails."""

    def seekable(self) -> bool:
        is_stream = self.format == "FLAC" and self.frames >= UNKNOWN_LENGTH
        return super().seekable() and not is_stream


def read_audio(path: Path, channels: int, settings: Settings) -> tuple[torch.Tensor, int, str]:
    """Read a sound file: samples [channels, T], rate in Hz, and SHA-256. Raises BadClip."""
    with path.open("rb") as file:  # raises errors that libsndfile would hide
        head = file.read(4096)
    if not head:
        raise BadClip("empty file (0 bytes)")
    if path.suffix.lower() == ".raw":
        raise BadClip("raw audio without a header has no sample rate: convert it to WAV")
    try:
        name = str(path) if os.name == "nt" else os.fsencode(path)  # it may not be UTF-8
        with SoundFile(name) as audio:
            check_header(audio, settings)
            digest = sha256_of(path)  # before decoding: it raises the disk's I/O errors
            return read_samples(audio, channels, settings), audio.samplerate, digest
    except sf.LibsndfileError as error:
        digest = sha256_of(path)
        check_failure(error, path, head)
        samples, rate = read_with_torchaudio(path, error)
        check_duration(samples.shape[1] / rate, settings)
        return mix_channels(check_samples(samples), channels), rate, digest


def check_duration(duration_s: float, settings: Settings) -> None:
    """Raise BadClip if a clip's length is not allowed. No other function checks a length."""
    limit_s = settings.max_duration
    if duration_s > limit_s:
        raise BadClip(f"too long: {duration_s:.1f} s (limit {limit_s:g} s, see --max_duration)")


def check_header(audio: SoundFile, settings: Settings) -> None:
    """Raise BadClip if an open file is not a sound, or its header is wrong."""
    if audio.format == "RAW":  # the name has an ending for which libsndfile expects no header
        raise BadClip("no header that says how to read the file: it may hold text")
    if audio.format in ("MAT4", "MAT5"):
        raise BadClip("a MATLAB matrix, not a sound file: save sound as WAV")
    if not RATES[0] <= audio.samplerate <= RATES[1]:
        raise BadClip(f"its header is damaged: a sample rate of {audio.samplerate} Hz")
    if audio.frames < UNKNOWN_LENGTH:
        check_duration(audio.frames / audio.samplerate, settings)
    # For a truncated file libsndfile corrects the header, and only its log has both numbers.
    rf64 = r"frame count (\d+) does not match value from 'ds64' chunk of (\d+)"
    for there, declared in re.findall(rf64, audio.extra_info):
        if int(there) < int(declared):
            raise BadClip(f"truncated: {int(there):,} of {int(declared):,} samples are there")
    wav_aiff_au = r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)"
    for declared, there in re.findall(wav_aiff_au, audio.extra_info, re.MULTILINE):
        if int(there) < int(declared) < PIPED:
            sizes = f"{int(there):,} of the {int(declared):,} bytes of audio that it promises"
            raise BadClip(f"truncated, or its header is wrong: {sizes} are there")


def read_samples(audio: SoundFile, channels: int, settings: Settings) -> torch.Tensor:
    """Read as many samples as the header declares, no more: [channels, T]."""
    declared = audio.frames
    if audio.format == "W64" and audio.subtype.startswith(("PCM", "FLOAT", "DOUBLE")):
        # libsndfile takes all that follows in the file for samples, but logs the right size.
        size = re.search(r"(?s)Block Align +: (\d+)\n.*\ndata : (\d+)", audio.extra_info)
        if size:
            declared = min(declared, (int(size[2]) - 24) // int(size[1]))
    if declared >= UNKNOWN_LENGTH:
        declared = int(settings.max_duration * audio.samplerate) + 1  # enough to be too long
    if audio.seekable():
        audio.seek(0)  # as in soundfile.read: without it, Opus does not skip its first samples
    pieces = []
    length = 0
    while length < declared:  # in pieces, so that a wrong header does not reserve memory
        frames = min(2**25 // audio.channels, declared - length)
        # Zeros, because a decoder may leave memory unwritten where a file is damaged.
        piece = audio.read(out=np.zeros((frames, audio.channels), dtype=np.float32))
        if not len(piece):
            break
        pieces.append(mix_channels(check_samples(torch.from_numpy(piece.T)), channels))
        length += len(piece)
    if length == 0:
        raise BadClip("no samples: its header says 0 bytes of audio, or none follow it")
    check_duration(length / audio.samplerate, settings)
    is_exact = audio.format in EXACT_FORMATS and not audio.subtype.startswith("MPEG")
    if is_exact and length < audio.frames < UNKNOWN_LENGTH:
        raise BadClip(f"truncated or damaged: {length:,} of {declared:,} samples could be read")
    return torch.cat(pieces, dim=1)


def check_samples(samples: torch.Tensor) -> torch.Tensor:
    """Return samples [C, T]. Raises BadClip: there are none, or they are not within -1 to 1."""
    if not samples.numel():
        raise BadClip("no samples")
    peak = max(abs(samples.min().item()), abs(samples.max().item()))
    if not math.isfinite(peak):
        raise BadClip("NaN or infinite samples")
    if peak > LOUDEST:
        way_out = "divide them by the full scale (32768 for 16 bits), or save 16-bit PCM"
        raise BadClip(f"samples up to {peak:g}, but audio lies between -1 and 1: {way_out}")
    return samples


def mix_channels(samples: torch.Tensor, channels: int) -> torch.Tensor:
    """Return [C, T] as it is if C is `channels`, else the mean of all: [channels, T]."""
    if samples.shape[0] == channels:
        return samples
    return samples.mean(dim=0, keepdim=True).repeat(channels, 1)


def check_failure(failure: sf.LibsndfileError, path: Path, head: bytes) -> None:
    """Raise the reason why libsndfile failed, unless it only does not know the format."""
    words = failure.error_string.strip()
    if failure.code == 17:  # libsndfile's malloc failed
        raise MemoryError(words)
    if failure.code == 2:  # a system call failed, although the file can be read
        raise OSError(errno.EIO, words, str(path))
    is_utf_16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    has_controls = re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]", head)
    if is_utf_16 or (len(set(head)) > 1 and not has_controls):
        raise BadClip("not audio: the file holds text")
    if re.match(rb"ID3|APETAGEX|TAG", head):
        raise BadClip("no audio behind the file's tag could be decoded")
    if failure.code == 24:  # "SF_INFO struct incomplete"
        raise BadClip("its header is damaged: a sample rate or a number of channels of 0")
    if failure.code not in UNKNOWN_FORMAT:  # FFmpeg would play what is left of a damaged file
        raise BadClip(f"damaged, or not a sound file (libsndfile: {words})")


def read_with_torchaudio(path: Path, failure: sf.LibsndfileError) -> tuple[torch.Tensor, int]:
    """Read a file of a format that libsndfile does not know: samples [C, T], and the rate in Hz."""
    try:
        return torchaudio.load(path)  # needs TorchCodec and FFmpeg
    except Exception as error:  # of any kind, by decoder
        if is_out_of_memory(error) or getattr(error, "errno", None) not in {None, *CLIP_ERRNOS}:
            raise
        words = "it is no MP3." if failure.code == 7 else failure.error_string
        reasons = " ".join(f"soundfile: {words} torchaudio: {error}".split())
        raise BadClip(f"not audio that can be read ({reasons})") from error


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


RESAMPLER_LOCK = threading.Lock()  # so that each resampler is made once, and its note printed once


@lru_cache(maxsize=8)
def make_resampler(rate: int, model_rate: int) -> torchaudio.transforms.Resample:
    """Make torchaudio's resampler, with its defaults, as in EnCodec's convert_audio."""
    # Its kernel has numerator x denominator entries, which take 4 GB for 44,101 Hz. If there would
    # be more than 2^25, the nearest ratio of fewer has to do.
    ratio = Fraction(rate, model_rate)
    largest_denominator = max(1, int(math.sqrt(2**25 / ratio)))
    nearest = ratio.limit_denominator(largest_denominator)
    if nearest != ratio:
        say(f"note: the sample rate {rate} Hz is met to within 0.01 %: an exact filter is too big")
    return torchaudio.transforms.Resample(nearest.numerator, nearest.denominator)


def resample(samples: torch.Tensor, rate: int, settings: Settings) -> torch.Tensor:
    """Resample [C, T] from `rate` in Hz to the model's rate."""
    with RESAMPLER_LOCK:
        resampler = make_resampler(rate, MODELS[settings.model].sample_rate)
    return resampler(samples)


# ------------------------------------------------------------------------------------------- chunks


def split_chunks(audio: torch.Tensor, settings: Settings) -> tuple[list[int], list[torch.Tensor]]:
    """Cut audio [C, T] into chunks [C, chunk]. Returns where they start, in samples, and them."""
    if settings.whole:
        return [0], [audio]
    chunk = round(settings.target_duration * MODELS[settings.model].sample_rate)
    hop = round(chunk * (1 - settings.overlap))
    padding = max(0, chunk - audio.shape[1])
    audio = F.pad(audio, (0, padding))
    last = audio.shape[1] - chunk
    starts = list(range(0, last + 1, hop))
    if starts[-1] < last:  # align one more chunk to the end, so that every sample is in a chunk
        starts.append(last)
    return starts, [audio[:, start : start + chunk] for start in starts]


# ------------------------------------------------------------------------------------------ weights


def find_weights(settings: Settings) -> Path | None:
    """Find the file to load, or download it; None for untrained weights. Raises UserError."""
    if settings.weights == "untrained":
        return None
    path = Path(settings.weights)
    if settings.weights == "pretrained":
        # EncodecModel's own loader caches the file here, too.
        path = Path(torch.hub.get_dir(), "checkpoints", MODELS[settings.model].checkpoint)
        if not path.exists() and not download(path):
            if settings.dataset == "sample" and not settings.audio_dir:
                return None
            raise UserError(
                f"download {ROOT_URL}{path.name} elsewhere and copy it to {path},\n"
                "or name it with --weights FILE. To test a run without it: --weights untrained"
            )
    elif path.is_dir():
        path /= "model.safetensors"
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file (nor is it pretrained or untrained)")
    checkpoints = [spec.checkpoint for spec in MODELS.values()]
    if path.name in checkpoints and not sha256_of(path).startswith(path.stem[-8:]):
        reason = f"its SHA-256 does not begin with {path.stem[-8:]}"
        raise UserError(f"{path} is damaged: {reason}. Delete it, and download it again.")
    return path


def download(path: Path) -> bool:
    """Download one of Meta's checkpoints to `path`. Says why, and returns False, if that fails."""
    url = ROOT_URL + path.name
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a cluster's firewall may swallow the request
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # It writes to a temporary name and renames, so several processes may download at once.
        torch.hub.download_url_to_file(url, str(path), path.stem[-8:], progress=LOCAL_RANK == 0)
        return True
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        say(f"{url} could not be downloaded: {getattr(error, 'reason', error)}")
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


def with_encodec_names(state: dict, model: EncodecModel) -> dict[str, torch.Tensor] | None:
    """Rename the tensors of `state` as EncodecModel does; None if it belongs to another model."""
    renamed = {}
    for name, wanted in model.state_dict().items():
        old = name  # in transformers, by the patterns of its convert_encodec_checkpoint_to_pytorch
        for pattern, theirs in (
            (r"^(encoder|decoder)\.model", r"\1.layers"),
            (r"\.(conv|convtr)\.\1\.", ".conv."),
            (r"\.(conv|convtr)\.norm\.", ".norm."),
            (r"^quantizer\.vq\.layers\.(\d+)\._codebook", r"quantizer.layers.\1.codebook"),
        ):
            old = re.sub(pattern, theirs, old)
        new = re.sub("weight_g$", "parametrizations.weight.original0", old)
        new = re.sub("weight_v$", "parametrizations.weight.original1", new)
        for key in (name, old, new):
            tensor = state.get(key)
            if torch.is_tensor(tensor) and tensor.shape == wanted.shape:
                renamed[name] = tensor
    return renamed if len(renamed) == len(state) == len(model.state_dict()) else None


def load_model(settings: Settings, path: Path | None) -> tuple[EncodecModel, str]:
    """Return the model with the weights of `path` (None: untrained ones), and their SHA-256.

    Raises UserError: the weights are another model's, or unusable.
    """
    if path is None:
        model = untrained_model(settings.model)
        model.set_target_bandwidth(settings.bandwidth)
        return model, UNTRAINED
    model = build_model(settings.model)
    state = read_state(path)
    renamed = with_encodec_names(state, model)
    if renamed is None:
        others = [name for name in MODELS if with_encodec_names(state, build_model(name))]
        hint = "of no EnCodec model"
        if others:
            hint = f"those of {others[0]}: add --model {others[0]}"
        raise UserError(f"the weights in {path} are not {settings.model}'s; they are {hint}")
    model.load_state_dict(renamed)
    model.set_target_bandwidth(settings.bandwidth)
    digest = hashlib.sha256()  # of the tensors that decide codes, whatever the form of the file
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("encoder.") or name.endswith("_codebook.embed"):
            if not tensor.isfinite().all() or (name.endswith(".embed") and not tensor.any()):
                raise UserError(f"the weights in {path} are unusable: {name} has NaN or is all 0")
            digest.update(name.encode() + tensor.numpy().tobytes())
    return model, digest.hexdigest()


@torch.no_grad()
def untrained_model(name: str) -> EncodecModel:
    """Build a model with seeded random weights, to test runs: its tokens have no meaning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(name)
        noise = torch.randn(1, model.channels, 4 * model.sample_rate)
        noise *= torch.linspace(-8, 0, noise.shape[-1]).exp()  # from near silence to full scale
        residual = model.encoder(noise)[0].T  # [F, D]
        for layer in model.quantizer.vq.layers:  # fill the codebooks, which are all zero
            layer.codebook.copy_(residual.mean(0) + residual.std(0) * torch.randn(NUM_CODES, 128))
            residual = residual - layer.codebook[layer.encode(residual.T[None])[0]]
    return model


# -------------------------------------------------------------------------------------------- codes

# The 24 kHz model is causal: a frame depends on 478 samples before it (the left padding of each
# convolution times the strides before it, added up). So a piece of audio that begins two frames
# early can be convolved without the piece before it.
LEAD_FRAMES = 2
PIECE_FRAMES = 75
# The samples [C, T] of a part of a segment, and how many of its first frames are such a lead.
Piece = tuple[torch.Tensor, int]
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def elu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """ELU as max(x, exp(min(x, 0)) - 1).

    torch's own ELU uses an expm1 that is several times slower for minutes at a time on some hosts.
    On Linux with AVX-512, NumPy's expm1 is Intel's SVML, which is faster than torch's exp.
    """
    out = torch.clamp(x, max=0, out=out)
    if AVX512 and sys.platform == "linux" and x.device.type == "cpu":
        np.expm1(out.numpy(), out=out.numpy())
    else:
        out.exp_().sub_(1)
    return torch.maximum(x, out, out=out)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, by oneDNN on CPUs with AVX-512: PyTorch's default, MKL, ignores it on AMD."""
    if AVX512 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@lru_cache
def one_core_pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return this process's pool of encoding threads, one for each core.

    `process` is os.getpid(), because a forked process has none of its parent's threads.
    """
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def batched(items: list, size: int, key: Callable) -> Iterator[list]:
    """Yield consecutive items with the same key, at most `size` at a time."""
    for _, same_key in groupby(items, key):
        while batch := list(islice(same_key, size)):
            yield batch


class Encoder:
    """Turns chunks into the codes that EncodecModel.encode gives.

    A chunk is cut into the segments that EncodecModel encodes at a time, and a segment into pieces,
    which are convolved independently. Then a batch of segments goes through the LSTM, the last
    convolution and the codebooks. The batch always has one shape, with zeros in free places, so
    that codes do not depend on what they are encoded with.

    Subclasses convolve the pieces: `start_convolving` takes the segments [C, T] of a batch, and
    `convolved` turns what that returns into the LSTM's input [F, 512] of each segment. An encoder
    can be pickled; one for a CPU can be used by the forked workers of a DataLoader.
    """

    threads: int
    lstm_frames: int  # frames that go through the LSTM at a time
    fixed_shapes: bool  # also fill up the last of these frames, and quantize a whole batch at once

    def __init__(self, model: EncodecModel, settings: Settings) -> None:
        for module in model.encoder.modules():
            if hasattr(module, "weight_g"):  # fold the norm into the weight once, not every call
                torch.nn.utils.remove_weight_norm(module)
        self.model = model
        self.settings = settings
        self.stopped = False  # True: tasks that are still queued fail at once
        model.encoder.to(settings.device)
        model.quantizer.to(settings.device)
        *convolutions, lstm, _, last_convolution = model.encoder.model
        self.convolutions = torch.nn.Sequential(*convolutions)
        self.lstm = lstm.lstm
        self.last_convolution = last_convolution
        self.causal = last_convolution.causal
        if self.causal:  # pad_start does the padding
            self.last_convolution = last_convolution.conv.conv
        # The causal model does not see zeros behind a segment, so lengths can be mixed.
        self.mixes_lengths = self.causal and self.fixed_shapes
        self.hop = int(model.encoder.hop_length)
        count = model.quantizer.get_num_quantizers_for_bandwidth(model.frame_rate, model.bandwidth)
        self.codebooks = []  # [1024, D] each, with its double and its negative squared norms
        for layer in model.quantizer.vq.layers[:count]:
            book = layer.codebook
            self.codebooks.append((book, 2 * book, -book.pow(2).sum(1)))

    def encode(self, chunks: list[torch.Tensor]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Encode chunks [C, T]; yields the codes [K, F], uint16, and the latents [D, F] of each."""
        segments = []  # the number of the chunk, and the samples
        for number, chunk in enumerate(chunks):
            # The 24 kHz model takes a chunk whole, the 48 kHz model 1 s at a time, overlapping.
            length = self.model.segment_length or chunk.shape[1]
            for start in range(0, chunk.shape[1], self.model.segment_stride or length):
                segments.append((number, chunk[:, start : start + length]))
        segments.sort(key=lambda segment: -segment[1].shape[1])  # those of a chunk stay in order
        size = self.settings.batch_size
        batches = list(batched(segments, size, key=self.batch_key))
        # The pool is first in, first out. A batch goes in after the pieces of the next one (or of
        # several small ones). So it rarely waits for its own pieces, and its LSTM, which is bound
        # by memory, runs beside convolutions, which are bound by the cores.
        pool = one_core_pool(self.threads, os.getpid())
        delay = max(1, 4 // size)
        waiting = deque()
        places = [[] for _ in chunks]  # a batch's Future and a row in it, for each segment
        for step in range(len(batches) + delay):
            if step < len(batches):
                audio = [segment for _, segment in batches[step]]
                waiting.append(self.start_convolving(pool, audio))
            if step >= delay:
                oldest = waiting.popleft()
                future = pool.submit(self.task, self.quantize_batch, oldest)
                for row, (number, _) in enumerate(batches[step - delay]):
                    places[number].append((future, row))
        for places_of_chunk in places:
            results = [future.result()[row] for future, row in places_of_chunk]
            codes, latents = zip(*results)
            yield np.concatenate(codes, axis=1), torch.cat(latents, dim=1)

    def batch_key(self, segment: tuple[int, torch.Tensor]) -> int:
        """Return the key that the segments of a batch share: 0, or their length if it matters."""
        return 0 if self.mixes_lengths else segment[1].shape[1]

    def task(self, function: Callable, argument: object) -> object:
        """Call a function in the pool."""
        if self.stopped:
            raise RunError("the encoder was stopped")
        with torch.inference_mode():
            return function(argument)

    def cut_segment(self, segment: torch.Tensor) -> list[Piece]:
        """Cut a segment [C, T] into pieces. A last, incomplete frame is a piece of its own.

        The 48 kHz model looks ahead and normalizes over time, so its segments are not cut. Nor are
        segments of less than three frames: the reflection that pads their start reaches their end.
        """
        complete, rest = divmod(segment.shape[1], self.hop)
        if not self.causal or complete < 3:
            return [(segment, 0)]
        pieces = []
        for first in range(0, complete, PIECE_FRAMES):
            lead = LEAD_FRAMES if first else 0
            end = min(first + PIECE_FRAMES, complete)
            pieces.append((segment[:, (first - lead) * self.hop : end * self.hop], lead))
        if rest:
            pieces.append((segment[:, (complete - LEAD_FRAMES) * self.hop :], LEAD_FRAMES))
        return pieces

    def normalized(self, segment: torch.Tensor) -> torch.Tensor:
        """Divide a segment [C, T] by its loudness, if the model does (see EncodecModel)."""
        if not self.model.normalize:
            return segment
        return segment / (1e-8 + segment.mean(dim=0).pow(2).mean().sqrt())

    def quantize_batch(self, started: list) -> list[tuple[np.ndarray, torch.Tensor]]:
        """Return the codes [K, F] and the latents [D, F] of each segment of a batch."""
        segments = self.convolved(started)
        lengths = list(map(len, segments))  # the first is the longest
        state = None
        context = None
        codes = []
        latents = []
        for at in range(0, lengths[0], self.lstm_frames):
            num_frames = min(lengths[0] - at, self.lstm_frames)
            if self.mixes_lengths:
                num_frames = self.lstm_frames
            x = torch.zeros(num_frames, self.settings.batch_size, 512, device=self.settings.device)
            for row, segment in enumerate(segments):
                part = segment[at : at + self.lstm_frames]
                x[: len(part), row] = part
            y, state = self.lstm(x, state)
            y = elu(y.add_(x)).permute(1, 2, 0)  # [B, 512, F]
            if self.causal:
                y, context = self.pad_start(y, lengths, context)
            if self.fixed_shapes:
                y = self.last_convolution(y)
            else:  # oneDNN's rounding depends on the number of rows
                rows = y[: len(segments)]
                y = torch.cat([self.last_convolution(row[None]) for row in rows])
            codes.append(self.quantize(y))
            latents.append(y.cpu())
        codes = np.concatenate(codes, axis=2)
        latents = torch.cat(latents, dim=2)
        rows = enumerate(lengths)
        return [(codes[row, :, :length], latents[row, :, :length]) for row, length in rows]

    def pad_start(
        self, x: torch.Tensor, lengths: list[int], context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the context before the causal last convolution's input [B, 512, F].

        Returns that, and its end, which is the next context. The first context (None) is a
        reflection, as in EncodecModel's pad1d, which puts zeros behind a segment that is too short
        for it.
        """
        width = self.last_convolution.kernel_size[0] - 1
        if context is None:
            for row, length in zip(x, lengths):
                row[:, length:] = 0
            context = F.pad(x[:, :, : width + 1], (0, width))[:, :, 1 : width + 1].flip(2)
        x = torch.cat([context, x], dim=2)
        return x, x[:, :, -width:]

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
        codes = torch.cat(parts, dim=1).view(len(self.codebooks), len(latents), -1)  # [K, B, F]
        return codes.transpose(0, 1).cpu().numpy().astype(np.uint16)


class FastConv:
    """EnCodec's SConv1d, and the ELU before it where there is one, on one piece as [T, C].

    It computes the same sums in a layout for CPUs: with a frame's channels side by side, a kernel
    of 1 is a matrix product, and a kernel of twice the stride (all strided convolutions of EnCodec)
    is two, over a view of the input. The ELU writes into the padded input.
    """

    def __init__(self, module: SConv1d, after_elu: bool) -> None:
        conv = module.conv.conv
        self.after_elu = after_elu
        self.kernel = conv.kernel_size[0]
        self.stride = conv.stride[0]
        self.weight = conv.weight.detach()  # [C', C, kernel]
        self.bias = conv.bias.detach()  # [C']
        self.norm = module.conv.norm  # GroupNorm of one group, or Identity
        if self.kernel == 1:
            self.weight = self.weight[:, :, 0].contiguous()  # [C', C]
        elif self.kernel == 2 * self.stride:
            halves = self.weight.transpose(1, 2).reshape(len(self.bias), 2, -1)
            self.weight = halves.transpose(0, 1).contiguous()  # [2, C', stride * C]
        else:
            self.weight = self.weight[:, :, None].contiguous(memory_format=torch.channels_last)
        # SConv1d pads a causal model on the left only. Otherwise the odd sample goes to the left.
        total = self.kernel - self.stride
        self.right = 0 if module.causal else total // 2
        self.left = total - self.right

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the ELU to [T, C], and reflect both ends, to whole strides."""
        length = len(x)
        left = self.left
        right = self.right + -length % self.stride
        if length <= max(left, right):  # too short: EnCodec appends zeros first
            if self.after_elu:
                x = elu(x)
            return pad1d(x.T[None], (left, right), "reflect")[0].T.contiguous()
        padded = x.new_empty(left + length + right, x.shape[1])
        body = padded[left : left + length]
        if self.after_elu:
            elu(x, out=body)
        else:
            body.copy_(x)
        padded[:left] = body[1 : left + 1].flip(0)
        padded[left + length :] = body[length - 1 - right : length - 1].flip(0)
        return padded

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [ceil(T / stride), C']"""
        if self.kernel == 1:
            if self.after_elu:
                x = elu(x)
            y = linear(x, self.weight, self.bias)
        elif self.kernel == 2 * self.stride:
            strides = self.pad(x).view(-1, self.stride * x.shape[1])
            y = linear(strides[:-1], self.weight[0], self.bias)
            y += linear(strides[1:], self.weight[1])
        else:
            y = F.conv2d(self.pad(x).T[None, :, None], self.weight, self.bias)[0, :, 0].T
        if not isinstance(self.norm, torch.nn.GroupNorm):
            return y
        mean = y.mean()
        flat = y.reshape(-1)
        variance = (flat.dot(flat) / len(flat) - mean * mean).clamp(min=0)
        scale = self.norm.weight * torch.rsqrt(variance + self.norm.eps)
        return torch.addcmul(self.norm.bias - mean * scale, y, scale, out=y)


def residual_block(
    shortcut: FastConv, wide: FastConv, narrow: FastConv, x: torch.Tensor
) -> torch.Tensor:
    return shortcut(x).add_(narrow(wide(x)))


class CpuEncoder(Encoder):
    """Convolves each piece on its own core: its activations fit the cache, a batch's do not."""

    threads = THREADS
    lstm_frames = 1500  # more take more memory, and are no faster
    fixed_shapes = False

    def __init__(self, model: EncodecModel, settings: Settings) -> None:
        super().__init__(model, settings)
        self.layers: list[Callable[[torch.Tensor], torch.Tensor]] = []
        after_elu = False
        for module in self.convolutions:
            if isinstance(module, SConv1d):
                self.layers.append(FastConv(module, after_elu))
            elif isinstance(module, SEANetResnetBlock):
                shortcut = FastConv(module.shortcut, after_elu=False)
                wide = FastConv(module.block[1], after_elu=True)
                narrow = FastConv(module.block[3], after_elu=True)
                self.layers.append(partial(residual_block, shortcut, wide, narrow))
            after_elu = isinstance(module, torch.nn.ELU)

    def start_convolving(self, pool: ThreadPoolExecutor, segments: list[torch.Tensor]) -> list:
        started = []
        for segment in segments:
            pieces = self.cut_segment(segment)
            started.append([pool.submit(self.task, self.convolve, piece) for piece in pieces])
        return started

    def convolve(self, piece: Piece) -> torch.Tensor:
        samples, lead = piece
        x = self.normalized(samples).T.contiguous()  # [T, C]
        for layer in self.layers:
            x = layer(x)
        return x[lead:]

    def convolved(self, started: list[list[Future]]) -> list[torch.Tensor]:
        segments = []
        for futures in started:
            segments.append(torch.cat([future.result() for future in futures]))
        return segments


class GpuEncoder(Encoder):
    """Convolves pieces side by side by EnCodec's own modules, in one thread.

    cuDNN plans each new shape anew, which takes time and memory. So batches, pieces and what goes
    through the LSTM are filled up with zeros to one shape. Only the pieces of incomplete frames (at
    most 320 lengths; clips of less than 0.04 s have 640 more) and, at 48 kHz, the last segment of a
    clip have a length of their own.
    """

    threads = 1
    lstm_frames = 2 * PIECE_FRAMES
    fixed_shapes = True
    pieces_at_once = 16

    def __init__(self, model: EncodecModel, settings: Settings) -> None:
        # For the whole process: exact sums, and the same ones each time.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        super().__init__(model, settings)

    def start_convolving(self, pool: ThreadPoolExecutor, segments: list[torch.Tensor]) -> list:
        return segments  # `convolved` does all the work

    def filled_length(self, piece: tuple[int, torch.Tensor, int]) -> int:
        """Return the number of samples that a piece is filled up to."""
        length = piece[1].shape[1]
        has_whole_frames = length % self.hop == 0 and length >= 3 * self.hop
        if self.causal and has_whole_frames:
            return (LEAD_FRAMES + PIECE_FRAMES) * self.hop
        return length

    def convolved(self, started: list[torch.Tensor]) -> list[torch.Tensor]:
        pieces = []  # the number of the segment, the samples, and the lead
        for row, segment in enumerate(started):
            for samples, lead in self.cut_segment(segment):
                pieces.append((row, samples, lead))
        # The longest come first, and so the pieces of a segment stay in order.
        pieces.sort(key=self.filled_length, reverse=True)
        parts = defaultdict(list)
        for group in batched(pieces, self.pieces_at_once, key=self.filled_length):
            channels = len(group[0][1])
            x = torch.zeros(self.pieces_at_once, channels, self.filled_length(group[0]))
            for place, (_, samples, _) in enumerate(group):
                x[place, :, : samples.shape[1]] = self.normalized(samples)
            y = self.convolutions(x.to(self.settings.device)).transpose(1, 2)  # [B, F, 512]
            for place, (row, samples, lead) in enumerate(group):
                end = math.ceil(samples.shape[1] / self.hop)
                parts[row].append(y[place, lead:end])
        return [torch.cat(parts[row]) for row in sorted(parts)]


def make_encoder(model: EncodecModel, settings: Settings) -> Encoder:
    """Return the encoder for the device of settings from resolve_device."""
    if settings.device == "cpu":
        return CpuEncoder(model, settings)
    return GpuEncoder(model, settings)


def load_encoder(settings: Settings) -> Encoder:
    """Find, load and set up the weights, for `tokenize` and `decode`. Raises UserError.

    For a GPU, it turns TF32 off and cuDNN's deterministic algorithms on, for the whole process.
    """
    settings = resolve_device(settings)
    model, weights = load_model(settings, find_weights(settings))
    if weights == UNTRAINED:
        warnings.warn(f"untrained weights. {UNTRAINED_WARNING}", stacklevel=2)
    return make_encoder(model, settings)


def tokenize(sound: object, encoder: Encoder, rate: object = None) -> object:
    """Tokenize a sound, or several sounds together.

    A sound is the path of a file, or an array or tensor of samples between -1 and 1, [T] or [C, T],
    at the sample rate `rate` in Hz. Several are a list, tuple, generator, Series or array of these.

    Returns codes [N, K, F], int64 within 0..1023: N chunks (1 with Settings(whole=True)), K
    codebooks, F frames; 75 frames are a second at 24 kHz. Several sounds give a list.

    Raises BadClip: a file is missing, damaged, or no audio, or samples are not between -1 and 1.
    ValueError: an argument is no sound, or the shape or the rate of samples is wrong. OSError: the
    machine is at fault. The message says which of several sounds it is. To skip bad files instead,
    call tokenize for one file at a time and catch BadClip.
    """
    sounds = several_sounds(sound)
    if sounds is None:
        return tokenize([sound], encoder, rate)[0]
    chunks = []  # a list for each sound
    for number, one in enumerate(sounds):
        try:
            audio = load_sound(one, rate, encoder.settings)
        except (BadClip, ValueError) as error:
            name = one if isinstance(one, (str, os.PathLike)) else f"sound {number}"
            kind = BadClip if isinstance(error, BadClip) else ValueError
            raise kind(f"{name}: {error}") from error
        _, chunks_of_one = split_chunks(audio, encoder.settings)
        chunks.append(chunks_of_one)
    encoded = encoder.encode(list(chain.from_iterable(chunks)))
    found = []
    for chunks_of_one in chunks:
        codes, _ = zip(*islice(encoded, len(chunks_of_one)))
        found.append(np.stack(codes).astype(np.int64))
    return found


def decode(codes: np.ndarray, encoder: Encoder) -> tuple[np.ndarray, int]:
    """Decode codes [N, K, F], as from tokenize, to samples [N, C, T] and their sample rate in Hz.

    Each chunk is decoded on its own, to whole frames of 320 samples. The chunks of a long clip are
    not joined: they overlap, and the codes do not say where the last one starts. To hear a clip in
    one piece, use the codes of Settings(whole=True). The first few codebooks, codes[:, :k], are
    enough for a coarser sound. A table's row is [K, F]: pass codes[None].

    The 48 kHz model divides each segment of 1 s by its loudness, which the codes do not hold. So
    all segments come out equally loud, with samples beyond -1 to 1: scale them before saving.

    Raises ValueError: the codes are not of this model.
    """
    model = encoder.model
    codes = np.asarray(codes)
    most = model.quantizer.n_q
    if codes.ndim != 3 or not codes.size or codes.shape[1] > most:
        shape = f"[chunks, codebooks, frames] with at most {most} codebooks"
        raise ValueError(f"codes of shape {codes.shape} are not {shape}")
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= NUM_CODES:
        raise ValueError(f"codes must be integers from 0 to {NUM_CODES - 1}")
    device = encoder.settings.device
    model.decoder.to(device)  # the encoder and the codebooks are there already
    samples = []
    with torch.inference_mode():
        for chunk in torch.from_numpy(codes.astype(np.int64)).to(device):
            segments = [(part[None], None) for part in split_segments(chunk, model)]
            samples.append(model.decode(segments)[0].cpu().numpy())
    return np.stack(samples), model.sample_rate


def split_segments(codes: torch.Tensor, model: EncodecModel) -> list[torch.Tensor]:
    """Split the codes [K, F] of a chunk into those of its segments in EncodecModel.encode."""
    if model.segment_length is None:  # 24 kHz: one segment
        return [codes]
    *segments, last = codes.split(150, dim=1)  # the frames of a segment of 1 s
    if last.shape[1] == 150:
        # The last segment is always shorter: these are one of 149 frames and a last one of 1.
        return [*segments, last[:, :-1], last[:, -1:]]
    if last.shape[1] == 1 and segments:
        # EnCodec's overlap-add fails on this one, which the segment before covers.
        return segments
    return [*segments, last]


def several_sounds(sound: object) -> list | None:
    """Return several sounds as a list; None for a single sound."""
    if hasattr(sound, "to_numpy"):  # a Series
        sound = sound.to_numpy()
    if isinstance(sound, np.ndarray) and sound.ndim == 1 and sound.dtype.kind in "OUT":
        return sound.tolist()  # texts or objects
    is_file = isinstance(sound, io.IOBase)  # an iterator of lines
    if isinstance(sound, (list, tuple, Iterator)) and not is_file:
        return list(sound)
    return None


def load_sound(sound: object, rate: object, settings: Settings) -> torch.Tensor:
    """Read or check a sound, and resample it: [C, T]. See tokenize for arguments and errors."""
    channels = MODELS[settings.model].channels
    if isinstance(sound, (str, os.PathLike)):
        path = Path(os.path.expanduser(os.fsdecode(sound)))
        file_stamp(path)
        samples, rate, _ = read_audio(path, channels, settings)
        return resample(samples, rate, settings)
    if not hasattr(sound, "__array__"):  # NumPy, PyTorch, pandas and others have it
        kind = type(sound).__name__
        article = "an" if kind[0] in "aeiouAEIOU" else "a"
        name = "None" if sound is None else f"{article} {kind}"
        raise ValueError(
            f"{name} is no sound: give a path, or samples as a NumPy array or a tensor"
        )
    samples = convert_samples(sound)
    rate_hz = check_rate(rate)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and len(samples) > samples.shape[1]):
        raise ValueError(f"samples of shape {tuple(samples.shape)} are neither [T] nor [C, T]")
    samples = torch.atleast_2d(samples)
    check_duration(samples.shape[1] / rate_hz, settings)
    return resample(mix_channels(check_samples(samples), channels), rate_hz, settings)


def check_rate(rate: object) -> int:
    """Return a sample rate in Hz, given as a number or as an array of one. Raises ValueError."""
    low, high = RATES
    with suppress(TypeError, ValueError, RuntimeError):  # a text, or an array of several
        number = rate.item() if hasattr(rate, "item") else rate
        if low <= number <= high and number % 1 == 0:
            return int(number)
    raise ValueError(f"rate={rate!r}: samples need their sample rate in Hz, {low} to {high:,}")


def convert_samples(samples: object) -> torch.Tensor:
    """Return an array or a tensor as a tensor in float32. Raises BadClip: it holds no floats."""
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu()
        if samples.is_floating_point():
            samples = samples.float()  # NumPy has no bfloat16
    samples = np.asarray(samples)
    if samples.dtype.kind != "f":
        raise BadClip(f"{samples.dtype} samples: give floats, integers divided by their full scale")
    # A plain copy, for PyTorch takes no long doubles, swapped bytes or negative strides.
    return torch.from_numpy(samples.astype(np.float32))


# -------------------------------------------------------------------------------------------- store

GROUP_CLIPS = 16  # clips that are loaded and encoded together, at most
GROUP_SECONDS = 120  # seconds of audio that a group holds at a time, but at least one clip


@dataclass(frozen=True, kw_only=True)
class StoredCodes:
    """The codes and facts of a clip: an .npz of arrays, with the facts as JSON in its comment.

    Give a new field a default: without one, all clips are encoded anew.
    """

    file: str  # path below the audio folder
    folder: int  # inode of the audio folder
    stamp: Stamp  # of the file
    sha256: str  # of the file
    duration_sec: float  # of the file, before padding or resampling
    silent: bool  # all samples are zero
    num_chunks: int
    made_with: str  # the hash at the end of the folder's name
    arrays: Mapping[str, np.ndarray] | None = field(default=None, compare=False)

    # Each array is parsed when it is first used, which takes 0.1 ms.
    codes = cached_property(lambda self: self.arrays["codes"])  # of the chunks: [N, K, F], uint16
    # The codes of the mean of the chunks' latents: [K, F], uint16.
    mean_latent_codes = cached_property(lambda self: self.arrays["mean_latent_codes"])
    # The chunk whose latents are nearest to that mean (Euclidean).
    medoid = cached_property(lambda self: int(self.arrays["medoid"]))
    start_sec = cached_property(lambda self: self.arrays["start_sec"].tolist())  # of the chunks


FACTS = [field.name for field in fields(StoredCodes) if field.name != "arrays"]


def codes_path(folder: Path, name: str) -> Path:
    """Return the path of a clip's codes, whether they are there or not."""
    above, _, last = name.rpartition("/")
    if len(os.fsencode(last)) > 240:
        last = hashlib.sha256(os.fsencode(last)).hexdigest()
    return folder / above / f"{last}.npz"


def read_codes(folder: Path, name: str, with_arrays: bool = True) -> StoredCodes | None:
    """Read the codes and facts of a clip. Returns None if they are missing or damaged."""
    path = codes_path(folder, name)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason_or_raise(error, path)  # an error of the machine is raised
        return None
    if data[-8:] != b"%08x" % zlib.crc32(memoryview(data)[:-8]):
        return None
    try:
        # The comment follows the zip's last record, of 22 bytes. JSON cannot contain its signature.
        comment = data[data.rindex(b"PK\5\6") + 22 : -8]
        stored = StoredCodes(**json.loads(comment))
    except (TypeError, ValueError):  # TypeError: another version has written other fields
        return None
    if stored.made_with != folder.name.rpartition("-")[2]:
        return None
    if with_arrays:
        stored = replace(stored, arrays=np.load(io.BytesIO(data)))
    return stored


def write_codes(folder: Path, name: str, stored: StoredCodes) -> None:
    """Write the codes and facts of a clip, atomically.

    Raises BadClip: the file system does not take the clip's name. OSError, with the path: any other
    fault.
    """
    file = io.BytesIO()  # np.savez seeks back, and some disks can only append
    np.savez_compressed(file, **stored.arrays)
    facts = {name: getattr(stored, name) for name in FACTS}
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = json.dumps(facts).encode() + bytes(8)
    data = file.getvalue()[:-8]
    data += b"%08x" % zlib.crc32(data)  # the comment ends in the CRC of all before it
    path = codes_path(folder, name)
    temporary = folder / f"{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(data)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
        except OSError as error:
            if error.errno not in CLIP_ERRNOS - {errno.EACCES, errno.EPERM}:
                raise
            raise BadClip(f"its codes cannot be stored under its name: {error.strerror}") from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def may_use(stored: StoredCodes, clip: Clip, settings: Settings, compare: bool) -> bool:
    """Tell whether the codes that are stored under a clip's name can be used for its file.

    They can if the file is gone, or its stamp is unchanged. With `compare` they can also if its
    content is unchanged, as after a copy.
    Raises BadClip: the clip is too long, or its file cannot be read.
    """
    usable = clip.error.startswith(NO_FILE) or clip.stamp == stored.stamp
    if not usable and compare:
        try:
            usable = sha256_of(clip.path) == stored.sha256
        except OSError as error:
            raise BadClip(reason_or_raise(error, clip.path)) from error
    if usable:
        check_duration(stored.duration_sec, settings)
    return usable


def find_codes(dataset: Dataset, folder: Path, settings: Settings) -> int:
    """Find the clips whose codes are stored; returns how many of their files are gone."""
    num_gone = 0
    for clip in show_progress(dataset.clips, f"{dataset.stem}: looking for codes", delay=2):
        stored = read_codes(folder, clip.name, with_arrays=False)
        if stored is None:
            continue
        # The file that was encoded is preferred to another one that the clip's name fits, unless
        # that has exactly this name. It may be gone, but not from another folder.
        is_exact = clip.stamp and clip.file == clip.name
        is_guess = stored.file != clip.file and not is_exact
        encoded = dataset.audio_dir / stored.file
        if is_guess and (stored.folder == clip.folder or os.path.isfile(encoded)):
            find_file(clip, dataset, stored.file)
        try:
            if may_use(stored, clip, settings, compare=False):
                clip.sha256 = stored.sha256
                clip.error = ""
                if not clip.stamp:
                    num_gone += 1
        except BadClip as reason:
            clip.error = str(reason)
    return num_gone


def show_progress(clips: list[Clip], what: str, delay: float = 0) -> tqdm:
    """Return a bar over clips: it moves on a terminal, and writes a line a minute to a log file."""
    interval = 0.1 if sys.stderr.isatty() else 60
    options = {"unit": "clip", "position": LOCAL_RANK, "mininterval": interval, "miniters": 0}
    return tqdm(clips, desc=what, delay=delay, **options)


def look_again(clip: Clip, folder: Path, settings: Settings) -> StoredCodes | None:
    """Look again for a clip's codes, and compare contents. For errors see may_use.

    Another process may have written codes since find_codes. Codes of another content are removed.
    """
    stored = read_codes(folder, clip.name)
    while stored and not may_use(stored, clip, settings, compare=True):
        compared = stored
        stored = read_codes(folder, clip.name)
        if stored == compared:  # else another process has just replaced them
            check_unchanged(clip)
            codes_path(folder, clip.name).unlink(missing_ok=True)
            return None
    if stored and stored.stamp != clip.stamp:
        with suppress(OSError, BadClip):  # the new stamp only saves the next run this comparison
            check_unchanged(clip)
            now = replace(stored, file=clip.file, folder=clip.folder, stamp=clip.stamp)
            write_codes(folder, clip.name, now)
    return stored


def check_unchanged(clip: Clip) -> None:
    """Raise BadClip if a clip's file has changed since the run found it."""
    if file_stamp(clip.path)[:3] != clip.stamp[:3]:  # without inodes, which some disks change
        raise BadClip("the file changed while it was read; the next run tries it again")


def load_clip(
    clip: Clip, folder: Path, settings: Settings
) -> tuple[StoredCodes, list[torch.Tensor]]:
    """Read a clip's file. Returns the facts to store, without codes, and its chunks [C, T].

    Raises BadClip: the clip is at fault. OSError, with its path: the machine is at fault.
    """
    model = MODELS[settings.model]
    try:
        samples, rate, digest = read_audio(clip.path, model.channels, settings)
    except OSError as error:
        raise BadClip(reason_or_raise(error, clip.path)) from error
    check_unchanged(clip)
    starts, chunks = split_chunks(resample(samples, rate, settings), settings)
    stored = StoredCodes(
        file=clip.file,
        folder=clip.folder,
        stamp=clip.stamp,
        sha256=digest,
        duration_sec=samples.shape[1] / rate,
        silent=not samples.any(),
        num_chunks=len(chunks),
        made_with=folder.name.rpartition("-")[2],
        arrays={"start_sec": np.array(starts) / model.sample_rate},
    )
    return stored, chunks


def encode_group(group: list[Clip], folder: Path, encoder: Encoder) -> None:
    """Load, encode and store some clips: sets `sha256` or `error` of each.

    Raises RunError: a file is gone. OSError: the machine is at fault.
    """
    settings = encoder.settings
    loaded = []
    seconds = 0.0
    for clip in group:
        if encoder.stopped:
            return
        if settings.debug:
            say(f"{clip.fname}: loading")
        try:
            stored = look_again(clip, folder, settings)
            if stored:
                clip.sha256 = stored.sha256
                continue
            stored, chunks = load_clip(clip, folder, settings)
        except BadClip as reason:
            clip.error = str(reason)
            if clip.error == NO_FILE:
                raise RunError(
                    f"{clip.path} was there when the run began, and is gone now. Is its folder "
                    "still mounted? The same command resumes."
                ) from reason
            if settings.debug:
                say(f"{clip.fname} [{clip.labels}]: FAILED: {reason}")
            continue
        if loaded and seconds + stored.duration_sec > GROUP_SECONDS:
            encode_clips(loaded, folder, encoder)
            loaded = []
            seconds = 0.0
        loaded.append((clip, stored, chunks))
        seconds += stored.duration_sec
    encode_clips(loaded, folder, encoder)


def encode_clips(
    loaded: list[tuple[Clip, StoredCodes, list[torch.Tensor]]], folder: Path, encoder: Encoder
) -> None:
    """Encode clips of load_clip together, and store their codes. For errors see write_codes."""
    all_chunks = []
    for _, _, chunks in loaded:
        all_chunks += chunks
    encoded = encoder.encode(all_chunks)
    for clip, stored, chunks in loaded:
        codes, latents = zip(*islice(encoded, len(chunks)))
        arrays = {"codes": np.stack(codes), "mean_latent_codes": codes[0], "medoid": 0}
        if len(chunks) > 1:
            latents = torch.stack(latents)  # [N, D, F]
            mean = latents.mean(dim=0, keepdim=True)
            arrays["mean_latent_codes"] = encoder.quantize(mean)[0]
            arrays["medoid"] = int((latents - mean).pow(2).sum(dim=(1, 2)).argmin())
        try:
            write_codes(folder, clip.name, replace(stored, arrays=stored.arrays | arrays))
            clip.sha256 = stored.sha256
            clip.encoded_s = stored.duration_sec
        except BadClip as reason:
            clip.error = str(reason)
        if encoder.settings.debug:
            what = f"{stored.duration_sec:.3f} s, {counted(len(chunks), 'chunk')} {clip.error}"
            say(f"{clip.fname} [{clip.labels}]: {what}")


def make_groups(clips: list[Clip], workers: int) -> list[list[Clip]]:
    """Cut clips into groups, in the order in which this process takes them."""
    size = max(4, min(GROUP_CLIPS, len(clips) // workers))  # few clips are shared evenly
    if WORLD_SIZE > 1:
        size = max(1, min(GROUP_CLIPS, len(clips) // (8 * WORLD_SIZE)))
    groups = [clips[i : i + size] for i in range(0, len(clips), size)]
    first = len(groups) * RANK // WORLD_SIZE
    end = len(groups) * (RANK + 1) // WORLD_SIZE
    # Its own share comes first. Then it helps the others, from the end of the share before its own,
    # because the process of that share starts at the beginning.
    return groups[first:end] + groups[:first][::-1] + groups[end:][::-1]


def encode_dataset(dataset: Dataset, folder: Path, encoder: Encoder) -> None:
    """Encode the clips that have no codes yet. No group is at work any more when it ends."""
    missing = [clip for clip in dataset.clips if not clip.sha256 and not clip.error]
    first_rows = {}  # rows of one name share its codes
    for clip in missing:
        first_rows.setdefault(clip.name, clip)
    if not missing:
        return
    workers = encoder.settings.workers
    groups = make_groups(list(first_rows.values()), workers)
    started = time.monotonic()
    bar = show_progress(dataset.clips, dataset.stem)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        at_work = {pool.submit(encode_group, group, folder, encoder) for group in groups}
        while at_work:
            # A second at most: a signal may reach another thread, and is handled in this one.
            done, at_work = wait(at_work, 1, FIRST_EXCEPTION)
            for future in done:
                future.result()
            update_progress(bar, dataset.clips, started)
    except BaseException:
        encoder.stopped = True
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        update_progress(bar, dataset.clips, started)
        bar.close()
    for clip in missing:
        encoded = first_rows[clip.name]
        clip.sha256 = encoded.sha256
        clip.error = encoded.error


def update_progress(bar: tqdm, clips: list[Clip], started: float) -> None:
    """Show how many clips are finished, and how fast audio has been encoded since `started`."""
    speed = sum(clip.encoded_s for clip in clips) / (time.monotonic() - started)
    failed = sum(bool(clip.error) for clip in clips)
    bar.set_postfix_str(f"{speed:.0f} s of audio/s, {failed} failed", refresh=False)
    bar.n = failed + sum(bool(clip.sha256) for clip in clips)
    bar.update(0)


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
        found = {}
        for name in (*DECIDE_CODES, "aggregate"):
            # Whole clips are not cut into chunks.
            if not self.settings.whole or name not in CHUNK_SETTINGS:
                found[name] = getattr(self.settings, name)
        found["weights"] = self.weights
        for name in ("metadata", "audio_dir"):
            path = getattr(self.settings, name)
            found[name] = str(path.resolve()) if path else None
        return found

    @cached_property
    def codes_dir(self) -> Path:
        """The folder of the stored codes. Its name ends in a hash of all that decides them."""
        settings = self.settings
        decides = {"weights": self.weights, "format": CODES_FORMAT}
        for name in DECIDE_CODES:
            decides[name] = self.made_with.get(name)
        digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]
        length = "whole" if settings.whole else f"{settings.target_duration:g}s"
        name = f"{settings.model}_{settings.bandwidth:g}kbps_{length}-{digest}"
        return settings.output_dir / f"codes_{self.dataset.stem}" / name


def refuse_to_lose_rows(job: Job, num_clips: int) -> None:
    """Raise UserError if this run would change the rows of a CSV, or leave only `num_clips`."""
    if job.settings.overwrite or not job.csv_path.exists():
        return
    changes = describe_changes(job, num_clips)
    if changes:
        raise UserError(
            "\n  ".join([f"{job.csv_path} is there, and this run would change it:", *changes])
            + "\nMove the CSV elsewhere, replace it with --overwrite, or choose\n"
            "another --output_dir, for which all clips are encoded anew."
        )


def describe_changes(job: Job, num_clips: int) -> list[str]:
    """Say how this run differs from the one that wrote the CSV; empty if rows may be replaced."""
    path = job.output("tokenized", "json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        settings = record["settings"]
        is_untrained = settings["weights"] == UNTRAINED
        num_before = int(record["total_samples_processed"])
        is_described = job.csv_path.stat().st_size in record["csv_bytes"]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        is_described = False
    if not is_described:
        return [f"{path.name} does not describe it: it was edited, or another tool made it"]
    if is_untrained:
        return []
    changes = []
    for name, value in job.made_with.items():
        before = settings.get(name)
        if before == value:
            continue
        if name == "weights":  # 8 digits of a SHA-256 are enough to tell them apart
            before = str(before)[:8]
            value = value if value == UNTRAINED else value[:8]
        changes.append(f"--{name}: {before} -> {value}")
    if num_before > num_clips:
        changes.append(f"{num_before} clips -> {num_clips} clips: rows would be lost")
        failed = [clip for clip in job.dataset.clips if clip.error]
        for clip in failed[:3]:
            changes.append(f"  {clip.fname}: {clip.error}")
    return changes


# The columns before the tokens. A new one is added here.
COLUMNS: dict[str, Callable[[Clip, StoredCodes, int], object]] = {
    "fname": lambda clip, stored, row: clip.fname,
    "labels": lambda clip, stored, row: clip.labels,
    "num_tokens": lambda clip, stored, row: stored.codes[0].size,
    "token_shape": lambda clip, stored, row: str(stored.codes.shape[1:]),
    "num_chunks": lambda clip, stored, row: stored.num_chunks,
    "duration_sec": lambda clip, stored, row: round(stored.duration_sec, 6),
}
CHUNK_COLUMNS: dict[str, Callable[[Clip, StoredCodes, int], object]] = {  # with --aggregate none
    "chunk": lambda clip, stored, row: row,
    "start_sec": lambda clip, stored, row: round(stored.start_sec[row], 6),
}
Row = tuple[dict[str, object], np.ndarray]  # the cells by column, and the codes [K, F]


def rows_of(job: Job) -> Iterator[tuple[Clip, StoredCodes, list[Row]]]:
    """Yield the tokenized clips in the table's order, each with its stored codes and its rows.

    Raises RunError: the codes are not those of the content that this run has seen.
    """
    columns = COLUMNS
    if job.settings.aggregate == "none":
        columns = COLUMNS | CHUNK_COLUMNS
    clips = [clip for clip in job.dataset.clips if clip.sha256]
    for clip in show_progress(clips, f"{job.dataset.stem}: writing", delay=2):
        stored = read_codes(job.codes_dir, clip.name)
        if stored is None or stored.sha256 != clip.sha256:
            raise RunError(
                f"{codes_path(job.codes_dir, clip.name)} does not hold the codes of {clip.path}: "
                "another run has replaced it, or this disk takes two names for one (Kick.wav, "
                "kick.wav). The same command tries again."
            )
        rows = []
        for row, codes in enumerate(AGGREGATES[job.settings.aggregate](stored)):
            cells = {name: cell(clip, stored, row) for name, cell in columns.items()}
            rows.append((cells | clip.extra, codes))
        yield clip, stored, rows


class Totals:
    """Counts over all rows of the CSV."""

    def __init__(self) -> None:
        self.clips: list[Clip] = []
        self.stored: list[StoredCodes] = []  # of these clips, without arrays
        self.shapes: Counter[tuple[int, ...]] = Counter()  # (K, F) of the rows
        self.code_counts = 0  # [K, 1024]: how often the chunks have each code

    def add(self, clip: Clip, stored: StoredCodes, num_rows: int) -> None:
        self.clips.append(clip)
        self.stored.append(replace(stored, arrays=None))
        self.shapes[stored.codes.shape[1:]] += num_rows
        books = stored.codes.swapaxes(0, 1)  # [K, N, F]
        counts = [np.bincount(book.ravel(), minlength=NUM_CODES) for book in books]
        self.code_counts += np.array(counts)


@contextmanager
def csv_writer(path: Path) -> Iterator[object]:
    r"""Open a CSV file on the disk for writing; gives a csv.writer whose lines end in "\n".

    The writer has its default line ending, "\r\n", because csv.writer of Python before 3.11.9
    quotes a cell with a lone "\r" only then. Readers take an unquoted "\r" for the end of the row.
    """
    with path.open("w", newline="", encoding="utf-8") as file:

        def write_line(line: str) -> None:
            file.write(line.removesuffix("\r\n") + "\n")

        yield csv.writer(SimpleNamespace(write=write_line))
        file.flush()
        os.fsync(file.fileno())


def write_csv(job: Job, totals: Totals, path: Path) -> None:
    """Write the rows, and count them in `totals`. With --whole, all tokens are in one column."""
    whole = job.settings.whole
    with csv_writer(path) as writer:
        for clip, stored, rows in rows_of(job):
            if not totals.clips:  # the first one: the header comes before it
                cells, codes = rows[0]
                names = ["tokens"] if whole else [f"token_{i}" for i in range(codes.size)]
                writer.writerow([*cells, *names])
            totals.add(clip, stored, len(rows))
            for cells, codes in rows:
                tokens = codes.ravel().tolist()
                if whole:
                    tokens = [" ".join(map(str, tokens))]
                writer.writerow([*cells.values(), *tokens])


def write_failures(job: Job, _: Totals, path: Path) -> None:
    """Write the failed clips and their reasons."""
    with csv_writer(path) as writer:
        writer.writerow(["fname", "error"])
        for clip in job.dataset.clips:
            if clip.error:
                writer.writerow([clip.fname, clip.error])


def write_parquet(job: Job, _: Totals, path: Path) -> None:
    """Write the rows with their tokens as one list column of uint16, further columns as numbers."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {}  # further column -> type of its cells
    for name in job.dataset.clips[0].extra:
        kinds[name] = column_type([clip.extra[name] for clip in job.dataset.clips])
    types = {int: pa.int64(), float: pa.float64(), str: pa.string()}
    types[np.ndarray] = pa.list_(pa.uint16())
    lines = parquet_lines(job, kinds)
    batch = list(islice(lines, 1000))
    columns = []
    for name, cell in batch[0].items():
        kind = kinds.get(name, type(cell))
        columns.append((name, types[kind]))
    schema = pa.schema(columns)
    with parquet.ParquetWriter(path, schema) as writer:
        while batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))
            batch = list(islice(lines, 1000))


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
    filled = set(cells) - {""}
    decimal = r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][-+]?\d\d?)?"  # float64 has 15 digits
    for kind, pattern in {int: r"0|-?[1-9]\d{0,17}", float: decimal}.items():
        if filled and all(re.fullmatch(pattern, cell) for cell in filled):
            return kind
    return str


def machine_name(device: str) -> str:
    if device == "cpu":
        return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device)


def package_versions() -> dict[str, str]:
    found = {"script": __version__, "libsndfile": sf.__libsndfile_version__}
    for name in PACKAGES:
        if find_spec(name):
            try:
                found[name] = version(name)
            except PackageNotFoundError:  # it was copied here without its metadata
                found[name] = "unknown"
    return found


def summarize(job: Job, totals: Totals) -> dict[str, object]:
    """Collect what the JSON and the text summary say."""
    settings = job.settings
    num_clips = len(totals.clips)
    silent = [clip.fname for clip, stored in zip(totals.clips, totals.stored) if stored.silent]
    shares = totals.code_counts / totals.code_counts.sum(axis=1, keepdims=True)
    logs = np.log(np.where(shares > 0, shares, 1))
    lengths = sorted(math.prod(shape) for shape in totals.shapes.elements())
    seconds = np.array([stored.duration_sec for stored in totals.stored])
    num_chunks = [stored.num_chunks for stored in totals.stored]
    chunk_s = 0 if settings.whole else settings.target_duration
    padding = np.maximum(0, chunk_s - seconds)
    return {
        "dataset": job.dataset.stem,
        "total_samples_processed": num_clips,
        "failed_clips": len(job.dataset.clips) - num_clips,
        "rows": len(lengths),
        "average_tokens_per_sample": round(sum(lengths) / num_clips, 1),
        "tokens_per_row": {"least": lengths[0], "median": median(lengths), "most": lengths[-1]},
        "tokens_in_all": sum(lengths),
        "average_duration_sec": round(seconds.mean(), 2),
        "total_duration_sec": round(seconds.sum(), 1),
        "average_chunks_per_clip": round(np.mean(num_chunks), 2),
        "padded_clips": int((padding > 0).sum()),
        "total_padding_sec": round(float(padding.sum()), 1),
        "silent_clips": silent,
        "token_shape_distribution": {str(shape): n for shape, n in totals.shapes.most_common()},
        "codes_in_use_are_counted_in": "all chunks, before they become rows",
        "codes_in_use_per_codebook": (totals.code_counts > 0).sum(axis=1).tolist(),
        # This many codes, used equally often, would have the same entropy.
        "perplexity_per_codebook": np.exp(-(shares * logs).sum(axis=1)).round(1).tolist(),
        "codes_folder": job.codes_dir.relative_to(settings.output_dir).as_posix(),
        "settings": job.made_with | {"max_duration": settings.max_duration},
        "weights_file": job.weights_file,
        "device": settings.device,
        "machine": machine_name(settings.device),
        "versions": package_versions(),
    }


def write_record(job: Job, totals: Totals, path: Path) -> None:
    """Write the JSON: what made this CSV."""
    # It holds the sizes of the old and the new CSV: a run may be killed between the renames.
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
            lines += [f"{label}:", *items[:15]]
            if len(items) > 15:
                lines.append(f"  and {len(items) - 15:,} more")
        else:
            items = fact if isinstance(fact, list) else [fact]
            lines.append(f"{label}: {', '.join(map(str, items)) or 'none'}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Output(NamedTuple):
    """A file, or a folder, that a run writes."""

    path: Path
    temporary: Path  # where it is written first, in a new folder beside its place
    write: Callable[[Job, Totals, Path], None]
    needs: str | None = None  # the package of an optional output; if that fails, it is only noted
    is_wanted: bool = True  # False: no flag asks for it, but one of an earlier run is there
    is_folder: bool = False


def outputs_of(job: Job, with_failures: bool = True) -> list[Output]:
    """List the outputs in the order in which they are written. A new one is added here.

    The CSV is written first, because the others tell what was counted on the way, and the optional
    ones last: they take no other's space. All are put in place in the reverse order, the CSV last.
    """
    settings = job.settings
    picture = picture_path(job)
    usual_picture = job.output("summary", "png")
    wants_usual_picture = settings.plot is not None and picture == usual_picture
    folder = f".unfinished-{uuid.uuid4().hex}"

    def output(path: Path, *others: object) -> Output:
        return Output(path, path.parent / folder / path.name, *others)

    outputs = [output(job.csv_path, write_csv)]
    if with_failures:
        outputs.append(output(job.output("failed", "csv"), write_failures))
    outputs += [
        output(job.output("summary", "txt"), write_summary),
        output(job.output("tokenized", "json"), write_record),
        output(job.output("tokenized", "parquet"), write_parquet, "pyarrow", settings.parquet),
        output(usual_picture, write_picture, "matplotlib", wants_usual_picture),
    ]
    if picture != usual_picture:
        outputs.append(output(picture, write_picture, "matplotlib"))
    return [output for output in outputs if output.is_wanted or os.path.isfile(output.path)]


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


def report_failure(output: Output, error: Exception) -> None:
    """Print why an optional output could not be written. Raises the error of any other output."""
    if not output.needs:
        if isinstance(error, OSError) and not error.filename:  # as errors of writing are
            raise OSError(error.errno, error.strerror, str(output.path)) from error
        raise error
    old = " The file is of an earlier run." if output.path.exists() else ""
    reason = str(error) or type(error).__name__
    say(f"note: {output.path} could not be written: {reason}.{old}")


def write_outputs(job: Job) -> int:
    """Write all outputs, and then rename them. Returns 1 if an optional one failed, otherwise 0."""
    num_failed = sum(bool(clip.error) for clip in job.dataset.clips)
    outputs = outputs_of(job, with_failures=num_failed > 0)
    totals = Totals()
    written = []
    status = 0
    for folder in {output.path.parent for output in outputs}:
        remove_old(folder, ".unfinished-" + "[0-9a-f]" * 32)
    try:
        for output in outputs:
            if not output.is_wanted and not find_spec(output.needs):
                report_failure(output, ImportError(f"{output.needs} is not installed"))
                continue
            try:
                output.temporary.parent.mkdir(parents=True, exist_ok=True)
                output.write(job, totals, output.temporary)
                written.append(output)
            except Exception as error:
                report_failure(output, error)
                status = 1
        refuse_to_lose_rows(job, len(totals.clips))  # another run may have finished meanwhile
        for output in reversed(written):
            try:
                put_in_place(output)
            except Exception as error:
                report_failure(output, error)
                status = 1
        if not num_failed:
            job.output("failed", "csv").unlink(missing_ok=True)
    finally:
        for output in outputs:
            shutil.rmtree(output.temporary.parent, ignore_errors=True)
    tell_what_was_done(job, totals)
    return status


def put_in_place(output: Output) -> None:
    """Rename an output from its temporary name. An old folder, unlike a file, has to go first."""
    if output.is_folder and output.path.is_dir():
        output.path.rename(output.temporary.with_name("old"))
    output.temporary.replace(output.path)


def tell_that_all_failed(job: Job) -> None:
    """Say why no clip could be tokenized. The old outputs stay."""
    clips = job.dataset.clips
    more = f"{job.csv_path} stays as it is"
    if not job.csv_path.exists():
        failed = job.output("failed", "csv")
        write_failures(job, Totals(), failed)
        more = f"all reasons: {failed}"
    reason = f"{clips[0].fname}: {clips[0].error}"
    say(f"error: none of {counted(len(clips), 'clip')} could be tokenized. {reason}; {more}")


def tell_what_was_done(job: Job, totals: Totals) -> None:
    num_done = len(totals.clips)
    num_failed = len(job.dataset.clips) - num_done
    encoded = {clip.name for clip in job.dataset.clips if clip.encoded_s}
    num_new = sum(clip.name in encoded for clip in job.dataset.clips)  # rows may share a name
    counts = f"{num_new:,} encoded now, {num_done - num_new:,} already there"
    see = f" (see {job.output('failed', 'csv')})" if num_failed else ""
    print(
        f"{job.csv_path}: {counted(num_done, 'clip')} tokenized ({counts}), {num_failed:,} "
        f"failed{see}. Summary: {job.output('summary', 'txt')}",
        flush=True,
    )
    averages = sum(stored.num_chunks > 1 for stored in totals.stored)
    if averages and job.settings.aggregate not in DECODABLE:
        say(
            f"note: {averages:,} of {counted(num_done, 'row')} are averages of several chunks, "
            "which cannot be decoded; --whole or --aggregate none keep the codes"
        )


def remove_old(folder: Path, pattern: str, remove: Callable[[Path], None] = shutil.rmtree) -> None:
    """Remove what killed runs left more than a day ago. Newer things may belong to a running one.

    `pattern` is a glob. `remove` fails on things of another kind: rmtree on files, for example.
    """
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400:
                remove(path)


# ------------------------------------------------------------------------------------- the picture


def picture_path(job: Job) -> Path:
    """Return where --plot puts the picture, by default or under its name, below --output_dir."""
    settings = job.settings
    if not settings.plot:
        return job.output("summary", "png")
    path = settings.output_dir / settings.plot
    if settings.dataset == "both":
        path = path.with_name(f"{path.stem}_{job.dataset.stem}{path.suffix}")
    if not path.suffix:
        path = path.with_suffix(".png")
    return path


def write_picture(job: Job, totals: Totals, path: Path) -> None:
    """Draw durations, chunks and codes in use; below, a short, a median and a long clip."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    top = ["durations", "chunks", "books"]
    if job.settings.whole:  # each clip is one chunk: the panel of durations is twice as wide
        top = ["durations", "durations", "books"]
    mosaic = [top, ["wave 0", "wave 1", "wave 2"], ["codes 0", "codes 1", "codes 2"]]
    with rc_context({"font.size": 8, "axes.titlesize": 8, "pdf.fonttype": 42}):  # 42: TrueType
        figure = Figure(figsize=(7.2, 6.4), layout="constrained")  # inches: a page's width
        title = f"{job.dataset.stem}: {job.codes_dir.name}, {job.weights_file or job.weights}"
        figure.suptitle(title, parse_math=False)
        panels = figure.subplot_mosaic(mosaic, height_ratios=(2, 1, 2))
        draw_totals(job, totals, panels)
        pairs = zip(totals.clips, totals.stored)
        by_duration = sorted(pairs, key=lambda pair: pair[1].duration_sec)
        last = len(by_duration) - 1
        # The shortest and the longest clip of many are often odd ones.
        for column, at in enumerate((int(0.1 * last), last // 2, math.ceil(0.9 * last))):
            clip, _ = by_duration[at]
            draw_clip(job, clip, panels[f"wave {column}"], panels[f"codes {column}"])
        what = "each as a whole" if job.settings.whole else "each with the codes of its first chunk"
        figure.supxlabel(
            f"A short, a median and a long clip, {what}.\n"
            "Grey is zero padding. Colours tell codes apart and have no order.",
            fontsize=8,
        )
        figure.savefig(path, dpi=300)


def draw_totals(job: Job, totals: Totals, panels: dict[str, object]) -> None:
    """Draw durations, chunks, and how many of its codes each codebook uses."""
    seconds = [stored.duration_sec for stored in totals.stored]
    edges = np.geomspace(0.95 * min(seconds), 1.05 * max(seconds), 41)
    draw_histogram(panels["durations"], seconds, edges, "duration of a clip (s)")
    if not job.settings.whole:
        chunks = [stored.num_chunks for stored in totals.stored]
        edges = np.unique(np.geomspace(1, max(chunks) + 1, 41).round()) - 0.5
        draw_histogram(panels["chunks"], chunks, edges, "chunks of a clip")
    facts = summarize(job, totals)
    books = panels["books"]
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
    if len(text) <= width:
        return text
    return "\N{HORIZONTAL ELLIPSIS}" + text[1 - width :]


def draw_clip(job: Job, clip: Clip, wave_panel: object, codes_panel: object) -> None:
    """Draw a clip's first chunk, and below it the codes of that chunk; padding is grey."""
    settings = job.settings
    stored = read_codes(job.codes_dir, clip.name)
    chunk_s = stored.duration_sec if settings.whole else settings.target_duration
    try:
        _, chunks = split_chunks(load_sound(clip.path, None, settings), settings)
        samples = chunks[0][0]
        seconds = np.linspace(0, chunk_s, len(samples))
        wave_panel.plot(seconds, samples, color="black", linewidth=0.4)
    except (BadClip, OSError) as reason:
        say(f"note: the picture shows no waveform of {clip.fname}: {reason}")
    name = f"{shorten(clip.fname, 20)}, {stored.duration_sec:.2f} s"
    wave_panel.set_title(f"{name}\n{shorten(clip.labels, 30)}", parse_math=False)
    wave_panel.set(xlim=(0, chunk_s), ylim=(-1, 1), ylabel="full scale")
    codes = stored.codes[0]  # [K, F]
    extent = (0, chunk_s, len(codes) - 0.5, -0.5)
    look = {"cmap": "nipy_spectral", "vmin": 0, "vmax": NUM_CODES - 1, "interpolation": "nearest"}
    codes_panel.imshow(codes, aspect="auto", extent=extent, **look)
    codes_panel.set(xlabel="time (s)", ylabel="codebook")
    padding = (min(stored.duration_sec, chunk_s), chunk_s)
    for panel in (wave_panel, codes_panel):
        panel.axvspan(*padding, color="0.5", alpha=0.4, linewidth=0)


# ---------------------------------------------------------------------------------------------- run


class SafeStream:
    """A stream whose errors do not end the run: a full disk, a reader that has gone, no isatty."""

    def __init__(self, stream: io.TextIOBase | None) -> None:
        self.stream = stream or open(os.devnull, "w")  # None if it was closed
        with suppress(Exception):  # it flushes; a notebook's has no such method
            stream.reconfigure(errors="backslashreplace")  # for names that are not UTF-8

    def write(self, text: str) -> None:
        with suppress(Exception):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(Exception):
            self.stream.flush()

    def isatty(self) -> bool:
        with suppress(Exception):
            return self.stream.isatty()
        return False

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def run(settings: Settings) -> int:
    """Do all that the command asks for. Returns the exit status."""
    torch.set_num_threads(1)  # for every thread: no sum depends on the number of cores
    settings = resolve_device(settings)
    datasets = find_datasets(settings)
    weights_path = find_weights(settings)
    model, weights = load_model(settings, weights_path)
    weights_file = weights_path.name if weights_path else None
    jobs = [Job(settings, dataset, weights, weights_file) for dataset in datasets]
    clips = []
    for job in jobs:
        prepare(job)
        clips += job.dataset.clips
    if weights == UNTRAINED:
        warning = f"WARNING: UNTRAINED WEIGHTS. {UNTRAINED_WARNING}"
        say("\n".join(["=" * len(warning), warning, "=" * len(warning)]))
    encoder = make_encoder(model, settings)
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
            if all(clip.error for clip in job.dataset.clips):
                tell_that_all_failed(job)
                status = max(status, 1)
            else:
                status = max(status, write_outputs(job))
        except UserError as refusal:  # the other dataset is written all the same
            say(f"error: {refusal}")
            status = refusal.status
    return status


def prepare(job: Job) -> None:
    """Find the clips that have codes, and check that the run can finish. Raises UserError."""
    clips = job.dataset.clips
    num_gone = find_codes(job.dataset, job.codes_dir, job.settings)
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
    remove_old(job.codes_dir, "[0-9a-f]" * 32 + ".tmp", os.unlink)  # see write_codes


def interrupt(number: int, _: object) -> None:
    """End the run at SIGINT or SIGTERM. Later ones are ignored: torchrun sends a second one."""
    for other in (signal.SIGINT, signal.SIGTERM):
        # Not SIG_IGN: Python reports an error if the other signal has arrived, too.
        signal.signal(other, lambda *_: None)
    raise Interrupted(128 + number)


def main(argv: list[str] | None = None, settings: Settings | None = None) -> int:
    """Run a command line (default: the process's own), or its settings. Returns the exit status.

    0: finished. 1: no clip could be tokenized, an output could not be written, or the run broke.
    2: the user has to change something first. 130, 143: interrupted.
    """
    settings = settings or parse_settings(argv)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which macOS reports as leaked
    num_threads = torch.get_num_threads()
    previous = {}
    with redirect_stdout(SafeStream(sys.stdout)), redirect_stderr(SafeStream(sys.stderr)):
        try:
            with suppress(ValueError):  # only a program's main thread may handle signals
                for number in (signal.SIGINT, signal.SIGTERM):
                    previous[number] = signal.signal(number, interrupt)
            return run_and_report(settings)
        except Interrupted as interrupted:
            say("interrupted")
            return interrupted.args[0]
        finally:
            torch.set_num_threads(num_threads)
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
    """End the process at once: PyTorch takes most of a second to tidy up.

    With %run the process is a notebook's, which has to live on.
    """
    if "IPython" in sys.modules:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # it is None if it was closed
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main(settings=SETTINGS))
