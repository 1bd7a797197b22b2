"""Pictures and Parquet files of the tokens."""

import ast
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from encodec_tokenizer import code_colours

# ------------------------------------------------------------------------------------- pictures


@pytest.fixture
def picture(run, make_dataset, sound, tmp_path, monkeypatch):
    """Draws a run over clips of these seconds, a row a chunk: the figure as it is saved."""
    saved, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(seconds, *flags):
        clips = {f"{i}.wav": (sound(s, seed=i), 44_100) for i, s in enumerate(seconds)}
        flags = ["--plot", *flags]
        if "--whole" not in flags:
            flags += ["--aggregate", "none"]
        assert run("--input_dir", make_dataset(clips), *flags)[0] == 0
        return saved[0]

    return draw


def codes_in(tmp_path, books=8, frames=150):
    """The names and the codes [R, K, F] of the rows of the CSV."""
    table = pd.read_csv(tmp_path / "out" / "tokenized_train_curated.csv")
    codes = table.filter(regex=r"^token_\d+$").to_numpy().reshape(-1, books, frames)
    return table["fname"].tolist(), codes


def test_the_counts_in_the_picture_are_those_of_the_csv(picture, tmp_path):
    lengths, counts, books, *_ = picture((1.5, 5.0, 0.5, 3.0)).axes
    assert sum(bar.get_height() for bar in lengths.patches) == 4
    assert {bar.get_x() + 0.4: bar.get_height() for bar in counts.patches} == {1: 2, 2: 1, 3: 1}
    used, even = (container.datavalues for container in books.containers)
    _, codes = codes_in(tmp_path)
    assert list(used) == [len(np.unique(codes[:, k])) for k in range(8)]
    assert all(1 <= b <= a for a, b in zip(used, even)) and len(set(even)) > 1


def test_the_picture_shows_a_short_a_median_and_a_long_clip(picture, tmp_path):
    """By duration; each a waveform in full scale over its codes, its padding shaded."""
    figure = picture((1.5, 5.0, 0.5, 3.0, 2.5))
    for part in ("train_curated", "encodec_24khz", "6 kbps", "none", "untrained"):
        assert part in figure.get_suptitle()
    panels = figure.axes
    assert [axis.get_title(loc="left") for axis in panels] == list("abcdefghi")
    waves, maps = panels[3:6], panels[6:]
    assert [axis.get_title() for axis in waves] == [
        "2.wav, 0.50 s\nLabel_2,Slam",
        "4.wav, 2.50 s\nLabel_4,Slam",
        "1.wav, 5.00 s\nLabel_1,Slam",
    ]
    for axis, seconds in zip(waves, (0.5, 2, 2)):
        heard, end = np.asarray(axis.lines[0].get_ydata()), round(seconds * 24_000)
        assert len(heard) == 48_000 and heard[:end].any() and not heard[end:].any()
        assert axis.get_ylim() == (-1, 1)
    names, codes = codes_in(tmp_path)
    for axis, name in zip(maps, ("2.wav", "4.wav", "1.wav")):
        image = axis.images[0]
        assert np.array_equal(image.get_array(), codes[names.index(name)])
        colours = image.to_rgba(np.arange(1024))[:, :3]
        assert np.allclose(colours, code_colours().colors)
    shaded = [
        axis.patches[-1].get_extents().transformed(axis.transData.inverted()) for axis in maps
    ]
    assert np.allclose([box.x0 for box in shaded], [0.5, 2, 2])
    assert np.allclose([box.x1 for box in shaded], 2)


def test_codes_have_colours_of_their_own_without_an_order():
    """Equal codes, and only those, look equal; neighbours among the numbers look unlike."""
    colours = np.array(code_colours().colors)
    assert colours.shape == (1024, 3)
    assert len(np.unique(colours.round(6), axis=0)) == 1024
    near, far = (np.abs(colours - np.roll(colours, n, axis=0)).mean() for n in (1, 99))
    assert near > 0.5 * far


def test_the_picture_fits_a_page_and_says_what_it_shows(picture):
    figure = picture((1.0, 3.0))
    assert figure.get_figwidth() == 7.2
    letters, lengths, counts, books = "abcdefg", *figure.axes[:3]
    assert [axis.get_title(loc="left") for axis in figure.axes] == list(letters)
    text = figure.get_supxlabel()
    assert "d to e: the clip's first chunk. f to g: the codes" in text
    assert "Grey is zero padding" in text and "Colours tell codes apart and have no order" in text
    figure.draw_without_rendering()
    legend = books.get_legend().get_window_extent()
    for axis in figure.axes:
        assert not legend.overlaps(axis._left_title.get_window_extent())
    assert (lengths.get_xlabel(), counts.get_xlabel()) == (
        "duration of a clip (s)",
        "chunks of a clip",
    )


