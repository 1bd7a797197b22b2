#!/usr/bin/env python3
"""Turn the clips of FSDKaggle2019 into discrete tokens with EnCodec, one CSV row per clip.

    python encodec_tokenizer.py --dataset sample                     # the bundled clips, no dataset needed
    python encodec_tokenizer.py --dataset curated --max_samples 100  # a quick trial
    python encodec_tokenizer.py --dataset both --model encodec_48khz
    torchrun --nproc_per_node=4 encodec_tokenizer.py --dataset noisy # one process per GPU

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
import itertools
import json
import math
import os
import re
import shlex
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.error import URLError

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
    # torchaudio refuses to load beside a torch that it was not built for, with any of these three.
    def installed(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    sys.exit(
        f"error: {', '.join(map(installed, ('torch', 'torchaudio', 'encodec')))} do not load together: {error}\n"
        'Install a pair that does:  pip install "torch>=2.6,<2.12" "torchaudio>=2.6,<2.12" encodec'
    )


# ---------------------------------------------------------------------------------------- constants


@dataclass(frozen=True)
class ModelSpec:
    """What must be known of an EnCodec model before it is built (encodec/model.py)."""

    build: Callable[..., EncodecModel]
    sample_rate: int  # Hz
    channels: int
    bandwidths_kbps: tuple[float, ...]
    checkpoint: str  # the name ends in the first 8 hex digits of its SHA-256


MODELS = {
    "encodec_24khz": ModelSpec(
        EncodecModel.encodec_model_24khz,
        24_000,
        1,
        (1.5, 3.0, 6.0, 12.0, 24.0),
        "encodec_24khz-d7cc33bc.th",
    ),
    "encodec_48khz": ModelSpec(
        EncodecModel.encodec_model_48khz,
        48_000,
        2,
        (3.0, 6.0, 12.0, 24.0),
        "encodec_48khz-7e698e3e.th",
    ),
}
STEMS = {
    "curated": ["train_curated"],
    "noisy": ["train_noisy"],
    "test": ["test"],
    "sample": ["sample"],
}
STEMS["both"] = STEMS["curated"] + STEMS["noisy"]
SAMPLE_DIR = Path(__file__).resolve().parent / "tests" / "sample"
COLUMNS = ["fname", "labels", "num_tokens", "token_shape", "num_chunks", "duration_sec"]
BLOCK_CLIPS = 64
UNTRAINED = "untrained (seed 0)"

# What torchrun tells its processes; without it this is the only one.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD_SIZE = (
    int(os.environ.get("LOCAL_RANK", 0)),
    int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
)


class UserError(Exception):
    """Something that the user has to change first: printed as one sentence, exit status 2."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; its argument is the exit status, 128 + the signal's number."""


def say(message: str) -> None:
    """Print to stderr without breaking the progress bar; one process of many speaks."""
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)


# ------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Settings:
    """The command line, checked. Field names are the flags; `device` is resolved ("cpu", "cuda:0")."""

    dataset: str
    input_dir: Path
    output_dir: Path
    model: str
    bandwidth: float
    target_duration: float
    overlap: float
    aggregate: str
    weights: str
    device: str
    batch_size: int
    workers: int
    max_duration: float
    max_samples: int | None
    overwrite: bool
    debug: bool

    @property
    def chunk_samples(self) -> int:
        return round(self.target_duration * MODELS[self.model].sample_rate)

    @property
    def hop_samples(self) -> int:
        return round(self.chunk_samples * (1 - self.overlap))


