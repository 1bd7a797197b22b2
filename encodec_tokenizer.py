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

The file reads in the order that the data flows: command line -> dataset -> names -> clips ->
chunks -> weights -> codes -> blocks -> outputs. One idea holds it together: a **block** holds the
codes of 16 consecutive clips, and its file is named by a hash of everything that decides its bytes.
So a block that exists is right, whoever wrote it. A run makes the blocks that are missing; several
processes share them through the file system alone. CSV, summary, JSON, Parquet and picture are
views: they are written from the blocks and the dataset's CSV, and never from one another.
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
import threading
import time
import traceback
import uuid
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap

__version__ = "2.0.0"  # part of every block's name: raise it when codes or columns change

# ---------------------------------------------------------------------------------------- constants


@dataclass(frozen=True)
class ModelSpec:
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
NAME_COLUMNS = ("fname", "filename")
LABEL_COLUMNS = ("labels", "label", "category")
AGGREGATES = ("mean", "latent", "medoid", "none")
EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3")  # tried for names without one
BLOCK_CLIPS = 16
BLOCK_NAME = re.compile(r"\d{5,}-[0-9a-f]{16}\.npz")  # see Block.name_of
NUM_CODES = 1024  # entries of a codebook
UNTRAINED = "untrained (seed 0)"
PACKAGES = ("torch", "torchaudio", "encodec", "soundfile", "numpy", "torchcodec")
WINDOW_FLAGS = ("target_duration", "overlap", "aggregate")  # without a meaning for whole clips

# torchrun sets these for its processes. Without it, this process is the only one.
RANK, WORLD_SIZE = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)

# cuDNN's LSTM is deterministic only with this setting (PyTorch's page on torch.nn.LSTM), which has
# to be there before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")


class UserError(Exception):
    """The user has to change something first: the message is printed as it is, exit status 2."""


class RunError(Exception):
    """The run cannot go on: the message is printed as it is, exit status 1."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. The argument is the exit status: 128 + the signal's number."""


# ------------------------------------------------------------------------------------- command line


def option(default: object, help: str, decides: bool = False, **options: object) -> object:
    """Declare a field of Settings: its default and its options for argparse.

    `decides` marks the settings that decide the codes. They are part of every block's name.
    """
    return field(default=default, metadata={"decides": decides, "help": help, **options})


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Make an argparse type: a number from `low` to `high`, both included."""

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

    dataset: str = option(
        "curated", "select the clips; sample: a dozen bundled ones", choices=STEMS
    )
    metadata: Path | None = option(
        None, "read any CSV of file names (and labels) instead", type=Path
    )
    audio_dir: Path | None = option(
        None, "name the folder of --metadata's files; alone: take every audio file in it", type=Path
    )
    input_dir: Path = option(
        Path("input"), "name the dataset's folder (Kaggle's or Zenodo's layout)", type=Path
    )
    output_dir: Path = option(
        Path("work/tokenized"), "name the folder for the CSV and its summary", type=Path
    )
    model: str = option(
        "encodec_24khz", "choose 24 kHz mono or 48 kHz stereo", True, choices=MODELS
    )
    bandwidth: float = option(6.0, "set kbps: 1.5 (24 kHz only), 3, 6, 12, 24", True, type=float)
    target_duration: float = option(
        2.0, "set the seconds of a chunk, 0.1 to 60", decides=True, type=SECONDS
    )
    overlap: float = option(
        0.1, "set the shared fraction of a chunk, 0 to 0.9", True, type=number(float, 0, 0.9)
    )
    whole: bool = option(False, "encode each clip in one piece, at its own length", decides=True)
    aggregate: str = option(
        "mean", "choose how a clip's chunks become a row", decides=True, choices=AGGREGATES
    )
    weights: str = option(
        "pretrained", "name a checkpoint file or a transformers folder; untrained: for rehearsals"
    )
    device: str = option("auto", "choose auto (CUDA if there is one), cpu, cuda or cuda:N")
    batch_size: int | None = option(
        None, "set the chunks of a batch (default: 8 s of audio; CUDA: 512 s)", True, type=COUNT
    )
    workers: int | None = option(
        None, "set the threads that read clips ahead (default: 2; CUDA: 8)", type=COUNT
    )
    max_duration: float = option(
        600.0, "let clips of more seconds fail", decides=True, type=number(float, 0.1, 1e6)
    )
    max_samples: int | None = option(None, "take only the first N rows (default: all)", type=COUNT)
    plot: str | None = option(
        None, "draw a picture too (matplotlib)", nargs="?", const="", metavar="FILE"
    )
    parquet: bool = option(False, "write Parquet too, tokens as one list column (pyarrow)")
    overwrite: bool = option(False, "replace a CSV that other settings or files have made")
    debug: bool = option(False, "print every clip, and tracebacks")

    @property
    def chunk_samples(self) -> int:
        return round(self.target_duration * MODELS[self.model].sample_rate)

    @property
    def hop_samples(self) -> int:
        return round(self.chunk_samples * (1 - self.overlap))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """Print one sentence and exit with status 2; argparse would print the usage first."""
        self.exit(2, f"error: {message}\n--help shows every flag.\n")


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Read the command line. A mistake ends in a sentence and exit status 2."""
    description, examples, _ = __doc__.split("\n\n", 2)
    parser = Parser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # Settings holds the defaults
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    for setting in fields(Settings):
        options = {key: value for key, value in setting.metadata.items() if key != "decides"}
        if "type" in options:
            options["metavar"] = options["type"].__name__.upper()
        if setting.default is False:
            options["action"] = "store_true"
        elif setting.default is not None:
            options["help"] += f" (default: {setting.default})"
        parser.add_argument(f"--{setting.name}", **options)
    given = vars(parser.parse_args(argv))
    settings = Settings(**given)
    if mistake := find_mistake(settings, given):
        parser.error(mistake)
    return settings


def find_mistake(settings: Settings, given: dict[str, object]) -> str | None:
    """Say which flags do not go together; `given` holds the flags of the command line."""
    bandwidths = MODELS[settings.model].bandwidths_kbps
    if settings.bandwidth not in bandwidths:
        offered = ", ".join(f"{kbps:g}" for kbps in bandwidths)
        return f"argument --bandwidth: {settings.model} offers {offered} kbps"
    if settings.metadata and settings.metadata.is_dir():
        return (
            f"argument --metadata: {settings.metadata} is a folder. Name a CSV, or tokenize every "
            f"audio file of the folder with  --audio_dir {settings.metadata}"
        )
    if settings.metadata and not settings.audio_dir:
        return "argument --metadata needs --audio_dir, the folder of its files"
    if settings.audio_dir and "dataset" in given:
        return "arguments --dataset and --audio_dir name two sets of clips; give one of them"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", settings.device):
        return "argument --device: choose from auto, cpu, cuda, cuda:N"
    if settings.plot and Path(settings.plot).suffix not in ("", ".png", ".pdf", ".svg"):
        return "argument --plot: the picture's name ends in .png, .pdf or .svg"
    folder = (settings.output_dir / (settings.plot or "")).parent
    if settings.plot and folder != settings.output_dir and not folder.is_dir():
        return f"argument --plot {settings.plot}: there is no such folder"
    if not 0 <= RANK < WORLD_SIZE:
        return f"RANK is {RANK} and WORLD_SIZE {WORLD_SIZE}: ranks count from 0 to WORLD_SIZE - 1"
    for name in WINDOW_FLAGS:
        if settings.whole and name in given:
            return f"argument --{name} has no meaning with --whole, which does not cut clips"
    for name, package in {"plot": "matplotlib", "parquet": "pyarrow"}.items():
        if name in given and not find_spec(package):
            return f"argument --{name} needs  pip install {package}"
    return None


def end_at_once(number: int, _: object) -> None:
    """Handle a signal while Python still imports."""
    os.write(2, b"interrupted before the run began\n")
    os._exit(128 + number)


def mending(torch_version: str, is_missing: bool) -> str:
    """Return pip's arguments that repair torch and torchaudio, or install a missing package."""
    bounds = '"torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"'
    release, _, build = torch_version.partition("+")
    if is_missing:
        return f'{bounds} "encodec>=0.1.1" numpy pandas tqdm soundfile'
    if build == "cpu":  # torchaudio has to come from the same index
        return f"--force-reinstall {bounds}"
    if [int(part) for part in re.findall(r"\d+", release)[:2]] < [2, 11]:
        return f"torchaudio=={release}"  # one for each torch
    return f"--upgrade {bounds}"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_at_once)
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
except (ImportError, OSError, RuntimeError) as error:
    # torchaudio does not load beside every torch, and fails with any of these three.
    found = {d.name: d.version for d in distributions() if d.name in PACKAGES[:3]}
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    sys.exit(
        f"error: the packages that this script needs do not load: {error}{cause}\n"
        f"Python: {sys.executable}. Installed: {found}. This command repairs it:\n"
        f"  pip install {mending(found.get('torch', ''), isinstance(error, ModuleNotFoundError))}"
    )


def say(message: str) -> None:
    """Print to stderr without tearing the progress bar; a closed stderr is no error."""
    with suppress(OSError):
        tqdm.write(message, file=sys.stderr)


