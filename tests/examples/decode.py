"""Decode rows of tokens to WAV files, each beside its original.

    pip install encodec numpy pandas pyarrow soundfile torch torchaudio
    python tests/examples/decode.py work/tokenized/tokenized_sample.csv tests/sample heard --rows 3

The tokens are a CSV or Parquet file, with its tokenized_<stem>.json beside it. A row may be a whole
clip or a chunk. The mean of several chunks holds no EnCodec codes, so such a row is refused.

The 48 kHz model encodes segments of 1 s that overlap by 1 %, so they are decoded one by one and
joined with that overlap. The model divides each segment by its loudness first, and the tokens do
not hold that scale. So every segment is decoded at the same loudness: compare the shape of the
sound, not its level. --scale_from_original computes the scale from the original, as the model did.
"""

import argparse
import ast
import json
from bisect import bisect_left
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
import torchaudio
from encodec import EncodecModel

HOP = 320  # samples in a frame, of both models


def row_codes(row: pd.Series) -> torch.Tensor:
    """The codes [K, F] of a row: from a list, from text, or from the columns token_0, ..."""
    shape = ast.literal_eval(row["token_shape"])
    tokens = row["tokens"] if "tokens" in row else row.filter(regex=r"^token_\d+$")
    tokens = tokens.split() if isinstance(tokens, str) else tokens
    # The embedding of a codebook accepts int64; Parquet gives uint16.
    return torch.from_numpy(np.asarray(tokens).astype(np.int64).reshape(shape))


def segments(model: EncodecModel, samples: int) -> list[slice]:
    """The pieces that EncodecModel.encode cuts a sound into; at 24 kHz there is one."""
    size, stride = model.segment_length or samples, model.segment_stride or samples
    return [slice(start, min(start + size, samples)) for start in range(0, samples, stride)]


def frame_counts(model: EncodecModel, samples: int) -> list[int]:
    """The frames of each segment; at 48 kHz, 2 s have 150, 150 and 3."""
    return [ceil((part.stop - part.start) / HOP) for part in segments(model, samples)]


@torch.no_grad()
def decode(model: EncodecModel, codes: torch.Tensor, scales: list | None = None) -> torch.Tensor:
    """Codes [K, F] of a chunk or a whole clip -> samples [C, T]; scales: one for each segment."""
    frames = codes.shape[1]
    # Longer sounds have more frames, so bisection finds a length that has as many as the row.
    lengths = range(1, HOP * frames + 1)
    at = bisect_left(lengths, frames, key=lambda length: sum(frame_counts(model, length)))
    parts = codes.split(frame_counts(model, lengths[at]), dim=1)
    if model.segment and [part.shape[1] for part in parts[-2:]] == [150, 1]:
        parts = parts[:-1]  # EnCodec's overlap-add fails here; the segment before holds it all
    scales = scales or [torch.ones(1, 1) if model.normalize else None] * len(parts)
    return model.decode([(part[None], scale) for part, scale in zip(parts, scales)])[0]


def loudness(model: EncodecModel, audio: torch.Tensor) -> list[torch.Tensor]:
    """The scale of each segment of [C, T], as EncodecModel has it: the RMS of its mono mix."""
    mono = [audio[:, part].mean(dim=0) for part in segments(model, audio.shape[1])]
    return [1e-8 + part.pow(2).mean().sqrt().view(1, 1) for part in mono]


def load(path: Path, model: EncodecModel) -> torch.Tensor:
    """A file as the model wants it, [C, T]."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    audio = torch.from_numpy(samples.T.copy())
    if len(audio) != model.channels:
        audio = audio.mean(dim=0, keepdim=True).repeat(model.channels, 1)
    return torchaudio.transforms.Resample(rate, model.sample_rate)(audio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=Path, help="tokenized_<stem>.csv or .parquet")
    parser.add_argument("audio_dir", type=Path, help="the folder of the originals")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--weights", default="pretrained", help="or a checkpoint file")
    parser.add_argument("--rows", type=int, default=5, help="how many rows, from the first")
    parser.add_argument("--scale_from_original", action="store_true", help="48 kHz only")
    args = parser.parse_args()
    if args.tokens.suffix == ".parquet":
        table = pd.read_parquet(args.tokens).head(args.rows)
    else:
        table = pd.read_csv(args.tokens, keep_default_na=False, nrows=args.rows)
    made = json.loads(args.tokens.with_suffix(".json").read_text(encoding="utf-8"))
    build = getattr(EncodecModel, made["model"].replace("encodec_", "encodec_model_"))
    model = build(pretrained=args.weights == "pretrained")
    if args.weights != "pretrained":
        model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
    args.out.mkdir(parents=True, exist_ok=True)
    for i, row in table.iterrows():
        one_chunk = row["num_chunks"] == 1 or "start_sec" in row
        if not one_chunk and made["aggregate"] == "mean":
            print(f"{row['fname']} is refused: a mean of {row['num_chunks']} chunks is no codes.")
            continue
        heard, scales = load(args.audio_dir / row["fname"], model), None
        if one_chunk and not made.get("whole"):  # cut and pad it as the script did
            size = round(made["target_duration"] * model.sample_rate)
            heard = heard[:, round(row.get("start_sec", 0) * model.sample_rate) :][:, :size]
            heard = torch.nn.functional.pad(heard, (0, size - heard.shape[1]))
        if args.scale_from_original and model.normalize and one_chunk:
            scales = loudness(model, heard)
        decoded = decode(model, row_codes(row), scales)[:, : heard.shape[1]]
        if model.normalize and not scales:
            decoded = decoded / decoded.abs().max().clamp(min=1)  # WAV holds -1 to 1
        name = args.out / f"{i:03d}_{Path(row['fname']).stem}"
        for kind, audio in {"original": heard, "decoded": decoded}.items():
            soundfile.write(f"{name}_{kind}.wav", audio.T.numpy(), model.sample_rate)
        seconds = decoded.shape[1] / model.sample_rate
        levels = [f"{audio.pow(2).mean().sqrt():.3f}" for audio in (heard, decoded)]
        print(f"{name}_decoded.wav: {seconds:.2f} s, RMS {levels[1]}; the original's {levels[0]}")


if __name__ == "__main__":
    main()
