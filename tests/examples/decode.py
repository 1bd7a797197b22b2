"""Decode rows of tokens to WAV files, each beside its original if that is there.

    pip install -r requirements.txt pyarrow
    python tests/examples/decode.py work/tokenized/tokenized_sample.csv heard --rows 3

The tokens are a CSV or Parquet file with its JSON beside it, which names the model and the weights.
A row may be a whole clip or a chunk; a row that averages several chunks cannot be decoded, and is
skipped. Tokens that a model made (see sequence_model.py) have no originals.

The 48 kHz model encodes segments of 1 s that overlap by 1 %, so they are decoded one by one and
joined with that overlap. The model divides each segment by its loudness first, and the tokens do
not hold that scale. So every segment is decoded at the same loudness: compare the shape of the
sound, not its level. --scale_from_original computes the scale from the original, as the model did.
"""

import argparse
import ast
import json
import sys
from bisect import bisect_left
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from encodec import EncodecModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import encodec_tokenizer as script

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


def load_model(made: dict, weights: str) -> EncodecModel:
    """The model that the JSON names; ends the program if the tokens are of other weights."""
    names = {key: made["settings"][key] for key in ("model", "bandwidth")}
    try:
        settings = script.Settings(**names, weights=weights)
        model, digest = script.load_model(settings, script.find_weights(settings))
    except script.UserError as error:
        sys.exit(f"error: {error}")
    if digest != made["settings"]["weights"]:
        sys.exit(
            f"error: the tokens were made with other weights ({made['weights_file']}, SHA-256 "
            f"{made['settings']['weights'][:16]}) than --weights {weights} ({digest[:16]})"
        )
    return model


def original(row: pd.Series, folder: Path | None, settings: script.Settings) -> torch.Tensor | None:
    """The audio [C, T] that a row was made of, or None if its file is not there."""
    path = folder / row["fname"] if folder else None
    if path is None or not path.is_file():
        return None
    audio = script.load_sound(path, None, settings)
    if settings.whole:
        return audio
    starts, chunks = script.split_chunks(audio, settings)
    rate = script.MODELS[settings.model].sample_rate
    return chunks[starts.index(round(row.get("start_sec", 0) * rate))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=Path, help="tokenized_<stem>.csv or .parquet")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--audio_dir", type=Path, help="folder of the originals (optional)")
    parser.add_argument("--weights", default="pretrained", help="those of the tokenizer's run")
    parser.add_argument("--rows", type=int, default=5, help="number of rows, from the first")
    parser.add_argument("--scale_from_original", action="store_true", help="48 kHz only")
    args = parser.parse_args()
    if args.tokens.suffix == ".parquet":
        table = pd.read_parquet(args.tokens).head(args.rows)
    else:
        table = pd.read_csv(args.tokens, keep_default_na=False, nrows=args.rows)
    made = json.loads(args.tokens.with_suffix(".json").read_text(encoding="utf-8"))
    model = load_model(made, args.weights)
    names = ("model", "whole", "target_duration", "overlap")
    known = {name: made["settings"][name] for name in names if name in made["settings"]}
    settings = script.Settings(**known, device="cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    for i, row in table.iterrows():
        one_chunk = row["num_chunks"] == 1 or "start_sec" in row
        if not one_chunk and made["settings"].get("aggregate") == "mean":
            count = row["num_chunks"]
            print(f"{row['fname']} skipped: this row averages {count} chunks and cannot be decoded")
            continue
        heard = original(row, args.audio_dir, settings) if one_chunk else None
        scaled = args.scale_from_original and model.normalize and heard is not None
        decoded = decode(model, row_codes(row), loudness(model, heard) if scaled else None)
        if model.normalize and not scaled:
            decoded = decoded / decoded.abs().max().clamp(min=1)  # WAV holds -1 to 1
        name = args.out / f"{i:03d}_{Path(row['fname']).stem}"
        if heard is not None:
            decoded = decoded[:, : heard.shape[1]]
            soundfile.write(f"{name}_original.wav", heard.T.numpy(), model.sample_rate)
        soundfile.write(f"{name}_decoded.wav", decoded.T.numpy(), model.sample_rate)
        print(f"{name}_decoded.wav: {decoded.shape[1] / model.sample_rate:.2f} s")


if __name__ == "__main__":
    main()