def available_cores() -> int:
    """Count the cores that this process may use: its affinity and its container's quota."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = len(affinity(0))
    try:  # cgroup v2: microseconds of CPU time in a period, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


# Threads that encode on a CPU. torchrun sets OMP_NUM_THREADS to 1 unless the user has set it; each
# process then takes an equal share of the node.
wished = re.match(r"[1-9]\d*", os.environ.get("OMP_NUM_THREADS", ""))
THREADS = int(wished[0]) if wished else available_cores()
if WORLD_SIZE > 1 and THREADS == 1:
    THREADS = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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
    on_cpu = device == "cpu"
    batch_size = settings.batch_size or default_batch_size(settings, on_cpu)
    workers = settings.workers or (2 if on_cpu else 8)  # reading outruns encoding with few threads
    return replace(settings, device=device, batch_size=batch_size, workers=workers)


def default_batch_size(settings: Settings, on_cpu: bool) -> int:
    """Count in seconds of audio, so that long chunks take no more memory than short ones."""
    batch_s = 8 if on_cpu else 512  # CPU: see CpuEncoder
    if not settings.whole:
        return max(1, round(batch_s / settings.target_duration))
    if settings.model == "encodec_48khz":  # a batch of the model's own segments of 1 s
        return batch_s // 2
    return 1 if on_cpu else BLOCK_CLIPS  # on CUDA, clips of exactly one length share a batch


# ------------------------------------------------------------------------------------------ dataset


@dataclass(eq=False, slots=True)
class Clip:
    """One row of the dataset on its way to rows of the output."""

    fname: str
    labels: str = ""
    extra: tuple[str, ...] = ()  # cells of --metadata's further columns
    path: Path | None = None  # its file; None for an unusable name
    stamp: str = ""  # the file's size and time, or the reason why there is none (see read_stamp)
    is_gone: bool = False  # its file was there when the JSON was written, and is missing now
    ends_block: bool = False  # no batch reaches beyond this clip
    rate: int = 0  # Hz, of the file
    chunks: list[torch.Tensor] = field(default_factory=list)  # [C, T] each, until encoded
    codes: np.ndarray | None = None  # [N, K, F] of its N chunks, until the block is written
    latents: list[torch.Tensor] = field(default_factory=list)  # N of [D, F], where wanted
    rows: np.ndarray | None = None  # [R, K, F]: the codes of its rows
    # The rest is kept in its block, by the names in KEPT_FACTS.
    error: str = ""  # why it cannot be tokenized
    duration_s: float = 0.0  # of the file, before padding or resampling
    starts: list[int] = field(default_factory=list)  # of its chunks, samples at the model's rate
    silent: bool = False  # all samples are zero
    load_s: float = 0.0  # seconds to read and resample it
    encode_s: float = 0.0  # seconds of its batches, its share
    shape: tuple[int, ...] = (0,)  # of `rows`

    @property
    def num_chunks(self) -> int:
        return len(self.starts)


KEPT_FACTS = ("error", "duration_s", "starts", "silent", "load_s", "encode_s", "shape")


@dataclass(frozen=True)
class Dataset:
    stem: str  # the middle of the output files' names
    audio_dir: Path
    columns: tuple[str, ...]  # names of the clips' extra cells
    clips: list[Clip]  # in the CSV's order

    @cached_property
    def files_below(self) -> dict[str, list[str]]:
        """The files in subfolders of the audio folder: bare name -> paths relative to it."""
        found = defaultdict(list)
        for folder, _, names in os.walk(self.audio_dir):
            below = os.path.relpath(folder, self.audio_dir)
            for name in names:
                if below != ".":
                    found[name].append(f"{below}/{name}")
        return found


def find_datasets(settings: Settings) -> list[Dataset]:
    """Find the datasets that the command names. Raises UserError: see find_dataset, read_clips."""
    if settings.metadata:
        clips = read_clips(settings.metadata, settings, keep_extra=True)
        return [Dataset(settings.metadata.stem, settings.audio_dir, *clips)]
    if settings.audio_dir:
        return [list_folder(settings.audio_dir, settings.max_samples)]
    if settings.dataset == "sample":
        if not SAMPLE_DIR.is_dir():
            raise UserError(
                f"the sample comes with the repository, in {SAMPLE_DIR}: no such folder"
            )
        return [Dataset("sample", SAMPLE_DIR, *read_clips(SAMPLE_DIR / "sample.csv", settings))]
    return [find_dataset(settings, stem) for stem in STEMS[settings.dataset]]


def list_folder(folder: Path, max_samples: int | None) -> Dataset:
    """Take every audio file below a folder, sorted by path, labelled by the folder it lies in.

    Raises UserError: there is no such folder, or no audio file in it.
    """
    known = {f".{name.lower()}" for name in sf.available_formats()} - {".raw"}
    known |= {*EXTENSIONS, ".aif", ".aifc", ".oga", ".opus", ".snd", ".aac", ".m4a"}
    paths = sorted(
        path
        for path in folder.rglob("[!.]*")  # macOS leaves "._x.wav"
        if path.suffix.lower() in known and path.is_file()
    )
    if not paths:
        state = "no audio file lies below it" if folder.is_dir() else "no such folder"
        raise UserError(f"--audio_dir {folder}: {state}")
    names = [path.relative_to(folder) for path in paths]
    clips = [
        Clip(name.as_posix(), labels=(folder.resolve() / name).parent.name)
        for name in islice(names, max_samples)
    ]
    return Dataset(folder.resolve().name, folder, (), clips)


def find_dataset(settings: Settings, stem: str) -> Dataset:
    """Find a dataset's CSV and audio folder in `input_dir` or up to two folders below it.

    Kaggle names them train_curated.csv and train_curated/ (trn_curated/ in some copies), Zenodo
    (record 3612637) FSDKaggle2019.meta/train_curated_post_competition.csv and
    FSDKaggle2019.audio_train_curated/. Kaggle lists its test clips in sample_submission.csv. A
    folder that is gone is no error yet: the rows of a finished CSV do not need it.

    Raises UserError: there is no CSV, or it does not list clips.
    """

    def find(names: Iterable[str], wanted: Callable[[Path], bool]) -> list[Path]:
        patterns = [depth + name for depth in ("", "*/", "*/*/") for name in names]
        return [
            path for p in patterns for path in sorted(settings.input_dir.glob(p)) if wanted(path)
        ]

    kaggle_csv = "sample_submission.csv" if stem == "test" else f"{stem}.csv"
    layouts = {
        kaggle_csv: list(dict.fromkeys([stem, stem.replace("train_", "trn_")])),
        f"{stem}_post_competition.csv": [f"FSDKaggle2019.audio_{stem}"],
    }
    found = [
        (path, find(folders, Path.is_dir), folders[0])
        for csv_name, folders in layouts.items()
        for path in find([csv_name], Path.is_file)[:1]
    ]
    if not found:
        raise UserError(dataset_is_missing(settings, stem, layouts))
    csv_path, folders, name = next((one for one in found if one[1]), found[0])
    columns, clips = read_clips(csv_path, settings)
    # Some copies nest a folder in one of the same name: take the one with the clips.
    folders = folders or [settings.input_dir / name]
    holds = [sum(os.path.exists(folder / clip.fname) for clip in clips[:100]) for folder in folders]
    return Dataset(stem, folders[holds.index(max(holds))], columns, clips)


def dataset_is_missing(settings: Settings, stem: str, layouts: dict[str, list[str]]) -> str:
    looked = "\n".join(
        f"  {name} and {'/ or '.join(folders)}/" for name, folders in layouts.items()
    )
    return (
        f"no {stem} dataset. Looked in {settings.input_dir.resolve()}, and two folders deep, for\n"
        f"{looked}\n"
        "Get FSDKaggle2019 from https://zenodo.org/record/3612637 or from the Kaggle competition\n"
        "freesound-audio-tagging-2019, and name the folder that holds it with --input_dir.\n"
        "To try the tool without it: --dataset sample"
    )


def read_table(csv_path: Path) -> tuple[list[str], list[list[str]]]:
    """Read a CSV's header and rows. Raises UserError: it is no table in UTF-8, or it is empty."""
    problem = f"{csv_path} is not a comma-separated table in UTF-8"
    try:
        with csv_path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, skipinitialspace=True, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{problem}: {error}") from error
    lines = [cells for line in lines if any(cells := [cell.strip() for cell in line])]
    if not lines:
        raise UserError(f"{problem}: it is empty")
    header, *rows = lines
    if wide := next((row for row in rows if len(row) > len(header)), None):
        counts = f"{len(header)} columns in its header, {len(wide)} in the row of {wide[0]}"
        raise UserError(f"{problem}: {counts} (a comma in a label needs quotes)")
    return header, rows


def read_clips(
    csv_path: Path, settings: Settings, keep_extra: bool = False
) -> tuple[tuple[str, ...], list[Clip]]:
    """Read the names of a CSV's further columns, where they are kept, and the clips it lists.

    Repeated rows count once. Raises UserError: the CSV is no table in UTF-8, or lists no clips.
    """
    header, rows = read_table(csv_path)
    column = {name.lower(): name for name in reversed(header)}  # a capital is forgiven
    names = [column[name] for name in NAME_COLUMNS if name in column]
    label = next((column[name] for name in LABEL_COLUMNS if name in column), "labels")
    if not names:
        there = ", ".join(map(repr, header[:5]))
        marks = [mark for mark in (";", "\t") if mark in there or mark in header[0]]
        hint = "; its columns have to be separated by commas" if marks else ""
        raise UserError(f"{csv_path} has no column {' or '.join(NAME_COLUMNS)}, only {there}{hint}")
    if not rows:
        raise UserError(f"{csv_path} lists no clips: nothing follows its header")
    extra = [name for name in header if keep_extra and name not in (names[0], label)]
    wanted = [names[0], label, *extra]
    ours = {*row_cells(Clip(""), 0, replace(settings, aggregate="none"), ()), "tokens"}
    ours -= {names[0], label}
    taken = [
        name
        for name in dict.fromkeys(wanted)
        if name in ours or header.count(name) > 1 or re.fullmatch(r"token_\d+", name)
    ]
    if taken:
        raise UserError(
            f"{csv_path}: rename {', '.join(map(repr, taken))}: the output has such columns"
        )
    cells = (dict(zip(header, row)) for row in rows)
    listed = Counter(tuple(cell.get(name, "") for name in wanted) for cell in cells)
    if repeated := [row[0] for row, count in listed.items() if count > 1]:
        count = len(rows) - len(listed)
        say(f"note: {csv_path} repeats {count} rows; each is used once ({repeated[0]}, ...)")
    rows = islice(listed, settings.max_samples)
    return tuple(extra), [Clip(name, labels, tuple(rest)) for name, labels, *rest in rows]


# -------------------------------------------------------------------------------------------- names

# The system reports these errors about a file that is itself at fault. All others (no memory, too
# many open files, an I/O error, a stale mount) are the machine's: they stop the run.
CLIP_ERRNOS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ,
}  # fmt: skip
NO_FILE = "no such file"


