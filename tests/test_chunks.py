"""How audio is cut into chunks."""

import pytest
import reference
import torch

from encodec_tokenizer import Settings, split_chunks


@pytest.mark.parametrize("length", [1, 2399, 2400, 2401, 4559, 4560, 4561, 24_000, 24_001])
@pytest.mark.parametrize("overlap", [0, 0.1, 0.5, 0.9])
def test_every_sample_is_in_a_chunk_and_long_clips_are_not_padded(length, overlap):
    audio = torch.arange(1.0, length + 1)[None]
    starts, chunks = split_chunks(audio, Settings(target_duration=0.1, overlap=overlap))
    assert all(chunk.shape == (1, 2400) for chunk in chunks)
    assert starts == [int(chunk[0, 0]) - 1 for chunk in chunks]
    seen = torch.cat(chunks, dim=1).unique().tolist()
    padding = [0.0] if length < 2400 else []
    assert seen == padding + audio[0].tolist()


@pytest.mark.parametrize("seconds", [0.3, 2.0, 2.1, 3.8, 3.81, 30.0])
def test_chunks_are_those_of_the_reference(seconds):
    """Among them a clip that ends with a hop, and clips with a tail."""
    audio = torch.randn(1, round(24_000 * seconds))
    ours, theirs = split_chunks(audio, Settings())[1], reference.chunks(audio, 24_000)
    assert len(ours) == len(theirs)
    assert all(a.equal(b) for a, b in zip(ours, theirs))
