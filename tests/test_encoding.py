"""Tokens against plain EncodecModel.encode, one chunk at a time; and how chunks form batches."""

import functools

import numpy as np
import pytest
import reference
import standin
import torch

import encodec_tokenizer
from encodec_tokenizer import (
    MODELS,
    GpuEncoder,
    load_model,
    make_encoder,
    parse_settings,
    resolve_device,
)


def settings_of(name, *flags):
    argv = ["--model", name, "--device", "cpu", *map(str, flags)]
    return resolve_device(parse_settings(argv))


@pytest.fixture(scope="session")
def encoder(weights):
    """encoder(model's name, *flags): the script's, with the stand-in's weights, made once."""
    model = functools.cache(lambda name: load_model(settings_of(name), weights(name))[0])

    @functools.cache
    def make(name, *flags):
        settings = settings_of(name, *flags)
        model(name).set_target_bandwidth(settings.bandwidth)
        return make_encoder(model(name), settings)

    return make


def codes_of(encoder, chunks):
    """[B, C, T] -> [B, K, F]"""
    return np.stack([codes for codes, _ in encoder.encode(list(chunks))])


@functools.cache
def chunks_of(name, seconds, count, seed=5):
    spec = MODELS[name]
    audio = standin.varied_audio(spec.sample_rate, spec.channels, round(seconds * count) + 1, seed)
    flat = audio.transpose(0, 1).reshape(spec.channels, -1)
    size = round(seconds * spec.sample_rate)
    return torch.stack([flat[:, i * size : (i + 1) * size] for i in range(count)])


def plain_codes(model, chunks):
    return np.stack([reference.codes(model, chunk) for chunk in chunks])


# ------------------------------------------------------------------------ equal to plain EnCodec


@pytest.mark.parametrize("name, books", [("encodec_24khz", 32), ("encodec_48khz", 16)])
def test_codes_equal_plain_encode_at_every_bandwidth(name, books, encoder, plain):
    """A lower bandwidth keeps the first codebooks of a higher one."""
    chunks = chunks_of(name, 1.0, 3)
    theirs = plain_codes(plain(name, 24.0), chunks)
    assert theirs.shape[1] == books
    for kbps in MODELS[name].bandwidths_kbps:
        ours = codes_of(encoder(name, "--bandwidth", kbps), chunks)
        assert ours.shape[1] == books * kbps / 24
        assert reference.agreement(ours, theirs[:, : ours.shape[1]]) >= 0.999


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("samples", [2401, 3333, 48_001, 48_960, 96_000])
def test_chunks_of_any_length_are_encoded_as_encodec_does(name, samples, encoder, plain):
    chunks = chunks_of(name, 96_000 / MODELS[name].sample_rate, 2)[:, :, :samples]
    ours, theirs = codes_of(encoder(name), chunks), plain_codes(plain(name), chunks)
    assert ours.shape == theirs.shape
    assert reference.agreement(ours, theirs) >= 0.999


@pytest.mark.parametrize("name", MODELS)
def test_silence_and_full_scale_give_the_codes_of_encodec(name, encoder, plain):
    channels = MODELS[name].channels
    extremes = torch.stack([torch.zeros(channels, 48_000), torch.ones(channels, 48_000)])
    ours = codes_of(encoder(name), extremes)
    assert ours.min() >= 0 and ours.max() < 1024
    assert reference.agreement(ours, plain_codes(plain(name), extremes)) >= 0.99


@pytest.mark.parametrize("name", MODELS)
def test_stand_in_tokens_spread_over_hundreds_of_values(name, encoder):
    """Without that, equal tokens would show little."""
    codes = codes_of(encoder(name), chunks_of(name, 2.0, 24))
    for book in codes.swapaxes(0, 1):
        assert len(np.unique(book)) >= 200


@pytest.mark.parametrize("avx512, onednn", [(False, True), (True, True), (False, False)])
def test_every_kind_of_cpu_gives_the_same_codes(avx512, onednn, encoder, monkeypatch):
    chunks = chunks_of("encodec_24khz", 1.0, 2)
    ours = codes_of(encoder("encodec_24khz"), chunks)
    monkeypatch.setattr(encodec_tokenizer, "AVX512", avx512)
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.delattr(torch.ops, "mkldnn", raising=False)
    other = codes_of(encoder("encodec_24khz"), chunks)
    assert reference.agreement(ours, other) >= 0.999


@pytest.mark.parametrize("name", MODELS)
def test_a_gpus_encoder_gives_the_same_codes(name, encoder, weights):
    """The encoder for GPUs is EnCodec's own on batches; here it runs on the CPU."""
    settings = settings_of(name, "--batch_size", 8)
    on_gpu = GpuEncoder(load_model(settings, weights(name))[0], settings)
    chunks = chunks_of(name, 1.0, 3)
    assert reference.agreement(codes_of(encoder(name), chunks), codes_of(on_gpu, chunks)) >= 0.999


@pytest.mark.parametrize("name", MODELS)
def test_codes_do_not_depend_on_company_order_or_threads(name, encoder, monkeypatch):
    """Nor does a bit of the latents; codes show it only where two are nearly as near."""
    chunks = [*chunks_of(name, 0.5, 6), *chunks_of(name, 0.3, 5)]
    encoder = encoder(name)
    alone = [next(encoder.encode([chunk])) for chunk in chunks]
    for threads in (1, 3):
        monkeypatch.setattr(encodec_tokenizer.CpuEncoder, "threads", threads)
        for order in (range(11), range(10, -1, -1), [3], [6, 1, 9, 4]):
            found = list(encoder.encode([chunks[i] for i in order]))
            assert len(found) == len(order)
            for i, (codes, latents) in zip(order, found):
                assert np.array_equal(codes, alone[i][0]) and latents.equal(alone[i][1])
