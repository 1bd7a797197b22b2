"""From Python: files, samples and lists; settings, pickles and worker processes."""

import pickle

import numpy as np
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


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, lambda x: x.astype(np.float64)])
def test_samples_give_the_codes_of_a_file_that_holds_them(make, encoder, files):
    for path in files:
        samples, rate = soundfile.read(path, dtype="float32")
        codes = tokenize(make(samples.T), encoder, rate=rate)
        assert np.array_equal(codes, tokenize(path, encoder))


@pytest.mark.parametrize(
    "samples, rate, error",
    [
        (np.zeros(9), None, ValueError),
        (np.zeros(9), 0, ValueError),
        (np.zeros((900, 2)), 8_000, ValueError),
        (np.zeros((1, 2, 900)), 8_000, ValueError),
        (np.zeros(0), 8_000, BadClip),
        (np.float32(0.5), 8_000, ValueError),
        ([0.1, 0.2], 8_000, ValueError),
        (np.full(900, 50, dtype=np.int16), 8_000, BadClip),
        (np.full(900, 3000.0), 8_000, BadClip),
        (np.full(900, np.nan), 8_000, BadClip),
        (np.zeros(8_000 * 601), 8_000, BadClip),
    ],
)
def test_samples_that_cannot_be_right_are_refused(samples, rate, error, encoder):
    with pytest.raises(error):
        tokenize(samples, encoder, rate=rate)


def test_settings_are_checked_as_flags_are():
    assert Settings(bandwidth=6, audio_dir="x") == Settings(bandwidth=6.0, audio_dir="x")
    with pytest.raises(UserError, match="--aggregate: choose from mean, "):
        Settings(aggregate="median")


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
