"""The example programs, run on small data."""

import math
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import reference
import soundfile
import torch
from conftest import ROOT

# EnCodec builds its models with a function that PyTorch has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
EXAMPLES = ROOT / "tests" / "examples"
sys.path.insert(0, str(EXAMPLES))

import decode  # noqa: E402
import sequence_model  # noqa: E402
import submission  # noqa: E402
import tagging  # noqa: E402


@pytest.fixture
def example(monkeypatch, capfd):
    """Runs an example's command line in this process; returns what it printed."""

    def command(module, *args):
        monkeypatch.setattr("sys.argv", [module.__file__, *map(str, args)])
        capfd.readouterr()
        module.main()
        return capfd.readouterr().out

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
    assert abs(first - math.log(8193)) < 1 and last < first - 1
    heard = tmp_path / "heard"
    example(decode, tmp_path / "out" / "generated.csv", heard, "--weights", "untrained")
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


@pytest.mark.parametrize(
    "name, flags, cut",
    [
        ("encodec_24khz", ["--whole"], lambda audio, _: [audio]),
        ("encodec_48khz", ["--aggregate", "none"], reference.chunks),
    ],
)
@torch.no_grad()
def test_rows_are_decoded_as_encodec_decodes_its_own_codes(
    name, flags, cut, run, make_dataset, sound, weights, plain, example, tmp_path
):
    clips = {"a.wav": (sound(0.8), 44_100), "b.wav": (sound(2.3, seed=1), 44_100)}
    root, out = make_dataset(clips), tmp_path / "out"
    flags = ["--input_dir", root, "--model", name, "--parquet", *flags]
    assert run(*flags, weights=weights(name))[0] == 0
    options = ["--weights", weights(name), "--scale_from_original"]
    options += ["--audio_dir", root / "train_curated"]
    for kind, rows in {"csv": 5, "parquet": 1}.items():
        path = out / f"tokenized_train_curated.{kind}"
        example(decode, path, tmp_path / kind, "--rows", rows, *options)
    found, model, expected = wavs(tmp_path / "csv"), plain(name), []
    for clip in clips:
        audio = reference.load(root / "train_curated" / clip, model.sample_rate, model.channels)
        for chunk in cut(audio, model.sample_rate):
            decoded = model.decode(model.encode(chunk[None]))[0, :, : chunk.shape[1]]
            expected += [decoded.clamp(-1, 1), chunk.clamp(-1, 1)]
    assert len(found) == len(expected)
    for samples, wanted in zip(found.values(), expected):
        assert np.allclose(samples, wanted, atol=1e-4)
    first, second = expected[0][:, :19_000], expected[2][:, :19_000]
    assert abs(first - second).max() > 2e-3  # at 24 kHz a stand-in's sounds differ by little more
    parquet = wavs(tmp_path / "parquet")
    assert len(parquet) == 2
    assert all((found[name] == samples).all() for name, samples in parquet.items())


@pytest.mark.parametrize("samples", [300, 47_520, 47_600, 95_100, 95_400, 47_800, 95_250])
@torch.no_grad()
def test_a_row_is_cut_into_the_segments_it_was_made_of(samples, sound, plain):
    """EnCodec itself cannot join a last segment of one frame, which the one before it covers."""
    model = plain("encodec_48khz")
    audio = torch.from_numpy(sound(2.1, 48_000, 2)[:samples].T.copy()).float()
    frames = model.encode(audio[None])
    codes = torch.cat([codes[0] for codes, _ in frames], dim=1)
    scales = [scale for _, scale in frames]
    assert torch.allclose(torch.stack(decode.loudness(model, audio)), torch.stack(scales))
    joined = frames[:-1] if samples in (47_800, 95_250) else frames
    decoded = decode.decode(model, codes, scales)
    assert (decoded == model.decode(joined)[0]).all() and decoded.shape[1] >= samples
    ones = model.decode([(codes, torch.ones(1, 1)) for codes, _ in joined])[0]
    assert (decode.decode(model, codes) == ones).all()


def test_a_mean_of_several_chunks_is_skipped(run, example, tmp_path, weights):
    name = "encodec_48khz"
    run("--dataset", "sample", "--max_samples", "9", "--model", name, weights=weights(name))
    path, folder = tmp_path / "out" / "tokenized_sample.csv", tmp_path / "heard"
    table = pd.read_csv(path, keep_default_na=False)
    table.iloc[[0, 8]].to_csv(path, index=False)  # click.wav and steps.wav
    out = example(decode, path, folder, "--weights", weights(name))
    assert "steps.wav skipped: this row averages 2 chunks and cannot be decoded" in out
    found = wavs(folder)
    assert list(found) == ["000_click_decoded.wav"]  # originals are optional
    assert found["000_click_decoded.wav"].shape[0] == 2
    assert abs(found["000_click_decoded.wav"]).max() > 0.5  # its level is not the original's


def test_other_weights_than_the_tokens_are_refused(run, example, tmp_path, weights):
    run("--dataset", "sample", "--max_samples", "1", weights=weights("encodec_24khz"))
    path = tmp_path / "out" / "tokenized_sample.csv"
    for given, says in {
        "untrained": "the tokens were made with other weights (encodec_24khz.th, SHA-256 ",
        weights("encodec_48khz"): "they are those of encodec_48khz",
    }.items():
        with pytest.raises(SystemExit) as stop:
            example(decode, path, tmp_path / "heard", "--weights", given)
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
