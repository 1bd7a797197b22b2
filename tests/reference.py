"""What the script must compute, in plain steps: one chunk at a time through EncodecModel.encode.

Shares no code with the script.
"""

from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from encodec import EncodecModel


def load(path: Path, sample_rate: int, channels: int) -> torch.Tensor:
    """A file as [channels, T] at the model's rate."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    audio = torch.from_numpy(samples.T.copy())
    if channels == 1:
        audio = audio.mean(0, keepdim=True)
    elif audio.shape[0] == 1:
        audio = torch.cat([audio, audio])
    elif audio.shape[0] > 2:
        audio = torch.cat([audio.mean(0, keepdim=True)] * 2)
    return torchaudio.transforms.Resample(rate, sample_rate)(audio)


def chunks(audio: torch.Tensor, rate: int, target_s: float = 2.0, overlap: float = 0.1) -> list:
    """Pad to the target duration, or cut into overlapping pieces, the last at the clip's end."""
    size = round(target_s * rate)
    if audio.shape[1] <= size:
        missing = size - audio.shape[1]
        return [torch.cat([audio, torch.zeros(audio.shape[0], missing)], dim=1)]
    pieces, start = [], 0
    while start + size <= audio.shape[1]:
        pieces.append(audio[:, start : start + size])
        covered = start + size
        start += round(size * (1 - overlap))
    if covered < audio.shape[1]:
        pieces.append(audio[:, -size:])
    return pieces


@torch.no_grad()
def codes(model: EncodecModel, chunk: torch.Tensor) -> np.ndarray:
    """[C, T] -> [K, F], the codes of all segments in time order."""
    frames = model.encode(chunk[None].to(next(model.parameters()).device))
    return torch.cat([frame_codes[0] for frame_codes, _ in frames], dim=1).cpu().numpy()


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The share of tokens [..., K, F] that are equal, a frame's only up to its first difference.

    Where rounding decides a near tie, the codebooks after it quantize another residual: one cause.
    """
    differs = np.asarray(ours) != np.asarray(theirs)
    counted = np.cumsum(differs, axis=-2) - differs == 0
    return 1 - differs[counted].mean()


def whole(model: EncodecModel, path: Path) -> np.ndarray:
    """The tokens of a clip in one piece, before flattening: [K, F]."""
    return codes(model, load(path, model.sample_rate, model.channels))


def row(model: EncodecModel, path: Path, target_s: float = 2.0, overlap: float = 0.1) -> np.ndarray:
    """The tokens of a clip's row, before flattening: [K, F]."""
    audio = load(path, model.sample_rate, model.channels)
    pieces = chunks(audio, model.sample_rate, target_s, overlap)
    return np.rint(np.mean([codes(model, piece) for piece in pieces], axis=0)).astype(int)
