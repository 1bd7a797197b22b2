"""--whole: each clip in one piece, against plain EncodecModel.encode on the whole clip."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import reference
from conftest import main, write_dataset

import encodec_tokenizer
from encodec_tokenizer import MODELS, BadClip, Settings, load_encoder, tokenize

# Name -> seconds, Hz, channels. From one frame to several pieces of everything.
CLIPS = {
    "very_short.wav": (0.02, 44_100, 1),
    "short.wav": (0.3, 44_100, 2),
    "one_second.wav": (1.0, 48_000, 1),
    "two_seconds.wav": (2.0, 24_000, 2),
    "odd.wav": (5.3, 44_100, 1),
    "long.wav": (12.0, 44_100, 2),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory, sound):
    clips = {name: (sound(s, hz, channels), hz) for name, (s, hz, channels) in CLIPS.items()}
    return write_dataset(tmp_path_factory.mktemp("whole") / "input", clips, "train_curated")


def run_whole(folder, out, path, *flags):
    flags = ["--input_dir", folder, "--output_dir", out, "--weights", path, *flags]
    assert main("--whole", "--device", "cpu", *flags) == 0


@pytest.fixture(scope="session", params=MODELS)
def tokenized(request, tmp_path_factory, folder, weights):
    """A model's name, and the folder with all that a run writes about the clips above."""
    name, out = request.param, tmp_path_factory.mktemp("out")
    run_whole(folder, out, weights(name), "--model", name, "--parquet", "--plot")
    return name, out


@pytest.fixture(scope="session")
def rows(tokenized):
    """The CSV's rows: name -> codes [K, F]."""
    table = pd.read_csv(tokenized[1] / "tokenized_train_curated.csv")
    rows = {}
    for name, shape, tokens in zip(table["fname"], table["token_shape"], table["tokens"]):
        codes = np.array(tokens.split(" "), dtype=int)
        rows[name] = codes.reshape(json.loads(shape.translate(str.maketrans("()", "[]"))))
    return rows


def test_rows_equal_plain_encode_of_the_whole_clip(tokenized, rows, folder, plain):
    """All clips together: in a short one, a single near tie counts for much."""
    name, _ = tokenized
    theirs = {clip: reference.whole(plain(name), folder / "train_curated" / clip) for clip in CLIPS}
    assert {clip: codes.shape for clip, codes in rows.items()} == {
        clip: codes.shape for clip, codes in theirs.items()
    }
    equal = [reference.agreement(rows[clip], theirs[clip]) for clip in CLIPS]
    frames = [codes.shape[1] for codes in theirs.values()]
    assert np.average(equal, weights=frames) >= {24: 0.9999, 48: 0.999}[int(name[8:10])]


def test_the_frames_are_those_of_the_clips_own_length(tokenized, rows):
    """24 kHz: one for each 320 samples, rounded up. 48 kHz: the same in each segment of 1 s."""
    for clip, (seconds, _, _) in CLIPS.items():
        if tokenized[0] == "encodec_24khz":
            frames = int(np.ceil(round(seconds * 24_000) / 320))
        else:
            length = round(seconds * 48_000)
            segments = [min(48_000, length - start) for start in range(0, length, 47_520)]
            frames = sum(int(np.ceil(samples / 320)) for samples in segments)
        assert rows[clip].shape[1] == frames


def test_the_csv_has_six_columns_and_one_of_tokens(tokenized):
    table = pd.read_csv(tokenized[1] / "tokenized_train_curated.csv")
    columns = "fname labels num_tokens token_shape num_chunks duration_sec tokens"
    assert table.columns.tolist() == columns.split()
    assert table["fname"].tolist() == list(CLIPS)
    assert table["duration_sec"].tolist() == [seconds for seconds, _, _ in CLIPS.values()]
    assert set(table["num_chunks"]) == {1}
    assert table["tokens"].str.fullmatch(r"\d+( \d+)*").all()
    assert (table["tokens"].str.count(" ") + 1).tolist() == table["num_tokens"].tolist()


