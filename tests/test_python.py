"""From Python: files, samples and lists; settings, pickles and worker processes."""

import io
import os
import pickle
import re
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from encodec_tokenizer import BadClip, Settings, UserError, load_encoder, tokenize


@pytest.fixture(scope="module")
def encoder(weights):
    return load_encoder(Settings(device="cpu", weights=weights("encodec_24khz")))


@pytest.fixture(scope="module")
def files(tmp_path_factory, sound):
    """Three files, among them stereo, and one of several chunks."""
    folder = tmp_path_factory.mktemp("files")
    for name, *shape in [("a", 1.0, 44_100, 1), ("b", 3.0, 22_050, 2), ("c", 0.3, 8_000, 1)]:
        soundfile.write(folder / f"{name}.wav", sound(*shape), shape[1], subtype="FLOAT")
    return sorted(folder.iterdir())


def test_a_list_gives_the_codes_of_each(encoder, files):
    together = tokenize(files, encoder)
    assert [codes.shape for codes in together] == [(1, 8, 150), (2, 8, 150), (1, 8, 150)]
    for path, codes in zip(files, together, strict=True):
        assert codes.dtype == np.int64 and np.array_equal(tokenize(str(path), encoder), codes)


def read_only(samples):
    samples = samples.copy()
    samples.flags.writeable = False
    return samples


SEVERAL = {  # a list of paths -> what stands for several files
    "tuple": tuple,
    "generator": lambda paths: (path for path in paths),
    "glob": lambda paths: paths[0].parent.glob("*.wav"),
    "array of texts": lambda paths: np.array([str(path) for path in paths]),
    "array of paths": np.array,
    "Series of texts": lambda paths: pd.Series([str(path) for path in paths], index=[7, 7, 7]),
    "Series of paths": pd.Series,
}


@pytest.mark.parametrize("make", SEVERAL.values(), ids=SEVERAL)
def test_several_files_come_in_many_forms(make, encoder, files):
    together = tokenize(make(files), encoder)
    assert isinstance(together, list) and len(together) == 3
    for path in files:
        assert any(np.array_equal(tokenize(path, encoder), codes) for codes in together)


SAMPLES = {  # float32 [T] or [C, T] -> the same in another form
    "array": np.asarray,
    "tensor": torch.tensor,
    "tensor with a gradient": lambda x: torch.tensor(x, requires_grad=True),
    "float64": lambda x: x.astype(np.float64),
    "long double": lambda x: x.astype(np.longdouble),
    "bytes swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "read-only": read_only,
    "negative strides": lambda x: x[..., ::-1].copy()[..., ::-1],
    "every second of an array": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "Series": lambda x: pd.Series(x) if x.ndim == 1 else x,
    "masked array": np.ma.array,
}


@pytest.mark.parametrize("make", SAMPLES.values(), ids=SAMPLES)
def test_samples_give_the_codes_of_a_file_that_holds_them(make, encoder, files):
    for path in files:
        samples, rate = soundfile.read(path, dtype="float32")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            codes = tokenize(make(samples.T), encoder, rate=rate)
        assert np.array_equal(codes, tokenize(path, encoder))


RATES = [8_000, 8_000.0, np.int32(8_000), np.float64(8_000), np.array([[8_000]])]
RATES += [torch.tensor(8_000), torch.tensor([8_000.0])]


@pytest.mark.parametrize("rate", RATES, ids=repr)
def test_a_rate_is_any_kind_of_number(rate, encoder, files):
    samples, _ = soundfile.read(files[2], dtype="float32")
    assert np.array_equal(tokenize(samples, encoder, rate), tokenize(files[2], encoder))


