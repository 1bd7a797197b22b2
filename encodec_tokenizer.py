#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<2.12", "torchaudio>=2.6,<2.12", "encodec>=0.1.1", "numpy", "pandas", "tqdm",
#     "soundfile", "filelock",
# ]
# ///
"""Turn the clips of FSDKaggle2019 into discrete tokens with EnCodec, one CSV row per clip.

    python encodec_tokenizer.py --dataset sample                       # bundled clips, no dataset
    python encodec_tokenizer.py --dataset curated --max_samples 100    # a quick trial
    python encodec_tokenizer.py --dataset both --model encodec_48khz
    torchrun --nproc_per_node=4 encodec_tokenizer.py --dataset noisy   # one process per GPU

The file reads in the order the data flows: command line -> dataset -> clips -> chunks -> weights ->
codes -> rows -> files. One idea holds it together, the **block** of 64 consecutive clips. Batches
are packed inside a block and never across one, so what is encoded together depends on the dataset
and the settings alone; a block's rows reach the disk in one rename; a rerun skips the blocks that
are there; with torchrun, rank r of w takes the blocks r, r + w, ... The final CSV is the blocks in
order, byte for byte the same however often the run was cut or shared out.
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
import sys
import textwrap
import threading
import time
import traceback
import uuid
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import cached_property, lru_cache
from importlib.metadata import distributions, version
from importlib.util import find_spec
from itertools import chain, islice, zip_longest
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__version__ = "1.1.0"  # raised where the rows may be others

# ---------------------------------------------------------------------------------------- constants


@dataclass(frozen=True)
class ModelSpec:
    """What is known of an EnCodec model before it is built (encodec/model.py)."""

    sample_rate: int  # Hz
    channels: int
    bandwidths_kbps: tuple[float, ...]
    checkpoint: str  # Meta's file; its name ends in the first 8 hex digits of its SHA-256
    repository: str  # the same weights on Hugging Face


MODELS = {
    "encodec_24khz": ModelSpec(
        24_000, 1, (1.5, 3, 6, 12, 24), "encodec_24khz-d7cc33bc.th", "facebook/encodec_24khz"
    ),
    "encodec_48khz": ModelSpec(
        48_000, 2, (3, 6, 12, 24), "encodec_48khz-7e698e3e.th", "facebook/encodec_48khz"
    ),
}
STEMS = {  # a dataset's name on the command line -> those of its output files
    "curated": ["train_curated"],
    "noisy": ["train_noisy"],
    "both": ["train_curated", "train_noisy"],
    "test": ["test"],
    "sample": ["sample"],
}
SAMPLE_DIR = Path(__file__).resolve().parent / "tests" / "sample"
NAME_COLUMNS = ("fname", "filename")
LABEL_COLUMNS = ("labels", "label", "category")
COLUMNS = ["fname", "labels", "num_tokens", "token_shape", "num_chunks", "duration_sec"]
AGGREGATES = ["mean", "latent", "medoid", "none"]
CHECKPOINT = "a file, a folder of transformers', or a repository on Hugging Face"
EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3")  # tried for names without one
BLOCK_CLIPS = 64
NUM_CODES = 1024  # entries of a codebook
FORMULA = ("=", "+", "-", "@")  # how a cell begins that a spreadsheet program would run
UNTRAINED = "untrained (seed 0)"

# What torchrun tells its processes; without it, this is the only one.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


class UserError(Exception):
    """Something that the user has to change first: printed as it is, exit status 2."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; its argument is the exit status, 128 + the signal's number."""


# ------------------------------------------------------------------------------------- command line


