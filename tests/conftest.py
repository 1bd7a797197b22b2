import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import standin  # noqa: E402

import encodec_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """name of a model -> a checkpoint file of stand-in weights, made once where it is asked for."""
    folder = tmp_path_factory.mktemp("weights")

    def path(name: str) -> Path:
        file = folder / f"{name}.th"
        if not file.exists():
            torch.save(standin.stand_in(name), file)
        return file

    return path


@pytest.fixture
def run(tmp_path, capfd):
    """Runs a command line in this process, untrained by default: (exit status, stdout, stderr)."""

    def command(*args, weights="untrained", device="cpu"):
        argv = ["--output_dir", tmp_path / "out", "--device", device, "--weights", weights, *args]
        try:
            status = encodec_tokenizer.main([str(arg) for arg in argv])
        except SystemExit as stop:
            status = stop.code
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return command


@pytest.fixture
def make_dataset(tmp_path):
    """Writes clips, given as name -> (samples [T, C], rate), and their CSV in Kaggle's layout."""

    def write(clips: dict, stem: str = "train_curated", rows: list | None = None) -> Path:
        folder = tmp_path / "input" / stem
        folder.mkdir(parents=True)
        for name, (samples, rate) in clips.items():
            soundfile.write(folder / name, samples, rate)
        rows = rows or [(name, f"Label_{i},Slam") for i, name in enumerate(clips)]
        with (folder.parent / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("fname", "labels"), *rows])
        return folder.parent

    return write


@pytest.fixture(scope="session")
def sound():
    """sound(seconds, rate, channels, seed): [T, channels] of varied audio."""

    def make(seconds: float, rate: int = 44_100, channels: int = 1, seed: int = 0) -> np.ndarray:
        audio = standin.varied_audio(rate, 1, int(seconds) + 2, seed)
        mono = audio.reshape(-1)[: round(seconds * rate)].numpy()
        mixes = [mono * 0.9**i + 0.1 * np.roll(mono, 50 * i) for i in range(channels)]
        return np.clip(np.stack(mixes, axis=1), -1, 1)

    return make