def test_a_note_that_cannot_be_printed_is_no_error(encoder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sys.stderr.close()
    odd = 44_101  # with a note
    assert tokenize(np.zeros(500, np.float32), encoder, odd).shape == (1, 8, 150)


NO_RATE = "samples need their sample rate in Hz, 100 to 1,000,000"


@pytest.mark.parametrize(
    "sound, rate, error, says",
    [
        (np.zeros(9), None, ValueError, f"rate=None: {NO_RATE}"),
        (np.zeros(9), 0, ValueError, f"rate=0: {NO_RATE}"),
        (np.zeros(9), 8_000.5, ValueError, f"rate=8000.5: {NO_RATE}"),
        (np.zeros(9), "8000", ValueError, f"rate='8000': {NO_RATE}"),
        (np.zeros(9), np.array([8_000, 16_000]), ValueError, NO_RATE),
        (np.zeros(9), torch.tensor([8_000, 16_000]), ValueError, NO_RATE),
        (np.zeros(9), float("nan"), ValueError, f"rate=nan: {NO_RATE}"),
        (np.zeros((900, 2)), 8_000, ValueError, "shape (900, 2) are neither [T] nor [C, T]"),
        (np.zeros((1, 2, 900)), 8_000, ValueError, "shape (1, 2, 900)"),
        (np.zeros(0), 8_000, BadClip, "no samples"),
        (np.float32(0.5), 8_000, ValueError, "shape ()"),
        ([0.1, 0.2], 8_000, ValueError, "sound 0: a float is no sound"),
        (np.full(900, 50, dtype=np.int16), 8_000, BadClip, "int16 samples: give floats"),
        (torch.full([900], 50), 8_000, BadClip, "int64 samples: give floats"),
        (np.array("a.wav"), None, BadClip, "<U5 samples: give floats"),
        (pd.DataFrame({"path": ["a.wav"]}), None, BadClip, "object samples: give floats"),
        (np.full(900, 1j), 8_000, BadClip, "complex128 samples"),
        (np.full(900, 3000.0), 8_000, BadClip, "samples up to 3000"),
        (np.full(900, np.nan), 8_000, BadClip, "NaN or infinite samples"),
        (np.zeros(8_000 * 601), 8_000, BadClip, "too long: 601.0 s"),
        (None, None, ValueError, "None is no sound: give a path"),
        ({"array": np.zeros(900)}, 8_000, ValueError, "a dict is no sound"),
        ({"a.wav"}, None, ValueError, "a set is no sound"),
        (b"RIFF", None, ValueError, "a bytes is no sound"),
        (io.BytesIO(b"RIFF"), None, ValueError, "a BytesIO is no sound"),
        (3, None, ValueError, "an int is no sound"),
        ([["a.wav"]], None, ValueError, "sound 0: a list is no sound"),
        ([np.zeros(900), np.full(900, np.nan)], 8_000, BadClip, "sound 1: NaN"),
        ("", None, BadClip, "a folder, not a file"),
        ("a\0.wav", None, ValueError, "embedded null"),
    ],
)
def test_what_cannot_be_right_is_told_by_what_it_is(sound, rate, error, says, encoder):
    with pytest.raises(error, match=re.escape(says)):
        tokenize(sound, encoder, rate=rate)


def test_the_error_names_the_bad_file_of_a_list(encoder, files, tmp_path):
    with pytest.raises(BadClip, match=re.escape(f"{tmp_path / 'gone.wav'}: no such file")):
        tokenize([files[0], tmp_path / "gone.wav"], encoder)


def test_a_path_may_begin_with_the_home_folder(encoder, files, monkeypatch):
    monkeypatch.setenv("HOME", str(files[0].parent))
    assert np.array_equal(tokenize("~/a.wav", encoder), tokenize(files[0], encoder))


def test_settings_are_checked_as_flags_are():
    assert Settings(bandwidth=6, audio_dir="x") == Settings(bandwidth=6.0, audio_dir="x")
    wrong = {"aggregate": "median", "max_samples": 2.5, "whole": "false", "model": None}
    wrong |= {"bandwidth": "six", "output_dir": "", "weights": 3, "workers": float("inf")}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"--{name}"):
            Settings(**{name: value})


def test_an_encoder_can_be_pickled(encoder, files):
    again = pickle.loads(pickle.dumps(encoder))
    assert np.array_equal(tokenize(files[1], again), tokenize(files[1], encoder))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_two_workers_of_a_data_loader_give_the_same_codes(encoder, files):
    """They are forked after the encoder has been used here."""
    expected = tokenize(files, encoder)
    options = {"batch_size": None, "num_workers": 2, "timeout": 60}
    loader = DataLoader(files, collate_fn=lambda path: tokenize(path, encoder), **options)
    for ours, theirs in zip(loader, expected, strict=True):
        assert np.array_equal(ours, theirs)


def test_an_encoder_leaves_the_process_as_it_was(encoder, files):
    def state():
        cudnn = torch.backends.cudnn
        return torch.get_num_threads(), cudnn.allow_tf32, cudnn.deterministic, dict(os.environ)

    torch.set_num_threads(2)
    before = state()
    load_encoder(encoder.settings)
    tokenize(files, encoder)
    assert state() == before
    torch.set_num_threads(1)
