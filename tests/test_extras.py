"""Pictures and Parquet files of the tokens."""

import ast
import errno
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import soundfile
from matplotlib.figure import Figure
from pyarrow import parquet

import encodec_tokenizer

pytestmark = pytest.mark.usefixtures("ready_made_codes")

# ------------------------------------------------------------------------------------- pictures


def test_a_picture_shows_a_short_a_median_and_a_long_clip(run, make_dataset, sound, tmp_path):
    """A clip's name may look like TeX. matplotlib writes each text of an SVG in a comment, too."""
    clips = {f"{i} $1 $.wav": (sound(s), 44_100) for i, s in enumerate([1.0, 3.0, 0.5, 2.5])}
    flags = ["--input_dir", make_dataset(clips), "--model", "encodec_48khz"]
    status, _, err = run(*flags, "--plot", tmp_path / "figure.svg")
    assert status == 0 and "no waveform" not in err
    texts = re.findall("<!-- (.*) -->", (tmp_path / "figure.svg").read_text())
    assert "train_curated: encodec_48khz" in " ".join(texts)
    titles = [text for text in texts if ".wav" in text]
    assert titles == ["2 $1 $.wav, 0.50 s", "0 $1 $.wav, 1.00 s", "1 $1 $.wav, 3.00 s"]


@pytest.mark.parametrize("flags", [[], ["--aggregate", "medoid"], ["--whole"]])
def test_a_picture_shows_the_codes_of_what_is_drawn(flags, run, sound, tmp_path, monkeypatch):
    """The first chunk, or the whole clip; one long clip leaves the others' durations apart."""
    name, figures = f"{'a long name ' * 5}of a clip.wav", []
    for at, seconds in enumerate([0.5, 1.0, 1.5, 5.0]):
        soundfile.write(tmp_path / f"{at} {name}", sound(seconds, 8_000), 8_000)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    monkeypatch.setattr(encodec_tokenizer, "put_in_place", lambda output: None)
    run("--audio_dir", tmp_path, "--plot", *flags)
    panels = {panel.get_label(): panel for panel in figures[0].axes}
    assert panels["durations"].get_xscale() == "log" and ("chunks" in panels) == (
        "--whole" not in flags
    )
    (folder,) = (tmp_path / "out" / f"codes_{tmp_path.name}").iterdir()
    for column, at in enumerate((0, 1, 3)):
        codes = np.load(folder / f"{at} {name}.npz")["codes"][0]
        assert (panels[f"codes {column}"].images[0].get_array() == codes).all()
        assert "of a clip.wav, " in panels[f"wave {column}"].get_title()


@pytest.mark.parametrize(
    "flags, written, begins, holds",
    [
        ("--plot figure --aggregate none", "figure.png", b"\x89PNG", b""),
        ("--plot new/figure.pdf", "new/figure.pdf", b"%PDF", b"/FontFile2"),  # TrueType fonts
        ("--plot --whole", "summary_sample.png", b"\x89PNG", b""),
    ],
)
def test_a_pictures_name_says_its_kind(flags, written, begins, holds, run, tmp_path):
    status, _, _ = run("--dataset", "sample", "--max_samples", "2", *flags.split())
    assert status == 0
    content = (tmp_path / "out" / written).read_bytes()
    assert content.startswith(begins)
    assert holds in content and b"/Type3" not in content


def test_of_two_datasets_each_has_its_own_csv_and_picture(run, make_dataset, sound, tmp_path):
    for stem, name in {"train_curated": "a.wav", "train_noisy": "b.wav"}.items():
        root = make_dataset({name: (sound(0.5), 44_100)}, stem)
    flags = ["--input_dir", root, "--dataset", "both", "--plot", tmp_path / "figure.pdf"]
    assert run(*flags)[0] == 0
    names = ["figure_train_curated.pdf", "figure_train_noisy.pdf"]
    assert sorted(path.name for path in tmp_path.glob("*.pdf")) == names
    for stem, name in {"train_curated": "a.wav", "train_noisy": "b.wav"}.items():
        table = pd.read_csv(tmp_path / "out" / f"tokenized_{stem}.csv")
        assert table["fname"].tolist() == [name]


