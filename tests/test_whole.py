"""--whole: each clip in one piece, against plain EncodecModel.encode on the whole clip."""

import ast
import functools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import reference
from conftest import write_dataset

import encodec_tokenizer
from encodec_tokenizer import CpuEncoder, Settings, load_encoder, tokenize

# Name -> seconds, Hz, channels. From two frames to several pieces of everything.
CLIPS = {
    "very_short.wav": (0.02, 44_100, 1),
    "short.wav": (0.3, 44_100, 2),
    "one_second.wav": (1.0, 48_000, 1),
    "two_seconds.wav": (2.0, 24_000, 2),
    "odd.wav": (3.3, 44_100, 1),
    "long.wav": (5.0, 44_100, 2),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory, sound):
    clips = {name: (sound(s, hz, channels), hz) for name, (s, hz, channels) in CLIPS.items()}
    return write_dataset(tmp_path_factory.mktemp("whole"), clips, "train_curated")


@pytest.fixture(scope="session")
def tokenized(tmp_path_factory, folder, weights):
    """tokenized(model's name): what a run writes about the clips above.

    A group may hold 5.5 s of audio at a time, so that it encodes its clips in several steps.
    """

    @functools.cache
    def make(name):
        out = tmp_path_factory.mktemp("out")
        paths = {"input_dir": folder, "output_dir": out, "weights": weights(name)}
        settings = Settings(whole=True, model=name, device="cpu", **paths)
        with mock.patch.object(encodec_tokenizer, "GROUP_SECONDS", 5.5):
            assert encodec_tokenizer.main(settings=settings) == 0
        table = pd.read_csv(out / "tokenized_train_curated.csv")
        rows = zip(table["tokens"], table["token_shape"].map(ast.literal_eval))
        codes = [np.array(tokens.split(" "), int).reshape(shape) for tokens, shape in rows]
        text = (out / "summary_train_curated.txt").read_text()
        return SimpleNamespace(table=table, codes=codes, text=text)

    return make


@pytest.mark.parametrize("name, least", [("encodec_24khz", 0.9999), ("encodec_48khz", 0.999)])
def test_rows_equal_plain_encode_of_the_whole_clip(name, least, tokenized, folder, plain):
    """All clips are compared together: in a short one, a near tie counts for much."""
    ours = tokenized(name).codes
    theirs = [reference.whole(plain(name), folder / "train_curated" / clip) for clip in CLIPS]
    assert [codes.shape for codes in ours] == [codes.shape for codes in theirs]
    assert reference.agreement(np.hstack(ours), np.hstack(theirs)) >= least


def test_the_csv_has_one_column_of_tokens(tokenized):
    table, codes = tokenized("encodec_24khz").table, tokenized("encodec_24khz").codes
    assert table.columns.tolist() == [*encodec_tokenizer.COLUMNS, "tokens"]
    assert table["duration_sec"].tolist() == [seconds for seconds, _, _ in CLIPS.values()]
    assert set(table["num_chunks"]) == {1}
    assert table["num_tokens"].tolist() == [row.size for row in codes]


def test_the_summary_tells_the_lengths_of_the_sequences(tokenized):
    run = tokenized("encodec_24khz")
    lengths = sorted(codes.size for codes in run.codes)
    median = sum(lengths[2:4]) / 2
    span = f"\n  least: {lengths[0]}\n  median: {median}\n  most: {lengths[-1]}\n"
    assert f"Tokens per row:{span}" in run.text
    assert f"Tokens in all: {sum(lengths)}\n" in run.text and "Padded clips: 0\n" in run.text
    assert not any(name in run.text for name in ("target_duration", "overlap", "aggregate"))


def test_the_lstm_in_pieces_gives_the_codes_of_one_piece(folder, weights, monkeypatch):
    """Its state is carried over; the last piece may be shorter than the others."""
    encoder = load_encoder(Settings(whole=True, device="cpu", weights=weights("encodec_24khz")))
    path, codes = folder / "train_curated" / "odd.wav", []
    for frames in (1500, 7, 100):
        monkeypatch.setattr(CpuEncoder, "lstm_frames", frames)
        codes.append(tokenize(path, encoder))
    assert all(np.array_equal(some, codes[0]) for some in codes)
