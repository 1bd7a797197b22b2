#!/usr/bin/env python3
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
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import distributions, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath

import filelock
import numpy as np
import pandas as pd
import soundfile as sf
from tqdm import tqdm

try:
    import torch
    import torch.nn.functional as F
    import torchaudio
    from encodec import EncodecModel
    from encodec.model import ROOT_URL
    from encodec.modules import SLSTM, SConv1d
    from encodec.modules.conv import pad1d
    from encodec.modules.seanet import SEANetResnetBlock
except (ImportError, OSError, RuntimeError) as error:
    # torchaudio refuses to load beside a torch it was not built for, with any of these three.
    found = {
        d.name: d.version for d in distributions() if d.name in ("torch", "torchaudio", "encodec")
    }
    sys.exit(
        f"error: torch, torchaudio and encodec do not load together: {error}\n"
        f"Installed: {found}. Versions that go together:\n"
        '  pip install "torch>=2.6,<2.12" "torchaudio>=2.6,<2.12" encodec'
    )

# ---------------------------------------------------------------------------------------- constants


@dataclass(frozen=True)
class ModelSpec:
    """What is known of an EnCodec model before it is built (encodec/model.py)."""

    build: Callable[..., EncodecModel]
    sample_rate: int  # Hz
    channels: int
    bandwidths_kbps: tuple[float, ...]
    checkpoint: str  # its name ends in the first 8 hex digits of its SHA-256