# --------------------------------------------------------------------------------------- Parquet


def test_parquet_holds_the_rows_of_the_csv(run, make_dataset, sound, tmp_path):
    """With the tokens as one list of uint16; and its lists can be reshaped."""
    rows = [("0.wav", "NA"), ("1.wav", 'a,"b"'), ("2.wav", "")]
    clips = {name: (sound(0.3 if label else 0.05, 8_000), 8_000) for name, label in rows}
    flags = ["--target_duration", "0.1", "--aggregate", "none", "--parquet"]
    path = tmp_path / "out" / "tokenized_train_curated.parquet"
    assert run("--input_dir", make_dataset(clips, rows=rows), *flags)[0] == 0
    table = parquet.read_table(path)
    csv = pd.read_csv(path.with_suffix(".csv"), keep_default_na=False)
    tokens = [name for name in csv.columns if re.fullmatch(r"token_\d+", name)]
    facts = csv.columns.drop(tokens)
    assert table.column_names == [*facts, "tokens"] and table.num_rows == len(csv) == 9
    for name in facts:
        assert table[name].to_pylist() == csv[name].tolist()
    types = {name: table.schema.field(name).type for name in table.column_names}
    assert types["tokens"] == pa.list_(pa.uint16())
    assert pa.types.is_floating(types["duration_sec"]) and pa.types.is_integer(types["num_chunks"])
    shape = ast.literal_eval(table["token_shape"][0].as_py())
    flat = table["tokens"].combine_chunks().flatten().to_numpy()
    reshaped = flat.reshape(-1, *shape)
    assert np.array_equal(reshaped, csv[tokens].to_numpy().reshape(-1, *shape))


def test_further_columns_of_numbers_are_numbers_in_parquet(run, sound, tmp_path):
    soundfile.write(tmp_path / "a.wav", sound(0.1, 8_000), 8_000)
    soundfile.write(tmp_path / "b.wav", sound(0.2, 8_000), 8_000)
    header = "fname,fold,snr,id,big,hex,word"
    rows = ["a.wav,1,-0.5,007,12345678901234567890,12e45678,x", "b.wav,,1e3,008,1,1,"]
    (tmp_path / "mine.csv").write_text("\n".join([header, *rows]) + "\n")
    flags = ["--metadata", tmp_path / "mine.csv", "--audio_dir", tmp_path, "--parquet"]
    assert run(*flags)[0] == 0
    table = parquet.read_table(tmp_path / "out" / "tokenized_mine.parquet").to_pydict()
    assert (table["fold"], table["snr"]) == ([1, None], [-0.5, 1000.0])
    assert (table["id"], table["word"]) == (["007", "008"], ["x", ""])
    assert table["big"] == ["12345678901234567890", "1"]  # a float would lose digits
    assert table["hex"] == ["12e45678", "1"]  # a float would be infinite


# ------------------------------------------------------------------------------ as optional outputs

PICTURE, PARQUET = "summary_train_curated.png", "tokenized_train_curated.parquet"


@pytest.fixture
def root(make_dataset, sound):
    return make_dataset({f"{i}.wav": (sound(0.3, 8_000), 8_000) for i in range(2)})


def test_only_outputs_under_default_names_stay_up_to_date(run, root, tmp_path):
    """Without their flags, too; the picture needs no audio."""
    assert run("--input_dir", root, "--parquet", "--plot")[0] == 0
    assert run("--input_dir", root, "--plot", "mine")[0] == 0
    old = (tmp_path / "out" / PICTURE).read_bytes()
    assert run("--input_dir", root, "--plot", "mine", "--max_samples", "1")[0] == 0
    assert (tmp_path / "out" / PICTURE).read_bytes() != old
    for path in (root / "train_curated").iterdir():
        path.unlink()
    paths = [tmp_path / "out" / name for name in (PARQUET, PICTURE, "mine.png")]
    old = [path.read_bytes() for path in paths]
    status, _, err = run("--input_dir", root, "--aggregate", "none")
    assert status == 0 and "the picture shows no waveform of 0.wav: " in err
    assert "chunk" in pd.read_parquet(paths[0]).columns
    assert [path.read_bytes() != was for path, was in zip(paths, old)] == [True, True, False]


