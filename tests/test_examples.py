"""`decode`, and the example programs, run on small data."""

import functools
import math
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import ROOT

# EnCodec builds its models with a function that PyTorch has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
EXAMPLES = ROOT / "tests" / "examples"
sys.path.insert(0, str(EXAMPLES))

import decode as decode_rows  # noqa: E402
import sequence_model  # noqa: E402
import submission  # noqa: E402
import tagging  # noqa: E402

from encodec_tokenizer import Settings, decode, load_encoder, tokenize  # noqa: E402


@pytest.fixture
def example(monkeypatch, capfd):
    """Runs an example's command line in this process; returns what it printed, the log last."""

    def command(module, *args):
        monkeypatch.setattr("sys.argv", [module.__file__, *map(str, args)])
        capfd.readouterr()
        module.main()
        return "".join(capfd.readouterr())

    return command


# --------------------------------------------------------------------------------- sequence_model


def test_ids_are_interleaved_frame_by_frame():
    clips = [np.array([[0, 1], [1023, 2]], dtype=np.uint16), np.array([[5], [6]], dtype=np.uint16)]
    ids = [0, 2047, 1, 1026, 2048, 5, 1030, 2048]
    assert sequence_model.pack(clips).tolist() == ids


def test_a_sequence_model_learns_the_rows_of_whole_clips(run, example, tmp_path):
    assert run("--dataset", "sample", "--max_samples", "5", "--whole", "--parquet")[0] == 0
    path = tmp_path / "out" / "tokenized_sample.parquet"
    clips = sequence_model.read_clips(path)
    assert [clip.shape for clip in clips[:2]] == [(8, 23), (8, 38)]  # 0.3 and 0.5 s
    stream = sequence_model.pack(clips)
    assert len(stream) == sum(clip.size + 1 for clip in clips)
    unpacked = sequence_model.unpack(stream, 8)
    assert all((ours == theirs).all() for ours, theirs in zip(unpacked, clips, strict=True))
    flags = ["--steps", "20", "--length", "64", "--batch", "2", "--frames", "30"]
    out = example(sequence_model, path, *flags)
    first, last = map(float, re.search(r"loss of step 1 (.*), of step 20 (.*)", out).groups())
    assert f"ln(vocabulary) {math.log(8193):.2f}" in out
    assert re.search(r"training: +100%.* loss \d", out) and "generating: 100%" in out
    assert abs(first - math.log(8193)) < 1 and last < first - 1
    heard = tmp_path / "heard"
    example(decode_rows, tmp_path / "out" / "generated.csv", heard)
    assert wavs(heard)["000_generated_decoded.wav"].shape == (1, 30 * 320)


def test_a_sequence_model_does_not_see_later_ids():
    torch.manual_seed(0)
    model = sequence_model.GPT(vocabulary=50, length=16).eval()
    ids = torch.randint(50, (1, 16))
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 50
    with torch.no_grad():
        same = torch.isclose(model(ids), model(changed), atol=1e-5).all(dim=2)[0]
    assert same.tolist() == [True] * 10 + [False] * 6


# ---------------------------------------------------------------------------- tagging, submission