def read_stamp(path: Path) -> str:
    """A file's size and modification time in whole seconds, or the reason why it has no stamp.

    tar and zip drop fractions of a second. Whether the file may be read belongs to the stamp,
    because chmod changes neither size nor time. Raises OSError: the machine is at fault.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "not a plain file"
        effective = os.access in os.supports_effective_ids
        if not os.access(path, os.R_OK, effective_ids=effective):
            return f"cannot be opened: {os.strerror(errno.EACCES)}"
        return f"{status.st_size} {status.st_mtime_ns // 10**9}"
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return NO_FILE
        if error.errno in CLIP_ERRNOS:
            return f"cannot be opened: {error.strerror}"
        raise


def has_file(stamp: str) -> bool:
    return stamp[:1].isdigit()


def locate(dataset: Dataset, fname: str) -> tuple[Path | None, str]:
    """Find a clip's file: its path and its stamp.

    The name may lack the extension (FSD50K's do), and a bare name may lie in one subfolder.
    """
    if not fname:
        return None, "the name is empty"
    if fname[0] in "/\\" or re.match("[A-Za-z]:", fname) or ".." in re.split(r"[/\\]", fname):
        return None, "the name leads outside the audio folder; not opened"
    if "\0" in fname:
        return None, "the name holds a NUL character"
    for extension in ("", *EXTENSIONS):
        path = dataset.audio_dir / (fname + extension)
        if (stamp := read_stamp(path)) != NO_FILE:
            return path, stamp
    below = [name for e in ("", *EXTENSIONS) for name in dataset.files_below.get(fname + e, [])]
    if len(below) > 1:
        return None, f"lies in several folders: {', '.join(sorted(below))}"
    path = dataset.audio_dir / (below or [fname])[0]
    return path, read_stamp(path)


def identity(settings: Settings, weights: str) -> dict:
    """Everything beside the clips that decides the bytes of a block."""
    ignored = WINDOW_FLAGS if settings.whole else ()
    decide = [f.name for f in fields(Settings) if f.metadata["decides"] and f.name not in ignored]
    return {
        **{name: getattr(settings, name) for name in decide},
        "weights": weights,
        "device": processor(settings.device),
        "versions": {"script": __version__, "libsndfile": sf.__libsndfile_version__, **versions()},
    }


def versions() -> dict[str, str]:
    """The versions of the packages that decide codes, where they are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # TorchCodec is optional
            found[package] = version(package)
    return found


def processor(device: str) -> str:
    """The kind of processor: another kind rounds in another way."""
    if device == "cpu":
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    return f"cuda, {torch.cuda.get_device_name(device)}"


@dataclass(eq=False)
class Block:
    """Consecutive clips whose codes lie in one file."""

    index: int
    clips: list[Clip]
    path: Path = Path()  # named by name_of

    def name_of(self, identity: dict) -> str:
        """The file's name: the index, and a hash of everything that decides the file's bytes."""
        decides = json.dumps([identity, [[clip.fname, clip.stamp] for clip in self.clips]])
        return f"{self.index:05d}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}.npz"


class Job:
    """One dataset's blocks and output files under the run's settings."""

    def __init__(self, settings: Settings, dataset: Dataset, weights: str) -> None:
        self.settings, self.dataset = settings, dataset
        self.identity = identity(settings, weights)
        self.folder, stem = settings.output_dir, dataset.stem
        self.csv = self.folder / f"tokenized_{stem}.csv"
        self.json = self.folder / f"tokenized_{stem}.json"
        self.summary = self.folder / f"summary_{stem}.txt"
        self.failed = self.folder / f"failed_{stem}.csv"
        self.parquet = self.folder / f"tokenized_{stem}.parquet"
        self.picture = self.folder / f"summary_{stem}.png"
        self.blocks_dir = self.folder / f"tokenized_{stem}.blocks"
        clips = dataset.clips
        self.blocks = [
            Block(i // BLOCK_CLIPS, clips[i : i + BLOCK_CLIPS])
            for i in range(0, len(clips), BLOCK_CLIPS)
        ]
        for block in self.blocks:
            block.clips[-1].ends_block = True
        self.name_blocks(self.read_record())

    def read_record(self) -> dict | None:
        """Read the JSON of the last finished run; None if there is none, or it is unusable."""
        try:
            record = json.loads(self.json.read_text(encoding="utf-8"))
            record["clips"] = [tuple(map(str, clip)) for clip in record["clips"]]
            if any(len(clip) != 3 for clip in record["clips"]):  # fname, stamp, error
                return None
            record["blocks"] = [*map(str, record["blocks"])]
            return record
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None

    def list_blocks(self) -> set[str]:
        """The names in the folder of blocks, which may hold others than ours."""
        try:
            return set(os.listdir(self.blocks_dir))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def name_blocks(self, record: dict | None) -> None:
        """Stamp every clip and name every block.

        A file that is gone counts as it was when the CSV was made, as long as its block is there or
        the CSV needs none. So nobody needs the audio of a finished run.
        """
        known, there = {}, self.list_blocks()
        if record:
            known = {fname: stamp for fname, stamp, _ in record["clips"] if has_file(stamp)}
            if self.csv.exists() and not self.settings.overwrite:
                there |= set(record["blocks"])

        def name(block: Block) -> None:
            now = []
            for clip in block.clips:
                clip.path, clip.stamp = locate(self.dataset, clip.fname)
                now.append(clip.stamp)
                clip.is_gone = not has_file(clip.stamp) and clip.fname in known
                if clip.is_gone:
                    clip.stamp = known[clip.fname]
            block.path = self.blocks_dir / block.name_of(self.identity)
            if block.path.name not in there:
                for clip, stamp in zip(block.clips, now):
                    clip.stamp = stamp
                block.path = self.blocks_dir / block.name_of(self.identity)

        with ThreadPoolExecutor(16) as pool:  # a network's file system answers many at once
            list(pool.map(name, self.blocks))

    def table_sha256(self) -> str:
        """The digest of all that the CSV takes from the dataset's own table."""
        cells = [[clip.fname, clip.labels, *clip.extra] for clip in self.dataset.clips]
        return hashlib.sha256(json.dumps([self.dataset.columns, cells]).encode()).hexdigest()

    def is_up_to_date(self) -> bool:
        """The CSV is there, and holds the rows that a run would write again."""
        record, names = self.read_record(), [block.path.name for block in self.blocks]
        if record is None or not self.csv.exists() or record["blocks"] != names:
            return False
        return record.get("table_sha256") == self.table_sha256()

    def is_finished(self) -> bool:
        """There is nothing to do: no row and no output is missing."""
        asked = self.settings
        if asked.overwrite or asked.parquet or asked.plot is not None:
            return False
        return self.summary.exists() and self.is_up_to_date()

    def refuse_to_lose_rows(self) -> None:
        """Raises UserError: a CSV is there, and what is wanted would change or lose rows of it."""
        clips = self.dataset.clips
        if self.settings.overwrite or not self.csv.exists():
            return
        record = self.read_record()
        dropped = Counter()
        if record is None:
            differs = f"  {self.json.name} does not say what made it\n"
        else:
            differs = changes(record, self.identity)
            known = {fname: stamp for fname, stamp, error in record["clips"] if not error}
            dropped = Counter(fname for fname, _, error in record["clips"] if not error)
            dropped -= Counter(clip.fname for clip in clips)
            if dropped:
                total = f"{len(record['clips'])} clips -> {len(clips)} clips"
                if len(clips) < len(record["clips"]):
                    total = f"--max_samples: {total}"
                differs += f"  {total}; rows would be lost: {some_of([*dropped])}\n"
            other = [c.fname for c in clips if known.get(c.fname, c.stamp) != c.stamp]
            if other:
                differs += f"  files that have changed or gone since: {some_of(other)}\n"
        if differs:
            ways_on = "Choose another --output_dir, or replace the CSV with --overwrite."
            if dropped or any(clip.is_gone for clip in clips):  # --overwrite would lose rows
                ways_on = "Choose another --output_dir, or bring the clips back."
            raise UserError(
                f"{self.csv} was made with other settings or files:\n{differs}{ways_on}"
            )

    def missing_blocks(self) -> list[Block]:
        """The blocks that have to be made.

        Raises UserError: the audio folder is gone; one of them has a clip whose file is gone, and
        its row would be lost; or the folder of the blocks cannot be used.
        """
        there = self.list_blocks()
        missing = [block for block in self.blocks if block.path.name not in there]
        audio_dir = self.dataset.audio_dir
        if missing and not (audio_dir.is_dir() and os.listdir(audio_dir)):
            state = "is empty; was it unmounted?" if audio_dir.is_dir() else "does not exist"
            raise UserError(f"the audio folder {audio_dir} {state}")
        lost = [c.fname for b in missing for c in b.clips if c.is_gone and has_file(c.stamp)]
        if lost:
            raise UserError(
                f"the blocks of {len(lost)} clips have to be made again, and the clips' files are "
                f"gone: {some_of(lost)}. Bring them back; {self.csv} stays as it is."
            )
        try:
            self.blocks_dir.mkdir(parents=True, exist_ok=True)
            writable = all(os.access(path, os.W_OK) for path in (self.folder, self.blocks_dir))
            reason = "" if writable else os.strerror(errno.EACCES)
        except OSError as error:
            reason = str(error)
        if reason:
            raise UserError(f"--output_dir {self.folder} cannot be used: {reason}")
        if len(missing) == len(self.blocks) and any(map(BLOCK_NAME.fullmatch, there)):
            say(
                f"note: {self.blocks_dir} holds blocks, and none fits this run: other settings, "
                "versions or files made them (copying may have changed the files' times)"
            )
        return missing


def some_of(names: list[str]) -> str:
    """Name the first three of a list, and the number of all."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def changes(found: dict, wanted: dict, indent: str = "  ") -> str:
    """List the differences, one per line. Flags have their names."""
    lines = ""
    for key, value in wanted.items():
        old = found.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            lines += changes(old, dict.fromkeys(old) | value, f"{indent}{key}: ")
        elif old != value:
            dashes = "--" if key in Settings.__dataclass_fields__ else ""
            lines += f"{indent}{dashes}{key}: {old} -> {value}\n"
    return lines


# -------------------------------------------------------------------------------------------- clips


class BadClip(Exception):
    """A clip cannot be tokenized. The message is its reason in failed_<stem>.csv."""


UNKNOWN_FORMAT = 1, 4  # libsndfile's errors: the format or the encoding is unknown
MACHINE_FAULTS = {2: errno.EIO, 17: errno.ENOMEM}  # libsndfile's: a system call or malloc failed
PIPED = 2**31 - 2**24  # bytes; programs that write to a pipe give sizes from here on
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # each byte's bits, reversed


class Stream(sf.SoundFile):
    """A file that is read without seeking, because some FLAC streams cannot seek."""

    def seekable(self) -> bool:
        return False


def read_audio(path: Path, channels: int, max_duration_s: float) -> tuple[torch.Tensor, int]:
    """Read a clip: samples [channels, T] in float32 at the file's own rate, and that rate in Hz.

    Raises BadClip: the file is at fault. OSError, MemoryError: the machine is at fault.
    """
    with path.open("rb") as file:
        try:
            samples, rate = decode_file(file, channels, max_duration_s)
        except (BadClip, sf.LibsndfileError) as error:
            file.seek(0)
            while file.read(2**20):  # raises an I/O error that libsndfile has hidden
                pass
            if isinstance(error, BadClip):
                raise
            samples, rate = decode_by_torchaudio(path, channels, max_duration_s, error)
    if samples.shape[1] == 0:
        raise BadClip("no samples: the file holds a header and no audio")
    if not samples.abs().max() < 1e6:  # NaN is not below anything
        raise BadClip("NaN, infinite or absurdly large samples; audio lies within -1 and 1")
    return samples, rate


def decode_file(file: BinaryIO, channels: int, max_duration_s: float) -> tuple[torch.Tensor, int]:
    """Read a file by libsndfile, after the checks that libsndfile leaves out for its format."""
    with Stream(file.fileno(), closefd=False) as audio:
        kind = audio.format
        if kind == "WAV" and audio.subtype.startswith("MPEG"):
            raise BadClip("an MP3 inside a WAV: libsndfile only estimates its length")
        if kind not in ("MP3", "OGG", "W64", "CAF") and audio.frames:
            return decode(audio, channels, max_duration_s)
    file.seek(0)
    data = bytearray(file.read())
    if kind == "MP3":
        return decode_mp3(data, channels, max_duration_s)
    if kind == "OGG":
        check_ogg(data)
    elif kind in ("W64", "CAF"):
        check_end(data, kind)
    elif kind in ("WAV", "WAVEX"):
        # A program that writes to a pipe may leave a size of 0 for the audio, and one for the file
        # that is 0 or ends there. libsndfile takes such audio to the file's end if that is 8.
        size = int.from_bytes(data[4:8], "little")
        at_audio = data[size : size + 8] == b"data\0\0\0\0"
        tagged = re.match(rb"TAG|ID3|id3 |LIST", data[size + 8 :])
        if size == 0 or (at_audio and not tagged):
            data[4:8] = b"\x08\0\0\0"
    with Stream(io.BytesIO(data)) as audio:
        return decode(audio, channels, max_duration_s)


def decode(audio: Stream, channels: int, max_duration_s: float) -> tuple[torch.Tensor, int]:
    """Read an open file to its end, in pieces, so that no wrong header reserves memory."""
    rate, promised = audio.samplerate, audio.frames
    if not 1_000 <= rate <= 1_000_000:
        raise BadClip(f"a sample rate of {rate} Hz is not plausible")
    knows_length = promised < 2**40  # a FLAC stream may say 2^48, an MP3 stream 2^63
    if knows_length and promised > max_duration_s * rate:
        raise BadClip(f"{promised / rate:.6g} s long, --max_duration is {max_duration_s:g} s")
    # libsndfile reduces the size of WAV (data), AIFF (SSND), AU and RF64 to what is there, and says
    # so only in its log.
    sizes = r"^ *(?:data|SSND|Data Size|Riff size) *: (\d+) \(should be (\d+)\)"
    for claimed, there in re.findall(sizes, audio.extra_info, re.MULTILINE):
        if int(there) < int(claimed) < PIPED:
            raise BadClip(f"truncated: {there} of {claimed} bytes of audio are there")
    pieces, length = [torch.empty(channels, 0)], 0
    frames = min(2**20 // audio.channels, promised + 1)  # libsndfile zeroes what it cannot fill
    while len(piece := audio.read(frames, dtype="float32", always_2d=True)):
        pieces.append(mix_channels(torch.from_numpy(piece.T), channels))
        length += len(piece)
        if length > max_duration_s * rate:
            raise BadClip(f"longer than --max_duration, which is {max_duration_s:g} s")
    if knows_length and length < promised:
        raise BadClip(f"truncated: {length} of {promised} samples are there")
    return torch.cat(pieces, dim=1), rate


def decode_mp3(data: bytes, channels: int, max_duration_s: float) -> tuple[torch.Tensor, int]:
    """Read an MP3 through a pipe: libsndfile then reads all and reports a truncated frame.

    In a file, it estimates the length from the size and stops there.
    """
    source, sink = os.pipe()
    threading.Thread(target=feed, args=(sink, data), daemon=True).start()
    with os.fdopen(source, "rb") as pipe:
        with Stream(source, closefd=False) as audio:
            samples, rate = decode(audio, channels, max_duration_s)
        rest = pipe.read()  # libsndfile stops without an error at what it does not understand
    if rest.startswith(b"APETAGEX"):
        rest = rest[32 + int.from_bytes(rest[12:16], "little") :]
    if rest.startswith(b"TAG"):  # ID3v1
        rest = rest[128:]
    if rest.strip(b"\0"):
        kinds = "damaged, several MP3s in one, or an MP3 of free format"
        raise BadClip(f"{kinds}: {len(rest)} bytes could not be read")
    return samples, rate


def feed(sink: int, data: bytes) -> None:
    """Write to a pipe until all is written or its reader has closed it."""
    with suppress(BrokenPipeError), os.fdopen(sink, "wb") as file:
        file.write(data)


def check_ogg(data: bytes) -> None:
    """Raise BadClip unless a file is one OGG stream of whole, undamaged pages (RFC 3533)."""
    at, flags = 0, 0
    while at < len(data):
        sizes = data[at + 27 : at + 27 + sum(data[at + 26 : at + 27])]
        page = bytearray(data[at : at + 27 + len(sizes) + sum(sizes)])
        checksum, page[22:26] = bytes(page[22:26]), bytes(4)
        # zlib's CRC-32 has OGG's polynomial, but inverts it and takes each byte's bits in reverse.
        crc = zlib.crc32(page.translate(MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if crc.to_bytes(4, "big").translate(MIRRORED) != checksum:
            raise BadClip(f"truncated or damaged: the OGG page at byte {at} has a wrong checksum")
        flags = page[5]
        if flags & 2 and at:
            raise BadClip("several OGG streams in one; only the first could be read")
        at += len(page)
    if not flags & 4:
        raise BadClip("truncated: the last OGG page is missing")


def check_end(data: bytes, kind: str) -> None:
    """Raise BadClip unless the audio of a W64 or CAF ends with the file, as libsndfile takes it."""
    name, header, padding, order = b"data", 0, 1, "big"
    if kind == "W64":  # its sizes include the header
        name, header = b"data\xf3\xac\xd3\x11\x8c\xd1\0\xc0O\x8e\xdb\x8a", 24
        padding, order = 0, "little"
    chunks = re.finditer(name + rb"(.{8})", data, re.DOTALL)
    ends = [chunk.end() - header + int.from_bytes(chunk[1], order) for chunk in chunks]
    if not any(len(data) - padding <= end <= len(data) for end in ends):
        raise BadClip("truncated, or its audio does not end with the file")


def decode_by_torchaudio(
    path: Path, channels: int, max_duration_s: float, error: sf.LibsndfileError
) -> tuple[torch.Tensor, int]:
    """Read a file by torchaudio.load if libsndfile's error says that the format is unknown.

    torchaudio needs TorchCodec and FFmpeg since 2.9. FFmpeg plays what is left of a damaged file.
    """
    reason = error.error_string.strip()
    if error.code in MACHINE_FAULTS:
        raise OSError(MACHINE_FAULTS[error.code], reason, str(path)) from error
    with path.open("rb") as file:
        if re.fullmatch(rb"[\t\n\r -~]+", file.read(4096)):
            raise BadClip("not audio: it holds text") from error
    if error.code not in UNKNOWN_FORMAT:
        damaged = "damaged, or of a kind that libsndfile cannot decode"
        raise BadClip(f"{damaged} ({reason})") from error
    try:
        samples, rate = torchaudio.load(path)
    except MemoryError:
        raise
    except Exception as other:  # any decoder's, or TorchCodec's absence
        if getattr(other, "errno", None) not in {None, *CLIP_ERRNOS}:
            raise
        if "allocate memory" in str(other):  # PyTorch's words for no memory
            raise
        reasons = " ".join(f"soundfile: {reason}; torchaudio: {other}".split())
        raise BadClip(f"not audio that can be read ({reasons})") from other
    duration_s = samples.shape[1] / rate
    if duration_s > max_duration_s:
        raise BadClip(f"{duration_s:.6g} s long, --max_duration is {max_duration_s:g} s")
    return mix_channels(samples, channels), rate


def mix_channels(samples: torch.Tensor, channels: int) -> torch.Tensor:
    """Return [C, T] as it is if C is `channels`, else the mean of all: [channels, T]."""
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
    """The chunks of `length` samples start every hop; the last is aligned to the clip's end."""
    starts = list(range(0, max(1, length - chunk + 1), hop))
    if starts[-1] + chunk < length:
        starts.append(length - chunk)
    return starts


def split_chunks(audio: torch.Tensor, settings: Settings) -> tuple[list[int], list[torch.Tensor]]:
    """Cut audio [C, T] into chunks [C, chunk], and say at which samples they start.

    Audio of at most one chunk is zero-padded at its end. Longer audio is not padded, and every
    sample is in a chunk. A whole clip is one chunk, as long as it is.
    """
    if settings.whole:
        return [0], [audio]
    chunk = settings.chunk_samples
    starts = chunk_starts(audio.shape[1], chunk, settings.hop_samples)
    audio = F.pad(audio, (0, max(0, chunk - audio.shape[1])))
    return starts, [audio[:, start : start + chunk] for start in starts]


def load_clip(clip: Clip, settings: Settings) -> Clip:
    """Read, resample and cut a clip: fills in its facts and its chunks, or why there are none.

    Raises RunError: the file has changed since the block was named. OSError: the machine's faults.
    """
    started, spec = time.perf_counter(), MODELS[settings.model]
    try:
        if not has_file(clip.stamp):
            raise BadClip(f"{NO_FILE}: {clip.path}" if clip.stamp == NO_FILE else clip.stamp)
        if clip.stamp.startswith("0 "):
            raise BadClip("empty file (0 bytes)")
        samples, clip.rate = read_audio(clip.path, spec.channels, settings.max_duration)
        clip.duration_s, clip.silent = samples.shape[1] / clip.rate, not samples.any()
        samples = samples.to(settings.device)
        audio = resampler(clip.rate, spec.sample_rate, settings.device)(samples)  # [C, T]
        clip.starts, clip.chunks = split_chunks(audio, settings)
    except BadClip as reason:
        clip.error = str(reason)
    except OSError as error:
        if error.errno not in CLIP_ERRNOS:
            raise
        clip.error = f"cannot be opened: {error.strerror}"
    if clip.path and read_stamp(clip.path) != clip.stamp:
        raise RunError(
            f"{clip.path} changed or disappeared during the run. Run the same command again."
        )
    clip.load_s = time.perf_counter() - started
    return clip


def one_core_pool(threads: int) -> ThreadPoolExecutor:
    """Threads of one core each, so that no sum depends on the number of cores."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def load_clips(clips: Iterable[Clip], settings: Settings) -> Iterator[Clip]:
    """Call load_clip in threads, in order; a few clips ahead, and none once 60 s are loaded."""
    pool, clips = one_core_pool(settings.workers), iter(clips)
    ahead: deque[tuple[Clip, Future]] = deque()
    try:
        while True:
            while len(ahead) <= 2 * settings.workers and sum(c.duration_s for c, _ in ahead) < 60:
                if (clip := next(clips, None)) is None:
                    break
                ahead.append((clip, pool.submit(load_clip, clip, settings)))
            if not ahead:
                return
            yield ahead.popleft()[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


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
            if settings.dataset == "sample" and not (settings.metadata or settings.audio_dir):
                return None
            raise UserError(
                f"the pretrained weights could not be downloaded from {ROOT_URL}{path.name}\n"
                f"Download that file elsewhere and copy it to {path},\n"
                "or name it with --weights FILE. For a rehearsal without it: --weights untrained"
            )
    elif path.is_dir():
        path /= "model.safetensors"
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file (nor is it pretrained or untrained)")
    checksum = path.stem[-8:]
    metas = path.name in [spec.checkpoint for spec in MODELS.values()]
    if metas and not (found := sha256_of(path)).startswith(checksum):
        raise UserError(
            f"{path} is damaged: its SHA-256 begins with {found[:8]}, not with the {checksum} of "
            "its name. Delete it, and run again or download it elsewhere."
        )
    return path


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def download(path: Path) -> bool:
    """Download one of Meta's checkpoints to `path`. Says why, and returns False, if that fails.

    torch.hub writes to a temporary name and renames, so several processes may download at once.
    """
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a cluster's firewall may swallow the request
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        url, checksum = ROOT_URL + path.name, path.stem[-8:]
        torch.hub.download_url_to_file(url, str(path), checksum, progress=LOCAL_RANK == 0)
        return True
    except (OSError, RuntimeError) as error:
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
        candidates = (state.get(key) for key in (name, *transformers_names(name)))
        tensor = next((t for t in candidates if getattr(t, "shape", None) == wanted.shape), None)
        if tensor is None:
            return None
        named[name] = tensor
    return named if len(named) == len(state) else None


def load_model(settings: Settings, path: Path | None) -> tuple[EncodecModel, str]:
    """Load the weights of `path` (None: untrained ones) into EnCodec at the chosen bandwidth.

    Returns the model, and the SHA-256 of the tensors that decide the codes, which is the same for
    every form of checkpoint.

    Raises UserError: not a checkpoint, one of another model, or unusable: NaN or all-zero
    codebooks.
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
                raise UserError(f"the weights in {path} are unusable: {name} has NaN or is all 0")
            digest.update(name.encode() + tensor.numpy().tobytes())
    model.set_target_bandwidth(settings.bandwidth)
    return model, UNTRAINED if path is None else digest.hexdigest()


@torch.no_grad()
def untrained_model(name: str) -> EncodecModel:
    """Seeded random weights, for rehearsals: rows of the right shape that mean nothing.

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


def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def elu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """ELU as max(x, exp(min(x, 0)) - 1).

    torch's own uses an expm1 that is several times slower for minutes at a time on some hosts. On
    Linux with AVX-512, NumPy's expm1 is Intel's SVML, which is faster than torch's exp.
    """
    out = torch.clamp(x, max=0, out=out)
    if has_avx512() and sys.platform == "linux":
        np.expm1(out.numpy(), out=out.numpy())
    else:
        out.exp_().sub_(1)
    return torch.maximum(x, out, out=out)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear; oneDNN computes it on CPUs with AVX-512, which MKL, the default, ignores on AMD."""
    if has_avx512() and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


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


class CpuEncoder:
    """EnCodec's encoder for a CPU: the convolutions segment by segment, the LSTM over a batch.

    A segment's activations fit the cache, and a batch's do not; the LSTM reads all its weights at
    every step, which the segments of a batch share. A batch is filled up with zeros to one fixed
    shape, so that codes do not depend on what they are encoded with. Batches of 4 x 2 s are as fast
    as larger ones.
    """

    lstm_frames = 1500  # a longer segment goes through the LSTM in pieces, to save memory

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
        # EnCodec's own module: it rounds less over 3,584 terms a sum, and costs little.
        self.last = model.encoder.model[-1]

    @staticmethod
    def residual_block(module: SEANetResnetBlock) -> Callable[[torch.Tensor, Tails], torch.Tensor]:
        shortcut = FastConv(module.shortcut, after_elu=False)
        wide, narrow = (FastConv(module.block[i], after_elu=True) for i in (1, 3))
        return lambda x, tails: shortcut(x, tails).add_(narrow(wide(x, tails), tails))

    def convolve(self, segment: torch.Tensor) -> torch.Tensor:
        """Turn [C, T] into the LSTM's input [F, 512].

        A causal model takes pieces of 50 frames or more, which fit the cache and need no more
        memory for longer segments; `tails` holds the inputs that each convolution needs from the
        piece before. The 48 kHz model looks ahead and normalizes over time: it takes one piece.
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
        """Turn B convolved segments [F, 512] of one length into the encoder's output [B, D, F]."""
        num_frames, fill = len(segments[0]), self.batch_size - len(segments)
        x, state = segments[0].new_empty(len(segments), 512, num_frames), None
        for at in range(0, num_frames, self.lstm_frames):
            part = slice(at, at + self.lstm_frames)
            piece = torch.stack([segment[part] for segment in segments], dim=1)  # [F, B, 512]
            piece = F.pad(piece, (0, 0, 0, fill))
            y, state = self.lstm(piece, state)
            x[:, :, part] = elu(y.add_(piece)).permute(1, 2, 0)[: len(segments)]
        return torch.cat([self.last(one[None]) for one in x])


class GpuEncoder:
    """EnCodec's own encoder on batches, for a GPU; on halves of them if memory is short."""

    def __init__(self, model: EncodecModel, batch_size: int) -> None:
        self.encoder, self.fits = model.encoder, batch_size

    def convolve(self, segment: torch.Tensor) -> torch.Tensor:
        return segment

    def latents(self, segments: list[torch.Tensor]) -> torch.Tensor:
        """Turn B segments [C, T] of one length into [B, D, F]."""
        while True:
            try:
                return torch.cat([self.encoder(b) for b in torch.stack(segments).split(self.fits)])
            except torch.OutOfMemoryError:
                if self.fits == 1:
                    raise
            self.fits = (min(self.fits, len(segments)) + 1) // 2
            say(f"note: out of GPU memory; the batches have {self.fits} chunks from now on")
            torch.cuda.empty_cache()


class Encoder:
    """Turns chunks into the codes that EncodecModel.encode gives, in less time."""

    def __init__(self, model: EncodecModel, settings: Settings) -> None:
        for module in model.encoder.modules():
            if hasattr(module, "weight_g"):  # fold the norm into the weight once, not every call
                torch.nn.utils.remove_weight_norm(module)
        model.encoder.to(settings.device)
        model.quantizer.to(settings.device)
        kind = CpuEncoder if settings.device == "cpu" else GpuEncoder
        self.inner, self.model, self.settings = kind(model, settings.batch_size), model, settings
        self.wants_latents = settings.aggregate in ("latent", "medoid")
        count = model.quantizer.get_num_quantizers_for_bandwidth(model.frame_rate, model.bandwidth)
        books = [layer.codebook for layer in model.quantizer.vq.layers[:count]]  # [1024, D] each
        self.codebooks = [(book, 2 * book, -book.pow(2).sum(1)) for book in books]

    def segments(self, chunk: torch.Tensor) -> list[torch.Tensor]:
        """Cut a chunk [C, T] as the model itself does; the codes of its segments follow each other.

        The 24 kHz model takes it in one piece, the 48 kHz model in segments of 1 s that overlap by
        1 % (EncodecModel.encode).
        """
        length = self.model.segment_length or chunk.shape[1]
        starts = range(0, chunk.shape[1], self.model.segment_stride or length)
        return [chunk[:, start : start + length] for start in starts]

    @torch.inference_mode()
    def convolve(self, segment: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Run a segment [C, T] through the convolutions; also returns the seconds that took."""
        started = time.perf_counter()
        if self.model.normalize:  # the loudness, as EncodecModel does
            mono = segment.mean(dim=0, keepdim=True)
            segment = segment / (1e-8 + mono.pow(2).mean(dim=1, keepdim=True).sqrt())
        return self.inner.convolve(segment), time.perf_counter() - started

    @torch.inference_mode()
    def codes(self, convolved: list[Future]) -> tuple[np.ndarray, torch.Tensor | None, float]:
        """Turn the results of `convolve` for B segments of one length into their codes.

        Returns codes [B, K, F]; latents [B, D, F] if they are wanted; seconds, a segment's share.
        """
        features, seconds = zip(*(future.result() for future in convolved))
        started = time.perf_counter()
        latents = self.inner.latents(list(features))
        codes = self.quantize(latents).cpu().numpy()
        latents = latents.cpu() if self.wants_latents else None
        return codes, latents, (sum(seconds) + time.perf_counter() - started) / len(features)

    def quantize(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, D, F] -> [B, K, F]: each codebook's code nearest to the residual of those before."""
        rows = latents.transpose(1, 2).reshape(-1, latents.shape[1])  # [B * F, D]
        codes = torch.cat([self.nearest(part) for part in rows.split(8192)], dim=1)  # [K, B * F]
        return codes.view(len(codes), len(latents), -1).transpose(0, 1)

    def nearest(self, residual: torch.Tensor) -> torch.Tensor:
        """[R, D] -> [K, R]"""
        codes = []
        for book, doubled, minus_squared in self.codebooks:
            # |x - e|^2 is least where 2 x.e - |e|^2 is greatest.
            nearest = linear(residual, doubled, minus_squared).max(dim=1).indices
            residual = residual - book[nearest]
            codes.append(nearest)
        return torch.stack(codes)


@dataclass(eq=False, slots=True)
class Segment:
    """A part of a chunk on its way through the encoder."""

    number: int  # in the order of arrival
    convolved: Future | None  # of Encoder.convolve; None in a batch, so that memory is freed
    batch: Future | None = None  # of Encoder.codes; None until its batch is closed
    place: int = 0  # in the batch


class Batches:
    """Collects segments of one length into batches, and starts the work on them.

    Every segment is convolved on a core of its own, and every `batch_size` of one length, in order,
    go through the LSTM and the codebooks together. A batch is closed only after as many more
    segments as there are threads, because its own are convolved by then and no thread waits for
    another. On CUDA one thread feeds the GPU.
    """

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        self.encoder, self.size = encoder, settings.batch_size
        self.threads = THREADS if settings.device == "cpu" else 1
        self.pool = one_core_pool(self.threads)
        self.queues: dict[int, deque[Segment]] = defaultdict(deque)  # by length, in no batch yet
        self.count = 0

    def add(self, samples: torch.Tensor) -> Segment:
        """Start on a segment [C, T], and on the batches that are due."""
        self.count += 1
        segment = Segment(self.count, self.pool.submit(self.encoder.convolve, samples))
        length = samples.shape[1] if self.size > 1 else 0  # batches of 1 are of any length
        self.queues[length].append(segment)
        full = self.size + self.threads
        for queue in self.queues.values():  # a rare length waits for two batches at most
            if queue and (len(queue) == full or self.count - queue[0].number >= 2 * full):
                self.close(queue)
        return segment

    def close(self, queue: deque[Segment]) -> None:
        segments = [queue.popleft() for _ in range(min(self.size, len(queue)))]
        codes = self.pool.submit(self.encoder.codes, [segment.convolved for segment in segments])
        for place, segment in enumerate(segments):
            segment.convolved, segment.batch, segment.place = None, codes, place

    def close_all(self) -> None:
        for queue in self.queues.values():
            while queue:
                self.close(queue)
        self.queues.clear()


def encode_clips(clips: Iterable[Clip], encoder: Encoder) -> Iterator[Clip]:
    """Encode the chunks of clips; yields the clips, with their codes, in their order.

    What is in flight is limited in seconds of audio, and a clip waits until its segments are all in
    batches. A block's last clip closes all batches, so batches depend on the block alone.
    """
    settings = encoder.settings
    batches = Batches(encoder, settings)
    most = 2 * (batches.threads + settings.batch_size) * settings.chunk_samples
    most = max(most, 30 * MODELS[settings.model].sample_rate)
    waiting: deque[tuple[Clip, list[list[Segment]], int]] = deque()  # segments, samples of a clip
    in_flight = 0  # samples
    try:
        for clip in clips:
            chunks = [[batches.add(s) for s in encoder.segments(chunk)] for chunk in clip.chunks]
            samples = sum(chunk.shape[1] for chunk in clip.chunks)
            clip.chunks = []  # memory: the segments are views of them
            waiting.append((clip, chunks, samples))
            in_flight += samples
            if clip.ends_block:
                batches.close_all()
            while in_flight - waiting[0][2] > most and is_batched(waiting[0][1]):
                in_flight -= waiting[0][2]
                yield with_codes(*waiting.popleft()[:2])
        batches.close_all()
        while waiting:
            yield with_codes(*waiting.popleft()[:2])
    finally:
        batches.pool.shutdown(wait=False, cancel_futures=True)


def is_batched(chunks: list[list[Segment]]) -> bool:
    return all(segment.batch for chunk in chunks for segment in chunk)


def with_codes(clip: Clip, chunks: list[list[Segment]]) -> Clip:
    """Give a clip the codes of its chunks, from its segments' batches."""
    codes = []
    for segments in chunks:
        results = [(*segment.batch.result(), segment.place) for segment in segments]
        codes.append(np.concatenate([codes[place] for codes, _, _, place in results], axis=1))
        if results[0][1] is not None:
            clip.latents.append(torch.cat([latents[at] for _, latents, _, at in results], dim=1))
        clip.encode_s += sum(seconds for _, _, seconds, _ in results)
    if codes:
        clip.codes = np.stack(codes)
    return clip


def load_encoder(settings: Settings) -> Encoder:
    """Find, load and set up the weights, for `tokenize`. Raises UserError: see find_weights."""
    settings = resolve_device(settings)
    return Encoder(load_model(settings, find_weights(settings))[0], settings)


def tokenize(path: str | Path, encoder: Encoder) -> np.ndarray:
    """Tokenize one audio file, as a run does.

    Returns codes [N, K, F], int64 within 0..1023: N chunks (1 with Settings(whole=True)), K
    codebooks, F frames; 75 frames are a second at 24 kHz.

    Raises BadClip: the file is missing, damaged, or no audio. OSError: the machine is at fault.
    """
    path = Path(path)
    clip = load_clip(Clip(path.name, path=path, stamp=read_stamp(path)), encoder.settings)
    if clip.error:
        raise BadClip(f"{path}: {clip.error}")
    (clip,) = encode_clips([clip], encoder)
    return clip.codes


# ------------------------------------------------------------------------------------------- blocks


def aggregate(clip: Clip, how: str, model: EncodecModel) -> np.ndarray:
    """Turn the codes of a clip's chunks into those of its rows [R, K, F]; R is 1 but for `none`.

    mean: the mean of the codes, rounded; with several chunks these are no codes of EnCodec's.
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
    if how == "latent":
        mean = mean.to(next(model.quantizer.buffers()).device)
        coded = model.quantizer.encode(mean, model.frame_rate, model.bandwidth)  # [K, 1, F]
        return coded.transpose(0, 1).cpu().numpy()
    raise ValueError(f"unknown aggregate: {how}")


def code_counts(clips: list[Clip]) -> np.ndarray:
    """Count how often each code occurs in the chunks of clips: [K, 1024]; [0, 1024] for none."""
    books = zip(*(clip.codes.swapaxes(0, 1) for clip in clips))  # K of [N, F] a clip
    counts = [
        np.bincount(np.concatenate([codes.ravel() for codes in book]), minlength=NUM_CODES)
        for book in books
    ]
    return np.array(counts, dtype=np.int64).reshape(-1, NUM_CODES)


@contextmanager
def replacing(path: Path, folder: Path) -> Iterator[Path]:
    """A temporary path in `folder`, which replaces `path` atomically if the body succeeds."""
    temporary = temporary_path(folder, path.suffix)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(folder: Path, suffix: str = "") -> Path:
    return folder / f"{uuid.uuid4().hex}.tmp{suffix}"


def sync(path: Path) -> None:
    """Wait until a file is on the disk, so that its new name is never there before its bytes."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_block(block: Block) -> None:
    """Write a block's codes, facts and counts of codes in one atomic step."""
    done = [clip for clip in block.clips if not clip.error]
    for clip in done:
        clip.shape = clip.rows.shape
    facts = [[getattr(clip, name) for name in KEPT_FACTS] for clip in block.clips]
    codes = [clip.rows.ravel() for clip in done]
    arrays = {
        "facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
        "codes": np.concatenate([*codes, []]).astype(np.uint16),
        "counts": code_counts(done),
    }
    with replacing(block.path, block.path.parent) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_block(block: Block) -> tuple[list[Clip], np.ndarray]:
    """Read a block: its clips with their facts and rows, and the counts [K, 1024] of their codes.

    Raises RunError: the block is damaged. It is removed, so that the next run makes it again.
    """
    data = block.path.read_bytes()  # the disk's errors are not damage
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            # ZipFile.read checks the CRC of a whole member; np.load on a path does not always.
            facts, codes, counts = (
                np.load(io.BytesIO(members.read(f"{name}.npy")))
                for name in ("facts", "codes", "counts")
            )
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive raises a dozen kinds
        block.path.unlink(missing_ok=True)
        raise RunError(
            f"{block.path} was damaged ({error}); it is removed. The same command makes it again."
        ) from error
    clips, at = [], 0
    for clip, kept in zip(block.clips, json.loads(facts.tobytes()), strict=True):
        clip = replace(clip, **dict(zip(KEPT_FACTS, kept)))
        clip.shape = tuple(clip.shape)
        clip.rows = codes[at : at + math.prod(clip.shape)].reshape(clip.shape)
        at += clip.rows.size
        clips.append(clip)
    return clips, counts


class LogLines:
    """Turns tqdm's output into lines of a log file, each with the time."""

    def write(self, text: str) -> None:
        if text := text.strip():
            say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def flush(self) -> None:
        pass


class Progress:
    """A bar on a terminal; in a log file a line every 30 s and at the end."""

    def __init__(self, job: Job, finished_clips: int) -> None:
        self.settings, self.started = job.settings, time.perf_counter()
        self.failed, self.chunks, self.audio_s = 0, 0, 0.0
        where = {"position": LOCAL_RANK}
        if not sys.stderr.isatty():
            text = "{desc}: {n_fmt} of {total_fmt} clips, {elapsed}, {remaining} left{postfix}"
            where = {"file": LogLines(), "mininterval": 30, "maxinterval": 60, "bar_format": text}
        name = job.dataset.stem
        if WORLD_SIZE > 1:
            name += f" [rank {RANK}]"
        total = len(job.dataset.clips)
        where |= {"initial": finished_clips, "delay": 1e-9}
        self.bar = tqdm(total=total, desc=name, unit="clip", **where)

    def update(self, clip: Clip) -> None:
        self.failed += bool(clip.error)
        self.chunks += clip.num_chunks
        self.audio_s += clip.duration_s
        speed = self.audio_s / (time.perf_counter() - self.started)
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


def in_own_order(blocks: list[Block]) -> list[Block]:
    """Order the blocks for this process: its own share first, then the others' to help them.

    The others' come from the last to the first, from a place that differs between processes, so
    that helpers meet their owners, and each other, late.
    """
    own = blocks[RANK::WORLD_SIZE]
    others = [b for i, b in enumerate(blocks) if i % WORLD_SIZE != RANK][::-1]
    place = len(others) * RANK // WORLD_SIZE
    return own + others[place:] + others[:place]


def make_blocks(job: Job, missing: list[Block], encoder: Encoder) -> None:
    """Tokenize the clips of the blocks that are missing when their turn comes.

    Raises RunError: a file has changed while the run was at work.
    """
    progress = Progress(job, len(job.dataset.clips) - sum(len(block.clips) for block in missing))
    at_work: deque[Block] = deque()  # from the loading of their first clip on

    def turns() -> Iterator[Clip]:
        wanted = set(missing)
        for block in in_own_order(job.blocks):
            if block not in wanted:
                continue
            if block.path.exists():  # another process has made it
                progress.bar.update(len(block.clips))
                continue
            at_work.append(block)
            yield from block.clips

    loaded = load_clips(turns(), job.settings)
    encoded = encode_clips(loaded, encoder)
    try:
        for clip in encoded:
            progress.update(clip)
            if not clip.error:
                clip.rows = aggregate(clip, job.settings.aggregate, encoder.model)
            if clip.ends_block:
                block = at_work.popleft()
                write_block(block)
                for clip in block.clips:
                    clip.codes, clip.latents, clip.rows = None, [], None
    except (Exception, Interrupted):
        kept = sum(len(block.clips) for block in job.blocks if block.path.exists())
        say(f"{kept} of {len(job.dataset.clips)} clips are kept; the same command resumes there")
        raise
    finally:
        encoded.close()
        loaded.close()
        progress.bar.close()


# ------------------------------------------------------------------------------------------ outputs


def row_cells(clip: Clip, row: int, settings: Settings, columns: tuple[str, ...]) -> dict:
    """The cells of a row before its tokens, by column. A new column is added here, and only here.

    `columns` are the names of the clip's extra cells.
    """
    frames = clip.shape[1:]  # (K, F)
    cells = {
        "fname": printable(clip.fname),
        "labels": printable(clip.labels),
        "num_tokens": math.prod(frames),
        "token_shape": str(tuple(frames)),
        "num_chunks": clip.num_chunks,
        "duration_sec": round(clip.duration_s, 6),
    }
    if settings.aggregate == "none":
        start = clip.starts[row] / MODELS[settings.model].sample_rate if clip.starts else 0.0
        cells |= {"chunk": row, "start_sec": round(start, 6)}
    return cells | dict(zip(columns, clip.extra))


def printable(text: str) -> str:
    """Escape the bytes of a file's name that are no UTF-8 (surrogates)."""
    return text.encode(errors="backslashreplace").decode()


def csv_line(cells: Iterable[object]) -> bytes:
    """A line of a CSV. (Python 3.11's csv module leaves a lone carriage return unquoted.)"""

    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text

    line = ",".join(quoted(str(cell)) for cell in cells)
    return printable(line).encode() + b"\n"


def code_texts(separator: str) -> np.ndarray:
    """The text of every code, with a separator behind it, padded with NUL: [1024]."""
    return np.array([f"{code}{separator}".encode() for code in range(NUM_CODES)])


COMMAS, SPACES = code_texts(","), code_texts(" ")


def token_text(codes: np.ndarray, texts: np.ndarray) -> bytes:
    """All codes in one line of text."""
    return texts[codes.ravel()].tobytes().translate(None, b"\0")[:-1]


class Totals:
    """Everything that the summary, the JSON and the picture say about all clips together."""

    def __init__(self) -> None:
        self.clips: list[Clip] = []  # without their rows
        self.counts = np.zeros((0, NUM_CODES), np.int64)  # [K, 1024] of the chunks' codes
        self.shapes: Counter[tuple[int, int]] = Counter()  # (K, F) of the rows

    def add(self, clips: list[Clip], counts: np.ndarray) -> None:
        """Add a block's clips, and drop their rows, which have been written."""
        self.shapes.update(clip.shape[1:] for clip in clips for _ in clip.rows)
        for clip in clips:
            clip.rows = None
        self.clips += clips
        if len(counts):
            self.counts = counts + (self.counts if len(self.counts) else 0)

    @cached_property
    def done(self) -> list[Clip]:
        return [clip for clip in self.clips if not clip.error]

    @cached_property
    def failures(self) -> list[Clip]:
        return [clip for clip in self.clips if clip.error]

    def facts(self) -> dict:
        shares = self.counts / self.counts.sum(axis=1, keepdims=True)
        logs = np.log(np.where(shares > 0, shares, 1))
        return {
            "num_clips": len(self.clips),
            "tokenized": len(self.done),
            "failed": len(self.failures),
            "token_shape": next(iter(self.shapes)) if len(self.shapes) == 1 else None,
            "codes_in_use": (self.counts > 0).sum(axis=1).tolist(),
            # This many codes, used equally often, would have the same entropy.
            "perplexity": np.exp(-(shares * logs).sum(axis=1)).round(1).tolist(),
        }


def write_csv(job: Job, path: Path) -> Totals:
    """Write the CSV from the blocks. Returns the totals; the file is empty if all clips failed."""
    totals, settings, has_header = Totals(), job.settings, False
    with path.open("wb") as file:
        for block in job.blocks:
            clips, counts = read_block(block)
            for clip in clips:
                for row, codes in enumerate(clip.rows):
                    cells = row_cells(clip, row, settings, job.dataset.columns)
                    if not has_header:
                        tokens = [f"token_{i}" for i in range(codes.size)]
                        file.write(csv_line([*cells, *(["tokens"] if settings.whole else tokens)]))
                        has_header = True
                    text = token_text(codes, SPACES if settings.whole else COMMAS)
                    file.write(csv_line(cells.values())[:-1] + b"," + text + b"\n")
            totals.add(clips, counts)
    return totals


def write_parquet(job: Job, path: Path) -> None:
    """Write the rows with their tokens as one list column of uint16."""
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    for block in job.blocks:
        clips = read_block(block)[0]
        rows = [(clip, row) for clip in clips for row in range(len(clip.rows))]
        if not rows:
            continue
        cells = [row_cells(clip, row, job.settings, job.dataset.columns) for clip, row in rows]
        tokens = pa.array([clip.rows[row].ravel() for clip, row in rows], pa.list_(pa.uint16()))
        table = pa.Table.from_pylist(cells).append_column("tokens", tokens)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def write_json(job: Job, path: Path, facts: dict, totals: Totals) -> None:
    """Write what made the CSV, and for each clip its file's stamp and why it failed, if it did."""
    content = {
        **facts,
        "table_sha256": job.table_sha256(),
        "blocks": [block.path.name for block in job.blocks],
    }
    clips = [json.dumps([clip.fname, clip.stamp, clip.error]) for clip in totals.clips]
    clips = ",\n".join(f"    {clip}" for clip in clips)
    head = json.dumps(content, indent=2).removesuffix("\n}")
    path.write_text(f'{head},\n  "clips": [\n{clips}\n  ]\n}}\n', encoding="utf-8")


def clip_figures(job: Job, totals: Totals) -> list[str]:
    """The summary's lines about clips, rows and durations."""
    done, settings = totals.done, job.settings
    audio_s = sum(clip.duration_s for clip in done)
    lengths = sorted(math.prod(shape) for shape in totals.shapes.elements())
    silent = [clip.fname for clip in done if clip.silent]
    failed = f" (see {job.failed.name})" if totals.failures else ""
    lines = [
        f"Samples processed: {len(done)}",
        f"Failures: {len(totals.failures)}{failed}",
        f"Rows: {len(lengths)}",
        f"Average tokens per sample: {sum(lengths) / len(done):.1f}",
        f"Tokens per row: {lengths[0]} to {lengths[-1]}, median {median(lengths):g}",
        f"Tokens in all: {sum(lengths)}",
        f"Average duration: {audio_s / len(done):.2f} s",
        f"Total duration: {audio_s:.1f} s ({audio_s / 3600:.2f} h)",
        f"Silent samples: {len(silent)}" + (f": {', '.join(silent)}" if silent else ""),
    ]
    if not settings.whole:
        missing = [settings.target_duration - clip.duration_s for clip in done]
        padding = [seconds for seconds in missing if seconds > 0]
        by = f", by {sum(padding) / len(padding):.2f} s on average" if padding else ""
        chunks = sum(clip.num_chunks for clip in done)
        lines += [
            f"Average chunks per sample: {chunks / len(done):.2f}",
            f"Padded samples: {len(padding)}{by}",
        ]
    lines += ["Token shapes (codebooks, frames), the most frequent first:"]
    lines += [f"  {shape}: {count} rows" for shape, count in totals.shapes.most_common(10)]
    if len(totals.shapes) > 10:
        lines += [f"  and {len(totals.shapes) - 10} more shapes"]
    return lines


def summary(job: Job, facts: dict, totals: Totals) -> str:
    """The text summary: what was made, from what, how, and where the time went."""
    lines = [f"EnCodec tokens of {job.dataset.stem}", ""]
    if facts["weights"] == UNTRAINED:
        lines += ["WARNING: untrained weights. These tokens rehearse the run and mean nothing.", ""]
    lines += [*clip_figures(job, totals), "", "Codes of the chunks, before they are averaged:"]
    for k, (used, even) in enumerate(zip(facts["codes_in_use"], facts["perplexity"])):
        share = f"{used} of {NUM_CODES} codes in use ({used / NUM_CODES:.1%})"
        lines += [f"  codebook {k}: {share}, perplexity {even:.1f}"]
    lines += ["", "Settings:", *(f"  {key}: {value}" for key, value in facts.items())]
    lines += [
        "",
        "Seconds of work, summed over clips and threads:",
        f"  loading and resampling: {sum(clip.load_s for clip in totals.clips):.2f}",
        f"  encoding: {sum(clip.encode_s for clip in totals.clips):.2f}",
    ]
    return "\n".join(lines) + "\n"


def write_outputs(job: Job, weights_file: str | None) -> int:
    """Write every output from the blocks, and replace the old ones when all are complete.

    Returns the exit status: 1 if no clip could be tokenized; an old CSV then stays as it is.
    """
    workplace = job.blocks_dir
    for stale in workplace.glob("*.tmp*"):
        with suppress(OSError):  # a younger one may belong to a living process
            if time.time() - stale.stat().st_mtime > 86_400:
                stale.unlink()
    new = {job.csv: temporary_path(workplace)}
    try:
        totals = write_csv(job, new[job.csv])
        if not totals.done:
            return report_no_rows(job, totals)
        made_by = {"weights_file": weights_file, "machine": machine(job.settings.device)}
        facts = {"dataset": job.dataset.stem, **job.identity, **made_by, **totals.facts()}
        stage_views(job, facts, totals, new)
        for temporary in new.values():
            sync(temporary)
        job.refuse_to_lose_rows()  # another run may have finished meanwhile
        put_in_place(job, new)
    finally:
        for temporary in new.values():
            temporary.unlink(missing_ok=True)
    counts = counts_of(job, [clip.error for clip in totals.clips])
    report(f"{job.csv}: {counts}. Summary: {job.summary}")
    for path, name in ((job.parquet, "Parquet"), (picture_path(job), "Picture")):
        if path in new:
            report(f"{name}: {path}")
    return 0


def stage_views(job: Job, facts: dict, totals: Totals, new: dict[Path, Path]) -> None:
    """Write the outputs beside the CSV to temporary paths. A new output is added here.

    `new` maps each output's path to its temporary one.
    """

    def stage(path: Path) -> Path:
        return new.setdefault(path, temporary_path(job.blocks_dir, path.suffix))

    write_json(job, stage(job.json), facts, totals)
    text = summary(job, facts, totals)
    stage(job.summary).write_bytes(text.encode(errors="backslashreplace"))
    if totals.failures:
        stage(job.failed).write_bytes(failure_lines(totals))
    if job.settings.parquet:
        write_parquet(job, stage(job.parquet))
    if job.settings.plot is not None:
        write_picture(job, facts, totals, stage(picture_path(job)))


def failure_lines(totals: Totals) -> bytes:
    failures = [(clip.fname, clip.error) for clip in totals.failures]
    return b"".join(map(csv_line, [("fname", "error"), *failures]))


def put_in_place(job: Job, new: dict[Path, Path]) -> None:
    """Rename the complete outputs over the old ones, the CSV last: a CSV that is there is whole."""
    views = [] if job.is_up_to_date() else [job.parquet, job.picture]  # of the old rows
    job.csv.unlink(missing_ok=True)
    for old in (job.failed, *views):
        if old not in new:
            old.unlink(missing_ok=True)
    for path in [*(path for path in new if path != job.csv), job.csv]:
        shutil.move(new[path], path)


def report_no_rows(job: Job, totals: Totals) -> int:
    """Say that all clips failed. List the reasons in failed_*.csv if there is no older CSV."""
    reasons = f"the first: {totals.failures[0].fname}: {totals.failures[0].error}"
    if job.csv.exists():
        reasons += f"; {job.csv} stays as it is"
    else:
        with replacing(job.failed, job.blocks_dir) as temporary:
            temporary.write_bytes(failure_lines(totals))
        reasons += f"; all: {job.failed}"
    say(f"error: none of the {len(totals.clips)} clips could be tokenized ({reasons})")
    return 1


def counts_of(job: Job, errors: list[str]) -> str:
    """Count the clips of a CSV. `errors` holds one for each clip, empty if it has rows."""
    num_failed = sum(map(bool, errors))
    failed = f", {num_failed} failed (see {job.failed})" if num_failed else ""
    return f"{len(errors)} clips: {len(errors) - num_failed} tokenized{failed}"


def machine(device: str) -> str:
    """The processor's name, for the JSON."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return models[0] if models else platform.processor()


def report(text: str) -> None:
    """Print a result. A closed stdout is no error: the files are there all the same."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ------------------------------------------------------------------------------------- the picture


def picture_path(job: Job) -> Path:
    """A relative name lies in --output_dir; a name without a suffix is a PNG."""
    if not job.settings.plot:
        return job.picture
    path = job.folder / job.settings.plot
    path = path if path.suffix else path.with_suffix(".png")
    several = len(STEMS[job.settings.dataset]) > 1
    if several and not (job.settings.metadata or job.settings.audio_dir):
        path = path.with_stem(f"{path.stem}_{job.dataset.stem}")
    return path


def write_picture(job: Job, facts: dict, totals: Totals, path: Path) -> None:
    """Draw durations, chunks and codes in use; below, a short, a median and a long clip's tokens.

    The figure is as wide as a page (7.2 in), with text of 8 pt, and PDFs hold TrueType fonts.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    done = sorted(totals.done, key=lambda clip: clip.duration_s)
    shown = [done[i] for i in dict.fromkeys([0, (len(done) - 1) // 2, len(done) - 1])]
    waves, maps = "defghi"[: len(shown)], "defghi"[len(shown) : 2 * len(shown)]
    weights = facts["weights_file"] or facts["weights"]
    how = "whole clips" if job.settings.whole else f"aggregate {job.settings.aggregate}"
    made = f"{facts['model']}, {facts['bandwidth']:g} kbps, {how}, weights {weights}"
    style = {"font.size": 8, "axes.titlesize": 8, "figure.titlesize": 9, "pdf.fonttype": 42}
    with rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 6.4), layout="constrained")
        figure.suptitle(f"{job.dataset.stem}: {made}", parse_math=False)
        panels = figure.subplot_mosaic(f"abc;{waves:.<3};{maps:.<3}", height_ratios=(2, 1, 2))
        draw_counts([panels[letter] for letter in "abc"], totals, facts, job.settings.whole)
        for wave, tokens, clip in zip(waves, maps, shown):
            draw_clip([panels[wave], panels[tokens]], clip, job)
        for letter, panel in panels.items():
            panel.set_title(letter, loc="left", fontweight="bold")
        part = "the clip" if job.settings.whole else "the clip's first chunk"
        figure.supxlabel(
            f"{waves[0]} to {waves[-1]}: {part}. {maps[0]} to {maps[-1]}: the codes of its (first) "
            "row. Grey is zero padding.\nColours tell codes apart and have no order.",
            fontsize=8,
        )
        figure.savefig(path, dpi=300)


def draw_counts(panels: list[Axes], totals: Totals, facts: dict, whole: bool) -> None:
    """Draw how long the clips are, how many chunks or frames they have, how codes are used."""
    lengths, counts, books = panels
    blue, orange = "#0072b2", "#e69f00"
    lengths.hist([clip.duration_s for clip in totals.done], bins=40, color=blue)
    lengths.set(xlabel="duration of a clip (s)", ylabel="clips")
    if whole:
        counts.hist([clip.shape[2] for clip in totals.done], bins=40, color=blue)
        counts.set(xlabel="frames of a clip", ylabel="clips")
    else:
        chunks = Counter(clip.num_chunks for clip in totals.done)
        counts.bar(chunks.keys(), chunks.values(), color=blue)
        counts.set(xlabel="chunks of a clip", ylabel="clips")
    numbers = np.arange(len(facts["codes_in_use"]))
    books.bar(numbers - 0.2, facts["codes_in_use"], 0.4, color=blue, label="in use")
    books.bar(numbers + 0.2, facts["perplexity"], 0.4, color=orange, label="perplexity")
    books.set(xlabel="codebook", ylabel=f"of {NUM_CODES} codes")
    books.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), handlelength=1)
    for axis in (lengths.yaxis, counts.xaxis, counts.yaxis, books.xaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def draw_clip(panels: list[Axes], clip: Clip, job: Job) -> None:
    """Draw a clip's first chunk over the codes of its first row, with the padding in grey."""
    wave, tokens = panels
    settings = replace(job.settings, device="cpu")
    chunk_s = clip.duration_s if settings.whole else settings.target_duration
    stamp = read_stamp(clip.path) if clip.path else clip.stamp  # it may be gone by now
    heard = load_clip(Clip(clip.fname, path=clip.path, stamp=stamp), settings)
    if heard.chunks:
        samples = heard.chunks[0][0]
        wave.plot(np.linspace(0, chunk_s, len(samples)), samples, color="black", linewidth=0.4)
    else:
        say(f"note: {clip.fname} cannot be drawn any more: {heard.error}")
    texts = [printable(text) for text in (clip.fname, clip.labels)]
    name, labels = (text if len(text) <= 26 else f"{text[:23]}..." for text in texts)
    wave.set_title(f"{name}, {clip.duration_s:.2f} s\n{labels}", parse_math=False)
    wave.set(xlim=(0, chunk_s), ylim=(-1, 1), yticks=(-1, 0, 1), ylabel="full scale")
    block = next(b for b in job.blocks if any(c.fname == clip.fname for c in b.clips))
    row = next(c for c in read_block(block)[0] if c.fname == clip.fname).rows[0]  # [K, F]
    look = {"cmap": code_colours(), "vmin": 0, "vmax": NUM_CODES - 1, "interpolation": "nearest"}
    tokens.imshow(row, aspect="auto", extent=(0, chunk_s, len(row) - 0.5, -0.5), **look)
    tokens.set(xlabel="time (s)", ylabel="codebook")
    tokens.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for panel in panels:
        start_s = min(clip.duration_s, chunk_s)
        panel.axvspan(start_s, chunk_s, color="0.5", alpha=0.4, linewidth=0)


def code_colours() -> ListedColormap:
    """A colour for each code; the numbers' neighbours look unlike each other.

    Hue, saturation and value follow the R3 sequence (powers of 1 / 1.2207, the root of
    x^4 = x + 1), which spreads points evenly.
    """
    from matplotlib.colors import ListedColormap, hsv_to_rgb

    hue, saturation, value = np.outer(1.2207 ** -np.arange(1.0, 4), np.arange(NUM_CODES)) % 1
    return ListedColormap(hsv_to_rgb(np.stack([hue, 0.3 + 0.7 * saturation, 0.4 + 0.6 * value], 1)))


# ---------------------------------------------------------------------------------------------- run


def run(settings: Settings) -> int:
    """Do all that the command asks for. Returns the exit status."""
    torch.set_num_threads(1)  # for every thread: no sum depends on the number of cores
    settings = resolve_device(settings)
    datasets = find_datasets(settings)
    weights_path = find_weights(settings)
    model, weights = load_model(settings, weights_path)
    jobs = [Job(settings, dataset, weights) for dataset in datasets]
    for job in jobs:  # before anything is made
        job.refuse_to_lose_rows()
    plans = [(job, None if job.is_finished() else job.missing_blocks()) for job in jobs]
    if weights == UNTRAINED and any(missing is not None for _, missing in plans):
        warning = "WARNING: UNTRAINED WEIGHTS. The tokens rehearse the run and mean nothing."
        say("\n".join(["=" * len(warning), warning, "=" * len(warning)]))
    encoder = Encoder(model, settings) if any(missing for _, missing in plans) else None
    weights_file = weights_path and weights_path.name
    return max(finish(job, missing, encoder, weights_file) for job, missing in plans)


def finish(
    job: Job, missing: list[Block] | None, encoder: Encoder | None, weights_file: str | None
) -> int:
    """Make a dataset's missing blocks (None: it is finished); the first process then writes all."""
    gone = [clip.fname for clip in job.dataset.clips if clip.is_gone and has_file(clip.stamp)]
    if gone:
        say(f"note: {len(gone)} clips' files are gone; their rows stay: {some_of(gone)}")
    if missing is None:
        errors = [error for _, _, error in job.read_record()["clips"]]
        say(f"{job.csv} is finished already: {counts_of(job, errors)}")
        return 0
    if missing:
        make_blocks(job, missing, encoder)
    return write_outputs(job, weights_file) if RANK == 0 else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own). Returns the exit status.

    0: finished, failed clips are listed. 1: nothing could be tokenized, or the run broke. 2: usage,
    dataset or weights not found, a CSV would lose rows. 130, 143: interrupted.
    """
    return run_guarded(parse_settings(argv))


def run_guarded(settings: Settings) -> int:
    """Call `run`; every error becomes a sentence and an exit status."""
    # tqdm's own lock is a semaphore, which macOS and Python 3.14 report as leaked.
    tqdm.set_lock(threading.RLock())
    for name in ("stdout", "stderr"):  # None if they were closed
        stream = getattr(sys, name) or open(os.devnull, "w")
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is none
            stream.reconfigure(errors="backslashreplace")  # for names that are no UTF-8
        setattr(sys, name, stream)

    def interrupt(number: int, _: object) -> None:
        for other in (signal.SIGINT, signal.SIGTERM):  # torchrun sends a second one
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(128 + number)

    previous = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        return run(settings)
    except Interrupted as interrupted:
        say("interrupted")
        return interrupted.args[0]
    except UserError as error:
        status, message = 2, str(error)
    except RunError as error:
        status, message = 1, str(error)
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        status, message = 1, f"{type(error).__name__}: {error} (--debug shows a traceback)"
    finally:
        torch.set_num_threads(THREADS)
        for number, handler in previous.items():
            signal.signal(number, handler)
    say(f"error: {message}")
    return status


def leave(status: int) -> None:
    """End the process at once, after all output.

    PyTorch takes most of a second to tidy up, and threads may encode for longer. With %run the
    process is a notebook's, which has to live on.
    """
    if "IPython" in sys.modules:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(run_guarded(SETTINGS))
