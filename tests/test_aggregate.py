"""How a clip's chunks become rows, against plain EnCodec."""

import ast

import numpy as np
import pandas as pd
import pytest
import reference
import standin
import torch

from encodec_tokenizer import MODELS, Clip, aggregate, parse_settings, shared_frames


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


@pytest.fixture(params=MODELS)
def tokenized(request, run, make_dataset, sound, weights, tmp_path):
    """The plain model, the chunks of a short and a long clip, and every aggregation's table."""
    name = request.param
    root = make_dataset({"short.wav": (sound(1.5), 44_100), "long.wav": (sound(7.0), 44_100)})
    model = standin.plain_model(name, weights(name))
    model.set_target_bandwidth(6.0)
    chunks = {}
    for clip in ("short.wav", "long.wav"):
        audio = reference.load(root / "train_curated" / clip, model.sample_rate, model.channels)
        chunks[clip] = reference.chunks(audio, model.sample_rate)
    tables = {}
    for how in ("mean", "latent", "medoid", "none"):
        flags = ["--aggregate", how, "--model", name, "--output_dir", tmp_path / how]
        assert run("--input_dir", root, *flags, weights=weights(name))[0] == 0
        tables[how] = pd.read_csv(tmp_path / how / "tokenized_train_curated.csv")
    return model, chunks, tables


def tokens(table, clip):
    rows = table[table["fname"] == clip]
    shape = ast.literal_eval(rows["token_shape"].iloc[0])
    return rows.filter(regex=r"^token_\d+$").to_numpy().reshape(-1, *shape)


def agree(ours, theirs):
    return ours.shape == theirs.shape and reference.agreement(ours, theirs) >= 0.998


@torch.no_grad()
def test_every_aggregation_is_what_plain_encodec_gives(tokenized):
    model, chunks, tables = tokenized
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


def test_rows_of_none_carry_their_chunk(tokenized):
    table = tokenized[2]["none"]
    columns = "fname labels num_tokens token_shape num_chunks duration_sec chunk token_0"
    assert table.columns[:8].tolist() == columns.split()
    assert table["fname"].tolist() == ["short.wav"] + ["long.wav"] * 4
    assert table["chunk"].tolist() == [0, 0, 1, 2, 3]
    assert table["num_chunks"].tolist() == [1, 4, 4, 4, 4]
    assert "chunk" not in tokenized[2]["latent"].columns


def test_summary_counts_clips_and_rows(tokenized, tmp_path):
    summary = (tmp_path / "none" / "summary_train_curated.txt").read_text()
    assert "Samples processed: 2\n" in summary and "Rows: 5\n" in summary


def test_mean_rounds_half_to_even():
    clip = Clip(0, "a.wav", "", codes=[np.array([[0, 1, 3]]), np.array([[1, 2, 1023]])])
    assert aggregate(clip, "mean", None).tolist() == [[[0, 2, 513]]]


@pytest.mark.parametrize(
    "name, overlap, expected",
    [
        ("encodec_24khz", "0.1", (range(135, 150), range(15))),
        ("encodec_24khz", "0.5", (range(75, 150), range(75))),
        ("encodec_24khz", "0", ([], [])),
    ],
)
def test_shared_frames_are_those_of_the_same_time(name, overlap, expected):
    settings = parse_settings(["--model", name, "--overlap", overlap, "--device", "cpu"])
    first, second = shared_frames(standin.plain_model(name), settings)
    assert (first.tolist(), second.tolist()) == tuple(map(list, expected))


def test_shared_frames_of_48_khz_lie_within_half_a_frame():
    settings = parse_settings(["--model", "encodec_48khz", "--device", "cpu"])
    first, second = shared_frames(standin.plain_model("encodec_48khz"), settings)
    starts = [0] * 150 + [47_520] * 150 + [95_040] * 3
    times = np.array([start + 320 * i for start, i in zip(starts, [*range(150)] * 2 + [*range(3)])])
    apart = np.abs(times[first] - (times[second] + settings.hop_samples))
    assert len(first) >= 30 and apart.max() <= 160


def test_summary_tells_the_health_of_the_tokens(run, make_dataset, sound, weights, tmp_path):
    clips = {
        "long.wav": (sound(7.0), 44_100),
        "short.wav": (sound(1.5), 44_100),
        "silent.wav": (np.zeros(44_100), 44_100),
    }
    path = weights("encodec_24khz")
    run("--input_dir", make_dataset(clips), "--aggregate", "none", weights=path)
    table = pd.read_csv(tmp_path / "out" / "tokenized_train_curated.csv")
    summary = (tmp_path / "out" / "summary_train_curated.txt").read_text()
    rows = np.stack([tokens(table, name).reshape(-1, 8, 150) for name in ("long.wav",)])[0]
    everything = table.filter(regex=r"^token_\d+$").to_numpy().reshape(-1, 8, 150)
    for k in range(8):
        used, times = np.unique(everything[:, k], return_counts=True)
        perplexity = np.exp(-np.sum(times / times.sum() * np.log(times / times.sum())))
        same = np.mean([rows[i, k, 135:] == rows[i + 1, k, :15] for i in range(len(rows) - 2)])
        assert (
            f"  codebook {k}: {len(used)} of 1024 codes in use ({len(used) / 1024:.1%}), "
            f"perplexity {perplexity:.1f}, same code in {same:.1%} of shared frames\n"
        ) in summary
    assert "Padded samples: 2, by 0.75 s on average\n" in summary
    assert "Silent samples: 1: silent.wav\n" in summary
