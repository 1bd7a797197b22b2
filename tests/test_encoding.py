"""Tokens against plain EncodecModel.encode, one chunk at a time."""

import numpy as np
import pytest
import reference
import standin
import torch

import encodec_tokenizer
from encodec_tokenizer import MODELS, make_encode, parse_settings

CASES = [(name, kbps) for name, spec in MODELS.items() for kbps in spec.bandwidths_kbps]


def encoder(name, weights, *flags):
    args = ["--model", name, "--weights", str(weights), "--device", "cpu", *flags]
    settings = parse_settings(args)
    encode = make_encode(encodec_tokenizer.load_model(settings, weights), settings)
    return lambda chunks: encode(chunks)[0]


def chunks_of(name, seconds, count, seed=5):
    spec = MODELS[name]
    audio = standin.varied_audio(spec.sample_rate, spec.channels, round(seconds * count) + 1, seed)
    flat = audio.transpose(0, 1).reshape(spec.channels, -1)
    size = round(seconds * spec.sample_rate)
    return torch.stack([flat[:, i * size : (i + 1) * size] for i in range(count)])


@pytest.mark.parametrize("seconds", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("name, kbps", CASES)
def test_codes_equal_plain_encode(name, kbps, seconds, weights):
    plain = standin.plain_model(name, weights(name))
    plain.set_target_bandwidth(kbps)
    chunks = chunks_of(name, seconds, 8)
    ours = encoder(name, weights(name), "--bandwidth", str(kbps))(chunks).numpy()
    theirs = np.stack([reference.codes(plain, chunk) for chunk in chunks])
    assert ours.shape == theirs.shape
    assert reference.agreement(ours, theirs) >= 0.999


@pytest.mark.parametrize("name", MODELS)
def test_stand_in_tokens_spread_over_hundreds_of_values(name, weights):
    codes = encoder(name, weights(name))(chunks_of(name, 2.0, 24)).numpy()
    for k in range(codes.shape[1]):
        assert len(np.unique(codes[:, k])) >= 200


@pytest.mark.parametrize("name", MODELS)
def test_codes_do_not_depend_on_the_place_or_company_in_a_batch(name, weights):
    encode = encoder(name, weights(name), "--batch_size", "8")
    chunks = chunks_of(name, 2.0, 8)
    together = encode(chunks)
    assert together.flip(0).equal(encode(chunks.flip(0)))
    assert together[3:4].equal(encode(chunks[3:4]))
    assert together[:5].equal(encode(chunks[:5]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("samples", [2401, 3333, 48_960, 48_001])
def test_chunks_of_odd_lengths_are_encoded_as_encodec_does(name, samples, weights):
    plain = standin.plain_model(name, weights(name))
    plain.set_target_bandwidth(6.0)
    chunks = chunks_of(name, 3.0, 2)[:, :, :samples]
    ours = encoder(name, weights(name))(chunks).numpy()
    theirs = np.stack([reference.codes(plain, chunk) for chunk in chunks])
    assert ours.shape == theirs.shape
    assert reference.agreement(ours, theirs) >= 0.999


@pytest.mark.parametrize("name", MODELS)
def test_silence_and_full_scale_give_codes(name, weights):
    spec = MODELS[name]
    extremes = torch.stack([torch.zeros(spec.channels, 48_000), torch.ones(spec.channels, 48_000)])
    codes = encoder(name, weights(name))(extremes)
    assert codes.min() >= 0 and codes.max() < 1024


def test_48_khz_keeps_the_codes_of_every_segment(weights):
    """A well-known script of this name kept only the first segment's."""
    chunks = chunks_of("encodec_48khz", 2.0, 1)
    codes = encoder("encodec_48khz", weights("encodec_48khz"))(chunks)
    assert codes.shape == (1, 4, 150 + 150 + 3)
    changed = chunks.clone()
    changed[:, :, 60_000:] = 0.1 * torch.randn(changed[:, :, 60_000:].shape)
    other = encoder("encodec_48khz", weights("encodec_48khz"))(changed)
    assert codes[..., :150].equal(other[..., :150])
    assert not codes[..., 150:300].equal(other[..., 150:300])


@pytest.mark.parametrize("name", MODELS)
def test_the_path_of_a_gpu_gives_the_same_codes(name, weights, monkeypatch):
    """CUDA runs the model's own encoder on whole batches; here that path runs on the CPU."""
    chunks = chunks_of(name, 2.0, 4)
    ours = encoder(name, weights(name))(chunks)
    monkeypatch.setattr(encodec_tokenizer, "FastEncoder", lambda model, size: model.encoder)
    assert reference.agreement(ours, encoder(name, weights(name))(chunks)) >= 0.999


def test_a_cpu_without_avx_512_gives_the_same_codes(weights, monkeypatch):
    chunks = chunks_of("encodec_24khz", 2.0, 4)
    ours = encoder("encodec_24khz", weights("encodec_24khz"))(chunks)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.delattr(torch.ops, "mkldnn")
    other = encoder("encodec_24khz", weights("encodec_24khz"))(chunks)
    assert reference.agreement(ours, other) >= 0.999


def test_out_of_memory_halves_the_batch_and_gives_the_same_codes(weights, monkeypatch):
    name, limit = "encodec_24khz", 3
    chunks = chunks_of(name, 1.0, 8)
    expected = encoder(name, weights(name))(chunks)
    fast_encoder = encodec_tokenizer.FastEncoder

    def small_machine(model, batch_size):
        inner = fast_encoder(model, batch_size)

        def encode(batch):
            if len(batch) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return inner(batch)

        return encode

    monkeypatch.setattr(encodec_tokenizer, "FastEncoder", small_machine)
    assert expected.equal(encoder(name, weights(name))(chunks))
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        encoder(name, weights(name))(chunks)