def test_parquet_holds_the_same_rows(tokenized, rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tokenized[1] / "tokenized_train_curated.parquet")
    csv = pd.read_csv(tokenized[1] / "tokenized_train_curated.csv")
    assert table.column_names == csv.columns.tolist()
    assert table.drop_columns("tokens").to_pylist() == csv.drop(columns="tokens").to_dict("records")
    assert str(table.schema.field("tokens").type) == "list<element: uint16>"
    for name, tokens in zip(table["fname"].to_pylist(), table["tokens"].to_pylist()):
        assert tokens == rows[name].ravel().tolist()


def test_the_summary_tells_the_lengths_of_the_sequences(tokenized, rows):
    text = (tokenized[1] / "summary_train_curated.txt").read_text()
    lengths = sorted(codes.size for codes in rows.values())
    middle = (lengths[2] + lengths[3]) / 2
    span = f"Tokens per row:\n  least: {lengths[0]}\n  median: {middle}\n  most: {lengths[-1]}\n"
    assert span in text and f"Tokens in all: {sum(lengths)}\n" in text
    assert not re.search("target_duration|overlap|aggregate", text)
    assert (tokenized[1] / "summary_train_curated.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_depend_on_the_number_of_threads(name, folder, weights, tmp_path, monkeypatch):
    tables = set()
    for threads in (1, 3):
        monkeypatch.setattr(encodec_tokenizer.CpuEncoder, "threads", threads)
        out = tmp_path / str(threads)
        run_whole(folder, out, weights(name), "--model", name, "--max_samples", 5)
        tables.add((out / "tokenized_train_curated.csv").read_bytes())
    assert len(tables) == 1


# ------------------------------------------------------------------------------ one file, in Python


@pytest.fixture(scope="session")
def whole(weights):
    """whole(model's name): what `tokenize` takes."""

    def load(name, **settings):
        path = str(weights(name))
        return load_encoder(Settings(model=name, device="cpu", weights=path, **settings))

    return load


def test_tokenize_gives_the_row_of_a_run(tokenized, rows, folder, whole):
    encoder = whole(tokenized[0], whole=True)
    for clip in ("very_short.wav", "odd.wav"):
        codes = tokenize(folder / "train_curated" / clip, encoder)
        assert codes.dtype == np.int64 and np.array_equal(codes, rows[clip][None])


def test_tokenize_gives_every_chunk_without_whole(folder, whole, plain):
    path = folder / "train_curated" / "odd.wav"
    codes = tokenize(str(path), whole("encodec_24khz"))
    assert codes.shape == (3, 8, 150)
    chunks = reference.chunks(reference.load(path, 24_000, 1), 24_000)
    theirs = np.stack([reference.codes(plain("encodec_24khz"), chunk) for chunk in chunks])
    assert reference.agreement(codes, theirs) >= 0.999


def test_tokenize_raises_bad_clip_for_a_bad_file(folder, whole, tmp_path):
    encoder, path = whole("encodec_24khz", whole=True), tmp_path / "cut.wav"
    path.write_bytes((folder / "train_curated" / "odd.wav").read_bytes()[:100_000])
    with pytest.raises(BadClip, match=r"cut\.wav: truncated"):
        tokenize(path, encoder)
    with pytest.raises(BadClip, match="no such file"):
        tokenize(tmp_path / "gone.wav", encoder)


def test_the_lstm_in_pieces_gives_the_codes_of_one_piece(folder, whole, monkeypatch):
    """Its state is carried over. 1 frame and 7: the last piece is shorter than the others."""
    encoder, path = whole("encodec_24khz", whole=True), folder / "train_curated" / "odd.wav"
    one_piece = tokenize(path, encoder)
    for frames in (1, 7, 100):
        monkeypatch.setattr(encodec_tokenizer.CpuEncoder, "lstm_frames", frames)
        assert reference.agreement(tokenize(path, encoder), one_piece) == 1