def test_lwlrap_is_the_mean_precision_over_labels():
    targets = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    scores = np.array([[0.9, 0.8, 0.1], [0.3, 0.2, 0.1], [0.5, 0.1, 0.2]])
    assert tagging.lwlrap(targets, scores) == pytest.approx((1 / 1 + 2 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize("flags", [["--aggregate", "none"], ["--whole"]], ids=str)
def test_bags_count_the_codes_of_all_rows_of_a_clip(
    flags, run, ready_made_codes, tmp_path, monkeypatch
):
    assert run("--dataset", "sample", "--parquet", *flags)[0] == 0
    read = pd.read_csv  # in parts that end inside a clip
    monkeypatch.setattr(pd, "read_csv", lambda *a, **k: read(*a, **{**k, "chunksize": 2}))
    clips, bags = tagging.read_bags(tmp_path / "out" / "tokenized_sample.csv")
    table = pd.read_parquet(tmp_path / "out" / "tokenized_sample.parquet")
    assert clips["fname"].tolist() == table["fname"].drop_duplicates().tolist()
    assert bags.shape == (12, 8192)
    for fname, bag in zip(clips["fname"], bags.toarray()):
        expected = np.zeros((8, 1024))
        for tokens in table["tokens"][table["fname"] == fname]:
            for codebook, codes in enumerate(tokens.reshape(8, -1)):
                expected[codebook] += np.bincount(codes, minlength=1024)
        assert (bag == expected.ravel()).all()


@pytest.fixture
def told_apart(tmp_path):
    """A CSV of 40 clips, of which each label has codes of its own; one clip has no label."""
    rng, rows = np.random.default_rng(0), []
    for i in range(40):
        tokens = " ".join(map(str, rng.integers(0, 20, 60) + 20 * (i % 4)))
        label = ["Bark", "Meow", "Moo", "Bark,Meow"][i % 4] if i else ""
        rows.append([f"{i:02d}.wav", label, 60, "(2, 30)", 1, 0.4, tokens])
    names = ["fname", "labels", "num_tokens", "token_shape", "num_chunks", "duration_sec", "tokens"]
    pd.DataFrame(rows, columns=names).to_csv(tmp_path / "tokenized_made.csv", index=False)
    return tmp_path / "tokenized_made.csv"


def test_tagging_tells_labels_apart_where_codes_do(told_apart, example):
    out = example(tagging, told_apart)
    assert "39 labelled clips, 3 labels, 5 folds" in out
    assert "lwlrap of bags of codes: 1.000 ± 0.000" in out
    assert 0.4 < float(re.search(r"lwlrap of chance: ([\d.]+)", out)[1]) < 0.9


def test_a_submission_has_a_column_per_label_and_a_row_per_clip(told_apart, example, tmp_path):
    out = example(submission, told_apart, told_apart, tmp_path / "submission.csv")
    assert "40 clips, 3 labels" in out
    table = pd.read_csv(tmp_path / "submission.csv")
    assert table.columns.tolist() == ["fname", "Bark", "Meow", "Moo"]
    assert table["fname"].tolist() == [f"{i:02d}.wav" for i in range(40)]
    likeliest = table.set_index("fname").idxmax(axis=1)
    assert likeliest["02.wav"] == "Moo" and likeliest["01.wav"] == "Meow"


# ---------------------------------------------------------------------------------------- decode


def wavs(folder) -> dict[str, np.ndarray]:
    """The samples [C, T] of a folder's WAV files, by name."""
    return {p.name: soundfile.read(p, always_2d=True)[0].T for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def encoder_of(weights):
    """encoder_of(name of a model): the script's encoder of it, for whole clips, made once."""

    @functools.cache
    def make(name):
        return load_encoder(Settings(model=name, whole=True, device="cpu", weights=weights(name)))

    return make


# The 48 kHz model cuts into segments of 48,000 samples every 47,520. EnCodec cannot join a last
# segment of one frame to one of 150 frames, which covers it: then it is left out.
@pytest.mark.parametrize(
    "name, samples, num_joined",
    [
        ("encodec_24khz", 47_600, 1),
        ("encodec_48khz", 300, 1),
        ("encodec_48khz", 47_520, 1),
        ("encodec_48khz", 47_600, 2),
        ("encodec_48khz", 47_800, 1),
        ("encodec_48khz", 95_100, 3),
        ("encodec_48khz", 95_250, 2),
        ("encodec_48khz", 96_000, 3),
    ],
)
@torch.no_grad()
def test_decode_gives_what_encodec_gives(name, samples, num_joined, sound, plain, encoder_of):
    model = plain(name)
    audio = sound(2.1, 48_000, model.channels)[:samples].T
    frames = model.encode(torch.from_numpy(audio.copy())[None].float())
    codes = torch.cat([codes for codes, _ in frames], dim=2)
    expected = model.decode([(codes, None) for codes, _ in frames[:num_joined]])
    decoded, rate = decode(codes.numpy(), encoder_of(name))
    assert rate == model.sample_rate and decoded.shape[2] >= samples
    assert np.allclose(decoded, expected, atol=1e-5)


def test_decode_takes_several_chunks_and_fewer_codebooks(sound, encoder_of):
    encoder = encoder_of("encodec_24khz")
    one, other = (tokenize(sound(1.0, seed=i)[:, 0].copy(), encoder, 44_100) for i in (0, 1))
    both = np.concatenate([one, other])[:, :2].astype(np.uint16)  # as in an .npz
    decoded, _ = decode(both, encoder)
    assert decoded.shape == (2, 1, 24_000) and decoded.dtype == np.float32
    assert np.array_equal(decoded[1], decode(other[:, :2], encoder)[0][0])
    assert not np.allclose(decoded[1], decode(other, encoder)[0][0])


@pytest.mark.parametrize(
    "codes",
    [
        np.zeros((8, 150), dtype=int),
        np.zeros((1, 33, 150), dtype=int),
        np.zeros((1, 8, 0), dtype=int),
        np.zeros((1, 8, 150)),
        np.full((1, 8, 150), 1024),
        np.full((1, 8, 150), -1),
    ],
)
def test_what_cannot_be_codes_is_refused(codes, encoder_of):
    with pytest.raises(ValueError, match="codes "):
        decode(codes, encoder_of("encodec_24khz"))


@pytest.mark.parametrize(
    "name, flags, lengths",
    [
        ("encodec_24khz", ["--whole"], [19_200, 55_200]),
        ("encodec_48khz", ["--aggregate", "none"], [38_400, 96_000, 96_000]),
        ("encodec_24khz", ["--aggregate", "medoid"], [19_200, 48_000]),
    ],
)
def test_rows_are_decoded_without_their_padding(
    name, flags, lengths, run, make_dataset, sound, weights, encoder_of, example, tmp_path
):
    clips = {"a.wav": (sound(0.8), 44_100), "b.wav": (sound(2.3, seed=1), 44_100)}
    root, out = make_dataset(clips), tmp_path / "out"
    flags = ["--input_dir", root, "--model", name, "--parquet", *flags]
    assert run(*flags, weights=weights(name))[0] == 0
    options = ["--weights", weights(name), "--audio_dir", root / "train_curated"]
    for kind, rows in {"csv": 5, "parquet": 1}.items():
        path = out / f"tokenized_train_curated.{kind}"
        example(decode_rows, path, tmp_path / kind, "--rows", rows, *options)
    table = pd.read_parquet(out / "tokenized_train_curated.parquet")
    found = wavs(tmp_path / "csv")
    decoded = [samples for wav, samples in found.items() if wav.endswith("_decoded.wav")]
    assert [samples.shape[1] for samples in decoded] == lengths
    for (_, row), samples in zip(table.iterrows(), decoded, strict=True):
        expected, _ = decode(decode_rows.codes_of(row)[None], encoder_of(name))
        expected = expected[0, :, : samples.shape[1]]
        if name == "encodec_48khz":  # its level is not the original's
            expected = expected / abs(expected).max()
        assert np.allclose(samples, expected.clip(-1, 1), atol=1e-4)
    parquet = wavs(tmp_path / "parquet")
    assert list(parquet) == ["000_a_decoded.wav", "000_a_original.wav"]
    assert all((found[wav] == samples).all() for wav, samples in parquet.items())
    originals = [samples for wav, samples in found.items() if wav.endswith("_original.wav")]
    assert np.allclose(originals[0], clips["a.wav"][0].T, atol=1e-4)
    assert len(originals) == (1 if "medoid" in flags else len(lengths))
    if "none" in flags:  # the last chunk is the last two seconds
        assert np.allclose(originals[2], clips["b.wav"][0][-88_200:].T, atol=1e-4)


def test_a_mean_of_several_chunks_is_skipped(run, example, tmp_path):
    """The rule is the script's: an aggregate that it does not know as decodable is skipped."""
    run("--dataset", "sample", "--max_samples", "9")
    path, folder = tmp_path / "out" / "tokenized_sample.csv", tmp_path / "heard"
    table = pd.read_csv(path, keep_default_na=False)
    table.iloc[[0, 8]].to_csv(path, index=False)  # click.wav and steps.wav
    skipped = "steps.wav skipped: this row averages 2 chunks and cannot be decoded"
    assert skipped in example(decode_rows, path, folder)
    assert list(wavs(folder)) == ["000_click_decoded.wav"]  # originals are optional
    table.iloc[[0, 8]].assign(fname=["007", "008"]).to_csv(path, index=False)  # names, no numbers
    assert f"{folder / '000_007'}_decoded.wav: 0.30 s" in example(decode_rows, path, folder)
    record = path.with_suffix(".json")
    record.write_text(record.read_text().replace('"mean"', '"max"'))
    assert "008 skipped: " in example(decode_rows, path, folder)


def test_other_weights_than_the_tokens_are_refused(run, example, tmp_path, weights):
    run("--dataset", "sample", "--max_samples", "1", weights=weights("encodec_24khz"))
    path = tmp_path / "out" / "tokenized_sample.csv"
    for given, says in {
        ("--weights", "untrained"): "the tokens were made with other weights (encodec_24khz.th, ",
        ("--weights", weights("encodec_48khz")): "they are those of encodec_48khz",
        (): "made with the weights in encodec_24khz.th: add --weights and its path",
    }.items():
        with pytest.raises(SystemExit) as stop:
            example(decode_rows, path, tmp_path / "heard", *given)
        assert says in str(stop.value)


# ----------------------------------------------------------------------------- programs of README


@pytest.mark.parametrize("command", ["benchmark.py --smoke", "aggregations.py --smoke"])
def test_a_program_of_readme_runs(command, tmp_path):
    """In its short form."""
    program, *flags = command.split()
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / program, *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| ") >= 4
