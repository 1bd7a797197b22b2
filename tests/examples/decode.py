"""Decode rows of tokens to WAV files, each beside its original if that is there.

    pip install -r requirements.txt pyarrow
    python encodec_tokenizer.py --dataset sample
    python tests/examples/decode.py work/tokenized/tokenized_sample.csv heard --rows 3

The tokens are a CSV or Parquet file with its JSON beside it, which names the model and its weights.
Pretrained and untrained weights need no flag; name others with --weights, as for the tokenizer. A
row may hold a whole clip or a chunk. A row that averages several chunks cannot be decoded, and is
skipped. With --audio_dir, the originals are copied beside the decoded rows. Tokens that a model
made (see sequence_model.py) have no originals.

The 48 kHz model divides each segment of 1 s by its loudness, which the tokens do not hold: compare
the shape of the sound, not its level.
"""

import argparse
import ast
import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import encodec_tokenizer as script


def codes_of(row: pd.Series) -> np.ndarray:
    """The codes [K, F] of a row: from a list, from text, or from the columns token_0, ..."""
    tokens = row["tokens"] if "tokens" in row else row.filter(regex=r"^token_\d+$")
    if isinstance(tokens, str):
        tokens = tokens.split()
    return np.asarray(tokens).astype(int).reshape(ast.literal_eval(row["token_shape"]))


def weights_of(record: dict) -> str:
    """Where to find the weights that the tokens' JSON names; ends the program if only you know."""
    file = record["weights_file"]
    if file is None:
        return "untrained"
    if file == script.MODELS[record["settings"]["model"]].checkpoint:
        return "pretrained"
    sys.exit(f"error: the tokens were made with the weights in {file}: add --weights and its path")


def make_encoder(record: dict, weights: str) -> script.Encoder:
    """Load the model that the tokens' JSON names; ends the program if the weights are others."""
    made = record["settings"]
    try:
        settings = script.Settings(
            model=made["model"], bandwidth=made["bandwidth"], weights=weights
        )
        settings = script.resolve_device(settings)
        model, digest = script.load_model(settings, script.find_weights(settings))
    except script.UserError as error:
        sys.exit(f"error: {error}")
    if digest != made["weights"]:
        sys.exit(
            f"error: the tokens were made with other weights ({record['weights_file']}, SHA-256 "
            f"{made['weights'][:8]}) than --weights {weights} ({digest[:8]})"
        )
    return script.make_encoder(model, settings)


def span_of(row: pd.Series, made: dict) -> tuple[float, float]:
    """In seconds: where in its clip the sound of a row starts, and its length without padding."""
    start_s = row.get("start_sec", 0.0)
    rest_s = row.get("duration_sec", math.inf) - start_s  # a generated row has no duration
    return start_s, min(rest_s, made.get("target_duration", math.inf))


def decode_row(row: pd.Series, made: dict, encoder: script.Encoder) -> tuple[np.ndarray, int]:
    """Decode a row to samples [C, T] without its padding, as a WAV file can hold them."""
    samples, rate = script.decode(codes_of(row)[None], encoder)
    sound = samples[0]
    _, length_s = span_of(row, made)
    if length_s < math.inf:
        sound = sound[:, : round(length_s * rate)]
    if encoder.model.normalize:
        sound = sound / max(1, abs(sound).max())  # a WAV file holds -1 to 1
    return sound, rate


def write_original(path: str, audio: Path, start_s: float, length_s: float) -> None:
    """Copy the part of a sound file that a row holds, at the file's own rate."""
    samples, rate = soundfile.read(audio)
    first, length = round(start_s * rate), round(length_s * rate)
    soundfile.write(path, samples[first : first + length], rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=Path, help="tokenized_<stem>.csv or .parquet")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--audio_dir", type=Path, help="folder of the originals (default: none)")
    parser.add_argument("--weights", help="the checkpoint of the tokenizer's run, if it had one")
    parser.add_argument(
        "--rows", type=int, default=5, help="number of rows, from the first (default: 5)"
    )
    args = parser.parse_args()
    if args.tokens.suffix == ".parquet":
        table = pd.read_parquet(args.tokens).head(args.rows)
    else:
        table = pd.read_csv(
            args.tokens, keep_default_na=False, nrows=args.rows, dtype={"fname": str}
        )
    record = json.loads(args.tokens.with_suffix(".json").read_text(encoding="utf-8"))
    encoder = make_encoder(record, args.weights or weights_of(record))
    made = record["settings"]
    args.out.mkdir(parents=True, exist_ok=True)
    for i, row in table.iterrows():
        fname, num_chunks = row["fname"], row["num_chunks"]
        if num_chunks > 1 and made["aggregate"] not in script.DECODABLE:
            print(f"{fname} skipped: this row averages {num_chunks} chunks and cannot be decoded")
            continue
        sound, rate = decode_row(row, made, encoder)
        name = args.out / f"{i:03d}_{Path(fname).stem}"
        soundfile.write(f"{name}_decoded.wav", sound.T, rate)
        print(f"{name}_decoded.wav: {sound.shape[1] / rate:.2f} s")
        # A row of latent or medoid does not say where in a clip of several chunks it starts.
        start_is_known = num_chunks == 1 or "start_sec" in row
        if args.audio_dir and (args.audio_dir / fname).is_file() and start_is_known:
            span = span_of(row, made)
            write_original(f"{name}_original.wav", args.audio_dir / fname, *span)


if __name__ == "__main__":
    main()
