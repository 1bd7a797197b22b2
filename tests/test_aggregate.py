"""How a clip's chunks become rows, against plain EnCodec."""

import ast
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from conftest import main, write_dataset

from encodec_tokenizer import AGGREGATES, MODELS


def plain_latents(model, chunk):
    """[C, T] -> [D, F]: what the encoder gives for the chunk's segments, in time order."""
    length = model.segment_length or chunk.shape[1]
    stride = model.segment_stride or length
    latents = []
    for start in range(0, chunk.shape[1], stride):
        segment = chunk[None, :, start : start + length]
        if model.normalize:
            volume = segment.mean(1, keepdim=True).pow(2).mean(2, keepdim=True).sqrt()
            segment = segment / (1e-8 + volume)
        latents.append(model.encoder(segment)[0])
    return torch.cat(latents, dim=1)


@pytest.fixture(scope="session", params=MODELS)
def tokenized(request, tmp_path_factory, sound, weights, plain):
    """The plain model, the chunks of a short and a long clip, and every aggregate's folder."""
    name, folder = request.param, tmp_path_factory.mktemp("tokenized")
    clips = {"short.wav": (sound(1.5), 44_100), "long.wav": (sound(7.0), 44_100)}
    root, model = write_dataset(folder / "input", clips, "train_curated"), plain(name)
    chunks = {}
    for clip in clips:
        audio = reference.load(root / "train_curated" / clip, model.sample_rate, model.channels)
        chunks[clip] = reference.chunks(audio, model.sample_rate)
    for how in AGGREGATES:  # the first run encodes, the others take its codes
        flags = ["--aggregate", how, "--model", name, "--output_dir", folder / "out"]
        flags += ["--input_dir", root, "--device", "cpu", "--weights", weights(name)]
        assert main(*flags, "--overwrite") == 0
        (folder / how).mkdir()
        for path in (folder / "out").glob("*train_curated.*"):
            shutil.copy(path, folder / how)
    assert len({path.stat().st_mtime_ns for path in folder.rglob("*.npz")}) == 2
    return name, chunks, folder


def table_of(folder, how):
    return pd.read_csv(folder / how / "tokenized_train_curated.csv")


def tokens(table, clip):
    rows = table[table["fname"] == clip]
    shape = ast.literal_eval(rows["token_shape"].iloc[0])
    return rows.filter(regex=r"^token_\d+$").to_numpy().reshape(-1, *shape)


def agree(ours, theirs):
    return ours.shape == theirs.shape and reference.agreement(ours, theirs) >= 0.998


@torch.no_grad()
def test_every_aggregate_is_what_plain_encodec_gives(tokenized, plain):
    name, chunks, folder = tokenized
    model, tables = plain(name), {how: table_of(folder, how) for how in AGGREGATES}
    (only,) = [reference.codes(model, chunk) for chunk in chunks["short.wav"]]
    for table in tables.values():
        assert agree(tokens(table, "short.wav"), only[None])

    codes = np.stack([reference.codes(model, chunk) for chunk in chunks["long.wav"]])
    assert len(codes) == 4
    assert agree(tokens(tables["none"], "long.wav"), codes)
    assert agree(tokens(tables["mean"], "long.wav"), np.rint(codes.mean(0))[None])

    latents = torch.stack([plain_latents(model, chunk) for chunk in chunks["long.wav"]])
    mean = latents.mean(0)
    quantized = model.quantizer.encode(mean[None], model.frame_rate, 6.0)[:, 0].numpy()
    assert agree(tokens(tables["latent"], "long.wav"), quantized[None])
    nearest = int((latents - mean).flatten(1).norm(dim=1).argmin())
    assert agree(tokens(tables["medoid"], "long.wav"), codes[nearest][None])


def test_rows_of_none_carry_their_chunk_and_where_it_starts(tokenized):
    """The last one is aligned to the clip's end: 7 s less the 2 of a chunk, not 5.4."""
    table = table_of(tokenized[2], "none")
    columns = "fname labels num_tokens token_shape num_chunks duration_sec chunk start_sec token_0"
    assert table.columns[:9].tolist() == columns.split()
    assert table["fname"].tolist() == ["short.wav"] + ["long.wav"] * 4
    assert table["chunk"].tolist() == [0, 0, 1, 2, 3]
    assert table["start_sec"].tolist() == [0, 0, 1.8, 3.6, 5.0]
    assert table["num_chunks"].tolist() == [1, 4, 4, 4, 4]
    assert not {"chunk", "start_sec"} & set(table_of(tokenized[2], "latent").columns)


@torch.no_grad()
def test_a_row_of_none_is_the_audio_that_starts_where_it_says(tokenized, plain):
    name, _, folder = tokenized
    table, model = table_of(folder, "none"), plain(name)
    path = folder / "input" / "train_curated" / "long.wav"
    audio = reference.load(path, model.sample_rate, model.channels)
    starts = table[table["fname"] == "long.wav"]["start_sec"]
    pieces = [audio[:, round(s * model.sample_rate) :][:, : 2 * model.sample_rate] for s in starts]
    assert agree(tokens(table, "long.wav"), np.stack([reference.codes(model, p) for p in pieces]))


def test_the_summary_counts_clips_and_rows(tokenized):
    summary = (tokenized[2] / "none" / "summary_train_curated.txt").read_text()
    assert "Total samples processed: 2\n" in summary and "Rows: 5\n" in summary


def test_mean_rounds_half_to_even():
    kept = SimpleNamespace(codes=np.array([[[0, 1, 3]], [[1, 2, 1023]]], dtype=np.uint16))
    assert AGGREGATES["mean"](kept).tolist() == [[[0, 2, 513]]]


def test_the_summary_tells_codes_padding_and_silence(run, make_dataset, sound, weights, tmp_path):
    clips = {
        "long.wav": (sound(7.0), 44_100),
        "short.wav": (sound(1.5), 44_100),
        "silent.wav": (np.zeros(44_100), 44_100),
    }
    path, root = weights("encodec_24khz"), make_dataset(clips)
    assert run("--input_dir", root, "--aggregate", "none", weights=path)[0] == 0
    facts = json.loads((tmp_path / "out" / "tokenized_train_curated.json").read_text())
    assert (facts["padded_clips"], facts["total_padding_sec"]) == (2, 1.5)
    assert facts["silent_clips"] == ["silent.wav"]
    summary = (tmp_path / "out" / "summary_train_curated.txt").read_text()
    assert "Padded clips: 2\n" in summary and "Silent clips: silent.wav\n" in summary
    every = table_of(tmp_path, "out").filter(regex=r"^token_\d+$").to_numpy().reshape(-1, 8, 150)
    used = [len(np.unique(every[:, k])) for k in range(8)]
    assert facts["codes_in_use_per_codebook"] == used
    for k, even in enumerate(facts["perplexity_per_codebook"]):
        shares = np.unique(every[:, k], return_counts=True)[1] / every[:, k].size
        assert even == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=0.06)
