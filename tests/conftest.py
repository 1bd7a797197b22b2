import copy
import csv
import functools
import os
import sys
from pathlib import Path

# Here and in all processes that tests start: two threads of a library for linear algebra, on a
# machine that has other work, take ten times as long as one, for they wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import filelock
import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import faults  # noqa: E402
import standin  # noqa: E402

import encodec_tokenizer  # noqa: E402

# To draw untrained codebooks takes seconds: it is done once, and each test gets a copy.
untrained_model = encodec_tokenizer.untrained_model
made_once = functools.cache(untrained_model)
encodec_tokenizer.untrained_model = lambda name: copy.deepcopy(made_once(name))


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """weights(name of a model): a checkpoint file of stand-in weights, made of little audio.

    It is made once for all processes of the suite, whose folders lie side by side (pytest-xdist).
    """
    sizes = {"encodec_24khz": (8, 700, 12), "encodec_48khz": (4, 1500, 12)}
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def path(name: str) -> Path:
        file = folder / f"{name}.th"
        with filelock.FileLock(file.with_suffix(".lock")):
            if not file.exists():
                torch.save(standin.stand_in(name, *sizes[name]), file)
        return file

    return path


@pytest.fixture(scope="session")
def plain(weights):
    """plain(name, kbps): Meta's own model with the stand-in's weights, loaded once."""
    models = functools.cache(lambda name: standin.plain_model(name, weights(name)))

    def at_bandwidth(name: str, kbps: float = 6.0):
        models(name).set_target_bandwidth(kbps)
        return models(name)

    return at_bandwidth


@pytest.fixture
def run(tmp_path, capfd):
    """Runs a command line in this process, untrained by default: (exit status, stdout, stderr)."""

    def command(*args, weights="untrained", device="cpu"):
        flags = ["--output_dir", tmp_path / "out", "--device", device, "--weights", weights]
        try:
            status = encodec_tokenizer.main([str(arg) for arg in (*flags, *args)])
        except SystemExit as stop:
            status = stop.code
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return command


@pytest.fixture
def ready_made_codes(monkeypatch):
    """Codes come from tests/faults.py: for tests in which the model makes no difference."""
    monkeypatch.setattr(encodec_tokenizer, "load_model", faults.load_model)
    monkeypatch.setattr(encodec_tokenizer, "make_encoder", faults.Codes)


def write_dataset(folder: Path, clips: dict, stem: str, rows: list | None = None) -> Path:
    """Clips, given as name -> (samples [T, C], rate), and their CSV, in Kaggle's layout."""
    (folder / stem).mkdir(parents=True)
    for name, (samples, rate) in clips.items():
        soundfile.write(folder / stem / name, samples, rate)
    rows = rows or [(name, f"Label_{i},Slam") for i, name in enumerate(clips)]
    with (folder / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("fname", "labels"), *rows])
    return folder


@pytest.fixture
def make_dataset(tmp_path):
    """Writes clips and their CSV below the test's folder; see write_dataset."""

    def write(clips: dict, stem: str = "train_curated", rows: list | None = None) -> Path:
        return write_dataset(tmp_path / "input", clips, stem, rows)

    return write


@pytest.fixture(scope="session")
def sound():
    """sound(seconds, rate, channels, seed): [T, channels] of varied audio."""

    @functools.cache
    def make(seconds: float, rate: int = 44_100, channels: int = 1, seed: int = 0) -> np.ndarray:
        audio = standin.varied_audio(rate, 1, int(seconds) + 2, seed)
        mono = audio.reshape(-1)[: round(seconds * rate)].numpy()
        mixes = [mono * 0.9**i + 0.1 * np.roll(mono, 50 * i) for i in range(channels)]
        audio = np.clip(np.stack(mixes, axis=1), -1, 1)
        audio.flags.writeable = False  # it is shared
        return audio

    return make