def test_an_old_output_whose_package_is_gone_stays(run, root, tmp_path, monkeypatch):
    assert run("--input_dir", root, "--parquet", "--plot")[0] == 0
    old = (tmp_path / "out" / PARQUET).read_bytes()
    monkeypatch.setattr(encodec_tokenizer, "find_spec", lambda name: name == "torch")
    status, out, err = run("--input_dir", root, "--max_samples", "1")
    assert status == 0 and "1 clip tokenized" in out
    assert f"{PARQUET} could not be written: pyarrow is not installed. The file is of an ear" in err
    assert f"{PICTURE} could not be written: matplotlib is not installed" in err
    assert (tmp_path / "out" / PARQUET).read_bytes() == old


@pytest.mark.parametrize("step", ["write", "rename"])
def test_an_optional_output_that_fails_costs_no_csv(step, run, root, tmp_path, monkeypatch):
    def fail(job, totals, path):
        path.write_text("half") if step == "write" else path.mkdir()
        if step == "write":
            raise MemoryError("no memory to draw it")

    assert run("--input_dir", root, "--plot")[0] == 0
    old = (tmp_path / "out" / PICTURE).read_bytes()
    monkeypatch.setattr(encodec_tokenizer, "write_picture", fail)
    status, out, err = run("--input_dir", root, "--max_samples", "1", "--plot")
    assert status == 1 and "1 clip tokenized" in out
    assert re.search(f"note: .*{PICTURE} could not be written: .*The file is of an earlier", err)
    assert (tmp_path / "out" / PICTURE).read_bytes() == old
    assert not list((tmp_path / "out").glob(".unfinished*"))
    assert len(pd.read_csv(tmp_path / "out" / "tokenized_train_curated.csv")) == 1


def test_an_optional_output_takes_no_space_of_the_others(run, root, tmp_path, monkeypatch):
    """What is there of a Parquet file for which the disk is too small."""
    full, write_summary = OSError(errno.ENOSPC, "No space left"), encodec_tokenizer.write_summary

    def write_a_part(job, totals, path):
        path.touch()
        raise full

    def write_if_space(job, totals, path):
        if list(path.parent.glob("*.parquet")):
            raise full
        write_summary(job, totals, path)

    monkeypatch.setattr(encodec_tokenizer, "write_parquet", write_a_part)
    monkeypatch.setattr(encodec_tokenizer, "write_summary", write_if_space)
    status, out, err = run("--input_dir", root, "--parquet")
    assert status == 1 and "2 clips tokenized" in out and "could not be written: [Errno 28]" in err
    assert (tmp_path / "out" / "tokenized_train_curated.csv").exists()


def test_a_folder_can_be_an_output_and_is_replaced(run, root, tmp_path, monkeypatch):
    """It is a function and a line in outputs_of."""
    outputs_of = encodec_tokenizer.outputs_of
    folder = tmp_path / "out" / "lists"

    def write_folder(job, totals, path):
        path.mkdir()
        for clip in totals.clips:
            (path / clip.fname).touch()

    def with_a_folder(job, **options):
        temporary = folder.with_name(".unfinished-lists") / folder.name
        output = encodec_tokenizer.Output(folder, temporary, write_folder, is_folder=True)
        return [*outputs_of(job, **options), output]

    monkeypatch.setattr(encodec_tokenizer, "outputs_of", with_a_folder)
    for count in (2, 1):
        assert run("--input_dir", root, "--max_samples", count)[0] == 0
        assert len(list(folder.iterdir())) == count
    assert not list((tmp_path / "out").glob(".unfinished*"))
