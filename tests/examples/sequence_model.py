"""Train a small GPT on the tokens of whole clips, one sequence per clip.

    pip install numpy pandas pyarrow torch tqdm
    python encodec_tokenizer.py --dataset curated --whole --parquet
    python tests/examples/sequence_model.py work/tokenized/tokenized_train_curated.parquet
    python tests/examples/decode.py work/tokenized/generated.csv heard

Each codebook gets ids of its own: code c of codebook k is id 1024 * k + c. The frames of a clip are
interleaved: all codebooks of frame 0, then of frame 1, and so on. An end id closes each clip. The
clips follow each other in one stream, which is cut into blocks of one length, without padding.
The program shows the loss while it trains, and then that of the first and of the last step beside
ln(vocabulary), which is the loss of a model that finds every id equally likely. It is the loss on
the training clips. Then it writes a clip that the model makes up to generated.csv, which decode.py
turns into sound. After a few steps that is noise: such a small model shows the way, not the result.
"""

import argparse
import ast
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

CODES = 1024  # entries of a codebook


def read_clips(path: str) -> list[np.ndarray]:
    """The codes [K, F] of each row of a Parquet file; F differs from row to row."""
    table = pd.read_parquet(path, columns=["token_shape", "tokens"])
    shapes = table["token_shape"].map(ast.literal_eval)
    return [tokens.reshape(shape) for tokens, shape in zip(table["tokens"], shapes)]


def pack(clips: list[np.ndarray]) -> np.ndarray:
    """Clips of codes [K, F] -> one stream of ids [N]; the end id is 1024 * K."""
    offsets = CODES * np.arange(len(clips[0]), dtype=np.int32)[:, None]
    end = np.array([CODES * len(offsets)], dtype=np.int32)
    parts = [part for codes in clips for part in ((codes + offsets).T.ravel(), end)]
    return np.concatenate(parts)


def unpack(ids: np.ndarray, codebooks: int) -> list[np.ndarray]:
    """The inverse of pack, for ids that a model has drawn: codes [K, F] of each ended clip."""
    (ends,) = np.nonzero(ids == CODES * codebooks)
    clips = [clip[clip < CODES * codebooks] for clip in np.split(ids, ends + 1)[:-1]]
    return [clip.reshape(-1, codebooks).T % CODES for clip in clips]


class GPT(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.ids = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), False)
        self.head = nn.Linear(width, vocabulary)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, T] -> logits [B, T, vocabulary] of the id after each."""
        length = ids.shape[1]
        x = self.ids(ids) + self.places.weight[:length]
        return self.head(self.layers(x, self.mask[:length, :length], is_causal=True))


def train(
    stream: np.ndarray, vocabulary: int, steps: int, length: int, batch: int
) -> tuple[GPT, list[float]]:
    """Train on random blocks of `length` ids. Returns the model, and the loss of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = (len(stream) - 1) // length  # what is left over at the end of the stream is not used
    if not count:
        raise SystemExit(f"There are {len(stream)} ids, too few for one block: lower --length.")
    ids = torch.from_numpy(stream)
    inputs = ids[: count * length].view(count, length)
    targets = ids[1 : count * length + 1].view(count, length)
    model, losses = GPT(vocabulary, length).to(device), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    bar = tqdm(range(steps), "training", unit="step")
    for _ in bar:
        chosen = torch.randint(count, (batch,))
        logits = model(inputs[chosen].long().to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets[chosen].long().flatten().to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.2f}", refresh=False)
    return model.eval(), losses


@torch.no_grad()
def generate(model: GPT, codebooks: int, frames: int) -> np.ndarray:
    """Draw the codes [K, F] of a clip, id by id; at each place only codes of its codebook."""
    ids = torch.tensor([[CODES * codebooks]], device=model.mask.device)  # the end of another clip
    for place in tqdm(range(frames * codebooks), "generating", unit="id"):
        first = CODES * (place % codebooks)
        logits = model(ids[:, -len(model.mask) :])[0, -1, first : first + CODES]
        drawn = first + torch.multinomial(logits.softmax(dim=0), 1)
        ids = torch.cat([ids, drawn[None]], dim=1)
    return ids[0, 1:].view(frames, codebooks).T.cpu().numpy() % CODES


def write_generated(codes: np.ndarray, parquet: Path) -> Path:
    """Write codes [K, F] as a row beside the training clips, with a copy of their JSON."""
    path = parquet.with_name("generated.csv")
    text = " ".join(map(str, codes.ravel()))
    row = {"fname": "generated", "num_chunks": 1, "token_shape": str(codes.shape), "tokens": text}
    pd.DataFrame([row]).to_csv(path, index=False)
    shutil.copy(parquet.with_suffix(".json"), path.with_suffix(".json"))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parquet", type=Path, help="tokenized_<stem>.parquet of a run with --whole --parquet"
    )
    parser.add_argument("--steps", type=int, default=50, help="training steps (default: 50)")
    parser.add_argument("--length", type=int, default=256, help="ids in a block (default: 256)")
    parser.add_argument("--batch", type=int, default=4, help="blocks in a step (default: 4)")
    parser.add_argument(
        "--frames", type=int, default=150, help="frames of the generated clip (default: 150)"
    )
    args = parser.parse_args()
    clips = read_clips(args.parquet)
    stream, vocabulary = pack(clips), CODES * len(clips[0]) + 1
    print(f"{len(clips)} clips, {len(stream)} ids, {vocabulary} different ones possible")
    model, losses = train(stream, vocabulary, args.steps, args.length, args.batch)
    print(f"ln(vocabulary) {math.log(vocabulary):.2f}")
    print(f"loss of step 1 {losses[0]:.2f}, of step {len(losses)} {losses[-1]:.2f}")
    codes = generate(model, len(clips[0]), args.frames)
    print(f"generated: {write_generated(codes, args.parquet)}")


if __name__ == "__main__":
    main()
