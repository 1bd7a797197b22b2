import pytest
import reference
import torch

from encodec_tokenizer import chunk_starts, split_chunks


def test_short_clip_is_zero_padded_at_its_end():
    (chunk,) = split_chunks(torch.ones(2, 30), 100, 90)
    assert chunk.shape == (2, 100)
    assert chunk[:, :30].eq(1).all() and chunk[:, 30:].eq(0).all()


def test_clip_of_exactly_one_chunk_is_that_chunk():
    audio = torch.randn(1, 100)
    (chunk,) = split_chunks(audio, 100, 90)
    assert chunk.equal(audio)


def test_tail_of_a_long_clip_is_tokenized():
    audio = torch.arange(195.0)[None]
    chunks = split_chunks(audio, 100, 90)
    assert [int(chunk[0, 0]) for chunk in chunks] == [0, 90, 95]
    assert chunks[-1][0, -1] == 194


def test_clip_that_ends_with_a_hop_gets_no_further_chunk():
    assert len(split_chunks(torch.zeros(1, 190), 100, 90)) == 2


@pytest.mark.parametrize("length", [1, 99, 100, 101, 189, 190, 191, 1000, 1001])
@pytest.mark.parametrize("hop", [10, 50, 90, 100])
def test_every_sample_is_in_a_chunk_and_long_clips_are_not_padded(length, hop):
    chunks = split_chunks(torch.arange(1.0, length + 1)[None], 100, hop)
    assert all(chunk.shape == (1, 100) for chunk in chunks)
    seen = torch.cat(chunks, dim=1).unique()
    padding = [0.0] if length < 100 else []
    assert seen.tolist() == padding + list(map(float, range(1, length + 1)))


@pytest.mark.parametrize("seconds", [0.3, 2.0, 2.1, 3.8, 3.81, 30.0])
def test_chunks_are_those_of_the_reference(seconds):
    audio = torch.randn(1, round(24_000 * seconds))
    ours, theirs = split_chunks(audio, 48_000, 43_200), reference.chunks(audio, 24_000)
    assert len(ours) == len(theirs)
    assert all(a.equal(b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("length", [1, 99, 100, 101, 189, 190, 191, 1000, 1001])
@pytest.mark.parametrize("hop", [10, 50, 90, 100])
def test_a_chunk_starts_where_its_first_sample_lies(length, hop):
    audio = torch.arange(1.0, length + 1)[None]
    first_samples = [int(chunk[0, 0]) - 1 for chunk in split_chunks(audio, 100, hop)]
    assert chunk_starts(length, 100, hop) == first_samples


def test_the_last_chunk_starts_a_chunk_before_the_clips_end():
    assert chunk_starts(195, 100, 90) == [0, 90, 95]
    assert chunk_starts(30, 100, 90) == [0]
