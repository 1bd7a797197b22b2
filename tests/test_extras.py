"""Pictures and Parquet files of the tokens."""

import ast
import re

import numpy as np
import pandas as pd
import pytest
import soundfile
from matplotlib.figure import Figure

# ------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "seconds, flags",
    [
        ((1.0, 3.0, 0.5, 2.5), ["--model", "encodec_48khz"]),  # of four codebooks
        ((0.5,), ["--aggregate", "none"]),
        ((0.3, 2.7), ["--whole"]),
    ],
    ids=["48 kHz", "one clip", "whole"],
)
def test_a_picture_shows_clips_and_their_codes(
    seconds, flags, run, make_dataset, sound, monkeypatch
):
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (saved.append(f), save(f, *a, **k)))
    names = {f"{i} $1 $.wav": (sound(s, seed=i), 44_100) for i, s in enumerate(seconds)}
    status, _, err = run("--input_dir", make_dataset(names), "--plot", *flags)
    assert status == 0, err
    (figure,) = saved
    panels = figure.axes
    assert "train_curated: encodec_" in figure.get_suptitle()
    shortest, longest = (panels[place].get_title() for place in (3, 5))
    assert f"{min(seconds):.2f} s" in shortest and f"{max(seconds):.2f} s" in longest
    codebooks = 4 if "encodec_48khz" in flags else 8
    assert all(panel.images[0].get_array().shape[0] == codebooks for panel in panels[6:])
    assert all(np.any(panel.lines[0].get_ydata()) for panel in panels[3:6])


@pytest.mark.parametrize(
    "name, written, begins",
    [
        ("figure", "out/figure.png", b"\x89PNG"),
        ("new/figure.png", "out/new/figure.png", b"\x89PNG"),
        ("figure.pdf", "out/figure.pdf", b"%PDF"),
        ("{}/figure.svg", "figure.svg", b"<?xml"),
    ],
)
def test_a_pictures_name_says_its_place_and_kind(name, written, begins, run, tmp_path):
    """A relative name lies in --output_dir; PDFs hold TrueType fonts, which journals ask for."""
    flags = ["--dataset", "sample", "--max_samples", "2", "--target_duration", "0.5"]
    status, _, _ = run(*flags, "--plot", name.format(tmp_path))
    content = (tmp_path / written).read_bytes()
    assert status == 0
    assert content.startswith(begins)
    assert not list(tmp_path.glob("out/summary_*.png"))
    if begins == b"%PDF":
        assert b"/FontFile2" in content and b"/Type3" not in content


def test_of_two_datasets_each_has_its_own_picture(run, make_dataset, sound, tmp_path):
    for stem in ("train_curated", "train_noisy"):
        root = make_dataset({"a.wav": (sound(0.5), 44_100)}, stem)
    flags = ["--input_dir", root, "--dataset", "both", "--plot", tmp_path / "figure.pdf"]
    assert run(*flags)[0] == 0
    names = ["figure_train_curated.pdf", "figure_train_noisy.pdf"]
    assert sorted(path.name for path in tmp_path.glob("*.pdf")) == names


# --------------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize("how", ["mean", "none"])
def test_parquet_holds_the_rows_of_the_csv(how, run, make_dataset, sound, tmp_path):
    """With the tokens as one list of uint16; and its lists can be reshaped."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [("0.wav", "NA"), ("1.wav", 'a,"b"'), ("2.wav", "")]
    rows += [(f"{i}.wav", "x") for i in range(3, 40)]
    clips = {f"{i}.wav": (sound(0.3 if i == 1 else 0.05, 8_000), 8_000) for i in range(40)}
    flags = ["--target_duration", "0.1", "--aggregate", how, "--parquet"]
    path = tmp_path / "out" / "tokenized_train_curated.parquet"
    assert run("--input_dir", make_dataset(clips, rows=rows), *flags)[0] == 0
    table = parquet.read_table(path)
    csv = pd.read_csv(path.with_suffix(".csv"), keep_default_na=False)
    tokens = [name for name in csv.columns if re.fullmatch(r"token_\d+", name)]
    facts = csv.columns.drop(tokens)
    assert table.column_names == [*facts, "tokens"]
    assert table.num_rows == len(csv) == (40 if how == "mean" else 43)
    for name in facts:
        assert table[name].to_pylist() == csv[name].tolist()
    assert table.schema.field("tokens").type == pa.list_(pa.uint16())
    types = {name: table.schema.field(name).type for name in table.column_names}
    assert pa.types.is_floating(types["duration_sec"]) and pa.types.is_integer(types["num_chunks"])
    shape = ast.literal_eval(table["token_shape"][0].as_py())
    flat = table["tokens"].combine_chunks().flatten().to_numpy()
    reshaped = flat.reshape(-1, *shape)
    assert np.array_equal(reshaped, csv[tokens].to_numpy().reshape(-1, *shape))
    assert not list((tmp_path / "out").rglob("*.tmp*"))


def test_further_columns_of_numbers_are_numbers_in_parquet(run, sound, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    soundfile.write(tmp_path / "a.wav", sound(0.1, 8_000), 8_000)
    soundfile.write(tmp_path / "b.wav", sound(0.2, 8_000), 8_000)
    header = "fname,fold,snr,id,big,word"
    rows = ["a.wav,1,-0.5,007,12345678901234567890,x", "b.wav,,1e3,008,1,"]
    (tmp_path / "mine.csv").write_text("\n".join([header, *rows]) + "\n")
    flags = ["--metadata", tmp_path / "mine.csv", "--audio_dir", tmp_path, "--parquet"]
    assert run(*flags)[0] == 0
    table = parquet.read_table(tmp_path / "out" / "tokenized_mine.parquet").to_pydict()
    assert (table["fold"], table["snr"]) == ([1, None], [-0.5, 1000.0])
    assert (table["id"], table["word"]) == (["007", "008"], ["x", ""])
    assert table["big"] == ["12345678901234567890", "1"]  # a float would lose digits


def test_a_picture_needs_no_audio_and_outputs_stay_up_to_date(run, make_dataset, sound, tmp_path):
    """A Parquet file and a picture that are there are written again without their flags."""
    root = make_dataset({f"{i}.wav": (sound(0.3, 8_000), 8_000) for i in range(2)})
    assert run("--input_dir", root, "--parquet", "--plot", "figure")[0] == 0
    for path in (root / "train_curated").iterdir():
        path.unlink()
    out = tmp_path / "out"
    old = (out / "figure.png").read_bytes()
    status, _, err = run("--input_dir", root, "--aggregate", "none", "--overwrite")
    assert status == 0 and "the picture shows no waveform of 0.wav: " in err
    assert (out / "figure.png").read_bytes() != old
    parquet = pd.read_parquet(out / "tokenized_train_curated.parquet")
    assert "chunk" in parquet.columns
