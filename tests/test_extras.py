"""Pictures, sounds and Parquet files of the tokens."""

import ast
import re

import aggregations
import numpy as np
import pandas as pd
import pytest
import reference
import soundfile
import torch
from matplotlib.figure import Figure

from encodec_tokenizer import BLOCK_CLIPS, MODELS


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_listen_writes_what_the_model_hears_and_what_the_row_keeps(
    name, run, make_dataset, sound, weights, plain, tmp_path
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
    model = plain(name)
    for clip, stem in zip(clips, names):
        audio = reference.load(root / "train_curated" / clip, model.sample_rate, model.channels)
        chunk = reference.chunks(audio, model.sample_rate)[0]
        decoded = model.decode(model.encode(chunk[None]))[0, :, : chunk.shape[1]]
        for kind, expected in {"heard": chunk, "tokens": decoded}.items():
            samples, rate = soundfile.read(folder / f"{stem}_{kind}.wav", always_2d=True)
            assert rate == model.sample_rate
            assert np.allclose(samples.T, expected.clamp(-1, 1), atol=1e-3)


# ------------------------------------------------------------------------------------- pictures


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


def test_a_picture_is_a_pdf_if_its_name_says_so(run, tmp_path):
    path = tmp_path / "figure.pdf"
    status, out, _ = run("--dataset", "sample", "--max_samples", "2", "--plot", path)
    assert status == 0 and str(path) in out
    assert path.read_bytes().startswith(b"%PDF")
    assert not list((tmp_path / "out").glob("*.png"))


def test_of_two_datasets_each_has_its_own_picture(run, make_dataset, sound, tmp_path):
    for stem in ("train_curated", "train_noisy"):
        root = make_dataset({"a.wav": (sound(0.5), 44_100)}, stem)
    flags = ["--input_dir", root, "--dataset", "both", "--plot", tmp_path / "figure.pdf"]
    assert run(*flags)[0] == 0
    names = ["figure_train_curated.pdf", "figure_train_noisy.pdf"]
    assert sorted(path.name for path in tmp_path.glob("*.pdf")) == names


@pytest.mark.parametrize("flag, package", [("--plot", "matplotlib"), ("--parquet", "pyarrow")])
def test_without_the_package_of_a_flag_the_error_says_what_to_install(
    flag, package, run, monkeypatch
):
    monkeypatch.setattr("encodec_tokenizer.find_spec", lambda name: None)
    status, _, err = run("--dataset", "sample", flag)
    assert status == 2 and f"pip install {package}" in err


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


@pytest.fixture
def picture(run, make_dataset, sound, tmp_path, figures):
    """The axes and the table of a run over clips of these seconds, a row a chunk."""

    def draw(seconds, *flags):
        clips = {f"{i}.wav": (sound(s, seed=i), 44_100) for i, s in enumerate(seconds)}
        flags = ["--aggregate", "none", "--plot", *flags]
        assert run("--input_dir", make_dataset(clips), *flags)[0] == 0
        return figures[0], pd.read_csv(tmp_path / "out" / "tokenized_train_curated.csv")

    return draw


def test_the_picture_shows_what_the_csv_holds(picture):
    figure, table = picture((1.5, 5.0, 0.5, 3.0))
    codes = table.filter(regex=r"^token_\d+$").to_numpy().reshape(-1, 8, 150)
    lengths, counts, books, *_ = figure.axes
    assert sum(bar.get_height() for bar in lengths.patches) == 4
    assert {bar.get_x() + 0.4: bar.get_height() for bar in counts.patches} == {1: 2, 2: 1, 3: 1}
    used, even = (container.datavalues for container in books.containers)
    assert list(used) == [len(np.unique(codes[:, k])) for k in range(8)]
    assert all(1 <= b <= a for a, b in zip(used, even))
    assert len(set(even.round(2))) > 1


def test_the_picture_has_a_title_letters_and_three_clips_by_duration(picture):
    """Short, median, long; each a waveform in full scale over its tokens, its padding shaded."""
    figure, table = picture((1.5, 5.0, 0.5, 3.0, 2.5))
    title = figure.get_suptitle()
    for part in ("train_curated", "encodec_24khz", "6 kbps", "none", "untrained"):
        assert part in title
    panels = figure.axes
    assert [axis.get_title(loc="left") for axis in panels] == list("abcdefghi")
    waves = [axis for axis in panels if axis.get_ylim() == (-1, 1)]
    assert [re.split(r"[\n,]", axis.get_title())[:2] for axis in waves] == [
        ["2.wav", " 0.50 s"],
        ["4.wav", " 2.50 s"],
        ["1.wav", " 5.00 s"],
    ]
    assert all(f"Label_{i},Slam" in axis.get_title() for i, axis in zip((2, 4, 1), waves))
    for axis, seconds in zip(waves, (0.5, 2, 2)):
        heard, end = np.asarray(axis.lines[0].get_ydata()), round(seconds * 24_000)
        assert len(heard) == 48_000 and heard[:end].any() and not heard[end:].any()
    maps = [axis for axis in panels if axis.images]
    codes = table.filter(regex=r"^token_\d+$").to_numpy().reshape(-1, 8, 150)
    for axis, name in zip(maps, ("2.wav", "4.wav", "1.wav")):
        shown = axis.images[0].to_rgba(axis.images[0].get_array())
        first = codes[table.index[table["fname"] == name][0]]
        assert shown.shape[:2] == first.shape
        # Codes are names: equal ones, and only those, have the same colour.
        colours = np.unique(np.asarray(shown).reshape(first.size, -1), axis=0, return_inverse=True)
        by_code = pd.Series(colours[1].ravel()).groupby(first.ravel())
        assert (by_code.nunique() == 1).all()
        # ... and neighbours among the numbers are no neighbours among the colours.
        of_codes = colours[0][by_code.first()]
        near, far = (np.abs(of_codes - np.roll(of_codes, n, axis=0)).mean() for n in (1, 99))
        assert near > 0.5 * far
    shaded = [
        axis.patches[-1].get_extents().transformed(axis.transData.inverted()) for axis in maps
    ]
    assert np.allclose([box.x0 for box in shaded], [0.5, 2, 2])
    assert np.allclose([box.x1 for box in shaded], 2)


def test_a_clip_of_many_rows_counts_once(picture):
    """Where it lies across two of the pieces in which the CSV is read."""
    figure, table = picture((1.0, 11.0), "--target_duration", "0.1", "--overlap", "0")
    assert len(table) > BLOCK_CLIPS + 20
    lengths, counts, *_ = figure.axes
    assert sum(bar.get_height() for bar in lengths.patches) == 2
    assert {round(bar.get_x() + 0.4): bar.get_height() for bar in counts.patches} == {10: 1, 110: 1}


# --------------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize("how", ["mean", "none"])
def test_parquet_holds_the_rows_of_the_csv(how, run, make_dataset, sound, tmp_path):
    """With the tokens as one list of uint16; and its lists can be reshaped."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        ("0.wav", "NA"),
        ("1.wav", 'a,"b"'),
        ("2.wav", ""),
        *((f"{i}.wav", "x") for i in range(3, 70)),
    ]
    clips = {f"{i}.wav": (sound(0.3 if i == 1 else 0.05, 8_000), 8_000) for i in range(70)}
    flags = ["--target_duration", "0.1", "--aggregate", how, "--parquet"]
    status, out, _ = run("--input_dir", make_dataset(clips, rows=rows), *flags)
    path = tmp_path / "out" / "tokenized_train_curated.parquet"
    assert status == 0 and str(path) in out
    table = parquet.read_table(path)
    csv = pd.read_csv(path.with_suffix(".csv"), keep_default_na=False)
    tokens = [name for name in csv.columns if re.fullmatch(r"token_\d+", name)]
    facts = csv.columns.drop(tokens)
    assert table.column_names == [*facts, "tokens"]
    assert table.num_rows == len(csv) == (70 if how == "mean" else 73)
    for name in facts:
        assert table[name].to_pylist() == csv[name].tolist()
    assert table.schema.field("tokens").type == pa.list_(pa.uint16())
    types = {name: table.schema.field(name).type for name in table.column_names}
    assert pa.types.is_floating(types["duration_sec"]) and pa.types.is_integer(types["num_chunks"])
    shape = ast.literal_eval(table["token_shape"][0].as_py())
    flat = table["tokens"].combine_chunks().flatten().to_numpy()
    reshaped = flat.reshape(-1, *shape)
    assert np.array_equal(reshaped, csv[tokens].to_numpy().reshape(-1, *shape))
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_parquet_of_a_finished_run_is_made_from_its_csv(run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    flags = ["--dataset", "sample", "--max_samples", "2"]
    assert run(*flags)[0] == 0
    status, _, err = run(*flags, "--parquet")
    assert status == 0 and "is finished already" in err
    assert parquet.read_table(tmp_path / "out" / "tokenized_sample.parquet").num_rows == 2


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
