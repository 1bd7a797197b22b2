"""How a clip's chunks become rows, against plain EnCodec; and what the summary says of them."""

import ast
import json

import numpy as np
import pandas as pd
import pytest
import reference
import torch

from encodec_tokenizer import AGGREGATES, MODELS

CSV = "tokenized_train_curated.csv"


def plain_latents(model, chunk):
    """[C, T] -> [D, F]: what the encoder gives for the chunk's segments, in time order."""
    length = model.segment_length or chunk.shape[1]
    latents = []
    for start in range(0, chunk.shape[1], model.segment_stride or length):
        segment = chunk[None, :, start : start + length]
        if model.normalize:
            volume = segment.mean(1, keepdim=True).pow(2).mean(2, keepdim=True).sqrt()
            segment = segment / (1e-8 + volume)
        latents.append(model.encoder(segment)[0])
    return torch.cat(latents, dim=1)


@torch.no_grad()
def plain_rows(model, path):
    """What each aggregate has to make of a clip, in plain steps: how -> [R, K, F]."""
    audio = reference.load(path, model.sample_rate, model.channels)
    chunks = reference.chunks(audio, model.sample_rate, target_s=1.0)
    codes = np.stack([reference.codes(model, chunk) for chunk in chunks])
    latents = torch.stack([plain_latents(model, chunk) for chunk in chunks])
    mean = latents.mean(0)
    nearest = int((latents - mean).flatten(1).norm(dim=1).argmin())
    of_mean = model.quantizer.encode(mean[None], model.frame_rate, 6.0)[:, 0].numpy()
    rows = {"mean": np.rint(codes.mean(0, keepdims=True)), "latent": of_mean[None]}
    return rows | {"medoid": codes[[nearest]], "none": codes}


def tokens(rows):
    """The tokens of a table's rows, of one shape: [R, K, F]."""
    shape = ast.literal_eval(rows["token_shape"].iloc[0])
    return rows.filter(regex=r"^token_\d+$").to_numpy().reshape(-1, *shape)


@pytest.mark.parametrize("name", MODELS)
def test_every_aggregate_is_what_plain_encodec_gives(
    name, run, make_dataset, sound, weights, plain, tmp_path
):
    """Also of codes that are there: only the first run encodes."""
    root = make_dataset({"short.wav": (sound(0.7), 44_100), "long.wav": (sound(2.5), 44_100)})
    flags = ["--input_dir", root, "--model", name, "--target_duration", 1.0, "--overwrite"]
    clips = sorted((root / "train_curated").iterdir())
    expected = {path.name: plain_rows(plain(name), path) for path in clips}
    assert expected["long.wav"]["none"].shape[0] == 3
    new = 2
    for how in AGGREGATES:
        status, out, _ = run(*flags, "--aggregate", how, weights=weights(name))
        assert status == 0 and f"({new} encoded now, {2 - new} already there)" in out
        table, new = pd.read_csv(tmp_path / "out" / CSV), 0
        for clip, rows in expected.items():
            ours = tokens(table[table["fname"] == clip])
            assert ours.shape == rows[how].shape
            assert reference.agreement(ours, rows[how]) >= 0.998, how


def test_the_summarys_figures_are_those_of_the_rows(
    run, ready_made_codes, make_dataset, sound, tmp_path
):
    """Codes are counted in all chunks, before they are averaged."""
    clips = {"long.wav": (sound(7.0), 44_100), "short.wav": (sound(1.5), 44_100)}
    root, out = make_dataset(clips | {"silent.wav": (np.zeros(44_100), 44_100)}), tmp_path / "out"
    expected = {
        "total_samples_processed": 3,
        "average_duration_sec": 3.17,
        "total_duration_sec": 9.5,
        "average_chunks_per_clip": 2.0,
        "padded_clips": 2,
        "total_padding_sec": 1.5,
        "silent_clips": ["silent.wav"],
    }
    for how, rows in {"mean": 3, "none": 6}.items():
        assert run("--input_dir", root, "--aggregate", how)[0] == 0
        facts = json.loads((out / CSV).with_suffix(".json").read_text())
        expected |= {"rows": rows, "tokens_in_all": rows * 1200}
        expected |= {"token_shape_distribution": {"(8, 150)": rows}}
        assert facts.items() >= expected.items()
        codes = np.concatenate([np.load(path)["codes"] for path in out.rglob("*.npz")])
        for k in range(8):
            counts = np.unique(codes[:, k], return_counts=True)[1]
            assert facts["codes_in_use_per_codebook"][k] == len(counts)
            perplexity = np.exp(-(counts / 900 * np.log(counts / 900)).sum())
            assert facts["perplexity_per_codebook"][k] == pytest.approx(perplexity, abs=0.06)
    text = (out / "summary_train_curated.txt").read_text()
    assert "\nRows: 6\n" in text and "\nSilent clips: silent.wav\n" in text
