"""Pictures and sounds of the tokens."""

import subprocess
import sys

import aggregations
import numpy as np
import pandas as pd
import pytest
import reference
import soundfile
import standin
import torch
from conftest import ROOT
from matplotlib.figure import Figure

from encodec_tokenizer import MODELS


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_listen_writes_what_the_model_hears_and_what_the_row_keeps(
    name, run, make_dataset, sound, weights, tmp_path
):
    clips = {"a $1.wav": (sound(1.5), 44_100), "b.wav": (sound(3.0, seed=1), 44_100)}
    root = make_dataset({**clips, "c.wav": (sound(0.5), 44_100)})
    flags = ["--model", name, "--aggregate", "none", "--listen", "2"]
    status, out, _ = run("--input_dir", root, *flags, weights=weights(name))
    folder = tmp_path / "out" / "listen_train_curated"
    assert status == 0 and str(folder) in out
    names = ["000_a__1", "001_b"]
    assert sorted(p.name for p in folder.iterdir()) == [
        f"{name}_{kind}.wav" for name in names for kind in ("heard", "tokens")
    ]
    model = standin.plain_model(name, weights(name))
    model.set_target_bandwidth(6.0)
    for clip, stem in zip(clips, names):
        audio = reference.load(root / "train_curated" / clip, model.sample_rate, model.channels)
        chunk = reference.chunks(audio, model.sample_rate)[0]
        decoded = model.decode(model.encode(chunk[None]))[0, :, : chunk.shape[1]]
        for kind, expected in {"heard": chunk, "tokens": decoded}.items():
            samples, rate = soundfile.read(folder / f"{stem}_{kind}.wav", always_2d=True)
            assert rate == model.sample_rate
            assert np.allclose(samples.T, expected.clamp(-1, 1), atol=1e-3)


@pytest.mark.parametrize("flags", [[], ["--model", "encodec_48khz", "--aggregate", "none"]])
def test_plot_writes_a_picture(flags, run, make_dataset, sound, tmp_path):
    root = make_dataset({"a $1 $.wav": (sound(1.0), 44_100), "b.wav": (sound(4.0), 44_100)})
    status, out, _ = run("--input_dir", root, "--plot", *flags)
    path = tmp_path / "out" / "summary_train_curated.png"
    assert status == 0 and str(path) in out
    assert path.read_bytes().startswith(b"\x89PNG")
    # A finished run is not made again for a picture.
    path.unlink()
    status, _, err = run("--input_dir", root, "--plot", *flags)
    assert status == 0 and "is finished already" in err and path.exists()


def test_plot_without_matplotlib_is_one_sentence(run, monkeypatch):
    monkeypatch.setattr("encodec_tokenizer.find_spec", lambda name: None)
    status, _, err = run("--dataset", "sample", "--plot")
    assert status == 2 and "pip install matplotlib" in err


def test_matplotlib_is_imported_only_for_a_picture():
    code = "import sys, encodec_tokenizer; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_picture_shows_what_the_csv_holds(run, make_dataset, sound, tmp_path, monkeypatch):
    clips = {f"{i}.wav": (sound(s, seed=i), 44_100) for i, s in enumerate((0.5, 1.5, 3.0, 5.0))}
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *a, **k: (figures.append(a[0]), save(*a, **k)))
    assert run("--input_dir", make_dataset(clips), "--aggregate", "none", "--plot")[0] == 0
    table = pd.read_csv(tmp_path / "out" / "tokenized_train_curated.csv")
    codes = table.filter(regex=r"^token_\d+$").to_numpy().reshape(-1, 8, 150)
    lengths, counts, books, *panels = figures[0].axes
    assert sum(bar.get_height() for bar in lengths.patches) == len(clips)
    assert {bar.get_x() + 0.4: bar.get_height() for bar in counts.patches} == {1: 2, 2: 1, 3: 1}
    heights = [bar.get_height() for bar in books.patches]
    assert heights[:8] == [len(np.unique(codes[:, k])) for k in range(8)]
    for k, height in enumerate(heights[8:]):
        share = np.unique(codes[:, k], return_counts=True)[1] / codes[:, k].size
        assert np.isclose(height, np.prod(share**-share))
    maps = [axis.images[0].get_array() for axis in panels if axis.images]
    assert [axis.get_title() for axis in panels[:3]] == ["0.wav", "1.wav", "2.wav"]
    assert all(np.array_equal(shown, codes[row]) for shown, row in zip(maps, (0, 1, 2)))


def test_aggregations_are_compared_by_what_tells_labels_apart(
    make_dataset, sound, tmp_path, monkeypatch, capsys
):
    clips = {}
    for i in range(16):
        samples = sound(0.4 + 0.4 * (i % 3), seed=i)
        clips[f"{i:02d}.wav"] = (samples / abs(samples).max() if i < 8 else 0 * samples, 44_100)
    rows = [(name, ["noisy", "silent,odd"][i // 8]) for i, name in enumerate(clips)]
    root = make_dataset(clips, rows=rows)
    flags = ["--dataset", "curated", "--input_dir", str(root), "--weights", "untrained"]
    argv = ["aggregations.py", *flags, "--target_duration", "0.5", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", argv)
    aggregations.main()
    out = capsys.readouterr().out
    for how in ("mean", "latent", "medoid", "none"):
        assert f"| {how} | 100.0% ± 0.0% | 100.0% ± 0.0% |" in out
    assert "16 clips of 2 labels, 62% of several chunks; chance 50.0%" in out
