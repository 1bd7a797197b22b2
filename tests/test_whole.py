"""--whole: each clip in one piece, against plain EncodecModel.encode on the whole clip."""

import ast
import functools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import reference
from conftest import main, write_dataset

from encodec_tokenizer import CpuEncoder, Settings, load_encoder, tokenize

# Name -> seconds, Hz, channels. From two frames to several pieces of everything.
CLIPS = {
    "very_short.wav": (0.02, 44_100, 1),
    "short.wav": (0.3, 44_100, 2),
    "one_second.wav": (1.0, 48_000, 1),
    "two_seconds.wav": (2.0, 24_000, 2),
    "odd.wav": (5.3, 44_100, 1),
    "long.wav": (8.0, 44_100, 2),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory, sound):
    clips = {name: (sound(s, hz, channels), hz) for name, (s, hz, channels) in CLIPS.items()}
    return write_dataset(tmp_path_factory.mktemp("whole"), clips, "train_curated")


@pytest.fixture(scope="session")
def tokenized(tmp_path_factory, folder, weights):
    """tokenized(model's name): what a run writes about the clips above."""

    @functools.cache
    def make(name):
        out = tmp_path_factory.mktemp("out")
        flags = ["--input_dir", folder, "--output_dir", out, "--weights", weights(name)]
        assert main("--whole", "--model", name, "--device", "cpu", *flags) == 0
        table = pd.read_csv(out / "tokenized_train_curated.csv")
        rows = zip(table["tokens"], table["token_shape"].map(ast.literal_eval))
        codes = [np.array(tokens.split(" "), int).reshape(shape) for tokens, shape in rows]
        facts = json.loads((out / "tokenized_train_curated.json").read_text())
        text = (out / "summary_train_curated.txt").read_text()
        return SimpleNamespace(table=table, codes=codes, facts=facts, text=text)

    return make


@pytest.mark.parametrize("name, least", [("encodec_24khz", 0.9999), ("encodec_48khz", 0.999)])
def test_rows_equal_plain_encode_of_the_whole_clip(name, least, tokenized, folder, plain):
    """All clips are compared together: in a short one, a near tie counts for much."""
    ours = tokenized(name).codes
    theirs = [reference.whole(plain(name), folder / "train_curated" / clip) for clip in CLIPS]
    assert [codes.shape for codes in ours] == [codes.shape for codes in theirs]
    assert reference.agreement(np.hstack(ours), np.hstack(theirs)) >= least


def test_the_csv_has_six_columns_and_one_of_tokens(tokenized):
    table, codes = tokenized("encodec_24khz").table, tokenized("encodec_24khz").codes
    columns = "fname labels num_tokens token_shape num_chunks duration_sec tokens"
    assert table.columns.tolist() == columns.split()
    assert table["fname"].tolist() == list(CLIPS)
    assert table["duration_sec"].tolist() == [seconds for seconds, _, _ in CLIPS.values()]
    assert set(table["num_chunks"]) == {1}
    assert table["tokens"].str.fullmatch(r"\d+( \d+)*").all()
    assert table["num_tokens"].tolist() == [row.size for row in codes]


def test_the_summary_tells_the_lengths_of_the_sequences(tokenized):
    run = tokenized("encodec_24khz")
    lengths = sorted(codes.size for codes in run.codes)
    span = {"least": lengths[0], "median": sum(lengths[2:4]) / 2, "most": lengths[-1]}
    assert run.facts["tokens_per_row"] == span
    assert run.facts["tokens_in_all"] == sum(lengths)
    assert run.facts["padded_clips"] == 0
    lines = "".join(f"\n  {name}: {length}" for name, length in span.items())
    assert f"Tokens per row:{lines}\n" in run.text
    chunk_settings = {"target_duration", "overlap", "aggregate"}
    assert not chunk_settings & run.facts["settings"].keys()
    assert not any(name in run.text for name in chunk_settings)


def test_the_lstm_in_pieces_gives_the_codes_of_one_piece(folder, weights, monkeypatch):
    """Its state is carried over; the last piece may be shorter than the others."""
    encoder = load_encoder(Settings(whole=True, device="cpu", weights=weights("encodec_24khz")))
    path, codes = folder / "train_curated" / "odd.wav", []
    for frames in (1500, 7, 100):
        monkeypatch.setattr(CpuEncoder, "lstm_frames", frames)
        codes.append(tokenize(path, encoder))
    assert all(np.array_equal(some, codes[0]) for some in codes)


def test_clips_beyond_a_minute_of_audio_keep_their_own_codes(
    run, make_dataset, sound, weights, plain, tmp_path
):
    """A group holds no more at a time, so that these are encoded in two steps."""
    lengths = {"a.wav": 31.0, "b.wav": 30.0, "c.wav": 2.0}
    root = make_dataset({n: (sound(s, 24_000, seed=int(s)), 24_000) for n, s in lengths.items()})
    assert run("--input_dir", root, "--whole", weights=weights("encodec_24khz"))[0] == 0
    table = pd.read_csv(tmp_path / "out" / "tokenized_train_curated.csv")
    for (name, seconds), row in zip(lengths.items(), table["tokens"], strict=True):
        ours = np.array(row.split(" "), int).reshape(8, -1)
        assert ours.shape[1] == seconds * 75
        # The 24 kHz model does not look ahead: the codes of a clip's beginning are those below.
        start = reference.load(root / "train_curated" / name, 24_000, 1)[:, :48_000]
        theirs = reference.codes(plain("encodec_24khz"), start)
        assert reference.agreement(ours[:, :150], theirs) >= 0.999