MODELS = {
    "encodec_24khz": ModelSpec(
        EncodecModel.encodec_model_24khz,
        24_000,
        1,
        (1.5, 3, 6, 12, 24),
        "encodec_24khz-d7cc33bc.th",
    ),
    "encodec_48khz": ModelSpec(
        EncodecModel.encodec_model_48khz, 48_000, 2, (3, 6, 12, 24), "encodec_48khz-7e698e3e.th"
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
NAME_COLUMNS, LABEL_COLUMNS = ["fname", "filename"], ["labels", "label", "category"]
COLUMNS = ["fname", "labels", "num_tokens", "token_shape", "num_chunks", "duration_sec"]
AGGREGATES = ["mean", "latent", "medoid", "none"]
EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3")  # tried for names without one
BLOCK_CLIPS = 64
FORMULA = ("=", "+", "-", "@")  # how a cell begins that a spreadsheet program would run
UNTRAINED = "untrained (seed 0)"

# What torchrun tells its processes; without it, this is the only one.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
# The cores of this process: torch's count, which heeds OMP_NUM_THREADS. torchrun sets that to 1
# where the user has not, so there it is an equal share of the machine.
THREADS = torch.get_num_threads()
if WORLD_SIZE > 1:
    THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class UserError(Exception):
    """Something that the user has to change first: printed as it is, exit status 2."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; its argument is the exit status, 128 + the signal's number."""


def say(message: str) -> None:
    """Print to stderr around the progress bar; of several processes, the first one speaks."""
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)


# ------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Settings:
    """The command line, checked; fields are flags. `device` is resolved: "cpu" or "cuda:N"."""

    dataset: str
    metadata: Path | None
    audio_dir: Path | None
    input_dir: Path
    output_dir: Path
    model: str
    bandwidth: float  # kbps
    target_duration: float  # seconds
    overlap: float  # fraction of a chunk
    aggregate: str
    weights: str
    device: str
    batch_size: int
    workers: int
    max_duration: float  # seconds
    max_samples: int | None
    listen: int
    plot: bool
    overwrite: bool
    debug: bool

    @property
    def chunk_samples(self) -> int:
        return round(self.target_duration * MODELS[self.model].sample_rate)

    @property
    def hop_samples(self) -> int:
        return round(self.chunk_samples * (1 - self.overlap))


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`, both included."""

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: from {low} to {high}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse says "invalid float value"
    return parse


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Read the command line. What cannot be meant ends in argparse's usage error, status 2."""
    description, examples, _ = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, default: object, help: str, **options: object) -> None:
        help += "" if default is None else " (default: %(default)s)"
        parser.add_argument(f"--{name}", default=default, help=help, **options)

    count, seconds = number(int, 1, 10**9), number(float, 0.1, 60)
    add("dataset", "curated", "which clips; sample: a dozen that come along", choices=[*STEMS])
    add("metadata", None, "instead: any CSV of file names (and labels)", type=Path, metavar="FILE")
    add("audio_dir", None, "where the files of --metadata lie", type=Path, metavar="DIR")
    add("input_dir", Path("input"), "the dataset, in Kaggle's or Zenodo's layout", type=Path)
    add("output_dir", Path("work/tokenized"), "where the CSV and its summary go", type=Path)
    add("model", "encodec_24khz", "24 kHz mono or 48 kHz stereo", choices=[*MODELS])
    add("bandwidth", 6.0, "kbps: 1.5 (24 kHz only), 3, 6, 12, 24", type=float)
    add("target_duration", 2.0, "seconds in a chunk, 0.1 to 60", type=seconds)
    add("overlap", 0.1, "fraction shared by neighbours, 0 to 0.9", type=number(float, 0, 0.9))
    add("aggregate", "mean", "how a clip's chunks become one row", choices=AGGREGATES)
    add("weights", "pretrained", "pretrained, untrained (rehearsal), or a checkpoint file")
    add("device", "auto", "auto (CUDA if there is one), cpu, cuda, cuda:N")
    add("batch_size", None, "chunks per batch (default: 32; CUDA: 256)", type=count)
    add("workers", None, "threads that read clips ahead (default: 2; CUDA: 8)", type=count)
    add("max_duration", 600.0, "seconds; longer clips fail", type=number(float, 0.1, 1e6))
    add("max_samples", None, "only the first N rows (default: all)", type=count, metavar="N")
    add("listen", 0, "also WAVs of what N rows keep", type=number(int, 0, 10**9), metavar="N")
    for flag, help in {
        "--plot": "also a picture of the tokens (needs matplotlib)",
        "--overwrite": "replace output that was made with other settings, or make it anew",
        "--debug": "print every clip, and tracebacks",
    }.items():
        parser.add_argument(flag, help=help, action="store_true")
    options = parser.parse_args(argv)

    bandwidths = MODELS[options.model].bandwidths_kbps
    if options.bandwidth not in bandwidths:
        offered = ", ".join(f"{kbps:g}" for kbps in bandwidths)
        parser.error(f"argument --bandwidth: {options.model} offers {offered} kbps")
    if bool(options.metadata) != bool(options.audio_dir):
        parser.error("arguments --metadata and --audio_dir go together")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", options.device):
        parser.error("argument --device: choose from auto, cpu, cuda, cuda:N")
    num_gpus = torch.cuda.device_count()
    if options.device == "auto":
        options.device = "cuda" if num_gpus else "cpu"
    if options.device == "cuda":
        options.device = f"cuda:{LOCAL_RANK}"
    on_cpu = options.device == "cpu"
    if not on_cpu and int(options.device[5:]) >= num_gpus:
        parser.error(f"argument --device: no {options.device}, PyTorch sees {num_gpus} CUDA GPUs")
    # A batch of 32: see FastEncoder. One thread reads 600 s of audio in 0.5 s, which two cores take
    # 12 s to encode (tests/benchmark.py): two readers never fall behind. CUDA's are not measured.
    options.batch_size = options.batch_size or (32 if on_cpu else 256)
    options.workers = options.workers or (2 if on_cpu else 8)
    return Settings(**vars(options))


# ------------------------------------------------------------------------------------------ dataset


@dataclass(frozen=True)
class Dataset:
    stem: str  # names the output files
    csv_path: Path
    audio_dir: Path
    clips: pd.DataFrame  # fname, labels; in the dataset's order


def find_dataset(settings: Settings, stem: str) -> Dataset:
    """Find a dataset's CSV and audio folder in `input_dir` or up to two folders below it.

    Kaggle names them train_curated.csv and train_curated/ (trn_curated/ in some copies), Zenodo
    (record 3612637) FSDKaggle2019.meta/train_curated_post_competition.csv and
    FSDKaggle2019.audio_train_curated/. Kaggle lists its test clips in sample_submission.csv.

    Raises UserError: no CSV or no folder, or a CSV that does not list clips.
    """
    if settings.metadata or stem == "sample":
        csv_path = settings.metadata or SAMPLE_DIR / "sample.csv"
        audio_dir = settings.audio_dir or SAMPLE_DIR
        if not audio_dir.is_dir():
            raise UserError(f"--audio_dir {audio_dir}: no such folder")
        return Dataset(stem, csv_path, audio_dir, read_clips(csv_path, settings.max_samples))

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
            clips = read_clips(csv_paths[0], settings.max_samples)
            # Some copies nest a folder in one of the same name: take the one with the clips.
            names = clips["fname"].head(100)
            holds = [sum(os.path.exists(folder / name) for name in names) for folder in folders]
            return Dataset(stem, csv_paths[0], folders[int(np.argmax(holds))], clips)
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


def read_clips(csv_path: Path, max_samples: int | None) -> pd.DataFrame:
    """The clips that a CSV lists: strings fname and labels. Repeated rows count once."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            table = pd.read_csv(
                csv_path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False
            )
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{csv_path} is not a comma-separated table in UTF-8: {reason}") from error
    names = [column for column in NAME_COLUMNS if column in table]
    labels = [column for column in LABEL_COLUMNS if column in table]
    if not names:
        there = ", ".join(map(repr, table.columns[:5]))
        hint = "; it seems to use semicolons, commas are needed" if ";" in there else ""
        raise UserError(f"{csv_path} has no column {' or '.join(NAME_COLUMNS)}, only {there}{hint}")
    if table.empty:
        raise UserError(f"{csv_path} lists no clips: nothing follows its header")
    clips = pd.DataFrame({"fname": table[names[0]], "labels": table[labels[0]] if labels else ""})
    repeated = clips.duplicated()
    if repeated.any():
        first = clips["fname"][repeated].iloc[0]
        say(f"note: {csv_path} repeats {repeated.sum()} rows, used once ({first}, ...)")
    return clips[~repeated].head(max_samples or len(clips)).reset_index(drop=True)


# -------------------------------------------------------------------------------------------- clips


@dataclass(eq=False)
class Clip:
    """One row of the dataset on its way to one row of the output."""

    index: int  # in the dataset
    fname: str
    labels: str
    error: str = ""  # why it cannot be tokenized
    rate: int = 0  # Hz, of the file
    duration_s: float = 0.0  # of the file, before padding or resampling
    silent: bool = False  # all samples are zero
    num_chunks: int = 0
    load_s: float = 0.0
    encode_s: float = 0.0  # its share of its batches
    codes: list[np.ndarray] = field(default_factory=list)  # one [K, F] a chunk
    latents: list[torch.Tensor] = field(default_factory=list)  # one [D, F] a chunk, where wanted


class BadClip(Exception):
    """Why a clip cannot be tokenized, in words for failed_<stem>.csv."""


def clip_path(audio_dir: Path, fname: str) -> Path:
    """Where a clip lies; its name may lack the extension (FSD50K's do).

    Raises BadClip: a name that leads out of the folder, or to no plain file.
    """
    if not fname:
        raise BadClip("the name is empty")
    for name in (PurePosixPath(fname), PureWindowsPath(fname)):
        if name.anchor or ".." in name.parts:
            raise BadClip("the name leads outside the audio folder; not opened")
    candidates = [audio_dir / (fname + extension) for extension in ("", *EXTENSIONS)]
    path = next(filter(os.path.exists, candidates), candidates[0])
    try:
        if not path.is_file():
            raise BadClip(
                "not a plain file" if path.exists() else f"no such file in {audio_dir.name}/"
            )
        if path.stat().st_size == 0:
            raise BadClip("empty file (0 bytes)")
    except (OSError, ValueError) as error:  # no permission; a name too long, or with a NUL
        raise BadClip(f"cannot be opened: {error}") from error
    return path


def load_clip(path: Path, channels: int, max_duration_s: float) -> tuple[torch.Tensor, int, float]:
    """Read a clip and mix it to the model's channels.

    soundfile first: libsndfile reads WAV, FLAC, OGG and MP3 with nothing to install. What it does
    not know goes to torchaudio.load, which since 2.9 needs TorchCodec and FFmpeg. Read in pieces,
    so that what a header claims reserves no memory.

    Returns samples [channels, T] in float32, at the file's own rate; that rate in Hz; seconds.
    Raises BadClip.
    """
    try:
        with sf.SoundFile(path) as file:
            rate, promised = file.samplerate, file.frames
            if not 1_000 <= rate <= 1_000_000:
                raise BadClip(f"a sample rate of {rate} Hz is not plausible")
            if promised > max_duration_s * rate:
                raise BadClip(
                    f"{promised / rate:.0f} s long, --max_duration is {max_duration_s:g} s"
                )
            # libsndfile cuts a WAV's length to what is there and says so in its log only. Sizes
            # near 2 GiB and above are what streaming writers leave that could not know better.
            claim = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
            if claim and int(claim[1]) < 2**31 - 2**20:
                raise BadClip(f"truncated: {claim[2]} of {claim[1]} bytes of audio are there")
            pieces = file.blocks(2**22 // file.channels, dtype="float32", always_2d=True)
            mixed = [mix_channels(torch.from_numpy(piece.T.copy()), channels) for piece in pieces]
            samples = torch.cat(mixed, dim=1) if mixed else torch.empty(channels, 0)
            if 0 < samples.shape[1] < promised:
                raise BadClip(f"truncated: {samples.shape[1]} of {promised} samples are there")
    except sf.LibsndfileError as error:
        try:
            samples, rate = torchaudio.load(path)
            samples = mix_channels(samples, channels)
        except Exception as second:  # any decoder's error, or TorchCodec's absence
            reasons = f"soundfile: {error}; torchaudio: {second}".replace(repr(str(path)), "it")
            raise BadClip(f"not audio that can be read ({' '.join(reasons.split())})") from second
    except (OSError, RuntimeError, ValueError) as error:
        raise BadClip(f"cannot be read: {error}") from error
    if samples.shape[1] == 0:
        raise BadClip("no samples: the file holds a header and no audio")
    if not samples.abs().max() < 1e6:  # so that NaN counts
        raise BadClip("NaN, infinite or absurdly large samples; audio lies within -1 and 1")
    return samples, rate, samples.shape[1] / rate


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


def prefetch(function: Callable, items: Iterable, threads: int, ahead: int) -> Iterator:
    """Map `function` over `items` in threads of one core each: in order, at most `ahead` ahead."""
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------------- chunks


def split_chunks(audio: torch.Tensor, chunk: int, hop: int) -> list[torch.Tensor]:
    """Cut [C, T] into pieces [C, chunk], one every `hop` samples, so that each sample is in one.

    Audio of at most one chunk is zero-padded at its end. Longer audio is not padded: where a tail
    is left, the last piece is aligned to the end.
    """
    length = audio.shape[1]
    if length <= chunk:
        return [F.pad(audio, (0, chunk - length))]
    starts = list(range(0, length - chunk + 1, hop))
    if starts[-1] + chunk < length:
        starts.append(length - chunk)
    return [audio[:, start : start + chunk] for start in starts]


@dataclass
class Batch:
    """Chunks of one block that are encoded together, in order, and the clip of each."""

    clips: list[Clip]
    chunks: torch.Tensor | None  # [B, C, chunk]; None where a block ends and no chunk is left
    closes: list[Clip]  # all clips of the block, in its last batch; else empty


def make_batches(
    todo: list[int], settings: Settings, dataset: Dataset, stage_s: Counter
) -> Iterator[Batch]:
    """Load, resample and chunk the clips of the blocks in `todo`; pack each block into batches."""
    spec, size = MODELS[settings.model], settings.batch_size

    def load(clip: Clip) -> tuple[Clip, torch.Tensor | None]:
        started, samples = time.perf_counter(), None
        try:
            path = clip_path(dataset.audio_dir, clip.fname)
            loaded = load_clip(path, spec.channels, settings.max_duration)
            samples, clip.rate, clip.duration_s = loaded
            clip.silent = not samples.any()
            if settings.device != "cpu":
                samples = samples.pin_memory()
        except BadClip as reason:
            clip.error = str(reason)
        clip.load_s = time.perf_counter() - started
        return clip, samples

    slices = (slice(index * BLOCK_CLIPS, (index + 1) * BLOCK_CLIPS) for index in todo)
    clips = (Clip(*row) for part in slices for row in dataset.clips.iloc[part].itertuples())
    block, owners, chunks = [], [], []
    for clip, samples in prefetch(load, clips, settings.workers, ahead=2 * settings.workers):
        stage_s["loading"] += clip.load_s
        block.append(clip)
        if samples is not None:
            started = time.perf_counter()
            samples = samples.to(settings.device, non_blocking=True)
            audio = resampler(clip.rate, spec.sample_rate, settings.device)(samples)  # [C, T]
            pieces = split_chunks(audio, settings.chunk_samples, settings.hop_samples)
            stage_s["resampling"] += time.perf_counter() - started
            clip.num_chunks = len(pieces)
            owners += [clip] * len(pieces)
            chunks += pieces
        while len(chunks) > size:
            yield Batch(owners[:size], torch.stack(chunks[:size]), [])
            del owners[:size], chunks[:size]
        if clip.index % BLOCK_CLIPS == BLOCK_CLIPS - 1 or clip.index == len(dataset.clips) - 1:
            yield Batch(owners, torch.stack(chunks) if chunks else None, block)
            block, owners, chunks = [], [], []


# ------------------------------------------------------------------------------------------ weights


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_weights(settings: Settings) -> Path | None:
    """The checkpoint to load, downloaded where need be; None for untrained weights.

    `pretrained` is Meta's file in torch hub's cache, where EncodecModel's own loader keeps it too.
    Where a name ends in 8 hex digits, as Meta's do, the file's SHA-256 must begin with them.

    Raises UserError: no such file, no download, another checksum.
    """
    if settings.weights == "untrained":
        return None
    path = Path(settings.weights).expanduser()
    if settings.weights == "pretrained":
        path = Path(torch.hub.get_dir(), "checkpoints", MODELS[settings.model].checkpoint)
        if not path.exists() and not download(path):
            if settings.dataset == "sample" and not settings.metadata:
                return None
            raise UserError(
                f"the pretrained weights could not be downloaded from {ROOT_URL}{path.name}\n"
                f"Download that file elsewhere and put it to {path},\n"
                "or name it with --weights FILE. For a rehearsal without it: --weights untrained"
            )
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file (nor is it pretrained or untrained)")
    checksum = re.search(r"-([0-9a-f]{8})$", path.stem)
    if checksum and not sha256_of(path).startswith(checksum[1]):
        raise UserError(
            f"{path} is damaged: its SHA-256 begins with {sha256_of(path)[:8]}, not with the "
            f"{checksum[1]} of its name. Delete it, and run again or download it elsewhere."
        )
    return path


def download(path: Path) -> bool:
    """Fetch one of Meta's checkpoints to `path`. Says why, and returns False, where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a cluster's firewall may swallow the request
    try:
        url, checksum = ROOT_URL + path.name, path.stem[-8:]
        torch.hub.download_url_to_file(url, str(path), checksum, progress=RANK == 0)
    except (OSError, RuntimeError) as error:
        say(f"{ROOT_URL}{path.name} could not be downloaded: {getattr(error, 'reason', error)}")
    finally:
        socket.setdefaulttimeout(patience)
    return path.exists()


def build_model(name: str) -> EncodecModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")
        return MODELS[name].build(pretrained=False)


def load_model(settings: Settings, path: Path | None) -> EncodecModel:
    """EnCodec with the weights of `path`, or untrained for None, at the chosen bandwidth.

    Raises UserError: not a checkpoint, or one of another model.
    """
    if path is None:
        model = untrained_model(settings.model)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has no list of what a foreign file makes it raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{path} is not a PyTorch checkpoint ({reason})") from error

        def fits(model: EncodecModel) -> bool:
            wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
            return isinstance(state, dict) and wanted == {
                name: getattr(tensor, "shape", None) for name, tensor in state.items()
            }

        model = build_model(settings.model)
        if not fits(model):
            others = [name for name in MODELS if fits(build_model(name))]
            hint = (
                f"those of {others[0]}: add --model {others[0]}"
                if others
                else "of no EnCodec model"
            )
            raise UserError(f"the weights in {path} are not {settings.model}'s; they are {hint}")
        model.load_state_dict(state)
    model.set_target_bandwidth(settings.bandwidth)
    return model


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


def elu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """ELU as max(x, exp(min(x, 0)) - 1).

    torch's own goes through expm1: encoding takes 1.05 times as long, and up to 2 to 3 times on
    hosts where vectorized expm1 is slow for minutes at a time.
    """
    out = torch.clamp(x, max=0, out=out).exp_().sub_(1)
    return torch.maximum(x, out, out=out)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, on CPUs with AVX-512 by oneDNN: PyTorch's default, MKL, leaves it unused on AMD.

    There this takes half the time, and encoding by MKL 1.3 times as long.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if has_avx512 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


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

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] after its ELU, reflected at both ends, to whole strides."""
        length, left, right = len(x), self.left, self.right + -len(x) % self.stride
        if length <= max(left, right):  # too short to reflect: EnCodec appends zeros first
            x = elu(x) if self.after_elu else x
            return pad1d(x.T[None], (left, right), "reflect")[0].T.contiguous()
        padded = x.new_empty(left + length + right, x.shape[1])
        body = padded[left : left + length]
        elu(x, out=body) if self.after_elu else body.copy_(x)
        padded[:left] = body[1 : left + 1].flip(0)
        padded[left + length :] = body[length - 1 - right : length - 1].flip(0)
        return padded

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [ceil(T / stride), C']"""
        if self.kernel == 1:
            y = linear(elu(x) if self.after_elu else x, self.weight, self.bias)
        elif self.kernel == 2 * self.stride:
            strides = self.pad(x).view(-1, self.stride * x.shape[1])
            y = linear(strides[:-1], self.weight[0], self.bias)
            y += linear(strides[1:], self.weight[1])
        else:
            y = F.conv2d(self.pad(x).T[None, :, None], self.weight, self.bias)[0, :, 0].T
        if self.norm is None:
            return y
        mean, flat = y.mean(), y.reshape(-1)  # GroupNorm of one group
        variance = (flat.dot(flat) / len(flat) - mean * mean).clamp(min=0)
        scale = self.norm.weight * torch.rsqrt(variance + self.norm.eps)
        return torch.addcmul(self.norm.bias - mean * scale, y, scale, out=y)


class FastEncoder:
    """EnCodec's encoder for a CPU: the convolutions chunk by chunk, the LSTM over the batch.

    A chunk's activations fit the cache, where a batch's do not; the LSTM reads all its weights at
    every step, which many chunks share: 53 ms a chunk by itself, 8.3 ms in batches of 32, 7.6 in
    64. Its batch is filled up with zeros to one fixed shape, so that a chunk's codes do not depend
    on what it is encoded with.
    """

    def __init__(self, model: EncodecModel, batch_size: int) -> None:
        self.batch_size = batch_size
        self.convolutions: list[Callable[[torch.Tensor], torch.Tensor]] = []
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
    def residual_block(module: SEANetResnetBlock) -> Callable[[torch.Tensor], torch.Tensor]:
        shortcut = FastConv(module.shortcut, after_elu=False)
        wide, narrow = (FastConv(module.block[i], after_elu=True) for i in (1, 3))
        return lambda x: shortcut(x).add_(narrow(wide(x)))

    def __call__(self, chunks: torch.Tensor) -> torch.Tensor:
        """[B, C, T] -> [B, D, F], as the model's own encoder."""
        features = []
        for chunk in chunks:
            x = chunk.T.contiguous()  # [T, C]
            for convolution in self.convolutions:
                x = convolution(x)
            features.append(x)  # [F, 512]
        x = torch.stack(features, dim=1)  # [F, B, 512]
        x = F.pad(x, (0, 0, 0, max(0, self.batch_size - len(chunks))))
        x = elu(x + self.lstm(x)[0]).permute(1, 2, 0)  # [B, 512, F]
        return torch.cat([self.last(one[None]) for one in x[: len(chunks)]])


# Chunks [B, C, T] -> their codes [B, K, F] and latents [B, D, F], the latter where they are wanted.
Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def make_encode(model: EncodecModel, settings: Settings) -> Encode:
    """A function from chunks to the codes that EncodecModel.encode gives, sooner.

    The 48 kHz model cuts a chunk into segments of 1 s that overlap by 1 %; their codes follow each
    other in F. On a CPU several threads may call it, each works on one core.
    """
    on_cpu = settings.device == "cpu"
    for module in model.encoder.modules():
        if hasattr(module, "weight_g"):  # fold the norm into the weight, once and not at every call
            torch.nn.utils.remove_weight_norm(module)
    model.encoder.to(settings.device)
    model.quantizer.to(settings.device)
    encoder = FastEncoder(model, settings.batch_size) if on_cpu else model.encoder
    quantizer = model.quantizer
    num_codebooks = quantizer.get_num_quantizers_for_bandwidth(model.frame_rate, model.bandwidth)
    books = [layer.codebook for layer in quantizer.vq.layers[:num_codebooks]]  # [1024, D] each
    tables = [(book, 2 * book, -book.pow(2).sum(1)) for book in books]

    def quantize(latents: torch.Tensor) -> torch.Tensor:
        """[N, D, F] -> [N, K, F]: per codebook the code nearest to what those before it left."""
        residual = latents.transpose(1, 2).reshape(-1, latents.shape[1])  # [N * F, D]
        codes = []
        for book, doubled, minus_squared in tables:
            # |x - e|^2 is least where 2 x.e - |e|^2 is greatest.
            nearest = linear(residual, doubled, minus_squared).max(dim=1).indices
            residual = residual - book[nearest]
            codes.append(nearest.view(len(latents), -1))
        return torch.stack(codes, dim=1)

    def latents_of(chunks: torch.Tensor) -> torch.Tensor:
        segment_samples = model.segment_length or chunks.shape[2]
        latents = []
        for start in range(0, chunks.shape[2], model.segment_stride or segment_samples):
            segment = chunks[:, :, start : start + segment_samples]
            if model.normalize:
                mono = segment.mean(dim=1, keepdim=True)
                segment = segment / (1e-8 + mono.pow(2).mean(dim=2, keepdim=True).sqrt())
            latents.append(encoder(segment))
        return torch.cat(latents, dim=2)

    wants_latents = settings.aggregate in ("latent", "medoid")
    fits = settings.batch_size

    @torch.inference_mode()
    def encode(chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        nonlocal fits
        while True:
            try:
                latents = [latents_of(part) for part in chunks.split(fits)]
                codes = torch.cat([quantize(part) for part in latents]).cpu()
                return codes, torch.cat(latents).cpu() if wants_latents else None
            except torch.OutOfMemoryError:
                if fits == 1:
                    raise
            fits = (fits + 1) // 2
            say(f"note: out of GPU memory; going on with batches of {fits} chunks")
            torch.cuda.empty_cache()

    return encode


# --------------------------------------------------------------------------------------------- rows


def aggregate(clip: Clip, how: str, model: EncodecModel) -> np.ndarray:
    """A clip's chunks as the codes of its rows [R, K, F]; one row, but for `none`.

    mean: of the codes, rounded; no codes of EnCodec's where there are several chunks.
    latent: the codes of the mean of the chunks' latents.
    medoid: the codes of the chunk whose latents are nearest to that mean (Euclidean).
    none: every chunk's codes.
    """
    codes = np.stack(clip.codes)  # [N, K, F]
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


def csv_line(cells: Iterable) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def columns(how: str, num_tokens: int) -> list[str]:
    """The CSV's header."""
    chunk = ["chunk"] if how == "none" else []
    return COLUMNS + chunk + [f"token_{i}" for i in range(num_tokens)]


def clip_rows(clip: Clip, how: str, rows: np.ndarray) -> list[bytes]:
    """A clip's lines of the CSV, from the codes [R, K, F] of its rows."""
    shape, duration_s = rows.shape[1:], round(clip.duration_s, 6)
    facts = [clip.fname, clip.labels, math.prod(shape), shape, clip.num_chunks, duration_s]
    chunk = [[i] if how == "none" else [] for i in range(len(rows))]
    return [csv_line(facts + chunk[i] + row.ravel().tolist()) for i, row in enumerate(rows)]


def shared_frames(model: EncodecModel, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """The frames that a chunk shares with the next one, hop_samples later: indices in each [S].

    A frame is shared where the next chunk has one within half a frame of it.
    """
    chunk, frame = settings.chunk_samples, int(model.encoder.hop_length)
    length = model.segment_length or chunk
    starts = range(0, chunk, model.segment_stride or length)
    times = np.concatenate([np.arange(s, min(s + length, chunk), frame) for s in starts])
    distances = np.abs(times[:, None] - (times + settings.hop_samples))  # [F, F]
    nearest = distances.argmin(axis=0)
    is_shared = distances.min(axis=0) <= frame / 2
    return nearest[is_shared], np.flatnonzero(is_shared)


def code_usage(codes: np.ndarray) -> np.ndarray:
    """[R, K, F] -> [K, 1024]: how often each code occurs."""
    return np.stack([np.bincount(k.ravel(), minlength=1024) for k in codes.swapaxes(0, 1)])


def block_rows(clips: list[Clip], settings: Settings, model: EncodecModel) -> tuple[list, dict]:
    """A finished block as the lines of its rows, and as facts for the summary.

    usage [K, 1024] is how often each code occurs in the rows; same [K], how often a frame that two
    neighbouring chunks share has the same code in both (the last chunk, off the grid, left out).
    """
    how, (ends, starts) = settings.aggregate, shared_frames(model, settings)
    lines, counts, usage, same = [], Counter(), np.zeros(1, int), np.zeros(1, int)
    for clip in clips:
        if clip.error:
            counts["failed"] += 1
            continue
        rows = aggregate(clip, how, model)
        lines += clip_rows(clip, how, rows)
        padding_s = max(0.0, settings.target_duration - clip.duration_s)
        formula = clip.fname[:1] in FORMULA or clip.labels[:1] in FORMULA
        pairs = list(zip(clip.codes[:-2], clip.codes[1:-1]))
        counts.update(tokenized=1, rows=len(rows), tokens=rows.size, chunks=clip.num_chunks)
        counts.update(audio_s=clip.duration_s, padded=int(padding_s > 0), padding_s=padding_s)
        counts.update({"formulas": int(formula), str(rows.shape[1:]): len(rows)})
        counts.update(shared_frames=len(pairs) * len(ends))
        usage = usage + code_usage(rows)
        same = same + sum((one[:, ends] == next_[:, starts]).sum(axis=1) for one, next_ in pairs)
    facts = {
        "num_clips": len(clips),
        "counts": counts,
        "failures": [(clip.fname, clip.error) for clip in clips if clip.error],
        "silent": [clip.fname for clip in clips if clip.silent],
        "usage": usage.tolist(),
        "same": same.tolist(),
    }
    return lines, facts


# -------------------------------------------------------------------------------------------- files


def write_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file whole or not at all: under another name, onto the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name == "posix":  # the new name is on the disk when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_json(path: Path, content: dict) -> None:
    write_file(path, [json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"])


def read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Output:
    """The files of one dataset, and its blocks on the way there.

    A block file is the SHA-256 of what follows on the first line, a JSON object (counts, seconds a
    stage, failures) on the second, then the CSV rows.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.csv = folder / f"tokenized_{stem}.csv"
        self.json = folder / f"tokenized_{stem}.json"
        self.summary = folder / f"summary_{stem}.txt"
        self.failed = folder / f"failed_{stem}.csv"
        self.picture = folder / f"summary_{stem}.png"
        self.listen = folder / f"listen_{stem}"
        self.blocks = folder / f"tokenized_{stem}.blocks"
        self.run = self.blocks / "run.json"  # what the unfinished run was started with, by whom
        self.lock = filelock.FileLock(self.blocks / "lock")

    def block(self, index: int) -> Path:
        return self.blocks / f"{index:05d}.block"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output against other runs; the lock dies with the process."""
        self.blocks.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout as error:
            owner = (read_json(self.run) or {}).get("owner", "another process")
            hint = "wait for it, or choose another --output_dir"
            raise UserError(f"{self.csv} is being made by {owner}: {hint}") from error
        try:
            yield
        finally:
            if not self.unfinished():
                shutil.rmtree(self.blocks, ignore_errors=True)
            self.lock.release()

    def unfinished(self) -> dict | None:
        """What an unfinished run was started with; None where there is none, or without a block."""
        return read_json(self.run) if any(self.blocks.glob("*.block")) else None

    def write_block(self, index: int, lines: list[bytes], facts: dict) -> None:
        body = json.dumps(facts, ensure_ascii=False).encode() + b"\n" + b"".join(lines)
        checksum = hashlib.sha256(body).hexdigest().encode() + b"\n"
        write_file(self.block(index), [checksum, body])

    def read_block(self, index: int, num_clips: int) -> tuple[dict, bytes] | None:
        """A block's facts and rows; None where there is none of so many clips that is whole."""
        path = self.block(index)
        if not path.exists():
            return None
        checksum, _, body = path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != checksum:
            path.replace(path.with_suffix(".damaged"))
            say(f"note: {path} was damaged; it is set aside as .damaged and made again")
            return None
        facts, _, rows = body.partition(b"\n")
        facts = json.loads(facts)
        return (facts, rows) if facts["num_clips"] == num_clips else None

    def settle(self, made_by: dict, num_clips: int, overwrite: bool) -> bool:
        """Compare what is here with what is to be made; False where it is made already.

        Removes leftover temporary files, and the blocks that --overwrite gives up.
        Raises UserError: going on would mix settings, or replace a finished file by another.
        """
        ways_on = "Replace it with --overwrite, or keep it and choose another --output_dir."

        def differences(found: dict) -> str:
            pairs = [(key, found.get(key), made_by[key]) for key in made_by]
            if found["num_clips"] > num_clips:
                pairs.append(("number of clips", found["num_clips"], num_clips))
            return "".join(f"  {key}: {old} -> {new}\n" for key, old, new in pairs if old != new)

        finished, unfinished = read_json(self.json), self.unfinished()
        changes = differences(unfinished) if unfinished else ""
        resumes = unfinished and not changes and unfinished["num_clips"] == num_clips
        if self.csv.exists() and not overwrite and not resumes:
            if finished and (other := differences(finished)):
                raise UserError(f"{self.csv} was made with other settings:\n{other}{ways_on}")
            if finished and finished["num_clips"] == num_clips:
                return False
            if not finished and not unfinished:
                raise UserError(f"{self.csv} is there, but not {self.json.name} with it. {ways_on}")
        if changes and not overwrite:
            what = f"{self.blocks} holds an unfinished run with other settings"
            raise UserError(f"{what}:\n{changes}{ways_on}")
        if changes or not unfinished:  # blocks without run.json: the last run was killed at its end
            for path in self.blocks.glob("*.block"):
                path.unlink()
        for path in (self.csv, self.json, self.summary, self.failed):
            path.with_name(path.name + ".tmp").unlink(missing_ok=True)
        for path in self.blocks.glob("*.tmp"):
            path.unlink()
        return True

    def join(self, sizes: list[int], made_by: dict, started: float) -> dict:
        """Write the final files from the blocks; the JSON, which says that all is there, last."""

        def read(index: int) -> tuple[dict, bytes]:
            block = self.read_block(index, sizes[index])
            if block is None:
                raise OSError(f"{self.block(index)} is gone or damaged")
            return block

        counts, stage_s, failures, silent = Counter(), Counter(), [], []
        usage, same = np.zeros(1), np.zeros(1)
        for index in range(len(sizes)):
            facts, _ = read(index)
            counts.update(facts["counts"])
            stage_s.update(facts["stage_s"])
            failures += facts["failures"]
            silent += facts["silent"]
            usage, same = usage + np.array(facts["usage"]), same + np.array(facts["same"])
        self.failed.unlink(missing_ok=True)
        if failures:
            write_file(self.failed, map(csv_line, [("fname", "error"), *failures]))
        results = {"num_clips": sum(sizes), **{key: counts[key] for key in ("tokenized", "failed")}}
        if counts["tokenized"]:
            header = csv_line(columns(made_by["aggregate"], counts["tokens"] // counts["rows"]))
            self.json.unlink(missing_ok=True)  # it speaks for the CSV that goes now
            write_file(self.csv, chain([header], (read(index)[1] for index in range(len(sizes)))))
            facts = {**made_by, **results}
            text = summary(facts, counts, stage_s, time.perf_counter() - started)
            text += health(counts, usage, same, silent)
            write_file(self.summary, [text.encode()])
            write_json(self.json, facts)
        self.run.unlink()
        return results


def perplexity(usage: np.ndarray) -> np.ndarray:
    """How many codes, used evenly, would be as varied as those counted in [K, 1024]: [K]."""
    share = usage / usage.sum(axis=1, keepdims=True)
    return np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum(axis=1))


def health(counts: Counter, usage: np.ndarray, same: np.ndarray, silent: list[str]) -> str:
    """What is in the tokens, for the summary. `usage` [K, 1024], `same` [K]: see block_rows."""
    lines = ["", "Token health:"]
    for k, (used, even) in enumerate(zip((usage > 0).sum(axis=1), perplexity(usage))):
        text = f"  codebook {k}: {used} of 1024 codes in use ({used / 1024:.1%})"
        lines.append(f"{text}, perplexity {even:.1f}")
        if counts["shared_frames"]:
            lines[-1] += f", same code in {same[k] / counts['shared_frames']:.1%} of shared frames"
    lines.append("  (shared frames: those that two neighbouring chunks of a clip both cover)")
    padded = f"Padded samples: {counts['padded']}"
    if counts["padded"]:
        padded += f", by {counts['padding_s'] / counts['padded']:.2f} s on average"
    names = f": {', '.join(silent)}" if silent else ""
    return "\n".join([*lines, padded, f"Silent samples: {len(silent)}{names}", ""])


def summary(facts: dict, counts: Counter, stage_s: Counter, wall_s: float) -> str:
    """The text summary: what was made, from what, how, and where the time went."""
    n, stem = counts["tokenized"], facts["dataset"]
    notes = []
    if facts["weights"] == UNTRAINED:
        notes += ["WARNING: untrained weights. These tokens rehearse the run and mean nothing.", ""]
    if counts["formulas"]:
        rows = f"{counts['formulas']} rows have a name or label that begins with = + - or @"
        notes += [f"WARNING: {rows}, kept exact. Do not open the CSV in a spreadsheet program.", ""]
    lines = [
        f"EnCodec tokens of {stem}",
        "",
        *notes,
        f"Samples processed: {n}",
        f"Failures: {counts['failed']}" + f" (see failed_{stem}.csv)" * bool(counts["failed"]),
        f"Rows: {counts['rows']}",
        f"Average tokens per sample: {counts['tokens'] / n:.1f}",
        f"Average duration: {counts['audio_s'] / n:.2f} s",
        f"Total duration: {counts['audio_s']:.1f} s ({counts['audio_s'] / 3600:.2f} h)",
        f"Average chunks per sample: {counts['chunks'] / n:.2f}",
        "Token shapes (codebooks, frames):",
        *(f"  {shape}: {count} rows" for shape, count in counts.items() if shape[0] == "("),
        "",
        "Settings:",
        *(f"  {key}: {value}" for key, value in facts.items()),
        "",
        "Seconds in each stage, summed over its threads:",
        *(f"  {stage}: {s:.2f}" for stage, s in stage_s.items()),
        f"Seconds of the last run, from start to end: {wall_s:.2f}",
    ]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------- pictures and listening


def first_chunk(settings: Settings, dataset: Dataset, fname: str) -> torch.Tensor:
    """A clip's first chunk as the model hears it: [C, T] at the model's rate. Raises BadClip."""
    spec, path = MODELS[settings.model], clip_path(dataset.audio_dir, fname)
    samples, rate, _ = load_clip(path, spec.channels, settings.max_duration)
    audio = resampler(rate, spec.sample_rate, "cpu")(samples)
    return split_chunks(audio, settings.chunk_samples, settings.hop_samples)[0]


def read_rows(path: Path) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """The CSV in parts: some rows, and their codes [R, K, F]."""
    options = {"dtype": {"fname": str}, "keep_default_na": False, "chunksize": BLOCK_CLIPS}
    for table in pd.read_csv(path, **options):
        shape = map(int, re.findall(r"\d+", table["token_shape"].iloc[0]))
        yield table, table.filter(regex=r"^token_\d+$").to_numpy().reshape(-1, *shape)


def first_rows(path: Path, num_clips: int) -> list[tuple[str, np.ndarray]]:
    """The first clips in the CSV: the name and the codes [K, F] of the first row of each."""
    rows: dict[str, np.ndarray] = {}
    for table, codes in read_rows(path):
        for fname, one in zip(table["fname"], codes):
            if len(rows) < num_clips:
                rows.setdefault(fname, one)
        if len(rows) == num_clips:
            break
    return list(rows.items())


@torch.no_grad()
def write_listening(
    settings: Settings, dataset: Dataset, output: Output, weights: Path | None
) -> None:
    """Pairs of WAV files for the first clips: their first chunk, and what their row decodes to."""
    model = load_model(settings, weights)
    output.listen.mkdir(exist_ok=True)
    for i, (fname, codes) in enumerate(first_rows(output.csv, settings.listen)):
        try:
            heard = first_chunk(settings, dataset, fname)
        except BadClip as reason:
            say(f"note: {fname} cannot be heard: {reason}")
            continue
        frames = model.encode(heard[None])  # for the segments and their volumes
        parts = torch.from_numpy(codes).split([c.shape[2] for c, _ in frames], dim=1)
        scaled = [(part[None], scale) for part, (_, scale) in zip(parts, frames)]
        decoded = model.decode(scaled)[0, :, : heard.shape[1]]
        name = f"{i:03d}_{re.sub(r'[^A-Za-z0-9_-]', '_', Path(fname).stem)}"
        for kind, audio in {"heard": heard, "tokens": decoded}.items():
            sf.write(output.listen / f"{name}_{kind}.wav", audio.T.numpy(), model.sample_rate)


def write_picture(settings: Settings, dataset: Dataset, output: Output) -> None:
    """Durations, chunks, codes in use, and the token maps of three clips under their waveforms."""
    from matplotlib.figure import Figure

    clips, usage = [], 0
    for table, codes in read_rows(output.csv):
        clips.append(table[["fname", "duration_sec", "num_chunks"]])
        usage = usage + code_usage(codes)
    clips, firsts = pd.concat(clips).drop_duplicates("fname"), first_rows(output.csv, 3)

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    lengths, counts, books = top.subplots(1, 3)
    lengths.hist(clips["duration_sec"], bins=40, color="#0072b2")
    lengths.set(xlabel="duration of a clip (s)", ylabel="clips")
    values, times = np.unique(clips["num_chunks"], return_counts=True)
    counts.bar(values, times, color="#0072b2")
    counts.set(xlabel="chunks of a clip", ylabel="clips")
    for axis in (lengths.yaxis, counts.xaxis, counts.yaxis):
        axis.get_major_locator().set_params(integer=True)
    numbers = np.arange(len(usage))
    books.bar(numbers - 0.2, (usage > 0).sum(axis=1), 0.4, color="#0072b2", label="codes in use")
    books.bar(numbers + 0.2, perplexity(usage), 0.4, color="#e69f00", label="perplexity")
    books.set(xlabel="codebook", ylabel="of 1024 codes", xticks=numbers)
    books.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))

    panels = bottom.subplots(2, 3, sharex="col", squeeze=False, height_ratios=(1, 2))
    for (wave, tokens), (fname, codes) in zip(panels.T, firsts):
        try:
            heard = first_chunk(settings, dataset, fname)[0]
        except BadClip:
            heard = torch.zeros(settings.chunk_samples)
        span = (0, settings.target_duration)
        wave.plot(np.linspace(*span, len(heard)), heard, color="black", linewidth=0.4)
        wave.set(xlim=span, yticks=[])
        wave.set_title(fname, fontsize="medium", parse_math=False)
        image = tokens.imshow(
            codes, aspect="auto", cmap="cividis", vmin=0, vmax=1023, interpolation="nearest",
            extent=(*span, len(codes) - 0.5, -0.5),
        )  # fmt: skip
        tokens.set(xlabel="time in the chunk (s)", ylabel="codebook")
    for axis in panels.T[len(firsts) :].ravel():
        axis.set_axis_off()
    bottom.colorbar(image, ax=panels[1].tolist(), label="code", pad=0.01)
    for axis in (lengths, counts, books, *panels[0]):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(output.picture, dpi=150)


# ---------------------------------------------------------------------------------------------- run


def identity(settings: Settings, dataset: Dataset, weights: Path | None) -> dict:
    """All that decides the rows: runs that agree in it may share blocks."""
    packages = ("torch", "torchaudio", "encodec", "soundfile", "numpy")
    return {
        "dataset": dataset.stem,
        "dataset_csv_sha256": sha256_of(dataset.csv_path),
        "model": settings.model,
        "bandwidth_kbps": settings.bandwidth,
        "target_duration_s": settings.target_duration,
        "overlap": settings.overlap,
        "aggregate": settings.aggregate,
        "max_duration_s": settings.max_duration,
        "weights": weights.name if weights else UNTRAINED,
        "weights_sha256": sha256_of(weights) if weights else None,
        "device": settings.device.partition(":")[0],
        "batch_size": settings.batch_size,
        "block_clips": BLOCK_CLIPS,
        "versions": {package: version(package) for package in packages},
    }


def describe(clip: Clip) -> str:
    """A clip's line for --debug."""
    if clip.error:
        return f"{clip.fname} [{clip.labels}] FAILED: {clip.error}"
    first_tokens = " ".join(map(str, clip.codes[0].ravel()[:8]))
    return (
        f"{clip.fname} [{clip.labels}] {clip.rate} Hz, {clip.duration_s:.3f} s, "
        f"chunks: {clip.num_chunks}, tokens of the first: {first_tokens} ..., "
        f"loaded in {clip.load_s * 1e3:.1f} ms, encoded in {clip.encode_s * 1e3:.1f} ms"
    )


def tokenize_blocks(
    todo: list[int], settings: Settings, dataset: Dataset, encode: Encode, bar: tqdm
) -> Iterator[tuple[list[Clip], Counter]]:
    """The clips of each block in `todo`, with their codes or errors, and the seconds a stage."""
    stage_s = Counter(loading=0.0, resampling=0.0, encoding=0.0)
    audio_s, failed, started = 0.0, 0, time.perf_counter()

    def encode_batch(batch: Batch) -> tuple[Batch, list[tuple], float]:
        begun = time.perf_counter()
        codes, latents = encode(batch.chunks) if batch.clips else (torch.empty(0), None)
        unwanted = [None] * len(codes)
        pairs = list(zip(codes.numpy(), unwanted if latents is None else latents))
        return batch, pairs, time.perf_counter() - begun

    batches = make_batches(todo, settings, dataset, stage_s)
    threads = THREADS if settings.device == "cpu" else 1
    for batch, encoded, encode_s in prefetch(encode_batch, batches, threads, ahead=2 * threads):
        stage_s["encoding"] += encode_s
        for clip, (codes, latents) in zip(batch.clips, encoded):
            clip.codes.append(codes)
            clip.latents.append(latents)
            clip.encode_s += encode_s / len(batch.clips)
        members = dict.fromkeys(batch.clips)
        complete = [clip for clip in members if len(clip.codes) == clip.num_chunks]
        for clip in complete + [clip for clip in batch.closes if clip.error]:
            audio_s += clip.duration_s
            failed += bool(clip.error)
            bar.update()
            if settings.debug:
                say(describe(clip))
        speed = audio_s / (time.perf_counter() - started)
        bar.set_postfix_str(f"{speed:.0f} s of audio/s, {failed} failed", refresh=False)
        if batch.closes:
            yield batch.closes, Counter(stage_s)
            stage_s.clear()


def tokenize_dataset(settings: Settings, dataset: Dataset, weights: Path | None) -> int:
    """Make one dataset's files, going on where a run before stopped. Returns the exit status."""
    started = time.perf_counter()
    output = Output(settings.output_dir, dataset.stem)
    made_by = identity(settings, dataset, weights)
    num_clips = len(dataset.clips)
    sizes = [min(BLOCK_CLIPS, num_clips - start) for start in range(0, num_clips, BLOCK_CLIPS)]
    with output.locked() if RANK == 0 else nullcontext():
        todo = None
        if RANK == 0 and output.settle(made_by, num_clips, settings.overwrite):
            owner = f"process {os.getpid()} on {socket.gethostname()}"
            write_json(output.run, {**made_by, "num_clips": num_clips, "owner": owner})
            todo = [index for index, size in enumerate(sizes) if not output.read_block(index, size)]
        todo = from_first_rank(todo)
        if todo is None:
            say(f"{output.csv} is finished already ({num_clips} clips); --overwrite makes it anew")
            return 0
        done = num_clips - sum(sizes[index] for index in todo)
        if done:
            say(f"going on after {done} of {num_clips} clips")
        if mine := todo[RANK::WORLD_SIZE]:
            seconds = 0.1 if sys.stderr.isatty() else 30  # a line each in a log file
            options = {"desc": dataset.stem, "unit": "clip", "mininterval": seconds}
            model = load_model(settings, weights)
            encode = make_encode(model, settings)
            with tqdm(total=num_clips, initial=done, disable=RANK > 0, **options) as bar:
                for clips, stage_s in tokenize_blocks(mine, settings, dataset, encode, bar):
                    begun = time.perf_counter()
                    lines, facts = block_rows(clips, settings, model)
                    stage_s["writing"] += time.perf_counter() - begun
                    facts["stage_s"] = stage_s
                    output.write_block(clips[0].index // BLOCK_CLIPS, lines, facts)
                    if WORLD_SIZE > 1:  # show what all processes have done
                        there = map(Path.exists, map(output.block, range(len(sizes))))
                        bar.n = sum(size for size, is_there in zip(sizes, there) if is_there)
        from_first_rank(None)  # all blocks are there
        if RANK > 0:
            return 0
        if settings.device != "cpu":
            made_by["device_name"] = torch.cuda.get_device_name(settings.device)
        results = output.join(sizes, made_by, started)
    if not results["tokenized"]:
        say(f"error: none of the {num_clips} clips could be tokenized, see {output.failed}")
        return 1
    failures = f", {results['failed']} failed (see {output.failed})" if results["failed"] else ""
    print(f"{output.csv}: {results['tokenized']} clips{failures}. Summary: {output.summary}")
    return 0


def join_processes() -> None:
    """Make torchrun's processes a gloo group.

    After a restart torchrun's store still holds the addresses of the processes that died (torch
    2.11): each attempt gets a prefix of its own.
    """
    patience, attempt = timedelta(days=30), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=patience))
    store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=patience
    )


def from_first_rank(value: object) -> object:
    """What the first of torchrun's processes has for `value`, once all have come here."""
    if WORLD_SIZE == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    torch.distributed.barrier()
    return values[0]


def run(settings: Settings) -> int:
    """All that the command asks for. Returns the exit status."""
    if settings.plot and not find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib:  pip install matplotlib")
    stems = [settings.metadata.stem] if settings.metadata else STEMS[settings.dataset]
    datasets = [find_dataset(settings, stem) for stem in stems]
    weights = find_weights(settings)
    if weights is None:
        warning = "WARNING: UNTRAINED WEIGHTS. The tokens rehearse the run and mean nothing."
        say("\n".join(["=" * len(warning), warning, "=" * len(warning)]))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(1)  # for every thread: no sum depends on the number of cores
    if WORLD_SIZE > 1:
        join_processes()
    try:
        statuses = []
        for dataset in datasets:
            statuses.append(tokenize_dataset(settings, dataset, weights))
            output = Output(settings.output_dir, dataset.stem)
            if settings.plot and RANK == statuses[-1] == 0:
                write_picture(settings, dataset, output)
                print(f"Picture: {output.picture}")
            if settings.listen and RANK == statuses[-1] == 0:
                write_listening(settings, dataset, output, weights)
                print(f"To listen: {output.listen}")
        return max(statuses)
    finally:
        torch.set_num_threads(THREADS)
        if WORLD_SIZE > 1:
            torch.distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own). Returns the exit status.

    0: finished, failed clips listed. 1: nothing could be tokenized, or the run broke. 2: usage,
    dataset or weights not found, output that would be replaced. 130, 143: interrupted.
    """
    settings = parse_settings(argv)

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
        for number, handler in previous.items():
            signal.signal(number, handler)
    if RANK == 0 or status == 1:  # what a user has to change, all processes find alike
        print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    exit_status = main()
    if exit_status > 128:  # the encoding threads may be busy for seconds: do not wait for them
        sys.stdout.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