def flag(default: object, help: str, decides: bool = False, **options: object) -> object:
    """A field of Settings: its default, and what argparse wants to know of it.

    `decides` marks what the rows depend on: runs share blocks only where they agree in it.
    """
    return field(default=default, metadata={"decides": decides, "help": help, **options})


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`, both included."""

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: from {low} to {high}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse says "invalid float value"
    return parse


COUNT, SECONDS = number(int, 1, 10**9), number(float, 0.1, 60)


@dataclass(frozen=True)
class Settings:
    """The command line, checked: every field is a flag of the same name."""

    dataset: str = flag("curated", "which clips; sample: a dozen that come along", choices=STEMS)
    metadata: Path | None = flag(None, "instead: any CSV of file names (and labels)", type=Path)
    audio_dir: Path | None = flag(None, "where the files of --metadata lie", type=Path)
    input_dir: Path = flag(Path("input"), "the dataset, in Kaggle's or Zenodo's layout", type=Path)
    output_dir: Path = flag(Path("work/tokenized"), "where the CSV and its summary go", type=Path)
    model: str = flag("encodec_24khz", "24 kHz mono or 48 kHz stereo", True, choices=MODELS)
    bandwidth: float = flag(6.0, "kbps: 1.5 (24 kHz only), 3, 6, 12, 24", True, type=float)
    target_duration: float = flag(2.0, "seconds in a chunk, 0.1 to 60", True, type=SECONDS)
    overlap: float = flag(0.1, "fraction shared, 0 to 0.9", True, type=number(float, 0, 0.9))
    aggregate: str = flag("mean", "how a clip's chunks become a row", True, choices=AGGREGATES)
    weights: str = flag("pretrained", "or untrained (a rehearsal), or a checkpoint: " + CHECKPOINT)
    device: str = flag("auto", "auto (CUDA if there is one), cpu, cuda, cuda:N")
    batch_size: int = flag(
        None, "chunks a batch (default: 8 s of audio; CUDA: 512 s)", True, type=COUNT
    )
    workers: int = flag(None, "threads that read clips ahead (default: 2; CUDA: 8)", type=COUNT)
    max_duration: float = flag(
        600.0, "seconds; longer clips fail", True, type=number(float, 0.1, 1e6)
    )
    max_samples: int | None = flag(None, "only the first N rows (default: all)", type=COUNT)
    plot: str | None = flag(
        None, "also a picture (matplotlib)", nargs="?", const="", metavar="FILE"
    )
    listen: int = flag(0, "also WAVs of what N rows keep", type=number(int, 0, 10**9))
    parquet: bool = flag(False, "also a Parquet file, tokens as one list column (pyarrow)")
    overwrite: bool = flag(False, "replace output made with other settings, or make it anew")
    debug: bool = flag(False, "print every clip, and tracebacks")

    @property
    def chunk_samples(self) -> int:
        return round(self.target_duration * MODELS[self.model].sample_rate)

    @property
    def hop_samples(self) -> int:
        return round(self.chunk_samples * (1 - self.overlap))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One sentence, status 2; argparse would print twelve lines of usage first."""
        self.exit(2, f"error: {message}\n--help shows every flag.\n")


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Read the command line. A mistake ends in a sentence and exit status 2."""
    description, examples, _ = __doc__.split("\n\n", 2)
    parser = Parser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    for flag in fields(Settings):
        options = {key: value for key, value in flag.metadata.items() if key != "decides"}
        if "type" in options:
            options["metavar"] = options["type"].__name__.upper()
        if flag.default is False:
            options["action"] = "store_true"
        elif flag.default is not None:
            options["help"] += " (default: %(default)s)"
        parser.add_argument(f"--{flag.name}", default=flag.default, **options)
    settings = Settings(**vars(parser.parse_args(argv)))

    bandwidths = MODELS[settings.model].bandwidths_kbps
    if settings.bandwidth not in bandwidths:
        offered = ", ".join(f"{kbps:g}" for kbps in bandwidths)
        parser.error(f"argument --bandwidth: {settings.model} offers {offered} kbps")
    if bool(settings.metadata) != bool(settings.audio_dir):
        parser.error("arguments --metadata and --audio_dir go together")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", settings.device):
        parser.error("argument --device: choose from auto, cpu, cuda, cuda:N")
    made_by = {"plot": "matplotlib pandas", "parquet": "pyarrow pandas", "listen": "pandas"}
    for name, packages in made_by.items():
        missing = [package for package in packages.split() if not find_spec(package)]
        if getattr(settings, name) not in (None, False, 0) and missing:
            parser.error(f"argument --{name} needs  pip install {' '.join(missing)}")
    return settings


def say(message: str, rank: int = 0) -> None:
    """Print to stderr around the progress bar, if it can be; of several processes, one speaks."""
    if rank == RANK:
        with suppress(OSError):
            tqdm.write(message, file=sys.stderr)


if __name__ == "__main__":
    parse_settings()  # help and mistakes are answered before the imports below, which take seconds
    if RANK == 0 and sys.stderr and sys.stderr.isatty():
        print("loading PyTorch ...", file=sys.stderr, flush=True)

try:
    import filelock
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
except (ImportError, OSError, RuntimeError) as error:
    # torchaudio refuses to load beside a torch it was not built for, with any of these three.
    names = ("torch", "torchaudio", "encodec")
    found = {d.name: d.version for d in distributions() if d.name in names}
    sys.exit(
        f"error: the packages that this script needs do not load: {error}\n"
        f"Python: {sys.executable}. Installed: {found}. What goes together:\n"
        '  pip install "torch>=2.6,<2.12" "torchaudio>=2.6,<2.12" "encodec>=0.1.1" numpy pandas '
        "tqdm soundfile filelock"
    )


def available_cores() -> int:
    """The cores that this process may use: of its affinity and its container's share of time."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = len(affinity(0))
    try:  # cgroup v2: microseconds of CPU time in a period, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


# Threads that encode on a CPU. torchrun sets OMP_NUM_THREADS to 1 where the user has not, so there
# it is an equal share of the node.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or available_cores())
if WORLD_SIZE > 1:
    THREADS = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def resolve_device(settings: Settings) -> Settings:
    """The settings with their device, "cpu" or "cuda:N", and what depends on it.

    `auto` tries a small convolution first: PyTorch sees GPUs that it has no kernels for.
    Raises UserError: no such GPU, or one that cannot be used.
    """
    device = settings.device
    if device in ("auto", "cuda"):
        device = f"cuda:{LOCAL_RANK}" if device == "cuda" or torch.cuda.is_available() else "cpu"
    if device != "cpu":
        try:
            F.conv1d(torch.ones(1, 1, 8, device=device), torch.ones(1, 1, 3, device=device)).cpu()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            if settings.device != "auto":
                raise UserError(f"--device {settings.device} cannot be used: {reason}") from error
            say(f"note: going on without the GPU, which this PyTorch cannot use: {reason}")
            device = "cpu"
    on_cpu = device == "cpu"
    # Counted in seconds of audio, so that long chunks take no more memory than short ones. Of 8 s:
    # see FastEncoder. One thread reads and resamples faster than ten cores encode.
    batch_size = settings.batch_size or round((8 if on_cpu else 512) / settings.target_duration)
    workers = settings.workers or (2 if on_cpu else 8)
    return replace(settings, device=device, batch_size=max(1, batch_size), workers=workers)


# ------------------------------------------------------------------------------------------ dataset


@dataclass(eq=False)
class Record:
    """What is kept of a clip beside its rows."""

    fname: str
    file: str | None = None  # its fingerprint; None where it cannot be read
    error: str = ""  # why it cannot be tokenized
    duration_s: float = 0.0  # of the file, before padding or resampling
    num_chunks: int = 0
    silent: bool = False  # all samples are zero
    load_s: float = 0.0  # seconds to read and resample it
    encode_s: float = 0.0  # seconds of its batches, its share


@dataclass(eq=False)
class Clip(Record):
    """One row of the dataset on its way to one row of the output."""

    labels: str = ""
    extra: list[str] = field(default_factory=list)  # further columns of --metadata
    index: int = 0  # in the dataset
    rate: int = 0  # Hz, of the file
    starts: list[int] = field(default_factory=list)  # of its chunks, in samples at the model's rate
    chunks: list[torch.Tensor] = field(default_factory=list)  # [C, T] each, until they are encoded
    codes: np.ndarray | None = None  # [N, K, F], until its block is written
    latents: list[torch.Tensor] = field(default_factory=list)  # N of [D, F], where wanted


@dataclass(frozen=True)
class Dataset:
    stem: str  # names the output files
    csv_path: Path
    audio_dir: Path
    columns: list[str]  # names of the clips' extra cells
    clips: list[Clip]  # in the CSV's order

    @cached_property
    def blocks(self) -> list[list[Clip]]:
        return [self.clips[i : i + BLOCK_CLIPS] for i in range(0, len(self.clips), BLOCK_CLIPS)]


def find_datasets(settings: Settings) -> list[Dataset]:
    """The datasets that the command names. Raises UserError: see find_dataset, read_clips."""
    if not settings.metadata and settings.dataset != "sample":
        return [find_dataset(settings, stem) for stem in STEMS[settings.dataset]]
    csv_path = settings.metadata or SAMPLE_DIR / "sample.csv"
    audio_dir = settings.audio_dir or SAMPLE_DIR
    if not audio_dir.is_dir():
        named = "--audio_dir" if settings.audio_dir else "the sample comes with the repository, in"
        raise UserError(f"{named} {audio_dir}: no such folder")
    clips = read_clips(csv_path, settings.max_samples, keep_extra=bool(settings.metadata))
    return [Dataset(csv_path.stem, csv_path, audio_dir, *clips)]


def find_dataset(settings: Settings, stem: str) -> Dataset:
    """Find a dataset's CSV and audio folder in `input_dir` or up to two folders below it.

    Kaggle names them train_curated.csv and train_curated/ (trn_curated/ in some copies), Zenodo
    (record 3612637) FSDKaggle2019.meta/train_curated_post_competition.csv and
    FSDKaggle2019.audio_train_curated/. Kaggle lists its test clips in sample_submission.csv.

    Raises UserError: no CSV or no folder, or a CSV that does not list clips.
    """

    def find(names: Iterable[str], wanted: Callable[[Path], bool]) -> list[Path]:
        patterns = [depth + name for depth in ("", "*/", "*/*/") for name in names]
        return [
            path for p in patterns for path in sorted(settings.input_dir.glob(p)) if wanted(path)
        ]

    kaggle_csv = "sample_submission.csv" if stem == "test" else f"{stem}.csv"
    kaggle_folders = dict.fromkeys([stem, stem.replace("train_", "trn_")])
    layouts = {
        kaggle_csv: kaggle_folders,
        f"{stem}_post_competition.csv": [f"FSDKaggle2019.audio_{stem}"],
    }
    for csv_name, folder_names in layouts.items():
        csv_paths, folders = find([csv_name], Path.is_file), find(folder_names, Path.is_dir)
        if csv_paths and folders:
            columns, clips = read_clips(csv_paths[0], settings.max_samples)
            # Some copies nest a folder in one of the same name: take the one with the clips.
            names = [clip.fname for clip in clips[:100]]
            holds = [sum(os.path.exists(folder / name) for name in names) for folder in folders]
            return Dataset(stem, csv_paths[0], folders[int(np.argmax(holds))], columns, clips)
    looked = "\n".join(
        f"  {name} and {'/ or '.join(folders)}/" for name, folders in layouts.items()
    )
    raise UserError(
        f"no {stem} dataset. Looked in {settings.input_dir.resolve()}, and two folders deep, for\n"
        f"{looked}\n"
        "Get FSDKaggle2019 from https://zenodo.org/record/3612637 or from the Kaggle competition\n"
        "freesound-audio-tagging-2019, and name the folder that holds it with --input_dir.\n"
        "To try the tool without it: --dataset sample"
    )


def read_clips(
    csv_path: Path, max_samples: int | None, keep_extra: bool = False
) -> tuple[list[str], list[Clip]]:
    """The names of a CSV's further columns where they are kept, and the clips that it lists.

    Repeated rows count once. Raises UserError: no table in UTF-8, or none that names clips.
    """
    what = f"{csv_path} is not a comma-separated table in UTF-8"
    try:
        with csv_path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = filter(None, csv.reader(file, skipinitialspace=True, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{what}: {error}") from error
    header = [name.strip() for name in header]
    if wide := next((row for row in rows if len(row) > len(header)), None):
        counts = f"{len(header)} columns in its header, {len(wide)} in the row of {wide[0]}"
        raise UserError(f"{what}: {counts} (a comma in a label needs quotes)")
    names = [column for column in NAME_COLUMNS if column in header]
    labels = [column for column in LABEL_COLUMNS if column in header]
    if not names:
        there = ", ".join(map(repr, header[:5]))
        hint = "; it seems to use semicolons, commas are needed" if ";" in there else ""
        raise UserError(f"{csv_path} has no column {' or '.join(NAME_COLUMNS)}, only {there}{hint}")
    if not rows:
        raise UserError(f"{csv_path} lists no clips: nothing follows its header")
    extra = [name for name in header if keep_extra and name not in (names[0], *labels[:1])]
    wanted = [names[0], *(labels[:1] or [""]), *extra]
    ours = "|".join([*COLUMNS[2:], "chunk", "start_sec", "tokens", r"token_\d+"])
    taken = {name for name in wanted if re.fullmatch(ours, name) or header.count(name) > 1}
    if taken:
        raise UserError(f"{csv_path}: rename {', '.join(taken)}: there would be two of a name")
    cells = (dict(zip(header, row)) for row in rows)
    listed = Counter(tuple(cell.get(name, "") for name in wanted) for cell in cells)
    if repeated := [row[0] for row, count in listed.items() if count > 1]:
        count = len(rows) - len(listed)
        say(f"note: {csv_path} repeats {count} rows, used once ({repeated[0]}, ...)")
    numbered = enumerate(islice(listed, max_samples))
    return extra, [Clip(n, labels=label, extra=rest, index=i) for i, (n, label, *rest) in numbered]


# -------------------------------------------------------------------------------------------- clips


class BadClip(Exception):
    """Why a clip cannot be tokenized, in words for failed_<stem>.csv."""


# What the system says of a file that is at fault itself. All else (no memory, too many open files,
# an I/O error, a stale mount) is the machine's: it ends the run, and no clip is blamed.
CLIP_ERRNOS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ,
}  # fmt: skip


@contextmanager
def clip_is_blamed() -> Iterator[None]:
    """Turns an OSError into BadClip where the clip is at fault; the machine's pass through."""
    try:
        yield
    except OSError as error:
        if error.errno not in CLIP_ERRNOS:
            raise
        raise BadClip(f"cannot be opened: {error.strerror}") from error


def clip_path(audio_dir: Path, fname: str) -> Path:
    """Where a clip lies; its name may lack the extension (FSD50K's do).

    Raises BadClip: a name that leads out of the folder, or to no plain file. OSError: the machine's
    faults, and an audio folder with nothing in it, as of a disk that was unmounted.
    """
    if not fname:
        raise BadClip("the name is empty")
    for name in (PurePosixPath(fname), PureWindowsPath(fname)):
        if name.anchor or ".." in name.parts:
            raise BadClip("the name leads outside the audio folder; not opened")
    if "\0" in fname:
        raise BadClip("the name holds a NUL character")
    for extension in ("", *EXTENSIONS):
        path = audio_dir / (fname + extension)
        try:
            with clip_is_blamed():
                size, is_file = path.stat().st_size, path.is_file()
        except BadClip as error:
            if error.__cause__.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            continue
        if not is_file:
            raise BadClip("not a plain file")
        if size == 0:
            raise BadClip("empty file (0 bytes)")
        return path
    if not any(audio_dir.iterdir()):
        raise OSError(errno.ENOENT, "the audio folder is empty; was it unmounted?", str(audio_dir))
    raise BadClip(f"no such file in {audio_dir.name}/")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """What a file is known by: its size, time of change in ns, and SHA-256."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {sha256_of(path)}"


def file_state(audio_dir: Path, fname: str, known: str | None) -> str:
    """Whether a clip's file is still what `known`, its fingerprint, says: same, changed or gone.

    As git does: by size and time, and by content where the time alone differs, as in a copy.
    """
    try:
        path = clip_path(audio_dir, fname)
        if known is None:  # it could not be read then
            return "changed" if os.access(path, os.R_OK) else "same"
        stat, (size, mtime_ns, digest) = path.stat(), known.split()
        if stat.st_size != int(size):
            return "changed"
        untouched = stat.st_mtime_ns == int(mtime_ns)
        return "same" if untouched or sha256_of(path) == digest else "changed"
    except BadClip:
        return "same" if known is None else "gone"


NO_HEADER = "raw samples: there is no header that says what they are"
UNKNOWN_FORMAT = 1, 4  # libsndfile's errors that say so: of the file's form, of its encoding
MACHINE_FAULTS = {2: errno.EIO, 17: errno.ENOMEM}  # its failed system calls, its failed malloc


class Stream(sf.SoundFile):
    """A file that is read from its start to its end, whatever length its header gives.

    SoundFile.read asks for no more than the header promises, and .blocks() gives what the header
    promises, whether it was read or not.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def open_audio(path: Path) -> Iterator[Stream]:
    """A file for reading, with the particulars of three formats.

    MP3 goes through a pipe: libsndfile estimates a length from the size of what it can seek in, and
    reads no further; from a pipe it reads all, and takes a cut for an error. A WAV whose sizes were
    never filled in gets that of its audio. Of OGG streams in a row libsndfile knows the first
    alone, and a cut one passes for a shorter one.
    """
    name = os.fsencode(path) if os.name == "posix" else path  # it may be no UTF-8
    with Stream(name) as file:
        kind = file.format
        if kind == "RAW":  # libsndfile's guess from a name in .au, .snd, .vox or .gsm
            raise BadClip(NO_HEADER)
        if kind not in ("MP3", "OGG") and (kind != "WAV" or file.frames):
            yield file
            return
    data = bytearray(path.read_bytes())
    if kind == "MP3":
        # The frame that gives the length, at each start of what an encoder wrote.
        if len(re.findall(rb"\xff[\xe2-\xff].{2}\0{9,32}(?:Xing|Info)", data, re.DOTALL)) > 1:
            raise BadClip("several MP3 files in one; the first alone could be read")
        source, sink = os.pipe()
        threading.Thread(target=feed, args=(sink, data), daemon=True).start()
        with Stream(source) as file:
            yield file
        return
    if kind == "OGG":
        pages = [match.start() for match in re.finditer(rb"OggS\0[\0-\7]", data)]
        last = data[pages[-1] :]  # flags in its byte 5: 2 begins a stream, 4 ends it (RFC 3533)
        if any(data[page + 5] & 2 for page in pages[1:]):
            raise BadClip("several OGG streams in one; the first alone could be read")
        sizes = last[27 : 27 + last[26]] if len(last) > 27 else b""
        if not last[5] & 4 or not sizes or len(last) < 27 + len(sizes) + sum(sizes):
            raise BadClip("truncated: its last page is not there")
    elif int.from_bytes(data[4:8], "little") + 8 < len(data) < 2**32:
        at = data.find(b"data") + 8
        data[at - 4 : at] = (len(data) - at).to_bytes(4, "little")
    with Stream(io.BytesIO(data)) as file:
        yield file


def feed(sink: int, data: bytes) -> None:
    """Write to a pipe until all is there or its reader has closed it."""
    with suppress(BrokenPipeError), os.fdopen(sink, "wb") as file:
        file.write(data)


def read_audio(path: Path, channels: int, max_duration_s: float) -> tuple[torch.Tensor, int]:
    """Read a clip and mix it to the model's channels.

    soundfile first: libsndfile reads WAV, FLAC, OGG and MP3 with nothing to install. A format that
    it does not know goes to torchaudio.load, which since 2.9 needs TorchCodec and FFmpeg; a damaged
    file does not, for FFmpeg plays what is left of it. What counts is what was decoded; it is
    compared with what the header promises where that is exact.

    Returns samples [channels, T] in float32, at the file's own rate; that rate in Hz.
    Raises BadClip. OSError, MemoryError: the machine's.
    """
    if path.suffix.lower() == ".raw":  # soundfile goes by this name, and wants to be told the rest
        raise BadClip(NO_HEADER)
    try:
        with open_audio(path) as file:
            samples, rate = decode(file, channels, max_duration_s), file.samplerate
    except sf.LibsndfileError as error:
        with path.open("rb") as file:  # raises what the system has against it; libsndfile hides it
            if re.fullmatch(rb"[\t\n\r -~]+", file.read(4096)):
                raise BadClip("not audio: it holds text") from error
        reason = error.error_string.strip()
        if error.code in MACHINE_FAULTS:
            raise OSError(MACHINE_FAULTS[error.code], reason, str(path)) from error
        if error.code not in UNKNOWN_FORMAT:
            what = "damaged, or of a kind that libsndfile cannot decode"
            raise BadClip(f"{what} ({reason})") from error
        samples, rate = decode_by_torchaudio(path, channels, max_duration_s, reason)
    if samples.shape[1] == 0:
        raise BadClip("no samples: the file holds a header and no audio")
    if not samples.abs().max() < 1e6:  # so that NaN counts
        raise BadClip("NaN, infinite or absurdly large samples; audio lies within -1 and 1")
    return samples, rate


def decode(file: Stream, channels: int, max_duration_s: float) -> torch.Tensor:
    """All that a file holds, as [channels, T]; in pieces, so that no header reserves memory."""
    rate, promised = file.samplerate, file.frames
    too_long = f"s long, --max_duration is {max_duration_s:g} s"
    if not 1_000 <= rate <= 1_000_000:
        raise BadClip(f"a sample rate of {rate} Hz is not plausible")
    knows_length = promised < 2**40  # FLAC and MP3 streams may not: they say some 2^48 and 2^63
    if knows_length and promised > max_duration_s * rate:
        raise BadClip(f"{promised / rate:.0f} {too_long}")
    # libsndfile cuts the length to what is there and says so in its log only, for the sizes of WAV
    # (data), AIFF (SSND), AU, W64 (riff) and RF64. Sizes near 2 GiB and above are what streaming
    # writers leave that could not know better.
    sizes = r"^ *(?:data|SSND|riff|Data Size|Riff size) *: (\d+) \(should be (\d+)\)"
    for claimed, there in re.findall(sizes, file.extra_info, re.MULTILINE):
        if int(there) < int(claimed) < 2**31 - 2**20:
            raise BadClip(f"truncated: {there} of {claimed} bytes of audio are there")
    pieces, length = [torch.empty(channels, 0)], 0
    while len(piece := file.read(2**20 // file.channels, dtype="float32", always_2d=True)):
        pieces.append(mix_channels(torch.from_numpy(piece.T), channels))
        length += len(piece)
        if length > max_duration_s * rate:
            raise BadClip(f"more than {length / rate:.0f} {too_long}")
    if knows_length and length < promised:
        raise BadClip(f"truncated: {length} of {promised} samples are there")
    return torch.cat(pieces, dim=1)


def decode_by_torchaudio(
    path: Path, channels: int, max_duration_s: float, first: str
) -> tuple[torch.Tensor, int]:
    """What libsndfile could not read, for the reason `first`: samples [channels, T] and rate."""
    try:
        samples, rate = torchaudio.load(path)
    except MemoryError:
        raise
    except Exception as error:  # any decoder's, or TorchCodec's absence
        if getattr(error, "errno", None) not in {None, *CLIP_ERRNOS}:
            raise
        reasons = f"soundfile: {first}; torchaudio: {error}"
        raise BadClip(f"not audio that can be read ({' '.join(reasons.split())})") from error
    if samples.shape[1] > max_duration_s * rate:
        duration_s = samples.shape[1] / rate
        raise BadClip(f"{duration_s:.0f} s long, --max_duration is {max_duration_s:g} s")
    return mix_channels(samples, channels), rate


def mix_channels(samples: torch.Tensor, channels: int) -> torch.Tensor:
    """[C, T] -> [channels, T]: as they are where so many are wanted, else the mean of all."""
    if samples.shape[0] == channels:
        return samples
    return samples.mean(dim=0, keepdim=True).repeat(channels, 1)


@lru_cache(maxsize=8)
def resampler(rate: int, model_rate: int, device: str) -> torchaudio.transforms.Resample:
    """torchaudio's resampler with its defaults, as in EnCodec's convert_audio, kept for reuse.

    Its kernel has as many entries as the product of the reduced rates: 4 GB for 44,101 Hz. Ratios
    of more than 2^22 entries are met by the nearest of fewer, within 2.4e-4 up to 192 kHz; the
    rates in common use (8, 11.025, 22.05, 44.1, 48, 96, 192 kHz, ...) are exact.
    """
    ratio = Fraction(rate, model_rate)
    ratio = ratio.limit_denominator(max(1, int(2**11 / math.sqrt(ratio))))
    return torchaudio.transforms.Resample(ratio.numerator, ratio.denominator).to(device)


# ------------------------------------------------------------------------------------------- chunks


def chunk_starts(length: int, chunk: int, hop: int) -> list[int]:
    """Where the chunks of `length` samples start: every hop, the last aligned to the clip's end."""
    starts = list(range(0, max(1, length - chunk + 1), hop))
    if starts[-1] + chunk < length:
        starts.append(length - chunk)
    return starts


def split_chunks(audio: torch.Tensor, chunk: int, hop: int) -> list[torch.Tensor]:
    """Cut [C, T] into pieces [C, chunk], so that each sample is in one.

    Audio of at most one chunk is zero-padded at its end. Longer audio is not padded.
    """
    audio = F.pad(audio, (0, max(0, chunk - audio.shape[1])))
    return [audio[:, start : start + chunk] for start in chunk_starts(audio.shape[1], chunk, hop)]


def load_clip(clip: Clip, settings: Settings, audio_dir: Path) -> Clip:
    """Read, resample and cut a clip: fills in its record and its chunks, or why there are none."""
    started, spec = time.perf_counter(), MODELS[settings.model]
    try:
        path = clip_path(audio_dir, clip.fname)
        with clip_is_blamed():
            clip.file = fingerprint(path)
            samples, clip.rate = read_audio(path, spec.channels, settings.max_duration)
        clip.duration_s, clip.silent = samples.shape[1] / clip.rate, not samples.any()
        samples = samples.to(settings.device)
        audio = resampler(clip.rate, spec.sample_rate, settings.device)(samples)  # [C, T]
        clip.starts = chunk_starts(audio.shape[1], settings.chunk_samples, settings.hop_samples)
        clip.num_chunks = len(clip.starts)
        clip.chunks = split_chunks(audio, settings.chunk_samples, settings.hop_samples)
    except BadClip as reason:
        clip.error = str(reason)
    clip.load_s = time.perf_counter() - started
    return clip


def one_core_pool(threads: int) -> ThreadPoolExecutor:
    """Threads of one core each: no sum depends on the number of cores."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def load_clips(clips: Iterable[Clip], settings: Settings, audio_dir: Path) -> Iterator[Clip]:
    """load_clip in threads: in order, a few clips ahead."""
    pool, pending, clips = one_core_pool(settings.workers), deque(), iter(clips)
    try:
        while True:
            for clip in islice(clips, 2 * settings.workers + 1 - len(pending)):
                pending.append(pool.submit(load_clip, clip, settings, audio_dir))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------------ weights


def find_weights(settings: Settings) -> Path | None:
    """The file to load, downloaded where need be; None for untrained weights.

    `pretrained` is Meta's file in torch hub's cache, where EncodecModel's own loader keeps it too,
    or else the same weights in Hugging Face's cache. Meta's names end in 8 hex digits, with which
    the SHA-256 of what is in them begins.

    Raises UserError: no such file, no download, another checksum.
    """
    spec, path = MODELS[settings.model], Path(settings.weights).expanduser()
    if settings.weights == "untrained":
        return None
    if settings.weights == "pretrained":
        path = Path(torch.hub.get_dir(), "checkpoints", spec.checkpoint)
        if not path.exists() and not download(path):
            copy = from_hugging_face(spec.repository)
            if copy or (settings.dataset == "sample" and not settings.metadata):
                return copy
            raise UserError(
                f"the pretrained weights could not be downloaded from {ROOT_URL}{path.name}\n"
                f"Download that file elsewhere and put it to {path},\n"
                "or name it with --weights FILE. For a rehearsal without it: --weights untrained"
            )
    elif not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", settings.weights):
        path = from_hugging_face(settings.weights) or path
    elif path.is_dir():
        path /= "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"--weights {path}: no such file (nor is it pretrained, untrained, or a repository)"
        )
    checksum = path.stem[-8:]
    metas = path.name in [spec.checkpoint for spec in MODELS.values()]
    if metas and not (found := sha256_of(path)).startswith(checksum):
        raise UserError(
            f"{path} is damaged: its SHA-256 begins with {found[:8]}, not with the {checksum} of "
            "its name. Delete it, and run again or download it elsewhere."
        )
    return path


def download(path: Path) -> bool:
    """Fetch one of Meta's checkpoints to `path`. Says why, and returns False, where that fails."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a cluster's firewall may swallow the request
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        url, checksum = ROOT_URL + path.name, path.stem[-8:]
        torch.hub.download_url_to_file(url, str(path), checksum, progress=RANK == 0)
        return True
    except (OSError, RuntimeError) as error:
        say(f"{ROOT_URL}{path.name} could not be downloaded: {getattr(error, 'reason', error)}")
        return False
    finally:
        socket.setdefaulttimeout(patience)


def from_hugging_face(repository: str) -> Path | None:
    """A repository's weights in Hugging Face's cache. Says why, and returns None, without them."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        say(f"{repository} on Hugging Face was not tried:  pip install huggingface_hub safetensors")
        return None
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # its own, requests' and httpx's; all mean that there is no file
        say(f"{repository} could not be had from Hugging Face: {str(error).splitlines()[0]}")
        return None


def build_model(name: str) -> EncodecModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")
        build = getattr(EncodecModel, name.replace("encodec_", "encodec_model_"))
        return build(pretrained=False)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint. Raises UserError: there are none that can be read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        mmap = zipfile.is_zipfile(path)  # reads what is used; files older than torch 1.6 cannot
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except ImportError as error:
        raise UserError(f"{path} needs safetensors:  pip install safetensors") from error
    except Exception as error:  # torch.load has no list of what a foreign file makes it raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is not a PyTorch checkpoint ({reason})") from error
    return state if isinstance(state, dict) else {}


def transformers_names(name: str) -> list[str]:
    """What transformers calls a tensor of EnCodec's: with weight norm's names, old and new."""
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
    """`state` under EnCodec's own names; None where it is not of this model."""
    named = {}
    for name, wanted in model.state_dict().items():
        candidates = (state.get(key) for key in (name, *transformers_names(name)))
        tensor = next((t for t in candidates if getattr(t, "shape", None) == wanted.shape), None)
        if tensor is None:
            return None
        named[name] = tensor
    return named if len(named) == len(state) else None


def load_model(settings: Settings, path: Path | None) -> tuple[EncodecModel, str]:
    """EnCodec with the weights of `path` at the chosen bandwidth, and those weights' SHA-256.

    For None: untrained ones. The digest is of the tensors that decide the codes, whatever form of
    file they come in.

    Raises UserError: not a checkpoint, one of another model, or one that cannot be meant.
    """
    model = untrained_model(settings.model) if path is None else build_model(settings.model)
    if path is not None:
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
                raise UserError(f"the weights in {path} are not EnCodec's: {name} has NaN or is 0")
            digest.update(name.encode() + tensor.numpy().tobytes())
    model.set_target_bandwidth(settings.bandwidth)
    return model, UNTRAINED if path is None else digest.hexdigest()


@torch.no_grad()
def untrained_model(name: str) -> EncodecModel:
    """Seeded random weights, for rehearsals: rows of the right shape that mean nothing.

    A fresh EnCodec's codebooks are all zero, and so would be its tokens. Here each codebook is
    drawn around what those before it left of the latents of some noise.
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


def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def elu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """ELU as max(x, exp(min(x, 0)) - 1).

    torch's own goes through an expm1 that on some hosts is slow for minutes at a time: encoding
    then takes up to 2 to 3 times as long (else 1.05 times). NumPy's is Intel's SVML where there are
    Linux and AVX-512: encoding is 1.05 to 1.07 times as fast as by torch's exp (Zen 4).
    """
    out = torch.clamp(x, max=0, out=out)
    if has_avx512() and sys.platform == "linux":
        np.expm1(out.numpy(), out=out.numpy())
    else:
        out.exp_().sub_(1)
    return torch.maximum(x, out, out=out)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, on CPUs with AVX-512 by oneDNN: PyTorch's default, MKL, leaves it unused on AMD.

    There encoding by MKL takes up to 1.3 times as long (on Zen 4, where AVX-512 does no more sums a
    second than AVX2, 1.02 times at 24 kHz and 1.08 times at 48 kHz).
    """
    if has_avx512() and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


Tails = dict["FastConv", torch.Tensor]  # of a convolution's input, its last `left` frames [left, C]


class FastConv:
    """EnCodec's SConv1d, and the ELU before it where there is one, on one chunk as [T, C].

    The same sums, laid out for a CPU: with a frame's channels side by side, a kernel of 1 is a
    matrix product, and a kernel of twice the stride (all strided convolutions of EnCodec) is two,
    over a view of the input; the ELU writes into the padded input. On 2 cores EnCodec's own
    modules, chunk by chunk and with `elu`, take 1.5 times as long.
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
        # As SConv1d pads: all to the left in a causal model, else the odd sample to the left.
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
        """[T, C] -> [ceil(T / stride), C']; `tails`: see FastEncoder.convolve."""
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


class FastEncoder:
    """EnCodec's encoder for a CPU: the convolutions chunk by chunk, the LSTM over the batch.

    A chunk's activations fit the cache, where a batch's do not; the LSTM reads all its weights at
    every step, which the chunks of a batch share. Its batch is filled up with zeros to one fixed
    shape, so that a chunk's codes do not depend on what it is encoded with. By itself a chunk costs
    the LSTM 46 ms, in batches of 4 23 ms, of 32 23 ms (AMD EPYC, Zen 3; on Zen 4 27, 13 and 12 ms):
    so 4, of 2 s.
    """

    def __init__(self, model: EncodecModel, batch_size: int) -> None:
        self.batch_size, self.hop = batch_size, int(model.encoder.hop_length)
        self.causal = model.encoder.model[0].causal
        self.convolutions: list[Callable[[torch.Tensor, Tails], torch.Tensor]] = []
        after_elu = False
        for module in model.encoder.model[:-1]:
            if isinstance(module, SConv1d):
                self.convolutions.append(FastConv(module, after_elu))
            elif isinstance(module, SEANetResnetBlock):
                self.convolutions.append(self.residual_block(module))
            elif isinstance(module, SLSTM):
                self.lstm = module.lstm
            after_elu = isinstance(module, torch.nn.ELU)
        # EnCodec's own: over 3,584 terms a sum it rounds less, and costs little.
        self.last = model.encoder.model[-1]

    @staticmethod
    def residual_block(module: SEANetResnetBlock) -> Callable[[torch.Tensor, Tails], torch.Tensor]:
        shortcut = FastConv(module.shortcut, after_elu=False)
        wide, narrow = (FastConv(module.block[i], after_elu=True) for i in (1, 3))
        return lambda x, tails: shortcut(x, tails).add_(narrow(wide(x, tails), tails))

    def convolve(self, segment: torch.Tensor) -> torch.Tensor:
        """[C, T] -> what enters the LSTM, [F, 512]

        A causal model's in pieces of 50 frames or more, which fit the cache (2 s at once take 1.2
        times as long) and take no more memory for longer chunks; each convolution finds the inputs
        that it needs from the piece before in `tails`. The 48 kHz model looks ahead and normalizes
        over time: a segment is one piece.
        """
        x, tails = segment.T.contiguous(), {}  # [T, C]
        piece = 50 * self.hop if self.causal else len(x)
        sizes = [piece] * (len(x) // piece - 1)
        pieces = []
        for y in x.split([*sizes, len(x) - sum(sizes)]):
            for convolution in self.convolutions:
                y = convolution(y, tails)
            pieces.append(y)
        return torch.cat(pieces)

    def latents(self, segments: list[torch.Tensor]) -> torch.Tensor:
        """B convolved segments [F, 512] of one length -> [B, D, F], as the model's own encoder."""
        x = torch.stack(segments, dim=1)  # [F, B, 512]
        x = F.pad(x, (0, 0, 0, self.batch_size - len(segments)))
        x = elu(x + self.lstm(x)[0]).permute(1, 2, 0)  # [B, 512, F]
        return torch.cat([self.last(one[None]) for one in x[: len(segments)]])


class WholeEncoder:
    """EnCodec's own encoder on whole batches, for a GPU; on halves where memory is short."""

    def __init__(self, model: EncodecModel, batch_size: int) -> None:
        self.encoder, self.fits = model.encoder, batch_size

    def convolve(self, segment: torch.Tensor) -> torch.Tensor:
        return segment

    def latents(self, segments: list[torch.Tensor]) -> torch.Tensor:
        """B segments [C, T] of one length -> [B, D, F]"""
        while True:
            try:
                return torch.cat([self.encoder(b) for b in torch.stack(segments).split(self.fits)])
            except torch.OutOfMemoryError:
                if self.fits == 1:
                    raise
            self.fits = (min(self.fits, len(segments)) + 1) // 2
            say(f"note: out of GPU memory; going on with batches of {self.fits} chunks")
            torch.cuda.empty_cache()


class Encoder:
    """From chunks to the codes that EncodecModel.encode gives, sooner.

    The 48 kHz model cuts a chunk into segments of 1 s that overlap by 1 % and normalizes the
    loudness of each; their codes follow each other in F.
    """

    def __init__(self, model: EncodecModel, settings: Settings) -> None:
        for module in model.encoder.modules():
            if hasattr(module, "weight_g"):  # fold the norm into the weight, once, not every call
                torch.nn.utils.remove_weight_norm(module)
        model.encoder.to(settings.device)
        model.quantizer.to(settings.device)
        kind = FastEncoder if settings.device == "cpu" else WholeEncoder
        self.inner, self.model = kind(model, settings.batch_size), model
        self.wants_latents = settings.aggregate in ("latent", "medoid")
        count = model.quantizer.get_num_quantizers_for_bandwidth(model.frame_rate, model.bandwidth)
        books = [layer.codebook for layer in model.quantizer.vq.layers[:count]]  # [1024, D] each
        self.codebooks = [(book, 2 * book, -book.pow(2).sum(1)) for book in books]

    @torch.inference_mode()
    def convolve(self, chunk: torch.Tensor) -> tuple[list[torch.Tensor], float]:
        """A chunk [C, T] -> its segments, convolved; and the seconds that took."""
        started, model = time.perf_counter(), self.model
        segment_samples, segments = model.segment_length or chunk.shape[1], []
        for start in range(0, chunk.shape[1], model.segment_stride or segment_samples):
            segment = chunk[:, start : start + segment_samples]
            if model.normalize:
                mono = segment.mean(dim=0, keepdim=True)
                segment = segment / (1e-8 + mono.pow(2).mean(dim=1, keepdim=True).sqrt())
            segments.append(self.inner.convolve(segment))
        return segments, time.perf_counter() - started

    @torch.inference_mode()
    def codes(self, convolved: list[Future]) -> tuple[np.ndarray, torch.Tensor | None, float]:
        """What `convolve` gave for B chunks -> codes [B, K, F], latents [B, D, F], seconds.

        The latents where they are wanted; of the seconds, a chunk's share.
        """
        chunks, seconds = zip(*(future.result() for future in convolved))
        started = time.perf_counter()
        latents = [self.inner.latents(list(segments)) for segments in zip(*chunks)]
        codes = torch.cat([self.quantize(part) for part in latents], dim=2).cpu().numpy()
        latents = torch.cat(latents, dim=2).cpu() if self.wants_latents else None
        took = sum(seconds) + time.perf_counter() - started
        return codes, latents, took / len(chunks)

    def quantize(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, D, F] -> [B, K, F]: per codebook the code nearest to what those before it left."""
        residual = latents.transpose(1, 2).reshape(-1, latents.shape[1])  # [B * F, D]
        codes = []
        for book, doubled, minus_squared in self.codebooks:
            # |x - e|^2 is least where 2 x.e - |e|^2 is greatest.
            nearest = linear(residual, doubled, minus_squared).max(dim=1).indices
            residual = residual - book[nearest]
            codes.append(nearest.view(len(latents), -1))
        return torch.stack(codes, dim=1)


def encode_clips(clips: Iterable[Clip], encoder: Encoder, settings: Settings) -> Iterator[Clip]:
    """Encode the chunks of clips, whole blocks of them; yields the clips in their order.

    Every chunk is convolved on a core of its own, and every `batch_size` of them, in order, go
    through the LSTM and the codebooks together. Not at once, but after as many more chunks as there
    are threads: by then they are convolved, and no thread waits for another (that took 1.13 to 1.17
    times as long). On CUDA one thread does it all, the GPU the rest.
    """
    threads = THREADS if settings.device == "cpu" else 1
    pool, batch_size = one_core_pool(threads), settings.batch_size
    waiting: deque[tuple[Clip, list]] = deque()  # a clip; for each chunk its batch and place there
    convolved: deque[tuple[list, Future]] = deque()  # for each chunk its clip's list, its features
    in_flight = 0  # chunks

    def close_batch() -> None:
        batch = [convolved.popleft() for _ in range(min(batch_size, len(convolved)))]
        codes = pool.submit(encoder.codes, [features for _, features in batch])
        for place, (parts, _) in enumerate(batch):
            parts.append((codes, place))

    try:
        for clip in clips:
            waiting.append((clip, parts := []))
            in_flight += len(clip.chunks)
            for chunk in clip.chunks:
                convolved.append((parts, pool.submit(encoder.convolve, chunk)))
                if len(convolved) == batch_size + threads:
                    close_batch()
            while convolved and clip.index % BLOCK_CLIPS == BLOCK_CLIPS - 1:
                close_batch()
            while in_flight - len(waiting[0][0].chunks) > 2 * (threads + batch_size):
                in_flight -= len(waiting[0][0].chunks)
                yield with_codes(*waiting.popleft())
        while convolved:
            close_batch()
        while waiting:
            yield with_codes(*waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def with_codes(clip: Clip, parts: list[tuple[Future, int]]) -> Clip:
    """A clip with what its chunks' batches have at their places."""
    results = [(*batch.result(), place) for batch, place in parts]
    if results:
        clip.codes = np.stack([codes[place] for codes, _, _, place in results])
        clip.latents = [latents[place] for _, latents, _, place in results if latents is not None]
        clip.encode_s = sum(seconds for _, _, seconds, _ in results)
    clip.chunks = []
    return clip


# --------------------------------------------------------------------------------------------- rows


def aggregate(clip: Clip, how: str, model: EncodecModel) -> np.ndarray:
    """A clip's chunks as the codes of its rows [R, K, F]; one row, but for `none`.

    mean: of the codes, rounded; no codes of EnCodec's where there are several chunks.
    latent: the codes of the mean of the chunks' latents.
    medoid: the codes of the chunk whose latents are nearest to that mean (Euclidean).
    none: every chunk's codes.
    """
    codes = clip.codes  # [N, K, F]
    if how == "none":
        return codes
    if how == "mean":
        return np.rint(codes.mean(axis=0, keepdims=True)).astype(np.int64)
    latents = torch.stack(clip.latents)  # [N, D, F]
    mean = latents.mean(dim=0, keepdim=True)
    if how == "medoid":
        nearest = int((latents - mean).pow(2).sum(dim=(1, 2)).argmin())
        return codes[nearest : nearest + 1]
    mean = mean.to(next(model.quantizer.buffers()).device)
    coded = model.quantizer.encode(mean, model.frame_rate, model.bandwidth)  # [K, 1, F]
    return coded.transpose(0, 1).cpu().numpy()


def csv_line(cells: Iterable[object]) -> str:
    """A line of a CSV. (Python 3.11's csv module leaves a lone carriage return unquoted.)"""

    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text

    return ",".join(quoted(str(cell)) for cell in cells) + "\n"


def columns(how: str, dataset: Dataset, num_tokens: int) -> list[str]:
    """The CSV's header."""
    chunk = ["chunk", "start_sec"] if how == "none" else []
    return COLUMNS + chunk + dataset.columns + [f"token_{i}" for i in range(num_tokens)]


CODE_TEXTS = np.array([str(code) for code in range(NUM_CODES)], dtype=object)


def clip_rows(clip: Clip, rows: np.ndarray, settings: Settings) -> Iterator[str]:
    """A clip's lines of the CSV, from the codes [R, K, F] of its rows."""
    shape, duration_s = rows.shape[1:], round(clip.duration_s, 6)
    facts = [clip.fname, clip.labels, math.prod(shape), shape, clip.num_chunks, duration_s]
    for i, row in enumerate(rows):
        chunk = []
        if settings.aggregate == "none":
            chunk = [i, round(clip.starts[i] / MODELS[settings.model].sample_rate, 6)]
        cells = csv_line([*facts, *chunk, *clip.extra])[:-1]
        yield f"{cells},{','.join(CODE_TEXTS[row.ravel()])}\n"


def code_counts(codes: np.ndarray) -> np.ndarray:
    """[N, K, F] -> [K, 1024]: how often each code occurs."""
    return np.stack([np.bincount(k.ravel(), minlength=NUM_CODES) for k in codes.swapaxes(0, 1)])


def perplexity(counts: np.ndarray) -> np.ndarray:
    """How many codes, used evenly, would be as varied as those counted in [K, 1024]: [K]."""
    share = counts / counts.sum(axis=1, keepdims=True)
    return np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum(axis=1))


# -------------------------------------------------------------------------------------------- files


class Block(NamedTuple):
    """What is kept of consecutive clips."""

    records: list[Record]
    counts: list[list[int]]  # [K, 1024]: how often the chunks have each code; [] where all failed
    shape: list[int]  # codebooks, frames of a row; [] where all failed
    lines: bytes  # of the CSV


def make_block(clips: list[Clip], settings: Settings, model: EncodecModel) -> Block:
    """The records and rows of clips that have their codes or an error."""
    done = [clip for clip in clips if not clip.error]
    rows = ((clip, aggregate(clip, settings.aggregate, model)) for clip in done)
    lines = "".join(line for clip, codes in rows for line in clip_rows(clip, codes, settings))
    counts = code_counts(np.concatenate([clip.codes for clip in done])).tolist() if done else []
    shape = [*done[0].codes.shape[1:]] if done else []
    return Block(clips, counts, shape, lines.encode())


def pack_block(block: Block, run_digest: str) -> bytes:
    """The SHA-256 of what follows, the digest of the run, the facts, a line each; the rows."""
    records = [[getattr(r, field.name) for field in fields(Record)] for r in block.records]
    facts = to_json([records, block.counts, block.shape])
    body = b"\n".join([run_digest.encode(), facts, block.lines])
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unpack_block(data: bytes) -> tuple[str, Block] | None:
    """The digest of the run and the block; None where it is damaged."""
    checksum, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    run_digest, facts, lines = body.split(b"\n", 2)
    records, counts, shape = json.loads(facts)
    records = [Record(*record) for record in records]
    return run_digest.decode(), Block(records, counts, shape, lines)


def to_json(content: object, indent: int | None = None) -> bytes:
    """Names that are no UTF-8 (surrogates) are kept, as JSON's own escapes."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return text.encode(errors="backslashreplace")


def write_file(path: Path, pieces: Iterable[bytes], workplace: Path) -> None:
    """Write a file whole or not at all: in another folder, onto the disk, then renamed."""
    temporary = workplace / f"{uuid.uuid4().hex}.tmp"
    with temporary.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name == "posix":  # the new name is on the disk when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of SMB, or FUSE: it cannot
                raise
        finally:
            os.close(folder)


def changes(found: dict, wanted: dict) -> str:
    """What is not the same in two dicts, a line each; what is a flag, by its name."""
    flags = {field.name for field in fields(Settings)}
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    lines = (f"{'--' * (k in flags)}{k}: {found.get(k)} -> {wanted.get(k)}" for k in keys)
    return "".join(f"  {line}\n" for line in lines)


def owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class Output:
    """The files of one dataset, and its blocks on the way there.

    One record, tokenized_<stem>.json, says what is here. It is written first, with "finished":
    false, and last, with true; `run` is all that decides the rows (see identity).

    | the record                       | the CSV  | what is here                       |
    |----------------------------------|----------|------------------------------------|
    | none                             | none     | nothing                            |
    | of this run, not finished        | any      | unfinished: its blocks are used    |
    | of this run, finished            | is there | finished                           |
    | another run's, or of more clips; | any      | another's: left alone, or replaced |
    | none, or none that can be read   | is there | by --overwrite                     |
    """

    def __init__(self, folder: Path, dataset: Dataset, run: dict) -> None:
        stem = dataset.stem
        self.dataset, self.run = dataset, run
        self.digest = hashlib.sha256(to_json(run)).hexdigest()  # in every block
        self.attempt = uuid.uuid4().hex[:8]  # in every block's name; the first process's
        self.csv = folder / f"tokenized_{stem}.csv"
        self.json = folder / f"tokenized_{stem}.json"
        self.summary = folder / f"summary_{stem}.txt"
        self.failed = folder / f"failed_{stem}.csv"
        self.parquet = folder / f"tokenized_{stem}.parquet"
        self.picture = folder / f"summary_{stem}.png"
        self.listen = folder / f"listen_{stem}"
        self.blocks = folder / f"tokenized_{stem}.blocks"
        # Beside the folder of the blocks, which goes; it stays, for to remove a lock is a race.
        self.lock = folder / f".tokenized_{stem}.lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output against other runs; the lock dies with the process."""
        lock = filelock.FileLock(self.lock, timeout=0)
        try:
            self.lock.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout as error:
            maker = (self.record() or {}).get("owner", "another process")
            hint = "wait for it, or choose another --output_dir"
            raise UserError(f"{self.csv} is being made by {maker}: {hint}") from error
        except (OSError, NotImplementedError) as error:  # older filelock's, where flock is missing
            raise UserError(f"--output_dir {self.lock.parent} cannot be used: {error}") from error
        try:
            record = self.record()
            if self.state(record) == "unfinished":  # whose owner has died
                self.write_record({**record, "owner": owner()})
            yield
        finally:
            lock.release()

    def record(self) -> dict | None:
        """The record, {} for one that cannot be one; None: there is none. Raises OSError."""
        try:
            found = json.loads(self.json.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {} if self.csv.exists() else None
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}

    def state(self, record: dict | None) -> str:
        """What is here: see the table above."""
        if record is None:
            return "nothing"
        if self.differences(record):
            return "another's"
        return "finished" if record["finished"] and self.csv.exists() else "unfinished"

    def differences(self, record: dict) -> str:
        """What of a record is not of this run, a line each, by the flags' names."""
        if "num_clips" not in record:
            return f"  no record in {self.json.name} of what made it\n"
        wanted = {**self.run, "max_samples": len(self.dataset.clips)}
        found = {**{key: record.get(key) for key in self.run}, "max_samples": record["num_clips"]}
        if found["max_samples"] <= wanted["max_samples"]:  # more are wanted: it is gone on with
            del found["max_samples"], wanted["max_samples"]
        return changes(found, wanted)

    def begin(self, overwrite: str | None) -> list[int] | None:
        """Write the record of an unfinished run; the blocks that it has to make, None if finished.

        A finished row is given up for `overwrite` alone, the id of the run that makes all anew:
        where more clips are wanted, or failed ones have come back, those that are done have to be
        as they were. Raises UserError: going on would mix settings or lose finished rows.
        """
        record, num_clips = self.record() or {}, len(self.dataset.clips)
        ways_on = "Replace it with --overwrite, or choose another --output_dir."
        anew = overwrite is not None and record.get("overwrite") != overwrite
        state = "nothing" if anew else self.state(self.record())
        if state == "another's":
            how = self.differences(record)
            raise UserError(f"{self.csv} was made, or begun, in another way:\n{how}{ways_on}")
        kept = [] if anew else record.get("clips", [])
        facts = {"finished": False, "num_clips": num_clips, "clips": kept}
        facts["overwrite"] = overwrite if anew else record.get("overwrite")
        facts["owner"] = owner()
        states = self.file_states([(fname, file) for fname, file, _ in kept])
        errors = [error for _, _, error in kept]
        lost = [c[0] for c, at, error in zip(kept, states, errors) if at != "same" and not error]
        if lost:
            names = ", ".join(lost[:3]) + ", ..." * (len(lost) > 3)
            what = f"{len(lost)} clips' files have changed or gone since {self.csv} was made"
            raise UserError(f"{what} ({names}). {ways_on}")
        if state == "finished" and record["num_clips"] == num_clips and "changed" not in states:
            if not any(errors):  # else the blocks stay, see join
                shutil.rmtree(self.blocks, ignore_errors=True)
            return None
        if anew and self.blocks.exists():
            shutil.rmtree(self.blocks)
        self.blocks.mkdir(exist_ok=True)
        there = self.adopt_blocks()
        self.write_record(facts)
        if anew:
            self.remove(self.csv, self.summary, self.failed)
        return [index for index in range(len(self.dataset.blocks)) if index not in there]

    def adopt_blocks(self) -> set[int]:
        """Take over what earlier attempts have left of this run, under this attempt's names.

        Only these are read afterwards: what a process of a dead attempt may still write is no
        block. A block is given up where a file of its clips has changed since.
        """
        there = set()
        for path in sorted(self.blocks.iterdir()):
            index = int(path.name.partition(".")[0]) if path.suffix == ".block" else None
            block = None if index is None else self.read_block(index, path)
            files = [(record.fname, record.file) for record in block.records] if block else []
            if block and "changed" not in self.file_states(files):
                path.replace(self.block_path(index))
                there.add(index)
            elif path.suffix != ".damaged":
                path.unlink(missing_ok=True)
        return there

    def file_states(self, files: list[tuple[str, str | None]]) -> list[str]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda file: file_state(self.dataset.audio_dir, *file), files))

    def block_path(self, index: int) -> Path:
        return self.blocks / f"{index:05d}.{self.attempt}.block"

    def write_block(self, index: int, block: Block) -> None:
        packed = pack_block(block, self.digest)
        write_file(self.block_path(index), [packed], self.blocks)

    def read_block(self, index: int, path: Path | None = None) -> Block | None:
        """None where there is none that is whole, of this run and of these clips."""
        path = path or self.block_path(index)
        try:
            unpacked = unpack_block(path.read_bytes())
        except FileNotFoundError:
            return None
        if unpacked is None:
            path.replace(path.with_suffix(".damaged"))
            say(f"note: {path} was damaged; it is set aside as .damaged and made again")
            return None
        run_digest, block = unpacked
        names = [[clip.fname for clip in clips] for clips in self.dataset.blocks[index : index + 1]]
        is_ours = run_digest == self.digest and [[r.fname for r in block.records]] == names
        return block if is_ours else None

    def write_record(self, facts: dict) -> None:
        """The record: this run's identity and `facts`; of the latter the clips, a line each."""
        clips = ",\n".join("    " + json.dumps(c, ensure_ascii=False) for c in facts["clips"])
        rest = {key: value for key, value in facts.items() if key != "clips"}
        head = to_json({**self.run, **rest}, indent=2).removesuffix(b"\n}")
        tail = f',\n  "clips": [\n{clips}\n  ]\n}}\n'.encode(errors="backslashreplace")
        write_file(self.json, [head, tail], self.blocks)

    def remove(self, *paths: Path) -> None:
        """Remove files, and what was made from the CSV that they go with."""
        for path in (*paths, self.parquet, self.picture):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.listen, ignore_errors=True)

    def blocks_in_order(self) -> Iterator[Block]:
        for index in range(len(self.dataset.blocks)):
            block = self.read_block(index)
            if block is None:
                raise OSError(f"{self.block_path(index)} is gone or damaged")
            yield block

    def join(self, facts: dict) -> tuple[int, int]:
        """Write the final files from the blocks, last the record. Returns: clips done, failed."""
        records, counts, shape = [], np.zeros((1, NUM_CODES), int), []
        for block in self.blocks_in_order():
            records += block.records
            shape = shape or block.shape
            if block.counts:
                counts = counts + np.array(block.counts)
        failures = [(record.fname, record.error) for record in records if record.error]
        if failures:
            lines = map(csv_line, [("fname", "error"), *failures])
            lines = (line.encode(errors="backslashreplace") for line in lines)
            write_file(self.failed, lines, self.blocks)
        if len(failures) == len(records):
            self.remove(self.csv, self.summary)
            return 0, len(failures)
        lines = (block.lines for block in self.blocks_in_order())
        header = csv_line(columns(self.run["aggregate"], self.dataset, math.prod(shape)))
        write_file(self.csv, chain([header.encode()], lines), self.blocks)
        facts |= {
            "num_clips": len(records),
            "tokenized": len(records) - len(failures),
            "failed": len(failures),
            "token_shape": shape,
            "codes_in_use": (counts > 0).sum(axis=1).tolist(),
            "perplexity": perplexity(counts).round(1).tolist(),
        }
        text = summary({**self.run, **facts}, records, self.dataset)
        write_file(self.summary, [text.encode(errors="backslashreplace")], self.blocks)
        self.remove(*([] if failures else [self.failed]))
        clips = [[record.fname, record.file, record.error] for record in records]
        overwrite = self.record().get("overwrite")
        self.write_record({"finished": True, "overwrite": overwrite, **facts, "clips": clips})
        if not failures:  # else they stay, so that a rerun has to make those of failed clips alone
            shutil.rmtree(self.blocks, ignore_errors=True)
        return facts["tokenized"], len(failures)


def cautions(facts: dict, dataset: Dataset) -> list[str]:
    """What the summary begins with, where there is cause."""
    lines = []
    if facts["weights"] == UNTRAINED:
        lines += ["WARNING: untrained weights. These tokens rehearse the run and mean nothing.", ""]
    texts = (text for clip in dataset.clips for text in (clip.fname, clip.labels, *clip.extra))
    if formulas := sum(text[:1] in FORMULA for text in texts if text):
        what = f"{formulas} names or labels begin with = + - or @"
        lines += [f"WARNING: {what}, kept exact. Do not open the CSV in a spreadsheet program.", ""]
    return lines


def summary(facts: dict, records: list[Record], dataset: Dataset) -> str:
    """The text summary: what was made, from what, how, and where the time went."""
    done = [record for record in records if not record.error]
    n, audio_s, chunks = len(done), sum(r.duration_s for r in done), sum(r.num_chunks for r in done)
    rows, shape = chunks if facts["aggregate"] == "none" else n, facts["token_shape"]
    padding = [s for r in done if (s := facts["target_duration"] - r.duration_s) > 0]
    silent = [record.fname for record in done if record.silent]
    failed = f" (see failed_{dataset.stem}.csv)" if facts["failed"] else ""
    by = f", by {np.mean(padding):.2f} s on average" if padding else ""
    lines = [
        f"EnCodec tokens of {dataset.stem}",
        "",
        *cautions(facts, dataset),
        f"Samples processed: {n}",
        f"Failures: {facts['failed']}{failed}",
        f"Rows: {rows}",
        f"Average tokens per sample: {math.prod(shape) * rows / n:.1f}",
        f"Average duration: {audio_s / n:.2f} s",
        f"Total duration: {audio_s:.1f} s ({audio_s / 3600:.2f} h)",
        f"Average chunks per sample: {chunks / n:.2f}",
        f"Padded samples: {len(padding)}{by}",
        f"Silent samples: {len(silent)}" + ": " * bool(silent) + ", ".join(silent),
        "Token shapes (codebooks, frames):",
        f"  {tuple(shape)}: {rows} rows",
        "",
        "Codes of the chunks, before they are averaged:",
        *(
            f"  codebook {k}: {used} of {NUM_CODES} codes in use ({used / NUM_CODES:.1%}), "
            f"perplexity {even:.1f}"
            for k, (used, even) in enumerate(zip(facts["codes_in_use"], facts["perplexity"]))
        ),
        "",
        "Settings:",
        *(f"  {key}: {value}" for key, value in facts.items()),
        "",
        "Seconds of work, summed over clips, threads and runs:",
        f"  loading and resampling: {sum(r.load_s for r in records):.2f}",
        f"  encoding: {sum(r.encode_s for r in records):.2f}",
    ]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------- made from the CSV: pictures and more


def read_rows(path: Path) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """The CSV in parts: some rows without their tokens, and their codes [R, K, F]."""
    import pandas as pd

    names = pd.read_csv(path, nrows=0).columns
    tokens = [name for name in names if re.fullmatch(r"token_\d+", name)]
    types = dict.fromkeys(names.difference(tokens), str) | dict.fromkeys(tokens, np.uint16)
    types |= {"num_tokens": np.int32, "num_chunks": np.int32, "duration_sec": float}
    types |= {"chunk": np.int32, "start_sec": float} if "start_sec" in names else {}
    with pd.read_csv(path, dtype=types, keep_default_na=False, chunksize=BLOCK_CLIPS) as parts:
        for table in parts:
            shape = map(int, re.findall(r"\d+", table["token_shape"].iloc[0]))
            yield table.drop(columns=tokens), table[tokens].to_numpy().reshape(-1, *shape)


def write_parquet(output: Output) -> Path:
    """The rows again, with their tokens as one list column."""
    import pyarrow as pa
    from pyarrow import parquet

    temporary, writer = output.parquet.with_suffix(".tmp"), None
    for table, codes in read_rows(output.csv):
        rows = pa.Table.from_pandas(table, preserve_index=False)
        tokens = pa.array(list(codes.reshape(len(codes), -1)), pa.list_(pa.uint16()))
        rows = rows.append_column("tokens", tokens)
        writer = writer or parquet.ParquetWriter(temporary, rows.schema)
        writer.write_table(rows.cast(writer.schema))
    writer.close()
    temporary.replace(output.parquet)
    return output.parquet


def first_rows(path: Path) -> Iterator[tuple[pd.Series, np.ndarray]]:
    """Of each clip its first row: the cells, by name, and the codes [K, F]."""
    seen = set()
    for table, codes in read_rows(path):
        for (_, cells), row in zip(table.iterrows(), codes):
            if (clip := (cells["fname"], cells["labels"])) not in seen:
                seen.add(clip)
                yield cells, row.copy()


def first_chunk(settings: Settings, dataset: Dataset, fname: str) -> torch.Tensor | None:
    """A clip's first chunk as the model hears it, [C, T]; None where it cannot be read any more."""
    clip = load_clip(Clip(fname), replace(settings, device="cpu"), dataset.audio_dir)
    if clip.error:
        say(f"note: {fname} cannot be read any more: {clip.error}")
    return clip.chunks[0] if clip.chunks else None


@torch.no_grad()
def write_listening(settings: Settings, output: Output, model: EncodecModel) -> Path:
    """Pairs of WAV files for the first clips: their first chunk, and what their row decodes to."""
    model = model.cpu()
    shutil.rmtree(output.listen, ignore_errors=True)
    output.listen.mkdir()
    for i, (cells, codes) in enumerate(islice(first_rows(output.csv), settings.listen)):
        heard = first_chunk(settings, output.dataset, cells["fname"])
        if heard is None:
            continue
        frames = model.encode(heard[None])  # for the segments and their volumes
        codes = torch.from_numpy(codes.astype(np.int64))
        parts = codes.split([c.shape[2] for c, _ in frames], dim=1)
        scaled = [(part[None], scale) for part, (_, scale) in zip(parts, frames)]
        decoded = model.decode(scaled)[0, :, : heard.shape[1]]
        name = f"{i:03d}_{re.sub(r'[^A-Za-z0-9_-]', '_', Path(cells['fname']).stem)}"
        for kind, audio in {"heard": heard, "tokens": decoded}.items():
            sf.write(output.listen / f"{name}_{kind}.wav", audio.T.numpy(), model.sample_rate)
    return output.listen


def write_picture(settings: Settings, output: Output) -> Path:
    """Durations, chunks and codes in use; below, a short, a median and a long clip's tokens."""
    from matplotlib.figure import Figure

    record = output.record()
    rows = sorted(first_rows(output.csv), key=lambda row: row[0]["duration_sec"])
    shown = [rows[i] for i in dict.fromkeys([0, (len(rows) - 1) // 2, len(rows) - 1])]
    figure = Figure(figsize=(11, 8), layout="constrained")
    weights = record["weights_file"] or record["weights"]
    settled = f"{record['bandwidth']:g} kbps, aggregate {record['aggregate']}, weights {weights}"
    figure.suptitle(f"{record['dataset']}: {record['model']}, {settled}", parse_math=False)
    waves, maps = "defghi"[: len(shown)], "defghi"[len(shown) : 2 * len(shown)]
    panels = figure.subplot_mosaic(f"abc;{waves:.<3};{maps:.<3}", height_ratios=(2, 1, 2))
    draw_counts([panels[letter] for letter in "abc"], [clip for clip, _ in rows], record)
    for wave, tokens, row in zip(waves, maps, shown):
        draw_clip([panels[wave], panels[tokens]], row, settings, output.dataset)
    for letter, panel in panels.items():
        panel.set_title(letter, loc="left", fontweight="bold", fontsize="medium")
        panel.spines[["top", "right"]].set_visible(False)
    path = Path(settings.plot or output.picture)
    if settings.plot and STEMS[settings.dataset][1:] and not settings.metadata:
        path = path.with_stem(f"{path.stem}_{output.dataset.stem}")
    figure.savefig(path, dpi=150)
    return path


def draw_counts(panels: list[Axes], clips: list[pd.Series], record: dict) -> None:
    """How long the clips are, how many chunks they have, how the codes are used."""
    lengths, counts, books = panels
    blue, orange = "#0072b2", "#e69f00"
    lengths.hist([clip["duration_sec"] for clip in clips], bins=40, color=blue)
    lengths.set(xlabel="duration of a clip (s)", ylabel="clips")
    chunks = Counter(clip["num_chunks"] for clip in clips)
    counts.bar(chunks.keys(), chunks.values(), color=blue)
    counts.set(xlabel="chunks of a clip", ylabel="clips")
    numbers = np.arange(len(record["codes_in_use"]))
    books.bar(numbers - 0.2, record["codes_in_use"], 0.4, color=blue, label="codes in use")
    books.bar(numbers + 0.2, record["perplexity"], 0.4, color=orange, label="perplexity")
    books.set(xlabel="codebook", ylabel=f"of {NUM_CODES} codes")
    books.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    for axis in (lengths.yaxis, counts.xaxis, counts.yaxis, books.xaxis):
        axis.get_major_locator().set_params(integer=True)


def draw_clip(panels: list[Axes], row: tuple, settings: Settings, dataset: Dataset) -> None:
    """A clip's first chunk over the tokens of its row (see first_rows), with the padding shaded."""
    wave, tokens = panels
    clip, codes = row
    chunk_s = settings.target_duration
    heard = first_chunk(settings, dataset, clip["fname"])
    if heard is not None:
        wave.plot(np.linspace(0, chunk_s, heard.shape[1]), heard[0], color="black", linewidth=0.4)
    name, labels = (textwrap.shorten(clip[key], 40) for key in ("fname", "labels"))
    title = f"{name}, {clip['duration_sec']:.2f} s\n{labels}"
    wave.set_title(title, fontsize="small", parse_math=False)
    wave.set(xlim=(0, chunk_s), ylim=(-1, 1), yticks=(-1, 0, 1), ylabel="full scale")
    # Codes are names: the colours of near ones are far apart.
    shuffled = np.random.default_rng(0).permutation(NUM_CODES)[codes]
    look = {"cmap": "turbo", "vmin": 0, "vmax": NUM_CODES, "interpolation": "nearest"}
    tokens.imshow(shuffled, aspect="auto", extent=(0, chunk_s, len(codes) - 0.5, -0.5), **look)
    tokens.set(xlabel="time in the chunk (s)", ylabel="codebook")
    padded_from_s = min(clip["duration_sec"], chunk_s)
    for panel in panels:
        panel.axvspan(padded_from_s, chunk_s, color="0.5", alpha=0.4, linewidth=0)


# ---------------------------------------------------------------------------------------------- run


def together(function: Callable, *args: object, first: bool = False) -> object:
    """Call `function` in every process, or in the first one for all: what it returns.

    A UserError in one of torchrun's processes is raised in all, so that none waits for it.
    """
    result, error = None, None
    try:
        if RANK == 0 or not first:
            result = function(*args)
    except UserError as refusal:
        error = str(refusal)
    if WORLD_SIZE > 1:
        everyones = gather((result if first else None, error))
        result = everyones[0][0] if first else result
        error = next((error for _, error in everyones if error), None)
    if error:
        raise UserError(error)
    return result


def gather(value: object) -> list:
    """Every process's value, by rank."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def join_process_group() -> None:
    """Make torchrun's processes a gloo group, until they end.

    After a restart torchrun's store still holds the addresses of the processes that died (torch
    2.11): each attempt gets a prefix of its own. Nothing destroys the group: torch 2.6 then waits,
    with Python's lock in hand, for a thread that wants it.
    """
    patience, attempt = timedelta(days=30), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=patience))
    store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=patience
    )


def identity(settings: Settings, dataset: Dataset, weights: str) -> dict:
    """All that decides the rows, but for the audio: runs that agree in it may share blocks."""
    packages = ("torch", "torchaudio", "encodec", "soundfile", "numpy")
    decides = {f.name: getattr(settings, f.name) for f in fields(Settings) if f.metadata["decides"]}
    return {
        "dataset": dataset.stem,
        "dataset_csv_sha256": sha256_of(dataset.csv_path),
        **decides,
        "weights": weights,
        "device": settings.device.partition(":")[0],
        "block_clips": BLOCK_CLIPS,
        "versions": {"script": __version__, **{name: version(name) for name in packages}},
    }


def refuse_disagreement(outputs: list[Output]) -> None:
    """Raises UserError: torchrun's processes were started to make different rows."""
    ours = [
        {**o.run, "max_samples": len(o.dataset.clips), "output_dir": str(o.csv.parent)}
        for o in outputs
    ]
    for rank, theirs in enumerate(gather(ours)):
        pairs = zip_longest(theirs, ours, fillvalue={})
        if other := "".join(changes(found, wanted) for found, wanted in pairs):
            raise UserError(f"ranks {rank} and {RANK} have other settings or files:\n{other}")


def machine(device: str) -> str:
    """What the run's numbers were rounded on."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{(models or [platform.processor()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


class LogLines:
    """Where tqdm writes what is no terminal: a line of its own each, with the time."""

    def write(self, text: str) -> None:
        if text := text.strip():
            say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", RANK)

    def flush(self) -> None:
        pass


class Progress:
    """A bar on a terminal; in a log file a line every 30 s and at the end."""

    def __init__(self, stem: str, num_clips: int, settings: Settings) -> None:
        self.settings, self.started = settings, time.perf_counter()
        self.failed, self.chunks = 0, 0
        where = {"position": LOCAL_RANK}
        if not sys.stderr.isatty():
            text = "{desc}: {n_fmt} of {total_fmt} clips, {elapsed}, {remaining} left{postfix}"
            where = {"file": LogLines(), "mininterval": 30, "maxinterval": 60, "bar_format": text}
        name = stem + f" [rank {RANK}]" * (WORLD_SIZE > 1)
        self.bar = tqdm(total=num_clips, desc=name, unit="clip", delay=1e-9, **where)

    def update(self, clip: Clip) -> None:
        self.failed += bool(clip.error)
        self.chunks += clip.num_chunks
        audio_s = self.chunks * self.settings.target_duration  # padding included
        speed = audio_s / (time.perf_counter() - self.started)
        facts = f"{self.chunks} chunks, {speed:.0f} s of audio/s, {self.failed} failed"
        self.bar.set_postfix_str(facts, refresh=False)
        self.bar.update()
        if self.settings.debug:
            say(describe(clip))


def describe(clip: Clip) -> str:
    """A clip's line for --debug."""
    if clip.error:
        return f"{clip.fname} [{clip.labels}] FAILED: {clip.error}"
    middle = clip.codes[len(clip.codes) // 2]  # [K, F]
    codes = " ".join(map(str, middle[0, middle.shape[1] // 2 :][:8]))
    return (
        f"{clip.fname} [{clip.labels}] {clip.rate} Hz, {clip.duration_s:.3f} s, "
        f"chunks: {clip.num_chunks}, codes of the first codebook from the middle: {codes} ..., "
        f"loaded in {clip.load_s * 1e3:.1f} ms, encoded in {clip.encode_s * 1e3:.1f} ms "
        "(its share of its batches)"
    )


def make_blocks(todo: list[int], output: Output, encoder: Encoder, settings: Settings) -> None:
    """Tokenize the clips of the blocks in `todo`, and write each block when it is complete."""
    dataset = output.dataset
    blocks = [dataset.blocks[index] for index in todo]
    progress = Progress(dataset.stem, sum(map(len, blocks)), settings)
    clips = load_clips(chain.from_iterable(blocks), settings, dataset.audio_dir)
    encoded = encode_clips(clips, encoder, settings)
    try:
        for index, block in zip(todo, blocks):
            for clip in islice(encoded, len(block)):
                progress.update(clip)
            output.write_block(index, make_block(block, settings, encoder.model))
            for clip in block:
                clip.codes, clip.latents = None, []
    finally:
        encoded.close()
        clips.close()
        progress.bar.close()


def run(settings: Settings) -> int:
    """All that the command asks for. Returns the exit status."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(1)  # for every thread: no sum depends on the number of cores
    if WORLD_SIZE > 1:
        join_process_group()
    with ExitStack() as locks:
        settings = together(resolve_device, settings)
        datasets = together(find_datasets, settings)
        if WORLD_SIZE > 1:  # each node's first process downloads, the others find it there
            together(lambda: LOCAL_RANK == 0 and find_weights(settings))
        path = together(find_weights, settings)
        model, weights = together(load_model, settings, path)
        if weights == UNTRAINED:
            warning = "WARNING: UNTRAINED WEIGHTS. The tokens rehearse the run and mean nothing."
            say("\n".join(["=" * len(warning), warning, "=" * len(warning)]))
        runs = [(dataset, identity(settings, dataset, weights)) for dataset in datasets]
        outputs = [Output(settings.output_dir, *run) for run in runs]
        together(refuse_disagreement, outputs)
        attempts, plans = together(begin, outputs, settings, locks, first=True)
        encoder = Encoder(model, settings) if any(plans) else None
        statuses = []
        for output, attempt, todo in zip(outputs, attempts, plans):
            output.attempt = attempt
            if todo:
                make_blocks(todo[RANK::WORLD_SIZE], output, encoder, settings)
            gather(None)  # all blocks are there
            if RANK == 0:
                facts = {"weights_file": path and path.name, "machine": machine(settings.device)}
                statuses.append(finish(output, todo, settings, facts, model))
        return max(statuses, default=0)


def begin(
    outputs: list[Output], settings: Settings, locks: ExitStack
) -> tuple[list[str], list[list[int] | None]]:
    """Hold the outputs; the names of their attempts, what is to be made of each (Output.begin).

    --overwrite makes all of them anew, each once: where such a run was interrupted, its records
    have an id, and those that have it are gone on with.
    """
    for output in outputs:
        locks.enter_context(output.locked())
    records = [output.record() or {} for output in outputs]
    states = [output.state(output.record()) for output in outputs]
    begun = [r.get("overwrite") for r, state in zip(records, states) if state == "unfinished"]
    overwrite = next(filter(None, begun), uuid.uuid4().hex) if settings.overwrite else None
    plans = [output.begin(overwrite) for output in outputs]
    for output, todo in zip(outputs, plans):
        num_clips = len(output.dataset.clips)
        if todo is None:
            say(f"{output.csv} is finished already ({num_clips} clips); --overwrite makes it anew")
        elif len(todo) < len(output.dataset.blocks):
            left = sum(len(output.dataset.blocks[index]) for index in todo)
            say(f"going on after {num_clips - left} of {num_clips} clips")
    return [output.attempt for output in outputs], plans


def finish(
    output: Output, todo: list[int] | None, settings: Settings, facts: dict, model: EncodecModel
) -> int:
    """Write a dataset's final files, and what is made from them. Returns the exit status."""
    if todo is not None:
        done, failed = output.join(facts)
        if not done:
            say(f"error: none of the {failed} clips could be tokenized, see {output.failed}")
            return 1
        failures = f", {failed} failed (see {output.failed})" if failed else ""
        report(f"{output.csv}: {done} clips{failures}. Summary: {output.summary}")
    if settings.parquet:
        report(f"Parquet: {write_parquet(output)}")
    if settings.plot is not None:
        report(f"Picture: {write_picture(settings, output)}")
    if settings.listen:
        report(f"To listen: {write_listening(settings, output, model)}")
    return 0


def report(text: str) -> None:
    """Print a result. Where nobody can read it any more, the files are there all the same."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own). Returns the exit status.

    0: finished, failed clips listed. 1: nothing could be tokenized, or the run broke. 2: usage,
    dataset or weights not found, output that would be replaced. 130, 143: interrupted.
    """
    settings = parse_settings(argv)
    # tqdm's own is a semaphore, of which macOS and Python 3.14 say that it was left over.
    tqdm.set_lock(threading.RLock())
    for name in ("stdout", "stderr"):  # None where they were closed
        stream = getattr(sys, name) or open(os.devnull, "w")
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is none
            stream.reconfigure(errors="backslashreplace")  # names that are no UTF-8
        setattr(sys, name, stream)

    def interrupt(number: int, _: object) -> None:
        raise Interrupted(128 + number)

    previous = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        return run(settings)
    except Interrupted as interrupted:
        say("interrupted; the finished blocks are kept: the same command goes on after them")
        return interrupted.args[0]
    except UserError as error:
        status, message = 2, str(error)
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        status, message = 1, f"{type(error).__name__}: {error}\nThe finished blocks are kept: "
        message += "the same command goes on after them (--debug shows a traceback)"
    finally:
        torch.set_num_threads(THREADS)
        for number, handler in previous.items():
            signal.signal(number, handler)
    say(f"error: {message}", RANK if status == 1 else 0)  # refusals are every process's
    return status


def leave(status: int) -> None:
    """End the process at once, with all that was printed.

    To tidy up takes PyTorch most of a second, and threads may be encoding for longer. With %run the
    process is a notebook's, which goes on.
    """
    if "IPython" in sys.modules:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