@pytest.mark.parametrize(
    "seconds, flags",
    [
        ((1.0, 3.0), ["--model", "encodec_48khz"]),  # of four codebooks
        ((0.5, 0.5), []),  # all of one chunk, and of one length
        ((0.3, 0.9), ["--whole"]),
    ],
    ids=["48 kHz", "one chunk", "whole"],
)
def test_numbers_that_count_have_whole_ticks(seconds, flags, picture):
    figure = picture(seconds, *flags)
    figure.draw_without_rendering()
    lengths, counts, books, *_ = figure.axes
    maps = [axis.yaxis for axis in figure.axes if axis.images]
    for axis in (lengths.yaxis, counts.xaxis, counts.yaxis, books.xaxis, *maps):
        low, high = sorted(axis.get_view_interval())
        shown = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
        assert shown and all(float(tick).is_integer() for tick in shown)


def test_a_whole_clips_panels_end_where_it_ends(picture):
    figure = picture((0.3, 2.7), "--whole")
    assert "whole clips" in figure.get_suptitle()
    assert "d to e: the clip." in figure.get_supxlabel()
    ends = [axis.get_xlim()[1] for axis in figure.axes[3:]]
    assert np.allclose(ends, [0.3, 2.7, 0.3, 2.7])
    assert figure.axes[6].images[0].get_array().shape == (8, 203)  # 2.7 * 75, rounded up


def test_a_clip_that_is_listed_twice_can_be_drawn(run, make_dataset, sound, tmp_path):
    """With two labels, and in two blocks."""
    clips = {f"{i}.wav": (sound(0.3 if i else 0.9), 44_100) for i in range(18)}
    rows = [(name, "Bark") for name in clips] + [("0.wav", "Slam")]
    flags = ["--plot", "--target_duration", "0.5"]
    status, _, err = run("--input_dir", make_dataset(clips, rows=rows), *flags)
    assert status == 0, err
    assert (tmp_path / "out" / "summary_train_curated.png").exists()


def test_a_picture_lies_beside_the_csv_and_is_drawn_again(run, make_dataset, sound, tmp_path):
    """Of a finished run, too; and no name is read as a formula."""
    root = make_dataset({"a $1 $.wav": (sound(1.0), 44_100), "b.wav": (sound(0.5), 44_100)})
    path = tmp_path / "out" / "summary_train_curated.png"
    for _ in range(2):
        status, out, _ = run("--input_dir", root, "--plot")
        assert status == 0 and f"Picture: {path}\n" in out
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()


@pytest.mark.parametrize(
    "name, written, begins",
    [
        ("figure", "out/figure.png", b"\x89PNG"),
        ("figure.pdf", "out/figure.pdf", b"%PDF"),
        ("{}/figure.svg", "figure.svg", b"<?xml"),
    ],
)
def test_a_pictures_name_says_its_place_and_kind(name, written, begins, run, tmp_path):
    """A relative name lies in --output_dir; PDFs hold TrueType fonts, which journals ask for."""
    flags = ["--dataset", "sample", "--max_samples", "2", "--target_duration", "0.5"]
    status, out, _ = run(*flags, "--plot", name.format(tmp_path))
    content = (tmp_path / written).read_bytes()
    assert status == 0 and f"Picture: {tmp_path / written}\n" in out
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
    status, out, _ = run("--input_dir", make_dataset(clips, rows=rows), *flags)
    path = tmp_path / "out" / "tokenized_train_curated.parquet"
    assert status == 0 and f"Parquet: {path}\n" in out
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


def test_parquet_of_a_finished_run_needs_no_encoder(run, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    flags = ["--dataset", "sample", "--max_samples", "2", "--target_duration", "0.5"]
    assert run(*flags)[0] == 0
    monkeypatch.setattr("encodec_tokenizer.Encoder", None)
    assert run(*flags, "--parquet")[0] == 0
    assert parquet.read_table(tmp_path / "out" / "tokenized_sample.parquet").num_rows == 2


def test_a_picture_needs_no_audio_and_leaves_the_parquet(run, make_dataset, sound, tmp_path):
    pytest.importorskip("matplotlib")
    root = make_dataset({f"{i}.wav": (sound(0.3, 8_000), 8_000) for i in range(2)})
    assert run("--input_dir", root, "--parquet")[0] == 0
    for path in (root / "train_curated").iterdir():
        path.unlink()
    status, out, err = run("--input_dir", root, "--plot", "figure")
    assert status == 0 and "cannot be drawn any more: no such file" in err
    assert str(tmp_path / "out" / "figure.png") in out
    assert (tmp_path / "out" / "tokenized_train_curated.parquet").exists()