def number_in(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`, both included."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: from {low} to {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Read the command line; what cannot be meant ends in argparse's usage error, exit status 2."""
    summary, examples, _ = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, help: str, **options: object) -> None:
        if options.get("default") is not None:
            help += " (default: %(default)s)"
        parser.add_argument(flag, help=help, **options)

    add(
        "--dataset",
        "which clips; sample: a dozen that come with the script",
        choices=list(STEMS),
        default="curated",
    )
    add(
        "--input_dir",
        "holds the dataset, laid out as on Kaggle or Zenodo",
        type=Path,
        default=Path("input"),
    )
    add(
        "--output_dir",
        "where the CSV and its summary go",
        type=Path,
        default=Path("work/tokenized"),
    )
    add("--model", "24 kHz mono or 48 kHz stereo", choices=list(MODELS), default="encodec_24khz")
    add("--bandwidth", "kbps: 1.5 (24 kHz only), 3, 6, 12 or 24", type=float, default=6.0)
    add("--target_duration", "seconds in a chunk, 0.1 to 60", type=number_in(0.1, 60), default=2.0)
    add(
        "--overlap",
        "fraction of a chunk shared with the next, 0 to 0.9",
        type=number_in(0, 0.9),
        default=0.1,
    )
    add("--aggregate", "how a clip's chunks become one row", choices=["mean"], default="mean")
    add(
        "--weights",
        "pretrained, untrained (a rehearsal), or a checkpoint file",
        default="pretrained",
    )
    add("--device", "auto, cpu, cuda or cuda:N; auto takes CUDA when there is one", default="auto")
    add(
        "--batch_size",
        "chunks per batch (default: 32 on a CPU, 256 on CUDA)",
        type=number_in(1, 4096, int),
    )
    add(
        "--workers",
        "threads that read clips ahead (default: 2 on a CPU, 8 on CUDA)",
        type=number_in(1, 64, int),
    )
    add(
        "--max_duration",
        "seconds; longer clips fail rather than fill the memory",
        type=float,
        default=600.0,
    )
    add(
        "--max_samples",
        "only the first N rows (default: all)",
        metavar="N",
        type=number_in(1, 10**9, int),
    )
    add(
        "--overwrite",
        "replace finished or unfinished output made with other settings",
        action="store_true",
    )
    add("--debug", "print every clip, and tracebacks", action="store_true")
    options = parser.parse_args(argv)

    bandwidths = MODELS[options.model].bandwidths_kbps
    if options.bandwidth not in bandwidths:
        offered = ", ".join(f"{kbps:g}" for kbps in bandwidths)
        parser.error(
            f"argument --bandwidth: {options.model} offers {offered} kbps, not {options.bandwidth:g}"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", options.device):
        parser.error(f"argument --device: {options.device!r} is none of auto, cpu, cuda, cuda:N")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda":
        options.device = f"cuda:{LOCAL_RANK}"
    if options.device != "cpu" and int(options.device[5:]) >= torch.cuda.device_count():
        parser.error(
            f"argument --device: PyTorch sees {torch.cuda.device_count()} CUDA devices, no {options.device}"
        )
    on_cpu = options.device == "cpu"
    options.batch_size = options.batch_size or (32 if on_cpu else 256)
    options.workers = options.workers or (2 if on_cpu else 8)
    return Settings(**vars(options))


# ------------------------------------------------------------------------------------------ dataset


@dataclass(frozen=True)
class Dataset:
    stem: str  # names the output files
    csv_path: Path
    audio_dir: Path
    clips: pd.DataFrame  # fname, labels; the dataset's order


def find_dataset(settings: Settings, stem: str) -> Dataset:
    """Find the CSV and the audio folder of `stem` up to two folders below `input_dir`, and read the CSV.

    Kaggle names them train_curated.csv and train_curated (some copies trn_curated), Zenodo
    (record 3612637) FSDKaggle2019.meta/train_curated_post_competition.csv and
    FSDKaggle2019.audio_train_curated. Kaggle's list of the test clips is sample_submission.csv.

    Raises UserError: no CSV or folder, or a CSV that is not one.
    """
    if stem == "sample":
        return Dataset(
            stem,
            SAMPLE_DIR / "sample.csv",
            SAMPLE_DIR,
            read_clips(SAMPLE_DIR / "sample.csv", settings),
        )

    def find(names: list[str], wanted: Callable[[Path], bool]) -> list[Path]:
        depths = ("", "*/", "*/*/")
        return [
            p
            for depth in depths
            for name in names
            for p in sorted(settings.input_dir.glob(depth + name))
            if wanted(p)
        ]

    kaggle_csv = "sample_submission.csv" if stem == "test" else f"{stem}.csv"
    layouts = [
        ([kaggle_csv], [stem, stem.replace("train_", "trn_")]),
        ([f"{stem}_post_competition.csv"], [f"FSDKaggle2019.audio_{stem}"]),
    ]
    for csv_names, folder_names in layouts:
        csv_paths, folders = find(csv_names, Path.is_file), find(folder_names, Path.is_dir)
        if csv_paths and folders:
            clips = read_clips(csv_paths[0], settings)
            # Some copies nest a folder in one of the same name: take the one that holds the clips.
            names = clips["fname"].head(100)
            audio_dir = max(
                folders, key=lambda folder: sum((folder / name).exists() for name in names)
            )
            return Dataset(stem, csv_paths[0], audio_dir, clips)
    looked = "\n".join(
        f"  {names[0]}  and  {'/ or '.join(dict.fromkeys(folders))}/" for names, folders in layouts
    )
    raise UserError(
        f"no {stem} dataset in {settings.input_dir.resolve()}. Looked there, and two folders deep, for\n{looked}\n"
        "Get FSDKaggle2019 from https://zenodo.org/record/3612637 or the Kaggle competition "
        "freesound-audio-tagging-2019, and name its folder with --input_dir.\n"
        "To try the tool without it: --dataset sample"
    )


def read_clips(csv_path: Path, settings: Settings) -> pd.DataFrame:
    """The clips that the dataset's CSV names: columns fname and labels, strings, rows that repeat dropped."""
    try:
        table = pd.read_csv(csv_path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeError) as error:
        raise UserError(
            f"{csv_path} is not a CSV of clips (UTF-8, comma-separated): {error}"
        ) from error
    if "fname" not in table:
        hint = (
            "; it seems to be separated by semicolons, commas are needed"
            if ";" in "".join(table.columns)
            else ""
        )
        raise UserError(
            f"{csv_path} has no column fname, only {', '.join(map(repr, table.columns[:5]))}{hint}"
        )
    if table.empty:
        raise UserError(f"{csv_path} names no clips: it holds a header and nothing below")
    clips = pd.DataFrame({"fname": table["fname"], "labels": table.get("labels", "")})
    repeated = clips.duplicated()
    if repeated.any():
        say(
            f"note: {csv_path} repeats {repeated.sum()} rows ({clips['fname'][repeated].iloc[0]} ...); each is used once"
        )
    return clips[~repeated].head(settings.max_samples or len(clips)).reset_index(drop=True)


# -------------------------------------------------------------------------------------------- clips


@dataclass(eq=False)
class Clip:
    """One row of the dataset on its way to one row of the output."""

    index: int
    fname: str
    labels: str
    error: str = ""  # why it could not be tokenized
    duration_s: float = 0.0  # of the file, before padding or resampling
    rate: int = 0  # Hz, of the file
    num_chunks: int = 0
    load_s: float = 0.0
    encode_s: float = 0.0  # its share of its batches
    codes: list[np.ndarray] = field(default_factory=list)  # one [K, F] a chunk
    closes: list[Clip] = field(default_factory=list)  # the whole block, in its last clip


class BadClip(Exception):
    """Why a clip cannot be tokenized, in words for failed_<stem>.csv."""


def clip_path(audio_dir: Path, fname: str) -> Path:
    """Where a clip lies; BadClip for a name that leads out of the audio folder, or to no plain file."""
    for flavour in (PurePosixPath(fname), PureWindowsPath(fname)):
        if not fname or flavour.anchor or ".." in flavour.parts:
            raise BadClip(
                "the name leads outside the audio folder; not opened"
                if fname
                else "the name is empty"
            )
    path = audio_dir / fname
    try:
        if not path.is_file():
            raise BadClip(
                "not a plain file" if path.exists() else f"no such file in {audio_dir.name}/"
            )
        if path.stat().st_size == 0:
            raise BadClip("empty file (0 bytes)")
    except (OSError, ValueError) as error:  # no permission; too long a name; a NUL in it
        raise BadClip(f"cannot be opened: {error}") from error
    return path


def load_clip(path: Path, channels: int, max_duration_s: float) -> tuple[torch.Tensor, int, float]:
    """Read a clip and mix it to the model's channels.

    soundfile first: libsndfile reads WAV, FLAC, OGG and MP3 with nothing to install, where
    torchaudio.load needs TorchCodec and FFmpeg since 2.9; what soundfile does not know goes there.
    Read in pieces, so that a header's claims reserve no memory.

    Returns: samples [channels, T] in float32 at the file's own rate, that rate in Hz, and seconds.
    Raises BadClip.
    """
    try:
        with sf.SoundFile(path) as file:
            rate, promised = file.samplerate, file.frames
            if not 1_000 <= rate <= 1_000_000:
                raise BadClip(f"a sample rate of {rate} Hz is not plausible")
            # libsndfile cuts a WAV's length to what is there, and says so in its log only. Sizes of
            # 2 GiB and up are what streaming writers leave where they could not know better.
            claim = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
            if claim and int(claim[1]) < 2**31 - 2**20:
                raise BadClip(
                    f"truncated: its header promises {claim[1]} bytes of audio, {claim[2]} are there"
                )
            if promised > max_duration_s * rate:
                raise BadClip(
                    f"{promised / rate:.0f} s long, over the {max_duration_s:g} s of --max_duration"
                )
            pieces = file.blocks(2**22 // file.channels, dtype="float32", always_2d=True)
            mixed = [mix_channels(torch.from_numpy(piece.T.copy()), channels) for piece in pieces]
            samples = torch.cat(mixed, dim=1) if mixed else torch.zeros(channels, 0)
            if 0 < samples.shape[1] < promised:
                raise BadClip(
                    f"truncated: its header promises {promised} samples, {samples.shape[1]} could be read"
                )
    except sf.LibsndfileError as error:
        try:
            samples, rate = torchaudio.load(path)
            samples = mix_channels(samples, channels)
        except Exception as second:  # any decoder's error, and TorchCodec's absence
            reasons = f"soundfile: {error}; torchaudio: {second}".replace(f"{str(path)!r}", "it")
            raise BadClip(f"not audio that can be read ({' '.join(reasons.split())})") from second
    except (OSError, RuntimeError, ValueError) as error:
        raise BadClip(f"cannot be read: {error}") from error
    if samples.shape[1] == 0:
        raise BadClip("no samples: the file holds a header and no audio")
    if not samples.abs().max() < 1e6:  # false for NaN too
        raise BadClip(
            "holds samples that are NaN, infinite or beyond 1e6, where audio lies within 1"
        )
    return samples, rate, samples.shape[1] / rate


def mix_channels(samples: torch.Tensor, channels: int) -> torch.Tensor:
    """[C, T] to [channels, T]: one channel is the mean of all; two are stereo as it is, or that mean twice."""
    if channels == 2 and samples.shape[0] == 2:
        return samples
    return samples.mean(dim=0, keepdim=True).repeat(channels, 1)


@lru_cache(maxsize=8)
def resampler(rate: int, model_rate: int, device: str) -> torchaudio.transforms.Resample:
    """torchaudio's resampler with its defaults, as EnCodec's convert_audio uses it, kept for the next clip.

    Its kernel has as many entries as the product of the reduced rates: 44,101 Hz would take 4 GB.
    Ratios beyond 2^22 entries are met by the nearest below, within 2.4e-4 for rates up to 192 kHz;
    all rates in common use (8, 11.025, 22.05, 44.1, 48, 96, 192 kHz ...) are exact.
    """
    ratio = Fraction(rate, model_rate)
    ratio = ratio.limit_denominator(max(1, int(2**11 / math.sqrt(ratio))))
    return torchaudio.transforms.Resample(ratio.numerator, ratio.denominator).to(device)


def prefetch(function: Callable, items: Iterable, threads: int, ahead: int) -> Iterator:
    """Map `function` over `items` in a pool of threads, in order, at most `ahead` items in advance."""
    one_core = torch.set_num_threads if threads > 1 else None
    pool = ThreadPoolExecutor(threads, initializer=one_core, initargs=(1,) if one_core else ())
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
    """Cut [C, T] into pieces [C, chunk], one every `hop` samples, so that every sample is in one.

    At most one chunk of audio is zero-padded at its end. Longer audio is not padded: where the last
    hop leaves a tail, one more chunk is aligned to the end.
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
    chunks: torch.Tensor | None  # [B, C, chunk]; None where a block ends and no chunk is left over
    closes: list[Clip]  # the whole block, with its last batch; else empty


def make_batches(
    todo: list[int], settings: Settings, dataset: Dataset, stage_s: Counter
) -> Iterator[Batch]:
    """Load, resample and chunk the clips of the blocks in `todo`, and pack each block's chunks into batches."""
    spec, size = MODELS[settings.model], settings.batch_size

    def clips() -> Iterator[Clip]:
        for index in todo:
            rows = dataset.clips.iloc[index * BLOCK_CLIPS : (index + 1) * BLOCK_CLIPS]
            block = [Clip(*row) for row in rows.itertuples()]
            block[-1].closes = block
            yield from block

    def load(clip: Clip) -> tuple[Clip, torch.Tensor | None]:
        started, samples = time.perf_counter(), None
        try:
            path = clip_path(dataset.audio_dir, clip.fname)
            samples, clip.rate, clip.duration_s = load_clip(
                path, spec.channels, settings.max_duration
            )
            if settings.device != "cpu":
                samples = samples.pin_memory()
        except BadClip as reason:
            clip.error = str(reason)
        clip.load_s = time.perf_counter() - started
        return clip, samples

    owners, chunks = [], []
    for clip, samples in prefetch(load, clips(), settings.workers, ahead=2 * settings.workers):
        stage_s["loading"] += clip.load_s
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
        if clip.closes:
            yield Batch(owners, torch.stack(chunks) if chunks else None, clip.closes)
            owners, chunks = [], []


# ------------------------------------------------------------------------------------------ weights


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_weights(settings: Settings) -> Path | None:
    """The checkpoint file to load, downloaded if need be; None for untrained weights.

    `pretrained` is Meta's file in torch hub's cache, where EncodecModel's own loader keeps it too.
    A name that ends in 8 hex digits, as Meta's do, is held to be the start of the file's SHA-256.

    Raises UserError: no such file, no download, another checksum.
    """
    if settings.weights == "untrained":
        return None
    path = Path(settings.weights).expanduser()
    if settings.weights == "pretrained":
        path = Path(torch.hub.get_dir(), "checkpoints", MODELS[settings.model].checkpoint)
        if not path.exists() and not download(path):
            if settings.dataset == "sample":
                return None
            raise UserError(
                f"the pretrained weights could not be downloaded from {ROOT_URL}{path.name}.\n"
                f"Download that file elsewhere and put it to {path}, or name it with --weights FILE.\n"
                "For a rehearsal without them: --weights untrained"
            )
    if not path.is_file():
        raise UserError(
            f"no weights in {path}: --weights takes pretrained, untrained, or a checkpoint file"
        )
    checksum = re.search(r"-([0-9a-f]{8})$", path.stem)
    if checksum and not sha256_of(path).startswith(checksum[1]):
        raise UserError(
            f"{path} is damaged: its SHA-256 starts with {sha256_of(path)[:8]}, where its name says {checksum[1]}.\n"
            "Delete it and get it again."
        )
    return path


def download(path: Path) -> bool:
    """Fetch Meta's checkpoint into torch hub's cache; False, and the reason printed, where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a cluster's firewall may swallow the request without an answer
    try:
        torch.hub.download_url_to_file(
            ROOT_URL + path.name, str(path), path.stem[-8:], progress=RANK == 0
        )
    except (URLError, OSError, RuntimeError) as error:
        say(f"downloading {ROOT_URL}{path.name} failed: {getattr(error, 'reason', error)}")
    finally:
        socket.setdefaulttimeout(patience)
    return path.exists()


def build_model(name: str) -> EncodecModel:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning
        )
        return MODELS[name].build(pretrained=False)


def load_model(settings: Settings, path: Path | None) -> EncodecModel:
    """EnCodec with the weights of `path`, or untrained where that is None, at the chosen bandwidth.

    Raises UserError: not a checkpoint, or one of another model.
    """
    if path is None:
        model = untrained_model(settings.model)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            shapes = {name: tensor.shape for name, tensor in state.items()}
        except Exception as error:  # what torch.load raises on a foreign file is nowhere listed
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise UserError(
                f"{path} is not a PyTorch state dict that loads safely: {reason}"
            ) from error
        model = build_model(settings.model)
        if shapes != {name: tensor.shape for name, tensor in model.state_dict().items()}:
            others = {
                name: build_model(name).state_dict() for name in MODELS if name != settings.model
            }
            fits = [
                n for n, other in others.items() if shapes == {k: v.shape for k, v in other.items()}
            ]
            hint = (
                f"they are those of {fits[0]}: add --model {fits[0]}"
                if fits
                else "nor of any other EnCodec model"
            )
            raise UserError(f"the weights in {path} are not those of {settings.model}; {hint}")
        model.load_state_dict(state)
    model.set_target_bandwidth(settings.bandwidth)
    return model


@torch.no_grad()
def untrained_model(name: str) -> EncodecModel:
    """Seeded random weights, for rehearsals: rows of the right shape that mean nothing.

    A fresh EnCodec's codebooks are all zero, so that every token would be 0. Here each is drawn
    around what is left of the latents of some noise by the codebooks before it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(name)
        noise = torch.randn(1, model.channels, 4 * model.sample_rate)
        noise *= torch.linspace(-8, 0, noise.shape[-1]).exp()  # from silence to full scale
        residual = model.encoder(noise)[0].T  # [F, D]
        for layer in model.quantizer.vq.layers:
            codebook = layer._codebook.embed
            codebook.copy_(residual.mean(0) + residual.std(0) * torch.randn_like(codebook))
            residual = residual - codebook[layer.encode(residual.T[None])[0]]
    return model


# -------------------------------------------------------------------------------------------- codes


def elu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """ELU of [T, C] as max(x, exp(min(x, 0)) - 1), a slice that fits the cache at a time.

    torch's own goes through expm1, whose vectorized form is up to 13 times slower on some hosts.
    """
    out = torch.empty_like(x) if out is None else out
    rows = max(1, 2**17 // x.shape[1])
    for piece, result in zip(x.split(rows), out.split(rows)):
        torch.clamp(piece, max=0, out=result).exp_().sub_(1)
        torch.maximum(piece, result, out=result)
    return out


class FastConv:
    """EnCodec's SConv1d, with the ELU before it where there is one, on one chunk in channels-last form.

    The same sums as SConv1d, arranged for a CPU: [T, C] keeps a frame's channels together, so that
    a kernel of 1 is one matrix product, and a kernel of twice the stride (all of EnCodec's strided
    convolutions) two, over a view of the input; the ELU writes into the padded input.
    """

    def __init__(self, module: SConv1d, after_elu: bool) -> None:
        conv, norm = module.conv.conv, module.conv.norm
        self.kernel, self.stride, self.after_elu = conv.kernel_size[0], conv.stride[0], after_elu
        self.weight, self.bias = conv.weight.detach(), conv.bias.detach()  # [C', C, kernel], [C']
        self.norm = norm if isinstance(norm, torch.nn.GroupNorm) else None
        if self.kernel == 2 * self.stride:
            halves = self.weight.permute(2, 1, 0).reshape(2, -1, len(self.bias))
            self.first, self.second = halves.contiguous()  # [stride * C, C'] each
        elif self.kernel == 1:
            self.first = self.weight[:, :, 0].T.contiguous()  # [C, C']
        else:
            self.weight = self.weight[:, :, None].contiguous(memory_format=torch.channels_last)
        # SConv1d's padding: all to the left of a causal model, else the odd sample to the left.
        total = self.kernel - self.stride
        self.right = 0 if module.causal else total // 2
        self.left = total - self.right

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] with the ELU applied and its ends reflected, to whole strides."""
        length, left, right = len(x), self.left, self.right + -len(x) % self.stride
        if length <= max(left, right):  # too short to be reflected: EnCodec appends zeros first
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
            y = torch.addmm(self.bias, elu(x) if self.after_elu else x, self.first)
        elif self.kernel == 2 * self.stride:
            strides = self.pad(x).view(-1, self.stride * x.shape[1])
            y = torch.addmm(self.bias, strides[:-1], self.first).addmm_(strides[1:], self.second)
        else:
            y = F.conv2d(self.pad(x).T[None, :, None], self.weight, self.bias)[0, :, 0].T
        if self.norm is None:
            return y
        mean, flat = y.mean(), y.reshape(-1)  # GroupNorm of a single group
        scale = self.norm.weight * torch.rsqrt(
            flat.dot(flat) / len(flat) - mean * mean + self.norm.eps
        )
        return torch.addcmul(self.norm.bias - mean * scale, y, scale, out=y)


class FastEncoder:
    """EnCodec's encoder for a CPU: the convolutions chunk by chunk, the LSTM over the batch.

    One chunk's activations fit the cache where a batch's do not; the LSTM reads its weights once a
    step and wants many chunks. Its batch is filled up with zeros, so that it always has one shape
    and a chunk's codes do not depend on what it was encoded with.
    """

    def __init__(self, model: EncodecModel, batch_size: int) -> None:
        self.batch_size = batch_size
        self.layers: list[Callable[[torch.Tensor], torch.Tensor]] = []
        after_elu = False
        for module in model.encoder.model:
            if isinstance(module, SConv1d):
                self.layers.append(FastConv(module, after_elu))
            elif isinstance(module, SEANetResnetBlock):
                self.layers.append(self.residual_block(module))
            elif isinstance(module, SLSTM):
                self.lstm = module.lstm
            after_elu = isinstance(module, torch.nn.ELU)

    @staticmethod
    def residual_block(module: SEANetResnetBlock) -> Callable[[torch.Tensor], torch.Tensor]:
        shortcut = FastConv(module.shortcut, after_elu=False)
        first, second = (
            FastConv(module.block[1], after_elu=True),
            FastConv(module.block[3], after_elu=True),
        )
        return lambda x: shortcut(x).add_(second(first(x)))

    def __call__(self, chunks: torch.Tensor) -> torch.Tensor:
        """[B, C, T] -> [B, D, F], as the model's own encoder."""
        *convolutions, last = self.layers
        features = []
        for chunk in chunks:
            x = chunk.T.contiguous()  # [T, C]
            for layer in convolutions:
                x = layer(x)
            features.append(x)  # [F, 512]
        x = torch.stack(features, dim=1)  # [F, B, 512]
        x = F.pad(x, (0, 0, 0, max(0, self.batch_size - len(chunks))))
        x = x + self.lstm(x)[0]
        return torch.stack([last(x[:, i]).T for i in range(len(chunks))])


def make_encode(model: EncodecModel, settings: Settings) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from chunks [B, C, T] to codes [B, K, F]: what EncodecModel.encode gives, faster.

    The 48 kHz model cuts a chunk into segments of 1 s with 1 % overlap; the codes of all of them
    follow each other in F. Call it in threads: each works on one core.
    """
    on_cpu = settings.device == "cpu"
    for module in model.encoder.modules():
        if hasattr(module, "weight_g"):
            torch.nn.utils.remove_weight_norm(
                module
            )  # folds it into the weight, else done at every call
    model.encoder.to(settings.device)
    model.quantizer.to(settings.device)
    encoder = FastEncoder(model, settings.batch_size) if on_cpu else model.encoder
    num_codebooks = model.quantizer.get_num_quantizers_for_bandwidth(
        model.frame_rate, model.bandwidth
    )
    codebooks = [
        layer.codebook for layer in model.quantizer.vq.layers[:num_codebooks]
    ]  # [1024, D] each
    doubled = [(2 * codebook.T).contiguous() for codebook in codebooks]
    squared = [codebook.pow(2).sum(1) for codebook in codebooks]

    def quantize(latents: torch.Tensor) -> torch.Tensor:
        """[N, D, F] -> [N, K, F]: in each codebook the nearest to what those before it left over."""
        residual = latents.transpose(1, 2).reshape(-1, latents.shape[1])  # [N * F, D]
        codes = []
        for codebook, double, square in zip(codebooks, doubled, squared):
            nearest = (
                torch.mm(residual, double).sub_(square).max(dim=1).indices
            )  # |x|^2 is the same for all
            residual = residual - codebook[nearest]
            codes.append(nearest.view(len(latents), -1))
        return torch.stack(codes, dim=1)

    def encode(chunks: torch.Tensor) -> torch.Tensor:
        length = model.segment_length or chunks.shape[2]
        codes = []
        for start in range(0, chunks.shape[2], model.segment_stride or length):
            segment = chunks[:, :, start : start + length]
            if model.normalize:
                mono = segment.mean(dim=1, keepdim=True)
                segment = segment / (1e-8 + mono.pow(2).mean(dim=2, keepdim=True).sqrt())
            latents = encoder(segment)  # [B, D, F]
            # On a CPU chunk by chunk: the distances stay in the cache.
            codes.append(
                torch.cat([quantize(part) for part in latents.split(1 if on_cpu else len(latents))])
            )
        return torch.cat(codes, dim=2)

    @torch.inference_mode()
    def encode_what_fits(chunks: torch.Tensor) -> torch.Tensor:
        try:
            return encode(chunks).cpu()
        except torch.OutOfMemoryError:
            if len(chunks) == 1:
                raise
        torch.cuda.empty_cache()
        return torch.cat([encode_what_fits(half) for half in chunks.split((len(chunks) + 1) // 2)])

    return encode_what_fits


# --------------------------------------------------------------------------------------------- rows


def aggregate(codes: np.ndarray, how: str) -> np.ndarray:
    """A clip's chunks [N, K, F] as one row's codes [K, F]."""
    assert how == "mean", how
    return np.rint(codes.mean(axis=0)).astype(np.int64)


def block_rows(clips: list[Clip], settings: Settings) -> tuple[bytes, Counter]:
    """A finished block as CSV rows, and its counts for the summary."""
    text, counts = io.StringIO(), Counter()
    writer = csv.writer(text, lineterminator="\n")
    for clip in clips:
        counts["failed" if clip.error else "tokenized"] += 1
        if clip.error:
            continue
        tokens = aggregate(np.stack(clip.codes), settings.aggregate)
        shape = str(tokens.shape)
        duration = round(clip.duration_s, 6)
        writer.writerow(
            [
                clip.fname,
                clip.labels,
                tokens.size,
                shape,
                clip.num_chunks,
                duration,
                *tokens.ravel().tolist(),
            ]
        )
        counts += Counter(
            {"tokens": tokens.size, "chunks": clip.num_chunks, "audio_s": clip.duration_s, shape: 1}
        )
    return text.getvalue().encode(), counts


# -------------------------------------------------------------------------------------------- files


def write_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file whole or not at all: under another name, to the disk, then renamed into place."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the rename itself reaches the disk with its folder
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
    """Where a dataset's files lie, and its blocks on the way to them.

    A block file holds, in lines: the SHA-256 of all that follows; a JSON object with the block's
    counts, stage seconds and failures; the CSV rows.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.csv = folder / f"tokenized_{stem}.csv"
        self.json = folder / f"tokenized_{stem}.json"
        self.summary = folder / f"summary_{stem}.txt"
        self.failed = folder / f"failed_{stem}.csv"
        self.blocks = folder / f"tokenized_{stem}.blocks"
        self.run = self.blocks / "run.json"  # what the unfinished run was started with, and by whom
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
            raise UserError(
                f"{self.blocks} is in use by {owner}: wait for it, or choose another --output_dir"
            ) from error
        try:
            yield
        finally:
            if not self.run.exists():  # nothing is left unfinished
                shutil.rmtree(self.blocks)
            self.lock.release()

    def write_block(self, clips: list[Clip], stage_s: Counter, settings: Settings) -> None:
        started = time.perf_counter()
        rows, counts = block_rows(clips, settings)
        stage_s["writing"] += time.perf_counter() - started
        failures = [(clip.fname, clip.error) for clip in clips if clip.error]
        facts = {
            "num_clips": len(clips),
            "counts": counts,
            "stage_s": stage_s,
            "failures": failures,
        }
        body = json.dumps(facts, ensure_ascii=False).encode() + b"\n" + rows
        path = self.block(clips[0].index // BLOCK_CLIPS)
        write_file(path, [hashlib.sha256(body).hexdigest().encode() + b"\n", body])

    def read_block(self, index: int, clips: int) -> tuple[dict, bytes] | None:
        """A block's facts and rows; None where it is not there, not of `clips` clips, or damaged (then set aside)."""
        path = self.block(index)
        if not path.exists():
            return None
        checksum, _, body = path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != checksum:
            os.replace(path, path.with_suffix(".damaged"))
            say(f"note: {path} was damaged; set aside as {path.stem}.damaged, and made again")
            return None
        facts, _, rows = body.partition(b"\n")
        facts = json.loads(facts)
        return (facts, rows) if facts["num_clips"] == clips else None


def identity(settings: Settings, dataset: Dataset, weights: Path | None) -> dict:
    """Everything that decides a row's bytes: two runs that agree in it may share blocks."""
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
        "weights": UNTRAINED if weights is None else weights.name,
        "weights_sha256": None if weights is None else sha256_of(weights),
        "device": settings.device.partition(":")[0],
        "batch_size": settings.batch_size,
        "block_clips": BLOCK_CLIPS,
        "versions": {package: version(package) for package in packages},
    }


def settle_output(output: Output, made_by: dict, num_clips: int, overwrite: bool) -> bool:
    """Compare what is on the disk with what is to be made; False where it is made already.

    Drops an unfinished run that --overwrite gives up, and leftover temporary files.
    Raises UserError where going on would mix settings, or replace what is finished by something else.
    """

    def check(found: dict, what: str) -> None:
        changed = [
            f"  {key}: {found.get(key)} -> {made_by[key]}"
            for key in made_by
            if found.get(key) != made_by[key]
        ]
        if found["num_clips"] > num_clips:
            changed.append(f"  number of clips: {found['num_clips']} -> {num_clips}")
        if changed:
            raise UserError(
                f"{what} was made with other settings:\n" + "\n".join(changed) + "\n"
                "Replace it with --overwrite, or keep it and choose another --output_dir."
            )

    finished, unfinished = read_json(output.json), read_json(output.run)
    if not overwrite and output.csv.exists():
        if finished:
            check(finished, str(output.csv))
            if finished["num_clips"] == num_clips:
                return False
        elif not unfinished:
            raise UserError(
                f"{output.csv} is there without the {output.json.name} that tells how it was made.\n"
                "Replace it with --overwrite, or keep it and choose another --output_dir."
            )
    if unfinished:
        try:
            check(unfinished, f"The unfinished run in {output.blocks}")
        except UserError:
            if not overwrite:
                raise
            for path in output.blocks.glob("*.block"):
                path.unlink()
    for path in (output.csv, output.json, output.summary, output.failed):
        path.with_name(path.name + ".tmp").unlink(missing_ok=True)
    for path in output.blocks.glob("*.tmp"):
        path.unlink()
    return True


def join_blocks(
    output: Output, block_sizes: list[int], made_by: dict, settings: Settings, started: float
) -> dict:
    """Write the final files from the blocks; the JSON, which says that all is there, comes last."""

    def read(index: int) -> tuple[dict, bytes]:
        block = output.read_block(index, block_sizes[index])
        if block is None:
            raise OSError(
                f"{output.block(index)} is gone or damaged; the same command makes it again"
            )
        return block

    counts, stage_s, failures = Counter(), Counter(), []
    for index in range(len(block_sizes)):
        facts, _ = read(index)
        counts.update(facts["counts"])
        stage_s.update(facts["stage_s"])
        failures += facts["failures"]

    def csv_line(cells: Iterable) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue().encode()

    output.failed.unlink(missing_ok=True)
    if failures:
        write_file(output.failed, map(csv_line, [("fname", "error"), *failures]))
    facts = {
        **made_by,
        "num_clips": sum(block_sizes),
        "tokenized": counts["tokenized"],
        "failed": counts["failed"],
    }
    if counts["tokenized"]:
        tokens = counts["tokens"] // counts["tokenized"]
        header = csv_line([*COLUMNS, *(f"token_{i}" for i in range(tokens))])
        write_file(
            output.csv,
            itertools.chain([header], (read(index)[1] for index in range(len(block_sizes)))),
        )
        write_file(
            output.summary,
            [summary_text(facts, counts, stage_s, time.perf_counter() - started).encode()],
        )
        write_json(output.json, {**facts, "command": shlex.join(sys.argv)})
    return facts


def summary_text(facts: dict, counts: Counter, stage_s: Counter, wall_s: float) -> str:
    """The text summary: what was made, from what, how, and where the time went."""
    n = counts["tokenized"]
    shapes = [
        f"  {shape}: {count} samples" for shape, count in counts.items() if shape.startswith("(")
    ]
    lines = [
        f"EnCodec tokens of {facts['dataset']}",
        "",
        f"Samples processed: {n}",
        f"Failures: {counts['failed']}"
        + (f" (see failed_{facts['dataset']}.csv)" if counts["failed"] else ""),
        f"Average tokens per sample: {counts['tokens'] / n:.1f}",
        f"Average duration: {counts['audio_s'] / n:.2f} s",
        f"Total duration: {counts['audio_s']:.1f} s ({counts['audio_s'] / 3600:.2f} h)",
        f"Average chunks per sample: {counts['chunks'] / n:.2f}",
        "Token shapes (codebooks, frames):",
        *shapes,
        "",
        "Settings:",
        *(f"  {key}: {value}" for key, value in facts.items()),
        "",
        "Seconds in each stage, summed over the threads of each:",
        *(
            f"  {stage}: {stage_s[stage]:.2f}"
            for stage in ("loading", "resampling", "encoding", "writing")
        ),
        f"Seconds from start to end of the last run: {wall_s:.2f}",
    ]
    if facts["weights"] == UNTRAINED:
        lines.insert(
            1,
            "WARNING: made with untrained weights. These tokens rehearse the run and mean nothing.",
        )
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------- run


def describe(clip: Clip) -> str:
    """A clip's line for --debug."""
    if clip.error:
        return f"{clip.fname} [{clip.labels}] FAILED: {clip.error}"
    tokens = " ".join(map(str, clip.codes[0].ravel()[:8]))
    return (
        f"{clip.fname} [{clip.labels}] {clip.rate} Hz, {clip.duration_s:.3f} s, {clip.num_chunks} chunks, first chunk "
        f"{tokens} ... loaded in {clip.load_s * 1e3:.1f} ms, encoded in {clip.encode_s * 1e3:.1f} ms"
    )


def tokenize_blocks(
    todo: list[int],
    settings: Settings,
    dataset: Dataset,
    encode: Callable[[torch.Tensor], torch.Tensor],
    bar: tqdm,
) -> Iterator[tuple[list[Clip], Counter]]:
    """The clips of each block in `todo`, with their codes or errors, and the seconds of each stage."""
    threads = torch.get_num_threads() if settings.device == "cpu" else 1
    stage_s, audio_s, failed, started = Counter(), 0.0, 0, time.perf_counter()

    def encode_batch(batch: Batch) -> tuple[Batch, np.ndarray, float]:
        begun = time.perf_counter()
        codes = encode(batch.chunks).numpy() if batch.clips else np.empty(0)
        return batch, codes, time.perf_counter() - begun

    batches = make_batches(todo, settings, dataset, stage_s)
    for batch, batch_codes, encode_s in prefetch(encode_batch, batches, threads, ahead=2 * threads):
        stage_s["encoding"] += encode_s
        for clip, codes in zip(batch.clips, batch_codes):
            clip.codes.append(codes)
            clip.encode_s += encode_s / len(batch.clips)
        complete = [
            clip for clip in dict.fromkeys(batch.clips) if len(clip.codes) == clip.num_chunks
        ]
        for clip in complete + [clip for clip in batch.closes if clip.error]:
            audio_s += clip.duration_s
            failed += bool(clip.error)
            bar.update()
            if settings.debug:
                say(describe(clip))
        bar.set_postfix_str(
            f"{audio_s / (time.perf_counter() - started):.0f} s of audio/s, {failed} failed"
        )
        if batch.closes:
            yield batch.closes, Counter(stage_s)
            stage_s.clear()


def tokenize_dataset(settings: Settings, dataset: Dataset, weights: Path | None) -> int:
    """Tokenize one dataset into its files; a rerun goes on where the last one stopped. Returns the exit status."""
    output = Output(settings.output_dir, dataset.stem)
    made_by = identity(settings, dataset, weights)
    num_clips = len(dataset.clips)
    sizes = [min(BLOCK_CLIPS, num_clips - start) for start in range(0, num_clips, BLOCK_CLIPS)]
    started = time.perf_counter()
    with output.locked() if RANK == 0 else nullcontext():
        todo = None
        if RANK == 0 and settle_output(output, made_by, num_clips, settings.overwrite):
            owner = f"process {os.getpid()} on {socket.gethostname()}"
            write_json(output.run, {**made_by, "num_clips": num_clips, "owner": owner})
            todo = [
                index for index, size in enumerate(sizes) if output.read_block(index, size) is None
            ]
        todo = from_first_rank(todo)
        if todo is None:
            say(
                f"{output.csv} is finished already ({num_clips} clips). To make it anew: --overwrite"
            )
            return 0
        if len(todo) < len(sizes):
            say(f"going on: {len(sizes) - len(todo)} of {len(sizes)} blocks are done")
        mine = todo[RANK::WORLD_SIZE]
        if mine:
            encode = make_encode(load_model(settings, weights), settings)
            done = num_clips - sum(sizes[index] for index in todo)
            options = {"desc": dataset.stem, "unit": "clip", "disable": RANK > 0}
            with tqdm(
                total=num_clips,
                initial=done,
                mininterval=0.1 if sys.stderr.isatty() else 30,
                **options,
            ) as bar:
                for clips, stage_s in tokenize_blocks(mine, settings, dataset, encode, bar):
                    output.write_block(clips, stage_s, settings)
        from_first_rank(None)  # all blocks are written
        if RANK > 0:
            return 0
        facts = join_blocks(output, sizes, made_by, settings, started)
        output.run.unlink()
    if not facts["tokenized"]:
        say(
            f"error: none of the {num_clips} clips could be tokenized; the reasons are in {output.failed}"
        )
        return 1
    failed = f", {facts['failed']} failed (see {output.failed})" if facts["failed"] else ""
    print(
        f"{output.csv}: {facts['tokenized']} clips tokenized{failed}; summary in {output.summary}"
    )
    return 0


def from_first_rank(value: object) -> object:
    """What the first of torchrun's processes has for `value`, in all of them, once all have come here."""
    if WORLD_SIZE == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    torch.distributed.barrier()
    return values[0]


def run(settings: Settings) -> int:
    """Everything that the command asks for. Returns the exit status."""
    datasets = [find_dataset(settings, stem) for stem in STEMS[settings.dataset]]
    weights = find_weights(settings)
    if weights is None:
        say("=" * 100)
        say(
            "WARNING: UNTRAINED WEIGHTS. The tokens have the right shape and mean nothing; for a rehearsal only."
        )
        say("=" * 100)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    threads = torch.get_num_threads()
    if WORLD_SIZE > 1:
        # torchrun sets OMP_NUM_THREADS=1 where the user has not; every process gets its share.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // LOCAL_WORLD_SIZE))
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        return max(tokenize_dataset(settings, dataset, weights) for dataset in datasets)
    finally:
        torch.set_num_threads(threads)  # the encoding threads set theirs to 1, and so the process's
        if WORLD_SIZE > 1:
            torch.distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own). Returns the exit status.

    0: finished, failed clips listed. 1: nothing could be tokenized, or the run broke. 2: usage,
    dataset or weights not found, or output that would be replaced. 130, 143: interrupted.
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
        say("\ninterrupted; finished blocks are kept: run the same command to go on")
        return interrupted.args[0]
    except UserError as error:
        status, message = 2, str(error)
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        status, message = 1, f"{type(error).__name__}: {error}"
        message += (
            "\nFinished blocks are kept: run the same command to go on; --debug shows a traceback."
        )
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    exit_status = main()
    if exit_status > 128:  # the encoding threads may be busy for seconds more: do not wait for them
        sys.stdout.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
